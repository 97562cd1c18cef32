"""Raters whose score is known beforehand: one that knows every answer, and one that guesses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from biosae.interpret.explain.questions import Answer, Question


class Oracle:
    """Answers the questions of the given trials (these objects) rightly; its score must be 1."""

    name = "oracle"

    def __init__(self, trials: Sequence[Any]) -> None:
        self.trials = list(trials)
        # by object: two latents with the same words may ask the same of one item, with different truths
        self.truth = {id(t.question): t.truth for t in self.trials}

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """The truth, in the form that is asked for; nothing where a question is not of these trials."""
        found = []
        for question in questions:
            truth = self.truth.get(id(question))
            if truth is None:
                found.append(Answer(None, "not of these trials"))
            elif question.form == "yes_no":
                found.append(Answer("yes" if truth else "no"))
            else:
                found.append(Answer(str(np.asarray(truth).tolist())))
        return found


class Coin:
    """Guesses; its score must be chance on average."""

    name = "coin"

    def __init__(self, *, random_state: int = 0) -> None:
        self.random_state = random_state

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Yes or no, a picture, or levels, each with the same probability."""
        rng = np.random.default_rng(self.random_state)
        draw = {
            "yes_no": lambda size: ("no", "yes")[rng.integers(2)],
            "choice": lambda size: str(rng.integers(1, size[0] + 1)),
            "grid": lambda size: str(rng.integers(0, 11, size).tolist()),
            "text": lambda size: "something that it shows",
        }
        return [Answer(draw[q.form](q.size)) for q in questions]
