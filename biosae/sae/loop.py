"""The loop of a training: batches to trainers, interrupts, progress, and errors that all processes hear of."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from biosae.sae.train import Trainer
from biosae.settings import settings


def run(trainers: list[Trainer], batches: Callable[[int], Iterator[torch.Tensor]]) -> None:
    """Train all of them on one stream until each has finished.

    Parameters
    ----------
    batches
        Gives the endless stream of raw batches from a step on.

    Raises
    ------
    DivergedError
        See :meth:`Trainer.step`.
    KeyboardInterrupt
        After Ctrl-C or SIGTERM, at the end of the step and once the states of all trainers are written.

    Notes
    -----
    Before each step the processes that train together ask each other whether one has met an error or an interrupt; all
    of them then end with it.
    """
    total = max(t.plan.n_steps for t in trainers)
    first = min((t.done for t in trainers if not t.finished), default=total)
    if first >= total:
        return
    comm = trainers[0].comm
    stream = batches(first)
    bar = _progress(total, first, shown=comm.rank == 0)
    try:
        with _interrupts() as asked:
            trouble: BaseException | None = None
            for position in range(first, total + 1):
                over = all(t.finished for t in trainers)
                if trouble is None and asked:
                    trouble = KeyboardInterrupt()
                if trouble is None and not over:
                    try:
                        rows = next(stream)
                    except (Exception, KeyboardInterrupt) as error:
                        trouble = error  # all must hear of it
                trouble = comm.agree(trouble)
                if isinstance(trouble, KeyboardInterrupt):
                    for trainer in trainers:
                        trainer.save(force=True)
                if trouble is not None:
                    raise trouble
                if over:
                    break
                due = [t for t in trainers if not t.finished and t.done == position]
                for trainer in due:
                    started = time.perf_counter()
                    trainer.step(rows)
                    trainer.seconds += time.perf_counter() - started
                bar.update()
                for trainer in due:
                    trainer.save(force=trainer.finished)
                    try:
                        trainer.tell()
                    except (Exception, KeyboardInterrupt) as error:
                        trouble = error
    finally:
        bar.close()
        stream.close()


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM wait for the end of a step, so that what is saved is the state between two steps.

    Gives the list of those that came. A second Ctrl-C acts at once.
    """
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in came:
            raise KeyboardInterrupt
        came.append(number)

    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield came
        return
    former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _progress(total: int, initial: int, *, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=initial, desc="SAE", unit="step", disable=not (shown and settings.progress))
