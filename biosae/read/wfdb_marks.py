"""Annotation files of WFDB records: beats, rhythms, notes.

Follows annot(5) of the WFDB Applications Guide (MIT format).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from biosae.data.items import ReadError

SYMBOLS: dict[int, str] = dict(
    enumerate(["N", "L", "R", "a", "V", "F", "J", "A", "S", "E", "j", "/", "Q", "~"], 1)
) | {
    16: "|", 18: "s", 19: "T", 20: "*", 21: "D", 22: '"', 23: "=", 24: "p", 25: "B", 26: "^", 27: "t", 28: "+",
    29: "u", 30: "?", 31: "!", 32: "[", 33: "]", 34: "e", 35: "n", 36: "@", 37: "x", 38: "f", 39: "(", 40: ")", 41: "r",
}  # fmt: skip
"""Annotation code -> symbol."""

BEATS = tuple("NLRBAaJSVrFejnE/fQ?")
"""Symbols that mark beats."""

AAMI: dict[str, str] = {
    **dict.fromkeys("NLRBej", "N"), **dict.fromkeys("AaJSn", "S"), **dict.fromkeys("VEr", "V"), "F": "F",
    **dict.fromkeys("/fQ?", "Q"),
}  # fmt: skip
"""Symbol of a beat -> class of ANSI/AAMI EC57: normal and bundle branch block, supraventricular ectopic, ventricular
ectopic, fusion, paced or unknown. ``B``, ``n``, ``r`` and ``?`` do not occur in the MIT-BIH table of the standard; they
go to the class of their description."""

_SKIP, _NUM, _SUB, _CHN, _AUX, _NOTE, _RHYTHM = 59, 60, 61, 62, 63, 22, 28
_RATE = re.compile(r"## time resolution: (\d+\.?\d*)")
_DEFINED = re.compile(r"(\d+) (\S+) (.*)")
COLUMNS = ("onset", "duration", "label", "symbol", "note", "channel")


def read_marks(path: Path, *, rate: float, seconds: float) -> pd.DataFrame:
    """Annotations of a record, in order of time.

    Parameters
    ----------
    path
        Annotation file.
    rate
        Frames a second of the record (Hz), in which times count unless the file states a resolution of its own.
    seconds
        Length of the record.

    Returns
    -------
    ``onset`` and ``duration`` (s), ``label``, ``symbol``, ``note``, ``channel``. A change of rhythm (``+``) lasts until
    the next one or the record's end and has the rhythm as its label, without parenthesis (``"(AFIB"`` is ``"AFIB"``).
    Every other mark has no duration and its symbol as label.

    Raises
    ------
    ReadError
        ``missing``, ``empty``, ``truncated`` (no end mark), or ``unreadable`` (a mark lies outside the record).
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError):
        raise ReadError("missing", f"no annotation file {path.name}; pass annotator= another ending") from None
    if not data:
        raise ReadError("empty", f"{path.name} has no bytes")
    marks, stated, defined = _parse(path.name, np.frombuffer(data[: len(data) // 2 * 2], "<u2").tolist())
    table = pd.DataFrame(marks, columns=["sample", "code", "note", "channel"])
    table["symbol"] = table["code"].map({**SYMBOLS, **defined}).fillna(table["code"].map(lambda c: f"[{c}]"))
    table["onset"] = table["sample"] / (stated or rate)
    if len(table) and not (table["onset"].between(0, seconds + 1)).all():
        wrong = table.loc[~table["onset"].between(0, seconds + 1), "onset"].iloc[0]
        raise ReadError(
            "unreadable", f"{path.name} has a mark at {wrong:g} s of a record of {seconds:g} s: damaged, or of another"
        )
    table = table.sort_values("onset", kind="stable", ignore_index=True)
    table["label"], table["duration"] = table["symbol"], 0.0
    rhythm = (table["symbol"] == "+") & (table["note"].str.strip("() ") != "")
    starts = table.loc[rhythm, "onset"].to_numpy()
    ends = np.append(starts[1:], max(seconds, starts[-1])) if len(starts) else starts
    table.loc[rhythm, "duration"] = ends - starts
    table.loc[rhythm, "label"] = table.loc[rhythm, "note"].str.strip("() ")
    return table[list(COLUMNS)].drop_duplicates(["onset", "symbol", "label"], ignore_index=True)


def _parse(name: str, words: list[int]) -> tuple[list[list], float | None, dict[int, str]]:
    """Marks as ``[sample, code, note, channel]``, samples a second if stated, and codes that the file defines."""
    marks: list[list] = []
    time, channel, i = 0, 0, 0
    while True:
        if i >= len(words):
            raise ReadError("truncated", f"{name} has no end mark; copy the file again")
        code, value = words[i] >> 10, words[i] & 1023
        i += 1
        if code == 0 and value == 0:
            break
        if code == _SKIP:
            high, low = (*words[i : i + 2], 0, 0)[:2]
            time += (high << 16 | low) - (high >> 15 << 32)
            i += 2
        elif code == _CHN:
            channel = value
            if marks:
                marks[-1][3] = channel
        elif code == _AUX:
            text = b"".join(w.to_bytes(2, "little") for w in words[i : i + (value + 1) // 2])[:value]
            if marks:
                marks[-1][2] = text.split(b"\0")[0].decode("latin-1").strip()
            i += (value + 1) // 2
        elif code not in (_NUM, _SUB):
            time += value
            marks.append([time, code, "", channel])
    stated, defined = None, {}
    kept = []
    for mark in marks:
        if mark[0] == 0 and mark[1] == _NOTE and mark[2]:  # about the file
            found, entry = _RATE.match(mark[2]), _DEFINED.fullmatch(mark[2])
            stated = float(found[1]) if found else stated
            if entry and len(entry[1]) < 3:
                defined[int(entry[1])] = entry[2]
        elif mark[1]:
            kept.append(mark)
    return kept, stated or None, defined
