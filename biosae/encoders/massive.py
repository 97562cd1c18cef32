"""Massive activations: single values of a hidden state that are thousands of times larger than the median."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from biosae.data.items import ReadError
from biosae.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from biosae.encoders.base import Encoder

LEAST_VALUE, LEAST_RATIO = 100.0, 1000.0
"""A value is massive if it exceeds both: its magnitude 100, and 1000 times the median magnitude of its input."""
_FLOOR = 1e-12


def massive_values(states: Any, *, least_ratio: float = LEAST_RATIO) -> pd.DataFrame:
    """Values of one hidden state that stand out against its median.

    Parameters
    ----------
    states
        Hidden state of one input at one layer, ``(tokens, d)``.
    least_ratio
        Least ``|a| / median(|h|)`` of a value in the table.

    Returns
    -------
    pandas.DataFrame
        One row a value, largest first: ``token``, ``dim``, ``value``, ``ratio`` (to the median of all magnitudes, which
        counts as at least 1e-12) and ``massive``: ``|value| > 100`` and ``ratio >= 1000``.

    Raises
    ------
    InputError
        If the state is not a table of finite numbers.

    References
    ----------
    Sun, Chen, Kolter and Liu 2024, Massive Activations in Large Language Models, arXiv 2402.17762.
    """
    import pandas as pd

    h = np.asarray(states, dtype=np.float64)
    if h.ndim != 2 or not h.size or not np.isfinite(h).all():
        raise InputError(f"a hidden state is a finite table (tokens, d), got shape {h.shape}")
    size = np.abs(h)
    ratio = size / max(float(np.median(size)), _FLOOR)
    token, dim = np.nonzero(ratio >= least_ratio)
    order = np.argsort(-size[token, dim], kind="stable")
    token, dim = token[order], dim[order]
    found = {"token": token, "dim": dim, "value": h[token, dim], "ratio": ratio[token, dim]}
    return pd.DataFrame(found).assign(massive=lambda t: (t["value"].abs() > LEAST_VALUE) & (t["ratio"] >= LEAST_RATIO))


def massive_activations(
    encoder: Encoder, samples: Any, *, layers: Iterable[int | str] | None = None, n: int = 10, batch_size: int = 1
) -> pd.DataFrame:
    """How far the largest value of every layer's hidden state stands above the median, and where it is.

    A dictionary that is trained with a squared error on such a layer spends itself on a few dimensions; clamp or
    subtract them, or choose another layer.

    Parameters
    ----------
    encoder
        An image encoder; all tokens of a layer are looked at, the class and register tokens too.
    samples
        What to look at; the first ``n`` that can be read.
    layers
        Names or numbers, of ``layers`` or of ``sites()``; by default all of ``layers`` that have tokens.
    n
        Number of inputs.
    batch_size
        Inputs in one pass (they must have one size after preprocessing where it is above 1).

    Returns
    -------
    pandas.DataFrame
        Index ``layer``; ``inputs``; ``max`` and ``median``, the means over inputs of ``max |h|`` and of ``median |h|``;
        ``ratio = max / median``, the series that is followed over training; ``mean_ratio``, the mean over inputs of
        each input's own ratio; ``massive``, number of values above 100 and 1000 times the median; ``above_ratio``,
        number of values above 1000 times the median whatever their size; ``dims``, dimensions of the latter, most
        frequent first; ``tokens``, their roles and how often (``cls``, ``register``, ``patch``); ``largest_dim`` and
        ``largest_token``, where the largest value of all lies; ``zero_median``, inputs whose median is 0 (it then
        counts as 1e-12).

    Raises
    ------
    InputError
        If no sample can be read, a layer has no tokens, or the samples are no images.

    Notes
    -----
    ``a`` of a hidden state ``h`` is massive if ``|a| > 100`` and ``|a| / median(|h|) >= 1000`` (Sun et al. 2024, arXiv
    2402.17762); ``ratio`` is ``mean(max |h|) / mean(median |h|)`` over 10 inputs, as followed by Gallego-Feliciano et
    al. 2025, arXiv 2508.03616, since small networks never reach the first rule.
    """
    import pandas as pd
    import torch

    if n < 1 or batch_size < 1:
        raise InputError(f"n={n} and batch_size={batch_size} must be at least 1")
    if encoder.item != "image":
        raise InputError(f"{encoder.info.name} is no image encoder; give a hidden state to massive_values")
    encoder = encoder.suited(samples)
    names = _with_tokens(encoder) if layers is None else [encoder.resolve_layer(one) for one in layers]
    for name in names:
        encoder.resolve_pool(name, "tokens")
    images = _first(encoder, samples, n)
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for start in range(0, len(images), batch_size):
        batch = torch.stack(images[start : start + batch_size])
        encoder._check_batch(batch)
        for name, states in encoder._outputs(batch, dict.fromkeys(names, "all")).items():
            seen[name] += list(states.cpu().numpy())
    rows = [{"layer": name, **_row(encoder, name, states)} for name, states in seen.items()]
    return pd.DataFrame(rows).set_index("layer")


def _with_tokens(encoder: Encoder) -> list[str]:
    names = []
    for name in encoder.layers:
        try:
            encoder.resolve_pool(name, "tokens")
        except InputError:
            continue
        names.append(name)
    return names


def _first(encoder: Encoder, samples: Any, n: int) -> list[Any]:
    images = []
    for i in range(len(samples)):
        try:
            images.append(encoder.preprocess(samples[i]))
        except ReadError:
            continue
        if len(images) == n:
            break
    if not images:
        raise InputError("none of the samples can be read")
    return images


def _row(encoder: Encoder, name: str, states: list[np.ndarray]) -> dict[str, Any]:
    site = encoder._site(name)
    prefix = encoder.n_prefix if site.n_prefix is None else site.n_prefix
    sizes = [np.abs(h.astype(np.float64)) for h in states]
    largest, medians = np.array([h.max() for h in sizes]), np.array([np.median(h) for h in sizes])
    found = [massive_values(h) for h in states]
    token = np.concatenate([t["token"] for t in found]).astype(int)
    dim = np.concatenate([t["dim"] for t in found]).astype(int)
    dims, counts = np.unique(dim, return_counts=True)
    roles, often = np.unique([_role(encoder, t, prefix) for t in token], return_counts=True)
    top = sizes[int(largest.argmax())]
    at = np.unravel_index(int(top.argmax()), top.shape)
    return {
        "inputs": len(states), "max": largest.mean(), "median": medians.mean(),
        "ratio": largest.mean() / max(medians.mean(), _FLOOR),
        "mean_ratio": float((largest / np.maximum(medians, _FLOOR)).mean()),
        "massive": int(sum(t["massive"].sum() for t in found)), "above_ratio": len(token),
        "dims": [int(d) for d in dims[np.argsort(-counts, kind="stable")]],
        "tokens": {str(r): int(c) for r, c in zip(roles, often)},
        "largest_dim": int(at[1]), "largest_token": int(at[0]), "zero_median": int((medians == 0).sum()),
    }  # fmt: skip


def _role(encoder: Encoder, token: int, prefix: int) -> str:
    if token >= prefix:
        return "patch"
    return "cls" if encoder.has_cls and token == 0 else "register"
