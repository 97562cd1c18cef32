"""Examples of every latent, and the items among them, each of which the page holds once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.atlas.packing import numbers
from biosae.interpret.examples import examples
from biosae.pl.gallery import HEADINGS
from biosae.reports.run import Run
from biosae.settings import settings

KINDS = ("top", "spread", "active", "near", "inactive")
_WIDE = 2**22  # numbers of the embedding above which likeness is measured along its leading directions
_DIRECTIONS = 48


@dataclass
class Items:
    """Items that some latent shows, in the order in which they deserve a picture.

    Attributes
    ----------
    ids : list of str
        Names of samples.
    rank : list of int
        Place in the gallery where an item stands first.
    """

    ids: list[str] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)
    _at: dict[str, int] = field(default_factory=dict, repr=False)

    def add(self, name: str, rank: int) -> int:
        at = self._at.setdefault(name, len(self.ids))
        if at == len(self.ids):
            self.ids.append(name)
            self.rank.append(rank)
        self.rank[at] = min(self.rank[at], rank)
        return at

    def order(self) -> np.ndarray:
        """Items from the first to be shown to the last."""
        return np.argsort(self.rank, kind="stable")


def galleries(run: Run, codes: sp.csc_matrix, *, n: int, random_state: int) -> tuple[list[dict[str, Any]], Items]:
    """Of each latent its kinds of examples: ``{kind: {items, values, quantiles}}``, and of near misses ``to``.

    Items are capped so that no patient can fill a kind: at most 2 of each, or the even share where patients are few.
    """
    from tqdm.auto import tqdm

    obs = run.adata.obs
    kinds = tuple(k for k in KINDS if k != "near" or "embedding" in run.adata.obsm)
    small = anndata.AnnData(X=codes, obs=obs[[c for c in ("sample_id", "patient", "site") if c in obs]])
    small.var_names = run.adata.var_names
    if "near" in kinds:
        small.obsm["embedding"] = _leading(np.asarray(run.adata.obsm["embedding"]), random_state=random_state)
    cap = max(2, -(-n // max(obs["patient"].nunique(), 1))) if "patient" in obs else None
    items, out = Items(), []
    for name in tqdm(small.var_names, desc="examples", disable=not settings.progress):
        chosen = examples(small, name, n=n, kinds=kinds, cap_per_patient=cap, random_state=random_state)
        out.append(_one(chosen, items))
    return out, items


def _one(chosen: pd.DataFrame, items: Items) -> dict[str, Any]:
    kinds = chosen["kind"].to_numpy()
    columns = {name: chosen[name].to_numpy() for name in ("sample_id", "activation", "quantile", "similarity")}
    parts: dict[str, Any] = {}
    for kind in HEADINGS:
        at = np.flatnonzero(kinds == kind)
        if not len(at):
            continue
        part = {
            "items": [items.add(str(name), place) for place, name in enumerate(columns["sample_id"][at])],
            "values": numbers(columns["activation"][at], digits=3),
        }
        if kind == "near":
            part["likeness"] = numbers(columns["similarity"][at], digits=2)
        elif kind != "inactive":
            part["quantiles"] = numbers(columns["quantile"][at], digits=3)
        parts[kind] = part
    return parts


def _leading(embedding: np.ndarray, *, random_state: int) -> np.ndarray:
    """The embedding less its mean; of large tables its coordinates along the directions of largest variance."""
    centred = embedding - embedding.mean(axis=0, dtype=np.float64).astype(np.float32)
    if centred.size <= _WIDE or centred.shape[1] <= _DIRECTIONS:
        return centred
    from sklearn.utils.extmath import randomized_svd

    rng = np.random.default_rng(random_state)
    rows = rng.permutation(len(centred))[:20_000]
    directions = randomized_svd(centred[rows], _DIRECTIONS, random_state=random_state)[2]
    return (centred @ directions.T).astype(np.float32)
