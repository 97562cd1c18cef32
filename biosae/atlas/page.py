"""``build``: a run folder in, one page out on which every latent can be looked at, doubted and named."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import scipy.sparse as sp

from biosae import __version__
from biosae.atlas import tables, where
from biosae.atlas.cards import stress_cards
from biosae.atlas.gallery import galleries
from biosae.atlas.packing import script_json
from biosae.atlas.pictures import described, pictures
from biosae.errors import InputError
from biosae.files import atomic_path
from biosae.interpret import names
from biosae.interpret.stress import StressCard
from biosae.pl.gallery import HEADINGS, noun
from biosae.reports.run import Run, load

SCRIPTS = ("read.js", "names.js", "table.js", "maps.js", "latent.js", "main.js")
STATUSES = ("proposed", "confirmed", "doubtful", "artefact")
"""What a reader may say of a name, besides nothing."""
_MAPS, _SLIDES = 0.2, 0.25  # shares of the page that maps may take; pictures get what is left


def build(
    run_folder: str | os.PathLike,
    *,
    out: str | os.PathLike | None = None,
    title: str | None = None,
    samples: Any = None,
    n_examples: int = 6,
    max_mb: float = 20.0,
    cards: Sequence[StressCard] = (),
    n_cards: int = 12,
    spatial: tuple[str, str] | None = None,
    show_ids: bool = False,
    random_state: int = 0,
) -> Path:
    """Write one HTML page with every latent of a run: figures, associations, examples with controls, maps, names.

    The page works from a shared folder or a mail: it holds all it needs and asks no network (its own policy forbids
    it). Readers name latents and write notes, which stay in their browser until they save them as a file for
    :func:`biosae.interpret.read_names`. Patients, slides and samples appear under pseudonyms made for the page, but
    pictures are shown as they are: whoever gets the page sees them.

    Parameters
    ----------
    run_folder : path-like
        Folder of a run; ``latents.h5ad`` and ``associations.csv`` must be in it. Where it also holds the SAE and
        embeddings with tokens, pictures get maps of where a latent fires.
    out : path-like, optional
        The page; ``atlas.html`` in the run folder by default.
    title : str, optional
        Heading; the study's own by default.
    samples : biosae.Samples, optional
        Where items are read from; ``samples.parquet`` of the run by default.
    n_examples : int
        Items of each kind that a latent shows.
    max_mb : float
        Size of the page, MB (10^6 bytes). Pictures are made smaller until they fit, then left out, and the page says
        so. Tables are never cut for it: a page of very many latents may be larger.
    cards : sequence of StressCard
        Stress cards to show (:func:`biosae.interpret.stress`).
    n_cards : int
        Stress cards made here besides, for the latents that stand first for the targets.
    spatial : tuple of str, optional
        Two columns of ``obs``: place of a sample on its slide, for maps over slides where ``obsm["spatial"]`` is not
        known. Any unit.
    show_ids : bool
        True prints slides and patients as they are. Only for pages that stay where the data are.
    random_state : int
        Seed of random examples and of stress cards.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    FormatError
        If ``latents.h5ad`` or ``associations.csv`` is absent or unreadable.
    InputError
        For ``n_examples`` below 1, ``n_cards`` below 0, ``max_mb`` not above 0, unknown columns in ``spatial``, a
        card of a latent that the run does not have, or latents without ``varm["decoder"]``.

    Examples
    --------
    >>> bs.atlas.build("runs/study")  # doctest: +SKIP
    >>> bs.interpret.read_names("names.json", adata)  # doctest: +SKIP
    """
    if n_examples < 1 or n_cards < 0 or not max_mb > 0:
        raise InputError(
            f"n_examples={n_examples} must be 1 or more, n_cards={n_cards} 0 or more, max_mb={max_mb} more than 0"
        )
    folder = Path(run_folder)
    target = folder / "atlas.html" if out is None else Path(out)
    run = load(folder, samples=samples, show_ids=show_ids)
    heading = run.redact(title or run.study.get("title") or run.study.get("name") or "Latents")
    data = _data(run, n_examples, max_mb * 1e6, cards, n_cards, spatial, random_state)
    page = _render({"title": heading, "question": run.redact(run.study.get("question") or "")}, data)
    with atomic_path(target) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return target


def _data(
    run: Run,
    n_examples: int,
    size: float,
    cards: Sequence[StressCard],
    n_cards: int,
    spatial: tuple[str, str] | None,
    random_state: int,
) -> dict[str, Any]:
    """All that the page shows, as plain values; pictures last, in the room that the rest leaves."""
    adata = run.adata
    codes = sp.csc_matrix(adata.X)
    codes.sort_indices()
    rows = tables.associations(run)
    shown, items = galleries(run, codes, n=n_examples, random_state=random_state)
    maps, no_maps = where.token_maps(run, shown, items, budget=_MAPS * size) if run.samples is not None else (None, "")
    first = sorted(range(adata.n_vars), key=_best_rank(rows, adata.n_vars).__getitem__)
    over, no_slides = where.slides(run, codes, first, spatial=spatial, budget=_SLIDES * size)
    obs = run.obs
    patients = obs.get("patient")
    known = [run.pseudonym(patients[i]) if patients is not None and i in patients.index else "" for i in items.ids]
    held = stress_cards(run, cards, n=n_cards, random_state=random_state)
    data: dict[str, Any] = {
        "version": __version__,
        "names": {"format": names.FORMAT, "version": names.VERSION, "longest": names.FIELDS, "statuses": STATUSES},
        "fingerprint": names.dictionary_fingerprint(adata),
        "noun": noun(run.samples, adata),
        "row": "token" if len(obs) < adata.n_obs else noun(run.samples, adata),
        "item": run.redact(described(run.samples, items.ids)) if run.samples is not None else "",
        "headings": HEADINGS,
        "signed": bool(codes.data.min(initial=0) < 0),
        "n_rows": adata.n_obs,
        "group": "patient" if run.choices.get("groups", "patient") == "patient" else "group",
        "n_patients": int(adata.obs["patient"].nunique()) if "patient" in adata.obs else None,
        "about": tables.about(run),
        "latents": tables.latents(run, codes),
        "histograms": tables.histograms(codes),
        "associations": rows,
        "confounders": tables.confounders(run),
        "neighbours": tables.neighbours(adata.varm["decoder"]),
        "galleries": shown,
        "patients": known,
        "maps": maps,
        "slides": over,
        "cards": {str(adata.var_names.get_loc(name)): made for name, made in held.items()},
    }
    notes = [no_maps, no_slides if "slide" in obs else "", run.images_note]
    if rows["n_all"] > len(rows["latent"]):
        notes.append(
            f"Of {rows['n_all']:,} associations the page holds the first of each latent; all: associations.csv."
        )
    if maps and maps["left_out"]:
        notes.append("Maps of some examples were left out to keep the page small.")
    if over and over["n_left_out"]:
        notes.append(f"Maps over slides of {over['n_left_out']:,} latents were left out to keep the page small.")
    drawn = {"src": [None] * len(items.ids), "why": {}, "side": 0, "n_left_out": 0}
    if run.samples is not None:
        room = size - len(script_json(data).encode()) - 150_000
        drawn = pictures(run.samples, items.ids, items.order(), budget=room)
    if drawn["n_left_out"]:
        notes.append(f"{drawn['n_left_out']:,} pictures were left out to keep the page small (max_mb=).")
    drawn["why"] = {at: run.redact(reason) for at, reason in drawn["why"].items()}
    return data | {"pictures": drawn, "notes": [run.redact(note) for note in notes if note]}


def _best_rank(rows: dict[str, Any], n: int) -> list[int]:
    """Rank of the strongest association of each latent; those without any come last."""
    best = [len(rows["latent"])] * n
    for latent, rank in zip(rows["latent"], rows["rank"]):
        best[latent] = min(best[latent], rank)
    return best


def _render(context: dict[str, Any], data: dict[str, Any]) -> str:
    import jinja2
    from markupsafe import Markup

    held = resources.files("biosae.atlas") / "templates"
    script = "\n".join((held / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{script}}})();\n'
    style = (held / "atlas.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("biosae.atlas", "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("atlas.html").render(
        **context,
        policy=f"default-src 'none'; img-src data: blob:; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'",
        script=Markup(script),
        style=Markup(style),
        data=Markup(script_json(data)),
    )


def _hash(text: str) -> str:
    """Source expression of a content security policy: only this very text may act."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
