"""Places inside an image network beyond its list of layers: attention, heads, MLP, normalisations, any module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from biosae.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import nn

    from biosae.encoders.base import Encoder, Layer

MODULE = "module:"
"""Prefix of a site that is any module of the network, by its path."""
_NORMS = {"norm1": ("norm1", "ln_1"), "norm2": ("norm2", "ln_2")}
_PROBE_SIDE = 224


def tokens_of(y: torch.Tensor, form: str) -> torch.Tensor:
    """Tokens ``(B, T, d)`` of what a module gave: a sequence as it is, a map row by row, a vector as one token."""
    if y.ndim == 4:
        return y.flatten(1, 2) if form == "NHWC" else y.flatten(2).transpose(1, 2)
    return y[:, None] if y.ndim == 2 else y


def block_sites(encoder: Encoder) -> dict[str, Layer]:
    """Sites inside the transformer blocks among the layers of an encoder, in order of depth.

    For a block ``blocks.i`` those that exist of ``.norm1.input .norm1 .attn.head<h> .attn .norm2.input .norm2 .mlp``.
    """
    found: dict[str, Layer] = {}
    for name, layer in encoder._sites.items():
        if layer.path is None or layer.form != "tokens":
            continue
        block = encoder.model.get_submodule(layer.path)
        attention = getattr(block, "attn", None)
        if attention is None:
            continue
        for key, part in (("norm1", attention), ("norm2", getattr(block, "mlp", None))):
            found |= _norm_sites(block, name, layer, key)
            if part is None:
                continue
            if key == "norm1":
                found |= _head_sites(part, name, layer)
            kind = "attention" if key == "norm1" else "mlp"
            place = f"{layer.path}.{'attn' if key == 'norm1' else 'mlp'}"
            found[f"{name}.{'attn' if key == 'norm1' else 'mlp'}"] = layer._replace(path=place, kind=kind)
    return found


def _norm_sites(block: nn.Module, name: str, layer: Layer, key: str) -> dict[str, Layer]:
    from torch import nn

    attribute = next((a for a in _NORMS[key] if isinstance(getattr(block, a, None), nn.Module)), None)
    if attribute is None or isinstance(getattr(block, attribute), nn.Identity):
        return {}
    at = layer._replace(path=f"{layer.path}.{attribute}")
    return {
        f"{name}.{key}.input": at._replace(kind="norm input", side="input"),
        f"{name}.{key}": at._replace(kind="norm", norm=key),
    }


def _head_sites(attention: nn.Module, name: str, layer: Layer) -> dict[str, Layer]:
    """One site a head: its weighted values, as they enter the output projection."""
    from torch import nn

    heads, path = getattr(attention, "num_heads", 0), f"{layer.path}.attn"
    if isinstance(attention, nn.MultiheadAttention):
        if not attention._qkv_same_embed_dim or attention.bias_k is not None or not attention.batch_first:
            return {}
        width, side = attention.embed_dim, "heads"
    elif heads and isinstance(getattr(attention, "proj", None), nn.Linear):
        width, side, path = attention.proj.in_features, "input", f"{path}.proj"
    else:
        return {}
    each = width // heads
    return {
        f"{name}.attn.head{h}": layer._replace(
            width=each, path=path, kind="head", side=side, part=(h * each, (h + 1) * each)
        )
        for h in range(heads)
    }


def find(encoder: Encoder, name: str) -> Layer | None:
    """The site of a name that is not in ``encoder.layers``, or None if there is none.

    Raises
    ------
    InputError
        If the name is that of a module whose output has no rows of features.
    """
    if encoder.item != "image":
        return None
    if name.startswith(MODULE):
        return _module_site(encoder, name.removeprefix(MODULE))
    return block_sites(encoder).get(name)


def probe_size(encoder: Encoder) -> tuple[int, int]:
    """Input size in pixels of the pass that finds the shapes: that of the encoder, or 224."""
    side = encoder.preprocess.size or encoder.info.size or _PROBE_SIDE
    return side, side


def shapes(encoder: Encoder, input_hw: tuple[int, int]) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of the output of every module, one for each time that it runs, in a pass over two blank images."""
    import torch

    known = encoder._shapes.get(input_hw)
    if known is not None:
        return known
    seen: dict[str, list[tuple[int, ...]]] = {}

    def note(path: str, y: Any) -> None:
        y = y[0] if isinstance(y, (tuple, list)) and y else y
        seen.setdefault(path, []).append(tuple(y.shape) if isinstance(y, torch.Tensor) else ())

    handles = [
        module.register_forward_hook(lambda _m, _a, y, path=path: note(path, y))
        for path, module in encoder.model.named_modules()
        if path
    ]
    try:
        blank = torch.zeros(2, encoder.in_channels, *input_hw)
        encoder._outputs(blank, {"final": encoder.resolve_pool("final", "default")})
    finally:
        for handle in handles:
            handle.remove()
    encoder._shapes[input_hw] = seen
    return seen


def _module_site(encoder: Encoder, path: str) -> Layer:
    from biosae.encoders.base import Layer

    modules = dict(encoder.model.named_modules())
    if not path or path not in modules:
        raise InputError(f"{encoder.info.name} has no module {path!r}; {nearest(path, [p for p in modules if p])}")
    hw = probe_size(encoder)
    calls = shapes(encoder, hw).get(path, [])
    what = f"{MODULE}{path} of {encoder.info.name}"
    if len(calls) != 1:
        why = "does not run in a pass" if not calls else f"runs {len(calls)} times in a pass"
        raise InputError(f"{what} {why}, so its output is not one thing; choose another of encoder.sites(modules=True)")
    shape, module = calls[0], modules[path]
    if len(shape) not in (2, 3, 4) or shape[0] != 2:
        raise InputError(
            f"{what} gives {shape or 'no tensor'} for 2 images, not rows of features an image; choose another of "
            "encoder.sites(modules=True)"
        )
    norm = "norm" if "Norm" in type(module).__name__ else "none"
    if len(shape) == 4:
        form = _form(module, shape, encoder, what)
        return Layer(shape[3 if form == "NHWC" else 1], 0, path, "module", norm, form=form, n_prefix=0)
    if len(shape) == 3:
        rows, columns = encoder.grid("final", hw) if encoder.n_prefix else (0, 0)
        whole = encoder.n_prefix > 0 and shape[1] == encoder.n_prefix + rows * columns
        stride = encoder._sites["final"].stride if whole else 0
        return Layer(shape[2], stride, path, "module", norm, n_prefix=None if whole else 0)
    return Layer(shape[1], 0, path, "module", norm, form="vector", n_prefix=0)


def _form(module: nn.Module, shape: tuple[int, ...], encoder: Encoder, what: str) -> str:
    """Which axis of a map holds the features: known from the kind of module, else from the sides of a square input."""
    from torch import nn

    if isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)):
        return "NCHW"
    if isinstance(module, nn.Linear):
        return "NHWC"
    _, a, b, c = shape
    if (b == c) != (a == b):
        return "NCHW" if b == c else "NHWC"
    if a == b == c:
        return encoder._map_form
    raise InputError(f"{what} gives {shape}, a map whose feature axis cannot be told; choose a module next to it")


def module_grid(encoder: Encoder, site: Layer, input_hw: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of what a module gives for an input of ``input_hw`` pixels."""
    shape = shapes(encoder, tuple(input_hw))[site.path][0]
    if len(shape) == 4:
        return (shape[1], shape[2]) if site.form == "NHWC" else (shape[2], shape[3])
    return (1, shape[1] if len(shape) == 3 else 1)


def table(encoder: Encoder, *, modules: bool = False) -> pd.DataFrame:
    """The addressable sites of an encoder (see :meth:`biosae.encoders.Encoder.sites`)."""
    import pandas as pd

    named = {n: s._replace(norm=encoder._norm(n, "tokens")) for n, s in encoder._sites.items()}
    if encoder.item == "image":
        inner, listed, named = block_sites(encoder), named, {}
        for name, site in listed.items():
            named |= {n: s for n, s in inner.items() if n.startswith(f"{name}.")} | {name: site}
    if modules and encoder.item == "image":
        for path in shapes(encoder, probe_size(encoder)):
            try:
                named[MODULE + path] = _module_site(encoder, path)
            except InputError:
                continue
    rows = []
    for name, site in named.items():
        prefix = encoder.n_prefix if site.n_prefix is None else site.n_prefix
        rows.append(
            {"site": name, "kind": site.kind if name != "final" else "final", "width": site.width,
             "tokens": _count(encoder, name), "prefix": prefix, "norm": site.norm, "module": site.path}
        )  # fmt: skip
    frame = pd.DataFrame(rows).set_index("site")
    return frame.astype({"width": "Int64", "tokens": "Int64", "prefix": "Int64"})


def _count(encoder: Encoder, name: str) -> int | None:
    """Tokens (without the prefix) for an input of the encoder's own size; None where that is not fixed."""
    size = getattr(encoder.preprocess, "size", None)
    if encoder.item != "image" or size is None:
        return None
    rows, columns = encoder.grid(name, (size, size))
    return rows * columns
