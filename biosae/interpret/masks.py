"""From masks of parts to labels of tokens, by the geometry that the encoder's preprocessing gave the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import InputError

BACKGROUND = "background"


def token_parts(samples: Any, emb: Any, *, parts: Mapping[int, str] | None = None) -> pd.DataFrame:
    """Share of every token's field that each part of a mask fills.

    The mask goes through the same resizing and cropping as the image, then it is averaged over the cells of the token
    grid. A token of a convolutional network sees more than its cell; the cell is where it is centred.

    Parameters
    ----------
    samples
        Samples with masks (role ``mask``), which hold the samples of ``emb``.
    emb
        :class:`biosae.Embeddings` of tokens with a grid, of images.
    parts
        Names of the numbers in the masks; by default those of ``samples.meta["parts"]``, else the numbers found, as
        text. Pixels of no named number are ``background``.

    Returns
    -------
    DataFrame
        One row a token, index ``<sample>#<token>`` as in :func:`biosae.encode`; a column a part and ``background``,
        float32, rows sum to 1. NaN for samples without a mask. ``attrs["biosae"]``: ``n_samples``, ``n_masked`` and
        ``failures`` (sample to reason).

    Raises
    ------
    InputError
        If there are no masks, the embeddings are pooled, or their preprocessing is not known.
    """
    from biosae.data import ReadError

    if emb.tokens_per_sample < 2 or emb.grid is None:
        raise InputError("parts are held against tokens: embed with pool='tokens'")
    if "mask" not in samples.obs:
        raise InputError("these samples have no masks; read images with mask= the column of the masks' files")
    absent = emb.obs.index.difference(samples.ids)
    if len(absent):
        raise InputError(f"{len(absent)} embedded samples are not among the samples, e.g. {str(absent[0])!r}")
    preprocess = preprocess_of(emb, samples)
    masked = samples.obs["mask"].reindex(emb.obs.index).notna().to_numpy()
    cells: dict[int, dict[int, np.ndarray]] = {}
    failures: dict[str, str] = {}
    named = _names(samples, parts)
    for i in np.flatnonzero(masked):
        sample = str(emb.obs.index[i])
        try:
            mask = samples.mask(sample)
        except ReadError as error:
            failures[sample] = f"{error.reason}: {error.detail}"
            continue
        wanted = np.unique(mask) if named is None else list(named)
        cells[i] = {int(v): _on_grid(preprocess.coverage(mask == v), emb.grid) for v in wanted if v or named}
    if not cells:
        raise InputError(f"none of {len(emb.obs)} samples has a mask that can be read; see samples.obs['mask']")
    if named is None:
        named = {v: str(v) for v in sorted({v for found in cells.values() for v in found})}
    columns = list(dict.fromkeys([*named.values(), BACKGROUND]))
    T = emb.tokens_per_sample
    share = np.full((len(emb.obs), T, len(columns)), np.nan, np.float32)
    for i, found in cells.items():
        share[i] = 0
        for value, cell in found.items():
            share[i, :, columns.index(named[value])] += cell.ravel()
        share[i, :, columns.index(BACKGROUND)] += np.clip(1 - share[i].sum(1), 0, 1)
    digits = len(str(T - 1))
    index = pd.Index([f"{s}#{t:0{digits}d}" for s in emb.obs.index for t in range(T)], name="token_id")
    table = pd.DataFrame(share.reshape(-1, len(columns)), index=index, columns=columns)
    table.attrs["biosae"] = {"n_samples": len(emb.obs), "n_masked": len(cells), "failures": failures}
    return table


def displaced(labels: pd.DataFrame, samples: pd.Series, *, random_state: int = 0) -> pd.DataFrame:
    """Labels of tokens, each sample's given to another sample: what place alone and a choice among many latents reach.

    Parameters
    ----------
    labels
        One row a token.
    samples
        Sample of each token, same index; all samples have the same number of tokens in the same order. Those without
        any label are left as they are.
    random_state
        Seed. Samples are put on a circle in random order and each takes the labels of the next, so that none keeps its
        own.

    Raises
    ------
    InputError
        If samples have different numbers of tokens, or fewer than two have labels.
    """
    known = labels.notna().any(axis=1).groupby(samples.to_numpy(), sort=False).any()
    inside = samples.groupby(samples.to_numpy(), sort=False).indices
    at = {s: inside[s] for s in known.index[known.to_numpy()]}
    if len({len(rows) for rows in at.values()}) != 1 or len(at) < 2:
        raise InputError("labels can be displaced between two or more samples of equally many tokens only")
    order = np.random.default_rng(random_state).permutation(len(at))
    rows = list(at.values())
    values = labels.to_numpy().copy()
    source = labels.to_numpy()
    for one, other in zip(order, np.roll(order, 1)):
        values[rows[one]] = source[rows[other]]
    return pd.DataFrame(values, index=labels.index, columns=labels.columns)


def _names(samples: Any, parts: Mapping[int, str] | None) -> dict[int, str] | None:
    """Number in the masks -> name of the part, or None where the numbers themselves are the names."""
    if parts is not None:
        named = {int(value): str(name) for value, name in parts.items()}
    else:
        named = {int(value): str(name) for name, value in samples.meta.get("parts", {}).items()}
    return named or None


def preprocess_of(emb: Any, samples: Any) -> Any:
    """The preprocessing that the embeddings' identity states."""
    from biosae.encoders.preprocess import Preprocess

    spec = dict((emb.identity or {}).get("preprocess") or {})
    if "resize" not in spec:
        raise InputError(
            "the embeddings do not say how images were resized and cropped, so masks cannot be laid over their tokens; "
            "embed the samples here, or give labels of tokens directly"
        )
    target = spec.pop("rescale_to_mpp", None)
    mpp = emb.mpp if emb.mpp is not None else samples.mpp
    if target is not None and mpp is None:
        raise InputError(
            "these images were rescaled to the encoder's mpp, and theirs is not known: give the samples mpp="
        )
    for key in ("mean", "std"):
        spec[key] = tuple(spec[key])
    scale = {"tile_mpp": mpp, "target_mpp": target, "match_mpp": True} if target is not None else {}
    return Preprocess(**spec, **scale)


def _on_grid(share: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Mean of a map (h, w) over the cells of a grid, whose borders may cut pixels."""
    from PIL import Image

    small = Image.fromarray(share).resize((grid[1], grid[0]), Image.Resampling.BOX)
    return np.asarray(small, np.float32)
