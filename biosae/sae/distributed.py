"""One training over several processes: what they must tell each other, as hooks that do nothing for one process.

:class:`Replicas` share the rows of every batch and hold the whole model each; :class:`Shards` see every row and share
the latents. In both, what follows from sums over the processes is the same number on all of them, so that all take the
same decisions (dead latents, divergence, early stop) without asking each other. Tensors on the CPU travel by gloo, on a
CUDA device by NCCL. docs/methods/scale.md has the memory and traffic of both.
"""

from __future__ import annotations

import atexit
import os
from abc import ABC, abstractmethod

import torch
import torch.distributed as dist

from biosae import errors
from biosae.errors import BiosaeError, InputError
from biosae.sae.kernels import torch_any
from biosae.sae.kernels.codes import Codes
from biosae.sae.model import SparseAutoencoder

SHARDED = ("W_enc", "b_enc", "W_dec", "threshold")
"""Parameters with one row a latent."""
MERGE_BYTES = 2**28
"""Bytes of candidates of all shards that are merged at once."""


class Alone:
    """A single process. Subclasses answer the same questions for data-parallel and latent-sharded training."""

    rank = 0
    world = 1
    replicas = 1
    """Processes that share the rows of a batch."""
    shards = 1
    """Processes that share the latents."""

    def shard(self, model: SparseAutoencoder) -> SparseAutoencoder:
        """The part of a new model whose latents this process holds."""
        return model

    def whole(self, model: SparseAutoencoder) -> SparseAutoencoder:
        """The whole trained model, from the parts of all processes."""
        return model

    def rows(self, n: int) -> int:
        """Rows of the whole batch, of which this process has ``n``."""
        return n * self.replicas

    def over_rows(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the processes that share the rows (it may be overwritten)."""
        return value

    def over_latents(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the processes that share the latents (it may be overwritten)."""
        return value

    def reconstruction(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum of partial reconstructions (G, n, d) over the processes that share the latents."""
        return self.over_latents(partial)

    def total(self, count: int) -> int:
        """Sum of a whole number over all processes; it also makes them wait for each other."""
        return count

    def same(self, value: torch.Tensor) -> torch.Tensor:
        """The tensor of the first process (it may overwrite this one)."""
        return value

    def of_all(self, value: str) -> list[str]:
        """The texts of all processes."""
        return [value]

    def all_rows(self, value: torch.Tensor) -> torch.Tensor:
        """One number for each row of the whole batch, from those of this process's rows."""
        return value

    def pick(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Rows of the whole batch, of which this process has ``x``."""
        return x[chosen]

    def place(self, count: int) -> tuple[int, int]:
        """Of things counted on every shard: how many there are on the shards before this one, and on all."""
        return 0, count

    def agree(self, trouble: BaseException | None) -> BaseException | None:
        """The exception that any process has met, on all of them; None where none has."""
        return trouble

    def top_rows(self, codes: Codes, k: int) -> Codes:
        """Of each row's candidates (up to k from every shard) those that belong to the k largest of all shards."""
        return codes

    def largest(self, codes: Codes, count: int, n_latents: int) -> tuple[Codes, float]:
        """The ``count`` largest entries of all rows and shards, and the smallest of them."""
        from biosae.sae.sparse_ops import largest

        return largest(codes, count)

    def close(self) -> None:
        """Cut the lines to the other processes: one that still waits for this one gets an error."""


ALONE = Alone()


class Processes(Alone, ABC):
    """What replicas and shards have in common: every process of the group takes part."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._host = dist.new_group(backend="gloo")

    def _group(self, value: torch.Tensor) -> dist.ProcessGroup | None:
        return self._host if value.device.type == "cpu" else None

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        value = value.contiguous()
        dist.all_reduce(value, group=self._group(value))
        return value

    def _gather(self, value: torch.Tensor) -> torch.Tensor:
        """Tensors of one shape from all processes, (world, ...)."""
        value = value.contiguous()
        out = value.new_empty((self.world * len(value), *value.shape[1:]))
        dist.all_gather_into_tensor(out, value, group=self._group(value))
        return out.view(self.world, *value.shape)

    def total(self, count: int) -> int:
        return int(self._sum(torch.tensor(count)))

    def same(self, value: torch.Tensor) -> torch.Tensor:
        value = value.contiguous()
        dist.broadcast(value, 0, group=self._group(value))
        return value

    def of_all(self, value: str) -> list[str]:
        told: list[str] = [""] * self.world
        dist.all_gather_object(told, value, group=self._host)
        return told

    def agree(self, trouble: BaseException | None) -> BaseException | None:
        try:
            if not self.total(trouble is not None):
                return None
            told = self.of_all("" if trouble is None else f"{type(trouble).__name__}:{trouble}")
        except RuntimeError as error:
            if trouble is not None:
                return trouble
            raise BiosaeError(
                "another process of this training has ended; its own message says why. Start all of them again: with a "
                "checkpoint folder they go on from the last state"
            ) from error
        if trouble is not None:
            return trouble
        rank = next(r for r, text in enumerate(told) if text)
        kind, _, message = told[rank].partition(":")
        if kind == "KeyboardInterrupt":
            return KeyboardInterrupt()
        return getattr(errors, kind, BiosaeError)(f"process {rank}: {message}")

    def largest(self, codes: Codes, count: int, n_latents: int) -> tuple[Codes, float]:
        """Found by counting: bits of positive floats have the order of the numbers, so two histograms of 16 bits each
        give the last kept value exactly, whatever the size of the batch."""
        if self.total(len(codes.values)) <= count:
            return codes, 0.0
        bits = codes.values.view(torch.int32)
        high, above, _ = self._bin(bits >> 16, 2**15, count)
        low, more, ties = self._bin((bits & 0xFFFF)[bits >> 16 == high], 2**16, count - above)
        last = high << 16 | low
        keep, free = bits >= last, count - above - more
        if ties > free:
            equal = bits == last
            keep &= ~equal | (self._order(codes, equal) < free)
        return codes.keep(keep), float(torch.tensor(last, dtype=torch.int32).view(torch.float32))

    def _bin(self, keys: torch.Tensor, size: int, count: int) -> tuple[int, int, int]:
        """Bin of the ``count``-th largest key of all processes, number of keys in higher bins and in this one."""
        counts = self._sum(torch.bincount(keys.long(), minlength=size)).flip(0)
        rising = counts.cumsum(0)
        place = int(torch.searchsorted(rising, count))
        return size - 1 - place, int(rising[place] - counts[place]), int(counts[place])

    @abstractmethod
    def _order(self, codes: Codes, wanted: torch.Tensor) -> torch.Tensor:
        """Number of ``wanted`` entries, bool (nnz,), that come before each entry in the whole batch, (nnz,)."""

    def close(self) -> None:
        dist.destroy_process_group(self._host)


class Replicas(Processes):
    """Data parallel: each process has an equal part of the rows of every batch and the whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.replicas = self.world

    def shard(self, model: SparseAutoencoder) -> SparseAutoencoder:
        for value in model.state_dict().values():
            value.copy_(self.same(value.clone()))
        return model

    def over_rows(self, value: torch.Tensor) -> torch.Tensor:
        return self._sum(value)

    def all_rows(self, value: torch.Tensor) -> torch.Tensor:
        return self._gather(value).flatten()

    def pick(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        local = chosen - self.rank * len(x)
        mine = (local >= 0) & (local < len(x))
        return self._sum(torch.where(mine[:, None], x[local.clamp(0, len(x) - 1)], 0.0))

    def _order(self, codes: Codes, wanted: torch.Tensor) -> torch.Tensor:
        counts = self._gather(wanted.sum().view(1))[: self.rank]
        return wanted.cumsum(0) - 1 + counts.sum()


class Shards(Processes):
    """Latent-sharded: each process has m / R consecutive latents, their moments, and all rows of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shards = self.world

    def shard(self, model: SparseAutoencoder) -> SparseAutoencoder:
        width, rest = divmod(len(model.W_dec), self.world)
        if rest:
            raise InputError(
                f"{len(model.W_dec)} latents cannot be shared evenly by {self.world} processes; set n_latents="
                f"{(width + 1) * self.world}, or another multiple of {self.world}"
            )
        first = self.rank * width
        ends = tuple(min(max(end - first, 0), width) for end in model.ends)
        part = _like(model, width, ends)
        for name, value in part.state_dict().items():
            whole = self.same(model.state_dict()[name].clone())
            value.copy_(whole[first : first + width] if name in SHARDED and whole.ndim else whole)
        return part

    def whole(self, model: SparseAutoencoder) -> SparseAutoencoder:
        ends = self._sum(torch.tensor(model.ends))  # of each prefix every shard holds its part
        whole = _like(model, len(model.W_dec) * self.world, tuple(ends.tolist()))
        for name, value in whole.state_dict().items():
            part = model.state_dict()[name]
            value.copy_(self._gather(part).view(value.shape) if name in SHARDED and part.ndim else part)
        return whole.train(model.training)

    def over_latents(self, value: torch.Tensor) -> torch.Tensor:
        return self._sum(value)

    def place(self, count: int) -> tuple[int, int]:
        counts = self._gather(torch.tensor([count])).flatten()
        return int(counts[: self.rank].sum()), int(counts.sum())

    def top_rows(self, codes: Codes, k: int) -> Codes:
        n = codes.n_rows
        mine = codes.values.view(n, -1) if len(codes.values) else codes.values.new_zeros(n, 0)
        start, kept = self.rank * k, []
        for part in mine.split(max(1, MERGE_BYTES // (4 * self.world * k))):
            values = self._gather(torch.nn.functional.pad(part, (0, k - part.shape[1])))
            values = values.transpose(0, 1).reshape(len(part), -1)  # shards in order, so the lower latent comes first
            index, value = torch_any.largest_of_rows(values, k)
            keep = torch.zeros_like(values, dtype=torch.bool).scatter_(1, index, value > 0)
            kept.append(keep[:, start : start + part.shape[1]].flatten())
        return codes.keep(torch.cat(kept))

    def _order(self, codes: Codes, wanted: torch.Tensor) -> torch.Tensor:
        rising = torch.cat([wanted.new_zeros(1, dtype=torch.int64), wanted.cumsum(0)])
        counts = self._gather(rising[codes.indptr].diff())
        rows = counts.sum(0)
        start = rows.cumsum(0) - rows + counts[: self.rank].sum(0)
        row = codes.rows()
        return start[row] + rising[:-1] - rising[codes.indptr[row]]


def _like(model: SparseAutoencoder, n_latents: int, ends: tuple[int, ...]) -> SparseAutoencoder:
    """A model of the same kind with another number of latents, on the same device."""
    made = SparseAutoencoder(
        model.W_dec.shape[1],
        n_latents,
        architecture=model.architecture,
        k=model.k,
        ends=ends,
        bandwidth=model.bandwidth,
    )
    return made.to(model.W_dec.device)


def connect(parallel: str | None, device: torch.device) -> tuple[Alone, torch.device]:
    """The processes that train together and the device of this one.

    They are those of ``torch.distributed``; where it is not initialised but ``RANK`` and ``WORLD_SIZE`` are set, as
    ``torchrun`` does, it is initialised here. A CUDA device without a number becomes that of ``LOCAL_RANK``.

    Parameters
    ----------
    parallel
        ``data``, ``latents``, or None: this process trains alone.

    Raises
    ------
    InputError
        For a device on which processes cannot work together.
    """
    if parallel is None or not dist.is_available():
        return ALONE, device
    under_torchrun = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not dist.is_initialized() and not under_torchrun:
        return ALONE, device
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"parallel={parallel!r} works on CPUs and CUDA devices, not on {device}; set device='cpu'")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    if dist.get_world_size() == 1:
        return ALONE, device
    return (Replicas() if parallel == "data" else Shards()), device


def writes(parallel: str | None) -> bool:
    """Whether this process is the one that writes files: the first, or one that trains alone."""
    return parallel is None or not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
