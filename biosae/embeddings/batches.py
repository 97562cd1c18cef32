"""Batches read and preprocessed ahead of the forward pass, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from biosae.data.items import ReadError


@dataclass(frozen=True)
class Job:
    """One batch of one shard, for the layers that still lack this shard."""

    shard: int
    positions: range
    layers: tuple[str, ...]
    closes: bool  # the last batch of its shard


@dataclass
class Loaded:
    """A batch after a worker: items grouped by shape with their positions, and position -> why it failed."""

    groups: dict[tuple[int, ...], tuple[torch.Tensor, list[int]]] = field(default_factory=dict)
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)


def make_jobs(
    committed: Mapping[str, Container[int]], todo: Sequence[int], n: int, shard_samples: int, batch_size: int
) -> list[Job]:
    """Batches of those shards that at least one layer lacks; a batch never crosses a shard's end.

    Parameters
    ----------
    committed
        Layer to the numbers of its committed shards.
    todo
        Numbers of the shards to look at.
    n, shard_samples, batch_size
        Numbers of samples: all, in a shard, in a batch.
    """
    jobs = []
    for shard in todo:
        first = shard * shard_samples
        lacking = tuple(layer for layer, shards in committed.items() if shard not in shards)
        end = min(first + shard_samples, n)
        for start in range(first, end, batch_size) if lacking else ():
            stop = min(start + batch_size, end)
            jobs.append(Job(shard, range(start, stop), lacking, closes=stop == end))
    return jobs


def prefetch(jobs: Sequence[Job], load: Callable[[Job], Loaded], n_jobs: int) -> Iterator[tuple[Job, Loaded]]:
    """Load jobs in order, up to ``n_jobs`` of them at once in threads while the caller works on an earlier one.

    Threads and not processes: Pillow, numpy and torch release the interpreter lock where the time goes, nothing has to
    be started, pickled or copied, and nothing outlives the process.
    """
    if n_jobs == 0:
        yield from ((job, load(job)) for job in jobs)
        return
    threads = torch.get_num_threads()
    workers = ThreadPoolExecutor(n_jobs, "embed", initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque = deque()
    try:
        for job in jobs:
            waiting.append((job, workers.submit(load, job)))
            if len(waiting) > n_jobs:
                ahead, future = waiting.popleft()
                yield ahead, future.result()
        while waiting:
            ahead, future = waiting.popleft()
            yield ahead, future.result()
    finally:
        workers.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


def load_batch(samples: Any, preprocess: Callable, positions: range, pin: bool) -> Loaded:
    """Read and preprocess one batch into one tensor a shape; a failing item is noted and left out."""
    batch = Loaded()
    found: dict[tuple[int, ...], tuple[list[torch.Tensor], list[int]]] = {}
    for at in positions:
        stage = "read"
        try:
            item = samples[at]
            stage = "preprocess"
            tensor = preprocess(item)
        except ReadError as error:
            batch.failed[at] = (error.reason, error.detail)
            continue
        except Exception as error:
            batch.failed[at] = (f"{stage}_error", f"{type(error).__name__}: {error}")
            continue
        items, members = found.setdefault(tuple(tensor.shape), ([], []))
        items.append(tensor)
        members.append(at)
    for shape, (items, members) in found.items():
        buffer = torch.empty((len(items), *shape), dtype=items[0].dtype, pin_memory=pin)
        batch.groups[shape] = (torch.stack(items, out=buffer), members)
        items.clear()
    return batch
