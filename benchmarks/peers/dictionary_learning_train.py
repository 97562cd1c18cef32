"""dictionary-learning: ``trainSAE`` with ``TopKTrainer``, activations normalised as its documentation advises."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from saebench.feed import Feed, Run
from saebench.measure import Apply

PACKAGE = "dictionary-learning"
ENTRY = "`dictionary_learning.training.trainSAE(batches, [TopKTrainer], normalize_activations=True)`"


def train(matrix: torch.Tensor, run: Run) -> Apply:
    """Train through ``trainSAE``; its first pass over the batches estimates the norm and is not timed."""
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    from dictionary_learning.training import trainSAE

    feed = Feed(matrix, run)
    config = {
        "trainer": TopKTrainer, "steps": run.steps, "activation_dim": matrix.shape[1], "dict_size": run.n_latents,
        "k": run.k, "layer": 0, "lm_name": "none", "lr": run.learning_rate, "warmup_steps": run.warmup,
        "seed": run.seed, "device": "cpu",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainSAE(feed, [config], run.steps, save_dir=folder, normalize_activations=True, device="cpu")
        model = AutoEncoderTopK.from_pretrained(Path(folder) / "trainer_0/ae.pt", device="cpu")
    feed.close()

    def apply(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_hat, z = model(x, output_features=True)
        return z > 0, x_hat

    return apply
