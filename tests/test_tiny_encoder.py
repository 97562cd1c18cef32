"""The bundled tiny histology encoder: verified weights, named layers, and more than its own random start."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from biosae.encoders.pretrain.tiny_histology import (
    TYPES,
    Recipe,
    calibrated,
    count_r2,
    normalise,
    train,
    training_tile,
)
from biosae.encoders.tiny import TINY_CONFIG, TINY_FOLDER, TinyHistologyNet, load_tiny
from biosae.errors import FormatError, WeightsError


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads(TINY_CONFIG.read_text(encoding="utf-8"))


def test_layers_have_the_shapes_of_their_strides():
    model = TinyHistologyNet()
    features = model.forward_features(torch.rand(2, 3, 96, 64))
    assert list(features) == list(model.layers)
    assert [tuple(f.shape) for f in features.values()] == [
        (2, 24, 48, 32),
        (2, 64, 24, 16),
        (2, 128, 12, 8),
        (2, model.width),
    ]
    assert [f.shape[1] for f in features.values()] == list(model.widths.values())


def test_embedding_is_the_mean_of_local_embeddings():
    model = load_tiny()
    features = model.forward_features(torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(0)))
    local = model.head(features["stage3"].permute(0, 2, 3, 1))
    torch.testing.assert_close(local.mean(dim=(1, 2)), features["embedding"], rtol=1e-4, atol=1e-5)


def test_bundled_weights_are_small_frozen_and_those_of_the_config(config):
    model = load_tiny()
    assert (TINY_FOLDER / "model.safetensors").stat().st_size <= 4e6
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == config["architecture"]["n_parameters"] < 900_000
    assert config["licence"] == "Apache-2.0"


def test_weights_that_differ_from_the_hash_are_refused(tmp_path):
    folder = shutil.copytree(TINY_FOLDER, tmp_path / "tiny")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match="SHA-256"):
        load_tiny(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="absent"):
        load_tiny(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FormatError):
        load_tiny(folder)


def test_training_tile_knows_its_nuclei():
    for i in range(4):
        image, cells, settings = training_tile(0, i, count_spread=0.8)
        again = training_tile(0, i, count_spread=0.8)
        assert image.shape == (96, 96, 3) and cells.shape == (len(TYPES), 12, 12)
        assert np.isfinite(settings).all()
        np.testing.assert_array_equal(image, again[0])
        assert cells.sum() == np.round(cells).sum() > 0


def test_beats_its_own_random_initialisation_on_held_out_counts(config):
    """Ridge on the frozen embedding, patients held out, another seed and other scanners than in training."""
    recipe = Recipe(**config["recipe"])
    torch.manual_seed(recipe.seed)
    start = TinyHistologyNet()  # the very weights that training began with
    tiles = np.stack([training_tile(recipe.seed, i, count_spread=recipe.count_spread)[0] for i in range(64)])
    preprocess = config["preprocess"]
    untrained = calibrated(TinyHistologyNet(), start, normalise(tiles, preprocess["mean"], preprocess["std"]))
    models = {"trained": load_tiny(), "untrained": untrained}
    r2 = count_r2(models, preprocess, n_patients=20, n_tiles=12, random_state=777)
    assert r2["trained"]["mean"] > 0.9
    assert r2["trained"]["mean"] - r2["untrained"]["mean"] > 0.5
    for cell_type in TYPES:
        assert r2["trained"][cell_type] > r2["untrained"][cell_type] + 0.2


def test_training_repeats_itself():
    recipe = Recipe(n_tiles=32, n_epochs=1, batch_size=16)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    try:
        one, two = (train(recipe) for _ in range(2))
        other = train(Recipe(n_tiles=32, n_epochs=1, batch_size=16, seed=1))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
    assert one[2] == two[2]
    for name, value in one[0].state_dict().items():
        assert torch.equal(value, two[0].state_dict()[name]), name
    assert not torch.equal(one[0].head.weight, other[0].head.weight)
    assert not torch.equal(one[0].head.weight, one[1].head.weight)  # training moved them
