"""A run folder read into memory, with the identifiers of people kept out of everything that is printed."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from biosae.errors import BiosaeError, FormatError
from biosae.export.order import hidden_order
from biosae.files import read_h5ad, read_json, read_table
from biosae.pl import results

if TYPE_CHECKING:
    from anndata import AnnData

TABLES = (
    "summary", "unadjusted", "power", "permutations", "replication", "transfer", "within_strata", "confounders",
    "readout", "readout_all", "comparison", "retrieval", "retrieval_all", "diff", "pairs",
)  # fmt: skip
_ID_COLUMNS = ("patient", "slide", "sample_id", "item", "stratum", "group", "level")
_PATH = re.compile(r"""(?<![\w.:/\\])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\:"']+)+[/\\]?""")


@dataclass
class Run:
    """What a run folder holds; a table that is absent is not in ``tables``.

    ``choices`` are the arguments that ``associate`` was run with.
    """

    folder: Path
    adata: AnnData
    associations: pd.DataFrame
    tables: dict[str, pd.DataFrame]
    study: dict[str, Any]
    provenance: dict[str, Any]
    samples: Any = None
    images_note: str = ""
    failures: pd.DataFrame | None = None
    log: pd.DataFrame | None = None
    choices: dict[str, Any] = field(default_factory=dict)
    n_listed: int | None = None
    show_ids: bool = False
    pseudonyms: dict[str, str] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """``uns["biosae"]`` of the latents as plain values."""
        return plain(self.adata.uns.get("biosae", {}))

    @property
    def obs(self) -> pd.DataFrame:
        """One row a sample, also where the latents have one row a token."""
        obs = self.adata.obs
        return obs.drop_duplicates("sample_id").set_index("sample_id") if "sample_id" in obs else obs

    @property
    def cohorts(self) -> dict[str, Any]:
        """What ``tables/diff.json`` says, with ``noun``: what the frequencies are means over. A cohort that is a
        patient or a slide goes by its pseudonym."""
        facts = {"a": "cohort A", "b": "cohort B", **self.tables["diff"].attrs.get("biosae", {})}
        names = {side: str(facts[side]) for side in "ab"}
        if not self.show_ids:
            names = {side: self.pseudonyms.get(name, name) for side, name in names.items()}
        noun = "sample" if facts.get("assume_independent") else str(facts.get("unit", "patient")).replace("_", " ")
        return facts | names | {"noun": noun}

    def role(self, name: str) -> pd.Series | None:
        """The canonical column of a role, or None."""
        return self.obs[name] if name in self.obs and self.obs[name].notna().any() else None

    def redact(self, text: object) -> str:
        """Text without patient, slide and sample ids (replaced by pseudonyms) and with paths cut to their last part."""
        text = str(text)
        if re.match(r"(?:~|[A-Za-z]:)?[/\\]", text):
            text = _last_part(text)
        text = _PATH.sub(lambda m: _last_part(m.group(0)), text)
        if self.show_ids or self._pattern is None:
            return text
        return self._pattern.sub(lambda m: self._folded.get(m.group(0).casefold(), m.group(0)), text)

    @cached_property
    def _folded(self) -> dict[str, str]:
        return {name.casefold(): made for name, made in self.pseudonyms.items()}

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        names = [n for n in self.pseudonyms if len(n) >= 4 and not n.isdigit()]
        joined = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        return re.compile(rf"(?<![^\W_])(?:{joined})(?![^\W_])", re.IGNORECASE) if names else None

    def masked(self, table: pd.DataFrame) -> pd.DataFrame:
        """Table in which columns that may hold identifiers hold pseudonyms."""
        if self.show_ids:
            return table
        held = [c for c in _ID_COLUMNS if c in table]
        return table.assign(**{c: table[c].map(lambda v: self.pseudonyms.get(_name(v), v)) for c in held})

    def pseudonym(self, value: object) -> str:
        """``P07`` for a patient; the patient's own name only where identifiers were asked for."""
        return str(value) if self.show_ids else self.pseudonyms.get(_name(value), "?")


def load(folder: str | os.PathLike, *, samples: Any = None, show_ids: bool = False) -> Run:
    """Read a run folder. Only ``latents.h5ad`` and ``associations.csv`` must be there.

    Raises
    ------
    FormatError
        If one of the two is absent or unreadable.
    """
    folder = Path(folder)
    if not (folder / "latents.h5ad").is_file():
        raise FormatError(
            f"{folder} holds no latents.h5ad; run the stages up to 'encode' first, or pass the run folder"
        )
    adata = read_h5ad(folder / "latents.h5ad")
    associations = _csv(folder / "associations.csv")
    if associations is None:
        raise FormatError(f"{folder / 'associations.csv'} does not exist or is empty; run the stage 'associate' first")
    tables = {name: table for name in TABLES if (table := _csv(folder / "tables" / f"{name}.csv")) is not None}
    for name in {"diff", "pairs"} & set(tables):
        tables[name].attrs["biosae"] = _json(folder / "tables" / f"{name}.json")
    if "within_strata" in tables:
        tables["within_strata"] = tables["within_strata"].rename(columns={"strata": "stratum"})
    run = Run(
        folder=folder,
        adata=adata,
        associations=results.check(associations),
        tables=tables,
        study=_json(folder / "study.json"),
        provenance=_json(folder / "provenance.json"),
        failures=_failures(folder),
        log=_csv(folder / "log.csv"),
        choices=_json(folder / "tables" / "associate.json"),
        show_ids=show_ids,
    )
    run.pseudonyms = _pseudonyms(run.obs)
    _attach_samples(run, samples)
    return run


def _attach_samples(run: Run, samples: Any) -> None:
    path = run.folder / "samples.parquet"
    if path.is_file():
        import pyarrow.parquet

        try:
            run.n_listed = pyarrow.parquet.ParquetFile(path).metadata.num_rows
        except (OSError, ValueError):
            run.n_listed = None
    if samples is None and path.is_file():
        from biosae.data import Samples

        try:
            samples = Samples.load(path)
        except BiosaeError as error:
            run.images_note = f"The images could not be opened: {run.redact(error)}."
    elif samples is None:
        run.images_note = "The run folder has no samples.parquet and no samples were passed, so no image is shown."
    if samples is not None:
        run.samples, run.n_listed = samples, len(samples.obs)


def _failures(folder: Path) -> pd.DataFrame | None:
    """Every ``failures.csv`` of the run: its own, else those of the embedding folders, each item counted once."""
    top = folder / "failures.csv"
    paths = [top] if top.is_file() else sorted(folder.glob("embeddings/**/failures.csv"))
    parts = [table for path in paths if (table := _csv(path)) is not None]
    return pd.concat(parts, ignore_index=True).drop_duplicates() if parts else None


def _csv(path: Path) -> pd.DataFrame | None:
    """The table, or None where it is absent or has no row."""
    try:
        table = read_table(path)
    except (FileNotFoundError, pd.errors.EmptyDataError):
        return None
    return table if len(table) else None


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _name(value: object) -> str:
    return str(value)


def _pseudonyms(obs: pd.DataFrame) -> dict[str, str]:
    """Identifier -> pseudonym: P for patients, S for slides, T for samples, numbered in an order that is a secret."""
    made: dict[str, str] = {}
    columns = {"T": pd.Series(obs.index), "S": obs.get("slide"), "P": obs.get("patient")}
    for letter, values in columns.items():
        if values is None:
            continue
        names = sorted({_name(v) for v in values.dropna()})
        digits = max(2, len(str(len(names))))
        order = hidden_order(names, kind=letter)
        made.update({names[i]: f"{letter}{rank:0{digits}d}" for rank, i in enumerate(order, start=1)})
    return made


def plain(value: Any) -> Any:
    """Plain Python values out of what an ``.h5ad`` file gives back: arrays, numpy scalars, JSON text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, str) and value[:1] in "{[" and value[-1:] in "}]":
        try:
            return plain(json.loads(value))
        except json.JSONDecodeError:
            return value
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def flat(value: Any, *, prefix: str = "") -> dict[str, Any]:
    """Nested dict as one level of dotted keys; lists are joined by commas."""
    found: dict[str, Any] = {}
    for key, item in value.items() if isinstance(value, dict) else ():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(item, dict):
            found.update(flat(item, prefix=name))
        else:
            found[name] = ", ".join(map(str, item)) if isinstance(item, (list, tuple)) else item
    return found
