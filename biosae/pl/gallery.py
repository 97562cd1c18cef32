"""Items on which a latent fires most, beside controls: items where it fires at random, and items where it is silent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from biosae.errors import BiosaeError, InputError, nearest
from biosae.pl import style
from biosae.pl.traces import picture

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

NOUNS = {"image": "tile", "signal": "window", "features": "vector"}
"""Kind of item -> what one is called in a caption."""
BLOCKS = {
    "top": "highest activation", "bottom": "most negative activation", "active": "random among active",
    "inactive": "random among silent",
}  # fmt: skip
"""``bottom`` is of signed codes only: both ends of a latent may have a meaning."""


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


def select_tiles(
    adata: AnnData, latent: str, *, n: int = 12, cap_per_patient: int | None = 2, random_state: int = 0
) -> pd.DataFrame:
    """Choose the tiles of a gallery: the top, random active ones and random silent ones, few a patient.

    Without a cap one patient often fills the gallery, and a latent of that patient looks like a latent of biology.
    No tile is chosen twice; the random active tiles are drawn from those that are not among the top. Where codes are
    signed, a tile is active if its code is not 0, and the most negative ones are a block of their own.

    Parameters
    ----------
    adata : AnnData of shape (n_rows, n_latents)
    latent : str
    n : int
        Tiles a block.
    cap_per_patient : int or None
        Most tiles of one patient in one block; None, or an ``obs`` without ``patient``, means no cap.
    random_state : int
        Seed of the two control blocks.

    Returns
    -------
    DataFrame
        Columns ``block`` (``top``, ``bottom``, ``active``, ``inactive``), ``sample_id``, ``activation``,
        ``patient`` (missing where unknown); fewer than ``n`` rows a block where the cap or the data leave fewer.

    Raises
    ------
    InputError
        If there is no such latent.
    """
    values = activation(adata, latent).to_numpy()
    obs = adata.obs
    ids = (obs["sample_id"] if "sample_id" in obs else pd.Series(obs.index, index=obs.index)).astype(str).to_numpy()
    patients = obs["patient"].astype(object).to_numpy() if "patient" in obs else np.full(len(obs), None, dtype=object)
    rng = np.random.default_rng(random_state)
    falling, rising = np.argsort(-values, kind="stable"), np.argsort(values, kind="stable")
    orders = {
        "top": falling[values[falling] > 0],
        "bottom": rising[values[rising] < 0],
        "active": rng.permutation(np.flatnonzero(values)),
        "inactive": rng.permutation(np.flatnonzero(values == 0)),
    }
    taken: set[str] = set()
    rows = []
    for block, order in orders.items():
        per_patient: dict[Any, int] = {}
        kept = 0
        for i in order:
            if kept == n:
                break
            patient = patients[i]
            known = patient is not None and not pd.isna(patient)
            full = known and cap_per_patient is not None and per_patient.get(patient, 0) >= cap_per_patient
            if full or ids[i] in taken:
                continue
            per_patient[patient] = per_patient.get(patient, 0) + 1
            taken.add(ids[i])
            rows.append((block, ids[i], float(values[i]), patient if known else None))
            kept += 1
    return pd.DataFrame(rows, columns=["block", "sample_id", "activation", "patient"])


def headings(chosen: pd.DataFrame) -> dict[str, str]:
    """Blocks to show of chosen tiles, with their headings: ``bottom`` only where there is any."""
    return {block: text for block, text in BLOCKS.items() if block != "bottom" or (chosen["block"] == block).any()}


def firing_sentence(adata: AnnData, latent: str) -> str:
    """``active in 312 of 2,000 samples (15.6 %), 14 of 20 patients``."""
    values = activation(adata, latent)
    active = (values != 0).to_numpy()
    noun = "tokens" if "sample_id" in adata.obs and adata.obs["sample_id"].duplicated().any() else "samples"
    text = f"active in {active.sum():,} of {len(active):,} {noun} ({active.mean():.1%})"
    if (values < 0).any():
        text += f", negative in {(values < 0).sum():,}"
    if "patient" in adata.obs:
        patients = adata.obs["patient"]
        text += f", {patients[active].nunique():,} of {patients.nunique():,} patients"
    return text


def noun(samples: Any) -> str:
    """What one item of the samples is called: tile, window or vector."""
    return NOUNS[getattr(samples, "item", "image")]


def read_picture(samples: Any, sample_id: str) -> np.ndarray | str:
    """One sample as a picture, uint8 (H, W, 3), or the reason why it cannot be shown."""
    if samples is None:
        return "no images given"
    try:
        return picture(np.asarray(samples[samples.obs.index.get_loc(sample_id)]))
    except KeyError:
        return "not in samples"
    except (BiosaeError, OSError, ValueError) as error:
        return str(getattr(error, "reason", None) or type(error).__name__)


def gallery(
    adata: AnnData,
    latent: str,
    *,
    samples: Any,
    n: int = 12,
    cap_per_patient: int | None = 2,
    random_state: int = 0,
    fig: Figure | None = None,
) -> Figure:
    """Blocks of items (tiles; signals as traces) with the activation under each: highest, (of signed codes) most
    negative, random among active, random among silent.

    A tile that cannot be read is a grey square with the reason. Images are joined to rows by sample id.

    Parameters
    ----------
    adata : AnnData of shape (n_rows, n_latents)
    latent : str
    samples : biosae.Samples
        Where the tiles are read from.
    n, cap_per_patient, random_state
        As in :func:`select_tiles`.
    fig : matplotlib.figure.Figure or SubFigure, optional
        Drawn into if given.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        If there is no such latent.
    """
    chosen = select_tiles(adata, latent, n=n, cap_per_patient=cap_per_patient, random_state=random_state)
    columns = min(n, 6)
    rows_a_block, shown = max(1, -(-n // columns)), headings(chosen)
    with style.paper():
        fig = style.figure((6.9, 0.55 + len(shown) * (0.24 + rows_a_block * 1.28))) if fig is None else fig
        for part, (block, heading) in zip(fig.subfigures(len(shown), 1), shown.items()):
            tiles = chosen[chosen["block"] == block]
            part.suptitle(f"{heading} (n = {len(tiles)})", x=0.01, ha="left", fontsize=8, color=style.INK)
            grid = part.subplots(rows_a_block, columns, squeeze=False).ravel()
            for ax in grid:
                ax.set_axis_off()
            for ax, tile in zip(grid, tiles.itertuples()):
                image = read_picture(samples, tile.sample_id)
                if isinstance(image, str):
                    ax.set_facecolor("#E8E8E8")
                    ax.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[], aspect="equal")
                    ax.set_axis_on()
                    for spine in ax.spines.values():
                        spine.set_visible(False)
                    ax.text(0.5, 0.5, image, ha="center", va="center", fontsize=6.5, color=style.INK, wrap=True)
                else:
                    ax.imshow(image)
                ax.set_title(style.number(tile.activation), fontsize=6.5, loc="center", y=-0.14, va="top")
        what = noun(samples)
        cap = f"at most {cap_per_patient} {what}s a patient" if cap_per_patient and "patient" in adata.obs else "no cap"
        fig.suptitle(
            f"{latent}: {firing_sentence(adata, latent)}; {cap}; number under a {what}: activation",
            x=0.01, ha="left", fontsize=8,
        )  # fmt: skip
    return fig
