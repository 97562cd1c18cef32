"""``report``: a run folder in, one self-contained HTML page out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from biosae.errors import InputError
from biosae.files import atomic_path
from biosae.pl.gallery import noun
from biosae.reports import search, sections
from biosae.reports.cards import cards, chosen_latents
from biosae.reports.confounding import confounding
from biosae.reports.methods import methods
from biosae.reports.run import Run, load
from biosae.reports.tables import Figures
from biosae.reports.verdicts import (
    best_rows,
    cohort_verdict,
    confounding_verdict,
    question_verdicts,
    replication_verdict,
    retrieval_verdicts,
    strata_sentences,
)


def report(
    run_folder: str | os.PathLike,
    *,
    out: str | os.PathLike | None = None,
    title: str | None = None,
    samples: Any = None,
    max_latents: int = 12,
    show_ids: bool = False,
) -> Path:
    """Write one HTML page about a run, and its figures as PDF and PNG under ``figures/``.

    The page loads nothing from elsewhere: style and images are inside it, and it holds no script. Tables that the
    run lacks leave their section out or are named as missing. Patients, slides and samples appear under pseudonyms
    made for this page (``P07``); paths are cut to their last part.

    Parameters
    ----------
    run_folder : path-like
        Folder of a run; ``latents.h5ad`` and ``associations.csv`` must be in it.
    out : path-like, optional
        The page; ``report.html`` in the run folder by default.
    title : str, optional
        Heading; the study's own by default.
    samples : biosae.Samples, optional
        Where tiles are read from; ``samples.parquet`` of the run by default.
    max_latents : int
        Most latents with a card of their own.
    show_ids : bool
        True prints patient and sample identifiers as they are. Only for pages that stay where the data are.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    FormatError
        If ``latents.h5ad`` or ``associations.csv`` is absent or unreadable.
    InputError
        If ``max_latents`` is negative.
    """
    if max_latents < 0:
        raise InputError(f"max_latents={max_latents} must be 0 or more")
    folder = Path(run_folder)
    target = folder / "report.html" if out is None else Path(out)
    run = load(folder, samples=samples, show_ids=show_ids)
    page = _render(_context(run, Figures(folder / "figures"), target, title=title, max_latents=max_latents))
    with atomic_path(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def _context(run: Run, figures: Figures, target: Path, *, title: str | None, max_latents: int) -> dict[str, Any]:
    """Everything the template prints, computed section by section."""
    latents = chosen_latents(run, max_latents=max_latents)
    best = best_rows(run)
    leading = list(dict.fromkeys(best.loc[best["source"] == "latent", "latent"].astype(str)))
    general = [replication_verdict(run), confounding_verdict(run, leading)]
    general += [*strata_sentences(run), cohort_verdict(run), *retrieval_verdicts(run)]
    identity = run.facts.get("identity", {})
    return {
        "title": run.redact(title or run.study.get("title") or run.study.get("name") or "Report"),
        "question": run.redact(run.study.get("question") or ""),
        "verdicts": question_verdicts(run),
        "general": [text for text in general if text],
        "encoder": ", ".join(str(identity[k]) for k in ("encoder", "layer", "pool") if identity.get(k) is not None),
        "cohort": sections.cohort(run),
        "quality": sections.quality(run, figures),
        "associations": sections.associations(run, figures),
        "replication": sections.replication(run, figures),
        "confounding": confounding(run, figures, [n for n in latents if n in leading] or latents),
        "cohorts": search.cohorts(run, figures),
        "retrieval": search.retrieval(run, figures),
        "atlas": _atlas(run, target),
        "cards": cards(run, figures, latents),
        "noun": noun(run.samples),
        "images_note": run.images_note,
        "comparison": sections.comparison(run, figures),
        "refused": sections.refused(run),
        "patients_known": run.role("patient") is not None,
        "methods": [run.redact(text) for text in methods(run)],
        "provenance": sections.provenance(run),
        "stages": sections.stages(run),
        "show_ids": run.show_ids,
        "not_drawn": {name: run.redact(reason) for name, reason in figures.refused.items()},
    }


def _atlas(run: Run, target: Path) -> str:
    """The atlas beside the page, or the one that the study is about to write there; empty where there is none."""
    wanted = (run.study.get("config") or {}).get("atlas") or (run.folder / "atlas.html").is_file()
    return "atlas.html" if wanted and target.parent.resolve() == run.folder.resolve() else ""


def _render(context: dict[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("biosae.reports", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html").render(context)
