"""Settings for a goal, where the defaults serve another one, and settings of released biomedical code."""

from __future__ import annotations

import copy
from typing import Any

from biosae.errors import InputError, nearest
from biosae.sae.config import SAEConfig, resolve

PRESETS: dict[str, dict[str, Any]] = {
    "reconstruct": {"architecture": "batchtopk"},
    "stable": {"architecture": "relu", "l1": 0.25},
}
"""Goal to what differs from the defaults; the measurements are in docs/methods/choosing.md."""
RELEASED: dict[str, dict[str, Any]] = {
    "histoscope": {
        "architecture": "topk_signed", "k": 250, "options": {"tied": True, "encoder_bias": False, "norm": "atoms"},
        "normalise": "standardise", "batch_size": 32, "max_epochs": 2, "learning_rate": 1e-4, "warmup": 0.0,
        "decay": 0.0, "clip_norm": None, "aux_k": 0,
    },
    "sail": {
        "architecture": "matryoshka", "k": 160,
        "options": {
            "prefixes": (1 / 64, 1 / 16, 1 / 4, 1.0), "level_k": (20, 40, 80, 160), "tied": True, "norm": "atoms",
        },
        "normalise": "l2", "batch_size": 2048, "max_epochs": 100, "learning_rate": 1e-4, "warmup": 0.1,
        "clip_norm": 0.5, "aux_k": 0,
    },
    "saev": {
        "architecture": "relu", "normalise": "centre_scale", "batch_size": 16_384, "learning_rate": 1e-3,
        "warmup": 0.005, "decay": 0.0, "l1_warmup": 0.005, "clip_norm": None,
    },
}  # fmt: skip
"""Settings read in released code for large data (docs/methods/choosing.md says what differs here)."""
SAEV_L1 = 8e-4
"""For rows of mean norm sqrt(d) and errors averaged over the width; sqrt(d) times as much for rows of norm 1."""


def preset(n_rows: int, d: int, *, goal: str) -> dict[str, Any]:
    """Settings for ``SAE(**preset(...))``, with the numbers that the rules for ``None`` give written out.

    Parameters
    ----------
    n_rows
        Training rows (tokens count as rows).
    d
        Width of the embeddings.
    goal
        ``reconstruct``: the smallest held-out error at a given number of active latents (``batchtopk``). ``stable``:
        latents that come back with other seeds (``relu`` with an L1 penalty), at the price of a larger error, shrunken
        codes, and a number of active latents that is found, not set. ``histoscope`` (pathology), ``sail`` (radiology)
        and ``saev`` (vision encoders of biology): the settings of that released code, which were made for far more
        rows than most studies have.

    Returns
    -------
    dict
        ``architecture``, ``n_latents`` and ``k`` or ``l1``, and for released code whatever else it sets. All other
        settings stay at their defaults.

    Raises
    ------
    InputError
        For an unknown goal, or fewer than 8 rows.

    Notes
    -----
    Measured with 1,000 to 12,000 rows of width 128 and 1,280 (docs/methods/choosing.md); beyond that the rules
    extrapolate.

    Examples
    --------
    >>> preset(12_000, 128, goal="reconstruct")
    {'architecture': 'batchtopk', 'n_latents': 256, 'k': 16}
    """
    if goal not in PRESETS and goal not in RELEASED:
        raise InputError(f"goal={goal!r} is not known; {nearest(goal, (*PRESETS, *RELEASED))}")
    if d < 1:
        raise InputError(f"d={d!r} must be a positive number of features")
    if goal in RELEASED:
        by_width = {
            "histoscope": {"n_latents": 48 * d},
            "sail": {"n_latents": 8192},
            "saev": {"n_latents": 32 * d, "l1": SAEV_L1 * d**0.5},
        }
        return copy.deepcopy(RELEASED[goal]) | by_width[goal]
    chosen = dict(PRESETS[goal])
    plan = resolve(SAEConfig(**chosen), n_rows, d)
    chosen["n_latents"] = plan.n_latents
    if chosen["architecture"] != "relu":
        chosen["k"] = plan.k
    return chosen
