"""EEG foundation models of braindecode, from their folder or hub repository, without code of the source.

Only ``config.json`` and tensors are read. Classes that a configuration names must be layers of ``torch.nn``.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from biosae.encoders.base import Layer, pool_tokens
from biosae.encoders.catalog import EncoderInfo
from biosae.encoders.hooks import run_with_taps
from biosae.encoders.signals import SignalEncoder
from biosae.encoders.sources import StateFile, Weights
from biosae.errors import InputError, WeightsError, nearest, require
from biosae.read.channels import canonical_channel

if TYPE_CHECKING:
    import torch
    from torch import nn

HEAD = "final_layer"
NAMED = ("EEGPT", "SignalJEPA")
"""Classes that are built for named electrodes."""
OF_ONE_LENGTH = ("EEGPT", "Labram")
"""Classes that are built for windows of one length."""
_UNUSED_OUTPUTS = 2  # classes ask for the size of a classifier; it is dropped


class Model(NamedTuple):
    """What one class offers: path of its blocks (None: only its output can be taken), the module whose output holds the
    tokens (None: ``features``), a class token, and rows and columns of its tokens for (network, channels, samples)."""

    blocks: str | None
    tokens: str | None
    has_cls: bool
    grid: Callable[[Any, int, int], tuple[int, int]]


def _patches(net: Any, channels: int, times: int) -> tuple[int, int]:
    return channels, times // net.patch_size


def _biot(net: Any, channels: int, times: int) -> tuple[int, int]:
    return channels, (times - net.encoder.n_fft) // net.encoder.hop_length + 1


def _convolved(net: Any, channels: int, times: int) -> tuple[int, int]:
    for _, kernel, stride in net.feature_encoder__conv_layers_spec:
        times = (times - kernel) // stride + 1
    return channels, times


def _strided(net: Any, channels: int, times: int) -> tuple[int, int]:
    return 1, (times - net.patch_size) // net.patch_stride + 1


MODELS: dict[str, Model] = {
    "Labram": Model("blocks", None, True, _patches),
    "CBraMod": Model("encoder.layers", None, False, _patches),
    "EEGDINO": Model("encoder_layers", None, True, _patches),
    "SignalJEPA": Model("transformer.encoder.layers", None, False, _convolved),
    "BIOT": Model(None, "encoder.transformer", False, _biot),
    "EEGPT": Model(None, None, False, _strided),
}
"""Classes of ``braindecode.models`` that are loaded."""


def braindecode_models() -> ModuleType:
    """``braindecode.models``.

    braindecode imports torchaudio, which refuses to load beside a torch of another CUDA version. None of the networks
    here uses its compiled functions, so that check alone is passed over.

    Raises
    ------
    MissingExtraError
        If braindecode is not installed.
    """
    import torch

    version = torch.version.cuda
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.version.cuda = None
        try:
            return require("braindecode.models", extra="eegmodels")
        finally:
            torch.version.cuda = version


def _argument(key: str, value: Any, name: str) -> Any:
    """A constructor argument of ``config.json``; the name of a layer of ``torch.nn`` becomes that class."""
    from torch import nn

    if not isinstance(value, str) or "." not in value:
        return value
    module, _, kind = value.rpartition(".")
    found = getattr(nn, kind, None)
    if not module.startswith("torch.nn") or not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise WeightsError(
            f"the configuration of {name} names {key}={value!r}, which is no layer of torch.nn; biosae does not import "
            "code that a configuration names. Give the argument yourself: load(..., args={...})"
        )
    return found


def _arguments(cls: type, facts: EncoderInfo, config: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    known = set(inspect.signature(cls.__init__).parameters) - {"self"}
    stated = {k: v for k, v in config.items() if k in known and v is not None}
    args = {**facts.args, **{k: _argument(k, v, facts.name) for k, v in stated.items()}, **extra}
    args.setdefault("n_outputs", _UNUSED_OUTPUTS)
    if facts.arch in NAMED and facts.channels and "chs_info" not in extra:
        args["chs_info"] = list(facts.channels)
    rate = args.get("sfreq") or facts.rate
    if facts.arch in OF_ONE_LENGTH and facts.seconds and "n_times" not in extra:
        args["n_times"] = round(facts.seconds * rate)
        args.pop("input_window_seconds", None)
    channels = args.get("chs_info")
    if channels and isinstance(channels[0], str):  # names alone: positions of the 10-05 system
        args["chs_info"] = channel_info(channels)
    if args.get("chs_info") and args.get("n_chans") not in (None, len(args["chs_info"])):
        del args["n_chans"]  # of the catalogue
    return args


def channel_info(names: Sequence[str]) -> list[dict[str, Any]]:
    """Names and positions (m, of the 10-05 system) of electrodes, as braindecode takes them.

    Raises
    ------
    InputError
        If an electrode is not of the 10-05 system.
    """
    mne = require("mne", extra="eeg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = mne.channels.make_standard_montage("standard_1005").get_positions()["ch_pos"]
    places = {canonical_channel(k): v for k, v in found.items()}
    absent = [n for n in names if canonical_channel(n) not in places]
    if absent:
        raise InputError(f"{absent[0]!r} is no electrode of the 10-05 system; choose channels that are")
    return [{"ch_name": n, "loc": [*places[canonical_channel(n)].tolist(), *[0.0] * 9]} for n in names]


def build_braindecode(
    facts: EncoderInfo, found: Weights | None, extra: Mapping[str, Any], *, resized: bool, random: bool
) -> Any:
    """A network of braindecode without its classifier."""
    from torch import nn

    from biosae.encoders.build import Built, no_fit

    if facts.arch not in MODELS:
        raise InputError(f"no braindecode class {facts.arch!r} is loaded; {nearest(str(facts.arch), MODELS)}")
    cls = getattr(braindecode_models(), facts.arch)
    config = dict(found.config or {}) if found is not None else {}
    args = _arguments(cls, facts, config, extra)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            network = cls(**args)
        except (TypeError, ValueError) as error:
            raise InputError(f"braindecode could not build {facts.arch} for {facts.name}: {error}") from error
    setattr(network, HEAD, nn.Identity())
    if not random:
        state = StateFile(found.file)
        tensors = {k: state[k] for k in state if not k.startswith(f"{HEAD}.")}
        if facts.arch == "Labram":  # its table of moments: a shorter window uses the first ones
            rows = network.temporal_embedding.shape[1]
            tensors |= {k: v[:, :rows] for k, v in tensors.items() if k == "temporal_embedding"}
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            raise no_fit(facts, found, error) from error
    names = tuple(c["ch_name"] for c in args.get("chs_info") or ())
    stated: dict[str, Any] = {}
    if args.get("sfreq"):
        stated["rate"] = float(args["sfreq"])
    if names and facts.arch != "Labram":  # LaBraM takes any of its names, in any order
        stated["channels"] = names
    if facts.arch in OF_ONE_LENGTH:
        stated["seconds"] = network.n_times / (args.get("sfreq") or facts.rate)
    multiple = getattr(network, "patch_size", 1) if MODELS[facts.arch].grid is _patches else 1
    if facts.arch == "BIOT":
        multiple = network.encoder.hop_length
    described = {"arch": facts.arch, "args": {k: _plain(v) for k, v in args.items() if k != "n_outputs"}}
    return Built(network, network, BraindecodeEncoder, facts, described, {"multiple": multiple, "config": stated})


def _plain(value: Any) -> Any:
    """A constructor argument as plain JSON."""
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


class BraindecodeEncoder(SignalEncoder):
    """A network of braindecode over windows ``(B, C, T)``.

    ``blocks.i`` is the output of a transformer block, ``final`` what the class calls its features. Tokens go channel by
    channel, time within a channel (EEGPT: one token a patch of time over all channels).
    """

    def __init__(self, model: nn.Module, info: EncoderInfo, preprocess: Any, **kwargs: Any) -> None:
        self._kind, self.info, self.preprocess = MODELS[info.arch], info, preprocess
        self._names: tuple[str, ...] | None = None
        self.model = model.eval()
        width, stride = self._width(info), getattr(model, "patch_size", 1)
        count = len(model.get_submodule(self._kind.blocks)) if self._kind.blocks else 0
        sites = {f"blocks.{i}": Layer(width, stride, f"{self._kind.blocks}.{i}") for i in range(count)}
        sites["final"] = Layer(width, stride)
        super().__init__(model, info, preprocess, sites, head_width=width, has_cls=self._kind.has_cls, **kwargs)

    def _width(self, info: EncoderInfo) -> int:
        """Width of a token, seen by a pass over zeros."""
        import torch

        names = self.model.n_chans if info.arch != "Labram" else 1
        times = self.model.n_times
        self._names = ("CZ",) if info.arch == "Labram" else None
        with torch.inference_mode():
            width = self._tokens(torch.zeros(1, names, times), {})[1].shape[-1]
        self._names = None
        return width

    def suited(self, samples: Any) -> BraindecodeEncoder:
        other = copy.copy(super().suited(samples))
        if self.info.arch == "Labram":
            other._names = self._known([samples.channels[i] for i in other.preprocess.take])
        return other

    def _known(self, names: Sequence[str]) -> tuple[str, ...]:
        """Names as LaBraM spells them."""
        order = {canonical_channel(c): c for c in _labram_order()}
        absent = [n for n in names if canonical_channel(n) not in order]
        if absent:
            self._refuse(f"knows no electrode {absent[0]!r}; leave it out with channels=[...]")
        return tuple(order[canonical_channel(n)] for n in names)

    def grid(self, layer: int | str, input_hw: tuple[int, int]) -> tuple[int, int]:
        """(channels or 1, steps of time)."""
        self.resolve_layer(layer)
        return self._kind.grid(self.model, *input_hw)

    def _check_batch(self, batch: torch.Tensor) -> None:
        super()._check_batch(batch)
        if self.info.arch == "Labram" and not self._labels():
            raise InputError("LaBraM needs the channels' names: take encoder.suited(samples), or load(channels=[...])")
        if min(self.grid(-1, tuple(batch.shape[1:]))) < 1:
            raise InputError(f"{self.info.name} needs longer windows than {batch.shape[2]} samples")

    def _labels(self) -> tuple[str, ...]:
        """Names that the network is told with every batch; only LaBraM asks for them."""
        if self._names is None and self.info.arch == "Labram" and self.preprocess.channels:
            return self._known(self.preprocess.channels)
        return self._names or ()

    def _tokens(self, x: torch.Tensor, taps: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], Any, Any]:
        """Tapped outputs, tokens ``(B, T, d)`` and class token of the features."""
        labels = self._labels()
        options = {"ch_names": list(labels)} if labels else {}
        taps = dict(taps)
        if self._kind.tokens:
            taps["final"] = (self._kind.tokens, lambda y: y.clone())
        found, out = run_with_taps(self.model, taps, lambda: self.model(x, return_features=True, **options), stop=False)
        tokens = found.pop("final", None)
        tokens = out["features"] if tokens is None else tokens
        return found, tokens.flatten(1, -2), out["cls_token"]

    def _run(self, x: torch.Tensor, pools: dict[str, str]) -> dict[str, torch.Tensor]:
        n = self._kind.grid(self.model, *x.shape[1:])
        n_tokens = n[0] * n[1]

        def reduce(y: torch.Tensor, pool: str) -> torch.Tensor:
            return self._pooled(y.flatten(1, -2), n_tokens, pool)

        taps = {name: (self._sites[name].path, partial(reduce, pool=p)) for name, p in pools.items() if name != "final"}
        found, tokens, cls = self._tokens(x, taps)
        if "final" in pools:
            import torch

            whole = tokens if cls is None else torch.cat([cls[:, None], tokens], 1)
            found["final"] = self._pooled(whole, n_tokens, pools["final"])
        return found

    def _pooled(self, y: torch.Tensor, n_tokens: int, pool: str) -> torch.Tensor:
        n_prefix = y.shape[1] - n_tokens
        if n_prefix < 0:
            raise InputError(f"{self.info.name} gave {y.shape[1]} tokens where {n_tokens} are expected")
        if "cls" in pool and n_prefix == 0:
            raise InputError(f"{self.info.name} has no class token at this layer; use pool='mean'")
        return pool_tokens(y, "mean" if pool == "head" else pool, n_prefix=n_prefix)


def _labram_order() -> list[str]:
    braindecode_models()
    from braindecode.models.labram import LABRAM_CHANNEL_ORDER

    return list(LABRAM_CHANNEL_ORDER)
