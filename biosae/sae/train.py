"""The training loop: seeded batches, the loss of the architecture, projected Adam steps, a light history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from biosae.errors import BiosaeError
from biosae.sae import objectives
from biosae.sae.config import Plan, SAEConfig, rate_at
from biosae.sae.model import SparseAutoencoder, unit_rows_
from biosae.settings import settings

LOGGED = 50
"""Points of the history; between them nothing is read back from the device."""
REFRESH = 8
"""Steps between two looks at which latents are dead (a look costs one wait for the device)."""


def train(
    model: SparseAutoencoder,
    take: Callable[[torch.Tensor], torch.Tensor],
    n_rows: int,
    *,
    config: SAEConfig,
    plan: Plan,
    generator: torch.Generator,
) -> list[dict[str, float]]:
    """Train ``model`` in place.

    Parameters
    ----------
    model
        Initialised, on its device.
    take
        Gives normalised rows, float32 (n, d) on the model's device, for int64 row numbers.
    n_rows
        Number of training rows.
    config, plan
        Settings and the numbers resolved from them.
    generator
        CPU generator that draws the order of rows.

    Returns
    -------
    list of dict
        ``step, loss, fvu, l0, dead, lr`` at about 50 steps, each measured on that step's batch.

    Raises
    ------
    BiosaeError
        If the loss stops being finite.
    """
    device = model.W_dec.device
    parameters = list(model.parameters())
    optimiser = torch.optim.Adam(
        parameters, lr=plan.learning_rate, betas=(0.9, 0.999), eps=6.25e-10, fused=device.type in ("cpu", "cuda")
    )
    since_fired = torch.zeros(plan.n_latents, dtype=torch.int64, device=device)
    dead = since_fired.new_zeros(0)
    sparse = config.architecture != "relu"
    history: list[dict[str, float]] = []
    every = max(1, plan.n_steps // LOGGED)
    model.train()
    for step, index in enumerate(_progress(batches(n_rows, plan, generator), plan.n_steps)):
        x = take(index)
        a, z, x_hat = model(x)
        loss = objectives.mse_sum(x, x_hat)
        if sparse:
            if dead.numel():
                loss = loss + config.aux_alpha * objectives.auxk(x - x_hat, a, dead, model.W_dec, plan.aux_k)
        else:
            loss = loss + config.l1 * min(1.0, (step + 1) / max(plan.l1_warmup_steps, 1)) * objectives.l1_norm(z)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        model.project_gradient()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        rate = rate_at(plan, step)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        look = step % REFRESH == REFRESH - 1
        unit_rows_(model.W_dec.data, generator=generator if look else None)
        with torch.no_grad():
            since_fired += len(index)
            since_fired[(z > 0).any(0)] = 0
            if look:
                dead = (since_fired >= plan.dead_after).nonzero().squeeze(1)
        if step % every == every - 1 or step == plan.n_steps - 1:
            history.append(_log(step + 1, loss, x, x_hat, z, since_fired, plan, rate))
            if config.verbose:
                print("  ".join(f"{name} {value:.6g}" for name, value in history[-1].items()))
    return history


def batches(n_rows: int, plan: Plan, generator: torch.Generator):
    """``n_steps`` batches of row numbers: a new random order each epoch, its incomplete last batch left out."""
    done = 0
    while True:
        order = torch.randperm(n_rows, generator=generator)
        for start in range(0, n_rows - plan.batch_size + 1, plan.batch_size):
            yield order[start : start + plan.batch_size]
            done += 1
            if done == plan.n_steps:
                return


@torch.no_grad()
def _log(
    step: int,
    loss: torch.Tensor,
    x: torch.Tensor,
    x_hat: torch.Tensor,
    z: torch.Tensor,
    since_fired: torch.Tensor,
    plan: Plan,
    rate: float,
) -> dict[str, float]:
    error, spread = (x - x_hat).square().sum(), (x - x.mean(0)).square().sum()
    values = {
        "loss": loss,
        "fvu": torch.where(error > 0, error / spread, error),
        "l0": (z > 0).sum(1).float().mean(),
        "dead": (since_fired >= plan.dead_after).float().mean(),
    }
    found: dict[str, float] = {name: float(value) for name, value in values.items()}
    if not torch.isfinite(loss):
        raise BiosaeError(
            f"training diverged at step {step} (loss {found['loss']}); lower learning_rate (now "
            f"{plan.learning_rate:g}) or use normalise='centre_scale'"
        )
    return {"step": step, **found, "lr": rate}


def _progress(iterator: Any, total: int) -> Any:
    if not settings.progress:
        return iterator
    from tqdm.auto import tqdm

    return tqdm(iterator, total=total, desc="SAE", unit="step")
