"""One training step over several processes: what they must tell each other, as hooks that do nothing for one process."""

from __future__ import annotations

import torch

from biosae.sae.kernels.codes import Codes
from biosae.sae.model import SparseAutoencoder


class Alone:
    """A single process. Subclasses answer the same questions for data-parallel and latent-sharded training."""

    rank = 0
    replicas = 1
    """Processes that share the rows of a batch."""
    shards = 1
    """Processes that share the latents."""

    def shard(self, model: SparseAutoencoder) -> SparseAutoencoder:
        """The part of a new model whose latents this process holds."""
        return model

    def whole(self, model: SparseAutoencoder) -> SparseAutoencoder:
        """The whole trained model, from the parts of all processes."""
        return model

    def rows(self, n: int) -> int:
        """Rows of the whole batch, of which this process has ``n``."""
        return n * self.replicas

    def over_rows(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the processes that share the rows."""
        return value

    def over_latents(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the processes that share the latents."""
        return value

    def reconstruction(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum of partial reconstructions (G, n, d) over the processes that share the latents."""
        return self.over_latents(partial)

    def total(self, count: int) -> int:
        """Sum of a whole number over all processes."""
        return count

    def top_rows(self, codes: Codes, k: int) -> Codes:
        """Of each row's candidates (k from every shard) those that belong to the k largest of all shards."""
        return codes

    def largest(self, codes: Codes, count: int, n_latents: int) -> tuple[Codes, float]:
        """The ``count`` largest entries of all rows and shards, and the smallest of them."""
        from biosae.sae.sparse_ops import largest

        return largest(codes, count)


ALONE = Alone()
