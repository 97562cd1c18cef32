"""Properties of the store for any number of samples, shard and batch size, set of failures and choice of rows."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import numpy as np
from embed_standins import PatchEncoder, dense, make_samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from biosae.embeddings import Embeddings, embed

QUIET = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FAULTS = st.sampled_from(["truncated", "bug", "nan"])


@st.composite
def jobs(draw: st.DrawFn) -> dict:
    n = draw(st.integers(1, 24))
    return {
        "n": n,
        "faults": draw(st.dictionaries(st.integers(0, n - 1), FAULTS, max_size=n)),
        "shard_samples": draw(st.integers(1, 30)),
        "batch_size": draw(st.integers(1, 30)),
        "n_jobs": draw(st.sampled_from([0, 2])),
        "dtype": draw(st.sampled_from(["float32", "float16"])),
        "pool": draw(st.sampled_from(["mean", "tokens"])),
    }


def run(job: dict, out: str) -> Embeddings:
    options = {k: v for k, v in job.items() if k not in ("n", "faults")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return embed(make_samples(job["n"], faults=job["faults"]), PatchEncoder(), out=out, max_failures=1.0, **options)


@QUIET
@given(job=jobs(), data=st.data())
def test_rows_equal_the_dense_reference_by_id(job: dict, data: st.DataObject) -> None:
    good = [i for i in range(job["n"]) if i not in job["faults"]]
    with tempfile.TemporaryDirectory() as out:
        emb = run(job, out)
        assert emb.obs.index.tolist() == [f"s{i:04d}" for i in good]
        assert emb.provenance["n_failures"] == len(job["faults"])
        T = emb.tokens_per_sample
        assert emb.shape == (len(good) * T, 6)
        if not good:
            return
        close = {"rtol": 2e-3, "atol": 2e-3} if job["dtype"] == "float16" else {"rtol": 1e-5, "atol": 1e-6}
        reference = dense(make_samples(job["n"]).select(good), PatchEncoder(), "late", job["pool"])
        np.testing.assert_allclose(emb.array(), reference, **close)
        np.testing.assert_array_equal(Embeddings.open(Path(out) / "stand_in/late", verify=True).array(), emb.array())

        X = emb.array()
        rows = data.draw(st.lists(st.integers(-len(X), len(X) - 1), max_size=40))
        np.testing.assert_array_equal(emb[rows], X[np.array(rows, int)])
        start, stop, step = (data.draw(st.none() | st.integers(-50, 50).filter(lambda v: v != 0)) for _ in range(3))
        np.testing.assert_array_equal(emb[start:stop:step], X[start:stop:step])
        size = data.draw(st.integers(1, 50))
        np.testing.assert_array_equal(np.concatenate([b for _, b in emb.blocks(size)]), X)

        chosen = data.draw(
            st.permutations(range(len(good))).flatmap(lambda p: st.integers(0, len(p)).map(lambda k: p[:k]))
        )
        view = emb.select([emb.obs.index[i] for i in chosen])
        tokens = X.reshape(len(good), T, 6)[np.array(chosen, int)]
        np.testing.assert_array_equal(view.array(), tokens.reshape(-1, 6))
        assert view.obs["number"].tolist() == [good[i] for i in chosen]
        mask = np.isin(np.arange(len(view)), data.draw(st.lists(st.integers(0, 50))))
        np.testing.assert_array_equal(view[mask], view.array()[mask])
        if len(chosen):
            np.testing.assert_allclose(view.pooled(), tokens.astype(np.float64).mean(1), rtol=1e-6, atol=1e-7)
            np.testing.assert_array_equal(np.concatenate([b for _, b in view.blocks(size)]), view.array())


@QUIET
@given(job=jobs(), data=st.data())
def test_any_set_of_lost_shards_is_restored_to_the_byte(job: dict, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as out:
        run(job, out)
        folder = Path(out) / "stand_in/late"
        whole = {p.name: p.read_bytes() for p in folder.iterdir()}
        for name in data.draw(st.lists(st.sampled_from(sorted(whole)), unique=True)):
            (folder / name).unlink()
        run(job, out)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole


@QUIET
@given(
    n=st.integers(0, 12),
    tokens=st.integers(1, 4),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    rows=st.data(),
)
def test_an_array_in_memory_behaves_as_files_do(n: int, tokens: int, dtype: type, rows: st.DataObject) -> None:
    X = np.random.default_rng(n).normal(size=(n * tokens, 3)).astype(dtype)
    emb = Embeddings.from_array(X, tokens_per_sample=tokens)
    np.testing.assert_array_equal(emb.array(), X.astype(np.float32))
    if n:
        take = rows.draw(st.lists(st.integers(-len(X), len(X) - 1), max_size=20))
        np.testing.assert_array_equal(emb[take], X.astype(np.float32)[np.array(take, int)])
        order = rows.draw(st.permutations(range(n)))
        expected = X.reshape(n, tokens, 3)[order].reshape(-1, 3).astype(np.float32)
        np.testing.assert_array_equal(emb.select(order).array(), expected)
