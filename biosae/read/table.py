"""Tables and folders of image files -> ``obs`` and the root of its paths."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.failures import FailureLog
from biosae.data.roles import ID_ROLES
from biosae.data.samples import Samples
from biosae.errors import InputError, TooManyFailuresError, nearest
from biosae.read.decode import SUFFIXES

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
MISSING = ("", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "<NA>")  # not None, which is a class in many tables


def image_samples(
    source: str | os.PathLike | pd.DataFrame,
    reader: Any,
    *,
    roles: Mapping[str, str | None],
    id: str | None,
    mpp: float | str | None,
    root: str | os.PathLike | None,
    max_failures: float,
    failures: str | os.PathLike | None,
    stage: str,
    meta: Mapping[str, Any] | None = None,
) -> Samples:
    """Samples of image files; what :func:`biosae.read.tiles` and :func:`biosae.read.images` share."""
    if isinstance(mpp, str):
        roles, mpp = {**roles, "mpp": mpp}, None
    obs, roles, root = record_table(source, roles=roles, id=id, root=root, suffixes=SUFFIXES)
    samples = Samples(obs, reader, roles=roles, mpp=mpp, root=root, meta=meta)
    absent = _absent(samples, max_failures, failures, stage)
    if absent:
        samples.meta["failures"] = absent
    return samples


def record_table(
    source: str | os.PathLike | pd.DataFrame,
    *,
    roles: Mapping[str, str | None],
    id: str | None,
    root: str | os.PathLike | None,
    suffixes: Sequence[str],
) -> tuple[pd.DataFrame, dict[str, str | None], Path]:
    """Table of files with ids as its index, the roles with ``path`` among them, and the root of its paths.

    Raises
    ------
    InputError
        If the patient is not spoken of, a column is absent, or there are no rows.
    """
    need_patient(roles)
    named = [column for role, column in roles.items() if role in ID_ROLES and column]
    obs, home = load_table(source, text=[*ID_ROLES, *named, id or "sample_id"], suffixes=suffixes)
    if obs.empty:
        raise InputError("the table has no rows; check the file, or the filter that made it")
    root = Path(home if root is None else root).absolute()
    path = roles["path"]
    if path not in obs:
        raise InputError(f"no column {path!r} with the files' paths; pass path= its name. {nearest(path, obs.columns)}")
    obs[path] = [_under(p, root) for p in obs[path]]
    return obs.set_index(_ids(obs, id, path)), dict(roles), root


def need_patient(roles: Mapping[str, str | None]) -> None:
    """Raise :class:`~biosae.errors.InputError` if nothing was said of the patients."""
    if roles["patient"] is ...:
        raise InputError(
            "say which column names the patients: patient='<column>'; or patient=None if nobody knows (then no "
            "patient-level test is possible)"
        )


def single_file(
    source: str | os.PathLike, *, path: str, root: str | os.PathLike | None
) -> tuple[pd.DataFrame, str | os.PathLike]:
    """A table of one file, and the root of its path: the file's own folder unless another is given."""
    file = Path(source).absolute()
    return pd.DataFrame({path: [file]}), file.parent if root is None else root


def load_table(
    source: str | os.PathLike | pd.DataFrame, *, text: list[str], suffixes: Sequence[str] = SUFFIXES
) -> tuple[pd.DataFrame, Path]:
    """Read a table, or list a folder's images; return it with the folder against which its paths are meant.

    Parameters
    ----------
    source
        CSV, TSV or Parquet file, folder, or DataFrame (copied).
    suffixes
        Endings of the files to list in a folder, lower case; an empty string is any ending.
    text
        Columns of a text table to read as strings, so that ``007`` stays ``007``.
    """
    if isinstance(source, pd.DataFrame):
        named_index = source.index.name is not None and source.index.name not in source.columns
        return source.reset_index() if named_index else source.reset_index(drop=True), Path()
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"source is a {type(source).__name__}; pass a file, a folder or a pandas DataFrame")
    source = Path(source)
    if source.is_dir():
        return _list_folder(source, suffixes), source
    if not source.is_file():
        raise InputError(f"no file or folder {source}; relative names start from {Path.cwd()}")
    suffixes = [s.lower() for s in source.suffixes]
    if suffixes[-1:] in ([".parquet"], [".pq"]):
        return _read_parquet(source), source.parent
    separator = next((_SEPARATORS[s] for s in reversed(suffixes) if s in _SEPARATORS), None)
    if separator is None:
        raise InputError(
            f"{source.name} is not .csv, .tsv, .txt or .parquet; read it with pandas and pass the DataFrame"
        )
    return _read_text(source, separator, text), source.parent


def _read_parquet(source: Path) -> pd.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(source)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{source} is not a readable Parquet file ({error}); write or copy it again") from None
    if b"biosae" in (table.schema.metadata or {}):
        raise InputError(
            f"{source} was saved by biosae and knows its roles and files; open it with "
            "Samples.load (in the shell: without --patient and other columns)"
        )
    frame = table.to_pandas()
    return frame.reset_index(drop=frame.index.name is None)


def _read_text(source: Path, separator: str, text: list[str]) -> pd.DataFrame:
    try:
        table = pd.read_csv(
            source,
            sep=separator,
            dtype=dict.fromkeys(text, str),
            dtype_backend="numpy_nullable",
            encoding="utf-8-sig",
            na_values=list(MISSING),
            keep_default_na=False,
        )
    except UnicodeDecodeError:
        raise InputError(
            f"{source} is not UTF-8; read it with pandas.read_csv(..., encoding=...) and pass the DataFrame"
        ) from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(
            f"{source} is not a clean table ({error}); open it in a text editor, or write it again"
        ) from None
    if table.shape[1] == 1 and any(s in table.columns[0] for s in ";\t,"):
        raise InputError(
            f"{source.name} seems to use another separator (header {table.columns[0][:60]!r}); read it with "
            "pandas.read_csv(..., sep=..., decimal=...) and pass the DataFrame"
        )
    for column in table:
        table[column] = _plain(table[column])
    return table


def _plain(values: pd.Series) -> pd.Series:
    """numpy types where they can hold the values; ``Int64`` or ``boolean`` where a value is missing."""
    if pd.api.types.is_string_dtype(values.dtype):
        return values.astype(object).where(values.notna(), np.nan)
    if pd.api.types.is_float_dtype(values.dtype):
        return values.astype("float64")
    return values if values.isna().any() else values.astype(values.dtype.numpy_dtype)


def _list_folder(folder: Path, suffixes: Sequence[str]) -> pd.DataFrame:
    """Columns ``path`` (relative) and ``folder`` (name of the file's own folder, missing at the top)."""
    files = sorted(
        Path(parent, name).relative_to(folder)
        for parent, folders, names in os.walk(folder)
        for name in names
        if name.lower().endswith(tuple(suffixes)) and not name.startswith(".")
    )
    if not files:
        raise InputError(f"no file of a fitting kind ({', '.join(suffixes) or 'any'}) in {folder} or below it")
    return pd.DataFrame({"path": [f.as_posix() for f in files], "folder": [f.parent.name or np.nan for f in files]})


def _under(path: Any, root: Path) -> Any:
    """An absolute path below the root becomes relative to it; everything else stays."""
    if isinstance(path, os.PathLike):
        path = os.fspath(path)
    if isinstance(path, str) and os.path.isabs(path):
        try:
            return Path(path).relative_to(root).as_posix()
        except ValueError:
            return path
    return path


def _ids(obs: pd.DataFrame, id: str | None, path: str) -> pd.Index:
    if id is not None and id not in obs:
        raise InputError(f"no column {id!r} for the ids; {nearest(id, obs.columns)}")
    column = id or ("sample_id" if "sample_id" in obs else path)
    return pd.Index(obs[column], name=None)


def _absent(samples: Samples, max_failures: float, failures: str | os.PathLike | None, stage: str) -> list[list[str]]:
    """``[item, stage, reason, detail]`` of each sample whose file is absent; stop if they are more than
    ``max_failures``, warn if there are any."""
    listings: dict[Path, set[str]] = {}
    log = FailureLog(failures, stage=stage, total=len(samples), max_failures=1.0)
    absent = []
    for i, name in enumerate(samples.ids):
        file = samples.file(i)
        if file.parent not in listings:
            listings[file.parent] = set(os.listdir(file.parent)) if file.parent.is_dir() else set()
        if file.name not in listings[file.parent] and not file.exists():
            absent.append([name, stage, "missing", f"no file {file}"])
            log.add(name, *absent[-1][2:])
    if not absent:
        return absent
    text = f"{len(absent)} of {len(samples)} files are missing, e.g. {absent[0][3].removeprefix('no file ')}"
    if len(absent) > max_failures * len(samples):
        raise TooManyFailuresError(
            f"{text}: more than max_failures={max_failures:g} allows. Pass root= the folder that the paths start from, "
            "or drop the rows"
        )
    warnings.warn(f"{text}; their rows stay, and fail when they are read (samples.failures)", stacklevel=4)
    return absent
