"""The chest X-ray networks of TorchXRayVision, built from torchvision's DenseNet-121 and ResNet-50.

Their tensors bear the names of torchvision's, with one input channel, so TorchXRayVision itself is not imported.
Inputs are grey values from -1024 to 1024, the centre square at the network's own size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from biosae.encoders.base import Encoder, Layer
from biosae.encoders.build import Built, no_fit
from biosae.encoders.hooks import Tap, run_with_taps
from biosae.encoders.sources import StateFile
from biosae.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from biosae.encoders.catalog import EncoderInfo
    from biosae.encoders.sources import Weights

_LEFT_OUT = ("classifier.", "fc.", "op_threshs")
_STRIDE = 32


def build_xray(
    facts: EncoderInfo, found: Weights | None, extra: Mapping[str, Any], *, resized: bool, random: bool
) -> Built:
    """A network of TorchXRayVision without classifier, its tensors loaded strictly."""
    if extra:
        raise InputError(f"{facts.name} takes no args=; got {', '.join(sorted(extra))}")
    network = _network(facts.arch)
    if found is not None and not random:
        state = StateFile(found.file)
        wanted = {k.removeprefix("model."): k for k in state}
        try:
            network.load_state_dict({k: state[v] for k, v in wanted.items() if not k.startswith(_LEFT_OUT)})
        except RuntimeError as error:
            raise no_fit(facts, found, error) from error
    facts = replace(facts, width=1024 if hasattr(network, "features") else 2048)
    return Built(network, network, XrayEncoder, facts, {"arch": facts.arch, "args": {}})


def _network(arch: str | None) -> nn.Module:
    from torch import nn
    from torchvision.models import densenet121, resnet50

    first = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    if str(arch).startswith("densenet121"):
        network = densenet121(weights=None)
        network.features.conv0, network.classifier = first, nn.Identity()
    else:
        network = resnet50(weights=None)
        network.conv1, network.fc = first, nn.Identity()
    return network


class XrayEncoder(Encoder):
    """DenseNet-121 (``denseblock1 ... denseblock4``) or ResNet-50 (``layer1 ... layer4``) of one grey channel.

    ``final`` is the last map after its rectifier, and the embedding its mean: TorchXRayVision's ``features2`` of the
    DenseNet (1024) and ``features`` of the ResNet (2048). The blocks of the DenseNet are before any rectifier.
    """

    in_channels = 1

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.dense = hasattr(model, "features")
        if self.dense:
            widths = [getattr(model.features, f"transition{i}").norm.num_features for i in (1, 2, 3)]
            widths.append(model.features.norm5.num_features)
            names = {f"denseblock{i}": f"features.denseblock{i}" for i in (1, 2, 3, 4)}
        else:
            widths = [getattr(model, f"layer{i}")[-1].bn3.num_features for i in (1, 2, 3, 4)]
            names = {f"layer{i}": f"layer{i}" for i in (1, 2, 3, 4)}
        sites = {
            name: Layer(width, 4 * 2**i, path, "stage", form="NCHW")
            for i, ((name, path), width) in enumerate(zip(names.items(), widths))
        }
        sites["final"] = Layer(widths[-1], _STRIDE, form="NCHW")
        super().__init__(model, *args, sites, head_width=widths[-1], **kwargs)

    def _check_size(self, input_hw: tuple[int, int]) -> None:
        if input_hw[0] % _STRIDE or input_hw[1] % _STRIDE:
            raise InputError(f"{self.info.name} needs sides divisible by {_STRIDE} px, got {input_hw}")

    def _run(self, x: torch.Tensor, pools: dict[str, str]) -> dict[str, torch.Tensor]:
        sites = self._sites
        taps = {
            name: Tap(sites[name].path, partial(self._reduce, site=sites[name], pool=pool))
            for name, pool in pools.items()
            if name != "final"
        }
        found, last = run_with_taps(self.model, taps, lambda: self._map(x), stop="final" not in pools)
        if "final" in pools:
            pool = "mean" if pools["final"] == "head" else pools["final"]
            found["final"] = self._reduce(last, site=sites["final"], pool=pool)
        return found

    def _map(self, x: torch.Tensor) -> torch.Tensor:
        """The last map, rectified; not in place, so that what was tapped stays as it was."""
        from torch.nn import functional

        net = self.model
        if self.dense:
            return functional.relu(net.features(x))
        y = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        return net.layer4(net.layer3(net.layer2(net.layer1(y))))
