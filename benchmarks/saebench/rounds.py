"""Rounds in which contestants alternate, each in a fresh process; rounds on a busy machine are repeated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saebench.contestants import COMMON_RATE, Case, Contestant
from saebench.worker import MARK

HERE = Path(__file__).resolve().parents[1]
PATIENT = 10_000_000
"""Rows without firing after which a latent is dead, in the timed rounds: what sparsify and dictionary-learning use, so
that nobody's AuxK is at work there. The quality is that of the defaults."""


@dataclass(frozen=True)
class Setting:
    """How rounds are made."""

    peers_python: str | None
    threads: int = 2
    rounds: int = 3
    max_others: float = 0.10
    """Share of the machine that other processes may use in a round that counts."""
    tries: int = 6
    pause: float = 20.0
    """Seconds before a round is repeated."""
    seed: int = 0
    rates: tuple[str, ...] = ("own", "common")
    """Learning rates at which quality is judged: each library's own, and one for all."""


def call(
    one: Contestant, case: Case, paths: tuple[Path, Path], setting: Setting, *, judge: bool, **run: Any
) -> dict[str, Any]:
    """One run in a fresh process, judged or not; ``run``: ``steps``, ``learning_rate``."""
    python = setting.peers_python if one.kind == "peer" else sys.executable
    if python is None:
        return {"status": "not installed"}
    options = one.options if judge or one.kind != "ours" else one.options | {"dead_after": PATIENT}
    spec = {
        "module": one.module, "matrix": str(paths[0]), "held": str(paths[1]), "threads": setting.threads,
        "judge": judge,
        "run": {
            "n_latents": case.m, "k": case.k, "batch_size": case.batch, "warm": case.warm, "seed": setting.seed,
            "options": options, **run,
        },
    }  # fmt: skip
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    environment = os.environ | dict.fromkeys(threads, str(setting.threads))
    environment |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
    environment["PYTHONPATH"] = str(HERE.parent) if one.kind == "ours" else ""
    done = subprocess.run(
        [python, str(HERE / "sae.py"), "worker", json.dumps(spec)], env=environment, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        return {"status": f"failed: exit {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"}
    found = json.loads(lines[-1][len(MARK) :])
    if found["status"].startswith("failed"):
        print(done.stderr[-2000:], file=sys.stderr)
    return found


def timed(ones: list[Contestant], case: Case, paths: tuple[Path, Path], setting: Setting) -> Iterator[dict[str, Any]]:
    """Records of all rounds, rejected ones too (``counts`` is false). The order rotates from round to round."""
    absent: set[str] = set()
    for number in range(setting.rounds):
        turn = number % len(ones)
        for one in ones[turn:] + ones[:turn]:
            if one.label in absent:
                continue
            for attempt in range(setting.tries):
                if attempt:
                    time.sleep(setting.pause)
                steps = case.warm + case.timed * one.pace
                found = call(one, case, paths, setting, steps=steps, learning_rate=None, judge=False)
                ok = found["status"] == "ok"
                quiet = ok and not found["others"] > setting.max_others
                yield {"contestant": one.label, "round": number, "attempt": attempt, "counts": quiet, **found}
                _tell(case, one, found, "" if quiet or not ok else "  rejected: the machine was busy")
                if not ok:
                    absent.add(one.label)
                if quiet or not ok:
                    break


def judged(ones: list[Contestant], case: Case, paths: tuple[Path, Path], setting: Setting) -> Iterator[dict[str, Any]]:
    """Quality of everyone that learns anything, after the same steps, at its own learning rate and at a common one."""
    for rate, name in ((None, "own"), (COMMON_RATE, "common")):
        for one in ones if name in setting.rates else ():
            if one.kind == "yardstick":
                continue
            found = call(one, case, paths, setting, steps=case.steps, learning_rate=rate, judge=True)
            yield {"contestant": one.label, "rate": name, **found}
            _tell(case, one, found, f"  {name} learning rate")


def _tell(case: Case, one: Contestant, found: dict[str, Any], note: str) -> None:
    numbers = "  ".join(
        f"{name} {found[name]:.4g}" for name in ("wall", "cpu", "cores", "others", "fvu", "dead", "l0") if name in found
    )
    print(f"{case.name:16} {one.label:30} {numbers or found['status']}{note}", flush=True)
