"""Weights: verified or refused; a silently random or wrongly normalised encoder must be impossible."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import biosae as bs
from biosae.encoders import build
from biosae.encoders.catalog import LIBRARIES, catalogue
from biosae.encoders.sources import StateFile, check_loaded
from biosae.errors import InputError, OfflineError, WeightsError
from biosae.files import hash_file

PLAIN = {"size": 96, "mean": "half", "std": "half"}


def network(seed: int = 3, arch: str = "test_vit", **kwargs: object) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = timm.create_model(arch, **{"img_size": 96, **kwargs}).eval()
        for value in made.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape) * 0.02)
    return made


def write_folder(folder: Path, made: torch.nn.Module, **config: object) -> Path:
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in made.state_dict().items()}, folder / "model.safetensors")
    cfg = {"input_size": [3, 96, 96], "mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3], "interpolation": "bilinear",
           "crop_pct": 0.8, "crop_mode": "center", "fixed_input_size": True, "classifier": "head",
           "num_classes": made.num_classes, "first_conv": "patch_embed.proj"}  # fmt: skip
    whole = {"architecture": "test_vit", "num_classes": made.num_classes, "pretrained_cfg": cfg, **config}
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "my_vit", network())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def test_local_folder_gives_the_trained_numbers(folder: Path, x: torch.Tensor) -> None:
    encoder = bs.encoders.load(folder)
    with torch.no_grad():
        expected = network().forward_head(network().forward_features(x), pre_logits=True)
    torch.testing.assert_close(encoder.forward(x)["final"], expected)
    assert encoder.weights_sha256 == hash_file(folder / "model.safetensors")
    assert encoder.source == "folder:my_vit" and str(folder.parent) not in json.dumps(encoder.identity())
    assert encoder.preprocess.spec() == {
        "mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3], "size": 96, "interpolation": "bilinear", "crop_pct": 0.8,
        "resize": "shorter", "rescale_to_mpp": None,
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_bare_file_gives_the_same_numbers(folder: Path, x: torch.Tensor, suffix: str) -> None:
    file = folder.parent / f"w{suffix}"
    state = load_file(folder / "model.safetensors")
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, file)
    else:
        save_file(state, file)
    encoder = bs.encoders.load("timm:test_vit", weights=file, **PLAIN)
    torch.testing.assert_close(encoder.forward(x)["final"], bs.encoders.load(folder).forward(x)["final"])


def test_an_architectures_own_normalisation_is_never_used_for_trained_weights(folder: Path) -> None:
    with pytest.raises(InputError, match=r"mean=\.\.\., std=\.\.\., size=\.\.\."):
        bs.encoders.load("timm:test_vit", weights=folder / "model.safetensors")


def test_catalogue_normalisation_beats_the_base_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network loaded as UNI is: the base name's defaults are mean 0.5 and crop 0.9, UNI's are not."""
    small = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    uni = bs.encoders.info("uni")
    entry = replace(uni, name="uni-small", width=48, depth=2, args={**uni.args, **small})
    monkeypatch.setitem(catalogue(), "uni-small", entry)
    made = network(arch=uni.arch, num_classes=0, **{**uni.args, **small})
    file = tmp_path / "pytorch_model.bin"
    torch.save(made.state_dict(), file)
    with pytest.warns(UserWarning, match="interpolation of uni-small"):
        encoder = bs.encoders.load("uni-small", weights=file)
    assert timm.data.resolve_model_data_config(made)["mean"] == (0.5, 0.5, 0.5)  # the trap
    step = encoder.preprocess
    assert step.mean == (0.485, 0.456, 0.406) and (step.size, step.crop_pct) == (224, 1.0)
    image = np.random.default_rng(0).integers(0, 255, (224, 224, 3), np.uint8)
    expected = (torch.from_numpy(image).permute(2, 0, 1) / 255 - torch.tensor(step.mean)[:, None, None]) / torch.tensor(
        step.std
    )[:, None, None]
    torch.testing.assert_close(step(image), expected)
    with torch.no_grad():
        torch.testing.assert_close(encoder.forward(expected[None])["final"], made(expected[None]))
    assert encoder.identity()["derivatives_restricted"] is True and encoder.identity()["licence"] == "CC-BY-NC-ND-4.0"
    larger = torch.zeros(1, 3, 256, 256)  # dynamic_img_size
    assert encoder.forward(larger, -1, "tokens")["final"].shape[1] == np.prod(encoder.grid(-1, (256, 256))) == 256


def test_position_table_is_interpolated_and_the_rest_is_proven(folder: Path) -> None:
    encoder = bs.encoders.load(folder, size=128)
    assert encoder.forward(torch.zeros(1, 3, 128, 128), -1, "tokens")["final"].shape[1] == 64
    assert encoder.preprocess.size == 128


def edited(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("key", ["blocks.3.attn.qkv.weight", "norm.bias", "cls_token"])
def test_a_missing_tensor_is_refused(folder: Path, key: str) -> None:
    with pytest.raises(WeightsError, match=key.replace(".", r"\.")):
        bs.encoders.load(edited(folder, lambda s: s.pop(key)))


def test_a_surplus_tensor_is_refused_and_a_classifier_is_not(folder: Path) -> None:
    assert "head.weight" in load_file(folder / "model.safetensors")
    bs.encoders.load(folder)
    with pytest.raises(WeightsError, match=r"blocks\.6\.norm1"):
        bs.encoders.load(edited(folder, lambda s: s.update({"blocks.6.norm1.weight": torch.ones(64)})))


def test_another_architecture_is_refused(folder: Path) -> None:
    with pytest.raises(WeightsError, match="does not fit"):
        bs.encoders.load("timm:test_vit3", weights=folder / "model.safetensors", **PLAIN)


def test_a_loader_that_forgets_the_weights_is_caught(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: original(*a, **{**k, "pretrained": False}))
    with pytest.raises(WeightsError, match="differs from"):
        bs.encoders.load(folder)


def test_a_loader_that_forgets_one_tensor_is_caught(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = timm.create_model

    def forgetful(*a: object, **k: object) -> torch.nn.Module:
        made = original(*a, **k)
        torch.nn.init.normal_(made.blocks[2].mlp.fc1.weight)
        return made

    monkeypatch.setattr(timm, "create_model", forgetful)
    with pytest.raises(WeightsError, match=r"blocks\.2\.mlp\.fc1\.weight"):
        bs.encoders.load(folder)


def test_renamed_tensors_are_found_by_their_values(tmp_path: Path) -> None:
    made = network()
    file = tmp_path / "renamed.safetensors"
    save_file({f"backbone.{k}": v.contiguous() for k, v in made.state_dict().items()}, file)
    assert check_loaded(made, StateFile(file)) == len(made.state_dict())
    with pytest.raises(WeightsError, match="rest would be random"):
        check_loaded(network(seed=4), StateFile(file))


def test_declared_hash_is_enforced(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    file = folder / "model.safetensors"
    config["biosae"] = {"sha256_model_safetensors": hash_file(file)}
    (folder / "config.json").write_text(json.dumps(config))
    bs.encoders.load(folder)
    edited(folder, lambda s: s["norm.weight"].add_(1e-3))
    with pytest.raises(WeightsError) as error:
        bs.encoders.load(folder)
    for part in (str(file), config["biosae"]["sha256_model_safetensors"], hash_file(file)):
        assert part in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_file(folder: Path, suffix: str) -> None:
    file = folder.parent / f"w{suffix}"
    if suffix == ".pth":
        torch.save(load_file(folder / "model.safetensors"), file)
    else:
        file.write_bytes((folder / "model.safetensors").read_bytes())
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(WeightsError, match="truncated"):
        bs.encoders.load("timm:test_vit", weights=file, **PLAIN)


def test_a_pickle_that_would_run_code_is_not_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "exploded"), "w"))

    for name, dump in (
        ("a.pth", lambda o, p: torch.save(o, p)),
        ("b.pth", lambda o, p: p.write_bytes(pickle.dumps(o))),
    ):
        dump({"norm.weight": Bomb()}, tmp_path / name)
        with pytest.raises(WeightsError, match="can run code"):
            bs.encoders.load("timm:test_vit", weights=tmp_path / name, **PLAIN)
    assert not (tmp_path / "exploded").exists()


def test_folders_of_the_settings_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(bs.settings, "weights_dirs", (tmp_path / "absent", folder.parent))
    monkeypatch.setitem(catalogue(), "my-vit", replace(bs.encoders.info("gpfm"), name="my-vit", source="local:my_vit",
                        arch="test_vit", args={}, width=64, depth=6, patch=16, size=96, unconfirmed=()))  # fmt: skip
    encoder = bs.encoders.load("my-vit")
    assert encoder.weights_sha256 == hash_file(folder / "model.safetensors")
    assert encoder.preprocess.mean == (0.485, 0.456, 0.406)  # confirmed by the catalogue, so before the folder's own


def test_offline_says_what_to_get_and_where_to_put_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OfflineError) as error:
        bs.encoders.load("uni")
    for part in ("MahmoodLab/uni", "hf download", "weights_dirs", "settings.offline", "accept the licence", "HF_TOKEN"):
        assert part in str(error.value)
    with pytest.raises(OfflineError, match="timm/resnet50") as error:
        bs.encoders.load("resnet50")
    assert "licence" not in str(error.value)
    with pytest.raises(WeightsError, match=r"nic_histology_bigan.*BIOSAE_WEIGHTS_DIRS"):
        bs.encoders.load("nic-histology-bigan")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda p: bs.encoders.load("MahmoodLab/uni"), InputError, "hf-hub:MahmoodLab/uni"),
        (lambda p: bs.encoders.load("timm:test_vitt"), InputError, "test_vit"),
        (lambda p: bs.encoders.load("hf-hub:org/x", weights="random"), InputError, "no random control"),
        (lambda p: bs.encoders.load("open_clip:ViT-B-33", weights="random", **PLAIN), InputError, "ViT-B-32"),
        (lambda p: bs.encoders.load("uni", weights=p / "nothing"), WeightsError, "does not exist"),
        (lambda p: bs.encoders.load("uni", weights="random", sizes=3), InputError, "'size'"),
        (lambda p: bs.encoders.load("uni", weights="random", patch_stride=32), InputError, "patch_stride"),
        (lambda p: bs.encoders.load("timm:test_vit", weights="random", mean="imagnet"), InputError, "imagenet"),
        (lambda p: bs.encoders.load("timm:test_vit", weights="random", args={"foo": 1}), InputError, "foo"),
        (lambda p: bs.encoders.load(p), InputError, "neither config.json"),
        (lambda p: bs.encoders.load(p / "w.safetensors"), InputError, "name the encoder too"),
        (lambda p: bs.encoders.load("h0-mini", weights=p / "w.safetensors", **PLAIN), InputError, "architecture"),
    ],
)  # fmt: skip
def test_messages(tmp_path: Path, call: Callable, error: type[Exception], text: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(error, match=text):
        call(tmp_path)


def test_folders_of_other_kinds_are_named(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    with pytest.raises(WeightsError, match="transformers model"):
        bs.encoders.load(tmp_path / "hf")
    with pytest.raises(InputError, match="another kind"):
        bs.encoders.load("nic-histology-bigan", weights=folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no weight file"):
        bs.encoders.load(folder)


def test_a_version_that_the_authors_pinned_is_warned_of(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    entry = replace(bs.encoders.info("gpfm"), name="my-vit", arch="test_vit", args={}, width=64, depth=6, patch=16,
                    size=96, unconfirmed=(), timm_pinned="0.9.16")  # fmt: skip
    monkeypatch.setitem(catalogue(), "my-vit", entry)
    with pytest.warns(UserWarning, match=r"0\.9\.16"):
        bs.encoders.load("my-vit", weights=folder)


SMALL_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    from open_clip.model import CLIP

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = CLIP(**SMALL_CLIP)
    made_folder = tmp_path / "small_clip"
    made_folder.mkdir()
    save_file({k: v.contiguous() for k, v in made.state_dict().items()}, made_folder / "open_clip_model.safetensors")
    own = {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.2, 0.2], "resize_mode": "squash", "interpolation": "bilinear"}
    (made_folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL_CLIP, "preprocess_cfg": own}))
    return made_folder


def test_open_clip_folder_brings_its_own_preprocessing(clip_folder: Path) -> None:
    encoder = bs.encoders.load(clip_folder)
    assert encoder.preprocess.mean == (0.3, 0.4, 0.5) and encoder.preprocess.resize == "squash"
    assert encoder.preprocess.size == 64 and encoder.dim() == 32 and encoder.dim(-1, "cls") == 64
    file = clip_folder / "open_clip_model.safetensors"
    state = load_file(file)
    torch.testing.assert_close(encoder.model.proj.data, state["visual.proj"])
    assert encoder.weights_sha256 == hash_file(file)
    del state["visual.transformer.resblocks.1.ln_1.weight"]
    save_file(state, file)
    with pytest.raises(WeightsError, match="does not fit"):
        bs.encoders.load(clip_folder)


def test_open_clip_file_needs_preprocessing_and_activation_said_aloud(clip_folder: Path) -> None:
    file = clip_folder / "open_clip_model.safetensors"
    with pytest.raises(InputError, match=r"mean=\.\.\."):
        bs.encoders.load("open_clip:ViT-B-32", weights=file)
    given = {"weights": file, "size": 64, "mean": "openai", "std": "openai"}
    with pytest.raises(InputError, match="force_quick_gelu"):
        bs.encoders.load("open_clip:ViT-B-32", **given)
    outputs = []
    for quick in (False, True):
        encoder = bs.encoders.load("open_clip:ViT-B-32", **given, args={**SMALL_CLIP, "force_quick_gelu": quick})
        outputs.append(encoder.forward(torch.ones(1, 3, 64, 64))["final"])
    assert not torch.allclose(*outputs)
    torch.testing.assert_close(outputs[0], bs.encoders.load(clip_folder).forward(torch.ones(1, 3, 64, 64))["final"])


def test_every_library_has_a_builder() -> None:
    assert set(build.BUILDERS) == {e.library for e in catalogue().values()} & set(LIBRARIES)
