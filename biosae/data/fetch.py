"""Data sets fetched from where they are published, and checked against the published sizes and hashes."""

from __future__ import annotations

import errno
import fnmatch
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from tqdm.auto import tqdm

from biosae.data.download import Resume
from biosae.data.hashes import digest, listing, read_hash_list
from biosae.data.manifests import File, Folder, Manifest, human, info
from biosae.data.unpack import is_archive
from biosae.data.unpack import unpack as unpack_archive
from biosae.errors import AccessError, DownloadError, InputError, OfflineError, nearest, require
from biosae.settings import settings

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 5


def fetch(
    name: str | os.PathLike | Manifest,
    *,
    out: str | os.PathLike | None = None,
    files: str | Sequence[str] | None = None,
    mirror: str | None = None,
    n_jobs: int | None = None,
    progress: bool | None = None,
    unpack: bool = False,
) -> Path:
    """Download a data set, or what is missing of it.

    Files that are there and have the published hash (or size, where no hash is published) are left alone; a transfer
    that broke off is continued; every file is compared with its hash before it gets its name.

    Parameters
    ----------
    name
        Name of a data set, path of a manifest (``.toml``), or a :class:`~biosae.data.manifests.Manifest`.
    out
        Folder; default ``settings.data_dir/<name>``.
    files
        Only files that match one of these patterns, e.g. ``"*.csv"`` or ``["records100/*", "*.csv"]``.
    mirror
        Only addresses that contain this text, e.g. ``"zenodo"``; default: all of them, in order.
    n_jobs
        Transfers at the same time; default ``settings.n_jobs``.
    progress
        Show a bar; default ``settings.progress``.
    unpack
        Also unpack archives, each into a folder of its name; the archive is kept, so that it can be verified.

    Returns
    -------
    Path
        The folder. A data set that cannot be downloaded is returned as it lies there, unchecked: see :func:`verify`.

    Raises
    ------
    AccessError
        If the source gives the data only on request; the message lists the steps.
    OfflineError
        If something is missing and ``settings.offline`` forbids the network.
    DownloadError
        If a file could not be had from any address, or has another hash or size than published.
    InputError
        If there is no such data set, pattern or mirror.
    FormatError
        If a published list of hashes cannot be read, or an archive is damaged or unsafe.
    OSError
        If the disk has too little room.
    """
    manifest = name if isinstance(name, Manifest) else info(name)
    folder = Path(out) if out is not None else manifest.folder
    if not manifest.downloadable:
        if folder.is_dir() and any(folder.iterdir()):
            return folder
        raise AccessError(_how(manifest, folder))
    folder.mkdir(parents=True, exist_ok=True)
    show = settings.progress if progress is None else progress
    with _alone(folder):
        wanted = _chosen(manifest, _listed(manifest, folder, mirror), files)
        look = partial(_whole, folder=folder)
        whole = _each(look, wanted, f"look at {manifest.name}", n_jobs=n_jobs, show=show)
        missing = [file for file, there in zip(wanted, whole) if not there]
        if missing:
            _offline(manifest, missing)
            _room(folder, missing)
            _download(manifest, folder, missing, mirror=mirror, n_jobs=n_jobs, show=show)
    if unpack:
        for file in wanted:
            if is_archive(file.path):
                unpack_archive(folder / file.path)
    return folder


def verify(name: str | os.PathLike | Manifest, folder: str | os.PathLike | None = None) -> pd.DataFrame:
    """Compare a folder with what is published of the data set; nothing is downloaded.

    Parameters
    ----------
    name
        Name of a data set, path of a manifest (``.toml``), or a :class:`~biosae.data.manifests.Manifest`.
    folder
        Where the data lie; default ``settings.data_dir/<name>``.

    Returns
    -------
    pandas.DataFrame
        One row a file, or a folder that is checked as a whole (its name ends in ``/``), with ``file``; ``status``:
        ``ok``, ``missing``, ``wrong size``, ``wrong hash``, or ``unknown`` where nothing is published to compare with;
        ``checked``: ``sha256``, ``md5``, ``size`` or nothing; ``detail``. Of a folder with files missing, those that
        the data set's table names are listed too.

    Raises
    ------
    InputError
        If there is no such data set or folder, or if nothing is known of its files.
    FormatError
        If a published list of hashes in the folder cannot be read.
    """
    import pandas as pd

    manifest = name if isinstance(name, Manifest) else info(name)
    folder = Path(folder) if folder is not None else manifest.folder
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; say where {manifest.name} lies (folder=..., --folder)")
    expected: list[File | Folder] = [*manifest.files, *manifest.folders]
    rows: list[tuple[str, str, str, str]] = []
    if manifest.hash_list is not None:
        listed = folder / manifest.hash_list
        if listed.is_file():
            expected += read_hash_list(listed)
        else:
            rows.append((manifest.hash_list, "missing", "", f"get it from {manifest.base_urls[0]}{manifest.hash_list}"))
    if not expected and not rows:
        raise InputError(f"no source that was read publishes the files of {manifest.name}; there is nothing to compare")
    look = partial(_compare, manifest=manifest, folder=folder)
    for found in _each(look, expected, f"verify {manifest.name}", n_jobs=None, show=settings.progress):
        rows += found
    return pd.DataFrame(rows, columns=["file", "status", "checked", "detail"])


def _listed(manifest: Manifest, folder: Path, mirror: str | None) -> list[File]:
    """Every file of the data set with its addresses; fetches the published list of hashes if it is not there yet."""
    files = list(manifest.files)
    if manifest.hash_list is not None:
        path = folder / manifest.hash_list
        if not path.is_file():
            bases = tuple(base + quote(manifest.hash_list) for base in manifest.base_urls)
            itself = File(path=manifest.hash_list, urls=bases)
            _offline(manifest, [itself])
            _download(manifest, folder, [itself], mirror=mirror, n_jobs=1, show=False)
        for file in read_hash_list(path):
            bases = tuple(base + quote(file.path) for base in manifest.base_urls)
            files.append(file.model_copy(update={"urls": bases}))
    return files


def _chosen(manifest: Manifest, listed: list[File], patterns: str | Sequence[str] | None) -> list[File]:
    if patterns is None:
        # a file without an address is only checked, never fetched
        return [file for file in listed if file.urls]
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(file.path, pattern) for file in listed):
            raise InputError(f"{manifest.name} has no file {pattern!r}; {nearest(pattern, [f.path for f in listed])}")
    return [file for file in listed if any(fnmatch.fnmatchcase(file.path, p) for p in patterns)]


def _each(look: Callable[[Any], Any], parts: Sequence[Any], what: str, *, n_jobs: int | None, show: bool) -> list[Any]:
    """``look`` at every part, in threads (hashing lets other threads run)."""
    with ThreadPoolExecutor(max_workers=max(1, settings.n_jobs if n_jobs is None else n_jobs)) as workers:
        return list(tqdm(workers.map(look, parts), total=len(parts), desc=what, unit="file", disable=not show))


def _whole(file: File, folder: Path) -> bool:
    """Whether the file is there as far as its source lets one tell."""
    path = folder / file.path
    if not path.is_file() or (file.bytes is not None and path.stat().st_size != file.bytes):
        return False
    return file.hash is None or digest(path, file) == file.hash


def _download(
    manifest: Manifest, folder: Path, files: list[File], *, mirror: str | None, n_jobs: int | None, show: bool
) -> None:
    pooch = require("pooch", extra="data")
    jobs = [(file, _addresses(manifest, file, mirror)) for file in files]
    total = sum(file.bytes for file in files) if all(file.bytes is not None for file in files) else None
    failed: list[str] = []
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("ERROR")
    bar = tqdm(total=total, desc=manifest.name, unit="B", unit_scale=True, disable=not show)
    stop, session = threading.Event(), require("requests", extra="data").Session()
    workers = ThreadPoolExecutor(max_workers=max(1, settings.n_jobs if n_jobs is None else n_jobs))
    try:
        running = [workers.submit(_get, file, urls, folder, session=session, bar=bar, stop=stop) for file, urls in jobs]
        for done in as_completed(running):
            try:
                done.result()
            except DownloadError as error:
                failed.append(str(error))
    finally:
        stop.set()  # after Ctrl-C or a full disk: the transfers under way end soon and can be continued
        workers.shutdown(wait=True, cancel_futures=True)
        session.close()
        bar.close()
        logger.setLevel(level)
    if failed:
        more = f"\n(and {len(failed) - _SHOWN} more)" if len(failed) > _SHOWN else ""
        raise DownloadError(
            f"{len(failed)} of {len(files)} files of {manifest.name} could not be fetched:\n"
            + "\n".join(sorted(failed)[:_SHOWN])
            + more
            + "\nFetch again to go on: what is whole is kept. If it fails again, see "
            + f"{manifest.homepage or 'the homepage of the data set'}"
        )


def _get(file: File, urls: Iterable[str], folder: Path, **options: Any) -> None:
    """One file from the first address that has it; an older one stays until the new one is whole."""
    target = folder / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.old")
    if file.hash is None and target.exists():
        target.replace(aside)  # its size is wrong; pooch would keep what it cannot compare
    try:
        _retrieve(file, urls, target, **options)
    finally:
        if target.exists():
            aside.unlink(missing_ok=True)
        elif aside.exists():
            aside.replace(target)


def _retrieve(file: File, urls: Iterable[str], target: Path, **options: Any) -> None:
    import pooch

    why: list[str] = []
    for url in urls:
        resume = Resume(target, size=file.bytes, hashed=file.hash is not None, **options)
        for again in (False, True):
            try:
                pooch.retrieve(url, known_hash=file.hash, fname=target.name, path=target.parent, downloader=resume)
                return
            except DownloadError as error:
                why.append(f"  {url}: {error}")
                break
            except ValueError:  # pooch: another hash
                if resume.resumed and not again:
                    continue  # two different files may have been joined: once more from the beginning
                kind = file.hash.partition(":")[0] if file.hash else "hash"
                why.append(f"  {url}: the file that came has another {kind} than the one published")
                break
    raise DownloadError("\n".join([f"{file.path}:", *why]))


def _addresses(manifest: Manifest, file: File, mirror: str | None) -> list[str]:
    if not file.urls:
        raise AccessError(_how(manifest, manifest.folder, only=file.path))
    kept = [url for url in file.urls if mirror is None or mirror in url]
    if not kept:
        hosts = sorted({urlsplit(url).netloc for url in file.urls})
        raise InputError(f"no address of {file.path} contains mirror={mirror!r}; {nearest(mirror or '', hosts)}")
    return kept


def _offline(manifest: Manifest, missing: list[File]) -> None:
    if settings.offline:
        raise OfflineError(
            f"{len(missing)} files of {manifest.name} are not there (first: {missing[0].path}), and settings.offline "
            "forbids downloads; set biosae.settings.offline = False, or copy the files"
        )


def _room(folder: Path, missing: list[File]) -> None:
    held = (folder / f"{file.path}.part" for file in missing)
    have = sum(part.stat().st_size for part in held if part.is_file())
    needed = sum(file.bytes or 0 for file in missing) - have
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{human(needed)} are needed, {human(free)} are free", os.fspath(folder))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One fetch a folder at a time, where the system can tell."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / ".fetch.lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(f"another process is fetching into {folder}; wait for it") from None
        except OSError:
            pass  # no locks on this file system
        yield


def _how(manifest: Manifest, folder: Path, *, only: str | None = None) -> str:
    why = {
        "open": "cannot be downloaded by a program",
        "registration": "needs an account at its source",
        "agreement": "needs a data-use agreement with its source",
        "credentialed": "is given only to credentialed users",
    }[manifest.access]
    steps = [step.replace("<folder>", str(folder)) for step in manifest.steps]
    if not steps and manifest.homepage:
        steps.append(f"See {manifest.homepage}")
    steps.append(f"The files belong in {folder}; if they lie elsewhere, name the place (folder=, --folder)")
    if manifest.files or manifest.folders or manifest.hash_list:
        steps.append(f"Check them: biosae data verify {manifest.name} --folder {folder}")
    lines = [f"{only or manifest.name} {why} (licence: {manifest.licence or 'see its source'}). To obtain it:"]
    return "\n".join([*lines, *(f"  {i}. {step}" for i, step in enumerate(steps, 1))])


def _compare(part: File | Folder, manifest: Manifest, folder: Path) -> list[tuple[str, str, str, str]]:
    return _compare_folder(manifest, part, folder) if isinstance(part, Folder) else [_compare_file(part, folder)]


def _compare_file(file: File, folder: Path) -> tuple[str, str, str, str]:
    path = folder / file.path
    if not path.is_file():
        return file.path, "missing", "", ""
    size = path.stat().st_size
    if file.bytes is not None and size != file.bytes:
        return file.path, "wrong size", "size", f"{size} bytes, published: {file.bytes}"
    if file.hash is None:
        return (file.path, "unknown", "", "") if file.bytes is None else (file.path, "ok", "size", "")
    kind = file.hash.partition(":")[0]
    found = digest(path, file)
    return (file.path, "ok", kind, "") if found == file.hash else (file.path, "wrong hash", kind, found)


def _compare_folder(manifest: Manifest, part: Folder, folder: Path) -> list[tuple[str, str, str, str]]:
    name = f"{part.path}/"
    if not (folder / part.path).is_dir():
        return [(name, "missing", "", "")]
    files, size, digest = listing(folder / part.path)
    if digest == part.sha256:
        return [(name, "ok", "sha256", f"{files} files")]
    if files != part.files:
        status, detail = ("missing" if files < part.files else "wrong size"), f"{files} files of {part.files}"
    elif size != part.bytes:
        status, detail = "wrong size", f"{size} bytes, published: {part.bytes}"
    else:
        status, detail = "wrong hash", digest
    rows = [(name, status, "sha256", detail)]
    rows += [(path, "missing", "", "") for path in _named(manifest, folder) if path.startswith(name)]
    return rows


def _named(manifest: Manifest, folder: Path) -> list[str]:
    """Files that the data set's table names and that are absent."""
    import pandas as pd

    if manifest.table is None or not (folder / manifest.table).is_file():
        return []
    table = pd.read_csv(folder / manifest.table, dtype=str)
    columns = [c for c in table.columns if c == "path" or c.endswith("_path")]
    paths = {str(p) for c in columns for p in table[c].dropna()}
    return sorted(p for p in paths if not (folder / p).is_file())
