"""Device programs of :mod:`biosae.sae.kernels.triton_cuda`, which imports this file only where Triton is wanted.

All tables are contiguous. Sums are float32, and each is made by one program in one order, without atomic operations, so
that equal input gives equal bits. ``ENTRIES`` codes are worked on at a time, ``BLOCK`` columns of the width d.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_largest(scores, last, free, indices, values, n_columns, k, BLOCK: tl.constexpr):
    """Row by row the k places that hold more than ``last`` or are among its first ``free`` equals, rising."""
    row = tl.program_id(0).to(tl.int64)
    bound = tl.load(last + row)
    room = tl.load(free + row)
    written = 0
    passed = 0
    for start in range(0, n_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < n_columns
        a = tl.load(scores + row * n_columns + column, mask=inside, other=0.0)
        equal = (inside & (a == bound)).to(tl.int32)
        rank = passed + tl.cumsum(equal, 0)
        kept = inside & ((a > bound) | ((equal == 1) & (rank <= room)))
        at = row * k + written + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(indices + at, column, mask=kept)
        tl.store(values + at, a, mask=kept)
        written += tl.sum(kept.to(tl.int32), 0)
        passed += tl.sum(equal, 0)


@triton.jit
def decode_rows(
    indptr, indices, values, decoder, ends, out, n_rows, width, n_groups, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):
    """out[g, i] = sum of z_ij D_j over j < ends[g]; one program a row i and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    begin = tl.load(indptr + row)
    end = tl.load(indptr + row + 1)
    total = tl.zeros((ENTRIES, BLOCK), tl.float32)
    lower = 0
    for g in range(n_groups):
        upper = tl.load(ends + g)
        for start in range(begin, end, ENTRIES):
            at = start + tl.arange(0, ENTRIES)
            j = tl.load(indices + at, mask=at < end, other=0)
            z = tl.load(values + at, mask=at < end, other=0.0)
            used = (z != 0) & (j >= lower) & (j < upper)
            place = j.to(tl.int64)[:, None] * width + column[None, :]
            atoms = tl.load(decoder + place, mask=used[:, None] & inside[None, :], other=0.0)
            total += z[:, None] * atoms.to(tl.float32)
        tl.store(out + (g * n_rows + row) * width + column, tl.sum(total, 0), mask=inside)
        lower = upper


@triton.jit
def entry_products(
    indptr, indices, grads, decoder, ends, out, n_rows, width, n_groups, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):
    """out[e] = <grads[g, i], D_j> for the entries e of row i, g the group of j; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(indptr + row + 1)
    for start in range(tl.load(indptr + row), end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        valid = at < end
        j = tl.load(indices + at, mask=valid, other=0)
        group = tl.zeros((ENTRIES,), tl.int64)
        for g in range(n_groups - 1):
            group += (j >= tl.load(ends + g)).to(tl.int64)
        total = tl.zeros((ENTRIES, BLOCK), tl.float32)
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            tile = valid[:, None] & (column < width)[None, :]
            atoms = tl.load(decoder + j.to(tl.int64)[:, None] * width + column[None, :], mask=tile, other=0.0)
            side = tl.load(grads + (group * n_rows + row)[:, None] * width + column[None, :], mask=tile, other=0.0)
            total += atoms.to(tl.float32) * side.to(tl.float32)
        tl.store(out + at, tl.sum(total, 1), mask=valid)


@triton.jit
def _entry_sums(begin, end, rows, values, slopes, x, side, width, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of z_e side[row_e], of s_e x[row_e] and of s_e over the sorted entries begin <= e < end."""
    column = tl.arange(0, BLOCK)
    dec = tl.zeros((ENTRIES, BLOCK), tl.float32)
    enc = tl.zeros((ENTRIES, BLOCK), tl.float32)
    bias = tl.zeros((ENTRIES,), tl.float32)
    for start in range(begin, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        z = tl.load(values + at, mask=at < end, other=0.0)
        s = tl.load(slopes + at, mask=at < end, other=0.0)
        row = tl.load(rows + at, mask=at < end, other=0)
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        inside = (column < width)[None, :]
        dec += z[:, None] * tl.load(side + place, mask=(z != 0)[:, None] & inside, other=0.0).to(tl.float32)
        enc += s[:, None] * tl.load(x + place, mask=(s != 0)[:, None] & inside, other=0.0).to(tl.float32)
        bias += s
    return tl.sum(dec, 0), tl.sum(enc, 0), tl.sum(bias, 0)


@triton.jit
def _group_of(j, ends, n_groups):
    """Group of latent j."""
    group = tl.zeros((), tl.int64)
    for g in range(n_groups - 1):
        group += (j >= tl.load(ends + g)).to(tl.int64)
    return group


@triton.jit
def piece_sums(
    starts, first_piece, owner, rows, values, slopes, x, grads, ends, part, part_bias,
    n_latents, n_rows, width, n_groups, PIECE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of one piece of a latent with more than PIECE entries; pieces without an owner do nothing."""
    p = tl.program_id(0).to(tl.int64)
    j = tl.load(owner + p)
    owned = j < n_latents
    begin = tl.load(starts + j, mask=owned, other=0)
    begin += (p - tl.load(first_piece + j, mask=owned, other=0)) * PIECE
    end = tl.minimum(begin + PIECE, tl.load(starts + j + 1, mask=owned, other=0))
    side = grads + _group_of(j, ends, n_groups) * n_rows * width
    dec, enc, bias = _entry_sums(begin, end, rows, values, slopes, x, side, width, ENTRIES, BLOCK)
    column = tl.arange(0, BLOCK)
    inside = column < tl.where(owned, width, 0)
    tl.store(part + 2 * p * width + column, dec, mask=inside)
    tl.store(part + (2 * p + 1) * width + column, enc, mask=inside)
    tl.store(part_bias + p, bias, mask=owned)


@triton.jit
def latent_rows(
    starts, first_piece, rows, values, slopes, x, grads, ends, part, part_bias, decoder,
    extra_at, extra_dec, extra_enc, extra_bias, out_dec, out_enc, out_bias, out_square, n_rows, width, n_groups,
    EXTRA: tl.constexpr, PIECE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one latent: its entries or, if there are more than PIECE, its pieces; extra; projection; square."""
    j = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    begin = tl.load(starts + j)
    count = tl.load(starts + j + 1) - begin
    short = tl.where(count > PIECE, 0, count)
    side = grads + _group_of(j, ends, n_groups) * n_rows * width
    dec, enc, bias = _entry_sums(begin, begin + short, rows, values, slopes, x, side, width, ENTRIES, BLOCK)
    piece = tl.load(first_piece + j)
    for p in range(piece, piece + (count - short + PIECE - 1) // PIECE):
        dec += tl.load(part + 2 * p * width + column, mask=inside, other=0.0)
        enc += tl.load(part + (2 * p + 1) * width + column, mask=inside, other=0.0)
        bias += tl.load(part_bias + p)
    filled = tl.where(count > 0, width, 0)
    if EXTRA:
        more = tl.load(extra_at + j).to(tl.int64)
        given = tl.where(more >= 0, width, 0)
        dec += tl.load(extra_dec + more * width + column, mask=column < given, other=0.0)
        enc += tl.load(extra_enc + more * width + column, mask=column < given, other=0.0)
        bias += tl.load(extra_bias + more, mask=more >= 0, other=0.0)
        filled = tl.maximum(filled, given)
    atom = tl.load(decoder + j * width + column, mask=column < filled, other=0.0)
    dec -= tl.sum(dec * atom, 0) * atom
    tl.store(out_dec + j * width + column, dec, mask=inside)
    tl.store(out_enc + j * width + column, enc, mask=inside)
    tl.store(out_bias + j, bias)
    wide = bias.to(tl.float64)
    tl.store(out_square + j, tl.sum(dec * dec, 0).to(tl.float64) + tl.sum(enc * enc, 0).to(tl.float64) + wide * wide)


@triton.jit
def adam_rows(
    weight, grad, first, second, factor, total, width, rate, keep1, keep2, new1, new2, eps, debias,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One Adam step of one row of ``width`` numbers; the last row may be shorter. With UNIT to unit norm afterwards."""
    column = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * width + column
    inside = (column < width) & (at < total)
    g = tl.load(grad + at, mask=inside, other=0.0) * tl.load(factor).to(tl.float32)
    m = keep1 * tl.load(first + at, mask=inside, other=0.0) + new1 * g
    v = keep2 * tl.load(second + at, mask=inside, other=0.0) + new2 * g * g
    w = tl.load(weight + at, mask=inside, other=0.0) - rate * m / (tl.sqrt(v) * debias + eps)
    if UNIT:
        w = w / tl.maximum(tl.sqrt(tl.sum(tl.where(inside, w * w, 0.0), 0)), 1e-12)
    tl.store(first + at, m, mask=inside)
    tl.store(second + at, v, mask=inside)
    tl.store(weight + at, w, mask=inside)
