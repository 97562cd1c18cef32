"""Files that say that a process is at work in a shared folder, and whether it still is.

Each is touched at regular intervals by its process and removed at its end; those of dead processes are recognised.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from biosae.errors import FolderInUseError
from biosae.files import write_json

WAIT = 600.0  # s without a sign of life after which a process on another machine counts as dead


def this_host() -> str:
    """Name of this machine, with its space of process numbers where it has several (containers)."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _began(pid: int) -> str | None:
    """When a process of this machine began, in ticks; ``""`` where that cannot be told, None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except OSError:
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


class Sign:
    """A file that says that this process is at work, touched until it is released."""

    def __init__(self, path: Path, wait: float, **facts: Any) -> None:
        self.path, self.token = path, uuid.uuid4().hex
        self._facts = {"host": this_host(), "pid": os.getpid(), "began": _began(os.getpid()), "wait": wait, **facts}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._create()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._touch, args=(wait / 20,), daemon=True, name="embed-sign")
        self._thread.start()

    def _create(self) -> None:
        for _ in range(3):
            if self._place():
                return
            holder = look(self.path)
            if holder is not None and alive(self.path, holder):
                raise FolderInUseError(
                    f"{self.path.parent} is being written by process {holder.get('pid')} on "
                    f"{str(holder.get('host')).partition(' ')[0]}. Wait for it or choose another out=; if that process "
                    f"is surely gone, delete {self.path}"
                )
            _set_aside(self.path, holder)
        raise FolderInUseError(f"{self.path} is taken by others at this moment; try again")

    def _place(self) -> bool:
        """Put the file in its place, whole, unless there is one."""
        text = self._text()
        draft = _aside(self.path)
        try:
            draft.write_text(text, encoding="utf-8")
            os.link(draft, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with open(self.path, "x", encoding="utf-8") as stream:
                    stream.write(text)
            except FileExistsError:
                return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _text(self) -> str:
        return json.dumps({**self._facts, "token": self.token}) + "\n"

    def _touch(self, interval: float) -> None:
        while not self._stop.wait(min(interval, 10.0)):
            with suppress(OSError):
                os.utime(self.path)

    def update(self, **facts: Any) -> None:
        """Change what the file says."""
        self._facts.update(facts)
        write_json(self.path, {**self._facts, "token": self.token})

    def held(self) -> bool:
        """Whether the file is still this process's own."""
        found = look(self.path)
        return found is not None and found.get("token") == self.token

    def release(self) -> None:
        """Stop touching the file, and delete it if it is still our own."""
        self._stop.set()
        self._thread.join()
        if self.held():
            self.path.unlink(missing_ok=True)


def look(path: Path) -> dict[str, Any] | None:
    """What a sign says; ``{}`` while it is being written, None if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8") or "{}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def alive(path: Path, facts: dict[str, Any]) -> bool:
    """Whether the process of a sign still is: looked up on this machine, else by when the file was last touched.

    The times that are compared both come from the file system, so machines' clocks need not agree.
    """
    if facts.get("host") == this_host() and isinstance(facts.get("pid"), int):
        return _began(facts["pid"]) == facts.get("began")
    probe = _aside(path)
    try:
        probe.touch()
        now = probe.stat().st_mtime
    except FileNotFoundError:  # tidied up by a process that is at work there
        return True
    finally:
        probe.unlink(missing_ok=True)
    try:
        return now - path.stat().st_mtime < float(facts.get("wait", WAIT))
    except FileNotFoundError:
        return False


def touched(path: Path) -> int | None:
    """When a file was last touched, by the file system's clock, in ns; None if there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _set_aside(path: Path, judged: dict[str, Any] | None) -> None:
    """Remove the sign of a dead process, but not one that took its place meanwhile."""
    aside = _aside(path)
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    now = look(aside)
    if judged is not None and now is not None and now.get("token") != judged.get("token"):
        with suppress(OSError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)
