"""What a study reads: samples as a section describes them, parts of a split, and the content that skipping hangs on."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pandas as pd

from biosae.data import Samples
from biosae.errors import InputError, nearest
from biosae.files import hash_file, hash_json
from biosae.pipeline.config import EncoderConfig, SamplesConfig, find_input

_TEXTS = (".toml", ".ipynb", ".py", ".md")  # pipelines, notebooks, scripts: not data, and saved often


def read_samples(
    section: SamplesConfig,
    *,
    base: Path,
    random_state: int,
    failures: Path | None = None,
    max_failures: float | None = None,
) -> Samples:
    """Samples as a ``[samples]`` section describes them, split if it says so; files that a reader could not use are
    listed in ``failures`` and may be a share of ``max_failures`` (None: the reader's own)."""
    from biosae import read
    from biosae.data import phantom, split

    if section.source == "phantom":
        samples = phantom(**{"random_state": random_state, **section.phantom})
    else:
        given = {"id": section.id, "path": section.path, "mpp": section.mpp, "size": section.size}
        options = section.roles() | {k: v for k, v in given.items() if v is not None} | section.options
        reader = getattr(read, section.source)
        known = inspect.signature(reader).parameters
        unknown = [k for k in options if k not in known]
        if unknown:
            raise InputError(f"[samples]: {section.source} takes no {unknown[0]!r}; {nearest(unknown[0], known)}")
        for name, value in (("failures", failures), ("max_failures", max_failures)):
            if value is not None and name in known:
                options.setdefault(name, value)
        samples = reader(find_input(section.table, base=base), **options)
    samples = _derived(samples, section)
    if section.split_by is not None:
        s = section.split_by
        samples = split(samples, by=s.by, stratify=s.stratify, test=s.test, val=s.val, random_state=random_state)
    return samples


def _derived(samples: Samples, section: SamplesConfig) -> Samples:
    """Samples with the section's indicator columns, and of the rows that it keeps."""
    named = {i.column: f"samples.indicators.{name}" for name, i in section.indicators.items()}
    check_columns(samples, dict.fromkeys(section.where, "samples.where") | named)
    new = {}
    for name, i in section.indicators.items():
        values = samples.obs[i.column]
        _check_values(values, i.values, f"samples.indicators.{name}")
        new[name] = values.isin(i.values).astype(float).where(values.notna()).to_numpy()
    for name in new:
        if name in samples.obs:
            raise InputError(f"[samples.indicators.{name}]: the samples have a column of this name; choose another")
    kept = pd.Series(True, index=samples.ids)
    for column, values in section.where.items():
        _check_values(samples.obs[column], values, "samples.where")
        kept &= samples.obs[column].isin(values)
    if not kept.any():
        raise InputError(f"[samples.where] keeps no row: none has these values of {', '.join(section.where)} at once")
    return samples.with_obs(**new).select(kept)


def _check_values(column: pd.Series, values: list[Any], key: str) -> None:
    """Refuse values that a column never has: a slip of the pen, or text where the column holds numbers."""
    for value in values:
        if not column.isin([value]).any():
            kind = "" if isinstance(value, str) == (column.dtype == object) else f" (it holds {column.dtype})"
            there = [str(v) for v in column.dropna().unique()]
            raise InputError(f"[{key}]: {column.name!r} never is {value!r}{kind}; {nearest(str(value), there)}")


def check_encoder(encoder: EncoderConfig, *, base: Path) -> None:
    """Give a catalogue encoder its catalogue spelling, and refuse a name, folder or weights that are not there.

    Raises
    ------
    InputError
        If the name is not in the catalogue and no ``source`` is given, or a named file or folder does not exist.
    """
    from biosae.encoders.catalog import canonical, info

    if encoder.source is None:
        encoder.name = info(encoder.name).name
    else:
        encoder.name = canonical(encoder.name)
    for name in (encoder.source, encoder.weights):
        if is_file_name(name):
            find_input(name, base=base)


def is_file_name(name: str | None) -> bool:
    """True for the name of a file or folder, False for None, ``random`` and ``hf-hub:...``."""
    return name not in (None, "random") and ":" not in name


def load_encoder(encoder: EncoderConfig, *, base: Path) -> Any:
    """The encoder that a section names, loaded and verified.

    Raises
    ------
    InputError
        If the encoder found at ``source`` has another name than the section gives it.
    """
    from biosae.encoders import load

    def place(name: str | None) -> str | None:
        return str(find_input(name, base=base)) if is_file_name(name) else name

    model = load(place(encoder.source) or encoder.name, weights=place(encoder.weights), **encoder.options)
    if model.info.name != encoder.name:
        raise InputError(
            f"the encoder at {encoder.source} is called {model.info.name!r}; give it this name in the file"
        )
    return model


def check_columns(samples: Samples, named: dict[str, str]) -> None:
    """Refuse a pipeline that names a column which the samples do not have, before anything is embedded.

    Raises
    ------
    InputError
        Naming the key of the pipeline file and the nearest column.
    """
    for column, key in named.items():
        if column not in samples.obs:
            raise InputError(f"{key}: the samples have no column {column!r}; {nearest(column, samples.obs.columns)}")


def in_split(obs: Any, part: str) -> Any:
    """Boolean mask (Series) of the rows whose ``split`` is ``part``; an :class:`InputError` where there is none."""
    if "split" not in obs:
        raise InputError(
            f"the samples have no split, so {part!r} cannot be taken; name split= or give [samples.split_by]"
        )
    mask = obs["split"].astype(str) == part
    if not mask.any():
        raise InputError(f"no sample has split {part!r}; there are: {', '.join(sorted(set(obs['split'].astype(str))))}")
    return mask


def content(path: Path) -> str:
    """Hash of a table's bytes, and of the names, sizes and modification times of the files below its folder; of another
    file's bytes; of a folder, of what lies in it. Left out are hidden files, run folders, and texts beside a table."""
    if path.is_file():
        table = hash_file(path)
        if path.suffix not in (".csv", ".tsv", ".parquet"):
            return table
        return hash_json([table, [entry for entry in _listing(path.parent) if not entry[0].endswith(_TEXTS)]])
    return hash_json(_listing(path))


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and not _is_run(Path(parent, f))]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                stat = path.stat()
                found.append((path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def _is_run(folder: Path) -> bool:
    """Whether a pipeline was run into this folder."""
    return (folder / "stages" / "samples.json").is_file()
