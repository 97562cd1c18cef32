"""Building networks from an architecture and a weight file, strictly: a missing or surplus tensor is an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from biosae.encoders.catalog import EncoderInfo
from biosae.encoders.dinov2 import TimmNames, in_timm_names
from biosae.encoders.sources import StateFile, Weights
from biosae.errors import InputError, MissingExtraError, WeightsError, nearest

if TYPE_CHECKING:
    from torch import nn

    from biosae.encoders.base import Encoder

_FROM_CONFIG = ("input_size", "fixed_input_size", "first_conv", "classifier")


class Built(NamedTuple):
    """A network, the part of it that is used, the adapter for it, its facts, how it was built, and (for signals)
    further keywords of :func:`~biosae.encoders.signals.signal_preprocess`."""

    network: nn.Module
    tower: nn.Module
    adapter: type[Encoder]
    facts: EncoderInfo
    architecture: dict[str, Any]
    signal: Mapping[str, Any] = {}


def _classes(args: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments with the names of layer classes replaced by the classes."""
    from timm.layers import GluMlp, SwiGLUPacked
    from torch.nn import GELU, SiLU

    named = {"GluMlp": GluMlp, "SwiGLUPacked": SwiGLUPacked, "GELU": GELU, "SiLU": SiLU}
    return {k: named.get(v, v) if k in ("mlp_layer", "act_layer") else v for k, v in args.items()}


def no_fit(facts: EncoderInfo, found: Weights, error: Exception) -> WeightsError:
    """The error for a file that does not hold the tensors of the network."""
    text = " ".join(str(error).split())
    return WeightsError(
        f"{found.file} does not fit the architecture of {facts.name}: {text[:600]}. Is it the right file, and are the "
        "constructor arguments (args=...) those it was trained with?"
    )


def build_timm(
    facts: EncoderInfo, found: Weights | None, extra: Mapping[str, Any], *, resized: bool, random: bool
) -> Built:
    """A timm network without classifier. ``resized``: the user chose an input size of their own."""
    import timm

    from biosae.encoders.vision import TimmEncoder, default_pool

    config = found.config if found is not None and found.config is not None else {}
    arch = config.get("architecture") or facts.arch
    if arch is None:
        raise InputError(
            f"the catalogue does not know the architecture of {facts.name}; load it from its hub repository or from a "
            "folder that holds its config.json"
        )
    base = arch.partition(".")[0]
    if not timm.is_model(base):
        raise InputError(f"timm has no architecture {base!r}; {nearest(base, timm.list_models())}")
    args = {**config.get("model_args", {}), **(facts.hub_args if config else facts.args), **extra}
    args.pop("num_classes", None)
    own = config.get("pretrained_cfg", {})
    cfg = timm.get_pretrained_cfg(arch) or timm.get_pretrained_cfg(base)
    fixed = own.get("fixed_input_size", cfg.fixed_input_size if cfg else False)
    if resized and fixed and not args.get("dynamic_img_size"):
        args["img_size"] = facts.size
    overlay = {k: own[k] for k in _FROM_CONFIG if k in own}
    if not random:
        overlay |= {
            "num_classes": 0,
            "label_offset": 0,
            **_weights_overlay(found, overlay.get("classifier", cfg and cfg.classifier)),
        }
    try:
        network = timm.create_model(
            arch, pretrained=not random, pretrained_cfg_overlay=overlay, num_classes=0, **_classes(args)
        )
    except TypeError as error:
        raise InputError(f"timm could not build {arch} for {facts.name}: {error}") from error
    except RuntimeError as error:
        if random:
            raise
        raise no_fit(facts, found, error) from error
    network.pretrained_cfg.pop("state_dict", None)
    blocks = getattr(network, "blocks", None)
    prefix = getattr(network, "num_prefix_tokens", 0)
    seen = {"width": network.num_features, "depth": len(blocks) if blocks is not None else None, "prefix": prefix}
    _compare(facts, seen)
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", (None,))[0]
    seen = {k: v for k, v in {**seen, "patch": patch}.items() if getattr(facts, k) is None}
    if not facts.facts and facts.pool == EncoderInfo.pool:
        seen["pool"] = default_pool(network)
    return Built(network, network, TimmEncoder, replace(facts, **seen), _described(facts, arch, args, extra))


def _described(facts: EncoderInfo, arch: Any, args: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Architecture for the identity. A catalogued encoder is the same whether its source's own configuration or the
    catalogue's arguments built it."""
    if facts.facts and facts.arch:
        return {"arch": facts.arch, "args": {**facts.args, **extra}}
    return {"arch": arch, "args": dict(args)}


def _weights_overlay(found: Weights, classifier: str | tuple[str, ...] | None) -> dict[str, Any]:
    """The file itself, or its tensors without the classifier where it has one (so that loading stays strict)."""
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    surplus = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    state = in_timm_names(StateFile(found.file))
    if isinstance(state, TimmNames):
        return {"state_dict": dict(state)}
    if not surplus & set(state):
        return {"file": str(found.file)}
    return {"state_dict": {k: state[k] for k in state if k not in surplus}}


def _compare(facts: EncoderInfo, seen: Mapping[str, int | None]) -> None:
    for key, value in seen.items():
        said = getattr(facts, key)
        if said is not None and value is not None and key not in facts.unconfirmed and said != value:
            raise WeightsError(
                f"the network built for {facts.name} has {key} {value}, but {said} is expected: the configuration or "
                "args= describe another network"
            )


def build_open_clip(
    facts: EncoderInfo, found: Weights | None, extra: Mapping[str, Any], *, resized: bool, random: bool
) -> Built:
    """An open_clip model; the image tower is what is used. ``resized``: the user chose an input size of their own."""
    import open_clip

    from biosae.encoders.vision import ClipEncoder

    args = {**facts.args, **extra}
    if resized:
        args["force_image_size"] = facts.size
    if found is None:
        name, options = facts.arch, {"pretrained_text": False}
    elif found.config is not None:
        name = f"local-dir:{found.file.parent}"
        options = {"load_weights": False, "pretrained_text": False} if random else {"require_pretrained": True}
        if not extra:
            args = {k: v for k, v in args.items() if k == "force_image_size"}
    else:
        if not facts.arch.endswith("-quickgelu") and "force_quick_gelu" not in args:
            raise InputError(
                f"say which activation {facts.name} was trained with: args={{'force_quick_gelu': True}} "
                "for models that descend from OpenAI's CLIP, False for others; the file cannot tell"
            )
        name, options = facts.arch, {"pretrained": str(found.file), "require_pretrained": True}
    if not name.startswith("local-dir:") and name not in open_clip.list_models():
        raise InputError(f"open_clip has no architecture {name!r}; {nearest(name, open_clip.list_models())}")
    try:
        network = open_clip.create_model(name, **options, **args)
    except ImportError as error:
        raise MissingExtraError(f"the text tower of {facts.name} needs a package that is absent ({error})") from error
    except (RuntimeError, ValueError) as error:
        if random:
            raise
        raise no_fit(facts, found, error) from error
    arch = dict(found.config["model_cfg"]) if found is not None and found.config else facts.arch
    return Built(network, network.visual, ClipEncoder, facts, _described(facts, arch, args, extra))


def build_own(
    facts: EncoderInfo, found: Weights | None, extra: Mapping[str, Any], *, resized: bool, random: bool
) -> Built:
    """A network of biosae itself, or a baseline without weights; the input size is free."""
    from biosae.encoders.nic import PATCH

    args = dict(extra)
    if facts.arch == "tiny" and found is not None and found.config is not None:
        shape = found.config["architecture"]
        args = {"stage_widths": tuple(shape["stage_widths"]), "width": shape["width"], **args}
    make, adapter, signal = _own(facts.arch)
    try:
        network = make(**args)
    except TypeError as error:
        raise InputError(f"{facts.name} could not be built: {error}") from error
    if found is not None and not random:
        state = StateFile(found.file)
        try:
            network.load_state_dict({k: state[k] for k in state})
        except RuntimeError as error:
            raise no_fit(facts, found, error) from error
    described: Mapping[str, Any] = args
    if facts.arch == "nic":
        facts, described = replace(facts, width=128, depth=4, patch=PATCH), {"patch_stride": network.patch_stride}
    elif facts.arch == "tiny":
        facts, described = replace(facts, width=network.width, depth=len(network.layers) - 1), network.widths
    return Built(network, network, adapter, facts, {"arch": facts.arch, "args": dict(described)}, signal)


def _own(arch: str | None) -> tuple[Callable[..., nn.Module], type[Encoder], dict[str, Any]]:
    """Constructor, adapter and signal keywords of an architecture of biosae."""
    from torch.nn import Identity

    from biosae.encoders import baselines, nic, robustsleepnet, tiny, wildecg

    networks = {
        "nic": (nic.NicNet, nic.NicEncoder, {}),
        "tiny": (tiny.TinyHistologyNet, nic.TinyEncoder, {}),
        "wildecg": (wildecg.WildEcgNet, wildecg.WildEcgEncoder, {}),
        "robustsleepnet": (
            robustsleepnet.RobustSleepNet, robustsleepnet.RobustSleepNetEncoder, {"multiple": robustsleepnet.EPOCH},
        ),
        "identity": (Identity, baselines.IdentityEncoder, {}),
        "colour-texture": (Identity, baselines.ColourTextureEncoder, {}),
        **{name: (Identity, baselines.SignalBaseline, {}) for name in baselines.SIGNALS},
    }  # fmt: skip
    if arch not in networks:
        raise InputError(f"biosae has no architecture {arch!r}; {nearest(str(arch), networks)}")
    return networks[arch]


def _build_xray(*args: Any, **kwargs: Any) -> Built:
    from biosae.encoders.xray import build_xray

    return build_xray(*args, **kwargs)


def _build_braindecode(*args: Any, **kwargs: Any) -> Built:
    from biosae.encoders.eeg_models import build_braindecode

    return build_braindecode(*args, **kwargs)


BUILDERS: dict[str, Callable[..., Built]] = {
    "timm": build_timm,
    "open_clip": build_open_clip,
    "biosae": build_own,
    "braindecode": _build_braindecode,
    "torchxrayvision": _build_xray,
}
