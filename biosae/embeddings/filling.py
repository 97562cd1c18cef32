"""A layer's embeddings folder while ``embed`` fills it, and the list of failed samples."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from biosae.data.failures import FailureLog, read_failures
from biosae.embeddings import shards
from biosae.embeddings.batches import Job
from biosae.embeddings.ranks import Team
from biosae.errors import IdentityError, TooManyFailuresError


@dataclass
class Filling:
    """A layer's folder while it is filled, and the shard being collected."""

    name: str
    folder: Path
    plan: dict[str, Any]
    entries: dict[int, dict[str, Any]]
    grid: list[int] | None = None
    blocks: list[np.ndarray] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)


def plan_layer(
    samples: Any, encoder: Any, layer: str, pool: str, out: Path, dtype: str, shard_samples: int
) -> Filling:  # fmt: skip
    from biosae.encoders import fingerprint

    identity = encoder.identity(layer, pool)
    plan = shards.make_plan(
        identity=identity,
        identity_fingerprint=fingerprint(identity),
        samples=samples,
        dtype=dtype,
        shard_samples=shard_samples,
    )
    return Filling(layer, out / safe_name(identity["encoder"]) / safe_name(layer), plan, {})


def open_layer(one: Filling, samples: Any, *, resume: bool, retry_failures: bool, first: bool) -> None:
    """Look up what the folder holds; the first rank also makes it, tidies it, or clears it.

    Raises
    ------
    IdentityError
        If it was begun with something else, or files of finished shards have changed since. Shards with failures are
        computed again where their files changed: somebody has mended them.
    """
    entries = shards.begin(one.folder, one.plan, resume=resume) if first else shards.present(one.folder, one.plan)
    if retry_failures:
        entries = {i: e for i, e in entries.items() if not e["failures"]}
    changed = {
        i for i, e in entries.items()
        if e.get("files_sha256") is not None and e["files_sha256"] != samples.files_hash(span(one, i))
    }  # fmt: skip
    whole = sorted(i for i in changed if not entries[i]["failures"])
    if whole:
        raise IdentityError(
            f"files of {len(whole)} finished shards (the first is {whole[0]}) are no longer those that {one.folder} "
            "was made of: choose another out=, or pass resume=False (--no-resume) to delete it and start over"
        )
    entries = {i: e for i, e in entries.items() if i not in changed}
    one.entries = entries
    one.grid = next((e["grid"] for _, e in sorted(entries.items()) if e["grid"]), None)


def span(one: Filling, shard: int) -> slice:
    """Rows of the samples that belong to a shard."""
    size = one.plan["shard_samples"]
    return slice(shard * size, (shard + 1) * size)


def safe_name(name: str) -> str:
    """A name as a folder's name: anything but letters, digits, ``. _ -`` becomes ``_``, and no leading dot.

    >>> safe_name("hf-hub:MahmoodLab/uni")
    'hf-hub_MahmoodLab_uni'
    """
    return re.sub(r"^\.+|[^A-Za-z0-9._-]", "_", name)


def await_grid(opened: Sequence[Filling], team: Team, shard: int, pool: str) -> None:
    """Tokens are laid out as those of the first sample: wait until the shards before ours say how, if they can."""
    if pool != "tokens" or team.size == 1:
        return
    for one in opened:

        def known(one: Filling = one) -> bool:
            for number in range(shard):
                entry = shards.committed(one.folder, one.plan, number)
                if entry is None:
                    return False
                if entry["grid"]:
                    one.grid = one.grid or entry["grid"]
                    return True
            return True

        if one.grid is None:
            team.until(known)


def close(opened: Sequence[Filling], samples: Any, team: Team, log: Failed, *, ran: bool) -> None:
    """Wait for the other ranks' shards, then write ``failures.csv`` and the closing files."""

    def lacking() -> list[int]:
        for one in opened:
            for number in range(shards.n_shards(one.plan)):
                if number not in one.entries:
                    entry = shards.committed(one.folder, one.plan, number)
                    one.entries |= {} if entry is None else {number: entry}
        numbers = range(shards.n_shards(opened[0].plan))
        return [i for i in numbers if any(i not in one.entries for one in opened)]

    team.gather(lacking)
    if ran or team.size > 1:
        log.restart(opened)  # in order of the samples, however the work was divided or interrupted
    for one in opened:
        shards.finish(one.folder, one.plan, [one.entries[i] for i in range(shards.n_shards(one.plan))], samples)


class Failed:
    """Failed samples of this call, once each, in ``failures.csv``."""

    def __init__(self, path: Path, stage: str, samples: Any, max_failures: float) -> None:
        self.path, self._stage, self._samples, self._max = path, stage, samples, max_failures
        for leftover in path.parent.glob(f".{path.name}.*.tmp*"):  # of a killed job
            leftover.unlink(missing_ok=True)

    def restart(self, opened: Sequence[Filling]) -> None:
        """Write the failures of all committed shards anew, ordered as the samples are."""
        self._log = FailureLog(self.path, stage=self._stage, total=len(self._samples), max_failures=self._max)
        for shard in sorted({i for one in opened for i in one.entries}):
            known: dict[str, tuple[str, str]] = {}
            for one in opened:
                for name, reason, detail in one.entries.get(shard, {"failures": []})["failures"]:
                    known.setdefault(name, (reason, detail))
            first = shard * opened[0].plan["shard_samples"]
            ids = self._samples.obs.index[first : first + opened[0].plan["shard_samples"]] if known else ()
            self._add((i, *known[i]) for i in ids if i in known)

    def batch(self, job: Job, failed: Mapping[int, tuple[str, str]]) -> None:
        """Add the failures of one batch, by position."""
        self._add((self._samples.obs.index[at], *failed[at]) for at in job.positions if at in failed)

    def collect(self) -> None:
        """Add what other ranks had listed when one of them stopped."""
        for path in sorted(self.path.parent.glob(f".{self.path.name}.rank-*.tmp.csv")):
            for item, _, reason, detail in read_failures(path).itertuples(index=False):
                with suppress(TooManyFailuresError):  # the call ends in any case, and by the other rank's reason
                    self._log.add(item, reason, detail)
            path.unlink(missing_ok=True)

    def _add(self, rows: Iterable[tuple[str, str, str]]) -> None:
        try:
            for row in rows:
                self._log.add(*row)
        except TooManyFailuresError as error:
            raise TooManyFailuresError(
                f"{error}. Finished shards are kept: call embed() again to go on, with retry_failures=True "
                "(--retry-failures) once files were repaired"
            ) from error

    def __len__(self) -> int:
        return len(self._log)
