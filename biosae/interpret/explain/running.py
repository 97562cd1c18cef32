"""The whole way: explanations, questions, answers, scores, and the control with shuffled explanations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from biosae.interpret.explain.items import Items
from biosae.interpret.explain.questions import Backend
from biosae.interpret.explain.score import score, summary
from biosae.interpret.explain.trials import shuffled, texts, trials


@dataclass(frozen=True)
class Evaluation:
    """``scores``: one row a latent, tail, scorer and ``explanations`` (``own``, ``shuffled``); ``summary``: their
    distribution; ``rater``: who answered; ``usage``: what it had taken by then, where the backend counts it.
    """

    scores: pd.DataFrame
    summary: pd.DataFrame
    rater: str
    usage: dict[str, Any] | None


def evaluate(
    items: Items,
    explanations: Any,
    *,
    backend: Backend,
    samples: Any,
    scorers: Sequence[str] = ("detection",),
    tokens: Any = None,
    control: bool = True,
    random_state: int = 0,
) -> Evaluation:
    """Let a rater answer all questions on the scoring patients, and score the answers.

    Parameters
    ----------
    items, explanations, samples, scorers, tokens, random_state
        As in :func:`biosae.interpret.explain.trials`.
    backend
        Who answers.
    control
        Also ask everything with explanations shuffled across latents: what this rater scores without a true
        explanation. It doubles the questions. ``intruder`` uses no explanation and has no control.

    Raises
    ------
    InputError, EndpointError, TooManyFailuresError
        From :func:`trials` and the backend.
    """
    sets = {"own": (explanations, list(scorers))}
    told = [name for name in scorers if name != "intruder"]
    if control and told:
        written = [(latent, tail, text) for (latent, tail), text in texts(explanations, items).items()]
        table = pd.DataFrame(written, columns=["latent", "tail", "text"])
        sets["shuffled"] = (shuffled(table, random_state=random_state), told)
    asked = {
        name: trials(items, table, samples=samples, scorers=which, tokens=tokens, random_state=random_state)
        for name, (table, which) in sets.items()
    }
    answers = iter(backend.ask([trial.question for part in asked.values() for trial in part]))
    tables = []
    for name, part in asked.items():
        said = [next(answers) for _ in part]
        found = score(part, said, items=items, scorers=sets[name][1], random_state=random_state)
        found.insert(0, "explanations", name)
        tables.append(found)
    scores = pd.concat(tables, ignore_index=True)
    usage = getattr(backend, "usage", None)
    return Evaluation(scores, summary(scores), backend.name, None if usage is None else dict(usage))
