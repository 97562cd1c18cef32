"""Archives unpacked beside themselves: nothing outside the target folder, no links, no more than there is room for."""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from biosae.data.manifests import human
from biosae.errors import FormatError

_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_SINGLE = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_BLOCK = 1 << 20
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


def is_archive(path: str | os.PathLike) -> bool:
    """Whether :func:`unpack` knows the suffix."""
    return os.fspath(path).lower().endswith((".zip", *_TAR, *_SINGLE))


def unpack(archive: str | os.PathLike, *, max_bytes: int | None = None) -> Path:
    """Unpack an archive into a folder of its name beside it (a single compressed file: into a file).

    Parameters
    ----------
    archive
        ``.zip``, ``.tar`` with or without compression, or one file as ``.gz``, ``.bz2`` or ``.xz``.
    max_bytes
        Largest size of the contents; default and upper bound: the free space of the disk.

    Returns
    -------
    Path
        The folder (or file). If it was there before, nothing is done.

    Raises
    ------
    FormatError
        If the archive is damaged, encrypted, holds links, or names places outside the folder.
    OSError
        If the contents are larger than allowed. Nothing is left behind in either case.
    """
    archive = Path(archive)
    name = archive.name
    suffix = next((s for s in sorted((".zip", *_TAR, *_SINGLE), key=len, reverse=True) if name.lower().endswith(s)), "")
    target = archive.with_name(name[: len(name) - len(suffix)])
    if not suffix or target == archive:
        raise FormatError(f"{archive} is no archive that can be unpacked (.zip, .tar, .tar.gz, .gz, .bz2, .xz)")
    if target.exists():
        return target
    free = shutil.disk_usage(archive.parent).free
    allowed = _Allowance(archive, free if max_bytes is None else min(free, max_bytes))
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=archive.parent))
    try:
        if suffix in _SINGLE:
            with _SINGLE[suffix](archive, "rb") as stream:
                made = scratch / target.name
                allowed.copy(stream, made)
        else:
            made = scratch / "content"
            made.mkdir()
            for path, stream in (_zip if suffix == ".zip" else _tar)(archive, allowed):
                place = made / path
                if stream is None:
                    place.mkdir(parents=True, exist_ok=True)
                else:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    allowed.copy(stream, place)
        os.replace(made, target)
    except _DAMAGED as error:
        raise FormatError(f"{archive} is damaged ({error}); fetch it again") from None
    except NotImplementedError as error:  # Deflate64, as Windows packs more than 2 GB
        raise FormatError(f"{archive} cannot be unpacked here ({error}); unpack it by hand, with 7-Zip say") from None
    except FileExistsError:
        raise FormatError(f"{archive} names one place twice; it was not unpacked") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise FormatError(f"{archive} is damaged ({error}); fetch it again") from None  # how bz2 says it
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


class _Allowance:
    """Counts what is written and stops at a bound, whatever sizes the archive states."""

    def __init__(self, archive: Path, bound: int) -> None:
        self.archive, self.bound, self.written = archive, bound, 0

    def check(self, more: int) -> None:
        if self.written + more > self.bound:
            raise OSError(
                errno.ENOSPC,
                f"its contents need more than the {human(self.bound)} that are free or allowed",
                os.fspath(self.archive),
            )

    def copy(self, stream: IO[bytes], target: Path) -> None:
        with open(target, "xb") as out:
            while block := stream.read(_BLOCK):
                self.check(len(block))
                self.written += len(block)
                out.write(block)


def _inside(archive: Path, name: str) -> str:
    """A member's path, if it stays inside the folder."""
    clean = name.removeprefix("./").rstrip("/")
    parts = clean.split("/")
    if clean in ("", "."):
        return "."
    if name.startswith("/") or "\\" in name or "\0" in name or ":" in parts[0] or {"", ".", ".."} & set(parts):
        raise FormatError(f"{archive} names {name!r}, which lies outside its folder; it was not unpacked")
    return clean


def _zip(archive: Path, allowed: _Allowance) -> Iterator[tuple[str, IO[bytes] | None]]:
    with zipfile.ZipFile(archive) as bundle:
        allowed.check(sum(member.file_size for member in bundle.infolist()))
        for member in bundle.infolist():
            path = _inside(archive, member.filename)
            if member.flag_bits & 0x1:
                raise FormatError(f"{archive} is encrypted; unpack it by hand with the password of its source")
            if stat.S_ISLNK(member.external_attr >> 16):
                raise FormatError(f"{archive} holds a link ({member.filename!r}); it was not unpacked")
            if member.is_dir():
                yield path, None
            else:
                with bundle.open(member) as stream:
                    yield path, stream


def _tar(archive: Path, allowed: _Allowance) -> Iterator[tuple[str, IO[bytes] | None]]:
    with tarfile.open(archive, "r:*") as bundle:
        for member in bundle:
            path = _inside(archive, member.name)
            if member.isdir():
                yield path, None
                continue
            if not member.isfile():
                raise FormatError(f"{archive} holds a link or device ({member.name!r}); it was not unpacked")
            allowed.check(member.size)
            stream = bundle.extractfile(member)
            if stream is not None:
                yield path, stream
