"""A training that is stopped, killed or cut off in the middle of a write goes on to the same bits."""

from __future__ import annotations

import csv
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from biosae.errors import FormatError, InputError
from biosae.sae import SAE, state, stream
from biosae.sae.fitting import fit_many

STEPS = 40
SMALL = {
    "n_latents": 48, "k": 3, "batch_size": 64, "n_steps": STEPS, "learning_rate": 5e-3, "dead_after": 300,
    "random_state": 3, "device": "cpu",
}  # fmt: skip
EVERYTHING = {
    "ema": 0.9, "early_stopping": True, "patience": 30, "resample_every": 6, "k_start": 12, "k_anneal": 0.5,
    "prefilter": "bfloat16",
}  # fmt: skip
CASES = {
    "topk": {"architecture": "topk"},
    "batchtopk": {"architecture": "batchtopk"},
    "matryoshka": {"architecture": "matryoshka", "backend": "torch"},
    "jumprelu": {"architecture": "jumprelu", "bandwidth": 0.1},
    "topk, all": {"architecture": "topk", **EVERYTHING},
    "relu, all": {"architecture": "relu", "l1": 0.3, **EVERYTHING},
}
X = np.random.default_rng(0).standard_normal((700, 12)).astype(np.float32) ** 3


class Stop:
    """Callback that stops the training after one step."""

    def __init__(self, step, error=KeyboardInterrupt):
        self.step, self.error, self.seen = step, error, []

    def __call__(self, step, numbers):
        self.seen.append(step)
        if step == self.step:
            raise self.error("stopped by the test")


def digest(sae):
    parts = [value.numpy().tobytes() for value in sae._model.state_dict().values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def same(one, other):
    assert digest(one) == digest(other)
    assert one.history_ == other.history_
    assert repr(sorted(one.metrics_.items())) == repr(
        sorted(other.metrics_.items())
    )  # some are NaN where nothing is held out


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    """Settings and the model of a run that was never stopped."""
    settings = SMALL | CASES[request.param]
    return settings, SAE(**settings).fit(X)


# ------------------------------------------------------------------------------------------------------ in process


def test_stopped_again_and_again_it_ends_at_the_same_bits(case, tmp_path):
    settings, whole = case
    assert len(whole.history_) == STEPS
    ran = []
    for at in (1, 7, 8, 9, 23, STEPS - 1, STEPS):
        stop = Stop(at)
        with pytest.raises(KeyboardInterrupt):
            SAE(**settings, checkpoint=str(tmp_path), callbacks=(stop,)).fit(X)
        ran += stop.seen
    after = SAE(**settings, checkpoint=str(tmp_path), callbacks=(Stop(-1),))
    same(after.fit(X), whole)
    assert ran == list(range(1, STEPS + 1)) and after.callbacks[0].seen == []  # no step twice, none left out


def test_after_an_error_it_goes_on_from_the_last_state(case, tmp_path):
    settings, whole = case
    settings = settings | {"checkpoint": str(tmp_path), "checkpoint_every": 5}
    with pytest.raises(RuntimeError, match="stopped by the test"):
        SAE(**settings, callbacks=(Stop(18, RuntimeError),)).fit(X)
    stop = Stop(-1)
    same(SAE(**settings, callbacks=(stop,)).fit(X), whole)
    assert stop.seen == list(range(16, STEPS + 1))


@pytest.mark.parametrize("form", ["store", "chunks"])
def test_streamed_sources_go_on_at_the_same_bits(form, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "IN_MEMORY", 0)
    rows = X if form == "store" else [X[:100], X[100:350], X[350:]]
    whole = SAE("batchtopk", **SMALL).fit(rows)
    for at in (4, 17, 30):
        with pytest.raises(KeyboardInterrupt):
            SAE("batchtopk", **SMALL, checkpoint=str(tmp_path), callbacks=(Stop(at),)).fit(rows)
    same(SAE("batchtopk", **SMALL, checkpoint=str(tmp_path)).fit(rows), whole)


def test_a_finished_training_is_not_done_again(tmp_path):
    settings = SMALL | {"checkpoint": str(tmp_path)}
    whole = SAE(**settings).fit(X)
    stop = Stop(-1)
    same(SAE(**settings, callbacks=(stop,)).fit(X), whole)
    assert stop.seen == []


def test_an_early_stop_is_remembered(tmp_path):
    settings = SMALL | {"early_stopping": True, "patience": 1, "learning_rate": 0.05, "checkpoint": str(tmp_path)}
    whole = SAE(**settings).fit(X)
    assert len(whole.history_) < STEPS
    stop = Stop(-1)
    same(SAE(**settings, callbacks=(stop,)).fit(X), whole)
    assert stop.seen == []


def test_models_on_one_stream_go_on_together(tmp_path):
    def models(**more):
        kinds = ({"k": 2}, {"architecture": "relu"}, {"random_state": 8, "n_latents": 20})
        return [SAE(**SMALL | kind, checkpoint=str(tmp_path / str(i)), **more) for i, kind in enumerate(kinds)]

    with pytest.raises(KeyboardInterrupt):
        fit_many(models(callbacks=(Stop(11),)), X)
    (tmp_path / "1" / "training.safetensors").unlink()  # one of them lost: it starts anew, the others wait
    stopped = fit_many(models(), X)
    for sae in stopped:
        sae.checkpoint = None
    for sae, whole in zip(stopped, fit_many([SAE(**sae.get_params()) for sae in stopped], X), strict=True):
        same(sae, whole)


def test_a_seed_that_was_drawn_is_kept(tmp_path):
    settings = SMALL | {"random_state": None, "checkpoint": str(tmp_path)}
    with pytest.raises(KeyboardInterrupt):
        SAE(**settings, callbacks=(Stop(9),)).fit(X)
    sae = SAE(**settings).fit(X)
    same(sae, SAE(**SMALL | {"random_state": sae.random_state_}).fit(X))


def test_the_log_is_a_table_of_the_history(tmp_path):
    sae = SAE(**SMALL, checkpoint=str(tmp_path)).fit(X)
    with open(tmp_path / "log.csv", newline="") as opened:
        table = list(csv.DictReader(opened))
    assert list(table[0]) == ["step", "loss", "fvu", "l0", "dead", "fvu_val", "lr"]
    assert [int(row["step"]) for row in table] == list(range(1, STEPS + 1))
    for row, point in zip(table, sae.history_, strict=True):
        assert {name: float(value) for name, value in row.items()} == pytest.approx(point, rel=1e-8)


# ------------------------------------------------------------------------------------------- what does not belong


@pytest.fixture
def folder(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        SAE(**SMALL, checkpoint=str(tmp_path), callbacks=(Stop(10),)).fit(X)
    return tmp_path


@pytest.mark.parametrize(
    "change", [{"k": 4}, {"learning_rate": 4e-3}, {"random_state": 4}, {"n_steps": STEPS + 1}, {"ema": 0.5}]
)
def test_other_settings_are_refused(folder, change):
    with pytest.raises(InputError, match="other settings, data or seed"):
        SAE(**SMALL | change, checkpoint=str(folder)).fit(X)


def test_other_rows_are_refused(folder):
    moved = X.copy()
    moved[0, 0] += 1
    for rows in (moved, X[:-1], X[:, :-1]):
        with pytest.raises(InputError, match="other settings, data or seed"):
            SAE(**SMALL, checkpoint=str(folder)).fit(rows)


def test_settings_of_the_machine_may_change(folder):
    sae = SAE(**SMALL, checkpoint=str(folder), checkpoint_every=3, callbacks=(Stop(-1),), verbose=False).fit(X)
    same(sae, SAE(**SMALL).fit(X))


def test_every_way_of_breaking_the_state_is_named(folder):
    file = state.path(folder)
    good = file.read_bytes()
    size = int.from_bytes(good[:8], "little")
    middle = 8 + size + (len(good) - 8 - size) // 2

    def header(change):
        with safetensors.safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        change(tensors, metadata)
        safetensors.torch.save_file(tensors, file, metadata=metadata)

    breaks = {
        "short": lambda: file.write_bytes(good[: len(good) // 2]),
        "no end": lambda: file.write_bytes(good[:-1]),
        "empty": lambda: file.write_bytes(b""),
        "foreign": lambda: file.write_bytes(b"something else" * 100),
        "a bit of a weight": lambda: file.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]),
        "no numbers": lambda: header(lambda tensors, metadata: metadata.pop("numbers")),
        "other numbers": lambda: header(lambda tensors, metadata: metadata.update(numbers='{"done": 3}')),
        "no moment": lambda: header(lambda tensors, metadata: tensors.pop("moment1.W_dec")),
        "newer": lambda: header(lambda tensors, metadata: metadata.update(version="2")),
        "other format": lambda: safetensors.torch.save_file({"a": torch.ones(2)}, file),
    }
    for apply in breaks.values():
        file.write_bytes(good)
        apply()
        with pytest.raises(FormatError, match=r"training\.safetensors"):
            SAE(**SMALL, checkpoint=str(folder)).fit(X)
    file.write_bytes(good)
    same(SAE(**SMALL, checkpoint=str(folder)).fit(X), SAE(**SMALL).fit(X))


def test_a_write_that_fails_leaves_the_former_state(folder, monkeypatch):
    good = state.path(folder).read_bytes()
    before = sorted(p.name for p in folder.iterdir())

    def half(tensors, path, metadata):
        Path(path).write_bytes(good[: len(good) // 3])
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="no space"):
        SAE(**SMALL, checkpoint=str(folder), checkpoint_every=1).fit(X)
    monkeypatch.undo()
    assert state.path(folder).read_bytes() == good and sorted(p.name for p in folder.iterdir()) == before
    # what a kill in the middle of a write leaves behind is never read
    (folder / ".training.safetensors.x1.tmp.safetensors").write_bytes(good[:1000])
    same(SAE(**SMALL, checkpoint=str(folder)).fit(X), SAE(**SMALL).fit(X))


# ------------------------------------------------------------------------------------------------------------ kills

KILLED = """
import os, random, signal, sys, threading, time
import numpy as np, torch
from biosae.sae import SAE
import biosae.sae.fitting, biosae.sae.kernels.numba_cpu

settings, X, folder = eval(sys.argv[1]), np.load(sys.argv[2]), sys.argv[3]
kills, seed = int(sys.argv[4]), int(sys.argv[5])
moments = random.Random(seed)
counts = []
for attempt in range(1000):
    wait, delay = moments.randint(1, 3), moments.uniform(0, 0.004)
    child = os.fork()  # nothing has been computed here yet, so no thread is lost
    if not child:
        seen = []
        def fatal(step, numbers):
            seen.append(step)
            if attempt < kills and len(seen) == wait:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
                if seen[-1] >= settings["n_steps"]:
                    time.sleep(1)
        model = SAE(**settings, checkpoint=folder, callbacks=(fatal,)).fit(X)
        model.save(folder + "/model")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    counts.append(os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status))
    if counts[-1] != signal.SIGKILL:
        break
print(counts)
"""


def killed(settings, kills, seed, folder):
    """Train in processes that get SIGKILL ``kills`` times a few steps after they go on; the model of the last one."""
    np.save(folder / "x.npy", X)
    command = [sys.executable, "-c", KILLED, repr(settings), folder / "x.npy", folder / "state", str(kills), str(seed)]
    environment = {**os.environ, "BIOSAE_PROGRESS": "0", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = eval(done.stdout.splitlines()[-1])
    assert counts[-1] == 0, done.stderr[-3000:]
    return SAE.load(folder / "state" / "model", device="cpu"), len(counts) - 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", ["batchtopk"])
def test_killed_three_times(name, tmp_path):
    settings = SMALL | CASES[name] | {"checkpoint_every": 2}
    found, kills = killed(settings, 3, 0, tmp_path)
    assert kills == 3
    same(found, SAE(**settings).fit(X))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka", "jumprelu", "topk, all", "relu, all"])
@pytest.mark.parametrize("every", [1, 3])
def test_killed_twenty_times(name, every, tmp_path):
    """Kills come at random moments 0-4 ms after a step, some of them in the middle of a write."""
    settings = SMALL | CASES[name] | {"checkpoint_every": every, "n_steps": 99}
    found, kills = killed(settings, 20, every, tmp_path)
    assert kills == 20
    same(found, SAE(**settings).fit(X))


def test_leftovers_of_a_kill_are_removed_and_others_may_read_the_state(folder):
    stale = folder / ".training.safetensors.abc.tmp.safetensors"
    stale.write_bytes(b"half")
    mask = os.umask(0)
    os.umask(mask)
    assert state.path(folder).stat().st_mode & 0o777 == 0o666 & ~mask
    SAE(**SMALL, checkpoint=str(folder)).fit(X)
    assert not stale.exists()


def test_other_held_out_patients_are_refused(tmp_path):
    settings = SMALL | {"validation": 0.3}
    one, other = (np.asarray([f"p{(i + shift) // (len(X) // 10)}" for i in range(len(X))]) for shift in (0, 37))
    with pytest.raises(KeyboardInterrupt):
        SAE(**settings, checkpoint=str(tmp_path), callbacks=(Stop(10),)).fit(X, groups=one)
    with pytest.raises(InputError, match="other settings, data or seed"):
        SAE(**settings, checkpoint=str(tmp_path)).fit(X, groups=other)
