"""What the released code of PolySAE, MP-SAE, the variational SAE and the archetypal SAE computes on small weights.

    python decoders.py --polysae FOLDER --vsae FOLDER --overcomplete FOLDER --saelens FOLDER

Folders hold the packages: ``sae_lens`` of github.com/pakoromilas/PolySAE (7cf6ead), ``dictionary_learning`` of
github.com/ZachData/SPAR-Variational-Sparse-Autoencoders (ad03f7a), ``overcomplete`` 0.3.0 and ``sae_lens`` 6.54.12
from PyPI. Each is run in a process of its own, since two have one name. Writes ``decoders.npz``: weights and rows
that we drew, and what came out, float32 (gradients too where a loss is differentiated). torch 2.15, CPU, one thread.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from _peers import module

NEEDLESS = (
    "transformer_lens", "datasets", "transformers", "wandb", "nnsight", "einops", "simple_parsing", "sae_lens.loading",
)  # fmt: skip
N, D, M, K = 12, 6, 16, 3


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def polysae(folder: str) -> dict[str, torch.Tensor]:
    peer = module("sae_lens.saes.polysae", folder, stand_ins=NEEDLESS)

    class Decoder(peer.PolyDecoderMixin, torch.nn.Module):
        pass

    found = {"z": torch.relu(drawn(N, M, seed=0))}
    for shared in (True, False):
        ranks = (5, 4, 3)
        decoder = Decoder()
        decoder.cfg, decoder.dtype, decoder.device = argparse.Namespace(d_sae=M, d_in=D), torch.float32, "cpu"
        torch.manual_seed(int(shared))
        decoder._init_poly_decoder_weights(ranks, 3, shared_u=shared)
        decoder.b_dec = torch.nn.Parameter(drawn(D, seed=1))
        names = ["U_shared"] if shared else ["U1", "U2", "U3"]
        with torch.no_grad():
            for place, name in enumerate(names):
                getattr(decoder, name).add_(0.1 * drawn(*getattr(decoder, name).shape, seed=2 + place))
        tag = "shared" if shared else "separate"
        names += ["C1", "C2", "C3", "lambda2", "lambda3", "b_dec"]
        found |= {f"{tag}/{name}": getattr(decoder, name).detach().clone() for name in names}
        x_hat = decoder._poly_decode(found["z"])
        (x_hat**2).sum().backward()
        found[f"{tag}/x_hat"] = x_hat.detach()
        found |= {f"{tag}/grad/{name}": getattr(decoder, name).grad for name in names}
        decoder.orthogonalize_U()
        for name in names[: 1 if shared else 3]:
            found[f"{tag}/after/{name}"] = getattr(decoder, name).detach().clone()
        found[f"{tag}/directions"] = decoder.get_decoder_directions()
    return found


def vsae(folder: str) -> dict[str, torch.Tensor]:
    peer = module(
        "dictionary_learning.trainers.vsae_topk", folder, stand_ins=NEEDLESS
    )  # fmt: skip
    found = {"x": drawn(N, D, seed=10)}
    for learned in (False, True):
        model = peer.VSAETopKConfig(D, M, K, var_flag=int(learned), dtype=torch.float32, device=torch.device("cpu"))
        training = peer.VSAETopKTrainingConfig(steps=1000, kl_coeff=0.3, auxk_alpha=0.0)
        trainer = peer.VSAETopKTrainer(model, training)
        ae = trainer.ae
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in ae.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape))
        tag = "learned" if learned else "fixed"
        found |= {f"{tag}/{name}": value.detach().clone() for name, value in ae.named_parameters()}
        codes, _, mu, log_var = ae.encode(found["x"], training=False)
        found |= {f"{tag}/codes": codes, f"{tag}/x_hat": ae.decode(codes)}
        found[f"{tag}/kl"] = trainer._compute_kl_loss(mu, mu, log_var)
        if not learned:  # the noise of the other is torch's own
            loss = trainer.loss(found["x"], step=50)  # half of the KL warm-up
            loss.backward()
            found[f"{tag}/loss"] = loss
            found |= {f"{tag}/grad/{name}": value.grad for name, value in ae.named_parameters()}
    return found


def overcomplete(folder: str) -> dict[str, torch.Tensor]:
    peer = module("overcomplete.sae", folder, stand_ins=("cv2", "timm", "torchvision"))
    from overcomplete.sae.archetypal_dictionary import RelaxedArchetypalDictionary
    from overcomplete.sae.omp_sae import OMPSAE

    found = {"x": drawn(N, D, seed=20), "atoms": torch.nn.functional.normalize(drawn(M, D, seed=21), dim=1)}
    found["hard"] = torch.abs(drawn(N, 4, seed=22)) @ found["atoms"][:4]
    for tag, rows, kind, steps in (
        ("mp", "x", peer.MpSAE, 2), ("mp_long", "x", peer.MpSAE, 12), ("omp", "hard", OMPSAE, 3),
    ):  # fmt: skip
        model = kind(D, M, k=steps)
        with torch.no_grad():
            model.dictionary._weights.copy_(found["atoms"])
        residual, codes = model.encode(found[rows])
        found |= {f"{tag}/residual": residual.detach(), f"{tag}/codes": codes.detach()}
        if kind is peer.MpSAE:
            (found[rows] - codes @ model.get_dictionary()).square().sum(1).mean().backward()
            found[f"{tag}/grad"] = model.dictionary._weights.grad
    points = drawn(10, D, seed=23)
    layer = RelaxedArchetypalDictionary(D, M, points, delta=0.5)
    with torch.no_grad():
        layer.W.copy_(drawn(M, 10, seed=24))
        layer.Relax.copy_(drawn(M, D, seed=25) * 0.3)
        layer.multiplier.fill_(0.4)
    found |= {"ra/points": points, "ra/W": layer.W.detach().clone(), "ra/relax": layer.Relax.detach().clone()}
    found["ra/atoms"] = layer.get_dictionary().detach()
    found |= {"ra/W_after": layer.W.detach().clone(), "ra/relax_after": layer.Relax.detach().clone()}
    return found


def saelens(folder: str) -> dict[str, torch.Tensor]:
    peer = module("sae_lens.saes.matching_pursuit_sae", folder, stand_ins=NEEDLESS)
    found = {"x": drawn(N, D, seed=30)}
    atoms = torch.nn.functional.normalize(drawn(M, D, seed=31), dim=1).requires_grad_()
    found["atoms"] = atoms.detach()
    for tag, threshold, steps, repeat in (("fixed", 0.0, 4, False), ("until", 0.3, None, True)):
        z = peer._encode_matching_pursuit(found["x"], atoms, threshold, steps, repeat)
        atoms.grad = None
        (found["x"] - z @ atoms).square().sum(1).mean().backward()
        found |= {f"{tag}/codes": z.detach(), f"{tag}/grad": atoms.grad.clone()}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parts = {"polysae": polysae, "vsae": vsae, "overcomplete": overcomplete, "saelens": saelens}
    for name in parts:
        parser.add_argument(f"--{name}")
    parser.add_argument("--only", choices=parts)
    parser.add_argument("--to")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.only:
        arrays = parts[given.only](getattr(given, given.only))
        np.savez(given.to, **{f"{given.only}/{n}": v.detach().numpy().astype(np.float32) for n, v in arrays.items()})
    else:
        together: dict[str, np.ndarray] = {}
        with tempfile.TemporaryDirectory() as folder:
            for name in parts:
                to = f"{folder}/{name}.npz"
                own = [sys.executable, __file__, f"--{name}", getattr(given, name), "--only", name, "--to", to]
                subprocess.run(own, check=True)
                together |= dict(np.load(to))
        np.savez_compressed(Path(__file__).with_suffix(".npz"), **together)
