"""Files that biosae writes, read by the libraries themselves: see README.md.

Run by hand in an environment that has the library and biosae: ``python check.py saelens SCRATCH``. Every readable case
of this folder and small SAEs of every architecture that can be written are written, read by the library, and coded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from make import without_torchaudio

import biosae as bs
from biosae.errors import BiosaeError
from biosae.sae.interchange.weights import WRITABLE

HERE = Path(__file__).parent
MISSING = {
    "overcomplete/relu": {"architecture": "relu"}, "overcomplete/batchtopk": {"threshold": 0.4},
    "overcomplete/matching_pursuit": {"architecture": "mp", "k": 4},
    "overcomplete/orthogonal_matching_pursuit": {"architecture": "omp", "k": 4},
    "overcomplete/jumprelu": {}, "overcomplete/archetypal_jumprelu": {},
    "histoscope/batchtopk_tied": {"threshold": 0.1},
}  # fmt: skip


def candidates(scratch: Path):
    """Name, SAE and rows of everything that could be written."""
    for file in sorted(HERE.glob("*/*/expected.npz")):
        name = str(file.parent.relative_to(HERE))
        missing = MISSING.get(name, {"k": 4} if name.startswith("overcomplete") else {})
        try:
            yield name, bs.sae.read(file.parent, device="cpu", **missing), np.load(file)["x"]
        except BiosaeError:
            continue
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32) * 2 + 1
    for architecture in WRITABLE:
        for normalise in ("none", "centre_scale", "whiten", "l2", "layernorm"):
            folder = scratch / "fitted" / architecture / normalise
            if not folder.is_dir():
                sae = bs.sae.SAE(architecture, 16, 4, normalise=normalise, n_steps=3, device="cpu", random_state=0)
                sae.fit(x).save(folder)
            yield f"fitted/{architecture}/{normalise}", bs.sae.load(folder, device="cpu"), x[:12]


def saelens(folder: Path, x: torch.Tensor):
    without_torchaudio()
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    codes = sae.encode(x)
    return codes, sae.decode(codes)


def dictionary_learning(folder: Path, x: torch.Tensor):
    from dictionary_learning.utils import load_dictionary

    sae, _ = load_dictionary(str(folder), "cpu")
    codes = sae.encode(x)
    return codes, sae.decode(codes)


def sparsify(folder: Path, x: torch.Tensor):
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder)
    values, index, _ = sae.encode(x)
    return torch.zeros(len(x), sae.num_latents).scatter(1, index, values), sae(x).sae_out


def overcomplete(folder: Path, x: torch.Tensor):
    import overcomplete.sae as lib

    config = json.loads((folder / "config.json").read_text())
    running = config.pop("running_threshold", None)
    sae = getattr(lib, config.pop("class"))(**config)
    sae.load_state_dict(torch.load(folder / "sae.pt", weights_only=True))
    if running is not None:
        sae.running_threshold = torch.tensor(running)
    codes = sae.eval().encode(x)[1]
    return codes, sae.decode(codes)


def saev_schema(folder: Path, x: torch.Tensor):
    from saev.nn import modeling

    done = modeling.load(folder / "sae.pt").eval()(x)
    return done.f_x, done.x_hats[:, -1]


LIBRARIES = {
    "saelens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify, "overcomplete": overcomplete,
    "saev_schema": saev_schema,
}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("scratch", type=Path)
    given = parser.parse_args()
    bs.settings.progress = False
    equal, refused, wrong, warned = [], [], [], []
    for name, sae, x in candidates(given.scratch):
        folder = given.scratch / given.library / name
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                bs.sae.write(sae, folder, format=given.library.removesuffix("_schema"))
        except BiosaeError:
            refused.append(name)
            continue
        with torch.no_grad():
            codes, x_hat = LIBRARIES[given.library](folder, torch.from_numpy(x))
        z = sae.codes(x)
        off = max(
            float(np.abs(codes.numpy() - z.toarray()).max()),
            float(np.abs(x_hat.numpy() - sae.inverse_transform(z, like=x)).max()),
        )
        if off < 1e-5:
            equal.append(name)
        else:
            (warned if told else wrong).append(f"{name} ({off:.2g})")
    print(f"{given.library}: {len(equal)} equal, {len(refused)} refused, {len(wrong)} wrong {wrong}")
    print("  not equal, as the warning says:", ", ".join(warned) or "none")
    print("  equal:", ", ".join(equal))
    sys.exit(bool(wrong))
