"""Other forms of the built-in architectures: tied weights, no biases, atoms of any norm, several k, random prefixes.

``SAE("relu")`` and the other four without ``options`` take the sparse step; with ``options`` they are the classes of
this module, trained by autograd. Default options give the same loss as the sparse step.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from biosae.errors import InputError, nearest
from biosae.sae import activations, objectives
from biosae.sae.methods.base import Loss, Method, NoOptions, Now
from biosae.sae.model import ZERO_NORM, calibrated, first_atoms, first_gain, geometric_median

SLICE = 256
ALL_PREFIXES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
PARETO = 0.5
"""Exponent of the truncated Pareto distribution of random prefixes."""
APRIL_NORM = 0.1
"""First norm of the atoms of ``relu`` with ``norm="atoms"``."""
PENALTY_WEIGHT = {"target": 4.0, "l0": 0.01, "tanh": 0.05}
"""Weight of each penalty of ``jumprelu`` where none is given."""


@dataclass(frozen=True)
class PlainOptions(NoOptions):
    """What all built-in architectures have in common."""

    tied: bool = False
    """One matrix for both: W_enc = W_dec."""
    pre_bias: bool = True
    """Subtract b_dec from the rows before encoding."""
    encoder_bias: bool = True
    """Learn b_enc; otherwise it stays 0."""
    norm: str = "unit"
    """``unit``: atoms are kept at norm 1. ``atoms``: each has a norm of its own, and penalties count z_j ||d_j||."""

    def check(self) -> None:
        """Raise ``InputError`` for a value that makes no sense."""
        one_of("norm", self.norm, ("unit", "atoms"))


class Plain(Method):
    """a = (x - b_dec) W_enc^T + b_enc with parts left out; x_hat = z W_dec + b_dec."""

    Options: ClassVar[type] = PlainOptions

    def make(self) -> None:
        """Make what the options leave."""
        super().make()
        self.unit_atoms = self.options.norm == "unit"
        if self.options.tied:
            del self.W_enc
        if not self.options.encoder_bias:
            del self.b_enc
            self.register_buffer("b_enc", torch.zeros(self.n_latents))

    def preactivations(self, x: torch.Tensor) -> torch.Tensor:
        """Pre-activations a, (n, m)."""
        centred = x - self.b_dec if self.options.pre_bias else x
        return F.linear(centred, self.W_dec if self.options.tied else self.W_enc, self.b_enc)

    @torch.no_grad()
    def initialise(self, rows: torch.Tensor, *, atoms: str, scale: str, generator: torch.Generator) -> None:
        """As the base class; both uses of a tied matrix share the factor, unless its atoms are of unit norm."""
        if not self.options.tied:
            return super().initialise(rows, atoms=atoms, scale=scale, generator=generator)
        bias = geometric_median(rows)
        self.b_dec.copy_(bias)
        self.W_dec.copy_(first_atoms(rows - bias, self.n_latents, atoms=atoms, generator=generator))
        if not self.unit_atoms:
            gain = first_gain(lambda x: self.rebuilt(x, generator), rows, bias, scale=scale, generator=generator)
            if gain > ZERO_NORM:
                self.W_dec.div_(gain**0.5)

    def outcome(
        self, x: torch.Tensor, a: torch.Tensor, z: torch.Tensor, x_hat: torch.Tensor, total: torch.Tensor, now: Now
    ) -> Loss:
        """The loss with AuxK where there are dead latents."""
        if now.aux_k and len(now.dead):
            total = total + now.aux_alpha * objectives.auxk(x - x_hat, a, now.dead, self.W_dec, now.aux_k)
        return Loss(total, z.detach(), (x_hat - x).detach())


# ---------------------------------------------------------------------------------------------------------------- relu


@dataclass(frozen=True)
class ReluOptions(PlainOptions):
    """Options of ``relu``."""

    l1: float = 0.2
    """Weight of the L1 penalty, in the units of the normalised rows."""

    def check(self) -> None:
        """Raise ``InputError`` for a value that makes no sense."""
        super().check()
        at_least("l1", self.l1, 0)


class Relu(Plain):
    """mse + l1 mean_i sum_j z_ij ||d_j||, z = max(a, 0) (Bricken et al. 2023; norms: Anthropic, April 2024)."""

    Options: ClassVar[type] = ReluOptions

    @torch.no_grad()
    def initialise(self, rows: torch.Tensor, *, atoms: str, scale: str, generator: torch.Generator) -> None:
        """With ``norm="atoms"``: W_enc = W_dec of norm 0.1, as published."""
        super().initialise(rows, atoms=atoms, scale=scale, generator=generator)
        if not self.unit_atoms and not self.options.tied:
            self.W_dec.mul_(APRIL_NORM)
            self.W_enc.copy_(self.W_dec)

    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Codes max(a, 0)."""
        return torch.relu(self.preactivations(x))

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        """Squared error and L1 penalty."""
        a = self.preactivations(x)
        z = torch.relu(a)
        x_hat = self.decode(z)
        size = objectives.l1_norm(z) if self.unit_atoms else objectives.l1_atoms(z, self.W_dec)
        return self.outcome(x, a, z, x_hat, objectives.mse_sum(x, x_hat) + now.ramp * self.options.l1 * size, now)


# ------------------------------------------------------------------------------------------------------------ jumprelu


@dataclass(frozen=True)
class JumpReluOptions(PlainOptions):
    """Options of ``jumprelu``."""

    penalty: str = "target"
    """``target``: weight (L0 / k - 1)^2. ``l0``: weight L0. ``tanh``: weight sum_j tanh(scale z_j ||d_j||)."""
    weight: float | None = None
    """Weight of the penalty. None: 4 for ``target``; 0.01 for ``l0`` and 0.05 for ``tanh``, which find their own L0."""
    scale: float = 4.0
    """Steepness of ``tanh``."""
    bandwidth: float = 0.1
    """Width of the window about a threshold that lends it a derivative, in normalised units."""
    threshold: float = 1e-3
    """First threshold, in normalised units."""

    def check(self) -> None:
        """Raise ``InputError`` for a value that makes no sense."""
        super().check()
        one_of("penalty", self.penalty, tuple(PENALTY_WEIGHT))
        if self.weight is not None:
            at_least("weight", self.weight, 0)
        for name in ("scale", "bandwidth"):
            at_least(name, getattr(self, name), 0, strictly=True)
        at_least("threshold", self.threshold, 0)


class JumpRelu(Plain):
    """mse + penalty, z = a 1[a > theta] with a learnt threshold a latent (Rajamanoharan et al. 2024)."""

    Options: ClassVar[type] = JumpReluOptions
    closed: ClassVar[bool] = False
    """Whether a latent at its threshold is open."""

    def make(self) -> None:
        """The thresholds besides."""
        super().make()
        self.threshold = nn.Parameter(torch.full((self.n_latents,), float(self.options.threshold)))

    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Codes a where the threshold is passed."""
        return activations.jumprelu(self.preactivations(x), self.threshold, 1.0, closed=self.closed)[0]

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        """Squared error and the penalty chosen."""
        o = self.options
        a = self.preactivations(x)
        z, l0 = activations.jumprelu(a, self.threshold, o.bandwidth, closed=self.closed)
        x_hat = self.decode(z)
        if o.penalty == "target":
            penalty = objectives.l0_target(l0, now.k)
        elif o.penalty == "l0":
            penalty = l0.mean()
        else:
            penalty = objectives.tanh_norm(z, self.W_dec, scale=o.scale)
        weight = PENALTY_WEIGHT[o.penalty] if o.weight is None else o.weight
        return self.outcome(x, a, z, x_hat, objectives.mse_sum(x, x_hat) + now.ramp * weight * penalty, now)

    @torch.no_grad()
    def constrain_(self, generator: torch.Generator) -> None:
        """Thresholds stay at or above 0."""
        self.threshold.clamp_(min=0)


# ---------------------------------------------------------------------------------------------------------------- topk


@dataclass(frozen=True)
class TopKOptions(PlainOptions):
    """Options of ``topk``."""

    multi: int | None = None
    """MultiTopK: add the error with ``multi`` times k latents; published with 4. None: one k."""
    multi_weight: float = 1 / 8
    """Weight of that second error."""

    def check(self) -> None:
        """Raise ``InputError`` for a value that makes no sense."""
        super().check()
        if self.multi is not None:
            whole("multi", self.multi, 2)
        at_least("multi_weight", self.multi_weight, 0)


class TopK(Plain):
    """mse(k) + multi_weight mse(multi k), z the k largest positive pre-activations (Gao et al. 2024)."""

    Options: ClassVar[type] = TopKOptions

    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Codes: the k largest positive pre-activations."""
        return activations.topk(self.preactivations(x), self.k)

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        """Squared error, at one k or two."""
        a = self.preactivations(x)
        z = activations.topk(a, now.k)
        x_hat = self.decode(z)
        total = objectives.mse_sum(x, x_hat)
        if self.options.multi is not None:
            wider = self.decode(activations.topk(a, self.options.multi * now.k))
            total = total + self.options.multi_weight * objectives.mse_sum(x, wider)
        return self.outcome(x, a, z, x_hat, total, now)


# ----------------------------------------------------------------------------------------------- batchtopk, matryoshka


@dataclass(frozen=True)
class BatchTopKOptions(PlainOptions):
    """Options of ``batchtopk``."""

    shrink: bool = False
    """Codes are a - theta instead of a in evaluation, as SAIL has it: every code is theta smaller."""


class BatchTopK(Plain):
    """mse, z the k n largest positive pre-activations of the batch; in evaluation those above one threshold."""

    Options: ClassVar[type] = BatchTopKOptions
    late: ClassVar[tuple[str, ...]] = ("shrink",)

    def make(self) -> None:
        """The threshold besides."""
        super().make()
        self.register_buffer("threshold", torch.zeros(()))

    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Codes above the stored threshold."""
        a = self.preactivations(x)
        return torch.relu(a - self.threshold) if self.options.shrink else activations.above(a, self.threshold)

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        """Squared error."""
        a = self.preactivations(x)
        z = activations.batchtopk(a, now.k)
        x_hat = self.decode(z)
        return self.outcome(x, a, z, x_hat, objectives.mse_sum(x, x_hat), now)

    @torch.no_grad()
    def complete_(self, rows: torch.Tensor, generator: torch.Generator) -> None:
        """Set the threshold that keeps k latents a row on average over training rows."""
        self.threshold.fill_(calibrated(self.preactivations, rows.split(SLICE), self.k))


@dataclass(frozen=True)
class MatryoshkaOptions(BatchTopKOptions):
    """Options of ``matryoshka``."""

    prefixes: Any = ALL_PREFIXES
    """Ends of the prefixes as rising shares of the latents, the last one 1, or ``random``: new ones at each step."""
    n_random: int = 10
    """Random prefixes of a step, the whole dictionary among them."""
    bias_term: bool = False
    """Count the error of b_dec alone as one more prefix."""
    level_k: Any = None
    """k of each prefix, which then selects its latents alone (SAIL); the last must be ``k``. None: one selection."""

    def check(self) -> None:
        """Raise ``InputError`` for a value that makes no sense."""
        super().check()
        whole("n_random", self.n_random, 2)
        if self.prefixes != "random":
            shares = list(self.prefixes) if isinstance(self.prefixes, (list, tuple)) else []
            if not shares or any(not 0 < s <= 1 for s in shares) or shares != sorted({*shares, 1}):
                raise InputError(
                    f"prefixes={self.prefixes!r} must be 'random' or rising shares in (0, 1] that end with 1"
                )
        if self.level_k is not None:
            ks = list(self.level_k) if isinstance(self.level_k, (list, tuple)) else []
            if self.prefixes == "random" or len(ks) != len(self.prefixes) or any(k < 1 for k in ks):
                raise InputError(f"level_k={self.level_k!r} must give a k of at least 1 for each of the fixed prefixes")


class Matryoshka(BatchTopK):
    """Mean over prefixes of the dictionary of the mse by their latents alone (Bussmann et al. 2025)."""

    Options: ClassVar[type] = MatryoshkaOptions

    def make(self) -> None:
        """Find the ends of the prefixes."""
        super().make()
        o = self.options
        self.ends: tuple[int, ...] | None = None
        if o.prefixes != "random":
            ends = [max(1, round(share * self.n_latents)) for share in o.prefixes]
            self.ends = tuple(sorted(set(ends)))
        if o.level_k is not None:
            if len(self.ends) < len(o.level_k):
                raise InputError(
                    f"n_latents={self.n_latents} is too small for {len(o.level_k)} prefixes of their own k"
                )
            if o.level_k[-1] != self.k:
                raise InputError(f"level_k={o.level_k!r} must end with k={self.k}, that of the whole dictionary")

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        """Mean of the squared errors of all prefixes."""
        a = self.preactivations(x)
        ends = self.ends or random_ends(self.n_latents, self.options.n_random, now.generator)
        if self.options.level_k is None:
            z = activations.batchtopk(a, now.k)
            errors, x_hat, start = [], self.b_dec.expand_as(x), 0
            for end in ends:
                x_hat = x_hat + z[:, start:end] @ self.W_dec[start:end]
                errors.append(objectives.mse_sum(x, x_hat))
                start = end
        else:
            errors = []
            for end, k in zip(ends, self.options.level_k, strict=True):
                share = now.k / self.options.level_k[-1]
                z = activations.batchtopk(a[:, :end], max(1, round(k * share)))
                x_hat = torch.addmm(self.b_dec, z, self.W_dec[:end])
                errors.append(objectives.mse_sum(x, x_hat))
        if self.options.bias_term:
            errors.append(objectives.mse_sum(x, self.b_dec.expand_as(x)))
        return self.outcome(x, a, z, x_hat, torch.stack(errors).mean(), now)


def random_ends(n_latents: int, n: int, generator: torch.Generator | None) -> tuple[int, ...]:
    """Ends of at most n prefixes, rising, the last one m; the others with chance in proportion to end^-1.5.

    A truncated Pareto distribution of exponent 0.5: small prefixes come often, so that early latents stay general at
    whatever length they are cut.
    """
    if n_latents == 1:
        return (1,)
    chance = torch.arange(1, n_latents, dtype=torch.float64) ** -(1 + PARETO)
    drawn = torch.multinomial(chance, min(n - 1, n_latents - 1), generator=generator) + 1
    return (*sorted(drawn.tolist()), n_latents)


# ------------------------------------------------------------------------------------------------------- shared checks


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ``InputError`` unless the value is a choice."""
    if value not in choices:
        raise InputError(f"{name}={value!r} is not known; {nearest(value, choices)}")


def at_least(name: str, value: Any, least: float, *, strictly: bool = False) -> None:
    """Raise ``InputError`` unless the value is a finite number >= least (> with ``strictly``)."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not (least < value if strictly else least <= value) or value == float("inf"):
        raise InputError(f"{name}={value!r} must be a number {'>' if strictly else '>='} {least:g}")


def whole(name: str, value: Any, least: int) -> None:
    """Raise ``InputError`` unless the value is a whole number >= least."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}={value!r} must be a whole number >= {least}")
