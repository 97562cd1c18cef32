"""``bs.encoders.load``: from a name or a path to an encoder whose weights are proven."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biosae.encoders.build import BUILDERS, Built
from biosae.encoders.catalog import PREPROCESSING, STATISTICS, EncoderInfo, canonical, catalogue, info
from biosae.encoders.dinov2 import in_timm_names
from biosae.encoders.preprocess import Preprocess
from biosae.encoders.signals import GAPS, SIGNAL_PREPROCESSING, signal_preprocess
from biosae.encoders.sources import StateFile, Weights, check_loaded, expect_hash, find, from_folder
from biosae.errors import InputError, WeightsError, nearest

if TYPE_CHECKING:
    from biosae.encoders.base import Encoder

RANDOM = "random"
OVERRIDES = {
    "image": (*PREPROCESSING, "resize", "pool"),
    "signal": (*SIGNAL_PREPROCESSING, *GAPS, "pool"),
    "features": ("pool",),
}
"""Arguments of ``load`` that replace the catalogue's values, by kind of item."""


def load(
    name_or_path: str | Path,
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    precision: str = "float32",
    channels_last: bool = False,
    mpp: float | None = None,
    match_mpp: bool | None = None,
    patch_stride: int | None = None,
    args: Mapping[str, Any] | None = None,
    random_state: int = 0,
    **overrides: Any,
) -> Encoder:
    """Load a frozen encoder and prove that it holds the weights of its file.

    Parameters
    ----------
    name_or_path
        A catalogue name (``bs.encoders.list()``); a folder with ``config.json`` or ``open_clip_config.json`` and a
        weight file; ``"hf-hub:organisation/name"``; ``"timm:<architecture>"``, ``"open_clip:<architecture>"`` or
        ``"braindecode:<class>"``.
    weights
        File or folder to use instead of the catalogue's source, or ``"random"`` for an untrained control. Baselines
        (``eeg-bandpower`` and others) have none.
    device
        ``"auto"`` or a torch device.
    precision
        ``"float32"``, ``"bfloat16"``, or ``"fast"``: channels_last, and bfloat16 where the device multiplies it
        natively and four probe images keep their embeddings (cosine of at least 0.999), else float32. What it came to
        is ``encoder.precision``, part of the identity: one study should use one.
    channels_last
        Memory layout of the network; often faster for convolutions.
    mpp
        Micrometres per pixel of the tiles that will be given.
    match_mpp
        True rescales the tiles to the encoder's own micrometres per pixel; False never does. None: yes for encoders
        without a fixed input size where both scales are known; the others resize to their input size, and refuse
        samples that then have another scale than their own (by more than 25 %).
    patch_stride
        Distance in px between the patches of a tile, for encoders that cut tiles into patches (default 64).
    args
        Further arguments of the network's constructor (``timm.create_model``, ``open_clip.create_model``, the class of
        braindecode).
    random_state
        Seed of the weights where ``weights="random"``.
    **overrides
        ``size``, ``mean``, ``std`` (values, or ``"imagenet"``, ``"openai"``, ``"half"``), ``interpolation``,
        ``crop_pct``, ``resize`` and ``pool`` replace the catalogue's; for signals ``rate`` (Hz), ``unit``, ``channels``
        (names), ``seconds`` (of a window), ``amplitude``, ``band`` (Hz), ``max_gap`` (s), ``max_missing`` (share) and
        ``pool``.

    Returns
    -------
    Encoder

    Raises
    ------
    InputError
        If the name, an override or an argument is not valid, or the preprocessing is not known.
    WeightsError
        If the weights are absent, differ from their hash, do not fit the architecture or did not arrive in it.
    OfflineError, GatedError
        If a download is needed and is not allowed or not possible.
    """
    import torch

    facts, found = _identify(name_or_path)
    _refuse_unsupported(facts)
    unknown = sorted(set(overrides) - set(OVERRIDES[facts.item]))
    if unknown:
        raise InputError(f"load has no argument {unknown[0]!r}; {nearest(unknown[0], OVERRIDES[facts.item])}")
    random, blank = weights == RANDOM, facts.source.startswith("none:")
    if blank:
        if weights is not None:
            raise InputError(f"{facts.name} has no weights; leave out weights=")
    elif random:
        if found is None and facts.source.startswith("bundled:"):
            found = find(facts, None)  # for its configuration only
        elif not facts.library:
            raise InputError(
                f"the architecture of {facts.name} is not known without its configuration: no random control; "
                "use a folder that holds its config.json"
            )
    elif found is None or weights is not None:
        found = find(facts, weights)
    facts, found = _agree(facts, found)
    if found is not None:
        expect_hash(found.file, found.sha256, facts.sha256)
    resize = None
    if facts.item == "image":
        facts, resize = _with_preprocessing(facts, found, overrides, random=random)
    extra = dict(args or {})
    if patch_stride is not None:
        if facts.arch != "nic":
            raise InputError(f"patch_stride is for encoders that cut tiles into patches; {facts.name} is none")
        extra["patch_stride"] = patch_stride
    if facts.item == "signal":  # some networks are built for them
        facts = replace(facts, **{k: overrides[k] for k in ("channels", "seconds") if overrides.get(k)})
    if facts.timm_pinned and not random:
        _warn_of_version(facts)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_state)  # torch.manual_seed would also reset the GPUs' generators
        built = BUILDERS[facts.library](facts, found, extra, resized="size" in overrides, random=random)
    if found is not None and not random:
        check_loaded(built.network, in_timm_names(StateFile(found.file)))
    built, preprocess = _preprocess(built, resize, overrides, random=random)
    sha256 = f"random:{random_state}" if random else facts.source if blank else found.sha256
    encoder = built.adapter(
        built.tower,
        built.facts,
        preprocess,
        architecture=built.architecture,
        weights_sha256=sha256,
        source="random weights (control)" if random else "no weights" if blank else found.label,
        device=device,
        precision="float32" if precision == "fast" else precision,
        channels_last=channels_last,
    )
    if precision == "fast":
        from biosae.encoders.precision import fastest

        encoder = fastest(encoder)
    return encoder.at_mpp(mpp, match_mpp=match_mpp)


def _preprocess(built: Built, resize: str | None, overrides: Mapping[str, Any], *, random: bool) -> tuple[Built, Any]:
    """The network with its final facts, and the preprocessing for its kind of item."""
    facts = built.facts
    if facts.item == "features":
        from biosae.encoders.baselines import Vector

        return built._replace(facts=replace(facts, pool=overrides.get("pool", facts.pool))), Vector()
    if facts.item == "signal":
        sure = {*dict(built.signal.get("config", {})), *overrides}
        shaky = [k for k in SIGNAL_PREPROCESSING if k in facts.unconfirmed and k not in sure]
        if shaky and not random:
            _warn_unconfirmed(facts, shaky, stacklevel=4)
        facts, made = signal_preprocess(facts, overrides, **built.signal)
        return built._replace(facts=facts), made
    return built, Preprocess(
        mean=facts.mean,
        std=facts.std,
        size=facts.size,
        interpolation=facts.interpolation,
        crop_pct=facts.crop_pct,
        resize=resize,
        grey=facts.library == "torchxrayvision",
        target_mpp=facts.mpp,
        min_size=facts.patch if facts.arch == "nic" else 1,
    )


def _warn_unconfirmed(facts: EncoderInfo, fields: Sequence[str], *, stacklevel: int) -> None:
    warnings.warn(
        f"{', '.join(fields)} of {facts.name} are not confirmed by any source; check them, or give them to load",
        stacklevel=stacklevel + 1,
    )


def _identify(name_or_path: str | Path) -> tuple[EncoderInfo, Weights | None]:
    """Facts for what the user named, and its weights if it is a folder."""
    text = str(name_or_path)
    if isinstance(name_or_path, str):
        scheme, colon, rest = text.partition(":")
        if colon and scheme in ("hf-hub", "hf_hub"):
            repository = rest.partition("@")[0]
            known = [e for e in catalogue().values() if e.repository == repository]
            if known:
                return replace(known[0], source=f"hf-hub:{rest}"), None
            return EncoderInfo(name=canonical(repository.rpartition("/")[2]), library="", source=f"hf-hub:{rest}"), None
        if colon and scheme in ("timm", "open_clip", "braindecode"):
            return _architecture(scheme, rest), None
        if canonical(text) in catalogue():
            return info(text), None
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        known = catalogue().get(canonical(path.resolve().name))
        found = from_folder(path.resolve(), library=known.library if known else None)
        if known is not None and found.library in (None, known.library):
            return known, found
        if found.library is None:
            raise InputError(
                f"{path} has neither config.json nor open_clip_config.json; name the encoder and give the folder as "
                "weights: load('<name>', weights='<folder>')"
            )
        if found.library == "braindecode":
            raise InputError(
                f"{path} does not say which class of braindecode it holds; name it: load('braindecode:<class>', "
                f"weights={str(path)!r})"
            )
        return _unnamed(path, found), found
    if path.is_file():
        raise InputError(f"{path} is a file; name the encoder too: load('<name>', weights={str(path)!r})")
    if "/" in text or "\\" in text:
        raise InputError(f"{text!r} is no folder here; for a repository of the hub write 'hf-hub:{text}'")
    return info(text), None


def _unnamed(path: Path, found: Weights) -> EncoderInfo:
    """Facts of a folder that no catalogue entry is named after; a network of biosae has those of its architecture."""
    plain = EncoderInfo(name=canonical(path.resolve().name), library=found.library, arch=found.arch)
    alike = [e for e in catalogue().values() if e.library == "biosae" and e.arch == found.arch and e.item == "signal"]
    if found.library != "biosae" or not alike:
        return plain
    kept = {f.name: getattr(plain, f.name) for f in fields(EncoderInfo) if f.name in _OF_ONE_FILE}
    return replace(alike[0], **kept)


_OF_ONE_FILE = ("name", "source", "licence", "gated", "derivatives_restricted", "sha256", "note")


def _architecture(library: str, arch: str) -> EncoderInfo:
    """Facts of an architecture that the user names; for timm, its own tag says where weights are."""
    if library == "braindecode":
        alike = [e for e in catalogue().values() if e.library == library and e.arch == arch]
        if not alike:
            known = sorted({e.arch for e in catalogue().values() if e.library == library and e.arch})
            raise InputError(f"biosae loads no class {arch!r} of braindecode; {nearest(arch, known)}")
        blank = EncoderInfo(name=canonical(arch))
        return replace(alike[0], **{k: getattr(blank, k) for k in _OF_ONE_FILE})
    if library == "open_clip":
        return EncoderInfo(name=canonical(arch), library=library, arch=arch)
    import timm

    base = arch.partition(".")[0]
    if not timm.is_model(base):
        raise InputError(f"timm has no architecture {base!r}; {nearest(base, timm.list_models())}")
    cfg = timm.get_pretrained_cfg(arch)
    repository = cfg.hf_hub_id if cfg is not None else None
    return EncoderInfo(
        name=canonical(arch), library=library, arch=arch, source=f"hf-hub:{repository}" if repository else ""
    )


def _refuse_unsupported(facts: EncoderInfo) -> None:
    if facts.needs_remote_code:
        raise WeightsError(
            f"{facts.name} ships its network as code that would be downloaded and run; biosae does not do that. "
            "Compute features in an environment you trust and use Embeddings.from_array"
        )
    if facts.library and not facts.loadable:
        instead = facts.instead or (
            f"compute features with {facts.library} and use Embeddings.from_array, or choose an encoder with "
            "loadable=True in bs.encoders.list()"
        )
        raise WeightsError(
            f"{facts.name} needs the package {facts.library!r}, with which biosae does not load encoders. "
            f"Instead: {instead}"
        )


def _agree(facts: EncoderInfo, found: Weights | None) -> tuple[EncoderInfo, Weights | None]:
    """Refuse a folder of another library or network than the one named."""
    if found is None or found.library is None:
        return facts, found
    if not facts.library:
        return replace(facts, library=found.library, arch=found.arch), found
    if found.library != facts.library or (facts.library == "biosae" and found.arch != facts.arch):
        kind = found.arch if found.library == "biosae" else found.library
        raise InputError(
            f"{found.file.parent.name} holds a {kind} network, but {facts.name} is another kind; give the weights of "
            f"{facts.name}, or load the folder by its path alone"
        )
    return facts, found


def _config_preprocessing(found: Weights | None) -> dict[str, Any]:
    """Preprocessing that a source's own configuration states."""
    if found is None or found.config is None:
        return {}
    config = found.config
    if found.library == "timm":
        own = config["pretrained_cfg"]
        given = {k: own[k] for k in ("mean", "std", "interpolation", "crop_pct") if k in own}
        mode = own.get("crop_mode", "center")
        given |= {"size": own["input_size"][-1]} if "input_size" in own else {}
        return given | {"resize": {"center": "shorter"}.get(mode, mode)}
    if found.library == "open_clip":
        own = config.get("preprocess_cfg", {})
        mean, std = STATISTICS["openai"]
        return {
            "size": config["model_cfg"]["vision_cfg"]["image_size"],
            "mean": own.get("mean", mean),
            "std": own.get("std", std),
            "interpolation": own.get("interpolation", "bicubic"),
            "crop_pct": 1.0,
            "resize": {"shortest": "shorter"}.get(mode := own.get("resize_mode", "shortest"), mode),
        }
    own = config.get("preprocess", config)
    return {k: own[k] for k in PREPROCESSING if k in own}


def _with_preprocessing(
    facts: EncoderInfo, found: Weights | None, overrides: Mapping[str, Any], *, random: bool
) -> tuple[EncoderInfo, str]:
    """Facts with the preprocessing in force, and the resize mode.

    The user's values come first, then confirmed catalogue values, then the source's configuration, then unconfirmed
    catalogue values. An architecture's defaults are never used for trained weights: they belong to other weights.
    """
    given = dict(overrides)
    for i, key in enumerate(("mean", "std")):
        if isinstance(given.get(key), str):
            if given[key] not in STATISTICS:
                raise InputError(f"no {key} is called {given[key]!r}; {nearest(given[key], STATISTICS)}")
            given[key] = STATISTICS[given[key]][i]
    config = _config_preprocessing(found)
    if random and not facts.facts and facts.library == "timm":
        config = _architecture_preprocessing(facts.arch)
    known = {k: v for k in PREPROCESSING if (v := getattr(facts, k)) is not None}
    sure = {k: v for k, v in known.items() if k not in facts.unconfirmed}
    values = known | config | sure | given
    shaky = sorted(set(known) - set(sure) - set(config) - set(given))
    if shaky and not random:
        _warn_unconfirmed(facts, shaky, stacklevel=3)
    needed = ("mean", "std") + (("size",) if facts.library != "biosae" else ())
    absent = [k for k in needed if values.get(k) is None]
    if absent:
        raise InputError(
            f"the preprocessing of {facts.name} is not known: give {', '.join(f'{k}=...' for k in absent)} (the "
            "defaults of an architecture belong to other weights, so they are not used)"
        )
    return replace(
        facts,
        size=values.get("size"),
        mean=tuple(float(v) for v in values["mean"]),
        std=tuple(float(v) for v in values["std"]),
        interpolation=values.get("interpolation", "bicubic"),
        crop_pct=float(values.get("crop_pct", 1.0)),
        pool=given.get("pool", facts.pool),
    ), values.get("resize", "crop" if facts.library == "torchxrayvision" else "shorter")


def _architecture_preprocessing(arch: str) -> dict[str, Any]:
    import timm

    cfg = timm.get_pretrained_cfg(arch)
    return {"size": cfg.input_size[-1], "mean": cfg.mean, "std": cfg.std, "interpolation": cfg.interpolation}


def _warn_of_version(facts: EncoderInfo) -> None:
    import timm

    if timm.__version__ != facts.timm_pinned:
        warnings.warn(
            f"{facts.name} was published with timm {facts.timm_pinned}; whether timm {timm.__version__} gives equal "
            "numbers is not confirmed",
            stacklevel=3,
        )
