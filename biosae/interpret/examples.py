"""Items to look at for one latent: where it fires, how it fades out, and controls where it is silent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from biosae.errors import InputError, nearest

if TYPE_CHECKING:
    from anndata import AnnData

KINDS = ("top", "bottom", "spread", "active", "near", "inactive")
"""Kinds of examples, in the order in which they are chosen; an item is chosen once."""
_BLOCK = 8192  # rows of embeddings at once


def activation(adata: AnnData, latent: str) -> pd.Series:
    """Codes of one latent as a dense float32 series over the rows of ``adata``, indexed by their names.

    Raises
    ------
    InputError
        If there is no such latent.
    """
    if latent not in adata.var_names:
        raise InputError(f"no latent {latent!r}; {nearest(latent, adata.var_names)}")
    column = adata.X[:, adata.var_names.get_loc(latent)]
    values = column.toarray().ravel() if hasattr(column, "toarray") else np.asarray(column).ravel()
    return pd.Series(values, index=adata.obs_names, name=latent)


def examples(
    adata: AnnData,
    latent: str,
    *,
    n: int = 12,
    kinds: Sequence[str] = ("top", "spread", "active", "inactive", "near"),
    cap_per_patient: int | None = 2,
    cap_per_site: int | None = None,
    blinded: bool = False,
    random_state: int = 0,
) -> pd.DataFrame:
    """Choose items (tiles, slides, radiographs, windows of signals, photographs) that show what a latent means.

    The top alone flatters a latent: nearly every latent looks like something there. The other kinds say how it fades
    out, and what it does not fire on. Without a cap one patient often fills the top, and a latent of that patient
    looks like a latent of biology. No item is chosen twice, so a kind has none of those before it in ``KINDS``.

    Parameters
    ----------
    adata : AnnData of shape (n_rows, n_latents)
        Codes of :func:`biosae.encode`, or of units (:func:`biosae.stats.aggregate`). Where tokens are kept, items are
        samples: a sample is silent if all its tokens are, and ``row`` names the token that speaks for it.
    latent : str
    n : int
        Items of each kind.
    kinds : sequence of str
        Any of

        * ``"top"``: highest codes. Of signed codes ``"bottom"`` comes with it: the most negative ones,
        * ``"spread"``: the other active items in ``n`` classes of equal size by their code, one at random of each,
        * ``"active"``: random among the other active items (code not 0),
        * ``"near"``: near misses, silent items most like the top (and bottom) ones by embedding, found in turn for
          each of these; likeness is the cosine of ``obsm["embedding"]`` less its mean,
        * ``"inactive"``: random among the other silent items.

    cap_per_patient, cap_per_site : int or None
        Most items of one patient (one site) in each kind. Rows without a patient or site, and an ``obs`` without
        ``patient``, have no cap.
    blinded : bool
        For a reader who must not know: all kinds together in random order, with a running ``number`` and nothing that
        tells kinds apart. The same call without ``blinded`` is the key; join by ``row``.
    random_state : int
        Seed of the random kinds, and of the order.

    Returns
    -------
    DataFrame
        Columns ``kind``, ``sample_id``, ``row`` (name in ``adata.obs_names``), ``activation``, ``quantile`` (share of
        the active items with a lower code, ties count half; missing where silent), ``patient``, ``site`` (missing
        where unknown), and of near misses ``near_to`` (``sample_id`` of the example that it resembles) and
        ``similarity``. Fewer than ``n`` rows of a kind where the caps or the data leave fewer. If ``blinded``:
        ``number``, ``sample_id``, ``row``.

    Raises
    ------
    InputError
        For an unknown latent or kind, ``n`` or a cap below 1, a cap on sites that are unknown, or near misses without
        ``obsm["embedding"]``.

    Examples
    --------
    >>> chosen = bs.interpret.examples(adata, "L0042", n=8)  # doctest: +SKIP
    >>> chosen.groupby("kind")["patient"].nunique()  # doctest: +SKIP
    """
    shown, n = _shown(adata, kinds, n, cap_per_patient, cap_per_site), int(n)
    items = _Items(adata, activation(adata, latent).to_numpy())
    caps = [(items.levels(role), cap) for role, cap in (("patient", cap_per_patient), ("site", cap_per_site)) if cap]
    taken = np.zeros(items.count, dtype=bool)
    found: dict[str, pd.DataFrame] = {}
    for kind in KINDS:
        if kind in shown:
            rng = np.random.default_rng([random_state, KINDS.index(kind)])
            if kind == "near":
                free = np.zeros(items.count, dtype=bool)
                ends = [_take(items.ranked(end), free, caps, n=n) for end in ("top", "bottom")]
                order = _near(adata, items, np.concatenate([end["at"] for end in ends]))
            else:
                order = items.ranked(kind, rng, taken=taken, n=n)
            found[kind] = _take(order, taken, caps, n=n)
    table = _table(adata, items, {kind: found[kind] for kind in shown})
    if not blinded:
        return table
    mixed = table.iloc[np.random.default_rng([random_state, len(KINDS)]).permutation(len(table))]
    return (
        mixed[["sample_id", "row"]].reset_index(drop=True).assign(number=np.arange(len(table)) + 1).iloc[:, [2, 0, 1]]
    )


def _shown(
    adata: AnnData, kinds: Sequence[str], n: int, cap_per_patient: int | None, cap_per_site: int | None
) -> list[str]:
    """Kinds in the order asked for, ``bottom`` after ``top``; raises for what cannot be done."""
    kinds = [kinds] if isinstance(kinds, str) else list(dict.fromkeys(kinds))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise InputError(f"kinds={kinds} of examples; {nearest(unknown[0] if unknown else '', KINDS)}")
    for name, value in (("n", n), ("cap_per_patient", cap_per_patient), ("cap_per_site", cap_per_site)):
        if value is not None and (int(value) != value or value < 1):
            raise InputError(
                f"{name}={value!r} must be a whole number of at least 1" + (" or None" if name != "n" else "")
            )
    if cap_per_site is not None and "site" not in adata.obs:
        raise InputError("cap_per_site needs obs['site']; name the role site= when reading, or leave the cap out")
    if "near" in kinds and "embedding" not in adata.obsm:
        raise InputError(
            "near misses need obsm['embedding']: encode with keep_embedding=True, or leave 'near' out of kinds="
        )
    return [k for kind in kinds for k in ((kind, "bottom") if kind == "top" and "bottom" not in kinds else (kind,))]


class _Items:
    """Samples, and for each the row that speaks for it: its only one, or its token with the highest, lowest or largest
    code."""

    def __init__(self, adata: AnnData, values: np.ndarray) -> None:
        self.obs, self.values = adata.obs, values
        ids = self.obs["sample_id"] if "sample_id" in self.obs else self.obs.index.to_series()
        self.sample, names = pd.factorize(ids.astype(str))
        self.names, self.count = np.asarray(names, dtype=object), len(names)
        self.highest, self.lowest, self.largest = (self.first(key) for key in (-values, values, -np.abs(values)))
        self.silent = values[self.largest] == 0

    def first(self, key: np.ndarray) -> np.ndarray:
        """Row of each sample with the least key."""
        if self.count == len(key):
            return np.arange(self.count)
        order = np.lexsort((key, self.sample))
        return order[np.searchsorted(self.sample[order], np.arange(self.count))]

    def levels(self, role: str) -> np.ndarray | None:
        """Number of each sample's patient or site, -1 where it is missing; None if the role is unknown."""
        return pd.factorize(self.obs[role])[0][self.largest] if role in self.obs else None

    def ranked(
        self, kind: str, rng: np.random.Generator | None = None, *, taken: np.ndarray | None = None, n: int = 0
    ) -> pd.DataFrame:
        """Samples of a kind in the order in which they are offered: columns ``item``, ``at`` (row) and, where only one
        of several may be taken, ``part``."""
        if kind in ("top", "bottom"):
            at, sign = (self.highest, 1) if kind == "top" else (self.lowest, -1)
            strength = sign * self.values[at]
            order = np.argsort(-strength, kind="stable")
            item = order[strength[order] > 0]
        elif kind == "inactive":
            at = self.first(rng.random(len(self.values)))
            item = rng.permutation(np.flatnonzero(self.silent))
        else:
            at, item = self.largest, rng.permutation(np.flatnonzero(~self.silent))
            if kind == "spread":
                item = item[~taken[item]]
                rising = item[np.argsort(self.values[at[item]], kind="stable")]
                parts = np.array_split(rising, max(1, min(n, len(rising))))
                item = np.concatenate([rng.permutation(part) for part in parts])
                part = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
                return pd.DataFrame({"item": item, "at": at[item], "part": part})
        return pd.DataFrame({"item": item, "at": at[item]})


def _near(adata: AnnData, items: _Items, anchors: np.ndarray) -> pd.DataFrame:
    """Silent samples, those most like the first anchor, the second, ... , then the second most like each."""
    embedding = np.asarray(adata.obsm["embedding"])
    rows = np.flatnonzero(items.silent[items.sample])
    if not len(anchors) or not len(rows):
        return pd.DataFrame(columns=["item", "at", "near_to", "similarity"])
    gaps = int((~np.isfinite(embedding)).any(axis=1).sum())
    if gaps:
        raise InputError(f"{gaps} rows of obsm['embedding'] are not numbers throughout; drop them, or leave 'near' out")
    mean = embedding.mean(axis=0, dtype=np.float64).astype(np.float32)
    directions = _unit(embedding[anchors] - mean).T
    blocks = (rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK))
    cosine = np.concatenate([_unit(embedding[block] - mean) @ directions for block in blocks])
    order = np.argsort(-cosine, axis=0, kind="stable")  # (silent rows, anchors)
    at, anchor = rows[order.ravel()], np.tile(np.arange(len(anchors)), len(rows))
    near_to = items.names[items.sample[anchors]][anchor]
    return pd.DataFrame(
        {"item": items.sample[at], "at": at, "near_to": near_to, "similarity": cosine[order.ravel(), anchor]}
    )


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)


def _take(order: pd.DataFrame, taken: np.ndarray, caps: list[tuple[np.ndarray | None, int]], *, n: int) -> pd.DataFrame:
    """The first ``n`` that are not taken and keep to the caps; marks them as taken."""
    counts = [np.zeros(levels.max() + 1 if levels is not None else 0, dtype=int) for levels, _ in caps]
    part = order["part"].to_numpy() if "part" in order else None
    filled: set[int] = set()
    kept: list[int] = []
    for place, item in enumerate(order["item"].to_numpy()):
        if len(kept) == n:
            break
        if taken[item] or (part is not None and part[place] in filled):
            continue
        own = [(c, levels[item], cap) for c, (levels, cap) in zip(counts, caps) if levels is not None]
        own = [(c, level, cap) for c, level, cap in own if level >= 0]
        if any(c[level] >= cap for c, level, cap in own):
            continue
        for c, level, _ in own:
            c[level] += 1
        taken[item] = True
        kept.append(place)
        if part is not None:
            filled.add(part[place])
    return order.iloc[kept]


def _table(adata: AnnData, items: _Items, found: dict[str, pd.DataFrame]) -> pd.DataFrame:
    chosen = pd.concat([part.assign(kind=kind) for kind, part in found.items()], ignore_index=True)
    at, obs = chosen["at"].to_numpy(dtype=int), adata.obs
    active = np.sort(items.values[items.largest[~items.silent]])
    code = items.values[at]
    lower = (np.searchsorted(active, code, "left") + np.searchsorted(active, code, "right")) / 2
    out = pd.DataFrame(
        {
            "kind": chosen["kind"], "sample_id": items.names[items.sample[at]], "row": obs.index[at].astype(str),
            "activation": code.astype(float), "quantile": np.where(code != 0, lower / max(len(active), 1), np.nan),
        }
    )  # fmt: skip
    for role in ("patient", "site"):
        known = obs[role].astype(object).to_numpy()[at] if role in obs else np.full(len(at), None, dtype=object)
        out[role] = pd.Series([None if pd.isna(v) else v for v in known], dtype=object, index=out.index)
    out["near_to"] = chosen.get("near_to")
    out["similarity"] = (chosen["similarity"] if "similarity" in chosen else pd.Series(np.nan, out.index)).astype(float)
    return out
