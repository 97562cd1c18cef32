"""Settings for a goal, where the defaults serve another one; each was measured on real embeddings."""

from __future__ import annotations

from typing import Any

from biosae.errors import InputError, nearest
from biosae.sae.config import SAEConfig, resolve

PRESETS: dict[str, dict[str, Any]] = {
    "reconstruct": {"architecture": "batchtopk"},
    "stable": {"architecture": "relu", "l1": 0.25},
}
"""Goal to what differs from the defaults; the measurements are in docs/methods/choosing.md."""


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
        codes, and a number of active latents that is found, not set.

    Returns
    -------
    dict
        ``architecture``, ``n_latents`` and ``k`` or ``l1``. All other settings stay at their defaults.

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
    if goal not in PRESETS:
        raise InputError(f"goal={goal!r} is not known; {nearest(goal, tuple(PRESETS))}")
    if d < 1:
        raise InputError(f"d={d!r} must be a positive number of features")
    chosen = dict(PRESETS[goal])
    plan = resolve(SAEConfig(**chosen), n_rows, d)
    chosen["n_latents"] = plan.n_latents
    if chosen["architecture"] != "relu":
        chosen["k"] = plan.k
    return chosen
