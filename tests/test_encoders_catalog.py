"""The catalogue: every entry parses, says where it comes from, and is the network that it says it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import biosae as bs
from biosae.data.items import ITEMS
from biosae.encoders.build import build_timm
from biosae.encoders.catalog import EncoderInfo, catalogue
from biosae.encoders.signals import AMPLITUDES
from biosae.encoders.vision import TimmEncoder
from biosae.errors import InputError, WeightsError
from biosae.read.channels import canonical_unit

TIMM = [n for n, e in catalogue().items() if e.library == "timm" and e.arch]


@pytest.mark.parametrize("name", list(catalogue()))
def test_entries_are_complete(name: str) -> None:
    entry = catalogue()[name]
    fields = set(EncoderInfo.__dataclass_fields__)
    assert entry.facts and entry.licence and entry.domain != "unknown"
    assert entry.derivatives_restricted is not None
    assert set(entry.unconfirmed) <= fields
    assert entry.source.split(":")[0] in ("hf-hub", "bundled", "local", "none")
    assert entry.item in ITEMS and (entry.item == "signal" or entry.rate is entry.amplitude is entry.unit is None)
    assert entry.amplitude is None or entry.amplitude in AMPLITUDES
    assert entry.unit is None or canonical_unit(entry.unit) == entry.unit
    assert entry.channels is None or len(set(entry.channels)) == len(entry.channels)
    assert entry.pool in ("cls", "mean", "cls+mean", "head")
    if entry.arch and entry.library in ("timm", "open_clip"):
        assert None not in (entry.size, entry.mean, entry.std, entry.interpolation, entry.crop_pct)


def test_licences_that_reach_derivatives_are_flagged() -> None:
    for name in ("uni", "uni2-h", "conch", "virchow2"):
        assert bs.encoders.info(name).derivatives_restricted and bs.encoders.info(name).gated
    assert not bs.encoders.info("virchow").derivatives_restricted


def test_list_and_info() -> None:
    table = bs.encoders.list()
    assert table.index.is_unique and len(table) == len(catalogue())
    assert table.loc["uni", "loadable"] and not table.loc["phikon", "loadable"] and not table.loc["hibou-b", "loadable"]
    assert set(bs.encoders.list(domain="ecology").index) == {"bioclip", "bioclip-2", "mobilenetv2-inat-bird"}
    signals = bs.encoders.list("eeg", item="signal", loadable=True, gated=False)
    assert {"robustsleepnet-eeg", "labram", "eeg-bandpower"} <= set(signals.index)
    assert set(signals["domain"]) == {"EEG"} and not signals["gated"].any() and "reve-base" not in signals.index
    assert set(bs.encoders.list(licence="by-nc-nd", loadable=True).index) == {"uni", "uni2-h", "virchow2"}
    assert len(bs.encoders.list("ecology", item="features")) == 0
    for domain in ("pathology", "radiology", "EEG", "ECG", "wearable", "ecology", "general"):
        assert bs.encoders.list(domain, loadable=True).index.size, domain
    assert bs.encoders.info("MobileNetV2_ImageNet").args == {"pad_type": "same"}
    with pytest.raises(InputError, match="'uni2-h'"):
        bs.encoders.info("uni2h")
    with pytest.raises(InputError, match="pathology"):
        bs.encoders.list(domain="patology")
    with pytest.raises(InputError, match="MIT"):
        bs.encoders.list(licence="GNU")


@pytest.mark.parametrize("name", TIMM)
def test_architecture_has_the_published_shape(name: str) -> None:
    entry = catalogue()[name]
    blank = EncoderInfo(name=name, arch=entry.arch, args=entry.args)
    with torch.device("meta"):
        built = build_timm(blank, None, {}, resized=False, random=True)
    seen = built.facts
    assert (seen.width, seen.patch, seen.prefix) == (entry.width, entry.patch, entry.prefix)
    assert entry.depth in (seen.depth, None)
    has_cls = getattr(built.tower, "cls_token", None) is not None
    assert has_cls or "cls" not in entry.pool
    assert built.adapter is TimmEncoder


def test_another_network_than_the_entry_says_is_refused() -> None:
    entry = EncoderInfo(name="x", arch="test_vit", width=64, depth=6, prefix=5, facts="run")
    with pytest.raises(WeightsError, match="prefix 1, but 5"):
        build_timm(entry, None, {}, resized=False, random=True)


@pytest.mark.parametrize("name", [n for n, e in catalogue().items() if not (e.loadable or e.needs_remote_code)])
def test_entries_of_other_packages_say_what_to_do(name: str) -> None:
    with pytest.raises(WeightsError, match=r"from_array|open_clip:"):
        bs.encoders.load(name)


def test_remote_code_is_refused() -> None:
    with pytest.raises(WeightsError, match="code that would be downloaded and run"):
        bs.encoders.load("hibou-l", weights="random")


@pytest.mark.parametrize("module", ["biosae.encoders", "biosae.encoders.catalog"])
def test_the_catalogue_needs_no_torch(module: str) -> None:
    import subprocess
    import sys

    code = f"import sys, {module} as m; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_page_lists_every_entry_with_its_licence() -> None:
    page = (Path(__file__).parents[1] / "docs" / "encoders.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `") and line.count("|") == 14}
    assert set(rows) == set(catalogue())
    for name, row in rows.items():
        entry = catalogue()[name]
        assert f"| {entry.licence}" in row and ("derivatives" in row) == entry.derivatives_restricted
        assert ("gated" in row) == entry.gated
