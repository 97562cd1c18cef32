"""Several processes on one embeddings folder: the bytes of one process, whoever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from embed_standins import PatchEncoder, make_samples

import biosae as bs
from biosae.data.failures import read_failures
from biosae.embeddings import Embeddings, embed, ranks, signs
from biosae.errors import FolderInUseError, InputError, RanksError, TooManyFailuresError
from biosae.files import hash_json

HERE = Path(__file__).parent
JOB = """
import json, os, sys, warnings
sys.path.insert(0, {here!r})
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from biosae.settings import settings
settings.progress = False
from embed_standins import PatchEncoder, make_samples
from biosae.embeddings import embed

options = json.loads(sys.argv[1])
faults = {{int(i): what for i, what in options.pop("faults", {{}}).items()}}
pause = options.pop("pause", 0.0) * (os.environ.get("RANK") == options.pop("slow", os.environ.get("RANK")))
if options.pop("gloo", False):
    torch.distributed.init_process_group("gloo")
found = embed(make_samples(options.pop("n", 40), faults=faults), PatchEncoder(pause=pause), batch_size=4,
              shard_samples=4, n_jobs=1, max_failures=0.2, **options)
found = found if isinstance(found, dict) else {{"": found}}
print(json.dumps({{name: list(emb.shape) for name, emb in found.items()}}))
"""
TWO = {"layer": [0, 1], "pool": "mean", "faults": {3: "truncated", 25: "nan", 33: "bug"}}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "job.py"
    path.write_text(JOB.format(here=str(HERE)))
    return path


def environment(rank: int | None = None, size: int = 1) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    mine = {} if rank is None else {"RANK": str(rank), "WORLD_SIZE": str(size)}
    return {**plain, **mine, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}


def start(script: Path, out: Path, rank: int | None = None, size: int = 1, **options: object) -> subprocess.Popen:
    options = {**TWO, "out": str(out), "wait": 120, **options}
    return subprocess.Popen(
        [sys.executable, str(script), json.dumps(options)], env=environment(rank, size), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def done(*processes: subprocess.Popen) -> list[str]:
    ends = [p.communicate(timeout=300) for p in processes]
    for process, (_, errors) in zip(processes, ends):
        assert process.returncode == 0, errors
    return [out.strip() for out, _ in ends]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def alone(script: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("alone")
    done(start(script, out))
    return contents(out)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_POLL", 0.01)


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(script: Path, alone: dict, tmp_path: Path) -> None:
    said = done(start(script, tmp_path, 0, 2), start(script, tmp_path, 1, 2))
    assert contents(tmp_path) == alone
    assert said[0] == said[1] and json.loads(said[0]) == {"early": [38, 6], "late": [37, 6]}
    log = read_failures(tmp_path / "failures.csv")
    assert log["item"].tolist() == ["s0003", "s0025", "s0033"]  # of both ranks, in order
    assert Embeddings.open(tmp_path / "stand_in/late", verify=True).n_samples == 37


def test_torchrun_with_gloo_gives_the_bytes_of_one_process(script: Path, alone: dict, tmp_path: Path) -> None:
    options = {**TWO, "out": str(tmp_path), "wait": 120, "gloo": True}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ended = subprocess.run(
        [*command, json.dumps(options)], env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert contents(tmp_path) == alone


@pytest.mark.parametrize("dies", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_is_named_and_the_job_goes_on_with_any_number(
    dies: int, script: Path, alone: dict, tmp_path: Path
) -> None:
    both = [start(script, tmp_path, rank, 2, pause=0.3, slow=str(dies)) for rank in (0, 1)]
    folder = tmp_path / "stand_in" / "late"
    mine = [f"shard-{i:05d}.json" for i in (range(5), range(5, 10))[dies]]
    sign = tmp_path / "stand_in" / "early" / ".rank-00001"
    while not (sign.exists() and any((folder / name).exists() for name in mine)):
        assert both[dies].poll() is None, both[dies].stderr.read()
        time.sleep(0.01)
    both[dies].kill()
    both[dies].communicate()
    _, errors = both[1 - dies].communicate(timeout=300)
    assert both[dies].returncode == -signal.SIGKILL and both[1 - dies].returncode == 1
    assert "RanksError" in errors and "call again" in errors
    if dies == 1:
        assert "rank 1 (process" in errors and "shards are missing" in errors
    before = {name: (folder / name).stat().st_mtime_ns for name in os.listdir(folder) if name.startswith("shard")}
    assert 0 < len([n for n in before if n.endswith("json")]) < 10
    if dies == 1:  # three processes finish what two began
        done(*(start(script, tmp_path, rank, 3) for rank in range(3)))
    else:
        done(start(script, tmp_path))
    assert contents(tmp_path) == alone
    kept = [n for n in before if n.endswith("json") and (folder / n).stat().st_mtime_ns == before[n]]
    assert len(kept) == len([n for n in before if n.endswith("json")])  # nothing was computed twice


@pytest.mark.slow
def test_more_ranks_than_shards(script: Path, tmp_path: Path) -> None:
    options = {"n": 5, "faults": {}, "layer": 0}
    done(start(script, tmp_path / "one", **options))
    done(*(start(script, tmp_path / "many", rank, 3, **options) for rank in range(3)))
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.mark.slow
def test_starting_over_and_retrying_with_two_ranks(script: Path, alone: dict, tmp_path: Path) -> None:
    done(start(script, tmp_path, n=40, faults={3: "truncated", 25: "nan", 33: "bug", 9: "bug"}))
    assert contents(tmp_path) != alone
    done(*(start(script, tmp_path, rank, 2, resume=False) for rank in range(2)))
    assert contents(tmp_path) == alone
    repaired = {"faults": {25: "nan"}}  # the files of 3 and 33 can be read now
    done(*(start(script, tmp_path, rank, 2, retry_failures=True, **repaired) for rank in range(2)))
    assert read_failures(tmp_path / "failures.csv")["item"].tolist() == ["s0025"]
    both = contents(tmp_path)
    done(start(script, tmp_path / "one", **repaired))
    assert both == contents(tmp_path / "one")


def in_threads(out: Path, size: int, each: dict[int, dict] | None = None, **options: object) -> list[object]:
    """Ranks as threads of this process; what each returned or raised."""
    found: list[object] = [None] * size

    def work(rank: int) -> None:
        mine = {
            "samples": make_samples(24),
            "encoder": PatchEncoder(),
            "wait": 2.0,
            **options,
            **(each or {}).get(rank, {}),
        }
        try:
            found[rank] = embed(
                mine.pop("samples"), mine.pop("encoder"), pool=mine.pop("pool", "mean"), out=out, ranks=(rank, size),
                batch_size=3, shard_samples=3, n_jobs=0, **mine,
            )  # fmt: skip
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


@pytest.mark.filterwarnings("ignore:.*were not embedded")
def test_tokens_are_laid_out_as_those_of_the_first_sample_whoever_reads_it(tmp_path: Path) -> None:
    samples = make_samples(24, faults={0: "bug", 1: "bug", 2: "bug", 3: "wide", 12: "tall", 14: "wide"})
    options = {"pool": "tokens", "max_failures": 1.0, "samples": samples}
    many = in_threads(tmp_path / "many", 3, **options)
    embed(samples, PatchEncoder(), pool="tokens", out=tmp_path / "one", batch_size=3, shard_samples=3, max_failures=1.0)
    assert [emb.grid for emb in many] == [(2, 4)] * 3 and many[0].n_samples == 2  # all but 3 and 14 are of another grid
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.mark.filterwarnings("ignore:.*were not embedded")
def test_failures_of_all_ranks_count_together(tmp_path: Path) -> None:
    samples = make_samples(24, faults=dict.fromkeys((1, 4, 13, 16), "truncated"))
    found = in_threads(tmp_path, 2, samples=samples, max_failures=0.125)  # three of 24; each rank has two
    assert [type(one) for one in found] == [TooManyFailuresError, RanksError]  # the first counts all
    assert read_failures(tmp_path / "failures.csv")["item"].tolist() == ["s0001", "s0004", "s0013", "s0016"]
    assert all(emb.n_samples == 20 for emb in in_threads(tmp_path, 2, samples=samples, max_failures=0.2))


def test_a_rank_with_too_many_failures_ends_all_and_they_are_listed(tmp_path: Path) -> None:
    samples = make_samples(24, faults=dict.fromkeys((1, 13, 16, 19, 20), "truncated"))
    found = in_threads(tmp_path, 2, samples=samples, max_failures=0.125)
    assert [type(one) for one in found] == [RanksError, TooManyFailuresError]
    assert sorted(read_failures(tmp_path / "failures.csv")["item"]) == ["s0001", "s0013", "s0016", "s0019", "s0020"]
    assert not list(tmp_path.glob(".failures.csv.rank*"))


def test_an_error_of_one_rank_ends_the_other_at_once(tmp_path: Path) -> None:
    class Broken(PatchEncoder):
        def forward(self, batch, layers, pool):
            raise RuntimeError("cannot allocate memory")

    begun = time.monotonic()
    found = in_threads(tmp_path, 2, {1: {"encoder": Broken()}})
    assert isinstance(found[1], InputError)
    assert isinstance(found[0], RanksError) and "rank 1 failed: InputError" in str(found[0])
    assert time.monotonic() - begun < 25  # not the 30 s of wait=
    assert [emb.n_samples for emb in in_threads(tmp_path, 2)] == [24, 24]


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    with pytest.raises(RanksError, match=r"rank 1 never came; 4 shards are missing \(4, 5, 6, 7\)"):
        embed(make_samples(24), PatchEncoder(), out=tmp_path, shard_samples=3, ranks=(0, 2), wait=0.5)
    with pytest.raises(RanksError, match="rank 0 did not begin"):
        embed(make_samples(24), PatchEncoder(), out=tmp_path, shard_samples=3, ranks=(1, 2), wait=0.5)
    assert embed(make_samples(24), PatchEncoder(), out=tmp_path, shard_samples=3).n_samples == 24
    assert not list(tmp_path.rglob(".*"))


def test_ranks_of_another_job_do_not_mix(tmp_path: Path) -> None:
    found = in_threads(tmp_path, 2, {1: {"dtype": "float16"}}, wait=0.5)
    assert [type(f) for f in found] == [RanksError, RanksError]


def test_two_calls_in_a_row_by_the_same_ranks(tmp_path: Path) -> None:
    outs: dict[int, list[int]] = {0: [], 1: []}

    def work(rank: int) -> None:
        for _ in range(4):
            emb = embed(make_samples(9), PatchEncoder(), out=tmp_path, shard_samples=3, ranks=(rank, 2), wait=10)
            outs[rank].append(emb.n_samples)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outs == {0: [9] * 4, 1: [9] * 4}


def lock_of_a_dead_call(out: Path, **facts: object) -> Path:
    """What rank 0 of a call leaves that was killed on another machine a moment ago."""
    emb = embed(make_samples(9), PatchEncoder(), out=out, shard_samples=3)
    folder = out / "stand_in" / "late"
    plan = {k: emb.provenance[k] for k in ("version", "identity_fingerprint", "samples_fingerprint", "dtype",
                                           "shard_samples")}  # fmt: skip
    left = {"host": "elsewhere", "pid": 1, "began": "1", "token": "old", "wait": 600, "state": "open", "size": 2,
            "todo": [0], "key": hash_json([hash_json(plan)])} | facts  # fmt: skip
    (folder / ".lock").write_text(json.dumps(left))
    return folder


def test_nobody_joins_a_dead_call_of_another_machine(tmp_path: Path) -> None:
    lock_of_a_dead_call(tmp_path)
    with pytest.raises(RanksError, match="rank 0 did not begin"):
        embed(make_samples(9), PatchEncoder(), out=tmp_path, shard_samples=3, ranks=(1, 2), wait=0.5)
    with pytest.raises(FolderInUseError, match="on elsewhere"):
        embed(make_samples(9), PatchEncoder(), out=tmp_path, shard_samples=3)


def test_a_call_of_another_machine_is_joined_and_its_death_is_noticed(tmp_path: Path) -> None:
    folder = lock_of_a_dead_call(tmp_path)
    lock, stop = folder / ".lock", threading.Event()
    thread = threading.Thread(target=lambda: [os.utime(lock) for _ in range(10) if not stop.wait(0.1)])
    thread.start()  # it lives for a second
    with pytest.raises(RanksError, match="rank 0 ended before the folder was complete"):
        embed(make_samples(9), PatchEncoder(), out=tmp_path, shard_samples=3, ranks=(1, 2), wait=1.5)
    assert (folder / ".rank-00001").exists()
    stop.set()
    thread.join()
    lock.unlink()
    assert embed(make_samples(9), PatchEncoder(), out=tmp_path, shard_samples=3).n_samples == 9
    assert not list(tmp_path.rglob(".*"))


# -- the lock ----------------------------------------------------------------------------------------------------


def test_a_second_call_on_one_folder_is_refused(script: Path, alone: dict, tmp_path: Path) -> None:
    process = start(script, tmp_path, pause=0.3)
    while not (tmp_path / "stand_in" / "early" / ".lock").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    with pytest.raises(FolderInUseError, match=f"is being written by process {process.pid}.*delete"):
        embed(make_samples(40), PatchEncoder(), layer=0, pool="mean", out=tmp_path, shard_samples=4)
    done(process)
    assert contents(tmp_path) == alone


def test_another_encoder_may_not_write_the_same_failures_at_the_same_time(tmp_path: Path) -> None:
    sign = signs.Sign(tmp_path / ".failures.csv.lock", 60)
    try:
        with pytest.raises(FolderInUseError):
            embed(make_samples(3), PatchEncoder(), out=tmp_path)
        embed(make_samples(3), PatchEncoder(), out=tmp_path, failures=tmp_path / "other.csv")
    finally:
        sign.release()


@pytest.mark.parametrize(
    ("change", "age", "lives"),
    [
        ({}, 0, True),  # this very process
        ({"began": "1"}, 0, False),  # its number now belongs to another process
        ({"pid": 2**22 + 1}, 0, False),  # gone
        ({"host": "elsewhere"}, 30, True),  # on another machine, touched 30 s ago
        ({"host": "elsewhere"}, 90, False),
    ],
)
def test_locks_of_dead_processes_are_taken_over(change: dict, age: float, lives: bool, tmp_path: Path) -> None:
    sign = signs.Sign(tmp_path / ".lock", 60)
    sign._stop.set()
    facts = {**signs.look(tmp_path / ".lock"), **change}
    (tmp_path / ".lock").write_text(json.dumps(facts))
    then = time.time() - age
    os.utime(tmp_path / ".lock", (then, then))
    if lives:
        with pytest.raises(FolderInUseError):
            signs.Sign(tmp_path / ".lock", 60)
    else:
        signs.Sign(tmp_path / ".lock", 60).release()
        assert not list(tmp_path.iterdir())


def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path: Path) -> None:
    for trial in range(20):
        path = tmp_path / f"{trial}" / ".lock"
        path.parent.mkdir()
        path.write_text(json.dumps({"host": signs.this_host(), "pid": 2**22 + 1, "began": "1", "token": "old"}))
        gate, got = threading.Barrier(6), []

        def take(path: Path = path, gate: threading.Barrier = gate, got: list = got) -> None:
            gate.wait()
            with suppress(FolderInUseError):
                got.append(signs.Sign(path, 60))

        threads = [threading.Thread(target=take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        held = [sign for sign in got if sign.held()]
        assert len(held) <= 1 and len(got) >= 1
        for sign in got:
            sign.release()


def test_a_lock_is_touched_while_it_is_held(tmp_path: Path) -> None:
    sign = signs.Sign(tmp_path / ".lock", 0.4)
    os.utime(tmp_path / ".lock", (1, 1))
    time.sleep(0.2)
    assert (tmp_path / ".lock").stat().st_mtime > 1e6
    sign.release()
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("x", "2"), ("-1", "2")])
def test_an_environment_that_cannot_be_meant(rank: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(InputError, match="RANK"):
        ranks.from_environment()


@pytest.mark.parametrize(
    ("device", "local", "there", "found"),
    [("auto", "5", 4, "cuda:1"), ("cuda", "2", 4, "cuda:2"), ("cuda:0", "2", 4, "cuda:0"), ("cpu", "2", 4, "cpu"),
     ("auto", None, 4, "cuda")],
)  # fmt: skip
def test_each_rank_takes_its_own_device(
    device: str, local: str | None, there: int, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert ranks.device_here(device) == found


@pytest.mark.slow
def test_the_shell_under_torchrun(tmp_path: Path) -> None:
    bs.data.phantom(n_patients=4, n_tiles=3, out=tmp_path, random_state=0)
    shell = ["embed", str(tmp_path / "samples.csv"), "tiny-histology", "--patient", "patient", "--mpp", "0.5"]
    run = {"env": environment(), "capture_output": True, "text": True, "timeout": 300, "check": False}
    one = subprocess.run([sys.executable, "-m", "biosae.cli", *shell, "--out", str(tmp_path / "one")], **run)
    assert one.returncode == 0, one.stderr
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.run([*start, "-m", "biosae.cli", *shell, "--out", str(tmp_path / "two")], **run)
    assert two.returncode == 0, two.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert two.stdout.count("final: ") == 1


@pytest.mark.parametrize(("todo", "size"), [(10, 2), (10, 3), (2, 5), (0, 2)])
def test_every_shard_has_one_owner(todo: int, size: int, tmp_path: Path) -> None:
    numbers = list(np.arange(100, 100 + todo))
    teams = [ranks.Team(r, size, folders=[tmp_path], shared=[], key="k", wait=1) for r in range(size)]
    parts = [team._part(numbers, rank) for rank, team in enumerate(teams)]
    assert list(chain(*parts)) == numbers
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
