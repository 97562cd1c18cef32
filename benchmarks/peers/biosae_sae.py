"""biosae itself, through its estimator."""

from __future__ import annotations

import torch
from saebench.feed import Run
from saebench.measure import Apply, clocks

ENTRY = "`biosae.sae.SAE(...).fit(matrix)`"


def estimator(run: Run, **more: object) -> object:
    """The estimator of a run; ``more``: further settings."""
    from biosae.sae import SAE
    from biosae.settings import settings

    settings.progress = False
    return SAE(
        "topk", n_latents=run.n_latents, k=run.k, batch_size=run.batch_size, n_steps=run.steps, validation=0,
        normalise="centre_scale", learning_rate=run.learning_rate, random_state=run.seed, device="cpu",
        **run.options, **more,
    )  # fmt: skip


def timed_fit(rows: object, run: Run) -> object:
    """Fit, reading the clocks at each logged step; those after the first ``run.warm`` steps give the timing."""
    seen: list[tuple] = []
    start = clocks()
    sae = estimator(run, callbacks=(lambda step, numbers: seen.append((step, clocks())),)).fit(rows)
    seen = [one for one in seen if one[0] > run.warm]
    run.span, run.timed_steps = seen[-1][1] - seen[0][1], seen[-1][0] - seen[0][0]
    run.setup = float(seen[0][1][0] - start[0])
    return sae


def train(matrix: torch.Tensor, run: Run) -> Apply:
    """``options``: settings of the estimator (backend, prefilter)."""
    sae = timed_fit(matrix.numpy(), run)
    if sae.batch_size_ != run.batch_size:
        raise ValueError(f"the estimator took batches of {sae.batch_size_} rows, not {run.batch_size}; give more rows")

    def apply(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = sae.transform(x.numpy())
        return torch.from_numpy(z.toarray() > 0), torch.from_numpy(sae.inverse_transform(z))

    return apply
