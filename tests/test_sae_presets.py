"""Presets are settings of SAE: what they promise holds on planted rows."""

from __future__ import annotations

import numpy as np
import pytest

from biosae.errors import InputError
from biosae.sae import SAE, preset, stability
from biosae.sae.presets import PRESETS, RELEASED


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


@pytest.mark.parametrize("goal", RELEASED)
def test_released_settings_train(goal):
    """At a width and a number of latents that a test can afford; all else as released."""
    settings = preset(1000, 1024, goal=goal)
    assert settings["n_latents"] == {"histoscope": 49_152, "sail": 8192, "saev": 32_768}[goal]
    x = np.random.default_rng(0).normal(size=(600, 16)).astype(np.float32)
    settings |= {"n_latents": 512, "k": min(settings.get("k", 8), 160), "max_epochs": None, "n_steps": 6}
    sae = SAE(random_state=0, device="cpu", validation=0.0, **settings).fit(x)
    assert np.isfinite(sae.metrics_["fvu"]) and sae.codes(x[:5]).shape == (5, 512)
    settings["options"] = None
    assert preset(1000, 1024, goal=goal).get("options") == RELEASED[goal].get("options")  # not shared, not changed


def test_levels_of_sail_and_the_penalty_of_saev_are_those_of_the_code():
    """Level ends 128, 512, 2048, 8192; for rows s x, s^2 = d, mean over d of e^2 + 8e-4 |z| is ours with l1 sqrt(d)."""
    sail = preset(10**6, 1536, goal="sail")
    assert [share * sail["n_latents"] for share in sail["options"]["prefixes"]] == [128, 512, 2048, 8192]
    d = 64
    rng = np.random.default_rng(0)
    e, z = rng.normal(size=(5, d)), rng.exponential(size=(5, 9))
    theirs = np.mean((d**0.5 * e) ** 2) + 8e-4 * np.abs(d**0.5 * z).sum(1).mean()
    l1 = preset(1000, d, goal="saev")["l1"]
    assert theirs == pytest.approx((e**2).sum(1).mean() + l1 * np.abs(z).sum(1).mean())


def test_unknown_goals_and_sizes_are_named():
    with pytest.raises(InputError, match="did you mean 'stable'"):
        preset(1000, 128, goal="stabel")
    with pytest.raises(InputError, match="at least 8"):
        preset(7, 128, goal="stable")
    with pytest.raises(InputError, match="d=0"):
        preset(1000, 0, goal="stable")
