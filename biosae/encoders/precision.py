"""``precision="fast"``: bfloat16 where the processor multiplies it natively and the embeddings stay what they are."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from biosae.encoders.base import Encoder

LEAST_COSINE = 0.999
"""Least cosine between a float32 and a bfloat16 embedding of every probe image for ``"fast"`` to take bfloat16."""
_PROBES = 4


def has_bfloat16(device: str) -> bool:
    """Whether a device has instructions that multiply bfloat16 (elsewhere it is emulated, and slower than float32)."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(bool(able.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def fastest(encoder: Encoder) -> Encoder:
    """The encoder in channels_last, and in bfloat16 where the device has it and the embeddings agree.

    Agreement is tried, not assumed: four generated images (Gaussian fields with a 1/f spectrum) go through the network
    in both precisions, and bfloat16 is taken if every pair of embeddings at ``final`` has a cosine of at least 0.999.
    ``precision`` then says which it is, and it is part of the identity.
    """
    import torch

    if encoder.item != "image":
        return encoder
    other = _converted(encoder, "float32")
    if not has_bfloat16(encoder.device):
        return other
    batch = torch.stack([encoder.preprocess(image) for image in _images(encoder)])
    half = _converted(encoder, "bfloat16")
    ours, theirs = (one.forward(batch)["final"].flatten(1) for one in (half, encoder))
    least = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=1).min())
    if least >= LEAST_COSINE:
        return half
    warnings.warn(
        f"{encoder.info.name} stays in float32: in bfloat16 an embedding of a probe image has a cosine of only "
        f"{least:.4f} with that in float32 (precision='bfloat16' takes it all the same)",
        stacklevel=3,
    )
    return other


def _converted(encoder: Encoder, precision: str) -> Encoder:
    import torch

    other = copy.copy(encoder)
    other.precision, other.channels_last, other._memory = precision, True, torch.channels_last
    model = copy.deepcopy(encoder.model) if precision != encoder.precision else encoder.model
    other.model = model.to(dtype=getattr(torch, precision), memory_format=torch.channels_last)
    return other


def _images(encoder: Encoder) -> list[np.ndarray]:
    """Colour images ``uint8 (H, W, 3)`` whose amplitude falls with frequency as that of photographs does."""
    from biosae.encoders.sites import probe_size

    height, width = probe_size(encoder)
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    images = []
    for _ in range(_PROBES):
        noise = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency
        field = np.moveaxis(np.fft.irfft2(noise, s=(height, width)), 0, 2)
        images.append(np.clip(128 + 45 * field / field.std(), 0, 255).astype(np.uint8))
    return images
