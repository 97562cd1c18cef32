"""Terms that contain each other: an ontology from an OBO file or a table of parents."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from biosae.errors import FormatError, InputError


class Ontology:
    """Terms, their names, and the broader terms that contain them.

    Parameters
    ----------
    parents
        Term to its broader term, or to several. A term that is only named as a parent is a root.
    names
        Term to name; by default the term itself.

    Raises
    ------
    InputError
        If a term contains itself.

    Examples
    --------
    >>> cells = Ontology({"T cell": "lymphocyte", "B cell": "lymphocyte", "lymphocyte": "leukocyte"})
    >>> cells.ancestors("T cell")
    ['lymphocyte', 'leukocyte']
    """

    def __init__(self, parents: Mapping[str, str | Iterable[str]], *, names: Mapping[str, str] | None = None) -> None:
        self.parents = {
            str(t): list(dict.fromkeys([p] if isinstance(p, str) else map(str, p))) for t, p in parents.items()
        }
        for broader in list(self.parents.values()):
            for term in broader:
                self.parents.setdefault(term, [])
        self.names = {t: t for t in self.parents} | dict(names or {})
        self._ids: dict[str, str] = {}
        for term, name in self.names.items():
            self._ids.setdefault(name.casefold(), term)
        self._depth = self._depths()

    def _depths(self) -> dict[str, int]:
        """Longest way from each term up to a root, narrower terms after broader ones."""
        depth: dict[str, int] = {}
        waiting = {t: len(p) for t, p in self.parents.items()}
        narrower: dict[str, list[str]] = {t: [] for t in self.parents}
        for term, broader in self.parents.items():
            for one in broader:
                narrower[one].append(term)
        ready = [t for t, n in waiting.items() if n == 0]
        while ready:
            term = ready.pop()
            depth[term] = max((depth[p] + 1 for p in self.parents[term]), default=0)
            for one in narrower[term]:
                waiting[one] -= 1
                if waiting[one] == 0:
                    ready.append(one)
        if len(depth) < len(self.parents):
            stuck = min(set(self.parents) - set(depth))
            raise InputError(f"the ontology has a circle: {stuck!r} lies above itself")
        return depth

    def __len__(self) -> int:
        return len(self.parents)

    def term(self, label: str) -> str | None:
        """The term with this id or (whatever its case) this name; None if there is none."""
        return label if label in self.parents else self._ids.get(str(label).casefold())

    def depth(self, term: str) -> int:
        """Longest way up to a root."""
        return self._depth[term]

    def ancestors(self, term: str) -> list[str]:
        """All broader terms, nearest first, without the term itself."""
        found: dict[str, None] = {}
        level = self.parents[term]
        while level:
            found |= dict.fromkeys(level)
            level = [p for t in level for p in self.parents[t]]
        return list(found)


def read_obo(path: str | os.PathLike, *, relations: Iterable[str] = ("is_a",)) -> Ontology:
    """Read the terms of an OBO file (Cell Ontology, Uberon, Disease Ontology, ...).

    Parameters
    ----------
    path
        UTF-8 text; format 1.2 or 1.4. Obsolete terms are left out.
    relations
        What makes a term broader: ``is_a``, and names of relationships such as ``part_of``.

    Raises
    ------
    FormatError
        If the file is absent, not OBO, or has a circle.
    """
    path, relations = Path(path), set(relations)
    if not path.is_file():
        raise FormatError(f"{path} does not exist")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text ({error}); give the .obo file of the ontology") from None
    parents: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    stanza: list[tuple[str, str]] | None = None
    for line in [*lines, "[end]"]:
        line = line.strip()
        if line.startswith("["):
            _keep(stanza, relations, parents, names)
            stanza = [] if line == "[Term]" else None
        elif stanza is not None and ":" in line and not line.startswith("!"):
            key, _, value = line.partition(":")
            stanza.append((key.strip(), value.split(" !")[0].strip()))
    if not parents:
        raise FormatError(f"{path} holds no [Term]; give the .obo file of the ontology, not .owl or .json")
    dropped = {p for broader in parents.values() for p in broader} - set(parents)
    kept = {t: [p for p in broader if p not in dropped] for t, broader in parents.items()}
    try:
        return Ontology(kept, names=names)
    except InputError as error:
        raise FormatError(f"{path}: {error}") from None


def _keep(
    stanza: list[tuple[str, str]] | None, relations: set[str], parents: dict[str, list[str]], names: dict[str, str]
) -> None:
    """Add a finished term."""
    if not stanza or ("is_obsolete", "true") in stanza:
        return
    ids = [v for k, v in stanza if k == "id"]
    if not ids:
        return
    broader = [v.split()[0] for k, v in stanza if k == "is_a" and "is_a" in relations and v]
    for key, value in stanza:
        words = value.split()
        if key == "relationship" and len(words) > 1 and words[0] in relations:
            broader.append(words[1])
    parents[ids[0]] = broader
    names[ids[0]] = next((v for k, v in stanza if k == "name"), ids[0])
