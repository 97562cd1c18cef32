"""Adapters for networks of timm and open_clip."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from biosae.encoders.base import Encoder, Layer
from biosae.encoders.hooks import Tap, run_with_taps
from biosae.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn


def _is_identity(module: nn.Module | None) -> bool:
    from torch import nn

    return module is None or isinstance(module, nn.Identity)


def _blocks_of(trunk: nn.Module, *, prefix: str = "") -> dict[str, Layer]:
    """Intermediate layers of a timm network, named by their module."""
    found = trunk.feature_info
    rows = found if isinstance(found, list) else found.info
    tokens = hasattr(trunk, "num_prefix_tokens")
    kind, form = ("residual", "tokens") if tokens else ("stage", getattr(trunk, "output_fmt", "NCHW"))
    return {r["module"]: Layer(r["num_chs"], r["reduction"], prefix + r["module"], kind, form=form) for r in rows}


def _registers(trunk: nn.Module) -> int:
    """Number of register tokens of a timm transformer."""
    tokens = getattr(trunk, "reg_token", None)
    return 0 if tokens is None else tokens.shape[1]


def default_pool(model: nn.Module) -> str:
    """``pool="default"`` of a timm network that no catalogue entry describes: its own pooling."""
    kind = getattr(model, "global_pool", None)
    if not isinstance(kind, str):
        return "head"
    has_cls = getattr(model, "cls_token", None) is not None
    return {"token": "cls", "": "cls" if has_cls else "mean"}.get(kind, "head")


class TimmEncoder(Encoder):
    """A timm network: transformers with ``blocks``, convolution networks by their stages.

    Block outputs are taken with hooks and are the un-normalised residual stream; ``final`` is ``forward_features``,
    and its head ``forward_head(pre_logits=True)``.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        sites = _blocks_of(model)
        self.is_transformer = hasattr(model, "num_prefix_tokens") and hasattr(model, "patch_embed")
        self._map_form = getattr(model, "output_fmt", "NCHW")
        stride = max((s.stride for s in sites.values()), default=1)
        sites["final"] = Layer(model.num_features, stride, form=self._map_form)
        super().__init__(
            model,
            *args,
            sites,
            head_width=getattr(model, "head_hidden_size", None) or model.num_features,
            n_prefix=getattr(model, "num_prefix_tokens", 0) if self.is_transformer else 0,
            has_cls=self.is_transformer and getattr(model, "cls_token", None) is not None,
            n_registers=_registers(model) if self.is_transformer else 0,
            final_norm="none" if _is_identity(getattr(model, "norm", None)) else "final",
            head_norm="final" if self.is_transformer else "none",
            **kwargs,
        )

    def _grid(self, name: str, input_hw: tuple[int, int]) -> tuple[int, int]:
        if self.is_transformer:
            return super()._grid(name, input_hw)
        stride = self._sites[name].stride
        return math.ceil(input_hw[0] / stride), math.ceil(input_hw[1] / stride)

    def _check_size(self, input_hw: tuple[int, int]) -> None:
        if not self.is_transformer:
            return
        embed = self.model.patch_embed
        if getattr(embed, "strict_img_size", False) and embed.img_size and tuple(embed.img_size) != input_hw:
            raise InputError(
                f"{self.info.name} was built for {embed.img_size[0]} px inputs, got {input_hw}: load it with "
                f"size={input_hw[0]} (position embeddings are then interpolated)"
            )
        patch = embed.patch_size
        if input_hw[0] % patch[0] or input_hw[1] % patch[1]:
            raise InputError(f"{self.info.name} needs sides divisible by its patch of {patch[0]} px, got {input_hw}")

    def _run(self, x: torch.Tensor, pools: dict[str, str]) -> dict[str, torch.Tensor]:
        sites = self._sites
        taps = {
            n: Tap(sites[n].path, partial(self._reduce, site=sites[n], pool=p))
            for n, p in pools.items()
            if n != "final"
        }
        found, features = run_with_taps(
            self.model, taps, lambda: self.model.forward_features(x), stop="final" not in pools
        )
        if "final" in pools:
            if pools["final"] == "head":
                found["final"] = self.model.forward_head(features, pre_logits=True)
                if found["final"].ndim != 2:
                    raise InputError(f"{self.info.name} has no pooling head; use pool='mean' or pool='cls+mean'")
            else:
                found["final"] = self._reduce(features, site=sites["final"], pool=pools["final"])
        return found


class ClipEncoder(Encoder):
    """The image tower of an open_clip model; the text tower is dropped.

    ``blocks.i`` is the residual stream. ``final`` with its head is the projected image feature, not L2-normalised;
    ``cls``, ``mean`` and ``tokens`` at ``final`` are after the last normalisation and before the projection.
    """

    def __init__(self, visual: nn.Module, *args: Any, **kwargs: Any) -> None:
        if hasattr(visual, "trunk"):
            sites = _blocks_of(visual.trunk, prefix="trunk.")
            self._norm_path, self._tokens_end = "trunk.norm", hasattr(visual.trunk, "norm")
            width = visual.trunk.num_features
            patch, n_prefix = next(iter(sites.values())).stride, visual.trunk.num_prefix_tokens
            has_cls, registers = visual.trunk.cls_token is not None, _registers(visual.trunk)
            head_width = getattr(visual.head[-1], "out_features", width) if len(visual.head) else width
        elif hasattr(visual, "transformer") and hasattr(visual, "conv1"):
            patch, width = visual.patch_size[0], visual.conv1.out_channels
            sites = {
                f"blocks.{i}": Layer(width, patch, f"transformer.resblocks.{i}")
                for i in range(len(visual.transformer.resblocks))
            }
            self._norm_path = "ln_post"
            self._tokens_end = visual.attn_pool is None and not visual.final_ln_after_pool
            n_prefix, has_cls, registers, head_width = 1, True, 0, visual.output_dim
        else:
            raise InputError(
                f"the image tower {type(visual).__name__} of open_clip is not a vision transformer; biosae reads "
                "ViT towers and timm towers only"
            )
        sites["final"] = Layer(width, patch)
        super().__init__(
            visual,
            *args,
            sites,
            head_width=head_width,
            n_prefix=n_prefix,
            has_cls=has_cls,
            n_registers=registers,
            final_norm="final",
            head_norm="final",
            **kwargs,
        )

    def _check_size(self, input_hw: tuple[int, int]) -> None:
        if tuple(self.model.image_size) != input_hw:
            raise InputError(
                f"{self.info.name} was built for {self.model.image_size[0]} px inputs, got {input_hw}: load it with "
                f"size={input_hw[0]} (position embeddings are then interpolated)"
            )

    def resolve_pool(self, layer: int | str, pool: str) -> str:
        resolved = super().resolve_pool(layer, pool)
        if self.resolve_layer(layer) == "final" and resolved != "head" and not self._tokens_end:
            raise InputError(
                f"{self.info.name} pools before its last normalisation, so 'final' has no tokens; "
                f"take {self.layers[-2]!r}"
            )
        return resolved

    def _run(self, x: torch.Tensor, pools: dict[str, str]) -> dict[str, torch.Tensor]:
        headed = pools.get("final") == "head"
        taps = {}
        for name, pool in pools.items():
            if name != "final" or not headed:
                site = self._sites[name]
                taps[name] = Tap(site.path or self._norm_path, partial(self._reduce, site=site, pool=pool))
        found, projected = run_with_taps(self.model, taps, lambda: self.model(x), stop=not headed)
        if headed:
            found["final"] = projected
        return found
