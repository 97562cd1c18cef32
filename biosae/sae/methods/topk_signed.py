"""Top-k whose codes may be negative: the k largest pre-activations of a row, as they are."""

from __future__ import annotations

from typing import ClassVar

import torch

from biosae.sae import activations, objectives
from biosae.sae.methods.base import Loss, Now
from biosae.sae.methods.plain import Plain


class SignedTopK(Plain):
    """mse + AuxK, z the k largest entries of a, without a ReLU after the choice.

    The form of saev and of Histoscope. Where at least k pre-activations of each row are positive, as is usual, it is
    ``topk``; where fewer are, the rest of the k are negative instead of 0.
    """

    signed: ClassVar[bool] = True

    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Codes: the k largest pre-activations."""
        return activations.topk_signed(self.preactivations(x), self.k)

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        """Squared error."""
        a = self.preactivations(x)
        z = activations.topk_signed(a, now.k)
        x_hat = self.decode(z)
        return self.outcome(x, a, z, x_hat, objectives.mse_sum(x, x_hat), now)
