"""What the licence of the encoder allows: codes and dictionaries are made from its output and inherit its terms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from biosae.errors import InputError

UNKNOWN = "unknown"
HUB = {
    "apache-2.0": "apache-2.0", "mit": "mit", "bsd-3-clause": "bsd-3-clause", "gpl-3.0": "gpl-3.0",
    "cc-by-4.0": "cc-by-4.0", "cc-by-nc-4.0": "cc-by-nc-4.0", "cc-by-nc-nd-4.0": "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-4.0": "cc-by-nc-sa-4.0", "cc0-1.0": "cc0-1.0", UNKNOWN: UNKNOWN,
}  # fmt: skip
"""Licences that the Hugging Face hub has a name for, in lower case; all others are ``other`` with their own name."""
_FREE = ("cc0-1.0", "mit", "apache-2.0", "bsd-3-clause")


@dataclass(frozen=True)
class Terms:
    """Terms under which codes or a dictionary may be used and passed on. Of two encoders, both stand in a text."""

    encoder: str
    source: str
    repository: str
    """The encoder's own repository on the Hugging Face hub, empty where there is none."""
    licence: str
    derivatives_restricted: bool
    gated: bool
    confirmed: bool
    """Whether a source confirms licence and restrictions."""

    @property
    def statement(self) -> str:
        """The terms as sentences, for people."""
        if self.encoder == UNKNOWN and self.licence == UNKNOWN:
            return (
                "The encoder that the embeddings come from is not recorded, so its licence is unknown: find it out "
                "before this is passed on."
            )
        origin = f"the encoder {self.encoder}" + (f" ({self.source})" if self.source else "")
        parts = [f"Made from the output of {origin}; its licence applies here too: {self.licence}."]
        if self.licence == UNKNOWN:
            parts.append("An unknown licence permits nothing: ask the owners of the encoder before this is passed on.")
        if self.derivatives_restricted:
            parts.append(
                "The encoder's terms restrict derived works, such as codes and dictionaries: do not publish or pass on "
                "before its owners have agreed."
            )
        if self.gated:
            parts.append("The encoder is given only to people who accept its terms; receivers need to accept them too.")
        if not self.confirmed and self.licence != UNKNOWN:
            parts.append("No source confirms these terms in full: read them at the encoder's own page.")
        return " ".join(parts)

    @property
    def may_be_passed_on(self) -> bool:
        """False where the terms restrict it or nobody knows them."""
        return self.licence != UNKNOWN and not self.derivatives_restricted

    @property
    def hub_licence(self) -> str:
        """Identifier of the licence on the Hugging Face hub."""
        return HUB.get(self.licence.casefold(), "other")

    def to_dict(self) -> dict[str, Any]:
        """Plain values with the ``statement``, as every exported file holds them."""
        return {**asdict(self), "statement": self.statement}


def terms(identity: Mapping[str, Any] | None, *, licence: str | None = None) -> Terms:
    """Terms that an encoder's identity hands down.

    The stricter of two sources holds: what was recorded when the embeddings were made, and what the catalogue of
    encoders says now. Of two licences of which neither is known to be stricter, both are named. A licence without
    derivatives (``-ND``) restricts codes and dictionaries whatever was recorded besides.

    Parameters
    ----------
    identity
        Of embeddings, ``uns["biosae"]["identity"]`` or ``sae.identity_``; None or empty where nobody knows it.
    licence
        The encoder's licence where none is recorded.

    Raises
    ------
    InputError
        If ``licence`` differs from the one that is recorded: it is inherited, not chosen.

    Examples
    --------
    >>> terms({"encoder": "uni", "licence": "CC-BY-NC-ND-4.0"}).may_be_passed_on
    False
    """
    from biosae.encoders.catalog import canonical, catalogue

    identity = dict(identity or {})
    encoder = str(identity.get("encoder") or UNKNOWN)
    source = str(identity.get("source") or "")
    known = catalogue().get(canonical(encoder)) or next(
        (facts for facts in catalogue().values() if source.startswith("hf-hub:") and _same(facts.source, source)), None
    )
    recorded = _stricter(str(identity.get("licence") or UNKNOWN), known.licence if known else UNKNOWN)
    if licence is not None and recorded != UNKNOWN and not _same(licence, recorded):
        raise InputError(
            f"licence={licence!r}, but {encoder} is under {recorded!r}, which its codes and dictionaries inherit; "
            "leave licence out"
        )
    holds = recorded if recorded != UNKNOWN else (licence or "").strip() or UNKNOWN
    doubtful = () if known is None else {"licence", "derivatives_restricted", "gated"} & set(known.unconfirmed)
    source = source or (known.source if known else "")
    on_hub = source.removeprefix("hf-hub:") if source.startswith("hf-hub:") else None
    return Terms(
        encoder=encoder,
        source=source,
        repository=on_hub or (known.repository if known else None) or "",
        licence=holds,
        derivatives_restricted=bool(identity.get("derivatives_restricted"))
        or bool(known and known.derivatives_restricted)
        or _strictness(holds) == 4,
        gated=bool(known and known.gated),
        confirmed=known is not None and not doubtful,
    )


def inherited(facts: Mapping[str, Any], *, licence: str | None = None) -> Terms:
    """Terms of an SAE or of codes by what is written in them: those of the encoder, and of a second table's encoder.

    Parameters
    ----------
    facts
        ``config.json`` of an SAE, or ``uns["biosae"]`` of latents.
    licence
        The licence where none is recorded, of both encoders.
    """
    own = terms(facts.get("identity"), licence=licence)
    if not facts.get("partner_features"):
        return own
    partner = terms(facts.get("partner_identity"))
    if partner.licence == UNKNOWN:
        partner = terms(facts.get("partner_identity"), licence=licence)
    return joined(own, partner)


def joined(first: Terms, second: Terms) -> Terms:
    """Terms of what was made from two encoders: those of both apply, and what one does not permit is not permitted."""
    if first == second:
        return first
    unknown = UNKNOWN in (first.licence, second.licence)
    return Terms(
        encoder=_both(first.encoder, second.encoder),
        source=_both(first.source, second.source),
        repository=_both(first.repository, second.repository),
        licence=UNKNOWN if unknown else _both(first.licence, second.licence),
        derivatives_restricted=first.derivatives_restricted or second.derivatives_restricted,
        gated=first.gated or second.gated,
        confirmed=first.confirmed and second.confirmed,
    )


def _both(first: str, second: str) -> str:
    return " and ".join(dict.fromkeys(text for text in (first, second) if text))


def _same(first: str, second: str) -> bool:
    return first.strip().casefold() == second.strip().casefold()


def _strictness(licence: str) -> int:
    """0 free, 1 to name the authors, 2 to share alike, 3 not for commerce or in words of its own, 4 no derivatives."""
    text = licence.strip().casefold()
    if text in _FREE:
        return 0
    if re.search(r"\bnd\b|no.?deriv", text):
        return 4
    if re.fullmatch(r"cc-by-[\d.]+", text):
        return 1
    return 2 if re.fullmatch(r"cc-by-sa-[\d.]+|[al]?gpl-[\d.]+.*", text) else 3


def _stricter(first: str, second: str) -> str:
    """The stricter of two licences; both where neither is; the known one where the other is unknown."""
    if _same(first, second) or _same(second, UNKNOWN):
        return first
    if _same(first, UNKNOWN):
        return second
    ranks = _strictness(first), _strictness(second)
    return _both(first, second) if ranks[0] == ranks[1] else (first, second)[ranks[1] > ranks[0]]
