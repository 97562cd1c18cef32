"""Examples of a latent as pictures: where it fires most, beside controls where it fires or is silent at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from biosae.errors import BiosaeError
from biosae.interpret.examples import activation, examples
from biosae.pl import style
from biosae.pl.traces import picture

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.figure import Figure

_SLIDE_SIZE = 300  # pixels of a slide's picture, on its longer side
HEADINGS = {
    "top": "highest activation", "bottom": "most negative activation", "spread": "spread over the range of activation",
    "active": "random among active",
    "near": "near misses: silent, most like the top", "inactive": "random among silent",
}  # fmt: skip
"""Kind of example -> heading. ``bottom`` is of signed codes only: both ends of a latent may have a meaning."""


def headings(chosen: pd.DataFrame, kinds: Sequence[str]) -> dict[str, str]:
    """Kinds of chosen examples with their headings: ``bottom`` beside ``top``, and only where there is any."""
    signed = (chosen["kind"] == "bottom").any()
    return {k: text for k, text in HEADINGS.items() if (signed if k == "bottom" else k in kinds)}


def firing_sentence(adata: AnnData, latent: str) -> str:
    """``active in 312 of 2,000 samples (15.6 %), 14 of 20 patients``; of pooled codes the units: slides, patients."""
    values = activation(adata, latent)
    active = (values != 0).to_numpy()
    tokens = "sample_id" in adata.obs and adata.obs["sample_id"].duplicated().any()
    rows = "token" if tokens else _unit(adata) or "sample"
    text = f"active in {active.sum():,} of {style.count(len(active), rows)} ({active.mean():.1%})"
    if (values < 0).any():
        text += f", negative in {(values < 0).sum():,}"
    if "patient" in adata.obs:
        patients = adata.obs["patient"]
        text += f", {patients[active].nunique():,} of {patients.nunique():,} patients"
    return text


def noun(samples: Any, adata: AnnData | None = None) -> str:
    """What one item is called: tile, image, radiograph, recording window, ...; of pooled codes the unit (slide)."""
    return (_unit(adata) if adata is not None else None) or getattr(samples, "noun", "sample")


def _unit(adata: AnnData) -> str | None:
    """What the rows of codes pooled by :func:`biosae.stats.aggregate` are."""
    pooled = adata.uns.get("aggregated")
    return None if pooled is None else str(pooled["by"]).replace("_", " ")


def read_picture(samples: Any, sample_id: str) -> np.ndarray | str:
    """One sample (or slide of the samples) as a picture, uint8 (H, W, 3), or the reason why it cannot be shown."""
    if samples is None:
        return "no images given"
    try:
        if sample_id in samples.obs.index:
            return picture(np.asarray(samples[samples.obs.index.get_loc(sample_id)]))
        return _slide_picture(samples, sample_id)
    except (BiosaeError, OSError, ValueError) as error:
        return str(getattr(error, "reason", None) or type(error).__name__)


def _slide_picture(samples: Any, name: str) -> np.ndarray | str:
    """A whole slide at low magnification, where the samples are its tiles."""
    rows = np.flatnonzero(samples.obs["slide"].astype(str) == name) if "slide" in samples.obs else []
    if not len(rows) or "slide_mpp_x" not in samples.obs:
        return "not in samples"
    from biosae.interpret.slides import slide_view

    first = samples.obs.iloc[rows[0]]
    mpp = (first["slide_mpp_x"], first["slide_mpp_y"])
    return slide_view(samples.file(int(rows[0])), size=_SLIDE_SIZE, slide_mpp=mpp)[0]


def gallery(
    adata: AnnData,
    latent: str,
    *,
    samples: Any,
    n: int = 12,
    kinds: Sequence[str] = ("top", "active", "inactive"),
    cap_per_patient: int | None = 2,
    random_state: int = 0,
    fig: Figure | None = None,
) -> Figure:
    """Examples of each kind (images; signals as traces) with the activation under each.

    An item that cannot be read is a grey square with the reason. Images are joined to rows by sample id.

    Parameters
    ----------
    adata : AnnData of shape (n_rows, n_latents)
    latent : str
    samples : biosae.Samples
        Where the items are read from.
    n, kinds, cap_per_patient, random_state
        As in :func:`biosae.interpret.examples`.
    fig : matplotlib.figure.Figure or SubFigure, optional
        Drawn into if given.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        As of :func:`biosae.interpret.examples`.
    """
    chosen = examples(adata, latent, n=n, kinds=kinds, cap_per_patient=cap_per_patient, random_state=random_state)
    columns = min(n, 6)
    rows_a_block, shown = max(1, -(-n // columns)), headings(chosen, kinds)
    with style.paper():
        heights = [0.24 + rows_a_block * 1.28 * (chosen["kind"] == kind).any() for kind in shown]
        fig = style.figure((6.9, 0.55 + sum(heights))) if fig is None else fig
        parts = np.atleast_1d(fig.subfigures(len(shown), 1, height_ratios=heights))
        for part, (kind, heading) in zip(parts, shown.items()):
            items = chosen[chosen["kind"] == kind]
            if items.empty:
                part.suptitle(f"{heading}: there is none", x=0.01, ha="left", fontsize=8, color=style.INK)
                continue
            part.suptitle(f"{heading} (n = {len(items)})", x=0.01, ha="left", fontsize=8, color=style.INK)
            grid = part.subplots(rows_a_block, columns, squeeze=False).ravel()
            for ax in grid:
                ax.set_axis_off()
            for ax, one in zip(grid, items.itertuples()):
                image = read_picture(samples, one.sample_id)
                if isinstance(image, str):
                    ax.set_facecolor("#E8E8E8")
                    ax.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[], aspect="equal")
                    ax.set_axis_on()
                    for spine in ax.spines.values():
                        spine.set_visible(False)
                    ax.text(0.5, 0.5, image, ha="center", va="center", fontsize=6.5, color=style.INK, wrap=True)
                else:
                    ax.imshow(image)
                ax.set_title(style.number(one.activation), fontsize=6.5, loc="center", y=-0.14, va="top")
        what = noun(samples, adata)
        cap = (
            f"at most {cap_per_patient} {what}{'s' * (cap_per_patient > 1)} a patient"
            if cap_per_patient and "patient" in adata.obs
            else "no cap"
        )
        fig.suptitle(
            style.wrap(
                f"{latent}: {firing_sentence(adata, latent)}; {cap}; number under each {what}: activation", width=96
            ),
            x=0.01, ha="left", fontsize=8,
        )  # fmt: skip
    return fig
