"""Threshold SAE: codes are open from a threshold on; when such thresholds recover sparse codes exactly."""

from __future__ import annotations

from typing import ClassVar

import torch

from biosae.errors import InputError
from biosae.sae.methods.plain import JumpRelu


class Threshold(JumpRelu):
    """``jumprelu`` with z = a 1[a >= tau]: open at the threshold too (Hu et al. 2025, arXiv 2509.20784)."""

    closed: ClassVar[bool] = True


def threshold_window(coherence: float, *, k: int, smallest: float, largest: float) -> tuple[float, float]:
    """Thresholds between which the support of every sparse code is found exactly.

    Rows are D^T delta with at most k non-zero coefficients in [smallest, largest], atoms of coherence eps, decoder and
    encoder as :func:`matched_encoder` gives them. A latent that is not part of a row responds with at most
    eps k largest, one that is with at least smallest - eps (k - 1) largest; any tau strictly between them separates
    the two (Hu et al. 2025).

    Parameters
    ----------
    coherence
        eps, largest absolute inner product of two atoms in the metric of the encoder, in [0, 1].
    k
        Most atoms in a row.
    smallest, largest
        Bounds of the non-zero coefficients, positive.

    Returns
    -------
    tuple of float
        ``(eps k largest, smallest - eps (k - 1) largest)``.

    Raises
    ------
    InputError
        If the arguments are out of range or the window is empty, smallest <= eps (2 k - 1) largest.
    """
    if not (0 <= coherence <= 1 and k >= 1 and 0 < smallest <= largest):
        raise InputError("threshold_window needs 0 <= coherence <= 1, k >= 1 and 0 < smallest <= largest")
    low, high = coherence * k * largest, smallest - coherence * (k - 1) * largest
    if low >= high:
        raise InputError(
            f"no threshold separates {k} atoms of coherence {coherence:g} with coefficients from {smallest:g} to "
            f"{largest:g}: smallest must exceed (2 k - 1) coherence largest = {coherence * (2 * k - 1) * largest:g}"
        )
    return low, high


def matched_encoder(atoms: torch.Tensor, metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decoder and encoder whose responses are atomic inner products: W_dec = D, W_enc = D S (Hu et al. 2025).

    Parameters
    ----------
    atoms
        (m, d), of any length.
    metric
        S, symmetric positive definite (d, d): the inverse of the second moment E[x x^T] of the rows.

    Returns
    -------
    W_dec, W_enc
        (m, d); atoms are scaled to d_j^T S d_j = 1, so that the response of latent i to atom j is their atomic inner
        product, at most 1 in size.
    """
    image = atoms @ metric
    decoder = atoms / (image * atoms).sum(1, keepdim=True).sqrt()
    return decoder, decoder @ metric
