"""A downloader for pooch that goes on where a broken transfer stopped (HTTP Range on a ``.part`` file)."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

from biosae.errors import DownloadError, FormatError
from biosae.files import read_json, write_json

CONNECT_SECONDS, READ_SECONDS = 15.0, 60.0
"""How long to wait for a connection, and for the next bytes of it."""
ATTEMPTS = 4
"""Attempts without progress before an address is given up."""
WAIT_SECONDS = 0.5
"""Pause before the second attempt; doubled for each further one."""
_CHUNK = 1 << 16
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class _BrokenOff(Exception):
    """The transfer stopped before its end; it may be taken up again."""


class Resume:
    """Downloader that keeps what has arrived in ``<target>.part`` and asks the server for the rest only.

    Called by :func:`pooch.retrieve` as ``downloader(url, output_file, pooch)``; pooch then compares the hash and moves
    ``output_file`` over the target.

    Parameters
    ----------
    target
        File that is being fetched; the part file lies beside it.
    size
        Bytes that the file must have; None if not known.
    hashed
        Whether a hash will be compared afterwards. Without one, a part is only continued if the server still has the
        very same file (``If-Range`` with its ETag or date).
    session
        A :class:`requests.Session`, so that connections are used again.
    bar
        Object with ``update(n_bytes)``, such as a tqdm bar; negative numbers take back.
    stop
        Set by another thread to end the transfer soon; what has arrived is kept.

    Notes
    -----
    A server that ignores ``Range`` answers with the whole file, which is then taken from its beginning.
    """

    def __init__(
        self, target: Path, *, size: int | None, hashed: bool, session: Any, bar: Any, stop: threading.Event
    ) -> None:
        self.part = target.with_name(target.name + ".part")
        self.note = target.with_name(target.name + ".part.json")
        self.size, self.hashed = size, hashed
        self.session, self.bar, self.stop = session, bar, stop
        self.resumed = False
        """Whether the last file was put together from more than one answer."""

    def __call__(self, url: str, output_file: str | os.PathLike, pooch: Any, check_only: bool = False) -> None:
        """Fetch ``url`` into ``output_file``.

        Raises
        ------
        DownloadError
            If the server refuses, sends something else, or breaks off again and again.
        OSError
            If the disk has no room for the file.
        """
        import requests
        from urllib3.exceptions import HTTPError

        self.resumed = False
        furthest, failures = self._held(), 0
        while True:
            try:
                self._pull(url)
                break
            except (_BrokenOff, requests.RequestException, HTTPError) as error:
                held = self._held()
                failures = 0 if held > furthest else failures + 1
                furthest = max(furthest, held)
                if failures >= ATTEMPTS:
                    kept = f"; {held} bytes are kept, and the next fetch goes on from there" if held else ""
                    raise DownloadError(f"the transfer failed ({_short(error)}){kept}") from None
                if self.stop.wait(WAIT_SECONDS * 2 ** max(0, failures - 1)):
                    raise DownloadError("stopped") from None
        os.replace(self.part, output_file)
        self.note.unlink(missing_ok=True)

    def _held(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _pull(self, url: str) -> None:
        start, validator = self._beginning(url)
        headers = {"Accept-Encoding": "identity", "User-Agent": "biosae"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if validator:
                headers["If-Range"] = validator
        times = (CONNECT_SECONDS, READ_SECONDS)
        with self.session.get(url, headers=headers, stream=True, timeout=times) as answer:
            if answer.status_code == 416:  # nothing after what is held: complete, or no longer the same file
                if _total(answer) == start:
                    return
                self._discard()
                raise _BrokenOff("the server has another file now")
            self._refuse(answer)
            partial = answer.status_code == 206
            if partial and _first(answer) != start:
                self._discard()
                raise _BrokenOff("the server answered with another range")
            if not partial and start:
                self.bar.update(-start)
                start = 0
            total = _total(answer)
            if self.size is not None and total is not None and total != self.size:
                raise DownloadError(f"the server's file has {total} bytes, but {self.size} are expected")
            _room(self.part.parent, (total if total is not None else self.size or 0) - start)
            self.resumed = self.resumed or bool(start)
            write_json(self.note, {"url": url, "validator": _validator(answer)})
            with open(self.part, "ab" if start else "wb") as stream:
                for chunk in answer.raw.stream(_CHUNK, decode_content=False):
                    stream.write(chunk)
                    self.bar.update(len(chunk))
                    if self.stop.is_set():
                        raise DownloadError("stopped")
        self._complete(total)

    def _beginning(self, url: str) -> tuple[int, str | None]:
        """Bytes held that may be continued from this address, and what proves that its file is still the same."""
        held = self._held()
        if not held:
            return 0, None
        try:
            note = read_json(self.note)
        except FormatError:
            note = {}
        validator = note.get("validator") if note.get("url") == url else None
        too_many = self.size is not None and held > self.size
        if too_many or not (validator or self.hashed):
            self._discard()
            return 0, None
        return held, validator

    def _refuse(self, answer: Any) -> None:
        code = answer.status_code
        if code in _BUSY:
            raise _BrokenOff(f"the server answered {code} {answer.reason}")
        if code in (401, 403):
            raise DownloadError(f"the server refused ({code} {answer.reason}); it may want an account")
        if code not in (200, 206):
            raise DownloadError(f"the server answered {code} {answer.reason}")
        page = answer.headers.get("Content-Type", "").startswith("text/html")
        if page and not self.part.name.removesuffix(".part").endswith((".html", ".htm")):
            raise DownloadError("the server sent a web page instead of the file; open the address in a browser")

    def _complete(self, total: int | None) -> None:
        held = self._held()
        for expected in (total, self.size):
            if expected is not None and held < expected:
                raise _BrokenOff(f"{held} of {expected} bytes arrived")
            if expected is not None and held > expected:
                self._discard()
                raise DownloadError(f"{held} bytes arrived, but {expected} are expected")

    def _discard(self) -> None:
        self.bar.update(-self._held())
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def _total(answer: Any) -> int | None:
    """Bytes of the whole file, as the answer states them."""
    found = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", answer.headers.get("Content-Range", ""))
    if found:
        return int(found[1])
    length = answer.headers.get("Content-Length", "")
    return int(length) if answer.status_code == 200 and length.isdigit() else None


def _first(answer: Any) -> int | None:
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _validator(answer: Any) -> str | None:
    tag = answer.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified")


def _room(folder: Path, needed: int) -> None:
    if needed > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(folder))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
