"""Opening HDF5 files first in another process, because damaged ones can crash or hang the HDF5 library itself.

The process gets one path a line and does what the reader will do: it describes the file, walks over the index of every
chunk, and reads the values of small files. A file on which it dies or does not come back is not opened here.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

SECONDS = 20.0  # for one file, and one second more for each 10 MB
_SMALL = 2**24
_ROWS = 4096


def crashing(paths: Sequence[Path]) -> dict[int, str]:
    """Position of each path that the HDF5 library does not survive, and what happened."""
    found: dict[int, str] = {}
    at = 0
    while at < len(paths):
        at, why = _round(paths, at)
        if why:
            found[at] = why
            at += 1
    return found


def _round(paths: Sequence[Path], first: int) -> tuple[int, str]:
    """One process from a path on: the position of the path that ended it (or the end), and how."""
    home = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))}
    with subprocess.Popen(
        [sys.executable, "-m", "biosae.embeddings.guard"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=environment,
    ) as process:  # fmt: skip
        said: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_listen, args=(process.stdout, said), daemon=True).start()
        try:
            if said.get() != "ready":
                return first, "the process that should open it did not start"
            for at in range(first, len(paths)):
                path = Path(paths[at]).absolute()
                try:
                    print(path, file=process.stdin, flush=True)
                    size = path.stat().st_size if path.is_file() else 0
                    if said.get(timeout=SECONDS + size / 1e7) != "done":
                        return at, "the HDF5 library crashed on it"
                except queue.Empty:
                    return at, f"the HDF5 library did not come back within {SECONDS:g} s"
                except OSError:
                    return at, "the HDF5 library crashed on it"
            return len(paths), ""
        finally:
            process.kill()


def _listen(stream: IO[str], said: queue.Queue[str]) -> None:
    """Lines of the process; an empty one once it has ended."""
    for line in stream:
        said.put(line.strip())
    said.put("")


def _try(path: Path) -> None:
    """Do with a file what the reader will do; what it raises here it will raise there."""
    from biosae.embeddings import foreign, hierarchy

    described = foreign.look(path)
    with hierarchy.open_hierarchy(path) as root:
        data = root[described.where]
        if data.chunks is not None:
            data.id.chunk_iter(lambda chunk: None)
        if data.size * data.dtype.itemsize > _SMALL:
            return
    for _ in foreign.blocks(path, described, _ROWS):
        pass


def _main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        with suppress(Exception):  # the caller meets it again, in its own process
            _try(Path(line.rstrip("\n")))
        print("done", flush=True)


if __name__ == "__main__":
    _main()
