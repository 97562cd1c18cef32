"""The sparse training step: which codes are kept, what they reconstruct, and the gradient through them alone.

Every function has a dense twin (:mod:`biosae.sae.activations`, :mod:`biosae.sae.objectives` under autograd) that the
tests hold it to. The arithmetic is done by one of three sets of kernels with the same functions: numba on CPUs, plain
torch on anything, Triton on CUDA devices (:mod:`biosae.sae.kernels`).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from types import ModuleType

import torch

from biosae.errors import InputError, MissingExtraError
from biosae.sae.distributed import ALONE, Alone
from biosae.sae.kernels import torch_any
from biosae.sae.kernels.codes import Codes, Gradient

BACKENDS = ("auto", "numba", "torch", "triton", "dense")
DENSE_AUX = 8
"""AuxK works on a dense table of the dead latents while they are at most this many times ``aux_k``."""
GUESS = 0.9
"""Share of the last batch's threshold above which ``batchtopk`` looks for candidates."""
FIRST_ROWS = 256
"""Rows from which the first guess is taken."""


def kernels(backend: str, device: torch.device) -> ModuleType:
    """Kernels for a device: ``auto`` is numba on a CPU and Triton on CUDA, where they work, else plain torch.

    Raises
    ------
    MissingExtraError, InputError
        If a backend is asked for by name that cannot work here; the message gives the reason.
    """
    if backend == "numba" or (backend == "auto" and device.type == "cpu"):
        if device.type != "cpu":
            raise InputError(f"backend='numba' works on a CPU, the device is {device}; choose backend='auto'")
        if importlib.util.find_spec("numba"):
            return importlib.import_module("biosae.sae.kernels.numba_cpu")
        if backend == "numba":
            raise MissingExtraError("backend='numba' needs numba: pip install numba, or choose backend='auto'")
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        module = importlib.import_module("biosae.sae.kernels.triton_cuda")
        usable = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
        works, reason = module.available() if usable else (False, f"the device is {device}")
        if works:
            return module
        if backend == "triton":
            raise InputError(f"backend='triton' does not work here ({reason}); choose backend='auto'")
    return torch_any


# ------------------------------------------------------------------------------------------------------ selection


def select_batchtopk(
    ops: ModuleType,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    count: int,
    guess: float,
    *,
    low: torch.Tensor | None = None,
    comm: Alone = ALONE,
) -> tuple[Codes, float]:
    """The ``count`` largest positive scores of the batch (of equal ones those of earlier rows, then lower latents).

    Candidates are the scores above ``guess`` (infinity: unknown, it is taken from the first rows). Where they turn out
    too few, the guess is halved and the product made again, so that the result never depends on the guess.

    Returns
    -------
    codes, threshold
        The smallest kept value (0 if fewer than ``count`` are positive).
    """
    if guess == math.inf:
        first = x[:FIRST_ROWS]
        positive = ops.select_above(first, weight, bias, 0.0, low=low)
        guess = GUESS * comm.largest(positive, count * len(first) // len(x), len(weight))[1]
    guess = max(guess, 0.0)
    while True:
        codes = ops.select_above(x, weight, bias, guess, low=low)
        if guess == 0 or comm.total(len(codes.values)) >= count:
            break
        guess = guess / 2 if guess > 1e-6 else 0.0
    return comm.largest(codes, count, len(weight))


def largest(codes: Codes, count: int) -> tuple[Codes, float]:
    """The ``count`` largest entries of all rows together, and the smallest of them; of equal ones the first."""
    values = codes.values
    if len(values) < count:
        return codes, 0.0
    last = values.kthvalue(len(values) - count + 1).values
    above, equal = values > last, values == last
    keep = above | (equal & (equal.cumsum(0) <= count - above.sum()))
    return codes.keep(keep), float(last)


# ------------------------------------------------------------------------------------------------------------ AuxK


def auxiliary(
    ops: ModuleType,
    x: torch.Tensor,
    residual: torch.Tensor,
    encoder: torch.Tensor,
    bias: torch.Tensor,
    decoder: torch.Tensor,
    *,
    k: int,
    alpha: float,
    comm: Alone = ALONE,
) -> tuple[torch.Tensor, Gradient]:
    """AuxK loss times ``alpha`` and its gradient by the dead latents' weights (:func:`biosae.sae.objectives.auxk`).

    Parameters
    ----------
    x, residual
        Rows minus b_dec and -e = x_hat - x, (n, d).
    encoder, bias, decoder
        Encoder rows (q, d), biases (q,) and atoms (q, d) of the dead latents.
    """
    n = comm.rows(len(x))
    spread = comm.over_rows((residual - comm.over_rows(residual.sum(0)) / n).square().sum()) / n
    few = len(decoder) <= DENSE_AUX * k and comm.shards == 1
    if few:
        z = _dense_topk(ops.linear(x, encoder, bias), k)
        e_hat = ops.linear(z, decoder.T.contiguous())
    elif len(decoder):
        codes = comm.top_rows(ops.select_topk(x, encoder, bias, k), k)
        e_hat = comm.reconstruction(ops.decode(codes, decoder, (len(decoder),)))[0]
    else:  # all that are dead are on other shards
        none = Codes(torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device), bias.int(), bias)
        comm.top_rows(none, k)
        e_hat = comm.reconstruction(torch.zeros_like(x)[None])[0]
    off = e_hat + residual
    usable = spread >= 1e-12
    scale = torch.where(usable, alpha / (n * spread.clamp_min(1e-12)), 0.0)
    loss = scale * comm.over_rows(off.square().sum())
    grad = 2 * scale * off
    if few:
        slopes = ops.linear(grad, decoder) * (z > 0)
        return loss, Gradient(z.T @ grad, slopes.T @ x, slopes.sum(0), slopes.new_zeros(len(decoder)).double())
    if not len(decoder):
        return loss, Gradient.empty(decoder)
    whole = (len(decoder),)
    slopes = ops.code_gradient(codes, grad[None], decoder, whole) * (codes.values > 0)
    return loss, ops.latent_gradient(codes, slopes, x, grad[None], whole, decoder)


def _dense_topk(a: torch.Tensor, k: int) -> torch.Tensor:
    if k >= a.shape[1]:
        return a.clamp_min(0)
    index, value = torch_any.largest_of_rows(a, k)
    return torch.zeros_like(a).scatter_(1, index, value)
