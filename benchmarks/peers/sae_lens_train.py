"""SAELens: ``SAETrainer`` with ``TopKTrainingSAE`` and an iterator of batches as its data provider.

3e-4 and an end rate of a tenth (unused by the constant schedule, yet required) are the defaults of its runner.
"Sparse codes" is its option ``use_sparse_activations``, which works only with ``rescale_acts_by_decoder_norm=False``.
"""

from __future__ import annotations

import torch
from saebench.feed import Feed, Run
from saebench.measure import Apply

PACKAGE = "sae-lens"
ENTRY = "`sae_lens.SAETrainer(SAETrainerConfig, TopKTrainingSAE, batches).fit()`"


def train(matrix: torch.Tensor, run: Run) -> Apply:
    """Train through ``sae_lens.SAETrainer``; ``options``: further fields of ``TopKTrainingSAEConfig``."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    torch.manual_seed(run.seed)
    feed = Feed(matrix, run)
    rate = run.learning_rate or 3e-4
    config = SAETrainerConfig(
        total_training_samples=run.steps * run.batch_size, train_batch_size_samples=run.batch_size, device="cpu",
        lr=rate, lr_end=rate / 10, lr_warm_up_steps=run.warmup,
    )  # fmt: skip
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=matrix.shape[1], d_sae=run.n_latents, k=run.k, device="cpu", **run.options)
    )
    sae = SAETrainer(config, sae, iter(feed)).fit().eval()
    feed.close()

    def apply(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = sae.encode(x)
        return z.to_dense() > 0, sae.decode(z)

    return apply
