"""The autoencoder itself: parameters, encoding, decoding, initialisation, the unit-norm constraint."""

from __future__ import annotations

from collections.abc import Callable, Iterable

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

    unit_atoms = True

    @property
    def n_latents(self) -> int:
        """m (of this process, where the latents are shared)."""
        return len(self.W_dec)

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
        bias = geometric_median(rows)
        start = first_atoms(rows - bias, len(self.W_dec), atoms=atoms, generator=generator)
        self.b_dec.copy_(bias)
        self.W_dec.copy_(start)
        self.W_enc.copy_(start)
        self.b_enc.zero_()
        was_training = self.training
        self.train()
        gain = first_gain(lambda x: self(x)[2], rows, self.b_dec, scale=scale, generator=generator)
        self.train(was_training)
        if gain > ZERO_NORM:
            self.W_enc.div_(gain)


@torch.no_grad()
def first_atoms(centred: torch.Tensor, n_latents: int, *, atoms: str, generator: torch.Generator) -> torch.Tensor:
    """Unit directions (m, d) to start from: rows drawn without replacement as far as they last, or random ones."""
    width = centred.shape[1]
    if atoms == "random":
        start = torch.randn(n_latents, width, generator=generator)
    else:
        passes = -(-n_latents // len(centred))
        order = torch.cat([torch.randperm(len(centred), generator=generator) for _ in range(passes)])[:n_latents]
        start = centred[order]
        if passes > 1:  # a second copy of a row must not be the same latent
            noise = torch.randn(start.shape, generator=generator) / width**0.5
            noise[: len(centred)] = 0
            start = start + 0.5 * noise * start.norm(dim=1, keepdim=True)
    unit_rows_(start, generator=generator)
    return start


@torch.no_grad()
def first_gain(
    reconstruct: Callable[[torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    bias: torch.Tensor,
    *,
    scale: str,
    generator: torch.Generator,
) -> float:
    """Factor by which first reconstructions about ``bias`` are too long; 0 where all of them are 0.

    ``least_squares``: by how much to divide so that the first 4,096 rows are met best; ``probes``: the mean norm of the
    reconstructions of 256 random unit vectors.
    """
    if scale == "least_squares":
        probe = rows[:PROBES] - bias.cpu()
    else:
        probe = torch.randn(256, rows.shape[1], generator=generator)
        unit_rows_(probe, generator=generator)
    norm = square = product = 0.0
    for part in probe.to(bias.device).split(256):
        found = (reconstruct(part + bias) - bias).double()
        norm += float(found.norm(dim=1).sum())
        square += float(found.square().sum())
        product += float((found * part).sum())
    if scale == "least_squares":
        return square / product if product > ZERO_NORM else 0.0
    return norm / len(probe)


@torch.no_grad()
def calibrated(preactivations: Callable[[torch.Tensor], torch.Tensor], rows: Iterable[torch.Tensor], k: int) -> float:
    """Threshold that keeps k latents a row on average over parts of rows, of which ``preactivations`` is a function.

    It lies just below the (k n)-th largest positive pre-activation; each row offers its 8 k largest to the ranking. 0
    where fewer are positive.
    """
    best, n = [], 0
    for x in rows:
        a = torch.relu(preactivations(x))
        best.append(a.topk(min(8 * k, a.shape[1]), dim=1).values.flatten().cpu())
        n += len(x)
    ranked = torch.cat(best)
    ranked = ranked[ranked > 0]
    if len(ranked) <= k * n:
        return 0.0
    last, following = ranked.topk(k * n + 1).values[-2:].tolist()
    return (last + following) / 2


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
