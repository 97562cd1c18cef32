"""Explanations by a backend: it is shown active and silent items of the writing patients and asked what they share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import InputError
from biosae.interpret.explain.items import Items
from biosae.interpret.explain.maps import TokenMaps, highlight
from biosae.interpret.explain.questions import Backend, Picture, Question, cleaned, parse, redacted

N_SHOWN = 20
"""Active items on the sheet, and half as many silent ones."""


def write(
    items: Items, *, backend: Backend, samples: Any, tokens: Any = None, context: str = "", n_shown: int = N_SHOWN
) -> pd.DataFrame:
    """Ask a backend for one sentence a latent.

    It sees one sheet: active items from the highest activation to the lowest, each with its level (10 is the highest),
    then silent ones, marked ``low``. With ``tokens`` the region where the latent fires is marked in the active ones.
    Nothing else of the study is in the prompt: no identifier, no metadata.

    Parameters
    ----------
    items
        Of :func:`choose`; the writing part alone is shown.
    backend
        Anything with ``ask``.
    samples : biosae.Samples
    tokens : AnnData, optional
        Codes with a row a token.
    context
        What the items are ("H&E tiles of breast tissue, 0.5 um per pixel"), for the prompt.
    n_shown
        Active items to show, at least 5.

    Returns
    -------
    DataFrame
        ``latent, tail, text`` (None where no answer could be read), ``source`` (name of the backend), ``problem``.

    Raises
    ------
    InputError
        If fewer than 5 items are to be shown.
    """
    if n_shown < 5:
        raise InputError(f"n_shown={n_shown} is too few to see what items share; show at least 5")
    maps = None if tokens is None else TokenMaps(tokens)
    about = f"The items are: {redacted(cleaned(context), items.identifiers)}\n" if context else ""
    outline = " The part where it is present is marked in yellow." if maps is not None else ""
    ask = (
        f"{about}A feature is present in the items marked with a level (10: strongest, 1: weakest) and absent or weak "
        f"in those marked low.{outline}\nSay what the items with it share that those without lack. Name what can be "
        "seen, not the sheet or the marks."
    )
    questions = []
    for latent, tail in items.scored:
        part = items.of(latent, tail, "write")
        active, silent = part[part["kind"] == "active"], part[part["kind"] == "random"].iloc[: n_shown // 2]
        active = active.iloc[np.unique(np.linspace(0, len(active) - 1, min(n_shown, len(active))).round().astype(int))]
        pictures = []
        for row in pd.concat([active, silent]).itertuples():
            on = row.kind == "active"
            grid = maps.grid(row.sample_id, latent, tail) if maps is not None and on else None
            marks = None if grid is None or not grid.any() else maps.marks(highlight(grid))
            pictures.append(Picture(samples, row.sample_id, marks, caption=str(row.level) if on else "low"))
        questions.append(Question(ask, tuple(pictures), "text"))
    rows = []
    for (latent, tail), answer in zip(items.scored, backend.ask(questions)):
        text = parse(answer.text, "text")
        text = None if text is None else redacted(text, items.identifiers)
        problem = answer.problem or ("" if text else "no clear answer")
        rows.append((latent, tail, text, backend.name, problem))
    return pd.DataFrame(rows, columns=["latent", "tail", "text", "source", "problem"])
