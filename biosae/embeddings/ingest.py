"""Rows of files made elsewhere into memory or into an embeddings folder, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.items import ReadError
from biosae.embeddings import shards
from biosae.embeddings.described import Described
from biosae.embeddings.foreign import blocks
from biosae.embeddings.store import Embeddings, _Memory
from biosae.errors import IdentityError
from biosae.files import hash_json

SHARD_ROWS = 16384


@dataclass
class Chosen:
    """The rows that are wanted; to :mod:`biosae.embeddings.shards` what :class:`biosae.Samples` are."""

    obs: pd.DataFrame
    roles: dict[str, str | None]
    mpp: float | None
    files: list[tuple[Path, Described]]
    at: np.ndarray
    dtype: np.dtype

    def __len__(self) -> int:
        return len(self.obs)

    @property
    def fingerprint(self) -> str:
        """Hash over ids, and names, sizes, times of modification and places of the files."""
        files = [[f.name, *_state(f, d.where), d.where, d.n] for f, d in self.files]
        return hash_json({"ids": self.obs.index.tolist(), "files": files})

    def stream(self, rows: int = 4096) -> Iterator[tuple[int, np.ndarray, list[tuple[str, str, str]]]]:
        """Blocks in order: position of the first row, rows, and ``(id, reason, detail)`` of those that are no good."""
        offset = 0
        for file, described in self.files:
            low, high = np.searchsorted(self.at, [offset, offset + described.n])
            mine, offset = self.at[low:high] - offset, offset + described.n
            start = done = 0
            try:
                for block in blocks(file, described, rows) if len(mine) else ():
                    first, last = np.searchsorted(mine, [start, start + len(block)])
                    with np.errstate(over="ignore"):
                        part = block[mine[first:last] - start].astype(self.dtype)
                    bad = np.flatnonzero(~np.isfinite(part).all(axis=1))
                    names = self.obs.index[low + first + bad]
                    yield low + first, part, [(n, "non_finite", f"{file.name} holds NaN or infinity") for n in names]
                    start, done = start + len(block), last
                if len(mine) and start != described.n:
                    raise ReadError("truncated", f"{file.name} ends after {start} of {described.n} rows")
            except ReadError as error:
                for first in range(done, len(mine), rows):
                    names = self.obs.index[low + first : low + min(first + rows, len(mine))]
                    nothing = np.full((len(names), described.dim), np.nan, self.dtype)
                    yield low + first, nothing, [(n, error.reason, error.detail) for n in names]


def _state(path: Path, where: Any) -> tuple[int, int]:
    """Bytes of a file, or of the files of a zarr array, and when the last of them was written (ns)."""
    files = [path] if path.is_file() else [p for p in (path / str(where)).rglob("*") if p.is_file()]
    found = [p.stat() for p in files]
    return sum(s.st_size for s in found), max((s.st_mtime_ns for s in found), default=0)


def in_memory(chosen: Chosen, identity: dict[str, Any], log: Any) -> Embeddings:
    """Read the rows into memory; ``log.add(id, reason, detail)`` gets those that are no good."""
    X = np.empty((len(chosen), identity["dim"]), chosen.dtype)
    good = np.ones(len(chosen), bool)
    for first, block, failed in chosen.stream():
        X[first : first + len(block)] = block
        good[first : first + len(block)] = np.isfinite(block).all(axis=1)
        for row in failed:
            log.add(*row)
    return Embeddings(
        _Memory(X if good.all() else X[good]), chosen.obs[good], identity=identity, tokens_per_sample=1, grid=None,
        provenance={"roles": chosen.roles, "mpp": chosen.mpp},
    )  # fmt: skip


def to_folder(chosen: Chosen, identity: dict[str, Any], out: Path, log: Any) -> Embeddings:
    """Write shards as :func:`biosae.embeddings.embed` does; those of an interrupted call stay."""
    from biosae.embeddings.extract import safe_name
    from biosae.encoders import fingerprint

    folder = out / safe_name(identity["encoder"]) / safe_name(identity["layer"])
    plan = shards.make_plan(
        identity=identity, identity_fingerprint=fingerprint(identity), samples=chosen, dtype=chosen.dtype.name,
        shard_samples=SHARD_ROWS,
    )  # fmt: skip
    shards.obs_bytes(chosen.obs, roles=chosen.roles, mpp=chosen.mpp)  # refuse before the work, not after it
    try:
        entries = shards.begin(folder, plan, resume=True)
    except IdentityError as error:
        raise IdentityError(
            f"{folder} holds embeddings of other files, rows or settings, or the files were written anew since "
            f"({str(error).partition('. ')[0]}); choose another out=, or delete this folder"
        ) from None
    kept, failed = [], []
    pieces = chosen.stream() if len(entries) < shards.n_shards(plan) else ()
    for first, block, bad in _cut(pieces, SHARD_ROWS):
        kept.append(block[np.isfinite(block).all(axis=1)])
        failed += bad
        end = first + len(block)
        if end % SHARD_ROWS and end < len(chosen):
            continue
        number = (end - 1) // SHARD_ROWS
        if number not in entries:
            lost = {name for name, _, _ in failed}
            ids = [i for i in chosen.obs.index[number * SHARD_ROWS : end] if i not in lost]
            entries[number] = shards.commit(
                folder, number, plan, kept, ids=ids, failures=[list(f) for f in failed], tokens_per_sample=1, grid=None,
                batch_size=None, device=None,
            )  # fmt: skip
        kept, failed = [], []
    for number in sorted(entries):
        for row in entries[number]["failures"]:
            log.add(*row)
    shards.finish(folder, plan, [entries[i] for i in range(shards.n_shards(plan))], chosen)
    return Embeddings.open(folder)


def _cut(pieces: Any, size: int) -> Iterator[tuple[int, np.ndarray, list[tuple[str, str, str]]]]:
    """The same blocks, cut so that none reaches over a multiple of ``size``; failures go with the last part of a block
    that they lie in."""
    for first, block, failed in pieces:
        at = 0
        while at < len(block):
            stop = min(len(block), at + size - (first + at) % size)
            bad = ~np.isfinite(block[at:stop]).all(axis=1)
            n = int(bad.sum())
            yield first + at, block[at:stop], failed[:n]
            failed, at = failed[n:], stop
