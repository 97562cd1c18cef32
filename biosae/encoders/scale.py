"""Whether tiles reach an encoder at the physical scale that it was made for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from biosae.data.items import ReadError
from biosae.errors import InputError

if TYPE_CHECKING:
    from biosae.encoders.base import Encoder

SCALES = (0.8, 1.25)
"""Least and largest ratio of the scale that tiles reach to the scale that an encoder was made for."""
_LOOK_AT = 20


def of_right_scale(encoder: Encoder, samples: Any) -> Encoder:
    """The encoder itself, if tiles of the first readable sample's size reach its network at its own scale.

    Asked only of encoders with a fixed input size and a confirmed scale, for samples of known scale, and where nobody
    said with ``match_mpp`` what to do.

    Raises
    ------
    InputError
        If the ratio of both scales is outside 0.8 to 1.25; the message names the ways out.
    """
    p = encoder.preprocess
    if getattr(encoder, "match_said", True) is not None or p.match_mpp or None in (p.size, p.tile_mpp, p.target_mpp):
        return encoder
    if "mpp" in encoder.info.unconfirmed:
        return encoder
    for i in range(min(len(samples), _LOOK_AT)):
        try:
            height, width = samples[i].shape[:2]
        except ReadError:
            continue
        reached, own = p.mpp_of_input(width, height), p.target_mpp
        if not SCALES[0] <= reached / own <= SCALES[1]:
            raise InputError(
                f"{encoder.info.name} was made for {own:g} um/px, and tiles of {width} x {height} px at {p.tile_mpp:g} "
                f"um/px come to {reached:.3g} um/px when they are resized to {p.size} px. Read tiles of {p.size} px at "
                f"that scale (bs.read.wsi(..., mpp={own:g})), or rescale and crop them (load(..., mpp={p.tile_mpp:g}, "
                "match_mpp=True)), or say that the scale may differ (load(..., match_mpp=False))"
            )
        break
    return encoder
