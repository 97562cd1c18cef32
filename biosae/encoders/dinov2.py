"""DINOv2 checkpoints of transformers (``model_type: dinov2``), read as the timm network that they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biosae.errors import WeightsError
from biosae.files import read_json

if TYPE_CHECKING:
    import torch

    from biosae.encoders.sources import StateFile

ARCH = "vit_base_patch14_dinov2"
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of interpolations, as a ``preprocessor_config.json`` states them."""
_FIXED = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_IN_BLOCK = {
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
_QKV = ("query", "key", "value")
_PLAIN = r"(norm1|norm2|mlp\.fc1|mlp\.fc2)\.(weight|bias)"


def as_timm_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration in timm's terms of a folder's ``config.json`` and ``preprocessor_config.json``.

    Raises
    ------
    WeightsError
        If the network is a variant that has no counterpart here, or its configuration is not whole.
    """
    if config.get("use_swiglu_ffn") or config.get("hidden_act", "gelu") != "gelu":
        raise WeightsError(
            f"{folder.name} is a DINOv2 with another MLP (SwiGLU or activation {config.get('hidden_act')}), which "
            "biosae does not read from transformers: take the timm copy of these weights"
        )
    needed = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    absent = [k for k in needed if k not in config]
    if absent:
        raise WeightsError(f"{folder.name}/config.json lacks {', '.join(absent)}: copy the whole file again")
    size = config["image_size"]
    args = {
        "img_size": size, "patch_size": config["patch_size"], "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"], "num_heads": config["num_attention_heads"],
        "mlp_ratio": config.get("mlp_ratio", 4), "qkv_bias": config.get("qkv_bias", True),
    }  # fmt: skip
    return {"architecture": ARCH, "model_args": args, "pretrained_cfg": _preprocessing(folder, size)}


def _preprocessing(folder: Path, size: int) -> dict[str, Any]:
    """What the folder's own ``preprocessor_config.json`` says; nothing where it is absent."""
    if not (folder / "preprocessor_config.json").is_file():
        return {}
    own = read_json(folder / "preprocessor_config.json")
    crop, shortest = own.get("crop_size") or {}, (own.get("size") or {}).get("shortest_edge")
    if own.get("do_center_crop") and crop.get("height") == crop.get("width"):
        size = crop.get("height", size)
    known = {"input_size": [3, size, size], "crop_pct": min(1.0, size / shortest) if shortest else 1.0}
    if own.get("resample") in _RESAMPLE:
        known["interpolation"] = _RESAMPLE[own["resample"]]
    return known | {k: own[f"image_{k}"] for k in ("mean", "std") if f"image_{k}" in own}


def in_timm_names(state: StateFile) -> Mapping[str, torch.Tensor]:
    """Tensors under the names of timm, if the file has those of transformers; else the file as it is."""
    return TimmNames(state) if "embeddings.position_embeddings" in state else state


class TimmNames(Mapping[str, "torch.Tensor"]):
    """A file of transformers' DINOv2 under timm's names: query, key and value are stacked, the mask token is left out.

    Raises
    ------
    WeightsError
        If the file holds a tensor that has no place in the network.
    """

    def __init__(self, state: StateFile) -> None:
        self.file, self._state = state.file, state
        self._parts: dict[str, list[str]] = {}
        for name in state:
            if name == "embeddings.mask_token":
                continue
            into = _timm_name(name)
            if into is None:
                raise WeightsError(f"{state.file} holds {name!r}, which no DINOv2 of transformers has")
            self._parts.setdefault(into, []).append(name)
        for names in self._parts.values():
            names.sort(key=lambda n: next((i for i, part in enumerate(_QKV) if f".{part}." in n), 0))

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        parts = [self._state[n] for n in self._parts[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _timm_name(name: str) -> str | None:
    if name in _FIXED:
        return _FIXED[name]
    found = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
    if found is None:
        return None
    block, rest = f"blocks.{found[1]}", found[2]
    if re.fullmatch(_PLAIN, rest):
        return f"{block}.{rest}"
    if rest in _IN_BLOCK:
        return f"{block}.{_IN_BLOCK[rest]}"
    stem, _, kind = rest.rpartition(".")
    if stem in _IN_BLOCK:
        return f"{block}.{_IN_BLOCK[stem]}.{kind}"
    if re.fullmatch(r"attention\.attention\.(query|key|value)", stem):
        return f"{block}.attn.qkv.{kind}"
    return None
