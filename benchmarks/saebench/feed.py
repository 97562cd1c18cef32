"""What a contestant is asked to do, and the rows it is given: the same batches in the same order for everyone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from saebench.measure import clocks


class Unavailable(Exception):
    """The contestant cannot be run here; the message is printed in its row of the table."""


@dataclass
class Run:
    """One training run."""

    n_latents: int
    k: int
    batch_size: int
    steps: int
    warm: int
    """First steps, which are not timed."""
    learning_rate: float | None
    """None: what the library itself uses or recommends."""
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    span: np.ndarray | None = None
    """Clocks spent by ``timed_steps`` steps; filled by the contestant."""
    timed_steps: int = 0
    setup: float = float("nan")
    """Wall seconds before the first timed step: initialisation, compilation, warm-up."""

    @property
    def warmup(self) -> int:
        """Steps over which the learning rate rises: 5 %, for every library that has the setting."""
        return self.steps // 20

    def read(self, ticks: list[np.ndarray], start: np.ndarray) -> None:
        """Take the timing from clocks read at the beginning of each step."""
        first, last = min(self.warm, self.steps - 2), self.steps - 1
        self.span, self.timed_steps = ticks[last] - ticks[first], last - first
        self.setup = float(ticks[first][0] - start[0])


class Feed:
    """Endless batches of rows, new random order each pass; reads the clocks whenever a batch is asked for."""

    def __init__(self, matrix: torch.Tensor, run: Run) -> None:
        self.matrix, self.run = matrix, run
        self.ticks: list[np.ndarray] = []
        self.start = clocks()

    def numbers(self) -> Iterator[torch.Tensor]:
        """Row numbers, int64 (batch,); a second call begins anew, with its clocks."""
        self.ticks = ticks = []
        generator = torch.Generator().manual_seed(self.run.seed)
        size = self.run.batch_size
        while True:
            order = torch.randperm(len(self.matrix), generator=generator)
            for begin in range(0, len(order) - size + 1, size):
                ticks.append(clocks())
                yield order[begin : begin + size]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self.matrix[index] for index in self.numbers())

    def first(self, steps: int) -> Iterator[torch.Tensor]:
        """The first ``steps`` batches."""
        return (rows for _, rows in zip(range(steps), self))

    def close(self) -> None:
        """Hand the timing to the run."""
        self.run.read(self.ticks, self.start)
