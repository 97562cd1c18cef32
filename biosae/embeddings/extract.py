"""Samples through a frozen encoder into an embeddings folder: read ahead in threads, resumable, failures collected."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from biosae.embeddings import ranks as team_of
from biosae.embeddings import shards
from biosae.embeddings.batches import Job, Loaded, load_batch, make_jobs, prefetch
from biosae.embeddings.filling import Failed, Filling, await_grid, close, open_layer, plan_layer, span
from biosae.embeddings.filling import safe_name as safe_name
from biosae.embeddings.signs import WAIT
from biosae.embeddings.store import Embeddings
from biosae.errors import InputError, RanksError, nearest
from biosae.files import hash_json
from biosae.settings import settings

SHARD_SAMPLES, SHARD_SAMPLES_TOKENS = 1024, 64


def embed(
    samples: Any,
    encoder: Any,
    *,
    layer: int | str | Sequence[int | str] = -1,
    pool: str = "default",
    out: str | os.PathLike,
    batch_size: int = 64,
    n_jobs: int | None = None,
    dtype: str = "float32",
    precision: str | None = None,
    shard_samples: int | None = None,
    max_failures: float = 0.05,
    failures: str | os.PathLike | None = None,
    retry_failures: bool = False,
    device: str = "auto",
    resume: bool = True,
    ranks: tuple[int, int] | None = None,
    wait: float = WAIT,
) -> Embeddings | dict[str, Embeddings]:
    """Embed samples with a frozen encoder; a killed call is completed by calling again with the same arguments.

    Reading and preprocessing run in threads ahead of the forward pass. Under ``torchrun``, on any number of machines
    that see one folder, each process computes a range of the missing shards. The folder written does not depend on
    ``n_jobs``, on the number of processes or on how often the work was interrupted: it is the same to the byte on
    machines of one kind.

    Parameters
    ----------
    samples
        :class:`biosae.Samples` of the kind of item that the encoder takes. Reading must be safe in threads.
    encoder
        An encoder, or the name of one for :func:`biosae.encoders.load`. It is used as ``encoder.suited(samples)``: set
        to the samples' micrometres per pixel where they are known, and refused where it is made for another kind of
        item, or for signals of another rate, unit or other channels.
    layer
        A layer's name or number (negative from the end), or several: one forward pass then serves all of them.
    pool
        ``"default"`` (the encoder's own), ``"cls"``, ``"mean"``, ``"cls+mean"``, or ``"tokens"`` for one row a token.
    out
        Folder; each layer goes to ``out/<encoder>/<layer>/``.
    batch_size
        Samples in one forward pass.
    n_jobs
        Threads that read and preprocess; 0 reads between forward passes; None takes ``settings.n_jobs``.
    dtype
        How numbers are stored, ``"float32"`` or ``"float16"``.
    precision
        Arithmetic of an encoder given by name, ``"float32"`` (default) or ``"bfloat16"``; an object has its own.
    shard_samples
        Samples in one shard, the unit that an interrupted call can lose; by default 1024, or 64 for tokens.
    max_failures
        Largest share of samples that may fail, between 0 and 1.
    failures
        The ``failures.csv`` to which failed samples are reported; by default ``out/failures.csv``.
    retry_failures
        Compute shards with failed samples again; by default a recorded failure stays one.
    device
        Where the network runs. ``"auto"`` leaves an encoder object where it is; an encoder given by name goes to the
        CUDA device ``LOCAL_RANK`` if there is one.
    resume
        False deletes what the layer's folder holds and starts over.
    ranks
        Number of this process and of all that share the work; None takes ``RANK`` and ``WORLD_SIZE``, as ``torchrun``
        sets them. ``(0, 1)`` works alone.
    wait
        Seconds without a sign of life after which another process counts as dead.

    Returns
    -------
    Embeddings, or a dict of layer name to Embeddings if ``layer`` is a list. Samples that failed are absent. Every
    process returns the same, once the folder is complete.

    Raises
    ------
    InputError
        For arguments that cannot be meant, for samples of another physical scale than the encoder was set to, and
        when the forward pass runs out of memory.
    IdentityError
        If the folder was begun with another encoder, layer, pooling, samples, dtype or shard size.
    TooManyFailuresError
        If more than ``max_failures`` of the samples fail; finished shards and ``failures.csv`` stay.
    FolderInUseError
        If another call writes the same folder or ``failures.csv`` at this time.
    RanksError
        If one of several processes ended before its part was done; names the missing shards.
    """
    if not hasattr(samples, "roles"):
        raise InputError(
            f"samples is a {type(samples).__name__}; read it first: embed(bs.read.tiles(table, patient=...), ...)"
        )
    if len(samples) == 0:
        raise InputError("there are no samples to embed; the table or the selection is empty")
    if dtype not in shards.DTYPES:
        raise InputError(f"dtype={dtype!r}; {nearest(dtype, shards.DTYPES)}")
    if shard_samples is None:
        shard_samples = SHARD_SAMPLES_TOKENS if pool == "tokens" else SHARD_SAMPLES
    n_jobs = settings.n_jobs if n_jobs is None else n_jobs
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("shard_samples", shard_samples, 1),
        ("n_jobs", n_jobs, 0),
    ):
        if int(value) != value or value < least:
            raise InputError(f"{name}={value} must be a whole number of at least {least}")
    if not 0 <= max_failures <= 1:
        raise InputError(f"max_failures={max_failures} must be a share between 0 and 1 (0.05 allows 5 %)")
    several = isinstance(layer, Sequence) and not isinstance(layer, str)
    if several and not layer:
        raise InputError("layer=[] names no layer")
    encoder = _ready(encoder, samples, device=device, precision=precision)
    shards.obs_bytes(samples.obs, roles=samples.roles, mpp=samples.mpp)  # refuse before the work, not after it

    rank, size = team_of.from_environment() if ranks is None else ranks
    if not 0 <= rank < size:
        raise InputError(f"ranks={ranks} must be this process's number, from 0, and that of all processes")
    if not wait > 0:
        raise InputError(f"wait={wait} must be a number of seconds above 0")
    layers = list(dict.fromkeys(encoder.resolve_layer(one) for one in (layer if several else [layer])))
    opened = [plan_layer(samples, encoder, name, pool, Path(out), dtype, shard_samples) for name in layers]
    csv = Path(failures or Path(out) / "failures.csv")
    team = team_of.Team(
        rank, size, folders=[one.folder for one in opened], shared=[csv], wait=wait,
        key=hash_json([shards.plan_hash(one.plan) for one in opened]),
    )  # fmt: skip
    with team:
        todo = team.join() if not team.first else None
        for one in opened:
            open_layer(one, samples, resume=resume, retry_failures=retry_failures, first=team.first)
        label = opened[0].plan["identity"]["encoder"]
        log = Failed(csv if team.first else team.private(csv), f"embed/{label}", samples, max_failures)
        log.restart(opened if team.first else [])  # the first rank counts all, the others their own
        if todo is None:
            numbers = range(shards.n_shards(opened[0].plan))
            todo = team.share([i for i in numbers if any(i not in one.entries for one in opened)])
        jobs = make_jobs({one.name: one.entries for one in opened}, todo, len(samples), shard_samples, batch_size)
        try:
            if jobs:
                await_grid(opened, team, todo[0], pool)
                _run(samples, encoder, opened, jobs, team, pool=pool, n_jobs=n_jobs, batch_size=batch_size, log=log)
            if team.first:
                close(opened, samples, team, log, ran=bool(jobs))
        except RanksError:
            if team.first:
                log.collect()
            raise
        if not team.first:
            log.path.unlink(missing_ok=True)
        team.close()
    if len(log) and team.first:
        warnings.warn(f"{len(log)} of {len(samples)} samples were not embedded; see {log.path}", stacklevel=2)
    found = {one.name: Embeddings.open(one.folder) for one in opened}
    return found if several else found[layers[0]]


def _ready(encoder: Any, samples: Any, *, device: str, precision: str | None) -> Any:
    """The encoder itself, on its device and set to the physical scale of the samples."""
    if isinstance(encoder, str | os.PathLike):
        from biosae.encoders import load

        return load(encoder, device=team_of.device_here(device), precision=precision or "float32").suited(samples)
    if precision is not None and precision != encoder.precision:
        raise InputError(f"the encoder was loaded with precision={encoder.precision!r}; load it with {precision!r}")
    if device != "auto":
        encoder = encoder.to(device)
    return encoder.suited(samples)


def _run(
    samples: Any, encoder: Any, opened: Sequence[Filling], jobs: Sequence[Job], team: team_of.Team, *, pool: str,
    n_jobs: int, batch_size: int, log: Failed,
) -> None:  # fmt: skip
    """Read, forward and write all jobs in order."""
    from tqdm.auto import tqdm

    device = torch.device(encoder.device)
    by_name = {one.name: one for one in opened}
    preprocess, pin = encoder.preprocess, device.type == "cuda"
    loaded = prefetch(jobs, lambda job: load_batch(samples, preprocess, job.positions, pin), n_jobs)
    n = len(samples)
    with (
        closing(loaded),
        tqdm(
            total=n if team.size == 1 else sum(len(job.positions) for job in jobs),
            initial=n - sum(len(job.positions) for job in jobs) if team.size == 1 else 0,
            desc=f"embed {opened[0].plan['identity']['encoder']}",
            unit=" samples",
            disable=not (settings.progress and team.first),
        ) as bar,
    ):
        for job, batch, outputs in _forwarded(encoder, loaded, pool, device):
            failed = dict(batch.failed)
            for name in job.layers:
                bad = _collect(by_name[name], encoder, batch, outputs[name], pool)
                by_name[name].failed.update({**batch.failed, **bad})
                for at, why in bad.items():
                    failed.setdefault(at, why)
            log.batch(job, failed)
            if job.closes:
                team.check()
                for name in job.layers:
                    _commit(by_name[name], job.shard, samples, pool, batch_size, device.type)
            bar.update(len(job.positions))
            if len(log):
                bar.set_postfix(failed=len(log), refresh=False)


# outputs of one batch and layer: for each group of one shape, (positions, last two sides of an input, array)
_Outputs = list[tuple[list[int], tuple[int, int], np.ndarray]]


def _forwarded(
    encoder: Any, loaded: Iterable[tuple[Job, Loaded]], pool: str, device: torch.device
) -> Iterator[tuple[Job, Loaded, dict[str, _Outputs]]]:
    """Forward pass of every batch. The next batch is queued on the device before an earlier one is fetched from it."""
    waiting: deque = deque()
    for job, batch in loaded:
        waiting.append((job, batch, _forward(encoder, job, batch, pool)))
        if len(waiting) > (device.type != "cpu"):
            yield _fetched(*waiting.popleft())
    while waiting:
        yield _fetched(*waiting.popleft())


def _forward(encoder: Any, job: Job, batch: Loaded, pool: str) -> list:
    outputs = []
    for shape, (items, members) in batch.groups.items():
        try:
            with torch.inference_mode():
                found = encoder.forward(items, list(job.layers), pool)
        except Exception as error:
            if isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error):
                raise InputError(
                    f"the forward pass ran out of memory with {len(members)} items of {shape}; give a smaller "
                    "batch_size= (finished shards are kept)"
                ) from error
            why = ("forward_error", f"{type(error).__name__}: {error}")
            batch.failed.update(dict.fromkeys(members, why))
            continue
        outputs.append((members, shape[-2:], found))
    return outputs


def _fetched(job: Job, batch: Loaded, outputs: list) -> tuple[Job, Loaded, dict[str, _Outputs]]:
    return job, batch, {
        name: [(members, hw, found[name].detach().to("cpu", torch.float32).numpy()) for members, hw, found in outputs]
        for name in job.layers
    }  # fmt: skip


def _collect(one: Filling, encoder: Any, batch: Loaded, outputs: _Outputs, pool: str) -> dict[int, tuple[str, str]]:
    """Check a batch's embeddings and append the good ones to the open shard, by position; returns what failed."""
    bad: dict[int, tuple[str, str]] = {}
    good: list[np.ndarray] = []
    positions: list[int] = []
    for members, hw, values in outputs:
        expected = (len(members), one.plan["identity"]["dim"])
        if pool == "tokens":
            grid = [int(side) for side in encoder.grid(one.name, hw)]
            one.grid = one.grid or grid
            if grid != one.grid:
                why = f"{grid[0]} x {grid[1]} tokens; the first samples have {one.grid[0]} x {one.grid[1]}"
                bad.update(dict.fromkeys(members, ("wrong_grid", why)))
                continue
            expected = (expected[0], grid[0] * grid[1], expected[1])
        if values.shape != expected:
            raise InputError(
                f"the encoder returned {values.shape} for layer {one.name!r}, its identity says {expected}"
            )
        with np.errstate(over="ignore"):
            stored = values.astype(one.plan["dtype"], copy=False).reshape(len(members), -1)
        finite = np.isfinite(stored).all(axis=1)
        for row in np.flatnonzero(~finite):
            if np.isfinite(values[row]).all():
                bad[members[row]] = ("exceeds_float16", f"largest value {np.abs(values[row]).max():.4g}; use float32")
            else:
                bad[members[row]] = ("non_finite", f"layer {one.name!r} gives NaN or infinity")
        good.append(stored[finite])  # a copy, so that the encoder's own tensors can go
        positions += [at for at, fine in zip(members, finite) if fine]
    if positions:
        rows = good[0] if len(good) == 1 else np.concatenate(good)[np.argsort(positions)]
        one.blocks.append(rows.reshape(-1, one.plan["identity"]["dim"]))
        one.positions += sorted(positions)
    return bad


def _commit(one: Filling, shard: int, samples: Any, pool: str, batch_size: int, device: str) -> None:
    """Write the open shard of a layer and begin the next."""
    ids = samples.obs.index
    tokens = one.grid and one.grid[0] * one.grid[1]
    one.entries[shard] = shards.commit(
        one.folder,
        shard,
        one.plan,
        one.blocks or [np.empty((0, one.plan["identity"]["dim"]), one.plan["dtype"])],
        ids=[ids[at] for at in one.positions],
        failures=[[ids[at], *why] for at, why in sorted(one.failed.items())],
        tokens_per_sample=tokens if pool == "tokens" else 1,
        grid=one.grid,
        batch_size=batch_size,
        device=device,
        files_sha256=samples.files_hash(span(one, shard)),
    )
    one.blocks, one.positions, one.failed = [], [], {}
