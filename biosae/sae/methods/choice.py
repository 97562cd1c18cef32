"""Mutual Choice and Feature Choice: sparsity as a budget of row-latent pairs, and the loss for under-used latents."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from biosae.errors import InputError
from biosae.sae.activations import above, batchtopk
from biosae.sae.methods.base import Loss, Method, NoOptions, Now
from biosae.sae.model import calibrated
from biosae.sae.objectives import auxk

BLOCK = 256
"""Rows, or latents, that are looked at together when thresholds are set."""

PARTS = 8
"""Groups of columns of like budget in which the largest entries are looked for."""
SAMPLE = 65_536
"""Entries of a batch from which the level of the k largest a row is estimated."""


def column_largest(r: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Feature Choice: the ``budget[j]`` largest entries of each column j, of equal ones those of the earlier rows.

    Parameters
    ----------
    r
        (n, m).
    budget
        Rows that each latent may have, int64 (m,); more than n counts as n.

    Returns
    -------
    torch.Tensor
        bool (n, m) with exactly min(budget_j, n) entries True in column j.
    """
    n, m = r.shape
    budget = budget.clamp(0, n)
    keep = torch.zeros((m, n), dtype=torch.bool, device=r.device)
    for part in budget.argsort(descending=True, stable=True).split(max(1, m // PARTS)):
        wanted = budget[part, None]
        most = int(wanted.max())
        if most == 0:
            continue
        columns = r.detach().T[part]
        largest = columns.topk(most, dim=1).values
        last = largest.gather(1, (wanted - 1).clamp_min(0))
        above = columns > last
        equal = columns == last
        free = wanted - above.sum(1, keepdim=True)
        if bool((equal.sum(1, keepdim=True) > free).any()):
            equal &= equal.cumsum(1) <= free
        keep[part] = (above | equal) & (wanted > 0)
    return keep.T


@functools.lru_cache(maxsize=64)
def zipf_budget(n_latents: int, total: int, n_rows: int, *, alpha: float = 1.0, shift: float = 0.0) -> tuple[int, ...]:
    """Rows for the latent of each rank: in proportion to 1 / (rank + shift)^alpha, within 1 and ``n_rows``.

    The proportions are scaled so that, after clipping to [1, n_rows], they sum to ``total`` (itself clipped to
    [m, m n_rows]); whole numbers come from the method of the largest remainder, lower ranks first. ``alpha=0`` shares
    evenly.

    >>> zipf_budget(4, 12, 12)
    (6, 3, 2, 1)
    """
    total = min(max(total, n_latents), n_latents * n_rows)
    shape = (np.arange(1, n_latents + 1) + shift) ** -float(alpha)
    low, high = 0.0, n_rows / shape[-1]
    for _ in range(200):
        middle = (low + high) / 2
        if np.clip(middle * shape, 1, n_rows).sum() < total:
            low = middle
        else:
            high = middle
    share = np.clip(high * shape, 1, n_rows)
    whole = np.floor(share + 1e-9).astype(np.int64)
    order = np.lexsort((np.arange(n_latents), -(share - whole) * (whole < n_rows)))
    whole[order[: total - whole.sum()]] += 1
    return tuple(whole.tolist())


def under_used(usage: torch.Tensor, *, share: float = 0.5) -> torch.Tensor:
    """Latents used less than ``share`` of what Zipf's law, fitted to the ranked usage, expects at their rank.

    log u = c - s log(rank) is fitted to the latents in use by least squares with weights 1 / rank, so that each octave
    of ranks counts alike, and s >= 0. Latents that are not used at all always belong to them.

    Parameters
    ----------
    usage
        Share of rows in which each latent is active, (m,).

    Returns
    -------
    torch.Tensor
        Indices, int64, rising.
    """
    ranked, order = usage.double().sort(descending=True, stable=True)
    used = ranked > 0
    if not bool(used.any()):
        return torch.arange(len(usage), device=usage.device)
    rank = torch.arange(1, len(usage) + 1, device=usage.device, dtype=torch.float64)
    weight = used / rank / (used / rank).sum()
    x, y = rank.log(), torch.where(used, ranked, torch.ones_like(ranked)).log()
    middle, level = (weight * x).sum(), (weight * y).sum()
    spread = (weight * (x - middle).square()).sum()
    fall = -(weight * (x - middle) * (y - level)).sum() / spread.clamp_min(1e-12)
    expected = (level - fall.clamp_min(0) * (x - middle)).exp()
    return order[ranked < share * expected].sort().values


@dataclass(frozen=True)
class ChoiceOptions(NoOptions):
    """Options of ``mutual_choice``."""

    under: float = 0.5
    """A latent is under-used below this share of what Zipf's law expects at its rank."""
    memory: int = 100
    """Batches over which usage is averaged."""

    def check(self) -> None:
        """Raise ``InputError`` for a value outside its range."""
        if not 0 <= self.under <= 1:
            raise InputError(f"under={self.under!r} is a share and must lie in [0, 1]")
        if not (hasattr(self.memory, "__index__") and self.memory >= 1):
            raise InputError(f"memory={self.memory!r} must be a whole number of batches >= 1")


@dataclass(frozen=True)
class FeatureChoiceOptions(ChoiceOptions):
    """Options of ``feature_choice``."""

    alpha: float = 1.0
    """Exponent of the budget: the latent of rank r has rows in proportion to 1 / (r + shift)^alpha; 0 shares evenly."""
    shift: float = 0.0
    """Shift of the ranks in the budget."""

    def check(self) -> None:
        """Raise ``InputError`` for a value outside its range."""
        super().check()
        for name in ("alpha", "shift"):
            if not 0 <= getattr(self, name) < np.inf:
                raise InputError(f"{name}={getattr(self, name)!r} must be a number >= 0")


class MutualChoice(Method):
    """While training, the k n largest positive pre-activations of a batch of n rows; afterwards all above a threshold.

    The choice is that of ``batchtopk``; the loss is mse + aux_alpha aux_zipf_loss, in which the under-used latents, and
    not only the dead ones, model the residual.

    References
    ----------
    Ayonrinde 2024, arXiv 2411.02124.
    """

    Options = ChoiceOptions

    def make(self) -> None:
        """Parameters, thresholds and the running usage."""
        super().make()
        self.register_buffer("threshold", torch.zeros(1))
        self.register_buffer("usage", torch.zeros(self.n_latents), persistent=False)

    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Codes (n, m)."""
        return above(self.preactivations(x), self.threshold)

    def choose(self, a: torch.Tensor, now: Now) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Codes of a training batch, and what :meth:`after_step_` must keep."""
        return batchtopk(a, now.k), {}

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        """Reconstruction and aux_zipf_loss."""
        a = self.preactivations(x)
        z, extra = self.choose(a, now)
        residual = self.decode(z) - x
        total = residual.square().sum(1).mean()
        if now.aux_k:
            latents = under_used(self.usage, share=self.options.under) if now.step else now.dead
            total = total + now.aux_alpha * auxk(-residual, a, latents, self.W_dec, now.aux_k)
        return Loss(total, z.detach(), residual.detach(), extra=extra)

    @torch.no_grad()
    def after_step_(self, loss: Loss, now: Now) -> None:
        """Average the usage."""
        self.usage.lerp_((loss.z > 0).float().mean(0), self._weight(now))

    @torch.no_grad()
    def complete_(self, rows: torch.Tensor, generator: torch.Generator) -> None:
        """Set the threshold at which k latents a row are active on average."""
        self.threshold.fill_(calibrated(self.preactivations, rows.split(BLOCK), self.k))

    def _weight(self, now: Now) -> float:
        return max(1 / self.options.memory, 1 / (now.step + 1))


class FeatureChoice(MutualChoice):
    """While training, the m_j largest positive pre-activations of each latent j over the batch, sum_j m_j = k n.

    The budgets follow Zipf's law over the latents ranked by demand: the running share of rows in which a pre-activation
    is among the k a row that are largest in the batch. Afterwards latent j is active above its own threshold, at which
    it has its share of the training rows.

    References
    ----------
    Ayonrinde 2024, arXiv 2411.02124.
    """

    Options = FeatureChoiceOptions

    def make(self) -> None:
        """Parameters, a threshold for each latent, running usage and demand."""
        super().make()
        self.register_buffer("threshold", torch.zeros(self.n_latents))
        self.register_buffer("demand", torch.zeros(self.n_latents), persistent=False)

    def choose(self, a: torch.Tensor, now: Now) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Codes of a training batch by the budgets of the latents."""
        r = torch.relu(a)
        demand = self.demand.lerp(demanded(r.detach(), now.k), self._weight(now))
        keep = column_largest(r, self.budget(demand, k=now.k, n_rows=len(r)))
        return torch.where(keep, r, torch.zeros_like(r)), {"demand": demand}

    def budget(self, demand: torch.Tensor, *, k: int, n_rows: int) -> torch.Tensor:
        """Rows of ``n_rows`` that each latent may have, int64 (m,)."""
        m, options = len(demand), self.options
        shares = zipf_budget(m, min(k, m) * n_rows, n_rows, alpha=options.alpha, shift=options.shift)
        found = torch.empty(m, dtype=torch.int64, device=demand.device)
        found[demand.argsort(descending=True, stable=True)] = torch.tensor(shares, device=demand.device)
        return found

    @torch.no_grad()
    def after_step_(self, loss: Loss, now: Now) -> None:
        """Average usage and demand."""
        super().after_step_(loss, now)
        self.demand.copy_(loss.extra["demand"])

    @torch.no_grad()
    def complete_(self, rows: torch.Tensor, generator: torch.Generator) -> None:
        """Set each threshold halfway between the smallest value that a latent may keep on the rows and the next."""
        budget = self.budget(self.demand, k=self.k, n_rows=len(rows))
        for part in torch.arange(self.n_latents, device=rows.device).split(BLOCK):
            values = F.linear(rows - self.b_dec, self.W_enc[part], self.b_enc[part]).relu_()
            values = torch.cat([values.sort(dim=0, descending=True).values, torch.zeros_like(values[:1])])
            last = values.gather(0, budget[part][None] - 1)[0]
            following = values.gather(0, budget[part][None])[0]
            self.threshold[part] = torch.where(following > 0, (last + following) / 2, torch.zeros_like(last))


def demanded(r: torch.Tensor, k: int) -> torch.Tensor:
    """Share of rows in which each latent is above the level that k latents a row exceed on average, (m,).

    The level is found in the first rows of the batch, as many as hold 65,536 entries, at least 32.
    """
    part = r[: max(32, SAMPLE // r.shape[1])]
    wanted = min(k * len(part), part.numel())
    return (r >= part.flatten().topk(wanted).values[-1].clamp_min(torch.finfo(r.dtype).tiny)).float().mean(0)
