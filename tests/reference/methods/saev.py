"""Weights of latents and co-occurring latents of samples by the released SAE-V code.

    python saev.py FOLDER

FOLDER is a checkout of saev-2025/SAELens-V, commit d07d7c7. Its scripts need large models and two GPUs, so their two
pure functions are taken out of the files and run by themselves: ``process_activations_and_save`` of
``scripts/cosimilarity.py`` and ``separate_feature`` of ``sae_lens/activation_visualization.py``. Tokens are random
numbers drawn here.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
import tqdm


def taken(file: Path, name: str):
    tree = ast.parse(file.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") == name]
    found = {"np": np, "os": os, "torch": torch, "tqdm": tqdm}
    exec(compile(tree, str(file), "exec"), found)
    return found[name]


def codes(rng: np.random.Generator, n: int, density: np.ndarray) -> np.ndarray:
    z = rng.gamma(2.0, 0.5, (n, len(density))) * (rng.random((n, len(density))) < density)
    return z.astype(np.float32)


def main(folder: str) -> None:
    root, rng = Path(folder), np.random.default_rng(0)
    weigh = taken(root / "scripts" / "cosimilarity.py", "process_activations_and_save")
    shared = taken(root / "sae_lens" / "activation_visualization.py", "separate_feature")

    m, out = 24, {}
    # latents of either modality, of both, rare in one, and one that is silent
    density = {"text": np.linspace(0, 0.5, m), "image": np.linspace(0.5, 0, m)}
    density["text"][5] = density["image"][5] = 0
    tokens = {}
    for name, n in (("text", 150), ("image", 250)):
        z, hidden = codes(rng, n, density[name]), rng.normal(size=(n, 6)).astype(np.float32)
        hidden[3] = 0
        tokens[name] = [
            [{"features": {int(j): float(row[j]) for j in np.flatnonzero(row)}, "logits": h.tolist()}]
            for row, h in zip(z, hidden, strict=True)
        ]
        out |= {f"z_{name}": z, f"hidden_{name}": hidden}
    with tempfile.TemporaryDirectory() as made:
        args = argparse.Namespace(feature_num=m, top_k=30, text_image_top_k=5, output_dir=made)
        weigh(tokens["text"], tokens["image"], args)
        lists = {n: Path(made, f"{n}_feature_list.txt").read_text().split() for n in ("text", "image", "cosi")}
    out["first"] = np.array(lists["text"], np.int64)
    out["second"] = np.array(lists["image"], np.int64)
    pairs = [line.split(",") for line in lists["cosi"]]
    out["latent"], out["omega"] = np.array([int(j) for j, _ in pairs]), np.array([float(w) for _, w in pairs])

    n_samples, n_text, n_image = 3, 12, 1176  # the code knows pictures of 1,176 tokens only
    acts = codes(rng, n_samples * (n_text + n_image), np.full(m, 0.002)).reshape(n_samples, n_text + n_image, m)
    acts[:, :4] = codes(rng, n_samples * 4, np.full(m, 0.3)).reshape(n_samples, 4, m)
    place = torch.arange(5, 5 + n_image).repeat(n_samples, 1)
    together = shared(place, torch.from_numpy(acts))
    flags = np.zeros((n_samples, m), bool)
    for i, found in enumerate(together):
        flags[i, found] = True
    entries = scipy.sparse.coo_matrix(acts.reshape(-1, m))
    out |= {
        "acts_row": entries.row, "acts_column": entries.col, "acts_value": entries.data,
        "acts_shape": np.array(acts.shape), "first_image": np.array(5), "shared": flags,
    }  # fmt: skip
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **out)


if __name__ == "__main__":
    main(sys.argv[1])
