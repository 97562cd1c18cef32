"""The real pretrained weights beside the project, against the numbers that were stored with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import biosae as bs
from biosae.encoders.base import Encoder
from biosae.encoders.tiny import TINY_FOLDER, load_tiny
from biosae.errors import InputError, WeightsError
from biosae.files import hash_file

NIC = ("nic_histology_multitask4", "nic_histology_bigan")
MOBILE = ("mobilenetv2_imagenet", "mobilenetv2_inat_bird")


@pytest.fixture(scope="module")
def weights(shared: Path) -> Path:
    return shared / "weights"


def wave(side: int, row: float, column: float) -> torch.Tensor:
    c, i, j = np.ogrid[:3, :side, :side]
    return torch.tensor(np.sin((c + 1) * i / row) * np.cos(j / column), dtype=torch.float32)[None]


def check(found: torch.Tensor, stored: dict, tolerance: float) -> None:
    flat = found.flatten()
    assert flat.numel() == stored["n"]
    np.testing.assert_allclose(flat[:8], stored["first8"], atol=tolerance)
    np.testing.assert_allclose(flat.mean(), stored["mean"], atol=tolerance)
    np.testing.assert_allclose(flat.std(), stored["std"], atol=tolerance)


def as_map(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.transpose(1, 2)


@pytest.mark.parametrize("name", NIC)
def test_histology_encoder(weights: Path, name: str) -> None:
    stored = json.loads((weights / name / "reference.json").read_text())
    tolerance = float(stored["tolerance"].split()[0])
    encoder = bs.encoders.load(weights / name)
    found = encoder.forward(wave(64, 11, 7), encoder.layers, "tokens")
    assert encoder.layers == ["bn1", "bn2", "bn3", "bn4", "final"]
    for layer in encoder.layers[:-1]:
        check(as_map(found[layer]), stored[layer], tolerance)
    check(found["final"], stored["embedding"], tolerance)
    torch.testing.assert_close(encoder.forward(wave(64, 11, 7), "embedding")["final"], found["final"][:, 0])


@pytest.mark.parametrize("name", MOBILE)
def test_mobilenet(weights: Path, name: str) -> None:
    from safetensors.torch import load_file

    stored = json.loads((weights / name / "reference.json").read_text())
    tolerance = float(stored["tolerance"].split()[0])
    encoder = bs.encoders.load(weights / name)
    x = wave(224, 37, 29)
    pooled = encoder.forward(x)["final"]
    check(as_map(encoder.forward(x, -1, "tokens")["final"]), stored["forward_features"], tolerance)
    check(pooled, stored["pooled_1280"], tolerance)
    state = load_file(weights / name / "model.safetensors")
    logits = pooled @ state["classifier.weight"].T + state["classifier.bias"]
    check(logits, stored["logits"], tolerance)
    assert logits[0].topk(5).indices.tolist() == stored["logits_top5"]


@pytest.mark.parametrize("name", [*NIC, *MOBILE])
def test_the_catalogue_agrees_with_the_folders(weights: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bs.settings, "weights_dirs", (weights,))
    by_name, by_path = bs.encoders.load(name), bs.encoders.load(weights / name)
    assert by_name.identity() == by_path.identity()
    config = json.loads((weights / name / "config.json").read_text())
    facts, own = by_name.info, config.get("pretrained_cfg", config)
    assert facts.mean == tuple(own["mean"]) and facts.std == tuple(own["std"])
    declared = config.get("biosae", config)
    assert by_name.weights_sha256 == facts.sha256 == declared["sha256_model_safetensors"]
    assert facts.licence.split("-")[0].lower() in declared["licence"].lower()


@pytest.mark.parametrize("name", MOBILE)
def test_bare_mobilenet_file_gives_the_folders_numbers(weights: Path, name: str) -> None:
    """The catalogue's arguments hold pad_type='same', without which the keys match and the features drift."""
    x = wave(224, 37, 29)
    bare = bs.encoders.load(name, weights=weights / name / "model.safetensors")
    whole = bs.encoders.load(weights / name)
    assert torch.equal(bare.forward(x)["final"], whole.forward(x)["final"])
    assert bs.encoders.fingerprint(bare.identity()) == bs.encoders.fingerprint(whole.identity())
    drifted = bs.encoders.load(name, weights=weights / name / "model.safetensors", args={"pad_type": ""})
    assert not torch.allclose(drifted.forward(x)["final"], whole.forward(x)["final"], atol=1e-2)
    assert bs.encoders.fingerprint(drifted.identity()) != bs.encoders.fingerprint(whole.identity())


def test_a_folder_of_another_name_is_the_same_network(weights: Path, tmp_path: Path) -> None:
    for name in (NIC[1], MOBILE[1]):
        shutil.copytree(weights / name, tmp_path / f"my_{name}", copy_function=shutil.copyfile)
        mine, known = bs.encoders.load(tmp_path / f"my_{name}"), bs.encoders.load(weights / name)
        x = torch.ones(1, 3, 96, 96)
        torch.testing.assert_close(mine.forward(x)["final"], known.forward(x)["final"])
        assert mine.preprocess.min_size == known.preprocess.min_size
        assert mine.info.licence == "unknown" and mine.info.width == known.info.width


def test_changed_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    copy = tmp_path / NIC[0]
    shutil.copytree(weights / NIC[0], copy, copy_function=shutil.copyfile)
    copy.chmod(0o755)
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(WeightsError, match="SHA-256 expected 2e16973e"):
        bs.encoders.load(copy)


@pytest.fixture(scope="module")
def nic(weights: Path) -> Encoder:
    return bs.encoders.load(weights / NIC[0])


@pytest.mark.parametrize("stride", [64, 32, 16])
@pytest.mark.parametrize("shape", [(256, 256), (198, 170), (64, 80)])
def test_patches_of_a_tile_equal_the_patches_cut_out(weights: Path, nic: Encoder, stride: int, shape: tuple) -> None:
    encoder = bs.encoders.load(weights / NIC[0], patch_stride=stride)
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    tokens = encoder.forward(x, -1, "tokens")["final"]
    rows, columns = encoder.grid(-1, shape)
    cut = [
        x[:, :, i * stride : i * stride + 64, j * stride : j * stride + 64] for i in range(rows) for j in range(columns)
    ]
    assert (rows - 1) * stride + 64 <= shape[0] < rows * stride + 64
    expected = torch.stack([nic.forward(patch)["final"] for patch in cut], dim=1)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encoder.forward(x)["final"], expected.mean(1), atol=1e-4, rtol=1e-4)
    for layer in encoder.layers:
        assert encoder.forward(x, layer, "tokens")[layer].shape[1] == np.prod(encoder.grid(layer, shape))


def test_physical_scale_of_the_histology_encoder(nic: Encoder) -> None:
    tile = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    assert nic.preprocess(tile).shape == (3, 256, 256) and nic.identity()["mpp"] is None
    at = nic.at_mpp(0.775)
    assert at.preprocess(tile).shape == (3, 198, 198)
    assert at.identity()["mpp"] == 1.0 and at.identity()["tile_mpp"] == 0.775
    fingerprint = bs.encoders.fingerprint
    assert fingerprint(at.identity()) == fingerprint(nic.at_mpp(0.5).identity()) != fingerprint(nic.identity())
    assert at.model is nic.model and nic.preprocess.tile_mpp is None
    with pytest.raises(InputError, match="needs 64"):
        nic.at_mpp(0.2)(nic.at_mpp(0.2).preprocess(tile)[None])
    assert nic.at_mpp(0.5, match_mpp=False).preprocess(tile).shape == (3, 256, 256)


def test_patch_stride_must_suit_the_convolutions(weights: Path) -> None:
    with pytest.raises(InputError, match="multiple of 16"):
        bs.encoders.load(weights / NIC[0], patch_stride=40)
    a, b = (bs.encoders.load(weights / NIC[0], patch_stride=s).identity() for s in (64, 32))
    assert bs.encoders.fingerprint(a) != bs.encoders.fingerprint(b)


def test_trained_beats_random_on_tissue(weights: Path, shared: Path) -> None:
    """Epithelial nuclei of a tile from its five nearest tiles of other images: trained beats random by far."""
    import pandas as pd
    from PIL import Image
    from scipy.stats import spearmanr

    folder = shared / "data" / "crc_histopheno"
    table = pd.read_csv(folder / "manifest.csv").iloc[::3]
    tiles = [np.asarray(Image.open(folder / p).convert("RGB")) for p in table["path"]]
    count, image = table["count_epithelial"].to_numpy(), table["image_id"].to_numpy()
    rho = {}
    for control in (None, "random"):
        encoder = bs.encoders.load(weights / NIC[0], weights=control, mpp=0.55)
        X = np.concatenate([encoder.forward(encoder.preprocess(t)[None])["final"].numpy() for t in tiles])
        X = (X - X.mean(0)) / X.std(0)
        distance = np.square(X[:, None] - X[None]).sum(-1)
        distance[image[:, None] == image[None]] = np.inf
        rho[control] = spearmanr(count, count[distance.argsort(1)[:, :5]].mean(1)).statistic
    assert rho[None] > 0.65 and rho[None] > rho["random"] + 0.15


def test_bundled_tiny_encoder() -> None:
    encoder = bs.encoders.load("tiny-histology")
    config = json.loads((TINY_FOLDER / "config.json").read_text())
    assert encoder.weights_sha256 == config["sha256"] == hash_file(TINY_FOLDER / "model.safetensors")
    spec = encoder.preprocess.spec()
    assert {k: spec[k] for k in ("mean", "std", "size", "interpolation")} == {
        k: v for k, v in config["preprocess"].items() if k != "mpp"
    }
    assert encoder.info.mpp == config["preprocess"]["mpp"]
    x = torch.randn(2, 3, 90, 96, generator=torch.Generator().manual_seed(0))
    expected = load_tiny().forward_features(x)
    tokens = encoder.forward(x, encoder.layers, "tokens")
    for name in encoder.layers:
        rows, columns = encoder.grid(name, (90, 96))
        assert tokens[name].shape == (2, rows * columns, encoder.dim(name, "tokens"))
        if name != "final":
            torch.testing.assert_close(as_map(tokens[name]).reshape(expected[name].shape), expected[name])
    torch.testing.assert_close(encoder.forward(x)["final"], expected["embedding"])
    torch.testing.assert_close(tokens["final"].mean(1), expected["embedding"], atol=1e-5, rtol=1e-4)


def test_random_control_of_a_folder_keeps_its_preprocessing(weights: Path) -> None:
    for name in ("tiny-histology", weights / MOBILE[0]):
        control, trained = bs.encoders.load(name, weights="random"), bs.encoders.load(name)
        assert control.preprocess == trained.preprocess and control.layers == trained.layers
        x = torch.ones(1, 3, 96, 96)
        assert not torch.allclose(control.forward(x)["final"], trained.forward(x)["final"])
        assert bs.encoders.fingerprint(control.identity()) != bs.encoders.fingerprint(trained.identity())
