"""Elements of a DICOM header: read without trusting them, and which of them may enter a table.

Values are taken from the file's bytes here, not through pydicom's conversions, whose errors and warnings quote them:
a message that quotes a value may quote a name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from biosae.data.items import ReadError
from biosae.errors import InputError, nearest

# VRs that hold persons, dates, unique identifiers, addresses or long free text: never copied while deidentify=True
IDENTIFYING_VRS = {
    "PN": "person names", "DA": "dates", "DT": "dates", "TM": "times", "UI": "unique identifiers",
    "AE": "network names", "LT": "free text", "ST": "free text", "UT": "free text", "UC": "free text",
    "UR": "addresses",
}  # fmt: skip
# LO and SH are short free text as well; these few elements describe the equipment or the picture
SAFE_TEXT = {
    "Manufacturer", "ManufacturerModelName", "SoftwareVersions", "ConvolutionKernel", "FilterType", "SequenceName",
    "ReceiveCoilName", "TransmitCoilName", "RescaleType", "EthnicGroup",
}  # fmt: skip
# Coded or numeric elements that the basic profile of DICOM PS3.15 (table E.1-1) removes all the same. What its
# "retain patient characteristics" option keeps (sex, age, size, weight, ...) is allowed when it is named.
IDENTIFYING_CODES = re.compile(r"GPS|Selector|PatientSexNeutered|InstanceOriginStatus|TypeOfPatientID")
OLDEST = 90.0  # years; higher ages are given as this one while deidentify=True (HIPAA safe harbour)

_NUMBERS = {"US": "u2", "SS": "i2", "UL": "u4", "SL": "i4", "UV": "u8", "SV": "i8", "FL": "f4", "FD": "f8"}
_AGES = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}
_BINARY = {"SQ", "OB", "OW", "OF", "OD", "OL", "OV", "UN", "AT"}


class Header:
    """Elements of a data set by keyword; a value that cannot be read is a :class:`ReadError` that does not quote it."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def raw(self, keyword: str) -> tuple[Any, str, bool]:
        """Value (bytes as in the file, None if absent), VR, and whether it is little endian."""
        from pydicom.datadict import dictionary_VR, tag_for_keyword

        tag = tag_for_keyword(keyword)
        if tag is None or tag not in self.dataset:
            return None, "", True
        element = self.dataset.get_item(tag)
        known = dictionary_VR(tag)
        vr = known if element.VR in (None, "UN") else element.VR
        return element.value, vr, getattr(element, "is_little_endian", True)

    def items(self, keyword: str, at: int | None = None) -> list[Header]:
        """Items of a sequence, or only its ``at``-th; empty if there is none."""
        if self.raw(keyword)[0] is None:
            return []
        value = self.dataset[keyword].value
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise ReadError("unreadable", f"{keyword} is no sequence")
        return [Header(item) for item in (value if at is None else value[at : at + 1])]

    def data(self, keyword: str, *, width: int) -> np.ndarray:
        """Values of a lookup table, stored as bytes (``width=8``) or 16-bit words."""
        value, _, little = self.raw(keyword)
        if not isinstance(value, bytes):
            raise ReadError("unreadable", f"{keyword} holds no table")
        if width == 8:
            return np.frombuffer(value, np.uint8)
        return np.frombuffer(value[: len(value) // 2 * 2], "<u2" if little else ">u2").astype(np.uint16)

    def bytes(self, keyword: str) -> bytes:
        """Value as in the file without padding; empty if absent."""
        value = self.raw(keyword)[0]
        if isinstance(value, str):
            value = value.encode("utf-8", "replace")
        return value.strip(b" \0") if isinstance(value, bytes) else b""

    def text(self, keyword: str) -> str | float:
        """Text without padding; NaN if absent or empty."""
        value = self.bytes(keyword)
        unicode = b"192" in self.bytes("SpecificCharacterSet")
        return value.decode("utf-8" if unicode else "latin-1", "replace").strip() or math.nan

    def numbers(self, keyword: str, *, signed: bool | None = None) -> list[float]:
        """Numbers of an element; empty if it is absent or empty.

        Parameters
        ----------
        signed
            For elements that are "US or SS" by the standard and whose file does not say which.
        """
        value, vr, little = self.raw(keyword)
        if value is None or value == b"":
            return []
        if not isinstance(value, bytes):
            value = str(value).encode()
        if vr in ("DS", "IS", "LO", "SH", "CS"):
            parts = value.strip(b" \0").split(b"\\")
            try:
                out = [float(p) for p in parts if p.strip(b" \0")]
            except ValueError:
                raise ReadError("unreadable", f"{keyword} holds no number") from None
        else:
            kind = _NUMBERS.get(vr) or ("i2" if signed else "u2" if "US" in vr else None)
            if kind is None or len(value) % int(kind[1]):
                raise ReadError("unreadable", f"{keyword} holds no number")
            out = np.frombuffer(value, ("<" if little else ">") + kind).tolist()
        if not all(math.isfinite(v) for v in out):
            raise ReadError("unreadable", f"{keyword} is not finite")
        return out

    def numbers_or_none(self, keyword: str) -> list[float]:
        """Numbers of an element that pixels do not depend on; empty where they cannot be read."""
        try:
            return self.numbers(keyword)
        except ReadError:
            return []

    def number(self, keyword: str, default: float = math.nan, *, signed: bool | None = None) -> float:
        """First number of an element."""
        values = self.numbers(keyword, signed=signed)
        return values[0] if values else default

    def whole(self, keyword: str, default: int | None = None) -> int:
        """Whole number, at least 0; without ``default`` it must be there."""
        value = self.number(keyword, math.nan if default is None else default)
        if math.isnan(value):
            raise ReadError("unreadable", f"the header lacks {keyword}, without which pixels have no meaning")
        if value != int(value) or value < 0:
            raise ReadError("unreadable", f"{keyword} is not a whole number")
        return int(value)


def check_tags(tags: Sequence[str], *, deidentify: bool) -> list[str]:
    """Keywords that may be copied into a table.

    Raises
    ------
    InputError
        For unknown keywords, private elements, sequences and binary data; with ``deidentify`` for what identifies a
        person, place or time.
    """
    from pydicom.datadict import DicomDictionary, dictionary_VR, tag_for_keyword

    if isinstance(tags, str):
        raise InputError(f"tags={tags!r} must be a list of DICOM keywords: tags=[{tags!r}]")
    for keyword in tags:
        tag = tag_for_keyword(keyword)
        if tag is None:
            known = (entry[4] for entry in DicomDictionary.values() if entry[4])
            close = nearest(keyword, known).split("? ")[0]
            hint = f"; {close}?" if close.startswith("did") else ""
            raise InputError(
                f"tags: {keyword!r} is no keyword of the DICOM dictionary{hint} (private tags are not read)"
            )
        vrs = dictionary_VR(tag).split(" or ")
        if _BINARY & set(vrs) or tag >> 16 == 2:
            raise InputError(f"tags: {keyword} is no single value ({dictionary_VR(tag)}) and has no place in a table")
        why = _identifies(keyword, vrs[0])
        if deidentify and why:
            raise InputError(
                f"tags: {keyword} {why}, which deidentify=True keeps out of tables. If you may hold it there, pass "
                "deidentify=False; to group by it without showing it, pass patient='tag:PatientID' or the like"
            )
    return list(tags)


def _identifies(keyword: str, vr: str) -> str:
    if vr in IDENTIFYING_VRS:
        return f"holds {IDENTIFYING_VRS[vr]}"
    if vr in ("LO", "SH") and keyword not in SAFE_TEXT:
        return "holds free text"
    return "may identify a person or a place" if IDENTIFYING_CODES.search(keyword) else ""


def tag_value(header: Header, keyword: str, *, deidentify: bool) -> Any:
    """One element for a table: a number, an age in years, or text (several values joined by a backslash)."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    vr = dictionary_VR(tag_for_keyword(keyword))
    if vr == "AS":
        found = re.fullmatch(r"(\d{1,3})([DWMY])", str(header.text(keyword)))
        years = math.nan if found is None else int(found[1]) * _AGES[found[2]]
        return min(years, OLDEST) if deidentify and not math.isnan(years) else years
    if vr in ("DS", "IS") or vr in _NUMBERS or "US" in vr:
        values = header.numbers_or_none(keyword)
        return values[0] if len(values) == 1 else "\\".join(f"{v:g}" for v in values) or math.nan
    return header.text(keyword)


def tag_columns(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """``(role, keyword)`` of the roles that were given as ``"tag:<keyword>"``."""
    from pydicom.datadict import tag_for_keyword

    for role, value in names:
        if isinstance(value, str) and value.startswith("tag:"):
            keyword = value.removeprefix("tag:")
            if tag_for_keyword(keyword) is None:
                raise InputError(f"{role}={value!r}: {keyword!r} is no keyword of the DICOM dictionary")
            yield role, keyword
