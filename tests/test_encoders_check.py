"""``bs.encoders.check``: what is missing before an encoder can be loaded, without a network."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

import biosae as bs
from biosae.encoders.catalog import catalogue
from biosae.encoders.tiny import TINY_FOLDER
from biosae.errors import BiosaeError, InputError
from biosae.files import hash_file


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, an empty hub cache and no token."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)


@pytest.mark.parametrize("name", list(catalogue()))
def test_every_entry_has_an_answer_that_agrees_with_load(name: str) -> None:
    """``ready`` is what ``load`` then does; large networks that are not here are not built."""
    found = bs.encoders.check(name)
    assert json.loads(json.dumps(found.to_dict()))["ready"] == found.ready
    text = repr(found)
    assert text.startswith(f"{name}: ") and found.licence in text
    if not found.ready:
        assert all(m in text for m in found.missing)
        with pytest.raises((BiosaeError, RuntimeError)):
            bs.encoders.load(name)
    else:
        assert bs.encoders.load(name).info.name == name


def test_a_gated_encoder_names_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bs.encoders.check("UNI")
    assert found.gated and found.derivatives_restricted and not found.ready
    assert found.expects == {"size_px": 224, "um_per_px": 0.5}
    token, weights = found.missing
    assert "HF_TOKEN" in token and "MahmoodLab/uni" in token
    assert "settings.offline forbids it" in weights and "weights_dirs" in weights
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "x")
    assert len(bs.encoders.check("uni").missing) == 1


def test_what_signals_must_be() -> None:
    assert bs.encoders.check("wildecg-resnet1d").expects == {
        "rate_hz": 100.0, "unit": "not stated", "channels": 1, "seconds": 10.0, "amplitude": "zscore",
        "band_hz": [0.5, 40.0],
    }  # fmt: skip
    leads = bs.encoders.check("ecg-jepa-s").expects["channels"]
    assert leads == ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
    assert bs.encoders.check("labram").expects["unit"] == "uV"
    baseline = bs.encoders.check("eeg-bandpower")
    assert baseline.ready and baseline.found == "none needed"
    assert baseline.expects == {
        "rate_hz": "any", "unit": "uV", "channels": "any", "seconds": "any", "amplitude": "any", "band_hz": "any",
    }  # fmt: skip


@pytest.mark.parametrize("name", [n for n, facts in catalogue().items() if not facts.source.startswith("none:")])
def test_what_nobody_states_is_not_said_to_be_free(name: str) -> None:
    """A band or unit that a model's authors do not publish is unknown; nobody confirmed that any will do."""
    assert "any" not in bs.encoders.check(name).expects.values()


def test_folders_and_their_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bs.encoders.check("tiny-histology").found == "bundled"
    folder = tmp_path / "dirs" / "tiny_histology"
    shutil.copytree(TINY_FOLDER, folder)
    monkeypatch.setattr(bs.settings, "weights_dirs", (tmp_path / "dirs",))
    found = bs.encoders.check("tiny-histology")
    assert found.ready and found.hash == "agrees" and found.found == f"weights_dirs: {folder}"
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    found = bs.encoders.check("tiny-histology")
    assert found.hash == "differs" and not found.ready and str(file) in found.missing[0]
    file.unlink()
    assert "no weight file" in bs.encoders.check("tiny-histology").missing[0]


def test_real_folders_agree(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bs.settings, "weights_dirs", (shared / "weights",))
    for name in ("wildecg-resnet1d", "robustsleepnet-eeg", "nic-histology-bigan", "mobilenetv2-inat-bird"):
        found = bs.encoders.check(name)
        assert found.ready and found.hash == "agrees", found


def test_the_hubs_cache_is_looked_at(tmp_path: Path) -> None:
    """A cache as the hub's client keeps it: blobs named by their hash, snapshots that point at them."""
    repository = tmp_path / "cache" / "models--timm--resnet50.a1_in1k"
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)
    (repository / "blobs").mkdir()
    content = tmp_path / "content"
    content.write_bytes(b"weights")
    blob = repository / "blobs" / hash_file(content)
    blob.write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to(blob)
    found = bs.encoders.check("resnet50")
    assert found.ready and found.hash == "agrees" and found.found == f"hub cache: {'c' * 40}"
    blob.write_bytes(b"weightz")
    found = bs.encoders.check("resnet50")
    assert found.hash == "differs" and "damaged" in found.missing[0]


def test_entries_that_are_facts_and_absent_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "downloaded code" in bs.encoders.check("hibou-l").missing[0]
    assert "from_array" in bs.encoders.check("st-mem").missing[0]
    assert "table of positions" in bs.encoders.check("reve-base").missing[0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "biosae[eegmodels]" in bs.encoders.check("labram").missing[0]
    with pytest.raises(InputError, match="'labram'"):
        bs.encoders.check("labramm")
