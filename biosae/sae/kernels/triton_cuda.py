"""Kernels in Triton for NVIDIA GPUs: nothing of the size n x m is held but a chunk of scores, no atomic operations.

The functions are those of :mod:`biosae.sae.kernels.torch_any`, whose docstrings hold the equations. The product of the
encoder and the search for the k-th largest score are torch's own; Triton writes the codes, the reconstruction, and the
gradients out of the codes sorted by latent. Latents with many entries are split over several programs whose sums are
added in order, so that equal input gives equal bits. No function but ``select_above`` (the number of codes is not known
before) waits for the device.

Triton is imported on first use; ask :func:`available` before. With ``TRITON_INTERPRET=1`` in the environment before the
first import of Triton, the same programs run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import importlib
import os
from functools import cache, lru_cache
from types import ModuleType

import torch
from torch.nn import functional as F

from biosae.errors import InputError
from biosae.sae.kernels import torch_any
from biosae.sae.kernels.codes import Codes, Gradient

PIECE = 128
"""Entries of one latent that one program sums; more of them are split. Beyond 2048 such pieces, pieces grow."""
FLAT = 1024
"""Numbers of a vector that one program of ``adam_`` updates."""


def _programs() -> ModuleType:
    return importlib.import_module("biosae.sae.kernels.triton_programs")


def _launch(name: str, grid: tuple[int, ...], *arguments: object, tile: int, **constants: int) -> None:
    """Run a program on the device of its tensors."""
    on = next(a for a in arguments if isinstance(a, torch.Tensor))
    with torch.cuda.device_of(on):
        getattr(_programs(), name)[grid](*arguments, num_warps=warps(tile), enable_fp_fusion=True, **constants)


def warps(tile: int) -> int:
    """Groups of 32 threads for a tile of so many numbers: about 16 numbers a thread, at most 32 groups."""
    return 1 << min(5, max(0, (tile // (32 * 16)).bit_length() - 1))


def _power(width: int) -> int:
    """Least power of two >= width."""
    return 1 << max(width - 1, 0).bit_length()


@lru_cache(maxsize=64)
def _bounds(ends: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """``ends`` on the device; copied once, since a copy waits for the device."""
    return torch.tensor(ends, dtype=torch.int32, device=device)


@cache
def _float32_product() -> bool:
    """Whether torch can multiply bfloat16 into float32 on the GPU (torch >= 2.8)."""
    try:
        a = torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda")
        return torch.mm(a, a, out_dtype=torch.float32).dtype == torch.float32
    except (TypeError, RuntimeError, AssertionError):
        return False


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b, float32 (n, m); half-precision x and W are multiplied as they are and summed in float32."""
    if x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16) and x.is_cuda and _float32_product():
        scores = torch.mm(x, weight.T, out_dtype=torch.float32)
        return scores if bias is None else scores.add_(bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


def _largest(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places (int32, rising) and values of the k largest scores a row, (n, k); of equal ones the lower place.

    Rows with a NaN give NaN values at place 0, so that the loss shows it.
    """
    n, m = scores.shape
    top = scores.topk(k, dim=1, sorted=False).values
    last = top.amin(1)
    free = k - (top > last[:, None]).sum(1)
    indices = torch.zeros(n, k, dtype=torch.int32, device=scores.device)
    values = last[:, None].repeat(1, k)
    block = min(_power(m), 2048)
    _launch("keep_largest", (n,), scores, last, free, indices, values, m, k, tile=block, BLOCK=block)
    return indices, values


def select_topk(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, *, low: torch.Tensor | None = None
) -> Codes:
    """The k largest positive scores of each row; see :func:`biosae.sae.kernels.torch_any.select_topk`."""
    n, m = len(x), len(weight)
    k = min(k, m)
    indices, values = [], []
    for part in x.split(torch_any.chunk_rows(x, m)):
        if low is None:
            index, value = _largest(linear(part, weight, bias), k)
        else:
            found, _ = _largest(linear(part.to(low.dtype), low, bias), min(k + torch_any.SPARE, m))
            place, value = _largest(_rescore(part, found, weight, bias), k)
            index = found.gather(1, place.long())
        indices.append(index.flatten())
        values.append(value.flatten().clamp_min_(0))
    return Codes(torch.arange(n + 1, device=x.device) * k, torch.cat(indices), torch.cat(values))


def _rescore(x: torch.Tensor, found: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Float32 scores of the latents ``found``, (n, c) both."""
    indptr = torch.arange(len(x) + 1, device=x.device) * found.shape[1]
    scores = _products(indptr, found.flatten(), x[None], weight, (len(weight),))
    return scores.view_as(found) + bias[found.long()]


def select_above(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    threshold: float | torch.Tensor,
    *,
    low: torch.Tensor | None = None,
) -> Codes:
    """All scores above a threshold; see :func:`biosae.sae.kernels.torch_any.select_above`. Waits for the device."""
    counts, indices, values = [], [], []
    for part in x.split(torch_any.chunk_rows(x, len(weight))):
        if low is None:
            scores, limit = linear(part, weight, bias), threshold
        else:
            scores = linear(part.to(low.dtype), low, bias)
            limit = threshold - torch_any.margin(part, weight, bias, threshold)[:, None]
        kept = scores > limit
        row, column = kept.nonzero(as_tuple=True)
        counts.append(kept.sum(1))
        indices.append(column.int())
        values.append(scores[row, column])
    indptr = F.pad(torch.cat(counts).cumsum(0), (1, 0))
    codes = Codes(indptr, torch.cat(indices), torch.cat(values))
    if low is None:
        return codes
    latent = codes.indices.long()
    exact = _products(indptr, codes.indices, x[None], weight, (len(weight),)) + bias[latent]
    limit = threshold[latent] if isinstance(threshold, torch.Tensor) and threshold.ndim else threshold
    return Codes(indptr, codes.indices, exact).keep(exact > limit)


def decode(codes: Codes, decoder: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    """Reconstructions without bias by each prefix of the dictionary, float32 (G, n, d)."""
    n, width = codes.n_rows, decoder.shape[1]
    out = torch.empty(len(ends), n, width, device=decoder.device)
    block = min(_power(width), 256)
    _launch(
        "decode_rows", (n, -(-width // block)),
        codes.indptr, codes.indices, codes.values, decoder.contiguous(), _bounds(ends, out.device), out, n, width,
        len(ends), tile=8 * block, ENTRIES=8, BLOCK=block,
    )  # fmt: skip
    return out


def code_gradient(codes: Codes, grads: torch.Tensor, decoder: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    """Derivative of the loss by each code, float32 (nnz,)."""
    return _products(codes.indptr, codes.indices, grads, decoder, ends)


def _products(
    indptr: torch.Tensor, indices: torch.Tensor, grads: torch.Tensor, decoder: torch.Tensor, ends: tuple[int, ...]
) -> torch.Tensor:
    n, width = len(indptr) - 1, decoder.shape[1]
    out = torch.empty(len(indices), device=decoder.device)
    block = min(_power(width), 256)
    _launch(
        "entry_products", (n,), indptr, indices, grads.contiguous(), decoder.contiguous(), _bounds(ends, out.device),
        out, n, width, len(ends), tile=8 * block, ENTRIES=8, BLOCK=block,
    )  # fmt: skip
    return out


def latent_gradient(
    codes: Codes,
    code_grads: torch.Tensor,
    x: torch.Tensor,
    grads: torch.Tensor,
    ends: tuple[int, ...],
    decoder: torch.Tensor,
    *,
    extra: tuple[torch.Tensor, Gradient] | None = None,
    out: Gradient | None = None,
) -> Gradient:
    """Gradient by atoms (projected), encoder rows and encoder biases; each latent is summed in the order of rows.

    Extra memory: the sorted codes, and the sums of at most 4096 pieces, 8 d bytes each.
    """
    m, width = decoder.shape
    out = out or Gradient.empty(decoder)
    decoder, x, grads = (t.contiguous() for t in (decoder, x, grads))
    latents, order = torch.sort(codes.indices, stable=True)
    starts = torch.searchsorted(latents, torch.arange(m + 1, dtype=torch.int32, device=latents.device))
    entries = codes.rows()[order].int(), codes.values[order], code_grads[order]
    sizes = starts.diff()
    piece = max(PIECE, _power(len(latents)) // 2048)
    pieces = torch.where(sizes > piece, (sizes + piece - 1) // piece, 0)
    until = pieces.cumsum(0)
    first_piece = until - pieces
    n_pieces = 2 * len(latents) // piece  # no more than these exist; how many do is known on the device only
    part = torch.empty(n_pieces, 2, width, device=x.device)
    part_bias = torch.empty(n_pieces, device=x.device)
    common = {"PIECE": piece, "ENTRIES": 4, "BLOCK": _power(width), "tile": 4 * _power(width)}
    bounds = _bounds(ends, x.device)
    if n_pieces:
        owner = torch.searchsorted(until, torch.arange(n_pieces, device=x.device), right=True)
        _launch(
            "piece_sums", (n_pieces,), starts, first_piece, owner, *entries, x, grads, bounds, part, part_bias, m,
            codes.n_rows, width, len(ends), **common,
        )  # fmt: skip
    extra_at, more = starts, out  # not read without extra
    if extra is not None:
        extra_at = torch.full((m,), -1, dtype=torch.int32, device=x.device)
        extra_at[extra[0]] = torch.arange(len(extra[0]), dtype=torch.int32, device=x.device)
        more = extra[1]
    _launch(
        "latent_rows", (m,), starts, first_piece, *entries, x, grads, bounds, part, part_bias, decoder,
        extra_at, more.dec.contiguous(), more.enc.contiguous(), more.bias, out.dec, out.enc, out.bias, out.square,
        codes.n_rows, width, len(ends), EXTRA=extra is not None, **common,
    )  # fmt: skip
    return out


def adam_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    step: int,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    factor: torch.Tensor,
    unit: bool = False,
) -> None:
    """One Adam step in place; see :func:`biosae.sae.kernels.torch_any.adam_`. ``factor`` stays on the device.

    Raises
    ------
    InputError
        If a tensor that is to be changed is not contiguous.
    """
    if not all(t.is_contiguous() for t in (weight, first, second)):
        raise InputError("adam_ changes its tensors in place and needs them contiguous; pass tensor.contiguous()")
    width = weight.shape[1] if weight.ndim == 2 else min(FLAT, weight.numel())
    block = _power(width)
    _launch(
        "adam_rows", (-(-weight.numel() // width),), weight.detach(), grad.contiguous(), first, second, factor,
        weight.numel(), width, rate / (1 - betas[0] ** step), betas[0], betas[1], 1 - betas[0], 1 - betas[1], eps,
        (1 - betas[1] ** step) ** -0.5, tile=block, UNIT=unit, BLOCK=block,
    )  # fmt: skip


@cache
def available() -> tuple[bool, str]:
    """Whether these kernels can be used here, and why or why not. The kernels are tried once on a small problem.

    True needs Triton, and a CUDA device or Triton's interpreter; every kernel must agree with plain torch.
    """
    try:
        import triton
    except ImportError as error:
        return False, f"Triton could not be imported ({error})"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if torch.version.hip is not None or not (torch.cuda.is_available() or interpreted):
        return False, "there is no CUDA device"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wrong = _first_wrong(device)
    except Exception as error:  # whatever stops the compiler or the device: other backends go on
        return False, f"Triton {triton.__version__} failed in a test of the kernels ({type(error).__name__}: {error})"
    if wrong:
        return False, f"Triton {triton.__version__}: {wrong} differs from plain torch in a test of the kernels"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU (interpreter)"
    return True, f"Triton {triton.__version__} on {where}"


def _first_wrong(device: torch.device) -> str:
    """Name of the first kernel that differs from the dense computation on a small problem, or nothing."""
    generator = torch.Generator().manual_seed(0)
    x, weight, decoder, side = (torch.randn(s, 5, generator=generator).to(device) for s in (4, 12, 12, 4))
    bias = torch.linspace(-0.5, 0.5, 12, device=device)
    decoder = F.normalize(decoder, dim=1)
    codes = select_topk(x, weight, bias, 3)
    scores = F.linear(x, weight, bias).relu()
    z = torch.zeros_like(scores).scatter(1, scores.topk(3).indices, scores.topk(3).values)
    place = codes.rows(), codes.indices.long()
    slopes = code_gradient(codes, side[None], decoder, (12,))
    s = torch.zeros_like(z).index_put(place, slopes)
    g = latent_gradient(codes, slopes, x, side[None], (12,), decoder)
    dec = z.T @ side
    dec = dec - (dec * decoder).sum(1, keepdim=True) * decoder
    expected = torch.cat([dec, s.T @ x, s.sum(0)[:, None]], 1)
    tables = [[t.clone() for t in (decoder, dec, torch.zeros_like(dec), torch.ones_like(dec))] for _ in range(2)]
    half = torch.full((), 0.5, device=device)
    for step, table in zip((adam_, torch_any.adam_), tables):
        step(*table, step=2, rate=0.1, betas=(0.9, 0.99), eps=1e-8, factor=half, unit=True)
    pairs = {
        "select_topk": (codes.dense(12), z),
        "decode": (decode(codes, decoder, (12,))[0], z @ decoder),
        "code_gradient": (slopes, (side @ decoder.T)[place]),
        "latent_gradient": (torch.cat([g.dec, g.enc, g.bias[:, None]], 1), expected),
        "adam_": (tables[0][0], tables[1][0]),
    }  # fmt: skip
    # a GPU may multiply float32 with reduced precision (TF32); a wrong kernel is further off than that
    return next((name for name, (a, b) in pairs.items() if not torch.allclose(a, b, rtol=1e-2, atol=1e-2)), "")
