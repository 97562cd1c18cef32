"""How many of the patients behind a result has the SAE seen in its own training?"""

from __future__ import annotations

from typing import Any

import numpy as np

COLUMN = "sae_trained_on"


def sae_training(adata: Any, groups: str | None, *, rows: np.ndarray | None = None) -> dict[str, Any]:
    """Count samples and groups that the SAE was trained on.

    Latents are fitted to their training rows, so that an association there may owe something to chance patterns that
    the SAE has learnt; rows of other patients cannot.

    Parameters
    ----------
    adata
        Latents of :func:`biosae.encode`, whose ``obs["sae_trained_on"]`` says for every sample whether its patient was
        among the SAE's training rows.
    groups
        Column of independent groups. None, or a column that is not there, counts samples alone.
    rows
        Mask (n_samples,) or positions of the samples that a result stands on; None takes all.

    Returns
    -------
    dict
        ``known`` (False where the column is absent or incomplete: then nobody can say), ``n_groups,
        n_groups_trained_on, n_samples, n_samples_trained_on``. A group counts as trained on if any of its samples does.
        Numbers that cannot be known are None.
    """
    obs = adata.obs if rows is None else adata.obs.iloc[np.arange(len(adata.obs))[rows]]
    grouped = groups is not None and groups in obs
    known = COLUMN in obs and bool(obs[COLUMN].notna().all())
    seen = obs[COLUMN].astype(bool) if known else None
    return {
        "known": known,
        "n_groups": int(obs[groups].nunique()) if grouped else None,
        "n_groups_trained_on": int(obs.loc[seen, groups].nunique()) if known and grouped else None,
        "n_samples": len(obs),
        "n_samples_trained_on": int(seen.sum()) if known else None,
    }
