"""Stages that look at latents beyond associations: retrieval, two cohorts, the atlas."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biosae.errors import BiosaeError, InputError, nearest
from biosae.files import read_h5ad, write_json, write_table
from biosae.pipeline.stages import Stage

if TYPE_CHECKING:
    import pandas as pd

    from biosae.data import Samples
    from biosae.pipeline.config import DiffConfig, PipelineConfig, RetrieveConfig
    from biosae.pipeline.study import View


def view_stages(config: PipelineConfig, folder: Path, view: View, encode: Stage, *, fit_on: str | None) -> list[Stage]:
    """Stages ``retrieve`` and ``diff`` of a view, where the study asks for them; ``fit_on`` is the split of the SAE."""
    latents = folder / view.place("latents.h5ad")

    def to(name: str) -> str:
        return view.place(f"tables/{name}")

    stages = []
    if (r := config.retrieve) is not None:
        inputs = {"encode": encode.key, "retrieve": r.model_dump(), "fit_on": fit_on}

        def retrieve() -> None:
            write_table(folder / to("retrieval.csv"), retrieval(read_h5ad(latents), r, fit_on=fit_on))

        stages.append(Stage(f"retrieve/{view.name}", inputs, (to("retrieval.csv"),), retrieve))
    if (d := config.diff) is not None:
        inputs = {"encode": encode.key, "diff": d.model_dump(), "random_state": config.random_state}
        names = ["diff"] if d.pairs is None else ["diff", "pairs"]

        def compare() -> None:
            adata = read_h5ad(latents)
            makers = {"diff": _difference, "pairs": _pairs}
            for name in names:
                table = makers[name](adata, d, random_state=config.random_state)
                write_table(folder / to(f"{name}.csv"), table)
                write_json(folder / to(f"{name}.json"), table.attrs["biosae"])

        outputs = tuple(to(f"{name}.{kind}") for name in names for kind in ("csv", "json"))
        stages.append(Stage(f"diff/{view.name}", inputs, outputs, compare))
    return stages


def atlas_stage(config: PipelineConfig, folder: Path, report: Stage) -> Stage:
    """The last stage: ``atlas.html`` of the primary view."""
    options = config.atlas.model_dump()

    def build() -> None:
        from biosae import atlas

        spatial = tuple(options["spatial"]) if options["spatial"] else None
        atlas.build(folder, **{**options, "spatial": spatial}, random_state=config.random_state)

    inputs = {"report": report.key, "atlas": options, "random_state": config.random_state}
    return Stage("atlas", inputs, ("atlas.html",), build)


def check_values(samples: Samples, config: PipelineConfig) -> None:
    """Refuse splits and cohorts that the samples do not have, before anything is embedded.

    Raises
    ------
    InputError
        Naming the key of the pipeline file and the nearest value.
    """
    asked = []
    if (r := config.retrieve) is not None:
        asked += [("retrieve.queries", "split", r.queries), ("retrieve.gallery", "split", r.gallery)]
    if (d := config.diff) is not None:
        levels = samples.obs[d.by].dropna().unique()
        if d.cohorts is None and len(levels) != 2:
            few = ", ".join(map(str, levels[:12]))
            raise InputError(f"diff.by: {d.by!r} has {len(levels)} values ({few}); name two of them in diff.cohorts")
        asked.append(("diff.cohorts", d.by, d.cohorts or []))
    for key, column, values in asked:
        for value in values:
            if not samples.obs[column].isin([value]).any():
                there = [str(v) for v in samples.obs[column].dropna().unique()]
                raise InputError(f"{key}: {column!r} never is {value!r}; {nearest(str(value), there)}")


def retrieval(adata: Any, section: RetrieveConfig, *, fit_on: str | None) -> pd.DataFrame:
    """Rows of :func:`biosae.search.evaluate` for every label and setting of ``exclude``.

    ``excluded`` says what a query may not find (``nothing``, or columns joined by commas), ``groups`` and ``metric``
    how it was asked. What was refused is a row with status ``refused`` and its ``reason``.
    """
    import pandas as pd

    from biosae.search import evaluate

    if "embedding_centred" in section.use_rep:
        rows = np.ones(adata.n_obs, bool) if fit_on is None else _in(adata, [fit_on])
        embedding = np.asarray(adata.obsm["embedding"], np.float64)
        adata.obsm["embedding_centred"] = embedding - embedding[rows].mean(axis=0)
    how = {"use_rep": section.use_rep, "metric": section.metric, "k": section.k, "groups": section.groups}
    parts = {key: _in(adata, splits) if splits else None for key, splits in
             (("queries", section.queries), ("gallery", section.gallery))}  # fmt: skip
    found = []
    for label in section.labels:
        for exclude in section.exclude:
            try:
                table = evaluate(
                    adata, label, exclude=exclude, assume_independent=section.assume_independent, **how, **parts
                )
            except BiosaeError as error:
                table = pd.DataFrame({"use_rep": section.use_rep, "status": "refused", "reason": str(error)})
            found.append(table.assign(label=label, excluded=", ".join(exclude) or "nothing"))
    out = pd.concat(found, ignore_index=True)
    out["groups"] = "every query" if section.assume_independent else section.groups
    out["metric"] = section.metric
    lead = ["label", "excluded", "use_rep"]
    return out[lead + [c for c in out if c not in lead]]


def _in(adata: Any, splits: list[str]) -> np.ndarray:
    return adata.obs["split"].astype(str).isin(splits).to_numpy()


def _difference(adata: Any, section: DiffConfig, *, random_state: int) -> pd.DataFrame:
    from biosae.search import diff

    options = section.model_dump(exclude={"by", "cohorts", "pairs"})
    cohorts = tuple(section.cohorts) if section.cohorts is not None else None
    return diff(adata, section.by, cohorts=cohorts, random_state=random_state, **options)


def _pairs(adata: Any, section: DiffConfig, *, random_state: int) -> pd.DataFrame:
    """Pairs of latents over the samples of both cohorts."""
    from biosae.search import pairs

    cohort = adata.obs[section.by]
    kept = cohort.notna() if section.cohorts is None else cohort.isin(section.cohorts)
    return pairs(
        adata[kept.to_numpy()].copy(), groups=section.groups, assume_independent=section.assume_independent,
        random_state=random_state, **section.pairs.model_dump(),
    )  # fmt: skip
