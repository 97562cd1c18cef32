"""Training over two processes: the same model as in one, whatever they share; stops, failures and files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from biosae.errors import BiosaeError, InputError
from biosae.sae import SAE
from biosae.sae.distributed import ALONE, Replicas, Shards
from biosae.sae.fitting import fit_many
from biosae.sae.kernels.codes import Codes
from biosae.sae.sparse_ops import largest
from biosae.sae.stream import Stream
from biosae.settings import settings

WORLD = 2
SETTINGS = {
    "n_latents": 64, "k": 3, "n_steps": 40, "batch_size": 256, "learning_rate": 5e-3, "random_state": 0,
    "device": "cpu", "dead_after": 257, "aux_k": 4, "decoder_init": "random",
}  # fmt: skip
ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "relu", "jumprelu")


def rows(n=1100, d=16, m=24, seed=0):
    """Sparse sums of unit atoms, so that some of the 64 latents die."""
    rng = np.random.default_rng(seed)
    atoms = rng.normal(size=(m, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    strengths = rng.uniform(0.5, 1.5, (n, m)) * (rng.random((n, m)) < 0.1)
    return (strengths @ atoms + 1.0).astype(np.float32)


# ------------------------------------------------------------------------------------------ processes of the tests


def _enter(rank, folder, works):
    torch.set_num_threads(1)
    settings.progress = False
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    answers = {name: work(rank, folder, *arguments) for name, (work, *arguments) in works.items()}
    torch.save(answers, f"{folder}/answers.{rank}")
    dist.destroy_process_group()


def summary(sae):
    weights = {name: value.numpy() for name, value in sae._model.state_dict().items()}
    return {"history": sae.history_, "weights": weights, "metrics": sae.metrics_, "ends": sae._model.ends}


def _fit_all(rank, folder, parallels, changes):
    found = {}
    for parallel in parallels:
        for name, change in changes.items():
            sae = SAE(**SETTINGS | change, parallel=parallel).fit(rows())
            sae.save(Path(folder) / f"{parallel}-{name}")
            found[parallel, name] = summary(sae)
    return found


def check_equal(found, expected, *, tolerance=1e-5):
    """History and final weights relative to their size."""
    assert len(found["history"]) == len(expected["history"])
    for ours, theirs in zip(found["history"], expected["history"], strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=tolerance, abs=1e-7), (theirs["step"], name)
    assert found["ends"] == expected["ends"]
    for name, value in expected["weights"].items():
        assert np.abs(found["weights"][name] - value).max() <= tolerance * np.abs(value).max(), name


class Pair:
    """Answers of two processes that did all the work of this file one after the other."""

    def __init__(self, folder, works):
        self.folder = folder
        torch.multiprocessing.start_processes(_enter, (str(folder), works), nprocs=WORLD, start_method="spawn")
        self._answers = [torch.load(folder / f"answers.{rank}", weights_only=False) for rank in range(WORLD)]

    def answers(self, name):
        return [answers[name] for answers in self._answers]


CHANGES = {name: {"architecture": name} for name in ARCHITECTURES}
CHANGES["resampled"] = {"resample_every": 10, "ema": 0.9}
CHANGES["verified"] = {"prefilter": "verify", "backend": "torch", "n_steps": 12}
RESUMED = {"architecture": "batchtopk", "ema": 0.9, "resample_every": 10}
TIED = torch.from_numpy(np.random.default_rng(1).integers(0, 4, (8, 12)).astype(np.float32))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    works = {
        "fits": (_fit_all, ("data", "latents"), CHANGES),
        "ties": (_tied, TIED, 6, 30),
        "resumed-data": (_resumed, "data"),
        "resumed-latents": (_resumed, "latents"),
        "errors": (_errors,),
        "gone": (_silent_end,),
    }
    return Pair(tmp_path_factory.mktemp("pair"), works)


# ----------------------------------------------------------------------------------------------------- equal results


@pytest.mark.parametrize("parallel", ["data", "latents"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "resampled", "verified"])
def test_two_processes_train_the_model_of_one(pair, parallel, name):
    alone = SAE(**SETTINGS | CHANGES[name]).fit(rows())
    if name in ("topk", "batchtopk", "matryoshka"):
        without = SAE(**SETTINGS | CHANGES[name] | {"aux_k": 0}).fit(rows())
        assert np.abs(without.decoder_ - alone.decoder_).max() > 1e-3, "AuxK must be at work"
    for answer in pair.answers("fits"):
        check_equal(answer[parallel, name], summary(alone))


@pytest.mark.parametrize("parallel", ["data", "latents"])
def test_processes_end_with_the_same_bits(pair, parallel):
    for name in CHANGES:
        first, second = (answer[parallel, name] for answer in pair.answers("fits"))
        assert first["history"] == second["history"]
        for key, value in first["weights"].items():
            np.testing.assert_array_equal(second["weights"][key], value)


def test_saved_model_loads_in_one_process(pair):
    for (parallel, name), found in pair.answers("fits")[0].items():
        sae = SAE.load(pair.folder / f"{parallel}-{name}", device="cpu")
        np.testing.assert_array_equal(sae.decoder_, found["weights"]["W_dec"])
        assert sae.parallel is None and sae.transform(rows(20)).shape == (20, 64)


# -------------------------------------------------------------------------------------------------------- selection


def _tied(rank, folder, table, k, count):
    """Selections out of a table of scores (n, m) whose columns, or rows, are on two processes."""
    shards, replicas = Shards(), Replicas()
    n, m = table.shape
    columns, lines = table[:, rank * m // 2 : (rank + 1) * m // 2], table[rank * n // 2 : (rank + 1) * n // 2]

    def positive(part):
        row, column = (part > 0).nonzero(as_tuple=True)
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), (part > 0).sum(1).cumsum(0)])
        return Codes(indptr, column.int(), part[row, column])

    def all_of(part):
        n, m = part.shape
        return Codes(torch.arange(n + 1) * m, torch.arange(m).repeat(n).int(), part.flatten())

    kept, cut = shards.largest(positive(columns), count, m)
    mine, second = replicas.largest(positive(lines), count, m)
    few = all_of(columns) if columns.shape[1] <= k else all_of(columns[:, :k])
    return {
        "largest-latents": kept.dense(m // 2), "largest-data": mine.dense(m), "cut": (cut, second),
        "rows": shards.top_rows(few, k).dense(m // 2), "offered": columns[:, :k],
    }  # fmt: skip


def test_ties_across_processes_go_to_earlier_rows_and_lower_latents(pair):
    table, answers = TIED, pair.answers("ties")
    row, column = (table > 0).nonzero(as_tuple=True)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), (table > 0).sum(1).cumsum(0)])
    expected, cut = largest(Codes(indptr, column.int(), table[row, column]), 30)
    assert (expected.dense(12) > 0).sum() == 30 < (table >= cut).sum(), "the last place must be tied"
    assert torch.equal(torch.cat([a["largest-latents"] for a in answers], 1), expected.dense(12))
    assert torch.equal(torch.cat([a["largest-data"] for a in answers], 0), expected.dense(12))
    assert {a["cut"] for a in answers} == {(cut, cut)}
    best = torch.zeros_like(table)
    for i, scores in enumerate(table):
        order = sorted(range(12), key=lambda j: (-scores[j], j))[:6]
        best[i, order] = scores[order]
    assert torch.equal(torch.cat([a["rows"] for a in answers], 1), best)


# ------------------------------------------------------------------------------------------ stops, failures, refusals


class Stop:
    """A callback that stops at the first logged step from ``step`` on, as Ctrl-C would."""

    def __init__(self, step, error=KeyboardInterrupt):
        self.step, self.error = step, error

    def __call__(self, step, numbers):
        if step >= self.step:
            raise self.error("a callback stops")


def _resumed(rank, folder, parallel):
    given = SETTINGS | RESUMED | {"parallel": parallel}
    straight = SAE(**given).fit(rows())
    stopped = given | {"checkpoint": f"{folder}/{parallel}", "checkpoint_every": 7}
    outcome = ""
    try:
        SAE(**stopped, callbacks=(Stop(17),)).fit(rows())
    except KeyboardInterrupt as error:
        outcome = type(error).__name__
    files = sorted(file.name for file in Path(folder, parallel).iterdir())
    went_on = SAE(**stopped).fit(rows())
    return outcome, files, summary(straight), summary(went_on)


@pytest.mark.parametrize("parallel", ["data", "latents"])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(pair, parallel):
    for outcome, files, straight, went_on in pair.answers(f"resumed-{parallel}"):
        assert outcome == "KeyboardInterrupt"
        assert {"log.csv", "training.safetensors"} <= set(files)
        if parallel == "latents":
            assert "training.1.17.safetensors" in files
        assert straight["history"] == went_on["history"]
        for name, value in straight["weights"].items():
            np.testing.assert_array_equal(went_on["weights"][name], value)


def test_data_parallel_state_is_read_by_one_process(pair):
    (_, _, _, finished), _ = pair.answers("resumed-data")
    sae = SAE(**SETTINGS | RESUMED, checkpoint=str(pair.folder / "data")).fit(rows())  # no step is left
    for name, value in finished["weights"].items():
        np.testing.assert_array_equal(sae._model.state_dict()[name].numpy(), value)


def _errors(rank, folder):
    """Type and text of what each process gets when something goes wrong in one or both."""
    found, real = {}, Stream.batches

    def broken(name):
        def batches(self, start=0, *, part=(0, 1)):
            for number, batch in enumerate(real(self, start, part=part)):
                if rank == 1 and number == 5 and name == "row":
                    raise InputError("row 77 holds NaN")
                if rank == 1 and number == 5:
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch

        return batches

    def attempt(name, change, table=None):
        begun = time.monotonic()
        try:
            SAE(**SETTINGS | change).fit(rows() if table is None else table)
        except (BiosaeError, ValueError, KeyboardInterrupt) as error:
            found[name] = type(error), str(error), time.monotonic() - begun
        else:
            found[name] = None

    for parallel in ("data", "latents"):
        for name in ("interrupt", "row"):
            Stream.batches = broken(name)
            attempt(f"{name}-{parallel}", {"parallel": parallel})
        Stream.batches = real
        attempt(f"callback-{parallel}", {"parallel": parallel, "callbacks": (Stop(9, ValueError),)})
        attempt(f"diverged-{parallel}", {"parallel": parallel, "learning_rate": 1e36, "clip_norm": None})
        attempt(f"other rows-{parallel}", {"parallel": parallel}, table=rows(seed=rank))
    attempt("batch", {"parallel": "data", "batch_size": 255})
    attempt("latents", {"parallel": "latents", "n_latents": 63})
    attempt("dense", {"parallel": "latents", "backend": "dense"})
    return found


def test_what_ends_one_process_ends_all(pair):
    first, second = pair.answers("errors")
    for parallel in ("data", "latents"):
        assert first[f"interrupt-{parallel}"][0] is second[f"interrupt-{parallel}"][0] is KeyboardInterrupt
        assert second[f"row-{parallel}"][:2] == (InputError, "row 77 holds NaN")
        assert first[f"row-{parallel}"][:2] == (InputError, "process 1: row 77 holds NaN")
        assert first[f"callback-{parallel}"][:2] == (ValueError, "a callback stops")
        assert second[f"callback-{parallel}"][:2] == (BiosaeError, "process 0: a callback stops")
    for found in (first, second):
        assert all(answer is not None and answer[2] < 30 for answer in found.values())
        assert "batch_size that 2 divides" in found["batch"][1] and "n_latents=64" in found["latents"][1]
        assert "backend='dense'" in found["dense"][1]
        assert all("same X" in found[f"other rows-{parallel}"][1] for parallel in ("data", "latents"))
        assert all("diverged" in found[f"diverged-{parallel}"][1] for parallel in ("data", "latents"))


def _silent_end(rank, folder):
    """The second process is gone after its batch, in the middle of a step, without a word."""
    if rank == 1:
        real = Shards.top_rows

        def gone(self, codes, k):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 12:
                raise MemoryError("no room")
            return real(self, codes, k)

        Shards.top_rows = gone
    begun = time.monotonic()
    try:
        SAE(**SETTINGS, parallel="latents").fit(rows())
    except (MemoryError, RuntimeError) as error:
        return type(error).__name__, time.monotonic() - begun
    return "", 0


def test_process_that_waits_for_one_that_is_gone_gets_an_error(pair):
    (first, waited), (second, _) = pair.answers("gone")
    assert first == "RuntimeError" and second == "MemoryError" and waited < 30


# --------------------------------------------------------------------------------------------- one script, launched

SCRIPT = """
import sys
import numpy as np
from biosae.sae import SAE
from biosae.settings import settings

settings.progress = False
sae = SAE(**{given!r}, parallel={parallel!r}, verbose=True).fit(np.load(sys.argv[1]))
sae.save(sys.argv[2])
"""


@pytest.mark.parametrize("parallel", ["data", pytest.param("latents", marks=pytest.mark.slow)])
def test_one_script_under_python_and_torchrun(tmp_path, parallel):
    np.save(tmp_path / "rows.npy", rows())
    (tmp_path / "script.py").write_text(SCRIPT.format(given=SETTINGS | {"n_steps": 12}, parallel=parallel))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip
    printed = {}
    for name, how in (("one", []), ("two", launch)):
        command = [sys.executable, *how, "script.py", "rows.npy", name]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
        printed[name] = ran.stdout.splitlines()
    assert len(printed["two"]) == len(printed["one"]) == 12, "only the first process prints"
    one, two = SAE.load(tmp_path / "one", device="cpu"), SAE.load(tmp_path / "two", device="cpu")
    np.testing.assert_allclose(two.decoder_, one.decoder_, atol=1e-5)


def test_alone_outside_of_a_group():
    sae = SAE(**SETTINGS | {"n_steps": 4}, parallel="latents").fit(rows())
    assert summary(sae)["history"] == summary(SAE(**SETTINGS | {"n_steps": 4}).fit(rows()))["history"]
    assert ALONE.agree(None) is None and ALONE.world == 1
    with pytest.raises(InputError, match="parallel"):
        SAE(parallel="rows").fit(rows())
    with pytest.raises(InputError, match="one setting of parallel"):
        fit_many([SAE(parallel="data"), SAE()], rows())


def test_numbers_of_the_page_follow_from_its_formulas():
    text = (Path(__file__).parents[1] / "docs" / "methods" / "scale.md").read_text().splitlines()
    code = "\n".join(line[4:] for line in text if line.startswith("    "))
    found = {}
    exec(code[code.index("m, d, R, B") :], found)
    prose = "\n".join(line for line in text if not line.startswith("    "))
    assert len(found["numbers"]) > 25 and not [number for number in found["numbers"] if number not in prose]
