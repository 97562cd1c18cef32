"""Rating cards for people: a page of blinded questions, and the file of answers that it saves."""

from __future__ import annotations

import base64
import hashlib
import hmac
import html
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from biosae.data.items import ReadError
from biosae.errors import FormatError, InputError
from biosae.files import atomic_path, hash_json, read_json
from biosae.interpret.explain.questions import MAX_TEXT, Answer, Question
from biosae.interpret.explain.render import png

FORMAT = "biosae-answers-1"
LONGEST = 768
"""Longest side of a picture on a card, px."""
MOST_CARDS = 2000
"""Every card holds its picture: a page of more opens in no browser, and nobody answers it."""


class Cards:
    """People as a backend: :meth:`ask` writes the cards and returns the answers that are there so far.

    ``cards.html`` in the folder is one self-contained page that works without a network: questions in random order,
    answers by mouse, finger or keyboard, kept by the browser until they are saved as ``answers.json``. Put that file
    into the folder and call the same function again. There is no identifier, no activation and no latent's name on the
    page. Answers are joined to questions by id, so a set may be answered in several sittings. Ids are keyed with random
    bytes in the file ``.key`` of the folder, so that whoever has the page cannot check a guessed name; keep that file,
    and do not send it.

    Parameters
    ----------
    folder
        Where the page is written and ``answers*.json`` are looked for; with files of several people, name
        ``answers=`` of each in turn.
    rater
        Name of who answers, for the tables.
    answers
        Name of the file of answers in the folder.
    random_state
        Seed of the order.
    """

    def __init__(
        self, folder: str | os.PathLike, *, rater: str = "human", answers: str = "answers.json", random_state: int = 0
    ) -> None:
        self.folder, self.name, self.answers, self.random_state = Path(folder), rater, answers, random_state

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Write the page; the answers of ``answers.json``, missing where there is none yet.

        Raises
        ------
        FormatError
            If the file of answers is not one that the page saved.
        InputError
            For grids, which nobody fills in by hand, and for more cards than a page can hold.
        """
        if any(q.form == "grid" for q in questions):
            raise InputError("simulation is not for people: 49 numbers a card; leave it out of scorers=")
        if len(questions) > MOST_CARDS:
            raise InputError(
                f"{len(questions):,} cards are too many for one page (at most {MOST_CARDS:,}): choose fewer "
                "latents= or items, or control=False"
            )
        found = read_answers(self.folder / self.answers)
        order = np.random.default_rng(self.random_state).permutation(len(questions))
        names = [self.id(question) for question in questions]
        cards = {names[i]: questions[i] for i in order}
        with atomic_path(self.folder / "cards.html") as temporary:
            temporary.write_text(_page(cards), encoding="utf-8")
        return [Answer(found[name]) if name in found else Answer(None, "not answered") for name in names]

    def id(self, question: Question) -> str:
        """Id of a question on the page of this folder, 16 hexadecimal digits."""
        file = self.folder / ".key"
        if not file.is_file():
            with atomic_path(file) as temporary:
                temporary.write_text(secrets.token_hex(16), encoding="utf-8")
                temporary.chmod(0o600)
        return hmac.new(file.read_bytes(), question.id.encode(), hashlib.sha256).hexdigest()[:16]


def read_answers(path: str | os.PathLike) -> dict[str, str]:
    """Question id to answer, of a file that the page saved; empty if there is no such file.

    Raises
    ------
    FormatError
        If the file is something else.
    """
    if not Path(path).is_file():
        return {}
    value = read_json(path)
    answers = value.get("answers") if isinstance(value, dict) and value.get("format") == FORMAT else None
    if not isinstance(answers, dict) or not all(isinstance(text, str) for text in answers.values()):
        raise FormatError(f"{os.fspath(path)} was not saved by cards.html; press 'Save answers' on the page")
    return {str(key): text[:MAX_TEXT] for key, text in answers.items()}


def _page(cards: Mapping[str, Question]) -> str:
    shown = "\n".join(_card(i, name, question, len(cards)) for i, (name, question) in enumerate(cards.items(), 1))
    key = hash_json(list(cards))[:16]
    return (
        _PAGE.replace("%KEY%", json.dumps(key))
        .replace("%FORMAT%", json.dumps(FORMAT))
        .replace("%N%", str(len(cards)))
        .replace("%CARDS%", shown)
    )


def _card(number: int, name: str, question: Question, n: int) -> str:
    try:
        data = base64.b64encode(png(question.image(), longest=LONGEST)).decode()
        picture = f'<img src="data:image/png;base64,{data}" alt="item of card {number}" loading="lazy">'
    except ReadError as error:
        picture = f"<p>This item cannot be read ({html.escape(error.reason)}). Leave it out.</p>"
    text = "".join(f"<p>{html.escape(part)}</p>" for part in question.text.split("\n") if part)
    name = f"q-{name}"
    if question.form == "text":
        fields = f'<input type="text" name="{name}" maxlength="{MAX_TEXT}" aria-label="answer of card {number}">'
    else:
        values = ("yes", "no") if question.form == "yes_no" else tuple(str(i + 1) for i in range(question.size[0]))
        fields = "".join(
            f'<label><input type="radio" name="{name}" value="{value}"> {value}</label>' for value in values
        )
    return (
        f'<section><h2>Card {number} of {n}</h2><div class="card">{picture}<fieldset><legend>{text}</legend>'
        f"{fields}</fieldset></div></section>"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Rating cards</title>
<style>
:root{color-scheme:light dark;--ink:#1b1b1b;--paper:#fff;--line:#767676;--bar:#f1f1ee}
@media (prefers-color-scheme:dark){:root{--ink:#ececec;--paper:#161616;--line:#8d8d8d;--bar:#242424}}
body{font:16px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:0}
main{max-width:62rem;margin:0 auto;padding:0 1rem 4rem}
header{position:sticky;top:0;background:var(--bar);border-bottom:1px solid var(--line);z-index:1}
header div{max-width:62rem;margin:0 auto;padding:.5rem 1rem;display:flex;gap:1rem;align-items:center;flex-wrap:wrap}
h1{font-size:1.1rem;margin:0;flex:1 1 auto}h2{font-size:1rem;margin:2rem 0 .5rem}
.card{display:flex;gap:1.5rem;flex-wrap:wrap;align-items:flex-start}
img{max-width:100%;min-width:14rem;image-rendering:auto}
fieldset{border:0;padding:0;margin:0;flex:1 1 16rem;min-width:0}legend{padding:0}legend p{margin:0 0 .6rem}
label{display:inline-block;border:1px solid var(--line);border-radius:4px;padding:.5rem .9rem;margin:0 .4rem .4rem 0}
label:has(:checked){outline:3px solid currentColor}
input[type=text]{width:100%;box-sizing:border-box;font:inherit;padding:.5rem;color:inherit;background:transparent;
border:1px solid var(--line);border-radius:4px}
button{font:inherit;padding:.5rem .9rem}
:focus-visible{outline:3px solid #2a6fdb;outline-offset:2px}
</style></head><body>
<header><div><h1>Rating cards</h1><span id="done" role="status"></span>
<button type="button" id="save">Save answers</button></div></header>
<main><p>Answer by what you see. Leave a card open if you cannot tell. The browser keeps your answers; when you are
done, or for today, save them and send the file back.</p>
<form id="form">%CARDS%</form></main>
<script>
"use strict";
const key="biosae-cards-"+%KEY%, form=document.getElementById("form"), done=document.getElementById("done");
const read=()=>{const a={};for(const [k,v] of new FormData(form))if(v)a[k.slice(2)]=v;return a;};
const show=()=>{done.textContent=Object.keys(read()).length+" of %N% answered";};
try{const kept=JSON.parse(localStorage.getItem(key)||"{}");
for(const e of form.elements){const v=kept[(e.name||"").slice(2)];
if(v===undefined)continue;if(e.type==="radio")e.checked=e.value===v;else e.value=v;}}catch(e){}
form.addEventListener("submit",e=>e.preventDefault());
form.addEventListener("input",()=>{show();try{localStorage.setItem(key,JSON.stringify(read()));}catch(e){}});
document.getElementById("save").addEventListener("click",()=>{
const text=JSON.stringify({format:%FORMAT%,answers:read()},null,1);
const link=document.createElement("a");link.href=URL.createObjectURL(new Blob([text],{type:"application/json"}));
link.download="answers.json";link.click();setTimeout(()=>URL.revokeObjectURL(link.href),1000);});
show();
</script></body></html>
"""
