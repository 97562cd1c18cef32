"""FAST: instance after instance through a half-full buffer, every row once an epoch, exact positions, its metric."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from biosae.embeddings import Embeddings
from biosae.errors import InputError
from biosae.sae import SAE, fit_many, instance_mse
from biosae.sae import stream as module
from biosae.sae.rows import Held, Rows
from biosae.sae.sequential import HalfFull, InstanceError, bounds, pieces
from biosae.sae.stream import Stream


class Store:
    """A table with samples, that says which rows were read."""

    def __init__(self, array, *, obs=None, tokens=1):
        self.data, self.obs, self.tokens_per_sample = array, obs, tokens
        self.shape, self.dtype, self.touched = array.shape, array.dtype, set()

    def blocks(self, rows=65536):
        for start in range(0, len(self.data), rows):
            yield start, self[start : start + rows]

    def __getitem__(self, rows):
        numbers = np.arange(len(self.data))[rows]
        self.touched.update(numbers.tolist())
        return self.data[rows].astype(np.float32)


def numbered(n, dtype=np.float32):
    return np.repeat(np.arange(n, dtype=dtype)[:, None], 2, 1)


def build(X, *, memory, **settings):
    rows = X if isinstance(X, Rows) else Rows(X)
    with mock.patch.object(module, "IN_MEMORY", module.IN_MEMORY if memory else 0):
        return Stream(rows, **settings)


def take(stream, count, start=0, **settings):
    batches = stream.batches(start, **settings)
    try:
        return [batch.clone() for batch in itertools.islice(batches, count)]
    finally:
        batches.close()


def ids(batches):
    return torch.cat(batches)[:, 0].long().numpy() if batches else np.zeros(0, np.int64)


LENGTHS = st.lists(st.integers(1, 25), min_size=1, max_size=25)


# ------------------------------------------------------------------------------------------------------- buffer


@given(LENGTHS, st.integers(2, 40), st.integers(0, 5))
def test_the_buffer_serves_every_row_once_in_halves_until_the_flush(lengths, capacity, seed):
    rng, buffer = np.random.default_rng(seed), HalfFull(capacity)
    holds, served, sizes = np.full(2 * capacity, -1), [], []
    edges = np.cumsum([0, *lengths])
    for start, stop in pieces(edges, capacity, rng):
        assert not buffer.full and stop - start <= capacity
        holds[buffer.put(stop - start)] = np.arange(start, stop)
        while buffer.full:
            places = buffer.draw(rng)
            served.append(holds[places])
            sizes.append(len(places))
    assert set(sizes) <= {capacity // 2}
    assert buffer.count < capacity
    served.append(holds[buffer.draw(rng)])
    assert buffer.count == 0
    assert sorted(np.concatenate(served)) == list(range(edges[-1]))


def test_half_of_a_full_buffer_is_a_random_half():
    counts = np.zeros(20)
    for seed in range(2000):
        buffer = HalfFull(20)
        buffer.put(20)
        counts[buffer.draw(np.random.default_rng(seed))] += 1
    assert abs(counts / 2000 - 0.5).max() < 0.045  # 4 standard errors


# ------------------------------------------------------------------------------------------------------- stream


@given(LENGTHS, st.integers(2, 40), st.integers(1, 12), st.booleans(), st.integers(0, 30))
@hypothesis_settings(max_examples=40)
def test_every_row_once_an_epoch_and_exact_positions(lengths, capacity, batch, memory, start):
    n = sum(lengths)
    batch = min(batch, n)
    edges = np.cumsum([0, *lengths])
    settings = {"batch_size": batch, "seed": 5, "fast_buffer": capacity, "instances": edges}
    stream = build(Store(numbered(n, np.float16)), memory=memory, **settings)
    assert stream.in_memory is memory
    per_epoch = n // batch
    whole = take(stream, start + 2 * per_epoch)
    for epoch in range(2):
        found = ids(whole[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert len(set(found)) == len(found) == per_epoch * batch
    again = build(Store(numbered(n, np.float16)), memory=memory, **settings)
    for a, b in zip(take(again, 4, start), take(stream, start + 4)[start:], strict=True):
        assert torch.equal(a, b)
    other = build(Store(numbered(n, np.float16)), memory=not memory, **settings)
    assert torch.equal(torch.cat(take(other, per_epoch)), torch.cat(whole[:per_epoch]))


def test_rows_of_one_instance_come_together():
    edges = np.arange(0, 4001, 40)
    settings = {"batch_size": 50, "seed": 0}
    fast = build(numbered(4000), memory=True, fast_buffer=100, instances=edges, **settings)
    shuffled = build(numbered(4000), memory=True, **settings)

    def instances_of_a_batch(stream):
        return np.mean([len(set(batch[:, 0].long().numpy() // 40)) for batch in take(stream, 80)])

    # a batch is half of a full buffer of 100 to 139 rows, which holds what is left of a few instances
    assert instances_of_a_batch(fast) < 12 < 35 < instances_of_a_batch(shuffled)
    orders = [ids(take(fast, 80)), ids(take(fast, 80, 80))]
    assert not np.array_equal(*orders)  # instances in another order each epoch


def test_an_instance_longer_than_the_buffer_comes_in_parts():
    stream = build(numbered(1000), memory=True, batch_size=10, seed=0, fast_buffer=50, instances=np.array([0, 1000]))
    found = ids(take(stream, 100))
    assert sorted(found) == list(range(1000))
    assert np.median(np.abs(found - np.arange(1000))) < 60  # in order, but for what waits in the buffer


@pytest.mark.parametrize("memory", [True, False])
def test_held_rows_never_come_and_empty_instances_are_skipped(memory):
    held = Held(units=np.r_[np.arange(20, 30), 41, 55])
    stream = build(
        numbered(100), memory=memory, held=held, batch_size=4, seed=1, fast_buffer=16, instances=np.arange(0, 101, 10)
    )
    assert sorted(ids(take(stream, 22))) == sorted(set(range(100)) - {*range(20, 30), 41, 55})


def test_a_later_start_reads_no_more_than_the_buffer_and_what_follows():
    store = Store(numbered(10_000))
    settings = {"batch_size": 50, "seed": 0, "fast_buffer": 200, "instances": np.arange(0, 10_001, 25)}
    late = take(build(store, memory=False, **settings), 2, 180)
    assert len(store.touched) < 200 + 25 + 7 * 50 + 200  # the buffer, two batches, those that the thread is ahead
    early = take(build(numbered(10_000), memory=True, **settings), 182)[180:]
    assert all(torch.equal(a, b) for a, b in zip(late, early, strict=True))


@pytest.mark.parametrize("memory", [True, False])
def test_the_ranks_parts_make_the_batch(memory):
    settings = {"batch_size": 12, "seed": 2, "fast_buffer": 30, "instances": np.arange(0, 101, 10)}
    parts = [take(build(numbered(100), memory=memory, **settings), 9, 3, part=(rank, 3)) for rank in range(3)]
    for whole, *shares in zip(take(build(numbered(100), memory=memory, **settings), 9, 3), *parts, strict=True):
        assert torch.equal(whole, torch.cat(shares))


def test_chunks_are_instances_in_their_own_order():
    x = numbered(300)
    sizes = [30, 5, 120, 45, 100]
    source = lambda: iter(np.split(x, np.cumsum(sizes)[:-1]))  # noqa: E731
    stream = Stream(Rows(source), batch_size=10, seed=3, fast_buffer=40)
    whole = take(stream, 60)
    for epoch in range(2):
        assert sorted(ids(whole[30 * epoch : 30 * epoch + 30])) == list(range(300))
    for a, b in zip(take(stream, 5, 41), whole[41:46], strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="gave 300 rows, a batch has 400"):
        take(Stream(Rows(source), batch_size=400, seed=3, fast_buffer=40), 1)


def test_what_an_instance_is():
    x = numbered(12)
    given_groups = bounds(Rows(x), ["a"] * 5 + ["b"] * 3 + ["a"] * 4)
    assert given_groups.tolist() == [0, 5, 8, 12]  # a label that comes again starts a new one
    obs = pd.DataFrame({"patient": list("ppqqqq"), "slide": list("aabbcc")}, index=list("123456"))
    assert bounds(Rows(Store(x, obs=obs, tokens=2))).tolist() == [0, 4, 8, 12]
    assert bounds(Rows(Store(x, obs=obs[["patient"]], tokens=2))).tolist() == [0, 4, 12]
    assert bounds(Rows(Store(x, tokens=3))).tolist() == [0, 3, 6, 9, 12]
    assert bounds(Rows(Store(x, tokens=3)), list("aabb")).tolist() == [0, 6, 12]
    with pytest.raises(InputError, match="pass groups"):
        bounds(Rows(x))
    with pytest.raises(InputError, match="3 entries for 12 rows"):
        bounds(Rows(x), list("abc"))


# ------------------------------------------------------------------------------------------------------- metric


def test_the_error_is_averaged_within_instances_first():
    x, x_hat = np.array([[2.0], [1.0], [1.0], [1.0]]), np.array([[0.0], [1.0], [1.0], [1.0]])
    found = InstanceError(3, 1)  # the third instance has no rows
    found.update(x[:2], x_hat[:2], np.array([0, 1]))
    found.update(x[2:], x_hat[2:], np.array([1, 1]))
    assert found.mse == 2  # the average over tokens would be 1
    assert np.isnan(InstanceError(2, 1).mse)


# -------------------------------------------------------------------------------------------------- the estimator


def drifting(n_groups=12, per=60, d=8):
    """Rows of recordings that differ in where they lie."""
    rng = np.random.default_rng(0)
    centres = np.repeat(rng.standard_normal((n_groups, d)), per, 0)
    x = centres + 0.3 * rng.standard_normal((n_groups * per, d))
    return x.astype(np.float32), np.repeat([f"r{i}" for i in range(n_groups)], per)


QUICK = {"n_latents": 16, "k": 3, "n_steps": 30, "batch_size": 64, "random_state": 0, "device": "cpu"}


def test_training_in_this_order_learns_and_is_another_training():
    x, groups = drifting()
    fast = SAE("topk", order="fast", buffer_rows=128, **QUICK).fit(x, groups=groups)
    again = SAE("topk", order="fast", buffer_rows=128, **QUICK).fit(x, groups=groups)
    shuffled = SAE("topk", **QUICK).fit(x, groups=groups)
    np.testing.assert_array_equal(fast.decoder_, again.decoder_)
    assert (fast.decoder_ != shuffled.decoder_).any()
    assert fast.metrics_["fvu"] < 0.5 and fast.validation_ == shuffled.validation_
    chunks = SAE("topk", order="fast", **QUICK).fit(lambda: iter(np.split(x, 12)))
    assert chunks.metrics_["fvu"] < 0.5
    with pytest.raises(InputError, match="pass groups"):
        SAE("topk", order="fast", **QUICK).fit(x)
    with pytest.raises(InputError, match="one order"):
        fit_many([SAE(order="fast", **QUICK), SAE(**QUICK)], x, groups=groups)
    with pytest.raises(InputError, match="buffer_rows=1 "):
        SAE(order="fast", buffer_rows=1).fit(x, groups=groups)
    with pytest.raises(InputError, match="did you mean 'fast'"):
        SAE(order="fats").fit(x, groups=groups)


def test_a_killed_training_goes_on_exactly(tmp_path):
    x, groups = drifting()

    def stop(step, _):
        if step == 13:
            raise KeyboardInterrupt

    settings = {"order": "fast", "buffer_rows": 100, **QUICK, "n_steps": 40}
    kept = {"checkpoint": str(tmp_path), "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        SAE("topk", callbacks=(stop,), **settings, **kept).fit(x, groups=groups)
    went_on = SAE("topk", **settings, **kept).fit(x, groups=groups)
    straight = SAE("topk", **settings).fit(x, groups=groups)
    np.testing.assert_array_equal(went_on.decoder_, straight.decoder_)
    with pytest.raises(InputError, match="other settings, data or seed"):
        SAE("topk", **settings | {"order": "shuffled"}, **kept).fit(x, groups=groups)


def test_error_by_instance_of_a_fitted_model():
    x, groups = drifting(n_groups=6)
    keep = np.r_[0:60, 60:65, 120:360]  # the second recording is short
    x, groups = x[keep], groups[keep]
    sae = SAE("topk", **QUICK).fit(x, groups=groups)
    square = np.square(x.astype(float) - sae.inverse_transform(sae.codes(x))).sum(1) / 8
    by_hand = np.mean([square[groups == g].mean() for g in np.unique(groups)])
    mask = np.random.default_rng(0).random(len(x)) < 0.3
    found = instance_mse(sae, x, groups=groups, special=mask)
    assert found["mse"] == pytest.approx(by_hand) and found["n_instances"] == 6
    some = [square[(groups == g) & mask].mean() for g in np.unique(groups[mask])]
    assert found["mse_special"] == pytest.approx(np.mean(some)) and found["n_special"] == mask.sum()
    tokens = Embeddings.from_array(x[:300], tokens_per_sample=5)
    found = instance_mse(sae, tokens, special=[0])
    assert found["n_instances"] == 60 and found["n_special"] == 60
    assert found["mse"] == pytest.approx(square[:300].mean())
    assert found["mse_special"] == pytest.approx(square[:300:5].mean())
    with pytest.raises(InputError, match="0 to 4"):
        instance_mse(sae, tokens, special=[5])
    with pytest.raises(InputError, match="one entry for each"):
        instance_mse(sae, x, groups=groups, special=mask[:5])
