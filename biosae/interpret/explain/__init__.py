"""Explanations of latents, and how well they foretell where a latent fires in patients they were not written from."""

from __future__ import annotations

from biosae.interpret.explain.cards import Cards, read_answers
from biosae.interpret.explain.endpoint import Endpoint
from biosae.interpret.explain.items import Items, choose
from biosae.interpret.explain.questions import Answer, Ask, Backend, Picture, Question, parse
from biosae.interpret.explain.raters import Coin, Oracle
from biosae.interpret.explain.running import Evaluation, evaluate
from biosae.interpret.explain.score import MEASURES, STATUS, confusion, ppv, score, score_embedding, summary
from biosae.interpret.explain.template import AppearanceRater, template
from biosae.interpret.explain.trials import SCORERS, Trial, shuffled, trials
from biosae.interpret.explain.writing import write

__all__ = [
    "MEASURES", "SCORERS", "STATUS", "Answer", "AppearanceRater", "Ask", "Backend", "Cards", "Coin", "Endpoint",
    "Evaluation", "Items", "Oracle", "Picture", "Question", "Trial", "choose", "confusion", "evaluate", "parse", "ppv",
    "read_answers", "score", "score_embedding", "shuffled", "summary", "template", "trials", "write",
]  # fmt: skip
