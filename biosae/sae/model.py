"""The autoencoder itself: parameters, encoding, decoding, initialisation, the unit-norm constraint."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from biosae.sae import activations

ZERO_NORM = 1e-12
PROBES = 4096
MEDIAN_ROWS = 4096


class SparseAutoencoder(nn.Module):
    """a = (x - b_dec) W_enc^T + b_enc,  z = activation(a),  x_hat = z W_dec + b_dec.

    ``W_enc`` is stored with one latent a row, (m, d), like ``W_dec``. ``threshold`` is learnt by ``jumprelu``, one for
    each latent; ``batchtopk`` and ``matryoshka`` use a common one in evaluation, so that the code of a row never
    depends on other rows. ``ends`` are the prefix sizes of ``matryoshka``, (m,) for all others.
    """

    def __init__(
        self,
        n_features: int,
        n_latents: int,
        *,
        architecture: str,
        k: int,
        ends: tuple[int, ...] | None = None,
        threshold: float = 0.0,
        bandwidth: float = 1e-3,
    ) -> None:
        super().__init__()
        self.architecture, self.k, self.bandwidth = architecture, k, bandwidth
        self.ends = tuple(ends) if ends else (n_latents,)
        self.W_enc = nn.Parameter(torch.zeros(n_latents, n_features))
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.W_dec = nn.Parameter(torch.zeros(n_latents, n_features))
        self.b_dec = nn.Parameter(torch.zeros(n_features))
        if architecture == "jumprelu":
            self.threshold = nn.Parameter(torch.full((n_latents,), threshold))
        else:
            self.register_buffer("threshold", torch.zeros(()))

    def preactivations(self, x: torch.Tensor) -> torch.Tensor:
        """Pre-activations a, (n, m)."""
        return F.linear(x - self.b_dec, self.W_enc, self.b_enc)

    def activate(self, a: torch.Tensor) -> torch.Tensor:
        """Codes z, (n, m), by the rule of the architecture and the mode (training or evaluation)."""
        if self.architecture == "relu":
            return activations.relu(a)
        if self.architecture == "topk":
            return activations.topk(a, self.k)
        if self.training and self.architecture != "jumprelu":
            return activations.batchtopk(a, self.k)
        return activations.above(a, self.threshold)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes z of rows x."""
        return self.activate(self.preactivations(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Reconstruction z W_dec + b_dec, (n, d)."""
        return torch.addmm(self.b_dec, z, self.W_dec)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pre-activations, codes and reconstruction."""
        a = self.preactivations(x)
        z = self.activate(a)
        return a, z, self.decode(z)

    @torch.no_grad()
    def initialise(self, rows: torch.Tensor, *, atoms: str, scale: str, generator: torch.Generator) -> None:
        """Start from data: b_dec the geometric median, unit atoms, W_enc = g W_dec with one factor g.

        Parameters
        ----------
        rows
            Normalised training rows, (n, d), on the CPU.
        atoms
            ``data``: rows minus the bias, drawn without replacement as far as they last; ``random``: directions.
        scale
            ``probes``: 1 / g is the mean norm of the reconstructions of 256 random unit vectors about b_dec (Gao et al.
            2024, released code); ``least_squares``: g brings the reconstructions of the first 4,096 rows closest to
            them, which the former does not where rows resemble many atoms.
        generator
            CPU generator.
        """
        n_latents, width = self.W_dec.shape
        bias = geometric_median(rows)
        if atoms == "data":
            passes = -(-n_latents // len(rows))
            order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(passes)])[:n_latents]
            start = rows[order] - bias
            if passes > 1:  # a second copy of a row must not be the same latent
                noise = torch.randn(start.shape, generator=generator) / width**0.5
                noise[: len(rows)] = 0
                start = start + 0.5 * noise * start.norm(dim=1, keepdim=True)
        else:
            start = torch.randn(n_latents, width, generator=generator)
        unit_rows_(start, generator=generator)
        self.b_dec.copy_(bias)
        self.W_dec.copy_(start)
        self.W_enc.copy_(start)
        self.b_enc.zero_()
        if scale == "least_squares":
            probe = rows[:PROBES] - bias
        else:
            probe = torch.randn(256, width, generator=generator)
            unit_rows_(probe, generator=generator)
        was_training = self.training
        self.train()
        norm = square = product = 0.0
        for part in probe.to(self.b_dec.device).split(256):
            _, _, x_hat = self(part + self.b_dec)
            found = (x_hat - self.b_dec).double()
            norm += float(found.norm(dim=1).sum())
            square += float(found.square().sum())
            product += float((found * part).sum())
        self.train(was_training)
        if scale == "least_squares":
            gain = square / product if product > ZERO_NORM else 0.0
        else:
            gain = norm / len(probe)
        if gain > ZERO_NORM:
            self.W_enc.div_(gain)


@torch.no_grad()
def unit_rows_(weight: torch.Tensor, *, generator: torch.Generator | None = None) -> None:
    """Scale rows to unit norm in place; with a ``generator``, rows of norm < 1e-12 are drawn anew."""
    norm = weight.norm(dim=1, keepdim=True)
    if generator is not None and bool((norm < ZERO_NORM).any()):
        zero = norm.squeeze(1) < ZERO_NORM
        weight[zero] = torch.randn(int(zero.sum()), weight.shape[1], generator=generator).to(weight)
        norm = weight.norm(dim=1, keepdim=True)
    weight.div_(norm.clamp_min(ZERO_NORM))


def geometric_median(x: torch.Tensor, *, max_iterations: int = 100, tolerance: float = 1e-5) -> torch.Tensor:
    """Point with the least summed distance to the rows of x, (d,), by Weiszfeld's iteration from the mean.

    w_i = 1 / max(||x_i - m||, 1e-12), m <- sum w_i x_i / sum w_i, until a step is < ``tolerance`` (section 0.4).
    """
    median = x.mean(0, dtype=torch.float64)
    for _ in range(max_iterations):
        total, moved = torch.zeros((), dtype=torch.float64), torch.zeros_like(median)
        for part in x.split(MEDIAN_ROWS):
            part = part.double()
            weight = 1 / (part - median).norm(dim=1).clamp_min(ZERO_NORM)
            total += weight.sum()
            moved += weight @ part
        moved /= total
        step = (moved - median).norm()
        median = moved
        if step < tolerance:
            break
    return median.float()
