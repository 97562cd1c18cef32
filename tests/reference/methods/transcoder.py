"""Codes, predictions and the error of a TopK transcoder of sparsify.

    SPARSIFY_DISABLE_TRITON=1 python transcoder.py

Needs the package eai-sparsify (made with 1.3.3). Weights and rows are random numbers drawn here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sparsify import SparseCoder, SparseCoderConfig


def main() -> None:
    torch.manual_seed(0)
    coder = SparseCoder(8, SparseCoderConfig(num_latents=24, k=4, transcode=True))
    for parameter in coder.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
    x, y = torch.randn(30, 8), torch.randn(30, 8)
    found = coder(x, y)
    z = torch.zeros(30, 24).scatter(1, found.latent_indices, found.latent_acts)
    np.savez_compressed(
        Path(__file__).with_suffix(".npz"),
        **{
            name: value.detach().float().numpy()
            for name, value in {
                "W_enc": coder.encoder.weight, "b_enc": coder.encoder.bias, "W_dec": coder.W_dec, "b_dec": coder.b_dec,
                "x": x, "y": y, "z": z, "y_hat": found.sae_out, "fvu": found.fvu,
            }.items()
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
