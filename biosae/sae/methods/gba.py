"""Group bias adaptation: feedback on each latent's bias sets how often it fires."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from biosae.errors import InputError, nearest
from biosae.sae.methods.base import Loss, Method, NoOptions, Now
from biosae.sae.model import first_atoms, geometric_median

NEVER = 1e-6
"""A latent that fired in a smaller share of the buffer than this did not fire."""
LOWEST = -1.0
"""Least bias; the largest is 0."""
ADAPTATIONS = 400
"""Adaptations of one training where ``every`` is not given: a bias needs 50 to 100 of them to settle."""
ROWS = 5
"""Rows in which the rarest latents should fire between two adaptations."""


def target_frequencies(n_groups: int, *, highest: float, lowest: float) -> torch.Tensor:
    """p_k = p_1 (p_K / p_1)^((k - 1) / (K - 1)), k = 1, ..., K, falling; p_1 alone where K = 1."""
    step = torch.arange(n_groups, dtype=torch.float64) / max(n_groups - 1, 1)
    return (highest * (lowest / highest) ** step).float()


def adapted_bias(
    bias: torch.Tensor,
    frequency: torch.Tensor,
    largest: torch.Tensor,
    group: torch.Tensor,
    targets: torch.Tensor,
    *,
    lower: float = 0.01,
    raise_: float = 0.01,
) -> torch.Tensor:
    """Biases after one adaptation.

    With r_m = max(0, max y_m) and T_k the mean of the positive r_m of group k (0 if none): where p_m > p_k,
    b_m <- max(b_m - gamma_minus r_m, -1); where latent m never fired, b_m <- min(b_m + gamma_plus T_k, 0).

    Parameters
    ----------
    bias, frequency, largest
        b_m, the share p_m of buffered rows with y_m > 0, and max y_m over them, (m,).
    group
        Group k of each latent, int64 (m,), from 0.
    targets
        p_k, (K,).
    lower, raise_
        gamma_minus and gamma_plus.

    Returns
    -------
    torch.Tensor
        (m,), within [-1, 0] if ``bias`` is.
    """
    r = largest.clamp_min(0)
    fired = (r > 0).to(r)
    count = torch.zeros_like(targets).index_add_(0, group, fired)
    mean = torch.zeros_like(targets).index_add_(0, group, r) / count.clamp_min(1)
    too_often = frequency > targets[group]
    down = (bias - lower * r).clamp_min(LOWEST)
    up = (bias + raise_ * mean[group]).clamp_max(0)
    return torch.where(too_often, down, torch.where(frequency < NEVER, up, bias))


@dataclass(frozen=True)
class GBAOptions(NoOptions):
    """Options of ``gba``."""

    highest: float = 0.1
    """Target frequency of the first group."""
    lowest: float | None = None
    """Target frequency of the last group. None: 0.001, or 5 of the rows between two adaptations where that is more."""
    groups: int = 10
    """Groups of latents; 1 is plain bias adaptation."""
    rate: float = 0.01
    """gamma: change of a bias at one adaptation, in units of the largest pre-activation."""
    every: int | None = None
    """Steps between two adaptations. None: steps / 400, between 1 and 50."""
    activation: str = "jump"
    """``jump``: w . x where w . x + b > 0, not shrunk by the bias; ``relu``: max(w . x + b, 0)."""

    def check(self) -> None:
        """Raise ``InputError`` for a value outside its range."""
        if not 0 < self.highest <= 1:
            raise InputError(f"highest={self.highest!r} is a share and must lie in (0, 1]")
        if self.lowest is not None and not 0 < self.lowest <= self.highest:
            raise InputError(f"lowest={self.lowest!r} must lie in (0, highest], highest={self.highest!r}")
        for name in ("groups", "every"):
            value = getattr(self, name)
            if not ((hasattr(value, "__index__") and value >= 1) or (name == "every" and value is None)):
                raise InputError(f"{name}={value!r} must be a whole number >= 1")
        if not 0 < self.rate < 1:
            raise InputError(f"rate={self.rate!r} must lie between 0 and 1")
        if self.activation not in ("jump", "relu"):
            raise InputError(
                f"activation={self.activation!r} is not known; {nearest(self.activation, ('jump', 'relu'))}"
            )


class GBA(Method):
    """y_m = w_m . (x - b_dec) + b_m, x_hat = sum_m s_m phi(y_m) w_m + b_dec, with tied unit atoms w_m and s_m >= 0.

    Gradients of half the squared error move w, s and b_dec. The biases b_m, in [-1, 0], are moved by
    :func:`adapted_bias` alone, towards the target frequency of the latent's group, so there is no k and no penalty.

    References
    ----------
    Chen, Sheen, Xiong, Wang, Yang 2025, arXiv 2506.14002.
    """

    Options = GBAOptions
    averaged = ("bias",)

    def make(self) -> None:
        """Atoms, their sizes, biases, groups, and what was seen since the last adaptation."""
        m = self.n_latents
        self.W_dec = nn.Parameter(torch.zeros(m, self.n_features))
        self.b_dec = nn.Parameter(torch.zeros(self.n_features))
        self.size = nn.Parameter(torch.ones(m))
        self.register_buffer("bias", torch.zeros(m))
        self.register_buffer("group", torch.zeros(m, dtype=torch.int64))
        self.register_buffer("fired", torch.zeros(m), persistent=False)
        self.register_buffer("largest", torch.full((m,), -torch.inf), persistent=False)
        self.register_buffer("rows", torch.zeros(1), persistent=False)

    def preactivations(self, x: torch.Tensor) -> torch.Tensor:
        """w_m . (x - b_dec), without the bias, (n, m)."""
        return F.linear(x - self.b_dec, self.W_dec)

    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Codes s_m phi(y_m), (n, m)."""
        return self._codes(self.preactivations(x))

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        """Half the squared error."""
        u = self.preactivations(x)
        z = self._codes(u)
        residual = self.decode(z) - x
        y = u.detach() + self.bias
        extra = {"fired": (y > 0).float().sum(0), "largest": y.amax(0)}
        return Loss(0.5 * residual.square().sum(1).mean(), z.detach(), residual.detach(), extra=extra)

    @torch.no_grad()
    def constrain_(self, generator: torch.Generator) -> None:
        """Keep sizes, and with them codes, from becoming negative."""
        self.size.clamp_(min=0)

    @torch.no_grad()
    def after_step_(self, loss: Loss, now: Now) -> None:
        """Remember what fired, and adapt the biases when it is time."""
        self.fired += loss.extra["fired"]
        self.rows += len(loss.z)
        self.largest.copy_(torch.maximum(self.largest, loss.extra["largest"]))
        every = self.options.every or min(50, max(1, now.n_steps // ADAPTATIONS))
        if now.step % every != every - 1:
            return
        frequency, targets = self.fired / self.rows, self._targets(int(self.rows), first=now.step < every)
        self.bias.copy_(
            adapted_bias(
                self.bias, frequency, self.largest, self.group, targets, lower=self.options.rate,
                raise_=self.options.rate,
            )
        )  # fmt: skip
        self.fired.zero_()
        self.rows.zero_()
        self.largest.fill_(-torch.inf)

    def _targets(self, rows: int, *, first: bool) -> torch.Tensor:
        highest, lowest = self.options.highest, self.options.lowest
        if lowest is None:
            lowest = min(highest, max(1e-3, ROWS / rows))
        elif first and rows * lowest < ROWS:
            warnings.warn(
                f"a latent of the rarest group should fire in {rows * lowest:.2g} of the {rows} rows between two "
                f"adaptations; raise every or batch_size, or lowest (now {lowest:g}) to {ROWS / rows:.2g}",
                UserWarning,
                stacklevel=2,
            )
        return target_frequencies(self.options.groups, highest=highest, lowest=lowest).to(self.bias)

    @torch.no_grad()
    def initialise(self, rows: torch.Tensor, *, atoms: str, scale: str, generator: torch.Generator) -> None:
        """Start with b_dec the geometric median, unit atoms, sizes 1, biases 0 and groups of equal size at random."""
        self.b_dec.copy_(geometric_median(rows))
        self.W_dec.copy_(first_atoms(rows - self.b_dec, self.n_latents, atoms=atoms, generator=generator))
        self.size.fill_(1)
        self.group.copy_(torch.randperm(self.n_latents, generator=generator) % self.options.groups)

    def _codes(self, u: torch.Tensor) -> torch.Tensor:
        y = u + self.bias
        value = u if self.options.activation == "jump" else y
        return torch.where(y > 0, value * self.size, torch.zeros_like(y))
