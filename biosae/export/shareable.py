"""Latents without what identifies people: pseudonyms for patients, slides and samples, and no columns nobody named."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, nearest
from biosae.export.licence import inherited
from biosae.export.order import hidden_order

PSEUDONYMS = ("patient", "slide", "recording", "sequence", "collector")
"""Columns whose values are replaced."""
KEPT = (
    "site", "location", "scanner", "label", "split", "mpp", "sae_trained_on", "token_row", "token_col", "x_um", "y_um",
    "width_um", "height_um",
)  # fmt: skip
"""Further columns of ``obs`` that are kept without being named."""


def shareable(adata: Any, *, columns: Sequence[str] = (), show_ids: bool = False, licence: str | None = None) -> Any:
    """A copy of latents that can leave the place where the patients are known, with the terms of the encoder.

    Parameters
    ----------
    adata
        Latents of :func:`biosae.encode`.
    columns
        Your own columns of ``obs`` that go along. Without it only canonical columns do: ``patient, slide, recording,
        sequence, collector`` as pseudonyms; ``site, location, scanner, label, split, mpp``, positions and
        ``sae_trained_on`` as they are.
    show_ids
        True keeps ids, all columns and everything else as they are.
    licence
        The encoder's licence where none is recorded, see :func:`biosae.export.terms`.

    Returns
    -------
    AnnData
        ``X``, layers, ``var``, arrays of ``obsm``, ``varm``, ``obsp`` and ``varp`` as they are; ``obs_names``
        ``sample_000001`` (``sample_000001#007`` for tokens) and groups ``patient_01``. Rows stand in the order of
        :func:`pseudonyms`, because theirs is often that of the ids: patient by patient, within one as before. In texts
        of ``var`` and in ``uns["biosae"]`` ids are replaced too and paths cut to their last part. The rest of ``uns``
        stays behind. ``uns["biosae"]["licence"]`` holds the terms. With ``show_ids`` everything is as it was.

    Raises
    ------
    InputError
        If there is no sample, a column is unknown, or a named column has
        ids of patients, slides or samples, or paths, among its values.
    """
    import anndata

    from biosae.stats.nested import in_memory

    if not adata.n_obs:
        raise InputError("there is no sample in these latents; nothing to export")
    adata = in_memory(adata)
    content = dict(adata.uns.get("biosae", {}))
    held = inherited(content, licence=licence).to_dict()
    unknown = [c for c in columns if c not in adata.obs]
    if unknown:
        raise InputError(f"obs has no column {unknown[0]!r}; {nearest(unknown[0], adata.obs.columns)}")
    if show_ids:
        out = adata.copy()
        out.uns["biosae"] = {**content, "licence": held}
        return out
    names = pseudonyms(adata)
    adata = adata[_order(adata.obs)].copy()
    mapping = {kind: dict(zip(part["id"], part["pseudonym"])) for kind, part in names.groupby("kind")}
    redact = _redactor(dict(zip(names["id"], names["pseudonym"])))
    obs = _obs(adata.obs, mapping, columns, redact)
    var = adata.var.copy()
    for name in var.columns:
        if not pd.api.types.is_numeric_dtype(var[name]):
            var[name] = [redact(v) if isinstance(v, str) else v for v in var[name]]
    roles = dict(content.get("roles") or {})
    kept = {role: role for role in roles if role in obs}
    arrays = {name: {k: v for k, v in getattr(adata, name).items() if isinstance(v, np.ndarray) or sp.issparse(v)}
              for name in ("obsm", "varm", "obsp", "varp", "layers")}  # fmt: skip
    out = anndata.AnnData(X=adata.X.copy(), obs=obs, var=var, **arrays)
    content = {k: v for k, v in content.items() if k != "roles"}
    if "neighbors" in adata.uns and "connectivities" in arrays["obsp"]:  # what scanpy's Leiden and UMAP look for
        out.uns["neighbors"] = dict(adata.uns["neighbors"])
    out.uns["biosae"] = {**_redacted(content, redact), **({"roles": kept} if kept else {}), "licence": held}
    return out


def pseudonyms(adata: Any) -> pd.DataFrame:
    """The table that leads from an export back to patients; it stays where the patients are known.

    Groups are numbered in an order that depends on a secret of this computer (:func:`hidden_order`), samples group by
    group. The same latents give the same table on the same computer, and nobody else can make it from a list of ids.

    Returns
    -------
    DataFrame
        ``kind`` (``sample``, ``patient``, ``slide``, ...), ``id``, ``pseudonym``.
    """
    obs = adata.obs
    kinds = {"sample": list(dict.fromkeys(_samples(obs).iloc[_order(obs)]))}
    kinds |= {kind: _groups(obs[kind]) for kind in PSEUDONYMS if kind in obs}
    rows = []
    for kind, ids in kinds.items():
        digits = max(6 if kind == "sample" else 2, len(str(len(ids))))
        rows += [(kind, name, f"{kind}_{place:0{digits}d}") for place, name in enumerate(ids, start=1)]
    return pd.DataFrame(rows, columns=["kind", "id", "pseudonym"])


def _samples(obs: pd.DataFrame) -> pd.Series:
    """The sample of each row."""
    return obs["sample_id"].astype(str) if "sample_id" in obs else pd.Series(obs.index.astype(str), index=obs.index)


def _groups(values: pd.Series) -> list[str]:
    """Distinct values in the order of their pseudonyms."""
    names = sorted(values.dropna().astype(str).unique())
    return [names[i] for i in hidden_order(names, kind=str(values.name))]


def _order(obs: pd.DataFrame) -> np.ndarray:
    """Rows by patient, slide and so on, in the order of their pseudonyms, else as before; without groups by sample."""
    samples = _samples(obs)
    first = obs[~samples.duplicated().to_numpy()]
    at = pd.Index(_samples(first)).get_indexer(samples)  # tokens of a sample stand together
    by = [first[kind] for kind in PSEUDONYMS[:-1] if kind in obs and first[kind].notna().any()] or [_samples(first)]
    ranks = []
    for values in by:
        place = {name: i for i, name in enumerate(_groups(values))}
        ranks.append(values.astype(str).map(place).fillna(len(place)).to_numpy()[at])
    return np.lexsort(ranks[::-1])


def _obs(obs: pd.DataFrame, mapping: Mapping[str, Any], columns: Sequence[str], redact: Any) -> pd.DataFrame:
    samples = mapping["sample"]
    tokens = "sample_id" in obs
    ids = pd.DataFrame({name: obs[name].astype(str) for name in mapping if name in obs}, index=obs.index)
    ids["sample"] = obs["sample_id"].astype(str) if tokens else obs.index.astype(str)
    new = {}
    if tokens:
        new["sample_id"] = ids["sample"].map(samples).to_numpy()
    for name in obs.columns:
        values = obs[name]
        if name in mapping:
            known = values.notna().to_numpy()
            new[name] = pd.Categorical(ids[name].where(known).map(mapping[name]))
        elif (name in columns or name in KEPT) and name not in new:
            if _tells(values, ids, redact):
                what = f"column {name!r} has ids of samples, patients or slides, or paths, among its values"
                if name in columns:
                    raise InputError(f"{what}; leave it out, rename its values, or pass show_ids=True")
                warnings.warn(f"{what} and is left out", stacklevel=3)
                continue
            unused = isinstance(values.dtype, pd.CategoricalDtype)
            new[name] = (values.cat.remove_unused_categories() if unused else values).array
    if tokens:
        suffix = obs.index.astype(str).str.rpartition("#").get_level_values(2)
        index = pd.Index([f"{s}#{t}" for s, t in zip(new["sample_id"], suffix)], name="token_id")
    else:
        index = pd.Index(ids["sample"].map(samples), name="sample_id")
    return pd.DataFrame(new, index=index)


def _tells(values: pd.Series, ids: pd.DataFrame, redact: Any) -> bool:
    """Whether a column has an id in one of its texts, or equals a column of ids in most rows."""
    texts = values.astype(str)
    same = {n: texts == ids[n] for n in ids}
    if pd.api.types.is_numeric_dtype(values):  # 104.0 is the id 104
        same = {n: same[n] | (pd.to_numeric(ids[n], errors="coerce") == values).fillna(False) for n in ids}
    if len(ids) and any(len(set(ids[n])) > 1 and same[n].mean() > 0.5 for n in ids):
        return True
    if pd.api.types.is_numeric_dtype(values):
        return False
    return any(redact(text) != text for text in texts[values.notna()].unique())


_PATH = re.compile(r"(?<![^\s=:'\"(\[])(?!//)(?:~|[A-Za-z]:|\\\\[^\s\\]+)?(?:[/\\][^\s/\\]+)+")
_EDGE = re.compile(r"(?<![^\W_])|(?![^\W_])")


def _redactor(names: Mapping[str, str]) -> Any:
    """Function that replaces ids by pseudonyms and cuts absolute paths to their last part.

    Small and capital letters are one. Ids of fewer than 4 characters, or of fewer than 5 digits alone, are ordinary
    words and numbers and stay.
    """
    telling = {n.casefold(): p for n, p in names.items() if len(n) >= (5 if n.isdigit() else 4)}
    longest = max(map(len, telling), default=0)

    def redact(text: str) -> str:
        text = _PATH.sub(lambda m: re.split(r"[/\\]", m.group(0))[-1], text)
        edges = [m.start() for m in _EDGE.finditer(text)] if telling else []
        out, at = [], 0
        for i, start in enumerate(edges):
            if start < at:
                continue
            ends = [e for e in edges[i + 1 : i + 1 + longest] if e - start <= longest]
            for end in reversed(ends):
                if (found := text[start:end].casefold()) in telling:
                    out += [text[at:start], telling[found]]
                    at = end
                    break
        return "".join([*out, text[at:]])

    return redact


def redacted(value: Any, names: Mapping[str, str] | None = None) -> Any:
    """A value of plain types with ids (keys of ``names``) replaced and absolute paths cut to their last part."""
    return _redacted(value, _redactor(names or {}))


def _redacted(value: Any, redact: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _redacted(v, redact) for k, v in value.items() if k != "checkpoint"}
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, (list, tuple)):
        return [_redacted(v, redact) for v in value]
    if isinstance(value, np.ndarray) and value.dtype.kind in "OUS":
        return np.array([redact(str(v)) for v in value.ravel()], dtype=object).reshape(value.shape)
    return value
