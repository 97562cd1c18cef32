"""Explanations without a model: enriched terms of the metadata, appearance, extent, and the nearest concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.items import ReadError
from biosae.errors import InputError, nearest
from biosae.interpret.explain.appearance import WORDS, measures
from biosae.interpret.explain.items import IDENTIFIER, TAILS, Items
from biosae.interpret.explain.maps import TokenMaps, highlight
from biosae.interpret.explain.questions import Answer, Question, cleaned, redacted
from biosae.interpret.explain.score import auroc
from biosae.stats import associate, ranked
from biosae.stats.ranking import strength

STRONG = 0.75
"""AUROC from which a measure of appearance is said: three quarters of the pairs of items are ordered by it."""
MAX_LEVELS = 30
MAX_TERMS = 3
Q = 0.05
EXTENT = ((0.1, "a small part of the item"), (0.4, "part of the item"), (1.01, "most of the item"))


@dataclass(frozen=True)
class Rule:
    """``measure`` above (``sign`` 1) or below (-1) a ``threshold``: the strongest single measure of appearance, cut
    where recall and specificity on the writing items are best."""

    measure: str
    sign: int
    threshold: float


def template(
    adata: Any,
    items: Items,
    *,
    samples: Any = None,
    terms: Sequence[str] = (),
    tokens: Any = None,
    concepts: Mapping[str, str] | None = None,
    groups: str = "patient",
    assume_independent: bool = False,
) -> pd.DataFrame:
    """Explanations in one sentence a latent, from writing patients alone.

    A sentence is put together from: the nearest concept; up to three terms of the metadata that go with the latent
    (:func:`biosae.stats.associate` on the writing patients' samples, each level of a label against the rest, q < 0.05
    over all latents and terms); how active items look beside silent ones (AUROC of at least 0.75, up to two measures);
    how much of an item the latent covers. A latent of which nothing can be said has no text, and is then not scored.

    Parameters
    ----------
    adata
        What ``items`` were chosen from.
    samples : biosae.Samples, optional
        For appearance.
    terms
        Columns of ``obs``: labels or numbers. Identifiers are refused.
    tokens : AnnData, optional
        Codes with a row a token, for extent.
    concepts
        Latent to the name of its nearest concept, found elsewhere.
    groups, assume_independent
        As in :func:`choose`.

    Returns
    -------
    DataFrame
        ``latent, tail, text, source`` (``template``), ``terms``, ``rule`` (:class:`Rule` or None), ``n_unreadable``.

    Raises
    ------
    InputError
        For columns that are absent, are identifiers, or have more than 30 levels.
    StatisticsError
        As :func:`biosae.stats.associate`.
    """
    enriched = _enriched(adata, items, terms, groups, assume_independent)
    maps = None if tokens is None else TokenMaps(tokens)
    looks: dict[str, dict[str, float] | None] = {}
    rows = []
    for latent, tail in items.scored:
        part = items.of(latent, tail, "write")
        said = enriched.get((latent, tail), [])
        appearance, rule, unreadable = _appearance(part, samples, looks)
        pieces = [f"resembles {concepts[latent]}"] if concepts and latent in concepts else []
        pieces += [f"goes with {', '.join(said)}"] if said else []
        pieces += [f"{' and '.join(appearance)} than items without it"] if appearance else []
        extent = _extent(part, latent, tail, maps) if pieces else ""
        text = redacted(cleaned("; ".join([*pieces, extent] if extent else pieces)), items.identifiers)
        rows.append((latent, tail, text[:1].upper() + text[1:] or None, "template", "; ".join(said), rule, unreadable))
    return pd.DataFrame(rows, columns=["latent", "tail", "text", "source", "terms", "rule", "n_unreadable"])


def _enriched(
    adata: Any, items: Items, terms: Sequence[str], groups: str, assume_independent: bool
) -> dict[tuple[str, str], list[str]]:
    """Latent and tail to phrases of its terms, the strongest evidence first."""
    names = dict.fromkeys(latent for latent, _ in items.scored)
    if not terms or not names:
        return {}
    ids = (adata.obs["sample_id"] if "sample_id" in adata.obs else pd.Series(adata.obs.index)).astype(str).to_numpy()
    part = adata[np.isin(ids, list(items.write_ids)), list(names)].copy()
    targets: dict[str, tuple[str, str | None]] = {}
    for name in terms:
        if name not in part.obs:
            raise InputError(f"no column {name!r} in obs; {nearest(name, part.obs.columns)}")
        values = part.obs[name]
        number = pd.api.types.is_numeric_dtype(values) and values.nunique() > 2
        words = set() if number else set(values.dropna().astype(str).str.lower())
        if name == groups or IDENTIFIER.fullmatch(name) or words & items.identifiers:
            raise InputError(f"column {name!r} holds identifiers, which do not belong in an explanation; name others")
        if number:
            targets[name] = (f"higher {name}", f"lower {name}")
            continue
        if values.nunique() > MAX_LEVELS:
            raise InputError(f"column {name!r} has {values.nunique()} levels, more than {MAX_LEVELS}; group them first")
        for value in sorted(values.dropna().unique(), key=str):
            column = f"{name}={value}"
            part.obs[column] = np.where(values.isna(), np.nan, (values == value).astype(float))  # 1 over 0
            targets[column] = (f"{name} {value}", None)  # what it is rarer with is said by the other levels
    found: dict[tuple[str, str], list[str]] = {}
    table = associate(
        part, list(targets), unit="sample", groups=groups, controls=False, assume_independent=assume_independent
    )
    rows = ranked(table[table["q"] < Q])
    for latent, target, up in zip(rows["latent"], rows["target"], strength(rows) > 0):
        for tail in TAILS:
            phrase = targets[target][0 if up == (tail == "+") else 1]
            if phrase is not None and len(found.setdefault((latent, tail), [])) < MAX_TERMS:
                found[latent, tail].append(phrase)
    return found


def _appearance(
    part: pd.DataFrame, samples: Any, looks: dict[str, dict[str, float] | None]
) -> tuple[list[str], Rule | None, int]:
    """Words for the two strongest measures, the rule of the strongest, and how many items could not be read."""
    if samples is None:
        return [], None, 0
    for name in part["sample_id"]:
        if name not in looks:
            try:
                looks[name] = measures(np.asarray(samples[name]))
            except ReadError:
                looks[name] = None
    readable = part["sample_id"].map(lambda name: looks[name] is not None).to_numpy(bool)
    known = part[readable]
    truth = (known["kind"] == "active").to_numpy()
    table = pd.DataFrame([looks[name] for name in known["sample_id"]])
    area = {name: auroc(table[name].to_numpy(), truth) for name in table if table[name].notna().all()}
    area = {name: a for name, a in area.items() if max(a, 1 - a) >= STRONG}
    best = sorted(area, key=lambda name: -abs(area[name] - 0.5))[:2]
    words = [WORDS[name][0 if area[name] > 0.5 else 1] for name in best]
    if not best:
        return [], None, int((~readable).sum())
    sign = 1 if area[best[0]] > 0.5 else -1
    rule = Rule(best[0], sign, sign * _cut(sign * table[best[0]].to_numpy(), truth))
    return words, rule, int((~readable).sum())


def _cut(values: np.ndarray, truth: np.ndarray) -> float:
    """Threshold above which most true and fewest false values lie (largest recall plus specificity)."""
    order = np.sort(np.unique(values))
    cuts = (order[1:] + order[:-1]) / 2
    gain = [(values[truth] > cut).mean() - (values[~truth] > cut).mean() for cut in cuts]
    return float(cuts[int(np.argmax(gain))])


def _extent(part: pd.DataFrame, latent: str, tail: str, maps: TokenMaps | None) -> str:
    if maps is None:
        return ""
    grids = [maps.grid(name, latent, tail) for name in part.loc[part["kind"] == "active", "sample_id"]]
    shares = [highlight(grid).mean() for grid in grids if grid is not None and grid.any()]
    if not shares:
        return ""
    share = float(np.median(shares))
    return "in " + next(words for limit, words in EXTENT if share < limit)


class AppearanceRater:
    """Answers detection by the rule of appearance behind a template: what colour and texture alone explain.

    A baseline: an explanation of a person or of a model that does not score above it says no more than that.

    Parameters
    ----------
    explanations
        Of :func:`template`, with ``rule``. Where latents share a text, the rule of the first counts.
    """

    name = "appearance"

    def __init__(self, explanations: pd.DataFrame) -> None:
        rows = explanations[explanations["text"].notna()]
        self.rules: dict[str, Rule | None] = {}
        for text, rule in zip(rows["text"], rows["rule"]):
            self.rules.setdefault(text, rule)

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Yes or no by the measure and its threshold; nothing where the text has no rule."""
        longest = sorted(self.rules, key=len, reverse=True)
        looks: dict[str, dict[str, float] | str] = {}
        found = []
        for question in questions:
            text = next((text for text in longest if text in question.text), None)
            rule = None if text is None else self.rules[text]
            if question.form != "yes_no" or rule is None:
                found.append(Answer(None, "no rule of appearance"))
                continue
            name = question.pictures[0].sample_id
            if name not in looks:
                try:
                    looks[name] = measures(np.asarray(question.pictures[0].samples[name]))
                except ReadError as error:
                    looks[name] = f"unreadable item: {error.reason}"
            seen = looks[name]
            if isinstance(seen, str):
                found.append(Answer(None, seen))
            else:
                found.append(Answer("yes" if rule.sign * (seen[rule.measure] - rule.threshold) > 0 else "no"))
        return found
