"""Writing to disk so that a reader never sees half a file, and hashes of what was written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from biosae.errors import FormatError


@contextmanager
def atomic_path(target: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success fsync it and rename it over ``target``.

    On an exception the temporary file is removed and ``target`` is left as it was. The temporary name keeps the
    suffix of the target, for writers that look at it.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp" + target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        os.chmod(temporary, 0o666 & ~_umask())
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Flush a folder's directory entry (a no-op where the platform cannot)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spare blanks: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, (os.PathLike,)):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def hash_json(value: Any) -> str:
    """SHA-256 of :func:`canonical_json`, as hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def hash_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def stamp(path: str | os.PathLike, *, ends: bool) -> list[Any]:
    """Size of a file in bytes (None if it is absent, -1 for a folder), and with ``ends`` the SHA-256 of its first and
    last 64 KiB."""
    path, reach = Path(path), 65536
    try:
        if path.is_dir():
            return [-1]
        size = path.stat().st_size
        if not ends:
            return [size]
        with open(path, "rb") as stream:
            digest = hashlib.sha256(stream.read(reach))
            stream.seek(max(reach, size - reach))
            digest.update(stream.read(reach))
    except OSError:
        return [None]
    return [size, digest.hexdigest()]


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write indented, key-sorted JSON atomically."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, default=_plain)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """Read JSON, or raise :class:`FormatError` that names the file.

    Raises
    ------
    FormatError
        If the file is absent or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FormatError(f"{os.fspath(path)} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{os.fspath(path)} is not valid JSON ({error}); it may be truncated or not ours") from None


def read_h5ad(path: str | os.PathLike) -> Any:
    """Read latents (AnnData) that :func:`biosae.encode` made, or raise :class:`FormatError` that names the file.

    Raises
    ------
    FormatError
        If the file is absent or damaged, or is no ``.h5ad`` file.
    """
    import anndata

    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path} does not exist; run 'encode' first, or name the .h5ad file that it wrote")
    try:
        return anndata.read_h5ad(path)
    except Exception as error:  # h5py and anndata have many
        raise FormatError(f"{path} is not a readable .h5ad file ({error}); encode again") from None


def write_h5ad(path: str | os.PathLike, adata: Any) -> None:
    """Write latents (AnnData) atomically.

    Raises
    ------
    OSError
        If the disk has no room for them. This is looked up before writing, because HDF5 can crash on a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if adata.__sizeof__() > shutil.disk_usage(path.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
    with atomic_path(path) as temporary:
        adata.write_h5ad(temporary)


def write_table(path: str | os.PathLike, table: Any) -> None:
    """Write a DataFrame atomically as CSV or Parquet, by suffix."""
    with atomic_path(path) as temporary:
        if str(path).endswith(".parquet"):
            table.to_parquet(temporary)
        else:
            table.to_csv(temporary, index=False)


def read_table(path: str | os.PathLike) -> Any:
    """DataFrame of a CSV that :func:`write_table` wrote; only an empty cell is missing, so the class ``None`` stays."""
    import pandas as pd

    return pd.read_csv(path, keep_default_na=False, na_values=[""])
