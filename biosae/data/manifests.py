"""Data sets described by one TOML file each: files, hashes, licence, access, citation, units, columns, split rule."""

from __future__ import annotations

import os
import re
import textwrap
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from biosae.data.roles import ROLES
from biosae.errors import FormatError, InputError, nearest
from biosae.settings import settings

if TYPE_CHECKING:
    import pandas as pd

Modality = Literal["pathology", "radiology", "ecg", "eeg", "wearable", "neuroimaging", "ecology", "general"]
Access = Literal["open", "registration", "agreement", "credentialed"]
"""``open``: anybody may download; ``registration``: an account at the source; ``agreement``: a signed or clicked
data-use agreement; ``credentialed``: a named, trained person whom the source has approved."""

_LOCAL = "local:"


def relative(path: str) -> str:
    """The path, if it is relative, stays in its folder and is written with forward slashes; else ValueError."""
    parts = path.split("/")
    if not path or path.startswith("/") or "\\" in path or ":" in parts[0] or {"", ".", ".."} & set(parts):
        raise ValueError(f"{path!r} must be a relative path with forward slashes and no '..'")
    return path


def _pattern(what: str, pattern: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"{value!r} is not {what}")
        return value

    return AfterValidator(check)


RelativePath = Annotated[str, AfterValidator(relative)]
Sha256 = Annotated[str, _pattern("a SHA-256 (64 hexadecimal digits, lower case)", r"[0-9a-f]{64}")]
Md5 = Annotated[str, _pattern("an MD5 (32 hexadecimal digits, lower case)", r"[0-9a-f]{32}")]
Url = Annotated[str, _pattern("a web address (http or https)", r"https?://[^\s/]+(/\S*)?")]
BaseUrl = Annotated[str, _pattern("a web folder (http or https, ending in '/')", r"https?://\S+/")]
Doi = Annotated[str, _pattern("a DOI such as '10.1000/182'", r"10\.\d{4,9}/\S+")]
Name = Annotated[str, _pattern("a name of lower-case letters, digits and '_'", r"[a-z0-9][a-z0-9_]*")]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    @model_validator(mode="after")
    def _no_unknown_keys(self) -> _Part:
        for key in self.model_extra or {}:
            raise ValueError(f"unknown key {key!r}; {nearest(key, type(self).model_fields)}")
        return self


class File(_Part):
    """``[[files]]``: one file, where it comes from and how to know that it is whole."""

    path: RelativePath
    """Place below the data set's folder."""
    urls: tuple[Url, ...] = ()
    """The source first, then its mirrors."""
    bytes: Count | None = None
    sha256: Sha256 | None = None
    md5: Md5 | None = None

    @property
    def hash(self) -> str | None:
        """``"sha256:..."`` or ``"md5:..."`` as the source publishes it, or None."""
        if self.sha256:
            return f"sha256:{self.sha256}"
        return f"md5:{self.md5}" if self.md5 else None


class Folder(_Part):
    """``[[folders]]``: a folder of many files, checked as a whole (see :func:`biosae.data.hashes.listing`)."""

    path: RelativePath
    files: Count
    bytes: Count
    sha256: Sha256
    """SHA-256 of the listing of the folder."""


class Units(_Part):
    """``[units]``: physical units; several values where the data set mixes them, absent where not confirmed."""

    mpp: float | tuple[float, ...] | None = None
    """Micrometres per pixel."""
    rate: float | tuple[float, ...] | None = None
    """Samples per second, Hz."""
    unit: str | None = None
    """Unit of the values, e.g. ``mV``."""
    note: str | None = None


class Split(_Part):
    """``[split]``: how to divide the data without leakage."""

    by: str | None = None
    """The group that must not be cut: a column, or what to derive it from."""
    column: str | None = None
    """Column (or file, or folder) with the source's own split."""
    rule: str


class Manifest(_Part):
    """What is known of one data set. A field that no source confirms is left out, never guessed."""

    name: Name
    title: str
    modality: Modality
    access: Access
    licence: str | None = None
    """As the source states it; None if no statement was found."""
    citation: str
    doi: Doi | None = None
    homepage: Url | None = None
    version: str | None = None
    source: str | None = None
    """``"local:<folder>"`` for a data set that is not downloaded but lies in a folder."""
    confirmed: tuple[str, ...]
    """Where each fact was read."""
    left_out: tuple[str, ...] = ()
    """Facts that could not be confirmed and are therefore absent."""
    warnings: tuple[str, ...] = ()
    """What goes wrong when the data set is used carelessly."""
    steps: tuple[str, ...] = ()
    """What to do to obtain the data where they cannot simply be downloaded."""
    n: Mapping[str, Count] = Field(default_factory=dict)
    """Counts by what is counted: ``patients``, ``samples``, ..."""
    units: Units = Units()
    table: RelativePath | None = None
    """CSV with one row a sample."""
    roles: Mapping[str, str] = Field(default_factory=dict)
    """Role -> column of the table, as the reader functions take them."""
    columns: Mapping[str, str] = Field(default_factory=dict)
    """Column -> meaning; ``*`` stands for any text, and several columns of one meaning are separated by commas."""
    parts: Mapping[str, str] = Field(default_factory=dict)
    """Data sets that a collection is made of -> their terms and where they come from."""
    split: Split | None = None
    files: tuple[File, ...] = ()
    folders: tuple[Folder, ...] = ()
    base_urls: tuple[BaseUrl, ...] = ()
    """Web folders that hold everything named in ``hash_list``: the source first, then mirrors."""
    hash_list: RelativePath | None = None
    """File below ``base_urls`` in the format of ``sha256sum`` or ``md5sum``: names every file and its hash."""
    path: Path | None = Field(default=None, exclude=True)
    """The TOML file that this was read from."""

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if self.source is not None and not self.source.startswith(_LOCAL):
            raise ValueError(f"source {self.source!r}: write 'local:<folder>', or leave it out and give urls")
        if self.hash_list is not None and not self.base_urls:
            raise ValueError("'hash_list' needs 'base_urls': the web folder that the list lies in")
        if self.base_urls and self.hash_list is None:
            raise ValueError("'base_urls' needs 'hash_list', which names the files in it")
        if not self.downloadable and self.source is None and not self.steps:
            raise ValueError("'steps' are needed: nothing here can be downloaded, so say how to obtain the data")
        for role in self.roles:
            if role not in ROLES:
                raise ValueError(f"{role!r} is no role; {nearest(role, ROLES)}")
        paths = [part.path for part in (*self.files, *self.folders)]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        if twice:
            raise ValueError(f"listed twice: {', '.join(twice)}")
        return self

    @property
    def downloadable(self) -> bool:
        """Whether ``fetch`` can get something without an account."""
        return self.access == "open" and (self.hash_list is not None or any(file.urls for file in self.files))

    @property
    def folder(self) -> Path:
        """Where the data lie unless told otherwise: below ``settings.data_dir``, by name or as ``source`` says."""
        return settings.data_dir / (self.source.removeprefix(_LOCAL) if self.source else self.name)

    @property
    def bytes(self) -> int | None:
        """Size of what is listed, or None if one size is not known."""
        sizes = [part.bytes for part in (*self.files, *self.folders)]
        return None if self.hash_list is not None or not sizes or None in sizes else sum(sizes)

    def __repr__(self) -> str:
        """Everything known, one fact a line, for people."""
        return "\n".join(_describe(self))

    __str__ = __repr__


def _describe(manifest: Manifest) -> list[str]:
    size = f", {human(manifest.bytes)}" if manifest.bytes is not None else ""
    terms = [f"licence: {manifest.licence or 'not stated by any source that was read'}", f"access: {manifest.access}"]
    facts = [*terms, f"cite: {manifest.citation}"]
    facts += [f"doi: {manifest.doi}"] if manifest.doi else []
    facts += [f"home: {manifest.homepage}"] if manifest.homepage else []
    facts += [f"version: {manifest.version}"] if manifest.version else []
    facts += ["n: " + ", ".join(f"{count:,} {what}" for what, count in manifest.n.items())] if manifest.n else []
    units = manifest.units.model_dump(exclude_none=True)
    facts += ["units: " + "; ".join(f"{key} {value}" for key, value in units.items())] if units else []
    facts += [f"table: {manifest.table}"] if manifest.table else []
    facts += ["roles: " + ", ".join(f"{r} = {c!r}" for r, c in manifest.roles.items())] if manifest.roles else []
    facts += [f"part {name}: {text}" for name, text in manifest.parts.items()]
    facts += [f"split: {manifest.split.rule}"] if manifest.split else []
    facts += [f"warning: {text}" for text in manifest.warnings]
    facts += [f"not known: {text}" for text in manifest.left_out]
    facts += [f"step {i}: {text}" for i, text in enumerate(manifest.steps, 1)]
    facts += [f"column {name}: {text}" for name, text in manifest.columns.items()]
    if manifest.hash_list:
        facts.append(f"files: all that {manifest.base_urls[0]}{manifest.hash_list} names")
    for part in (*manifest.files, *manifest.folders):
        count = f"{part.files} files, " if isinstance(part, Folder) else ""
        facts.append(f"file: {part.path} ({count}{human(part.bytes) if part.bytes is not None else 'size not known'})")
    facts += [f"read from: {text}" for text in manifest.confirmed]
    lines = [f"{manifest.name}: {manifest.title} ({manifest.modality}{size})"]
    for fact in facts:
        lines += textwrap.wrap(fact, 110, initial_indent="  ", subsequent_indent="      ", break_long_words=False)
    return lines


def human(size: int) -> str:
    """A number of bytes for people.

    >>> human(1150585339)
    '1.2 GB'
    """
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def folders() -> list[Path]:
    """Where manifests are looked for: the user's own (``settings.data_dir/manifests``), then those of biosae."""
    package = Path(__file__).resolve().parents[1]
    # an installed package carries them inside; in a checkout they lie beside it
    shipped = [f for f in (package / "data_manifests", package.parent / "data_manifests") if f.is_dir()]
    return [f for f in (settings.data_dir / "manifests", *shipped[:1]) if f.is_dir()]


def _paths() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("*.toml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def read(path: str | os.PathLike) -> Manifest:
    """Manifest of one TOML file.

    Raises
    ------
    FormatError
        If the file is absent, is no TOML, or says something that a manifest cannot say; the message names the key and
        the nearest valid one.
    """
    path = Path(path)
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise FormatError(f"{path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not valid TOML ({error})") from None
    if "path" in said:
        raise FormatError(f"{path}: unknown key 'path'")
    try:
        manifest = Manifest(**said, path=path)
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}".removeprefix(": ") for e in error.errors()]
        raise FormatError(f"{path}: " + "; ".join(lines)) from None
    if manifest.name != path.stem:
        raise FormatError(f"{path}: name = {manifest.name!r}, but the file is called {path.name}; they must agree")
    return manifest


def info(name: str | os.PathLike) -> Manifest:
    """What is known of a data set; nothing is downloaded.

    Parameters
    ----------
    name
        Name of a manifest (case does not matter, and ``-`` counts as ``_``), or the path of a TOML file.

    Raises
    ------
    InputError
        If there is no such name; the message gives the nearest one.
    FormatError
        If the file is not a manifest.
    """
    text = os.fspath(name)
    if text.endswith(".toml"):
        return read(text)
    paths = _paths()
    key = text.strip().lower().replace("-", "_")
    if key not in paths:
        raise InputError(f"no data set is named {text!r}; {nearest(key, paths)}")
    return read(paths[key])


def table(modality: str | None = None, access: str | None = None) -> pd.DataFrame:
    """The known data sets, one row each (index ``name``); nothing is downloaded.

    Parameters
    ----------
    modality
        Only this one: ``pathology``, ``radiology``, ``ecg``, ``eeg``, ``wearable``, ``neuroimaging``, ``ecology`` or
        ``general``.
    access
        Only this one: ``open``, ``registration``, ``agreement`` or ``credentialed``.

    Returns
    -------
    pandas.DataFrame
        Columns ``title, modality, access, licence, n_patients, n_samples, bytes, downloadable, homepage``. Counts and
        sizes are ``Int64`` and missing where not confirmed; ``bytes`` covers the files that the manifest lists.

    Raises
    ------
    InputError
        If there is no such modality or access class.
    """
    import pandas as pd

    for what, value, choices in (("modality", modality, get_args(Modality)), ("access", access, get_args(Access))):
        if value is not None and value not in choices:
            raise InputError(f"{what}={value!r}; {nearest(value, choices)}")
    known = [read(path) for path in _paths().values()]
    kept = [m for m in known if modality in (None, m.modality) and access in (None, m.access)]
    rows: list[dict[str, Any]] = [
        {
            "name": m.name,
            "title": m.title,
            "modality": m.modality,
            "access": m.access,
            "licence": m.licence,
            "n_patients": m.n.get("patients"),
            "n_samples": m.n.get("samples"),
            "bytes": m.bytes,
            "downloadable": m.downloadable,
            "homepage": m.homepage,
        }
        for m in kept
    ]
    columns = ["name", "title", "modality", "access", "licence", "n_patients", "n_samples", "bytes"]
    result = pd.DataFrame(rows, columns=[*columns, "downloadable", "homepage"])
    return result.astype(dict.fromkeys(("n_patients", "n_samples", "bytes"), "Int64")).set_index("name")
