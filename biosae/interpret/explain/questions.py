"""What a rater is asked: a text, pictures, and the form that the answer must have."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from biosae.files import hash_json
from biosae.interpret.explain.render import Marks, marked, sheet, to_rgb

FORMS = {
    "yes_no": "Answer with one word on the last line: yes or no.",
    "choice": "Answer with the number of one picture, alone on the last line.",
    "grid": "Answer with a JSON list of {rows} lists of {columns} whole numbers from 0 to 10, and nothing after it.",
    "text": "Answer with one sentence of at most 30 words on the last line.",
}
"""Form of an answer -> how a rater is told to give it."""
MAX_TEXT = 400
"""Longest explanation that is kept, in characters."""


@dataclass(frozen=True)
class Picture:
    """One item as it is shown; it is read when it is shown, not before.

    Attributes
    ----------
    samples
        :class:`biosae.Samples`; only ``samples[sample_id]`` and the facts on its kind are used.
    sample_id
        Never part of a prompt.
    marks : Marks or None
        Cells to outline, or a grid to draw over the item.
    caption : str
        Written above the item.
    """

    samples: Any
    sample_id: str
    marks: Marks | None = None
    caption: str = ""

    def array(self) -> np.ndarray:
        """The item, ``uint8 (H, W, 3)``.

        Raises
        ------
        ReadError
            If the item cannot be read.
        """
        item = np.asarray(self.samples[self.sample_id])
        return to_rgb(item) if self.marks is None else marked(item, self.marks, self.samples)


@dataclass(frozen=True)
class Question:
    """A text with pictures; ``form`` is a key of :data:`FORMS`, ``size`` what it depends on.

    ``size`` is the number of pictures to choose from, or the rows and columns of a grid.
    """

    text: str
    pictures: tuple[Picture, ...]
    form: str
    size: tuple[int, ...] = ()

    @property
    def prompt(self) -> str:
        """The text with the rule for the answer."""
        rule = FORMS[self.form]
        if self.form == "grid":
            rule = rule.format(rows=self.size[0], columns=self.size[1])
        return f"{self.text}\n\n{rule}"

    @property
    def id(self) -> str:
        """16 hexadecimal digits that depend on text, form and what is shown. They are not secret: who guesses the text
        and the names of the items can check the guess.
        """
        shown = [(p.sample_id, p.marks and p.marks.what, p.caption) for p in self.pictures]
        return hash_json([self.text, self.form, self.size, shown])[:16]

    def image(self) -> np.ndarray:
        """All pictures as one, ``uint8 (H, W, 3)``: the item itself if there is one without caption."""
        if len(self.pictures) == 1 and not self.pictures[0].caption:
            return self.pictures[0].array()
        return sheet([p.array() for p in self.pictures], [p.caption for p in self.pictures])


@dataclass(frozen=True)
class Answer:
    """What a rater said; ``text`` None where there is none, with the ``problem``."""

    text: str | None
    problem: str = ""


class Backend(Protocol):
    """Who answers questions: people, a model behind an endpoint, a rule, chance."""

    name: str

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer a question, in order."""


class Ask:
    """A function from a picture ``uint8 (H, W, 3)`` and a prompt to text, as a backend.

    >>> Ask(lambda image, prompt: "yes", name="always yes").name
    'always yes'
    """

    def __init__(self, function: Callable[[np.ndarray, str], str], *, name: str) -> None:
        self.function, self.name = function, name

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Call the function on each question; a picture that cannot be read is a missing answer."""
        from biosae.data.items import ReadError

        found = []
        for question in questions:
            try:
                image = question.image()
            except ReadError as error:
                found.append(Answer(None, f"unreadable item: {error.reason}"))
                continue
            found.append(Answer(self.function(image, question.prompt)))
        return found


def parse(text: str | None, form: str, size: tuple[int, ...] = ()) -> Any:
    """The answer in a text, or None where there is none that is clear.

    What a reasoning model thinks aloud (``<think> ... </think>``) is left out. ``yes_no`` and ``choice`` must be the
    whole of the last or the first line, begin it ("No, it is glass") or end it ("the answer is 3"): a "no" or a number
    inside a sentence is none, as in "I have no way to see pictures". Two different answers are none.

    >>> parse("It shows nuclei.\\n**Yes**", "yes_no"), parse("yes or no", "yes_no"), parse("Picture 3.", "choice", (5,))
    (True, None, 3)
    """
    import json

    if text is None:
        return None
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if "<think>" in text or not lines:  # it was cut off before it answered
        return None
    if form == "text":
        return cleaned(lines[-1]) or None
    if form == "grid":
        compact = re.sub(r"\[\s+\[", "[[", re.sub(r"\]\s+\]", "]]", text))
        start, end = compact.rfind("[["), compact.rfind("]]")
        try:
            values = np.asarray(json.loads(compact[start : end + 2]), dtype=float)
        except (ValueError, TypeError):
            return None
        return values if values.shape == tuple(size) and ((values >= 0) & (values <= 10)).all() else None
    ends = [re.sub(r"[*_`\"']", "", line).strip(" #>(){}[]").lower() for line in (lines[-1], lines[0])]
    found = {m[1] for line in ends for pattern in _STATED[form] if (m := re.search(pattern, line))}
    if len(found) != 1:
        return None
    (one,) = found
    if form == "yes_no":
        return one == "yes"
    return int(one) if 1 <= int(one) <= size[0] else None


_WHAT = r"(?:picture|image|item|number|option|panel)?\W*"
_STATED = {
    "yes_no": (
        r"^(?:(?:my |the )?(?:final )?answer(?: is)?\W+)?(yes|no)(?=$|[.,;:!]|\s+[-\u2013\u2014(])",
        r"(?:\bis|\banswer|[:=>])\s*(yes|no)[.!]?$",
    ),
    "choice": (
        rf"^{_WHAT}(?<![\d.,-])(\d+)(?:[.!)]*$| is (?:the )?(?:odd|different))",
        rf"(?:\bis|\banswer|[:=>])\s*{_WHAT}(?<![\d.,-])(\d+)[.!)]*$",
    ),
}
"""Form -> patterns of a line that states an answer, at its beginning and at its end."""


def cleaned(text: str) -> str:
    """An explanation on one line, without marks of layout or control characters, cut at :data:`MAX_TEXT`.

    >>> cleaned("  **Nuclei**\\n in\\x00 rows ")
    'Nuclei in rows'
    """
    text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(re.sub(r"[*`#]+", "", text).split())[:MAX_TEXT]


def redacted(text: str, identifiers: frozenset[str]) -> str:
    """A text in which no identifier stands as a word of its own; identifiers in lower case.

    >>> redacted("nuclei as in P-017, dense", frozenset({"p-017"}))
    'nuclei as in [removed], dense'
    """
    longest = max(map(len, identifiers), default=0)
    word = [c.isalnum() or c in "_-" for c in text]
    starts = [i for i in range(len(text)) if i == 0 or not word[i - 1]]
    ends = [i for i in range(1, len(text) + 1) if i == len(text) or not word[i]]
    found, done = [], 0
    for start in starts:
        if start < done:
            continue
        reach = [end for end in ends if start < end <= start + longest and text[start:end].lower() in identifiers]
        if reach:
            found += [text[done:start], "[removed]"]
            done = reach[-1]
    return "".join(found) + text[done:]
