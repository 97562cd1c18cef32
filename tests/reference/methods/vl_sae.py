"""Codes, reconstructions, loss and gradient of the released VL-SAE, and the loss of its alignment autoencoder.

    python vl_sae.py FOLDER

FOLDER holds ``sae_model.py`` and ``train_aux.py`` of ssfgunner/VL-SAE, ``lvlms/sae_trainer``, commit 2d4a675. Of the
latter only ``contrastive_loss`` is used. Weights and rows are random numbers drawn here. Made with torch 2.15.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    import sae_model

    tree = ast.parse((Path(folder) / "train_aux.py").read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") == "contrastive_loss"]
    found = {"torch": torch, "F": F}
    exec(compile(tree, "train_aux.py", "exec"), found)

    torch.manual_seed(0)
    model = sae_model.VL_SAE(8, 32, topk=5)
    vision = torch.randn(40, 8)
    text = vision + 0.5 * torch.randn(40, 8)
    x_hat, y_hat, z_x, z_y = model(vision, text)
    loss = F.mse_loss(x_hat, vision) + F.mse_loss(y_hat, text)
    loss.backward()
    out = {
        "x": vision, "y": text, "x_hat": x_hat, "y_hat": y_hat, "z_x": z_x, "z_y": z_y, "loss": loss,
        "W_enc": model.encoder, "W_dec": model.vision_decoder.weight.T, "b_dec": model.vision_decoder.bias,
        "W_second": model.text_decoder.weight.T, "b_second": model.text_decoder.bias,
        "grad_W_enc": model.encoder.grad, "grad_W_dec": model.vision_decoder.weight.grad.T,
        "grad_b_second": model.text_decoder.bias.grad,
    }  # fmt: skip
    auxiliary = sae_model.AuxiliaryAE(8, 6, projection_dim=5)
    wide, narrow = torch.randn(12, 8), torch.randn(12, 6)
    h, g, wide_hat, narrow_hat = auxiliary(wide, narrow)
    contrast = found["contrastive_loss"](h, g, 0.07)
    total = contrast + F.mse_loss(wide_hat, wide) + F.mse_loss(narrow_hat, narrow)
    for t, (there, back) in enumerate(
        (
            (auxiliary.vision_projection, auxiliary.vision_decoder),
            (auxiliary.text_projection, auxiliary.text_decoder),
        )
    ):
        out |= {
            f"W_in_{t}": there.weight, f"b_in_{t}": there.bias, f"W_out_{t}": back.weight, f"b_out_{t}": back.bias,
        }  # fmt: skip
    out |= {"wide": wide, "narrow": narrow, "h": h, "g": g, "contrast": contrast, "total": total}
    np.savez_compressed(
        Path(__file__).with_suffix(".npz"), **{n: v.detach().contiguous().numpy() for n, v in out.items()}
    )


if __name__ == "__main__":
    main(sys.argv[1])
