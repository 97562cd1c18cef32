"""Clocks, memory and the one set of quality numbers that every contestant is judged by."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

CHUNK = 1024
"""Rows of one block when a fitted contestant is judged."""


def clocks() -> np.ndarray:
    """Seconds (3,): wall clock, CPU time of this process, busy time of all cores of the machine (NaN if unknown)."""
    return np.array([time.perf_counter(), time.process_time(), _busy()])


def _busy() -> float:
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return float("nan")
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def others(spent: np.ndarray) -> float:
    """Share of the machine's cores that other processes used during ``spent``, a difference of two :func:`clocks`."""
    wall, cpu, busy = spent
    return max(0.0, (busy - cpu) / (wall * (os.cpu_count() or 1))) if wall > 0 else float("nan")


def status(field: str) -> float:
    """A field of /proc/self/status in MB; NaN where there is none."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1000
    except OSError:
        pass
    return float("nan")


class Memory:
    """Largest anonymous resident memory (MB) while a ``with`` block runs, looked at 20 times a second."""

    def __enter__(self) -> Memory:
        self.before = self.peak = status("RssAnon")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.05):
            self.peak = max(self.peak, status("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.resident = status("VmHWM")


Apply = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Rows (n, d) -> which latents are active, bool (n, m), and the reconstruction (n, d) in the units of the rows."""


@torch.no_grad()
def quality(apply: Apply, *, seen: torch.Tensor, held: torch.Tensor) -> dict[str, float]:
    """FVU and L0 on held-out rows, and the share of latents that no training row activates.

    FVU = sum ||x - x_hat||^2 / sum ||x - mean||^2 over the held-out rows, in float64, mean of the same rows.
    """
    error, active = 0.0, 0
    for rows in held.split(CHUNK):
        fired, x_hat = apply(rows)
        error += float((rows.double() - x_hat.double()).square().sum())
        active += int(fired.sum())
    spread = float((held.double() - held.double().mean(0)).square().sum())
    ever = None
    for rows in seen.split(CHUNK):
        fired = apply(rows)[0].any(0)
        ever = fired if ever is None else ever | fired
    return {"fvu": error / spread, "l0": active / len(held), "dead": 1 - float(ever.float().mean())}
