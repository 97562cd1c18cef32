"""Hashes of files and folders, and published lists of them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from biosae.data.manifests import File, relative
from biosae.errors import FormatError
from biosae.files import hash_file


def digest(path: Path, file: File) -> str:
    """Hash of the file at ``path``, of the kind that is published: ``"sha256:..."`` or ``"md5:..."``."""
    kind = "sha256" if file.sha256 else "md5"
    with open(path, "rb") as stream:
        return f"{kind}:{hashlib.file_digest(stream, kind).hexdigest()}"


def listing(folder: str | os.PathLike) -> tuple[int, int, str]:
    """Number of files below a folder, their bytes, and the SHA-256 of their sorted listing.

    The listing has a line ``<sha256>  <path>`` for each file, as ``sha256sum`` writes it, with paths relative to the
    folder, forward slashes, sorted by path as text. Hidden files are not data and are left out.
    """
    folder = Path(folder)
    paths = (p for p in folder.rglob("*") if p.is_file())
    names = {p.relative_to(folder).as_posix(): p for p in paths}
    kept = {n: p for n, p in sorted(names.items()) if not any(part.startswith(".") for part in n.split("/"))}
    lines = "".join(f"{hash_file(path)}  {name}\n" for name, path in kept.items())
    return len(kept), sum(p.stat().st_size for p in kept.values()), hashlib.sha256(lines.encode()).hexdigest()


def read_hash_list(path: str | os.PathLike) -> list[File]:
    """Files of a list as ``sha256sum`` or ``md5sum`` write it: a hash, two blanks (or a blank and ``*``), a path.

    Raises
    ------
    FormatError
        If a line is something else, or if a path leads out of the folder.
    """
    found: list[File] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        digest, _, place = line.partition(" ")
        place = place.lstrip(" *").removeprefix("./")
        kind = {64: "sha256", 32: "md5"}.get(len(digest))
        try:
            if kind is None:
                raise ValueError("no SHA-256 or MD5 at its beginning")
            found.append(File(path=relative(place), **{kind: digest.lower()}))
        except ValueError:
            raise FormatError(f"{path}, line {number}, is not '<hash>  <path>': {line[:120]!r}") from None
    if not found:
        raise FormatError(f"{path} names no files; delete it and fetch again")
    return found
