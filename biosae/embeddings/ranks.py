"""Several processes on one embeddings folder: who owns it, who does what, who is still alive.

Everything goes through small files in the shared folder; no process talks to another. Each of them is touched at
regular intervals by its process, and is removed at the end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from biosae.embeddings.signs import Sign, alive, look, this_host, touched
from biosae.errors import FolderInUseError, InputError, RanksError
from biosae.settings import resolve_device

_POLL = 0.2  # s between two looks at the folder


def from_environment() -> tuple[int, int]:
    """Rank and number of ranks as ``torchrun`` sets them; ``(0, 1)`` without.

    Raises
    ------
    InputError
        If ``RANK`` and ``WORLD_SIZE`` are not whole numbers that go together.
    """
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise InputError(f"RANK={rank!r} and WORLD_SIZE={size!r} must be whole numbers, the first below the second")
    return int(rank), int(size)


def device_here(device: str = "auto") -> str:
    """A torch device that can be used; of several CUDA devices, that of ``LOCAL_RANK`` unless a number is given.

    Raises
    ------
    InputError
        If there is no such device on this machine.
    """
    found, local = resolve_device(device), os.environ.get("LOCAL_RANK", "")
    if found != "cuda" or not local.isdecimal():
        return found
    import torch

    return f"cuda:{int(local) % torch.cuda.device_count()}"


class Team:
    """This process's place among those that share one call of ``embed``.

    The first rank holds a lock on each folder and says in it which shards are to be done; the others wait for that,
    leave a sign of their own, do their share and wait until the first has closed the folder.

    Parameters
    ----------
    rank, size
        Number of this process and of all; ``(0, 1)`` is a process on its own.
    folders
        Folders to be written; the ranks meet in the first.
    shared
        Further files that no other call may write at the same time.
    key
        Hash of what is computed; ranks of another job are no ranks of this one.
    wait
        Seconds without a sign of life after which another process counts as dead.
    """

    def __init__(
        self, rank: int, size: int, *, folders: Sequence[Path], shared: Sequence[Path], key: str, wait: float
    ) -> None:
        self.rank, self.size, self.first = rank, size, rank == 0
        self._folders, self._shared, self._key, self._wait = list(folders), list(shared), key, wait
        self._signs: list[Sign] = []
        self._main: dict[str, Any] | None = None
        self._seen: dict[Path, tuple[int, float]] = {}

    # -- entering and leaving ------------------------------------------------------------------------------------

    def __enter__(self) -> Team:
        try:
            if self.first:
                for path in [
                    *(f / ".lock" for f in self._folders),
                    *(p.with_name(f".{p.name}.lock") for p in self._shared),
                ]:
                    self._signs.append(Sign(path, self._wait, key=self._key, size=self.size, state="begun"))
                self._refuse_leftovers()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None and not self.first and self._signs and self._signs[0].held():
            with suppress(OSError):  # the first rank reads this and ends too
                self._signs[0].update(state="failed", message=f"{kind.__name__}: {error}"[:500])
            self._signs[0]._stop.set()
            return
        self._release()

    def _release(self) -> None:
        for sign in reversed(self._signs):
            sign.release()
        self._signs = []

    def private(self, path: Path) -> Path:
        """A file of this rank beside a shared one; the next call deletes it if it is left behind."""
        return path.with_name(f".{path.name}.rank-{self.rank:05d}.tmp.csv")

    def _lock(self) -> Path:
        return self._folders[0] / ".lock"

    def _sign_of(self, rank: int) -> Path:
        return self._folders[0] / f".rank-{rank:05d}"

    def _refuse_leftovers(self) -> None:
        for path in self._folders[0].glob(".rank-*"):
            facts = look(path)
            if facts and facts.get("state") != "failed" and alive(path, facts):
                raise FolderInUseError(
                    f"process {facts.get('pid')} of an earlier call still writes {path.parent}; wait until it has ended"
                )
            path.unlink(missing_ok=True)

    # -- the work ------------------------------------------------------------------------------------------------

    def share(self, todo: Sequence[int]) -> list[int]:
        """The first rank says what is to be done; each gets its part, a range of it."""
        if self.size == 1:
            return list(todo)
        self._signs[0].update(state="open", todo=list(todo))
        return self._part(todo, 0)

    def join(self) -> list[int]:
        """Another rank's part, once the first has said what is to be done."""

        earlier: list[Any] = []

        def ready() -> bool:
            found = look(self._lock())
            state = found and (found.get("token"), found.get("state"), touched(self._lock()))
            earlier.append(state)
            if not found or found.get("key") != self._key or found.get("state") != "open":
                return False
            if found.get("size") != self.size:
                raise RanksError(f"rank 0 counts {found.get('size')} ranks, this one {self.size}; start them together")
            self._main = found
            # a lock of another machine may be that of a dead call: something must have happened to it meanwhile
            return alive(self._lock(), found) if found.get("host") == this_host() else state != earlier[0]

        if not self._until(ready):
            raise RanksError(
                f"rank 0 did not begin this job within {self._wait:g} s; start all ranks with the same arguments on "
                "one shared folder, or pass ranks=(0, 1) if this process works on its own"
            )
        self._signs.append(Sign(self._sign_of(self.rank), self._wait, main=self._main["token"], state="working"))
        return self._part(self._main["todo"], self.rank)

    def _part(self, todo: Sequence[int], rank: int) -> list[int]:
        return list(todo[rank * len(todo) // self.size : (rank + 1) * len(todo) // self.size])

    def check(self) -> None:
        """Stop if the folder is no longer ours, or if another rank failed; called before each shard is written."""
        if self.first:
            if not all(sign.held() for sign in self._signs):
                raise FolderInUseError(f"another process took over {self._folders[0]}; this one stops")
            for rank in range(1, self.size):
                found = self._of_this_call(rank)
                if found and found.get("state") == "failed":
                    raise RanksError(f"rank {rank} failed: {found.get('message')}. {_AGAIN}")
        elif not self._main_lives():
            raise RanksError(f"rank 0 ended before the folder was complete; see its message. {_AGAIN}")

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for another rank's shard; stops if the ranks do."""
        while not condition():
            self.check()
            self._pause()

    def gather(self, lacking: Callable[[], list[int]]) -> None:
        """The first rank waits until every other is done.

        Raises
        ------
        RanksError
            If one failed, never came, or died; names the shards that are missing.
        """
        done: set[int] = set()
        since = dict.fromkeys(range(1, self.size), time.monotonic())
        while len(done) < self.size - 1:
            self.check()
            for rank in set(since) - done:
                found = self._of_this_call(rank)
                if found and found.get("state") == "finished":
                    done.add(rank)
                elif found is None:
                    if time.monotonic() - since[rank] > self._wait:
                        self._missing(f"rank {rank} never came", lacking())
                elif found and not self._lives(self._sign_of(rank), found):
                    self._missing(f"rank {rank} (process {found.get('pid')}) died", lacking())
            self._pause()
        if missing := lacking():
            self._missing("all ranks ended", missing)

    def close(self) -> None:
        """The folder is complete: the first rank says so and waits until the others know; they wait for that."""
        if self.size == 1:
            return
        if self.first:
            self._signs[0].update(state="done")
            self._until(lambda: not any(self._alive_rank(rank) for rank in range(1, self.size)))
            for path in self._folders[0].glob(".rank-*"):
                path.unlink(missing_ok=True)
            return
        self._signs[0].update(state="finished")
        while (look(self._lock()) or {}).get("state") != "done":
            self.check()
            self._pause()

    # -- looking at the others -----------------------------------------------------------------------------------

    def _main_lives(self) -> bool:
        found = look(self._lock())
        return bool(found) and found.get("token") == self._main["token"] and self._lives(self._lock(), found)

    def _of_this_call(self, rank: int) -> dict[str, Any] | None:
        found = look(self._sign_of(rank))
        return found if not found or found.get("main") == self._signs[0].token else None

    def _alive_rank(self, rank: int) -> bool:
        found = self._of_this_call(rank)
        return found is not None and self._lives(self._sign_of(rank), found)

    def _lives(self, path: Path, facts: dict[str, Any]) -> bool:
        """As :func:`alive`, for a process that is looked at again and again: without a probe."""
        if facts.get("host") == this_host():
            return alive(path, facts)
        moment, now = touched(path), time.monotonic()
        last, since = self._seen.get(path, (None, now))
        if moment != last:
            self._seen[path] = (moment, now)
        return moment != last or now - since < self._wait

    def _pause(self) -> None:
        time.sleep(min(_POLL * self.size / 2, 2.0))

    def _until(self, condition: Callable[[], bool]) -> bool:
        end = time.monotonic() + self._wait
        while not condition():
            if time.monotonic() > end:
                return False
            self._pause()
        return True

    def _missing(self, why: str, shards: Sequence[int]) -> None:
        shown = ", ".join(str(s) for s in shards[:10]) + (" ..." if len(shards) > 10 else "")
        raise RanksError(f"{why}; {len(shards)} shards are missing ({shown}). {_AGAIN}")


_AGAIN = "Finished shards are kept: call again with the same arguments, with any number of ranks"
