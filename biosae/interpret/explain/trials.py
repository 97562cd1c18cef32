"""Questions whose right answer is known: detection, fuzzing, intruder and simulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import InputError, nearest
from biosae.interpret.explain.items import Items, level
from biosae.interpret.explain.maps import TokenMaps, coarse, displaced, highlight
from biosae.interpret.explain.questions import Picture, Question, cleaned, redacted

N_INTRUDER = 5
CELLS = 7
"""Most rows and columns of the grid that a rater fills in."""


@dataclass(frozen=True)
class Trial:
    """A question with its truth, which is not part of the question.

    ``truth`` is bool (detection, fuzzing), the number of a picture (intruder) or levels 0 to 10, (rows, columns)
    (simulation). ``kind`` is that of the item.
    """

    scorer: str
    latent: str
    tail: str
    kind: str
    group: str
    truth: Any
    question: Question


def texts(explanations: Any, items: Items) -> dict[tuple[str, str], str]:
    """Explanations by latent and tail, on one line, identifiers removed.

    Takes a table with ``latent``, ``text`` and optionally ``tail``, or a mapping of latent (or (latent, tail)) to text.
    Latents without text are left out.

    Raises
    ------
    InputError
        If none is about a latent of the items.
    """
    if isinstance(explanations, pd.DataFrame):
        tails = explanations["tail"] if "tail" in explanations else ["+"] * len(explanations)
        pairs = {(str(n), t): text for n, t, text in zip(explanations["latent"], tails, explanations["text"])}
    elif isinstance(explanations, Mapping):
        pairs = {key if isinstance(key, tuple) else (str(key), "+"): text for key, text in explanations.items()}
    else:
        raise InputError("explanations is a table with 'latent' and 'text', or a mapping of latent to text")
    found = {key: redacted(cleaned(text), items.identifiers) for key, text in pairs.items() if isinstance(text, str)}
    found = {key: text for key, text in found.items() if text}
    known = set(zip(items.latents["latent"], items.latents["tail"]))
    if found and not known & set(found):
        (name, tail), names = next(iter(found)), items.latents["latent"].unique()
        raise InputError(
            f"none of the {len(found)} explanations is about a latent of the items: the first is about {name!r}, tail "
            f"{tail!r}; {nearest(name, names)}"
        )
    return found


def shuffled(explanations: pd.DataFrame, *, random_state: int = 0) -> pd.DataFrame:
    """Explanations dealt to other latents, as a control: what a rater scores who knows nothing of the latent.

    No latent keeps its own (a random cyclic order); other latents may have had the same words.

    Raises
    ------
    InputError
        With fewer than two explanations.
    """
    if len(explanations) < 2:
        raise InputError("one explanation cannot be shuffled; explain at least two latents, or pass control=False")
    order = np.random.default_rng(random_state).permutation(len(explanations))
    text = explanations["text"].to_numpy(object).copy()
    text[order] = text[np.roll(order, 1)]
    return explanations.assign(text=text)


def trials(
    items: Items,
    explanations: Any,
    *,
    samples: Any,
    scorers: Sequence[str] = ("detection",),
    tokens: Any = None,
    random_state: int = 0,
) -> list[Trial]:
    """Questions on the scoring items, in random order.

    Parameters
    ----------
    items
        Of :func:`choose`.
    explanations
        Table of ``latent, tail, text``, or a mapping of latent to text; not used by ``intruder``.
    samples : biosae.Samples
        Where items are read from, when they are shown.
    scorers
        Of :data:`SCORERS`. ``detection``: does the item, shown plain, fit the explanation. ``fuzzing``: is the
        explanation true of the region marked in yellow; half of the regions are displaced. ``intruder``: which of five
        items, four active and one silent, is the odd one. ``simulation``: the activation in each cell of a grid.
    tokens : AnnData, optional
        Codes with a row a token, for ``fuzzing`` and ``simulation``.
    random_state
        Seed of the order, of the displacements and of the intruders.

    Raises
    ------
    InputError
        For an unknown scorer, or if tokens are needed.
    """
    unknown = [name for name in scorers if name not in SCORERS]
    if unknown:
        raise InputError(f"no scorer {unknown[0]!r}; {nearest(unknown[0], SCORERS)}")
    if tokens is None and any(name in ("fuzzing", "simulation") for name in scorers):
        raise InputError(
            "fuzzing and simulation look at where a latent fires: pass tokens=encode(sae, emb, tokens=None)"
        )
    maps = None if tokens is None else TokenMaps(tokens)
    written = texts(explanations, items)
    found: list[Trial] = []
    for number, (latent, tail) in enumerate(items.scored):
        rng = np.random.default_rng([random_state, number])
        for name in scorers:
            text = written.get((latent, tail))
            if text is not None or name == "intruder":
                found += SCORERS[name](items, latent, tail, text, samples, maps, rng)
    order = np.random.default_rng(random_state).permutation(len(found))
    return [found[i] for i in order]


def _detection(
    items: Items, latent: str, tail: str, text: str, samples: Any, maps: Any, rng: np.random.Generator
) -> list[Trial]:
    ask = f"A feature of such items is described as: {text}\n\nDoes this item show it?"
    return [
        Trial("detection", latent, tail, row.kind, row.group, row.kind == "active",
              Question(ask, (Picture(samples, row.sample_id),), "yes_no"))
        for row in items.of(latent, tail, "score").itertuples()
    ]  # fmt: skip


def _fuzzing(
    items: Items, latent: str, tail: str, text: str, samples: Any, maps: TokenMaps, rng: np.random.Generator
) -> list[Trial]:
    ask = f"A feature of such items is described as: {text}\n\nIs it what is marked in yellow?"
    rows = items.of(latent, tail, "score", "active").sample(frac=1, random_state=rng)
    found, right = [], True
    for row in rows.itertuples():
        grid = maps.grid(row.sample_id, latent, tail)
        if grid is None or not grid.any():
            continue
        moved = displaced(grid, rng=rng)
        if moved is None:  # it fires nearly everywhere, so the outline cannot be wrong
            continue
        marks = maps.marks(highlight(grid) if right else moved)
        question = Question(ask, (Picture(samples, row.sample_id, marks),), "yes_no")
        found.append(Trial("fuzzing", latent, tail, "active" if right else "random", row.group, right, question))
        right = not right
    return found


def _intruder(
    items: Items, latent: str, tail: str, text: str | None, samples: Any, maps: Any, rng: np.random.Generator
) -> list[Trial]:
    ask = "All of these items but one have something in common. Which is the odd one?"
    active = items.of(latent, tail, "score", "active")
    silent = items.of(latent, tail, "score", "random").sample(frac=1, random_state=rng)
    same = N_INTRUDER - 1
    found = []
    for odd, start in zip(silent.itertuples(), range(0, len(active) - same + 1, same)):
        others = active["sample_id"].iloc[start : start + same].tolist()  # neighbours in activation
        place = int(rng.integers(N_INTRUDER))
        shown = [others[i] for i in rng.permutation(same)]
        shown.insert(place, odd.sample_id)
        pictures = tuple(Picture(samples, name, caption=str(i + 1)) for i, name in enumerate(shown))
        question = Question(ask, pictures, "choice", (N_INTRUDER,))
        found.append(Trial("intruder", latent, tail, "random", odd.group, place + 1, question))
    return found


def _simulation(
    items: Items, latent: str, tail: str, text: str, samples: Any, maps: TokenMaps, rng: np.random.Generator
) -> list[Trial]:
    rows = pd.concat([items.of(latent, tail, "score", kind) for kind in ("active", "random")])
    grids = {row.sample_id: maps.grid(row.sample_id, latent, tail) for row in rows.itertuples()}
    blocks = maps.blocks(CELLS)
    grids = {name: coarse(grid, (blocks.rows, blocks.columns)) for name, grid in grids.items() if grid is not None}
    top = max((grid.max() for grid in grids.values()), default=0.0)
    if top == 0:
        return []
    ask = (
        f"A feature of such items is described as: {text}\n\nFor each cell of the yellow grid, row by row from the top "
        "left, how strongly is it there? 0: not at all, 10: as strongly as it ever is."
    )
    found = []
    for row in rows[rows["sample_id"].isin(list(grids))].itertuples():
        truth = level(grids[row.sample_id], top)
        question = Question(ask, (Picture(samples, row.sample_id, blocks),), "grid", truth.shape)
        found.append(Trial("simulation", latent, tail, row.kind, row.group, truth, question))
    return found


SCORERS: dict[str, Callable[..., list[Trial]]] = {
    "detection": _detection, "fuzzing": _fuzzing, "intruder": _intruder, "simulation": _simulation,
}  # fmt: skip
