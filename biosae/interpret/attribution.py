"""Which layers and attention heads of a transformer wrote what a latent reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from biosae.errors import InputError, nearest

if TYPE_CHECKING:
    from biosae.encoders.base import Encoder

_TOLERANCE = 1e-3  # of the largest number that is split


def reading_direction(sae: Any, latent: str | int) -> np.ndarray:
    """Row of the encoder matrix of a latent, float64 (d,): its pre-activation is ``(x - b) . w + b_enc``.

    Parameters
    ----------
    sae
        Fitted :class:`biosae.sae.SAE` of architecture relu, topk, batchtopk, matryoshka or jumprelu, or a
        :class:`biosae.sae.Baseline` with linear scores (PCA, ICA).
    latent : str or int
        Name (``"L0042"``) or number.

    Raises
    ------
    InputError
        If codes are not linear in the embedding before the activation, or there is no such latent.
    """
    matrix = sae._tensors().get("W_enc")
    if matrix is None or np.shape(matrix) != np.shape(sae.decoder_):
        raise InputError(
            f"this {type(sae).__name__} has no encoder matrix in units of the embedding; use an SAE (relu, topk, "
            "batchtopk, matryoshka, jumprelu), or a row of sae.decoder_ as direction, and say so"
        )
    if getattr(getattr(sae, "normaliser_", None), "rowwise", None):
        raise InputError("this SAE scales each row by its own size first, so a code is not linear in the embedding; "
                         "fit it with normalise='centre_scale'")  # fmt: skip
    names = sae.get_feature_names_out().tolist()
    number = names.index(latent) if isinstance(latent, str) and latent in names else latent
    if isinstance(number, str):
        number = int(number[1:]) if number[1:].isdigit() and number[0] == "L" else -1
    if not 0 <= number < len(matrix):
        raise InputError(f"no latent {latent!r} among {len(matrix)}")
    return np.asarray(matrix[number], np.float64)


def layer_attribution(encoder: Encoder, item: np.ndarray, direction: Any, *, layer: int | str = -2) -> pd.DataFrame:
    """What the attention and the MLP of every block add to a latent, token by token.

    The residual stream at a layer is the embedded patch plus what each block has added since, so its product with the
    direction of a latent is a sum over blocks: ``x_L . w = x_0 . w + sum_i (attention_i + mlp_i) . w``. Each part is a
    difference of the stream before and after, so that layer scales and gates are in it.

    Parameters
    ----------
    encoder : Encoder
        A vision transformer with a pre-norm residual stream (of timm or open_clip).
    item : ndarray
        ``uint8 (H, W, 3)``.
    direction : array (d,)
        What the latent reads (:func:`reading_direction`), or its atom.
    layer : int or str
        Block at whose output the dictionary was trained: one of ``encoder.layers``, not ``final``.

    Returns
    -------
    DataFrame
        A row a token (index ``token_row, token_col``; ``table["blocks.3.attn"].unstack()`` is a map); columns
        ``input``, then ``<block>.attn`` and ``<block>.mlp`` of each block up to the layer. Rows sum to ``x_L . w``.

    Raises
    ------
    InputError
        If the encoder has no such stream, the layer is no block of it, or widths differ.

    Notes
    -----
    These are direct effects: what an early block gives to later blocks, which then write it, counts for those. The
    pre-activation is the sum plus the constant ``b_enc - b . w``.
    """
    import torch

    name = encoder.resolve_layer(layer)
    places = encoder.sites()
    blocks = [n for n in encoder.layers if places.loc[n, "kind"] == "residual"]
    if not blocks or not {f"{n}.norm{i}.input" for n in blocks for i in (1, 2)} <= set(places.index):
        raise InputError(f"{encoder.info.name} is no pre-norm transformer, so no layer of it is a sum over blocks")
    if name not in blocks:
        raise InputError(f"{name!r} of {encoder.info.name} is no block; {nearest(name, blocks)}")
    blocks = blocks[: blocks.index(name) + 1]
    w = _direction(direction, encoder.dim(name, "tokens"))
    wanted = [place for n in blocks for place in (f"{n}.norm1.input", f"{n}.norm2.input", n)]
    with torch.no_grad():
        batch = encoder.preprocess(item)[None].to(encoder.device)
        stream = {n: x[0].double().cpu().numpy() @ w for n, x in encoder.forward(batch, wanted, "tokens").items()}
    values, before = {"input": stream[wanted[0]]}, stream[wanted[0]]
    size = max(float(np.abs(x).max()) for x in stream.values())
    for n in blocks:
        start, middle, end = (stream[place] for place in (f"{n}.norm1.input", f"{n}.norm2.input", n))
        if np.abs(start - before).max() > _TOLERANCE * size:
            raise InputError(f"{n} of {encoder.info.name} does not begin where the block before it ends; its stream is "
                             "not a sum over blocks")  # fmt: skip
        values[f"{n}.attn"], values[f"{n}.mlp"], before = middle - start, end - middle, end
    return pd.DataFrame(values, index=_tokens(encoder, name, batch))


def head_attribution(encoder: Encoder, item: np.ndarray, direction: Any, *, block: str) -> pd.DataFrame:
    """What each attention head of one block adds to a latent, token by token.

    The attention of a block adds ``s * (W_O [z_1 ... z_H] + b_O)`` to the stream, with outputs z of the heads and layer
    scale s. Its product with the direction of a latent is split by :func:`biosae.sae.analysis.head_parts`.

    Parameters
    ----------
    encoder, item, direction
        As of :func:`layer_attribution`; the direction is that of a latent at this block or a later one.
    block : str
        Name of the block in ``encoder.layers``.

    Returns
    -------
    DataFrame
        A row a token; columns ``head0`` ... and ``bias``. Rows sum to the column ``<block>.attn`` of
        :func:`layer_attribution`.

    Raises
    ------
    InputError
        If the encoder shows no heads there, or the attention does more to them than the sum above.
    """
    import torch

    from biosae.sae.analysis import head_parts

    name = encoder.resolve_layer(block)
    places = encoder.sites()
    heads = [n for n in places.index if n.startswith(f"{name}.attn.head")]
    ends = [f"{name}.norm1.input", f"{name}.norm2.input"]
    if not heads or not set(ends) <= set(places.index):
        raise InputError(f"{encoder.info.name} shows no attention heads at {name!r}; see encoder.sites()")
    w = _direction(direction, encoder.dim(name, "tokens"))
    with torch.no_grad():
        batch = encoder.preprocess(item)[None].to(encoder.device)
        found = {n: x[0].double().cpu().numpy() for n, x in encoder.forward(batch, [*heads, *ends], "tokens").items()}
    module = encoder.model.get_submodule(places.loc[heads[0], "module"])
    project = getattr(module, "out_proj", module)
    scaled = w * _layer_scale(encoder.model.get_submodule(places.loc[name, "module"]))
    weight = project.weight.double().cpu().numpy()
    parts = head_parts(np.concatenate([found[n] for n in heads], axis=1), scaled @ weight, n_heads=len(heads))
    bias = 0.0 if project.bias is None else float(scaled @ project.bias.double().cpu().numpy())
    table = pd.DataFrame(parts, columns=[f"head{h}" for h in range(len(heads))], index=_tokens(encoder, name, batch))
    table["bias"] = bias
    added = (found[ends[1]] - found[ends[0]]) @ w
    if np.abs(table.sum(axis=1) - added).max() > _TOLERANCE * max(np.abs(found[ends[1]] @ w).max(), 1e-12):
        raise InputError(f"the attention of {name} does more than add its heads to the stream; no exact split is known")
    return table


def _direction(direction: Any, width: int) -> np.ndarray:
    w = np.asarray(direction, np.float64)
    if w.shape != (width,):
        raise InputError(
            f"the direction has shape {w.shape}, the layer has width {width}; use a dictionary of this layer"
        )
    return w


def _layer_scale(block: Any) -> Any:
    """What the attention's output is multiplied by before it is added; 1 where there is nothing."""
    for name in ("ls1", "ls_1"):
        gamma = getattr(getattr(block, name, None), "gamma", None)
        if gamma is not None:
            return gamma.double().cpu().numpy()
    gamma = getattr(block, "gamma_1", None)
    return 1.0 if gamma is None else gamma.double().cpu().numpy()


def _tokens(encoder: Encoder, layer: str, batch: Any) -> pd.MultiIndex:
    rows, columns = encoder.grid(layer, tuple(batch.shape[2:]))
    return pd.MultiIndex.from_product([range(rows), range(columns)], names=["token_row", "token_col"])
