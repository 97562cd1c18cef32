"""The form in which kernels hand each other sparse codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Codes:
    """Codes of n rows; the entries of row i stand at ``indptr[i] : indptr[i + 1]``."""

    indptr: torch.Tensor
    """int64 (n + 1,)."""
    indices: torch.Tensor
    """Latents, int32 (nnz,), rising within a row."""
    values: torch.Tensor
    """Codes z >= 0, float32 (nnz,). Zeros (places that top-k could not fill) are allowed and carry no gradient."""

    @property
    def n_rows(self) -> int:
        """Number of rows n."""
        return len(self.indptr) - 1

    def rows(self) -> torch.Tensor:
        """Row of each entry, int64 (nnz,)."""
        return torch.repeat_interleave(
            torch.arange(self.n_rows, device=self.indptr.device), self.indptr.diff(), output_size=len(self.indices)
        )

    def dense(self, n_latents: int) -> torch.Tensor:
        """The same codes as a dense table (n, m)."""
        table = self.values.new_zeros(self.n_rows, n_latents)
        where = (self.rows(), self.indices.long())
        return table.index_put_(where, self.values, accumulate=True)  # places that were not filled repeat a latent

    def keep(self, wanted: torch.Tensor) -> Codes:
        """The entries where ``wanted``, bool (nnz,), holds."""
        counts = torch.cat([wanted.new_zeros(1, dtype=torch.int64), wanted.long().cumsum(0)])
        return Codes(counts[self.indptr], self.indices[wanted], self.values[wanted])

    def fired(self) -> torch.Tensor:
        """Latents of the positive entries, int64, with repetition."""
        return self.indices[self.values > 0].long()


@dataclass(frozen=True)
class Gradient:
    """Gradient of the loss by what belongs to latents."""

    dec: torch.Tensor
    """By the atoms, (m, d), without the part along each atom."""
    enc: torch.Tensor
    """By the encoder rows, (m, d)."""
    bias: torch.Tensor
    """By the encoder biases, (m,)."""
    square: torch.Tensor
    """Squared norm of the three together, float64 (m,)."""

    @classmethod
    def empty(cls, decoder: torch.Tensor) -> Gradient:
        """Room for the gradient of a dictionary (m, d)."""
        bias = decoder.new_empty(len(decoder))
        return cls(torch.empty_like(decoder), torch.empty_like(decoder), bias, bias.double())
