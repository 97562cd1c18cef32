"""EleutherAI sparsify: its whole ``Trainer.fit`` with a stand-in model whose only layer looks rows up in the matrix.

One "sequence" is one batch of row numbers, so neither tokens nor collation cost anything. Its Triton decoder needs a
GPU and is switched off by the library's own variable. Without ``learning_rate``: Signum (the default optimiser) at the
library's rate for the width; with it: Adam, as Signum's rate means something else.
"""

from __future__ import annotations

import os
import tempfile

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"

import torch
from saebench.feed import Feed, Run
from saebench.measure import Apply
from torch import nn

PACKAGE = "eai-sparsify"
ENTRY = "`sparsify.Trainer(TrainConfig, dataset, model).fit()`; the model is a table of the rows"


class Table(nn.Module):
    """Row numbers (1, batch) -> rows (1, batch, d)."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.matrix[input_ids]


class StandIn(nn.Module):
    """The part of a Hugging Face model that the trainer asks for."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.rows = Table(matrix)
        self.device = torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

    @property
    def base_model(self) -> StandIn:
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.rows(input_ids)


class Batches(torch.utils.data.Dataset):
    """``steps`` sequences; asking for one reads the clocks."""

    def __init__(self, feed: Feed) -> None:
        self.steps, self.numbers = feed.run.steps, feed.numbers()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        return {"input_ids": next(self.numbers)}


def train(matrix: torch.Tensor, run: Run) -> Apply:
    """Train through ``sparsify.Trainer``."""
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    feed = Feed(matrix, run)
    given = {} if run.learning_rate is None else {"optimizer": "adam", "lr": run.learning_rate}
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            sae=SparseCoderConfig(num_latents=run.n_latents, k=run.k),
            batch_size=1, hookpoints=["rows"], init_seeds=[run.seed], lr_warmup_steps=run.warmup,
            log_to_wandb=False, save_dir=folder, run_name="run", **given,
        )  # fmt: skip
        trainer = Trainer(config, Batches(feed), StandIn(matrix))
        trainer.fit()  # ends with a save, which puts the averaged weights of Signum in place
    feed.close()
    coder = trainer.saes["rows"]

    def apply(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, places, _ = coder.encode(x)
        fired = torch.zeros(len(x), run.n_latents, dtype=torch.bool).scatter_(1, places, values > 0)
        return fired, coder.decode(values, places)

    return apply
