"""Embeddings: rows, views, and what happens to files that were altered."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from embed_standins import PatchEncoder, make_samples

from biosae.embeddings import Embeddings, embed
from biosae.encoders import fingerprint
from biosae.errors import FormatError, InputError

LAYER = "stand_in/late"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embeddings")
    embed(make_samples(25), PatchEncoder(), pool="mean", out=out, batch_size=4, shard_samples=10)
    return out / LAYER


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_the_shards_are_plain_npy_files_one_below_the_other(folder: Path) -> None:
    shards = [np.load(path) for path in sorted(folder.glob("shard-*.npy"))]
    assert [len(s) for s in shards] == [10, 10, 5]
    np.testing.assert_array_equal(np.concatenate(shards), Embeddings.open(folder).array())
    # np.save of the same rows gives the same bytes: readers of the format need nothing of ours
    np.save(folder.parent / "again.npy", shards[1])
    assert (folder.parent / "again.npy").read_bytes() == (folder / "shard-00001.npy").read_bytes()


def test_indexing_is_numpys(folder: Path) -> None:
    emb = Embeddings.open(folder)
    X = emb.array()
    rng = np.random.default_rng(0)
    for rows in (
        0, -1, np.int64(7), slice(None), slice(8, 12), slice(-3, None), slice(20, 5), slice(None, None, -3),
        rng.integers(-25, 25, 60), [3, 3, 24, 0], np.array([], int), [], X[:, 0] > 0,
    ):  # fmt: skip
        found = emb[rows]
        np.testing.assert_array_equal(found, X[np.array(rows, int) if isinstance(rows, list) else rows])
        assert found.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(emb), X)
    assert np.asarray(emb, dtype=np.float64).dtype == np.float64
    for wrong in (25, -26, [0, 25], np.zeros(24, bool), [[1, 2]], "s0001", 1.5):
        with pytest.raises(IndexError):
            emb[wrong]


def test_returned_rows_are_copies(folder: Path) -> None:
    emb = Embeddings.open(folder)
    before = emb[3].copy()
    emb[3:5][:] = 0
    emb[3][:] = 0
    np.testing.assert_array_equal(emb[3], before)
    array = np.ones((4, 2), np.float32)
    held = Embeddings.from_array(array)
    held[:2][:] = 5
    assert array.max() == 1


def test_blocks_cover_all_rows_in_order(folder: Path) -> None:
    emb = Embeddings.open(folder)
    for rows in (1, 7, 10, 25, 999):
        starts, blocks = zip(*emb.blocks(rows))
        assert list(starts) == list(range(0, 25, rows))
        np.testing.assert_array_equal(np.concatenate(blocks), emb.array())
    with pytest.raises(InputError, match="rows=0"):
        next(emb.blocks(0))


def test_select_takes_ids_masks_and_positions(folder: Path) -> None:
    emb = Embeddings.open(folder)
    ids = ["s0020", "s0003", "s0011"]
    view = emb.select(ids)
    assert view.obs.index.tolist() == ids and view.shape == (3, 6)
    np.testing.assert_array_equal(view.array(), emb[[20, 3, 11]])
    np.testing.assert_array_equal(view.select(["s0011"])[0], emb[11])
    mask = (emb.obs["patient"] == "p1").rename(None)
    np.testing.assert_array_equal(emb.select(mask).array(), emb[mask.to_numpy()])
    shuffled = mask.sample(frac=1, random_state=0)  # a Series goes by id, not by position
    assert emb.select(shuffled).obs.equals(emb.select(mask).obs)
    np.testing.assert_array_equal(emb.select([-1, 0]).array(), emb[[-1, 0]])
    assert len(emb.select([])) == 0 and emb.select([]).array().shape == (0, 6)
    for wrong, text in (
        (["s0001", "nobody"], "'nobody'"), (["s0001", "s0001"], "twice"), (np.ones(3, bool), "shape"),
        ([25], "positions"), (mask.iloc[:5], "every sample id"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=text):
            emb.select(wrong)


def test_tokens_of_a_view_stay_together() -> None:
    X = np.arange(5 * 6 * 2, dtype=np.float32).reshape(30, 2)
    emb = Embeddings.from_array(X, tokens_per_sample=6, grid=(2, 3))
    view = emb.select(["sample_0000003", "sample_0000000"])
    assert view.shape == (12, 2) and view.n_samples == 2 and view.grid == (2, 3)
    np.testing.assert_array_equal(view.array(), np.concatenate([X[18:24], X[:6]]))
    np.testing.assert_array_equal(view[[6, 0]], X[[0, 18]])
    np.testing.assert_allclose(emb.pooled(), X.reshape(5, 6, 2).mean(1))
    np.testing.assert_array_equal(view.pooled("max"), X.reshape(5, 6, 2).max(1)[[3, 0]])
    with pytest.raises(InputError, match="'median'"):
        emb.pooled("median")


def test_a_pickled_view_reads_the_same_rows(folder: Path) -> None:
    view = Embeddings.open(folder).select(["s0024", "s0001"])
    rows = view.array()  # the files are mapped by now
    packed = pickle.dumps(view)
    assert len(packed) < 20_000  # holds no rows of the files
    np.testing.assert_array_equal(pickle.loads(packed).array(), rows)  # noqa: S301


def test_a_relative_folder_survives_a_change_of_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    emb = Embeddings.open("late")
    monkeypatch.chdir(folder.parents[2])
    assert emb[0].shape == (6,)


def test_identity_and_fingerprint_come_back(folder: Path) -> None:
    emb = Embeddings.open(folder, verify=True)
    identity = PatchEncoder().at_mpp(0.5).identity("late", "mean")
    assert emb.identity == identity and emb.fingerprint == fingerprint(identity)
    assert Embeddings.from_array(np.eye(2)).fingerprint is None
    assert "stand/in, late, mean" in repr(emb)
    assert emb.provenance["software"]["versions"]["numpy"] == np.__version__


def test_from_array_checks_what_it_is_given() -> None:
    obs = pd.DataFrame({"patient": list("aabb")}, index=[4, 5, 6, 7])
    emb = Embeddings.from_array(np.eye(4), obs=obs, identity={"encoder": "mine"})
    assert emb.dtype == np.float32 and emb.obs.index.tolist() == ["4", "5", "6", "7"]
    assert Embeddings.from_array(np.eye(4, dtype=np.float16)).dtype == np.float16
    for X, options, text in (
        (np.ones(3), {}, r"\(n_rows, d\)"),
        (np.ones((5, 2)), {"tokens_per_sample": 2}, "5 rows"),
        (np.ones((4, 2)), {"tokens_per_sample": 4, "grid": (2, 3)}, "grid"),
        (np.array([[1.0, np.nan]]), {}, "NaN"),
        (np.ones((3, 2)), {"obs": obs}, "obs has 4 rows"),
        (np.ones((2, 2)), {"obs": pd.DataFrame(index=["a", "a"])}, "unique"),
    ):
        with pytest.raises(InputError, match=text):
            Embeddings.from_array(X, **options)


# -- damage ------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_is_found_by_verify(copied: Path) -> None:
    flip(copied / "shard-00001.npy")
    Embeddings.open(copied)  # sizes are right
    with pytest.raises(FormatError, match=r"shard-00001.npy does not match its SHA-256.*delete that file and run"):
        Embeddings.open(copied, verify=True)


def test_truncated_and_missing_shards_are_named(copied: Path) -> None:
    shard = copied / "shard-00002.npy"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(FormatError, match=r"shard-00002.npy has \d+ bytes instead of \d+"):
        Embeddings.open(copied)
    shard.unlink()
    with pytest.raises(FormatError, match=r"shard-00002.npy is missing; run embed"):
        Embeddings.open(copied)


def test_a_shard_of_another_shape_is_found_when_it_is_read(copied: Path) -> None:
    size = (copied / "shard-00000.npy").stat().st_size
    np.save(copied / "shard-00000.npy", np.zeros((5, 12), np.float32))
    assert (copied / "shard-00000.npy").stat().st_size == size
    with pytest.raises(FormatError, match=r"shard-00000.npy holds float32 \(5, 12\)"):
        Embeddings.open(copied)[0]


def test_a_shard_is_never_unpickled(copied: Path) -> None:
    path = copied / "shard-00000.npy"
    size = path.stat().st_size
    np.save(path, np.array([{"a": 1}], dtype=object))
    path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size])
    with pytest.raises(FormatError, match=r"shard-00000.npy cannot be read"):
        Embeddings.open(copied)[0]


def test_reordered_or_shortened_obs_is_refused(copied: Path) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(copied / "obs.parquet")
    for wrong in (table.take(list(range(24, -1, -1))), table.slice(0, 20), table.take([*range(25), 3])):
        pq.write_table(wrong, copied / "obs.parquet")
        with pytest.raises(FormatError, match=r"obs.parquet.*delete obs.parquet and run embed"):
            Embeddings.open(copied)
    (copied / "obs.parquet").write_bytes(b"PAR1")
    with pytest.raises(FormatError, match="not a readable"):
        Embeddings.open(copied)
    (copied / "obs.parquet").unlink()
    with pytest.raises(FormatError, match="is missing"):
        Embeddings.open(copied)


def test_provenance_of_another_kind_or_version_is_refused(copied: Path) -> None:
    path = copied / "provenance.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "version": 99}))
    with pytest.raises(FormatError, match=r"version 99.*update biosae"):
        Embeddings.open(copied)
    path.write_text(json.dumps({"format": "something else"}))
    with pytest.raises(FormatError, match="not written by embed"):
        Embeddings.open(copied)
    path.write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        Embeddings.open(copied)
    path.unlink()
    with pytest.raises(FormatError, match="holds no embeddings"):
        Embeddings.open(copied)


def test_deleted_parts_are_written_again_as_they_were(tmp_path: Path) -> None:
    samples, options = make_samples(25), {"pool": "mean", "out": tmp_path, "batch_size": 4, "shard_samples": 10}
    embed(samples, PatchEncoder(), **options)
    whole = {p.name: p.read_bytes() for p in (tmp_path / LAYER).iterdir()}
    for name in (*whole, "obs.parquet"):
        (tmp_path / LAYER / name).unlink()
        embed(samples, PatchEncoder(), **options)
        assert {p.name: p.read_bytes() for p in (tmp_path / LAYER).iterdir()} == whole, name
