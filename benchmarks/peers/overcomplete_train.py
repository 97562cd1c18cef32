"""Overcomplete: ``TopKSAE`` and ``train_sae`` with the criterion and optimiser of its README (Adam, 5e-4).

``monitoring=0`` leaves out its per-step statistics, which cost time and train nothing.
"""

from __future__ import annotations

import torch
from saebench.feed import Feed, Run
from saebench.measure import Apply

PACKAGE = "overcomplete"
ENTRY = "`overcomplete.sae.train_sae(TopKSAE, batches, criterion, optimizer, monitoring=0)`"


def _mse(x: torch.Tensor, x_hat: torch.Tensor, pre_codes: object, codes: object, dictionary: object) -> torch.Tensor:
    return (x - x_hat).square().mean()


def train(matrix: torch.Tensor, run: Run) -> Apply:
    """Train through ``overcomplete.sae.train_sae``."""
    from overcomplete.sae import TopKSAE, train_sae

    torch.manual_seed(run.seed)
    feed = Feed(matrix, run)
    model = TopKSAE(matrix.shape[1], nb_concepts=run.n_latents, top_k=run.k, device="cpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=run.learning_rate or 5e-4)
    train_sae(model, feed.first(run.steps), _mse, optimizer, nb_epochs=1, monitoring=0, device="cpu")
    feed.close()
    model.eval()

    def apply(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, z, x_hat = model(x)
        return z > 0, x_hat

    return apply
