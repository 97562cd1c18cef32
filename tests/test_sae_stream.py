"""Where batches come from: every row once an epoch, exact positions, whole patients held out, bounded memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from embed_standins import PatchEncoder, make_samples
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from biosae.embeddings import embed
from biosae.errors import InputError
from biosae.sae import stream as module
from biosae.sae.rows import Held, Rows, spread
from biosae.sae.stream import Stream


class Store:
    """A store of float16 rows that says what was read."""

    def __init__(self, array, *, obs=None, tokens=1):
        self.data, self.obs, self.tokens_per_sample = array, obs, tokens
        self.shape, self.dtype, self.spans = array.shape, array.dtype, []

    def blocks(self, rows=65536):
        for start in range(0, len(self.data), rows):
            yield start, self[start : start + rows]

    def __getitem__(self, rows):
        if isinstance(rows, slice):
            self.spans.append((rows.start, rows.stop))
        return self.data[rows].astype(np.float32)


def numbered(n, d=2, dtype=np.float32):
    """Row i holds i in every column, so that a row says which it is."""
    return np.repeat(np.arange(n, dtype=dtype)[:, None], d, 1)


def streamed(X, **settings):
    with mock.patch.object(module, "IN_MEMORY", 0):
        return Stream(X if isinstance(X, Rows) else Rows(X), **settings)


def take(stream, count, start=0, **settings):
    batches = stream.batches(start, **settings)
    try:
        return [batch.clone() for batch in itertools.islice(batches, count)]
    finally:
        batches.close()


def ids(batches):
    return torch.cat(batches)[:, 0].long().numpy() if batches else np.zeros(0, np.int64)


def reading_threads():
    return [t for t in threading.enumerate() if t.name == "biosae-stream"]


SHAPES = st.tuples(st.integers(1, 300), st.integers(1, 40), st.integers(1, 6), st.integers(1, 50), st.booleans())


def build(shape, **settings):
    n, block, buffer, batch, memory = shape
    sizes = {"batch_size": min(batch, n), "block_rows": block, "buffer_blocks": buffer}
    make = Stream if memory else streamed
    return make(Rows(Store(numbered(n, dtype=np.float16))), **sizes | {"seed": 3} | settings)


# -------------------------------------------------------------------------------------------------- order


@given(SHAPES)
@hypothesis_settings(max_examples=60, deadline=None)
def test_every_row_comes_once_an_epoch(shape):
    stream = build(shape)
    assert stream.in_memory == shape[-1] and stream.per_epoch == stream.n // stream.batch_size
    epochs = []
    batches = take(stream, 3 * stream.per_epoch)
    assert all(b.shape == (stream.batch_size, 2) and b.dtype == torch.float32 for b in batches)
    for epoch in range(3):
        found = ids(batches[epoch * stream.per_epoch : (epoch + 1) * stream.per_epoch])
        assert len(set(found)) == len(found) == stream.n - stream.n % stream.batch_size
        epochs.append(tuple(found))
    if len(epochs[0]) > 20 and shape[1] * shape[2] > 20:
        assert len(set(epochs)) == 3


@given(SHAPES, st.integers(0, 60), st.integers(1, 12))
@hypothesis_settings(max_examples=60, deadline=None)
def test_starting_later_equals_skipping(shape, start, count):
    stream = build(shape)
    assert torch.equal(torch.cat(take(stream, count, start)), torch.cat(take(stream, start + count)[start:]))


def test_the_seed_alone_decides():
    shape = (300, 7, 5, 20, False)
    first, again, other = (ids(take(build(shape, seed=seed), 15)) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).mean() > 0.9


def test_starting_late_reads_the_buffers_it_needs_only():
    store = Store(numbered(4000))
    stream = streamed(store, batch_size=100, seed=0, block_rows=50, buffer_blocks=10)  # 8 buffers of 500 rows
    take(stream, 1, 2 * 40 + 37)
    epoch_end = store.spans[:10]
    assert sorted(ids(take(stream, 5, 2 * 40 + 35))) == sorted(r for a, b in epoch_end for r in range(a, b))
    assert all(b - a == 50 for a, b in store.spans)


def test_buffers_span_the_file_and_batches_do_not_follow_it():
    n = 60_000
    stream = streamed(numbered(n), batch_size=500, seed=5, block_rows=200, buffer_blocks=30)
    order = ids(take(stream, stream.per_epoch))
    first = order[:6000]
    assert len(set(first // 200)) == 30
    counts = np.bincount(first // 12_000, minlength=5)  # a fifth of the buffer from each fifth of the file
    assert counts.min() > 0 and counts.max() < 0.5 * 6000
    assert abs(np.corrcoef(np.arange(6000), first)[0, 1]) < 0.05
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.1  # neighbours in a batch are strangers in the file
    per_batch = order.reshape(-1, 500) // 200
    assert min(len(set(blocks)) for blocks in per_batch) > 20


def test_the_last_buffer_is_as_long_as_the_others():
    store = Store(numbered(330))
    stream = streamed(store, batch_size=10, seed=0, block_rows=10, buffer_blocks=32)  # 33 blocks: 17 and 16
    order = ids(take(stream, 33))
    assert len(set(order[:170] // 10)) == 17 and len(set(order[170:] // 10)) == 16


@given(SHAPES, st.sampled_from([2, 3, 4]), st.integers(0, 20))
@hypothesis_settings(max_examples=60, deadline=None)
def test_the_ranks_parts_make_the_global_batch(shape, world, start):
    n, block, buffer, batch, memory = shape
    batch = max(1, min(batch, n) // world) * world
    if batch > n:
        return
    stream = build((n, block, buffer, batch, memory))
    parts = [take(stream, 5, start, part=(rank, world)) for rank in range(world)]
    for whole, *pieces in zip(take(stream, 5, start), *parts, strict=True):
        assert torch.equal(whole, torch.cat(pieces))


def test_batches_that_ranks_cannot_share_are_refused():
    stream = Stream(Rows(numbered(50)), batch_size=10, seed=0)
    with pytest.raises(InputError, match="batch_size that 4 divides"):
        stream.batches(part=(0, 4))
    with pytest.raises(InputError, match="60, but there are 50 training rows"):
        Stream(Rows(numbered(50)), batch_size=60, seed=0)


# ------------------------------------------------------------------------------------------------ number types


@pytest.mark.parametrize("make", [Stream, streamed])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "bfloat16"])
def test_number_types_give_the_same_rows(make, dtype):
    rng = np.random.default_rng(0)
    x = np.round(rng.standard_normal((200, 5)) * 4)
    given_x = torch.from_numpy(x).bfloat16() if dtype == "bfloat16" else x.astype(dtype)
    settings = {"batch_size": 20, "seed": 1, "block_rows": 16, "buffer_blocks": 4}
    expected = make(Rows(x.astype(np.float32)), **settings)
    found = make(Rows(given_x), **settings)
    assert torch.equal(torch.cat(take(found, 25)), torch.cat(take(expected, 25)))
    np.testing.assert_array_equal(found.sample(50, 2), expected.sample(50, 2))
    np.testing.assert_array_equal(np.concatenate(list(found.blocks())), x)


def test_a_table_in_memory_is_not_copied_and_halves_stay_halves():
    x = numbered(100)
    stream = Stream(Rows(x), batch_size=10, seed=0)
    assert stream._table.data_ptr() == x.ctypes.data
    assert Stream(Rows(Store(x.astype(np.float16))), batch_size=10, seed=0)._table.dtype == torch.float16
    x.flags.writeable = False
    assert len(ids(take(Stream(Rows(x), batch_size=10, seed=0), 10))) == 100


def test_rows_of_a_store_may_come_as_stored():
    class Raw(Store):
        def raw(self, start, stop):
            return self.data[start:stop].copy()

    x = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float16)
    one, other = (streamed(kind(x), batch_size=30, seed=0, block_rows=20, buffer_blocks=4) for kind in (Store, Raw))
    assert torch.equal(torch.cat(take(one, 20)), torch.cat(take(other, 20)))


# ------------------------------------------------------------------------------------------------------ held out


def patients(sizes):
    names = [f"p{i}" for i, size in enumerate(sizes) for _ in range(size)]
    return pd.DataFrame({"patient": names}, index=[f"tile{i}" for i in range(len(names))])


@given(st.lists(st.integers(1, 12), min_size=4, max_size=25), st.integers(1, 4), st.booleans(), st.integers(0, 9))
@hypothesis_settings(max_examples=60, deadline=None)
def test_whole_patients_are_held_out_and_never_come(sizes, tokens, memory, seed):
    obs = patients(sizes)
    rows = Rows(Store(numbered(len(obs) * tokens), obs=obs, tokens=tokens))
    held = Held.draw(rows, share=0.2, rng=np.random.default_rng(seed))
    row_patient = np.repeat(obs["patient"].to_numpy(), tokens)
    mask = held.mask(0, rows.n)
    assert held.by == "patient" and len(held) == mask.sum() <= max(2, 2 * round(0.2 * rows.n))
    assert held.training_groups == set(row_patient[~mask]) and not held.training_groups & set(row_patient[mask])
    assert held.n_groups == len(set(row_patient[mask]))
    for start in range(0, rows.n, 7):
        np.testing.assert_array_equal(held.mask(start, min(start + 7, rows.n)), mask[start : start + 7])
    np.testing.assert_array_equal(held.before(np.arange(rows.n + 1)), np.concatenate([[0], np.cumsum(mask)]))
    np.testing.assert_array_equal(held.rows(np.arange(len(held))), np.flatnonzero(mask))

    make = Stream if memory else streamed
    stream = make(rows, held=held, batch_size=1, seed=seed, block_rows=5, buffer_blocks=3)
    assert stream.n == (~mask).sum()
    assert sorted(ids(take(stream, stream.per_epoch))) == np.flatnonzero(~mask).tolist()
    assert sorted(stream.sample(10**6, 0)[:, 0]) == np.flatnonzero(~mask).tolist()
    assert np.concatenate(list(stream.blocks()))[:, 0].tolist() == np.flatnonzero(~mask).tolist()
    assert stream.held_sample(10**6, 0)[:, 0].tolist() == np.flatnonzero(mask).tolist()


def test_what_is_kept_together():
    rng = np.random.default_rng
    x = numbered(1200)
    by_sample = Held.draw(Rows(Store(x, tokens=6)), share=0.1, rng=rng(0))
    assert (by_sample.by, by_sample.size, len(by_sample), by_sample.n_groups) == ("sample", 6, 120, 20)
    assert not by_sample.training_groups
    by_row = Held.draw(Rows(x), share=0.1, rng=rng(0))
    assert (by_row.by, len(by_row), by_row.n_groups) == ("row", 120, 0)
    labels = np.repeat(["a", "b", np.nan, "d", "e", "f"], 200)
    given_groups = Held.draw(Rows(x), groups=labels, share=0.15, rng=rng(0))
    assert given_groups.by == "groups" and len(given_groups) == 200 and len(given_groups.training_groups) == 5
    of_samples = Held.draw(Rows(Store(x, tokens=6)), groups=np.repeat(["a", "b", "c", "d"], 50), share=0.2, rng=rng(0))
    assert (of_samples.size, len(of_samples), of_samples.n_groups) == (6, 300, 1)
    assert len(Held.draw(Rows(x), share=0, rng=rng(0))) == len(Held.draw(Rows(x[:19]), share=0.5, rng=rng(0))) == 0
    with pytest.raises(InputError, match="3 entries for 1200 rows"):
        Held.draw(Rows(x), groups=["a", "b", "c"], share=0.1, rng=rng(0))


def test_without_groups_what_is_held_does_not_grow_with_the_table():
    huge = mock.Mock(n=10**10, tokens=1, obs=None)
    held = Held.draw(huge, share=0.1, rng=np.random.default_rng(0))
    assert len(held) == 200_000 and held.units.nbytes == 1_600_000
    assert np.diff(held.units).min() > 0 and held.units[0] < 50_000 and held.units[-1] > 10**10 - 50_001


@given(st.integers(0, 500), st.integers(0, 600), st.integers(0, 5))
@hypothesis_settings(deadline=None)
def test_spread_numbers_are_different_and_cover_the_range(n, count, seed):
    found = spread(n, count, np.random.default_rng(seed))
    assert len(found) == min(n, count) and (np.diff(found) > 0).all()
    if len(found):
        gap = n / len(found)
        assert found[0] >= 0 and found[-1] < n and (np.abs(found - gap * np.arange(len(found))) <= gap).all()


def test_samples_of_a_store_span_it_in_whole_blocks():
    store = Store(numbered(64_000))
    stream = streamed(store, batch_size=100, seed=0, block_rows=64, buffer_blocks=32)
    found = stream.sample(2000, 7)
    assert len(store.spans) == 125 and all(b - a == 64 for a, b in store.spans)
    assert len(set(found[:, 0])) == 2000 and np.bincount((found[:, 0] // 16_000).astype(int)).min() > 450
    assert abs(np.corrcoef(found[:, 0], np.arange(2000))[0, 1]) < 0.1
    np.testing.assert_array_equal(found, stream.sample(2000, 7))
    assert (found != stream.sample(2000, 8)).any()


# ---------------------------------------------------------------------------------------------------- chunks


def chunked(X, sizes):
    return [X[a:b] for a, b in itertools.pairwise(np.cumsum([0, *sizes]))]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 9), st.integers(1, 5), st.integers(0, 30))
@hypothesis_settings(max_examples=40, deadline=None)
def test_chunks_pass_once_an_epoch_and_start_again(sizes, block, buffer, start):
    n = sum(sizes)
    if n == 0:
        return
    batch = max(1, min(n, 7))
    stream = Stream(
        Rows(lambda: iter(chunked(numbered(n), sizes))),
        batch_size=batch,
        seed=0,
        block_rows=block,
        buffer_blocks=buffer,
    )
    assert (stream.n, stream.per_epoch, stream.in_memory, stream.rows.d) == (None, None, False, 2)
    per_epoch = n // batch
    batches = take(stream, start + 2 * per_epoch)
    for epoch in range(2):
        found = ids(batches[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert len(set(found)) == len(found) == per_epoch * batch
        within = np.arange(len(found)) // (block * buffer) * (block * buffer)  # first row of the buffer it came in
        assert ((found >= within) & (found < within + block * buffer)).all()
    assert torch.equal(torch.cat(take(stream, 4, start)), torch.cat(take(stream, start + 4)[start:]))
    assert np.concatenate(list(stream.blocks()))[:, 0].tolist() == list(range(n))
    first = stream.sample(5, 0)[:, 0]
    assert len(set(first)) == len(first) == min(5, n, block * buffer) and first.max() < block * buffer


def test_lists_and_data_loaders_are_chunks():
    x = numbered(100)
    settings = {"batch_size": 10, "seed": 4, "block_rows": 10, "buffer_blocks": 3}
    expected = torch.cat(take(Stream(Rows(lambda: iter(np.split(x, 5))), **settings), 25))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.from_numpy(x)), batch_size=20)
    for source in (np.split(x, 5), [torch.from_numpy(part) for part in np.split(x, 5)], loader):
        assert torch.equal(torch.cat(take(Stream(Rows(source), **settings), 25)), expected)
    assert Rows(x.tolist()).n == 100  # a list of rows is a table


def test_chunks_that_cannot_serve_are_refused():
    x = numbered(60)
    with pytest.raises(InputError, match="pass a callable"):
        Rows(part for part in np.split(x, 3))
    once = iter(np.split(x, 3))
    with pytest.raises(InputError, match="same iterator again"):
        Rows(lambda: once)
    with pytest.raises(InputError, match="no rows"):
        Rows(lambda: iter([]))
    with pytest.raises(InputError, match="chunk 1 has shape"):
        take(Stream(Rows([x, x[:, :1]]), batch_size=10, seed=0), 9)
    with pytest.raises(InputError, match=r"chunk 1 .*float16"):
        take(Stream(Rows([x, x.astype(np.float16)]), batch_size=10, seed=0), 9)
    with pytest.raises(InputError, match="gave 60 rows, a batch has 70"):
        take(Stream(Rows([x]), batch_size=70, seed=0), 1)
    with pytest.raises(InputError, match="groups cannot be matched"):
        Held.draw(Rows([x]), groups=["a"], share=0.1, rng=np.random.default_rng(0))
    stream = Stream(
        Rows([x]), batch_size=10, seed=0, held=Held.draw(Rows([x]), share=0.1, rng=np.random.default_rng(0))
    )
    assert stream.held_sample(10, 0).shape == (0, 2)


# ------------------------------------------------------------------------------------------- errors and threads


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_not_finite_rows_are_named_wherever_they_are_read(dtype):
    x = numbered(120, dtype=dtype)
    x[33, 1], x[77, 0] = np.nan, -np.inf
    obs = pd.DataFrame(index=[f"tile{i}" for i in range(60)])
    settings = {"batch_size": 10, "seed": 0, "block_rows": 120, "buffer_blocks": 2}
    with pytest.raises(InputError, match=r"NaN or infinity in 2 of the 120 .* row 33, 77;"):
        Stream(Rows(x), **settings)
    stream = streamed(Store(x, obs=obs, tokens=2), **settings)
    for read in (lambda: take(stream, 2), lambda: stream.sample(30, 0), lambda: list(stream.blocks())):
        with pytest.raises(InputError, match=r"row 33 \(tile16\), 77 \(tile38\)"):
            read()
    with pytest.raises(InputError, match="row 3 of chunk 1;"):
        take(Stream(Rows(np.split(x, 4)), **settings), 12)
    held = Held(units=np.array([33, 40]))
    with pytest.raises(InputError, match="row 33;"):
        streamed(x, held=held, **settings).held_sample(2, 0)


def test_errors_of_the_source_reach_training_and_the_thread_ends():
    def chunks():
        yield numbered(40)
        raise OSError("disk gone")

    batches = Stream(Rows(chunks), batch_size=10, seed=0, block_rows=5, buffer_blocks=4).batches()
    with pytest.raises(OSError, match="disk gone"):
        list(batches)
    assert not reading_threads()


def test_closing_or_dropping_the_batches_ends_the_thread():
    closed = []

    def chunks():
        try:
            for _ in range(1000):
                yield numbered(64)
        finally:
            closed.append(True)

    for stream in (streamed(numbered(5000), batch_size=50, seed=0), Stream(Rows(chunks), batch_size=50, seed=0)):
        batches = stream.batches()
        assert not reading_threads()  # nothing is read before it is asked for
        next(batches)
        assert len(reading_threads()) == 1
        batches.close()
        assert not reading_threads()
        batches = stream.batches()
        next(batches)
        del batches
        assert not reading_threads()
    assert closed[-1]


# ---------------------------------------------------------------------------------------------------- at size

MEASURE = r"""
import itertools, re, sys
import numpy as np, torch
from biosae.embeddings import Embeddings
from biosae.sae import stream as module
from biosae.sae.rows import Held, Rows

def anonymous():
    return int(re.search(r"RssAnon:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024

torch.set_num_threads(1)
module.IN_MEMORY = 0
rows = Rows(Embeddings.open(sys.argv[1]))
before = most = anonymous()
held = Held.draw(rows, share=0.1, rng=np.random.default_rng(0))
stream = module.Stream(rows, held=held, batch_size=4096, seed=0)
for batch in itertools.islice(stream.batches(), int(1.2 * stream.per_epoch)):
    most = max(most, anonymous())
print(rows.n, held.by, len(held), most - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_of_a_stream_does_not_grow_with_the_table(tmp_path):
    root, grown = Path(__file__).resolve().parents[1], []
    for n_samples in (1000, 5000):  # of 100 tokens
        folder = tmp_path / str(n_samples)
        encoder = PatchEncoder(dim=768)
        embed(make_samples(n_samples, side=40), encoder, pool="tokens", out=folder, dtype="float16", n_jobs=0)
        store = next(folder.rglob("provenance.json")).parent
        command = [sys.executable, "-c", MEASURE, str(store)]
        out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout.split()
        assert out[:3] == [str(100 * n_samples), "patient", str(20 * n_samples)]
        grown.append(float(out[3]))
    assert grown[1] <= 250 and grown[1] <= grown[0] + 50  # the buffer of the small one is not full
