"""Numbers of the authors' top-AFA code for top_afa.npz.

``python top_afa.py FOLDER`` with the folder ``training`` of SewoongLee/top-afa-sae (MIT; commit 1c7a683) writes the
file beside this script. Weights and rows are drawn here from numpy; the model gives its forward and backward pass.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, sys.argv[1])

from sae import TopAFASAE

D, M, N = 16, 40, 24
draw = np.random.default_rng(0)
decoder = draw.standard_normal((M, D)).astype(np.float32)
unit = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
given = {
    "W_enc": (unit + 0.1 * draw.standard_normal((M, D))).astype(np.float32),
    "W_dec": unit.astype(np.float32),
    "b_dec": (0.2 * draw.standard_normal(D)).astype(np.float32),
    "x": draw.standard_normal((N, D)).astype(np.float32) * np.linspace(0.2, 3, N, dtype=np.float32)[:, None],
}
out = dict(given)
for name, scale in (("unit", 1.0), ("free", np.linspace(0.3, 2, M, dtype=np.float32)[:, None])):
    config = {
        "act_size": D, "dict_size": M, "seed": 0, "device": "cpu", "dtype": torch.float32, "input_unit_norm": False,
        "l1_coeff": 0.0, "afa_coeff": 1 / 32, "n_batches_to_dead": 5,
    }  # fmt: skip
    model = TopAFASAE(config)
    with torch.no_grad():
        model.W_enc.copy_(torch.from_numpy(given["W_enc"].T))
        model.W_dec.copy_(torch.from_numpy(given["W_dec"] * scale))
        model.b_dec.copy_(torch.from_numpy(given["b_dec"]))
    found = model(torch.from_numpy(given["x"]))
    (found["l2_loss"] + found["afa_loss"]).backward()
    for key in ("feature_acts", "sae_out", "l2_loss", "afa_loss", "l0_norm"):
        out[f"{name}_{key}"] = found[key].detach().numpy()
    for key in ("W_enc", "W_dec", "b_dec"):
        grad = getattr(model, key).grad.numpy()
        out[f"{name}_grad_{key}"] = grad.T if key == "W_enc" else grad
np.savez_compressed(Path(__file__).with_suffix(".npz"), **out)
