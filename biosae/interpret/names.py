"""Names and notes that readers give to latents: a small JSON file, taken into ``var`` and written from it.

The schema stands in docs/atlas-names.md. A file comes by mail from strangers, so nothing in it is believed: sizes,
types and latents are checked before anything is taken, and text is kept as plain text.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import FormatError, IdentityError, InputError, nearest
from biosae.files import write_json

FORMAT, VERSION = "biosae-names", 1
FIELDS = {"name": 200, "note": 10_000, "status": 40}
"""What is kept of each latent, and the most characters it may have."""
LARGEST_FILE = 32 * 2**20
ON_CONFLICT = ("error", "new", "old")
_KEPT = "\n\t\u200c\u200d"  # the last two join and part letters of Persian and Indic scripts


def dictionary_fingerprint(adata: Any) -> str:
    """SHA-256 of the latents' names and decoder directions: equal for all codes of one dictionary, whatever the cohort.

    Raises
    ------
    InputError
        If ``varm`` has no decoder.
    """
    if "decoder" not in adata.varm:
        raise InputError("varm has no 'decoder', so nobody can say whose latents these are; make them by bs.encode")
    digest = hashlib.sha256("\n".join(map(str, adata.var_names)).encode())
    digest.update(np.ascontiguousarray(adata.varm["decoder"], dtype="<f4").tobytes())
    return digest.hexdigest()


def read_names(
    file: str | os.PathLike, adata: Any, *, on_conflict: str = "error", other_dictionary: bool = False
) -> pd.DataFrame:
    """Take the names, notes and states of a file into ``adata.var`` (in place).

    Parameters
    ----------
    file
        JSON that the atlas or :func:`write_names` saved (docs/atlas-names.md).
    adata
        Latents of :func:`biosae.encode`. ``var`` gets the text columns ``name``, ``note`` and ``status`` (empty where
        nothing is known), which search, figures and exports use.
    on_conflict
        Where ``var`` holds another text than the file: ``"error"`` takes nothing of the file, ``"new"`` takes the
        file's, ``"old"`` keeps that of ``var``. An empty text of the file says nothing and never deletes.
    other_dictionary
        True takes names that were given to another dictionary. Latents with the same number then have nothing else in
        common, unless you know better.

    Returns
    -------
    DataFrame
        One row a text of the file: ``latent, field, text, before, change`` (``new``, ``same``, ``replaced``, ``kept``).

    Raises
    ------
    FormatError
        If the file is not of this format, too large, of a newer version or damaged; nothing is taken then.
    IdentityError
        If the names were given to another dictionary.
    InputError
        For a latent that is not in ``adata``, a name that is the number of another latent, or a conflict.

    Examples
    --------
    >>> read_names("names.json", adata, on_conflict="new")  # doctest: +SKIP
    >>> bs.search.by_property(adata, "high 'plasma cells'")  # doctest: +SKIP
    """
    if on_conflict not in ON_CONFLICT:
        raise InputError(f"on_conflict={on_conflict!r} is unknown; {nearest(on_conflict, ON_CONFLICT)}")
    content = _load(Path(file))
    given = _entries(content, Path(file))
    if content["fingerprint"] != dictionary_fingerprint(adata) and not other_dictionary:
        raise IdentityError(
            f"{file} names the latents of another dictionary; open the atlas of this run, or pass "
            "other_dictionary=True if you know that the latents are the same"
        )
    numbers = {str(latent).casefold(): str(latent) for latent in adata.var_names}
    for latent, texts in given.items():
        if latent not in adata.var_names:
            raise InputError(
                f"{file}: there is no latent {latent[:40]!r} here; {nearest(latent[:40], adata.var_names)}"
            )
        other = numbers.get(_seen(texts.get("name", "")), latent)
        if other != latent:
            raise InputError(f"{file}: the name of {latent} is {other!r}, which is another latent; choose another name")
    held = {field: _column(adata.var, field) for field in FIELDS}
    rows = [
        {"latent": latent, "field": field, "text": text, "before": held[field][latent]}
        for latent, texts in given.items()
        for field, text in texts.items()
    ]
    table = pd.DataFrame(rows, columns=["latent", "field", "text", "before"])
    changed = {"error": "conflict", "new": "replaced", "old": "kept"}[on_conflict]
    table["change"] = np.select([table["before"] == "", table["before"] == table["text"]], ["new", "same"], changed)
    conflicts = table[table["change"] == "conflict"]
    if len(conflicts):
        shown = "; ".join(f"{r.latent} {r.field} {r.before!r}, file {r.text!r}" for r in conflicts[:3].itertuples())
        raise InputError(
            f"{file} and var differ in {len(conflicts)} texts ({shown}); pass on_conflict='new' or 'old'. Nothing was "
            "taken"
        )
    for row in table[table["change"].isin(("new", "replaced"))].itertuples():
        held[row.field][row.latent] = row.text
    for field, column in held.items():
        adata.var[field] = column
    return table


def write_names(adata: Any, file: str | os.PathLike) -> None:
    """Write names, notes and states of ``adata.var`` as a file that :func:`read_names` and the atlas take.

    Raises
    ------
    InputError
        If a text is longer than the format allows, or ``varm`` has no decoder.
    """
    held = {field: _column(adata.var, field) for field in FIELDS}
    latents = []
    for latent in map(str, adata.var_names):
        texts = {field: _plain(column[latent], lines=field == "note") for field, column in held.items()}
        for field, text in texts.items():
            if len(text) > FIELDS[field]:
                raise InputError(f"{field} of {latent} has {len(text)} characters; shorten it to {FIELDS[field]}")
        if any(texts.values()):
            latents.append({"latent": latent, **texts})
    content = {"format": FORMAT, "version": VERSION, "fingerprint": dictionary_fingerprint(adata), "latents": latents}
    write_json(file, content)


def _load(file: Path) -> dict[str, Any]:
    """The file's object, with format, version and list checked."""
    try:
        size = file.stat().st_size
        if size > LARGEST_FILE:
            raise FormatError(f"{file} has {size} bytes; a file of names has at most {LARGEST_FILE}")
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        raise FormatError(f"{file} does not exist; save the names in the atlas first") from None
    except OSError as error:
        raise FormatError(f"{file} cannot be read ({error.strerror}); name the JSON file itself") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, absurd numbers or depth
        raise FormatError(f"{file} is not valid JSON ({str(error)[:200]}); save the names in the atlas again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FormatError(f"{file} is no file of names (its format is not {FORMAT!r})")
    version = content.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION:
        raise FormatError(f"{file} has version {str(version)[:20]}; this biosae reads {VERSION}: update biosae")
    if not isinstance(content.get("fingerprint"), str) or not isinstance(content.get("latents"), list):
        raise FormatError(f"{file}: 'fingerprint' must be text and 'latents' a list; save the names again")
    return content


def _entries(content: dict[str, Any], file: Path) -> dict[str, dict[str, str]]:
    """Latent -> field -> text, without empty texts."""
    out: dict[str, dict[str, str]] = {}
    for i, entry in enumerate(content["latents"]):
        latent = entry.get("latent") if isinstance(entry, dict) else None
        if not isinstance(latent, str):
            raise FormatError(f"{file}: entry {i} of 'latents' names no latent; save the names again")
        if latent in out:
            raise FormatError(f"{file}: latent {latent[:40]!r} occurs twice; keep one of both entries")
        out[latent] = {}
        for field, longest in FIELDS.items():
            text = entry.get(field)
            if text is not None and not isinstance(text, str):
                raise FormatError(f"{file}: {field} of {latent[:40]!r} is not text; save the names again")
            text = _plain(text or "", lines=field == "note")
            if len(text) > longest:
                raise FormatError(f"{file}: {field} of {latent[:40]!r} has over {longest} characters; shorten it")
            if text:
                out[latent][field] = text
    return out


def _plain(text: str, *, lines: bool = True) -> str:
    """Composed Unicode without control, direction-changing and half characters; blanks around it cut.

    ``lines``: line feeds and tabs are kept; otherwise any run of blanks becomes one.
    """
    text = str(text).replace("\r\n", "\n").replace("\r", "\n")
    kept = "".join(c for c in text if c in _KEPT or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    kept = unicodedata.normalize("NFC", kept)
    return kept.strip() if lines else " ".join(kept.split())


def _seen(name: str) -> str:
    """A name as it looks: letters of either case, without joiners that are not seen."""
    return "".join(c for c in name if c not in "\u200c\u200d").casefold()


def _column(var: pd.DataFrame, field: str) -> pd.Series:
    """Text of each latent, empty where there is none."""
    if field not in var:
        return pd.Series("", index=var.index, dtype=object)
    column = var[field].astype(object)
    return column.where(column.notna(), "").map(str)
