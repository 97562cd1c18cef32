"""Presets are settings of SAE: what they promise holds on planted rows."""

from __future__ import annotations

import numpy as np
import pytest

from biosae.errors import InputError
from biosae.sae import SAE, preset, stability
from biosae.sae.presets import PRESETS


@pytest.mark.parametrize("goal", PRESETS)
@pytest.mark.parametrize(("n", "d"), [(8, 1), (1000, 128), (12_000, 128), (966, 1280), (10**9, 1536)])
def test_numbers_are_those_that_the_rules_choose(goal, n, d):
    found = preset(n, d, goal=goal)
    assert {**PRESETS[goal], **found} == found
    assert 2 <= found["n_latents"] <= max(2, 12 * d) and found.get("k", 1) <= found["n_latents"]
    if n == 1000:
        x = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
        kept = {name: value for name, value in found.items() if name not in ("n_latents", "k")}
        sae = SAE(n_steps=2, validation=0.0, random_state=0, device="cpu", **kept).fit(x)
        assert sae.n_latents_ == found["n_latents"] and sae.k_ == found.get("k", sae.k_)


def test_each_goal_is_better_at_its_goal():
    """Rows of 12 planted directions, noise, and a dictionary that is too wide: what a seed makes of it matters."""
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(12, 24))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = rng.exponential(size=(3000, 12)) * (rng.random((3000, 12)) < 0.2)
    x = (codes @ atoms + 0.1 * rng.normal(size=(3000, 24))).astype(np.float32)
    common = {"n_steps": 300, "learning_rate": 5e-3, "validation": 0.0, "device": "cpu"}
    found = {}
    for goal in PRESETS:
        settings = preset(2000, 24, goal=goal)
        models = [SAE(random_state=seed, **common, **settings).fit(x[:2000]) for seed in (0, 1)]
        pair = stability(models, n_null=2, random_state=0).pairs[0]
        found[goal] = (models[0].evaluate(x[2000:])["fvu"], pair.shared)
    assert found["reconstruct"][0] < found["stable"][0]
    assert found["stable"][1] > found["reconstruct"][1]


def test_unknown_goals_and_sizes_are_named():
    with pytest.raises(InputError, match="did you mean 'stable'"):
        preset(1000, 128, goal="stabel")
    with pytest.raises(InputError, match="at least 8"):
        preset(7, 128, goal="stable")
    with pytest.raises(InputError, match="d=0"):
        preset(1000, 0, goal="stable")
