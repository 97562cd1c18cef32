"""Files kept open between items: a few in each thread, opened on first use, never pickled."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any


class Handles:
    """Least-recently-used open files of each thread and process.

    Parameters
    ----------
    open
        Opens a path; what it returns has ``close()``. Importable by name, so that workers can unpickle it.
    size
        Files kept open in one thread.

    Notes
    -----
    Each thread has handles of its own, because few readers' handles are safe in threads. A forked or unpickled copy
    starts with none. A file that was written anew since it was opened (another size, time or file number) is opened
    again: old positions in a new file give wrong numbers without an error.
    """

    def __init__(self, open: Callable[[str], Any], *, size: int = 4) -> None:
        self._open, self._size = open, size
        self._local = threading.local()

    def __reduce__(self) -> tuple:
        return _again, (self._open, self._size)

    def get(self, path: str) -> Any:
        """The open file at a path; valid until the same thread asks for ``size`` others. A file that was written anew
        since is opened again."""
        if getattr(self._local, "process", None) != os.getpid():
            self._local.process, self._local.opened = os.getpid(), OrderedDict()
        opened = self._local.opened
        state = _state(path)
        if path in opened and opened[path][0] == state:
            opened.move_to_end(path)
            return opened[path][1]
        if path in opened:
            opened.pop(path)[1].close()
        handle = self._open(path)
        while len(opened) >= self._size:
            opened.popitem(last=False)[1][1].close()
        opened[path] = state, handle
        return handle


def _state(path: str) -> tuple[int, int, int] | None:
    """What changes when a file is written anew; None if there is no such file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _again(open: Callable[[str], Any], size: int) -> Handles:
    return Handles(open, size=size)
