"""What the licence of the encoder allows: codes and dictionaries are made from its output and inherit its terms."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Terms:
    """Terms under which codes or a dictionary may be used and passed on."""

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
    encoders says now.

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
    from biosae.encoders.catalog import catalogue

    identity = dict(identity or {})
    encoder = str(identity.get("encoder") or UNKNOWN)
    known = catalogue().get(encoder)
    recorded = str(identity.get("licence") or (known.licence if known else None) or UNKNOWN)
    if licence is not None and recorded not in (UNKNOWN, licence):
        raise InputError(
            f"licence={licence!r}, but {encoder} is under {recorded!r}, which its codes and dictionaries inherit; "
            "leave licence out"
        )
    doubtful = () if known is None else {"licence", "derivatives_restricted", "gated"} & set(known.unconfirmed)
    source = str(identity.get("source") or (known.source if known else ""))
    on_hub = source.removeprefix("hf-hub:") if source.startswith("hf-hub:") else None
    return Terms(
        encoder=encoder,
        source=source,
        repository=on_hub or (known.repository if known else None) or "",
        licence=licence or recorded,
        derivatives_restricted=bool(identity.get("derivatives_restricted"))
        or bool(known and known.derivatives_restricted),
        gated=bool(known and known.gated),
        confirmed=known is not None and not doubtful,
    )
