"""What a pipeline file may say: one pydantic model a table, unknown keys are errors that name the nearest valid one."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from biosae.errors import FormatError, InputError, nearest
from biosae.files import hash_json
from biosae.settings import settings


class _Section(BaseModel):
    model_config = ConfigDict(extra="allow", validate_default=True)

    @model_validator(mode="after")
    def _no_unknown_keys(self) -> _Section:
        for key in self.model_extra or {}:
            raise ValueError(f"unknown key {key!r}; {nearest(key, type(self).model_fields)}")
        return self


class SplitConfig(_Section):
    """``[samples.split_by]``: make a split where the table has none (see :func:`biosae.data.split`)."""

    by: str | None = "patient"
    stratify: str | None = None
    test: float = Field(0.3, gt=0, lt=1)
    val: float = Field(0.0, ge=0, lt=1)


class IndicatorConfig(_Section):
    """``[samples.indicators.<name>]``: a new column, 1 where ``column`` is one of ``values``, 0 where it is another,
    missing where it is missing."""

    column: str
    values: list[Any] = Field(min_length=1)


class SamplesConfig(_Section):
    """``[samples]``: where the cohort comes from and what its columns mean."""

    source: Literal["tiles", "images", "wsi", "dicom", "edf", "wfdb", "e4", "nifti", "phantom"] = "tiles"
    table: str | None = None
    """CSV, Parquet, file or folder; relative to the pipeline file, then to ``settings.data_dir``."""
    patient: str | None = None
    """Column of patients; ``patient_unknown = true`` instead says that nobody knows them."""
    patient_unknown: bool = False
    slide: str | None = None
    site: str | None = None
    scanner: str | None = None
    label: str | None = None
    split: str | None = None
    id: str | None = None
    path: str = "path"
    mpp: float | str | None = None
    size: int | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the reader (``bs.read.<source>``), such as ``rate``, ``window`` or ``recording``."""
    where: dict[str, list[Any]] = Field(default_factory=dict)
    """Column to the values that are kept; rows with others are left out (after reading)."""
    indicators: dict[str, IndicatorConfig] = Field(default_factory=dict)
    phantom: dict[str, Any] = Field(default_factory=dict)
    """Arguments of :func:`biosae.data.phantom`."""
    split_by: SplitConfig | None = None

    @model_validator(mode="after")
    def _complete(self) -> SamplesConfig:
        if self.source != "phantom" and self.table is None:
            raise ValueError("'table' is needed: the CSV, Parquet file or folder of the samples")
        if self.source != "phantom" and (self.patient is None) != self.patient_unknown:
            raise ValueError("give 'patient' (a column), or say 'patient_unknown = true'")
        return self

    def roles(self) -> dict[str, str | None]:
        """Role arguments for the reader, those left out not among them (``patient`` always is)."""
        named = {r: getattr(self, r) for r in ("slide", "site", "scanner", "label", "split")}
        return {"patient": self.patient, **{r: c for r, c in named.items() if c is not None}}


class EncoderConfig(_Section):
    """``[[encoders]]``: one frozen encoder and the layers to look at."""

    name: str
    """Catalogue name; with ``source`` the name that the encoder loaded from there has."""
    source: str | None = None
    """What to load instead: a folder, ``hf-hub:...``, ``timm:...`` or ``open_clip:...``."""
    weights: str | None = None
    layers: list[str] = Field(default_factory=lambda: ["final"])
    pool: str = "default"
    tokens: Literal["mean", "max", "fraction_active"] = "mean"
    """How the codes of a tile's tokens become the tile's code, where ``pool = "tokens"``."""
    role: Literal["main", "control"] = "main"
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of :func:`biosae.encoders.load`."""
    batch_size: int = Field(64, gt=0)


class SAEConfigSection(_Section):
    """``[sae]``: a method by name (:func:`biosae.sae.named.named`), its settings, and the rows it may learn from."""

    architecture: str = "topk"
    n_latents: int | None = None
    k: int = 16
    fit_on: str | None = None
    """Split that the dictionary is fitted on (default: the discovery split where there is one, else all)."""
    options: dict[str, Any] = Field(default_factory=dict)


class AssociateConfig(_Section):
    """``[associate]``: arguments of :func:`biosae.stats.associate`."""

    targets: list[str]
    unit: str = "patient"
    method: str = "auto"
    covariates: list[str] = Field(default_factory=list)
    strata: str | None = None
    controls: bool = True
    n_permutations: int = Field(0, ge=0)
    aggregate: str = "mean"
    groups: str = "patient"
    """Column of independent groups; where patients are not known, the nearest thing to them."""
    assume_independent: bool = False
    on: str | None = None
    """Split to test in (default: every sample)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments, such as ``correction``, ``exposure``, ``event``, ``nested``, ``permute`` or ``pooling``."""


class ReplicateConfig(_Section):
    """``[replicate]``: choose on one part, test once on the other (see :func:`biosae.stats.replicate`)."""

    discovery: str = "train"
    replication: str = "test"
    n_permutations: int = Field(999, ge=0)
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments, such as ``carry`` or ``near_duplicates``."""


class ConfoundersConfig(_Section):
    """``[confounders]``: technical factors to audit against biology (see :func:`biosae.stats.confounders`)."""

    technical: list[str]
    biology: list[str]
    n_permutations: int = Field(499, ge=0)


class TransferConfig(_Section):
    """``[transfer]``: a second cohort, encoded with the frozen SAE; ``targets`` maps the first cohort's to its own."""

    samples: SamplesConfig
    targets: dict[str, str]
    unit: str = "sample"
    strata: str | None = None
    groups: str = "patient"
    assume_independent: bool = False


class RetrieveConfig(_Section):
    """``[retrieve]``: do the nearest samples share a label? For every view (see :func:`biosae.search.evaluate`)."""

    labels: list[str] = Field(min_length=1)
    exclude: list[list[str]] = Field(default_factory=lambda: [[]], min_length=1)
    """Settings, each a list of columns that what is found must not share with the query; an empty one bars nothing."""
    use_rep: list[Literal["X", "embedding", "embedding_centred"]] = Field(
        default_factory=lambda: ["X", "embedding"], min_length=1
    )
    """``X`` (codes), ``embedding``, ``embedding_centred`` (less the mean of the rows that the dictionary was fitted
    on); the last one is what the others are compared with."""
    metric: Literal["cosine", "dot", "euclidean", "jaccard"] = "cosine"
    k: int | list[int] = 10
    queries: list[str] = Field(default_factory=list)
    """Splits that ask (default: every sample)."""
    gallery: list[str] = Field(default_factory=list)
    """Splits that are ranked (default: every sample)."""
    groups: str | None = None
    assume_independent: bool | None = None
    """Both as in ``[associate]`` where ``groups`` is not given."""


class PairsConfig(_Section):
    """``[diff.pairs]``: which latents fire together in the two cohorts (see :func:`biosae.search.pairs`)."""

    strata: str | None = None
    min_count: int = Field(10, ge=0)
    permute: Literal["auto", "within", "spatial"] = "auto"
    n_permutations: int = Field(999, ge=1)


class DiffConfig(_Section):
    """``[diff]``: which latents fire more often in one cohort than in another, for every view (see
    :func:`biosae.search.diff`)."""

    by: str
    cohorts: list[Any] | None = Field(None, min_length=2, max_length=2)
    document: str | None = None
    n_tiles: int | None = Field(None, ge=1)
    min_frequency: float = Field(0.01, ge=0, le=1)
    paired: bool | None = None
    covariates: list[str] = Field(default_factory=list)
    blocks: str | None = None
    n_permutations: int = Field(9999, ge=1)
    groups: str | None = None
    assume_independent: bool | None = None
    """Both as in ``[associate]`` where ``groups`` is not given."""
    pairs: PairsConfig | None = None


class AtlasConfig(_Section):
    """``[atlas]``: a page of every latent of the primary view (see :func:`biosae.atlas.build`)."""

    n_examples: int = Field(6, ge=1)
    max_mb: float = Field(20.0, gt=0)
    n_cards: int = Field(12, ge=0)
    spatial: list[str] | None = Field(None, min_length=2, max_length=2)
    """Columns of places, x then y."""


class PipelineConfig(_Section):
    """A whole study."""

    name: str
    title: str = ""
    question: str = ""
    random_state: int = 0
    max_failures: float = Field(0.05, ge=0, le=1)
    samples: SamplesConfig
    encoders: list[EncoderConfig] = Field(min_length=1)
    sae: SAEConfigSection = Field(default_factory=SAEConfigSection)
    associate: AssociateConfig
    replicate: ReplicateConfig | None = None
    confounders: ConfoundersConfig | None = None
    transfer: TransferConfig | None = None
    retrieve: RetrieveConfig | None = None
    diff: DiffConfig | None = None
    atlas: AtlasConfig | None = None
    max_latent_cards: int = Field(12, ge=0)

    @model_validator(mode="after")
    def _names(self) -> PipelineConfig:
        names = [e.name for e in self.encoders]
        if len(set(names)) < len(names):
            raise ValueError("every encoder may stand in 'encoders' once; list its layers instead")
        if self.encoders[0].role != "main":
            raise ValueError('the first encoder must have role = "main"')
        if self.transfer is not None:
            for target in self.transfer.targets:
                if target not in self.associate.targets:
                    raise ValueError(f"transfer target {target!r} is not tested in [associate]")
        for section in (self.retrieve, self.diff):
            if section is not None and section.groups is None:
                section.groups = self.associate.groups
                if section.assume_independent is None:
                    section.assume_independent = self.associate.assume_independent
            if section is not None:
                section.assume_independent = bool(section.assume_independent)
        return self

    def columns(self) -> dict[str, str]:
        """Column of the first cohort -> the key that names it, for every column that the stages will ask for."""
        from biosae.stats.adjust import column_of

        a, c = self.associate, self.confounders
        named = dict.fromkeys(a.targets, "associate.targets")
        named |= dict.fromkeys(map(column_of, a.covariates), "associate.covariates")
        for key in ("strata", "unit", "groups"):
            value = getattr(a, key)
            if value not in (None, "sample", "patient"):
                named[value] = f"associate.{key}"
        if a.unit == "patient":
            named["patient"] = "associate.unit"
        if c is not None:
            named |= dict.fromkeys(c.technical, "confounders.technical") | dict.fromkeys(
                c.biology, "confounders.biology"
            )
        if self.replicate is not None or a.on is not None or self.sae.fit_on is not None:
            named["split"] = "replicate" if self.replicate is not None else "a split"
        if (r := self.retrieve) is not None:
            named |= dict.fromkeys(r.labels, "retrieve.labels")
            named |= dict.fromkeys((name for setting in r.exclude for name in setting), "retrieve.exclude")
            if r.queries or r.gallery:
                named["split"] = "retrieve.queries" if r.queries else "retrieve.gallery"
        if (d := self.diff) is not None:
            named |= dict.fromkeys(map(column_of, d.covariates), "diff.covariates")
            strata = d.pairs.strata if d.pairs is not None else None
            asked = {"by": d.by, "document": d.document, "blocks": d.blocks, "pairs.strata": strata}
            named |= {column: f"diff.{key}" for key, column in asked.items() if column is not None}
        for key, section in (("retrieve", self.retrieve), ("diff", self.diff)):
            if section is not None and not section.assume_independent:
                named[section.groups] = f"{key}.groups"
        if self.atlas is not None:
            named |= dict.fromkeys(self.atlas.spatial or (), "atlas.spatial")
        return named

    @property
    def fingerprint(self) -> str:
        """Hash of everything the file says."""
        return hash_json(self.model_dump())


def load_config(path: str | Path, *, overrides: dict[str, Any] | None = None) -> PipelineConfig:
    """Read a pipeline file.

    Parameters
    ----------
    path
        TOML file.
    overrides
        Dotted keys and values that replace what the file says, such as ``{"sae.n_latents": 512}``; list items by number
        (``"encoders.0.weights"``).

    Raises
    ------
    FormatError
        If the file is absent or not TOML.
    InputError
        If a key is unknown or a value does not fit; every complaint is listed.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist; name a pipeline file (TOML)") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not valid TOML: {error}") from None
    for key, value in (overrides or {}).items():
        _override(raw, key, value)
    return parse_config(raw, where=str(path))


def parse_config(raw: dict[str, Any], *, where: str = "the configuration") -> PipelineConfig:
    """Check a configuration given as plain dicts (see :func:`load_config`)."""
    return _parsed(PipelineConfig, raw, where)


def parse_samples(raw: dict[str, Any], *, where: str = "the samples") -> SamplesConfig:
    """Check a ``[samples]`` section given as a plain dict; errors as :func:`load_config`."""
    return _parsed(SamplesConfig, raw, where)


def _parsed(model: type[_Section], raw: dict[str, Any], where: str) -> Any:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(p) for p in e['loc']) or '(top)'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise InputError(f"{where} cannot be used:\n" + "\n".join(lines)) from None


def _override(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node: Any = raw
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = value
    except (IndexError, ValueError, TypeError, AttributeError):
        raise InputError(f"--set {dotted}: there is no such place in the pipeline file") from None


def find_input(name: str, *, base: Path) -> Path:
    """Where a file or folder named in a pipeline lies: absolute, beside the pipeline file, or in ``settings.data_dir``.

    Raises
    ------
    InputError
        If it is in none of these places; they are listed.
    """
    places = [Path(name).expanduser()] if Path(name).is_absolute() else [base / name, settings.data_dir / name]
    for place in places:
        if place.exists():
            return place
    raise InputError(
        f"{name!r} was not found; looked at: {', '.join(str(p) for p in places)}. "
        "Put it there, or set the folder with --data-dir or BIOSAE_DATA_DIR"
    )
