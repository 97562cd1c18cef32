"""embed(): the rows are the encoder's, failures are collected, and a killed job ends in the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from embed_standins import PatchEncoder, dense, make_samples

import biosae as bs
from biosae.data.failures import read_failures
from biosae.embeddings import Embeddings, embed
from biosae.embeddings.extract import safe_name
from biosae.errors import FormatError, IdentityError, InputError, TooManyFailuresError

HERE = Path(__file__).parent


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_rows_are_the_encoders_and_are_joined_by_id(tmp_path: Path) -> None:
    samples, encoder = make_samples(23), PatchEncoder()
    emb = embed(samples, encoder, pool="mean", out=tmp_path, batch_size=4, shard_samples=10)
    np.testing.assert_allclose(emb.array(), dense(samples, encoder, "late"), rtol=1e-5, atol=1e-6)
    pd.testing.assert_frame_equal(emb.obs, samples.obs)
    assert emb.shape == (23, 6)
    assert emb.tokens_per_sample == 1 and emb.grid is None
    assert emb.roles == {"patient": "case"} and emb.mpp == 0.5
    assert emb.identity == encoder.at_mpp(0.5).identity("late", "mean")
    assert (tmp_path / "stand_in" / "late" / "shard-00002.npy").exists()


def test_several_layers_take_one_forward_pass(tmp_path: Path) -> None:
    samples, encoder = make_samples(9), PatchEncoder()
    found = embed(samples, encoder, layer=["early", -1, "late"], pool="mean", out=tmp_path, batch_size=4)
    assert list(found) == ["early", "late"]
    assert encoder.batches == [(4, ("early", "late")), (4, ("early", "late")), (1, ("early", "late"))]
    for layer, emb in found.items():
        np.testing.assert_allclose(emb.array(), dense(samples, encoder, layer), rtol=1e-5, atol=1e-6)


def test_a_layer_added_later_is_computed_alone(tmp_path: Path) -> None:
    samples, encoder = make_samples(9), PatchEncoder()
    embed(samples, encoder, layer=["early"], pool="mean", out=tmp_path)
    encoder.batches.clear()
    found = embed(samples, encoder, layer=["early", "late"], pool="mean", out=tmp_path)
    assert encoder.batches == [(9, ("late",))]
    np.testing.assert_allclose(found["late"].array(), dense(samples, encoder, "late"), rtol=1e-5, atol=1e-6)


def test_tokens_keep_their_grid(tmp_path: Path) -> None:
    samples, encoder = make_samples(7, side=12), PatchEncoder()
    emb = embed(samples, encoder, layer="early", pool="tokens", out=tmp_path, batch_size=3, shard_samples=4)
    assert emb.tokens_per_sample == 9 and emb.grid == (3, 3) and emb.shape == (63, 6)
    np.testing.assert_allclose(emb.array(), dense(samples, encoder, "early", "tokens"), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(emb.pooled(), dense(samples, encoder, "early"), rtol=1e-5, atol=1e-5)


def test_images_of_several_shapes_are_grouped_and_keep_their_order(tmp_path: Path) -> None:
    samples = make_samples(12, faults={2: "wide", 5: "tall", 6: "wide"})
    encoder = PatchEncoder()
    emb = embed(samples, encoder, pool="mean", out=tmp_path, batch_size=8)
    np.testing.assert_allclose(emb.array(), dense(samples, encoder, "late"), rtol=1e-5, atol=1e-6)
    assert emb.obs.index.tolist() == samples.obs.index.tolist()


def test_items_of_many_shapes_take_no_more_memory_than_they_have() -> None:
    from biosae.embeddings.batches import load_batch

    items = [np.full((1, n), n, np.float32) for n in range(1, 33)]
    batch = load_batch(items, torch.from_numpy, range(32), False)
    held = sum(buffer.untyped_storage().nbytes() for buffer, _ in batch.groups.values())
    assert held == sum(item.nbytes for item in items)
    assert all((buffer == shape[1]).all() and at == [shape[1] - 1] for shape, (buffer, at) in batch.groups.items())


def test_tokens_of_another_grid_are_failures(tmp_path: Path) -> None:
    samples = make_samples(10, faults={4: "wide", 7: "tall"})  # both have 8 tokens, in other grids than the 2 x 2
    with pytest.warns(UserWarning, match="2 of 10"):
        emb = embed(samples, PatchEncoder(), pool="tokens", out=tmp_path, batch_size=4, max_failures=0.2)
    assert emb.n_samples == 8 and emb.grid == (2, 2)
    log = read_failures(tmp_path / "failures.csv")
    assert log["item"].tolist() == ["s0004", "s0007"] and set(log["reason"]) == {"wrong_grid"}


@pytest.mark.filterwarnings("ignore:.*were not embedded")
def test_failures_are_listed_with_their_reasons_and_rows_still_match(tmp_path: Path) -> None:
    samples = make_samples(40, faults={3: "truncated", 17: "bug", 29: "nan"})
    found = embed(samples, PatchEncoder(), layer=["early", "late"], pool="mean", out=tmp_path, batch_size=7,
                  shard_samples=9, max_failures=0.1)  # fmt: skip
    log = read_failures(tmp_path / "failures.csv")
    assert list(zip(log["item"], log["reason"])) == [
        ("s0003", "truncated"), ("s0017", "read_error"), ("s0029", "non_finite"),
    ]  # fmt: skip
    assert "division by zero" in log["detail"][1]
    assert set(log["stage"]) == {"embed/stand/in"}
    good = np.setdiff1d(np.arange(40), [3, 17, 29])
    assert found["late"].obs.index.tolist() == samples.obs.index[good].tolist()
    reference = dense(samples.select(good), PatchEncoder(), "late")
    np.testing.assert_allclose(found["late"].array(), reference, rtol=1e-5, atol=1e-6)
    assert "s0029" in found["early"].obs.index  # the black image is only a failure of the layer that divides by it
    assert found["late"].provenance["n_failures"] == 3


def test_too_many_failures_stop_early_and_keep_finished_shards(tmp_path: Path) -> None:
    samples = make_samples(40, faults=dict.fromkeys(range(10, 40, 2), "truncated"))
    encoder = PatchEncoder()
    with pytest.raises(TooManyFailuresError, match=r"4 of 40 items failed \(4 truncated\).*retry_failures"):
        embed(samples, encoder, pool="mean", out=tmp_path, batch_size=5, shard_samples=10, max_failures=0.075)
    assert len(read_failures(tmp_path / "failures.csv")) == 4
    assert len(encoder.batches) == 4  # samples 0 to 19, not 39
    assert (tmp_path / "stand_in/late/shard-00000.json").exists()
    with pytest.raises(FormatError, match="unfinished; run embed"):
        Embeddings.open(tmp_path / "stand_in/late")
    encoder.batches.clear()
    with pytest.warns(UserWarning, match="15 of 40"):
        emb = embed(samples, encoder, pool="mean", out=tmp_path, batch_size=5, shard_samples=10, max_failures=0.5)
    assert emb.n_samples == 25 and len(encoder.batches) == 6  # the first shard was not computed again


@pytest.mark.filterwarnings("ignore:.*were not embedded")
def test_recorded_failures_stay_until_they_are_retried(tmp_path: Path) -> None:
    broken = make_samples(20, faults={11: "truncated"})
    options = {"pool": "mean", "out": tmp_path, "shard_samples": 5}
    embed(broken, PatchEncoder(), **options)
    repaired, encoder = make_samples(20), PatchEncoder()
    assert embed(repaired, encoder, **options).n_samples == 19
    assert encoder.batches == []
    emb = embed(repaired, encoder, retry_failures=True, **options)
    assert emb.n_samples == 20 and encoder.batches == [(5, ("late",))]
    assert len(read_failures(tmp_path / "failures.csv")) == 0
    assert Embeddings.open(tmp_path / "stand_in/late", verify=True).n_samples == 20


def test_every_sample_may_fail_if_that_is_allowed(tmp_path: Path) -> None:
    samples = make_samples(5, faults=dict.fromkeys(range(5), "bug"))
    for pool in ("mean", "tokens"):
        with pytest.warns(UserWarning, match="5 of 5"):
            emb = embed(samples, PatchEncoder(), pool=pool, out=tmp_path / pool, max_failures=1.0)
        assert emb.shape == (0, 6) and emb.array().shape == (0, 6)


def test_float16_is_stored_and_float32_returned(tmp_path: Path) -> None:
    samples, encoder = make_samples(8), PatchEncoder()
    emb = embed(samples, encoder, pool="mean", out=tmp_path, dtype="float16")
    assert emb.dtype == np.float16 and emb[:].dtype == np.float32
    np.testing.assert_array_equal(np.load(tmp_path / "stand_in/late/shard-00000.npy").astype(np.float32), emb.array())
    np.testing.assert_allclose(emb.array(), dense(samples, encoder, "late"), rtol=1e-3, atol=1e-3)


def test_what_float16_cannot_hold_is_a_failure_not_infinity(tmp_path: Path) -> None:
    with pytest.raises(TooManyFailuresError, match="exceeds_float16"):
        embed(make_samples(4), PatchEncoder(scale=1e6), layer="early", pool="mean", out=tmp_path, dtype="float16")


def test_the_encoder_is_set_to_the_scale_of_the_samples(tmp_path: Path) -> None:
    samples = make_samples(3)  # 0.5 um per pixel
    assert embed(samples, PatchEncoder(), pool="mean", out=tmp_path).identity["tile_mpp"] == 0.5
    assert embed(samples, PatchEncoder().at_mpp(0.5), pool="mean", out=tmp_path).n_samples == 3
    with pytest.raises(InputError, match=r"0.25 um/px, the samples have 0.5; pass encoder.at_mpp"):
        embed(samples, PatchEncoder().at_mpp(0.25), pool="mean", out=tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"encoder": PatchEncoder(seed=1)}, "encoder, layer, pooling or preprocessing"),
        ({"samples": make_samples(11)}, "samples"),
        ({"dtype": "float16"}, "'float32' there, 'float16' now"),
        ({"pool": "tokens"}, "encoder, layer, pooling or preprocessing"),
        ({"shard_samples": 9}, "8 there, 9 now"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, change: dict, named: str) -> None:
    call = {"samples": make_samples(12), "encoder": PatchEncoder(), "pool": "mean", "out": tmp_path, "shard_samples": 8}
    embed(**call)
    before = contents(tmp_path)
    with pytest.raises(IdentityError, match=f"{named}(.|\n)*resume=False"):
        embed(**{**call, **change})
    assert contents(tmp_path) == before
    emb = embed(**{**call, **change}, resume=False)
    fresh = embed(**{**call, **change, "out": tmp_path / "fresh"})
    np.testing.assert_array_equal(emb.array(), fresh.array())
    assert contents(tmp_path / "stand_in") == contents(tmp_path / "fresh" / "stand_in")


def test_a_finished_job_runs_no_forward_pass_but_follows_new_columns(tmp_path: Path) -> None:
    samples, encoder = make_samples(12), PatchEncoder()
    embed(samples, encoder, pool="mean", out=tmp_path)
    before = contents(tmp_path)
    encoder.batches.clear()
    embed(samples, encoder, pool="mean", out=tmp_path)
    assert contents(tmp_path) == before
    emb = embed(samples.with_obs(stage=np.arange(12)), encoder, pool="mean", out=tmp_path)
    assert emb.obs["stage"].tolist() == list(range(12))
    assert encoder.batches == []
    assert Embeddings.open(tmp_path / "stand_in/late", verify=True).n_samples == 12


@pytest.mark.filterwarnings("ignore:.*were not embedded")
def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    samples = make_samples(50, faults={13: "bug", 20: "wide", 31: "nan"})
    threads = torch.get_num_threads()
    for n_jobs in (0, 1, 3):
        embed(samples, PatchEncoder(), layer=[0, 1], pool="mean", out=tmp_path / str(n_jobs), batch_size=6,
              shard_samples=20, n_jobs=n_jobs)  # fmt: skip
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "3")
    assert torch.get_num_threads() == threads
    assert not [t for t in threading.enumerate() if t.name.startswith("embed")]


def test_a_damaged_shard_alone_is_computed_again(tmp_path: Path) -> None:
    samples, encoder, options = make_samples(30), PatchEncoder(), {"pool": "mean", "out": tmp_path, "shard_samples": 10}
    embed(samples, encoder, **options)
    before, shard = contents(tmp_path), tmp_path / "stand_in/late/shard-00001.npy"
    encoder.batches.clear()
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(FormatError, match=r"shard-00001.npy has .* bytes"):
        Embeddings.open(shard.parent)
    embed(samples, encoder, **options)
    assert contents(tmp_path) == before and encoder.batches == [(10, ("late",))]


def test_arguments_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    samples, encoder = make_samples(3), PatchEncoder()
    for wrong, text in (
        ({"dtype": "float61"}, "did you mean 'float16'"),
        ({"precision": "bfloat16"}, "precision='float32'; load it with 'bfloat16'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"n_jobs": -1}, "n_jobs=-1"),
        ({"layer": []}, "names no layer"),
        ({"max_failures": 5}, "between 0 and 1"),
    ):
        with pytest.raises(InputError, match=text):
            embed(samples, encoder, **{"pool": "mean", "out": tmp_path, **wrong})
    with pytest.raises(InputError, match="no samples"):
        embed(samples.select(slice(0, 0)), encoder, out=tmp_path)
    mixed = samples.with_obs(odd=[1, "a", 2.5])
    with pytest.raises(InputError, match="mixes types"):
        embed(mixed, encoder, out=tmp_path, pool="mean")
    assert encoder.batches == []


def test_an_encoder_that_contradicts_its_identity_is_refused(tmp_path: Path) -> None:
    encoder = PatchEncoder()
    encoder.dim = 7
    with pytest.raises(InputError, match=r"returned \(3, 6\).*\(3, 7\)"):
        embed(make_samples(3), encoder, pool="mean", out=tmp_path)


def test_running_out_of_memory_is_no_failed_sample(tmp_path: Path) -> None:
    class Hungry(PatchEncoder):
        def forward(self, *args: object) -> dict:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    with pytest.raises(InputError, match="smaller batch_size"):
        embed(make_samples(3), Hungry(), pool="mean", out=tmp_path, max_failures=1.0)


def test_folder_names_are_safe() -> None:
    assert safe_name("hf-hub:MahmoodLab/uni") == "hf-hub_MahmoodLab_uni"
    assert safe_name("../..") == "__.."
    assert "/" not in safe_name("a/../b") and not safe_name(".hidden").startswith(".")


# -- killed at any moment ----------------------------------------------------------------------------------------------

JOB = """
import os, signal, sys, warnings
sys.path.insert(0, {here!r})
warnings.simplefilter("ignore")
import biosae.files
from biosae.settings import settings
settings.progress = False
from embed_standins import PatchEncoder, make_samples
from biosae.embeddings import embed

real, calls = os.replace, [0]
def replace(source, target):
    calls[0] += 1
    if calls[0] == {kill_at} and not {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
    if calls[0] == {kill_at} and {after}:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace

embed(make_samples(40, faults={{3: "truncated", 25: "nan", 33: "bug"}}), PatchEncoder(pause={pause}), layer=[0, 1],
      pool="mean", out={out!r}, batch_size=4, shard_samples=10, n_jobs=2, max_failures=0.1)
"""


def start(out: Path, *, kill_at: int = 0, after: bool = False, pause: float = 0.0) -> subprocess.Popen:
    code = JOB.format(here=str(HERE), kill_at=kill_at, after=after, pause=pause, out=str(out))
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=environment, text=True)  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    process = start(out)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return contents(out)


def complete(out: Path) -> int:
    """Run the job to its end in this process; returns the number of batches that were still to do."""
    encoder = PatchEncoder()
    with pytest.warns(UserWarning, match="3 of 40"):
        embed(make_samples(40, faults={3: "truncated", 25: "nan", 33: "bug"}), encoder, layer=[0, 1], pool="mean",
              out=out, batch_size=4, shard_samples=10, n_jobs=2, max_failures=0.1)  # fmt: skip
    return len(encoder.batches)


# renames of one run: two plans, then data and index of each shard and layer, then failures.csv and the closing files
@pytest.mark.parametrize(("kill_at", "after"), [(1, False), (8, False), (18, True), (19, False)])
def test_killed_between_two_writes(tmp_path: Path, uninterrupted: dict, kill_at: int, after: bool) -> None:
    process = start(tmp_path, kill_at=kill_at, after=after)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    complete(tmp_path)
    assert contents(tmp_path) == uninterrupted
    Embeddings.open(tmp_path / "stand_in/late", verify=True)


def test_killed_at_any_moment_again_and_again(tmp_path: Path, uninterrupted: dict) -> None:
    draw = np.random.default_rng(0)
    for committed in (1, 3):  # of 4 shards x 2 layers
        process = start(tmp_path, pause=0.1)
        while len(list(tmp_path.glob("stand_in/*/shard-*.json"))) < committed and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    left = complete(tmp_path)
    assert contents(tmp_path) == uninterrupted
    assert left < 12  # 12 batches in all: the killed runs were not in vain


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_write(tmp_path: Path, uninterrupted: dict, after: bool) -> None:
    kill_at, killed = 1, True
    while killed:
        out = tmp_path / f"at-{kill_at}"
        process = start(out, kill_at=kill_at, after=after)
        process.communicate(timeout=120)
        killed = process.returncode == -signal.SIGKILL
        complete(out)
        assert contents(out) == uninterrupted, kill_at
        kill_at += 1
    assert kill_at > 20


# -- real tissue through a trained encoder -----------------------------------------------------------------------------


def test_real_tiles_through_a_trained_encoder(shared: Path, tmp_path: Path) -> None:
    import biosae as bs

    table = pd.read_csv(shared / "data/her2st_spots/manifest.csv").head(6)
    images = shared / "data/her2st_spots"
    (tmp_path / "broken.jpg").write_bytes((images / table["path"][2]).read_bytes()[:2000])
    table["path"] = [str(images / f) for f in table["path"]]
    table.loc[2, "path"] = str(tmp_path / "broken.jpg")
    table["sample_id"] = [f"tile{i}" for i in range(6)]
    samples = bs.read.tiles(table, patient="patient_id", id="sample_id", mpp=0.5)
    encoder = bs.encoders.load(shared / "weights/nic_histology_multitask4", device="cpu")
    with pytest.warns(UserWarning, match="1 of 6"):
        found = bs.encoders.embed(samples, encoder, layer=encoder.layers, pool="mean", out=tmp_path / "out",
                                  batch_size=2, shard_samples=4, max_failures=0.2)  # fmt: skip
    assert read_failures(tmp_path / "out/failures.csv")[["item", "reason"]].values.tolist() == [["tile2", "truncated"]]
    scaled = encoder.at_mpp(0.5)
    for i in (0, 1, 3, 4, 5):
        one = scaled.forward(scaled.preprocess(samples[i])[None], encoder.layers, "mean")
        for layer, emb in found.items():
            np.testing.assert_allclose(emb.select([f"tile{i}"])[0], one[layer][0], rtol=1e-4, atol=1e-5)
    tokens = bs.encoders.embed(samples.select([0, 1, 3]), encoder, pool="tokens", out=tmp_path / "tokens", batch_size=2)
    assert tokens.tokens_per_sample == np.prod(tokens.grid) > 1
    np.testing.assert_allclose(
        tokens.pooled(),
        found[encoder.resolve_layer(-1)].select(["tile0", "tile1", "tile3"]).array(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_files_that_changed_under_their_name_are_noticed(tmp_path):
    """Other pictures with the same names and the same table: the folder of the first must not pass for theirs."""
    from PIL import Image

    def cohort(folder: str, seed: int) -> bs.Samples:
        (tmp_path / folder).mkdir(exist_ok=True)
        draw = np.random.default_rng(seed)
        for name in "ab":
            Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / folder / f"{name}.png")
        return bs.read.images(pd.DataFrame({"path": ["a.png", "b.png"]}), patient=None, root=tmp_path / folder)

    encoder, out = PatchEncoder(), tmp_path / "out"
    first = embed(cohort("one", 0), encoder, layer="early", pool="mean", out=out).array()
    again = embed(cohort("moved", 0), encoder, layer="early", pool="mean", out=out).array()
    np.testing.assert_array_equal(first, again)  # the same files elsewhere are the same
    with pytest.raises(IdentityError, match="no longer those"):
        embed(cohort("two", 1), encoder, layer="early", pool="mean", out=out)
    (tmp_path / "two/b.png").write_bytes(b"broken")
    other = tmp_path / "other"
    samples = bs.read.images(pd.DataFrame({"path": ["a.png", "b.png"]}), patient=None, root=tmp_path / "two")
    with pytest.warns(UserWarning, match="1 of 2"):
        assert len(embed(samples, encoder, layer="early", pool="mean", out=other, max_failures=0.5)) == 1
    assert len(embed(cohort("two", 1), encoder, layer="early", pool="mean", out=other)) == 2  # mended
