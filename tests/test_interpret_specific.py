"""Random-input filter, altered items and directional ablation: worked numbers, planted truth, spectra that stay."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import biosae as bs
from biosae.errors import InputError, StatisticsError
from biosae.interpret.altered import HARMLESS, IMAGES, MEANINGLESS, SIGNALS, altered
from biosae.interpret.specific import ablate_directions, project_out, specific


def test_directional_ablation_worked_numbers() -> None:
    out = project_out(np.array([[2.0, 1.0]]), np.array([[0.6, 0.8]]))
    np.testing.assert_allclose(out, [[0.8, -0.6]])


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_ablation_leaves_nothing_along_the_span_and_is_idempotent(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    x, d = rng.standard_normal((7, 9)), rng.standard_normal((k, 9))
    d = np.vstack([d, d[0] * 2, 0 * d[0]])  # what depends on others, and nothing, add nothing
    once = project_out(x, d)
    np.testing.assert_allclose(once @ d.T, 0, atol=1e-10)
    np.testing.assert_allclose(project_out(once, d), once, atol=1e-10)
    rest = x - once
    assert np.linalg.matrix_rank(np.vstack([d, rest]), tol=1e-8) == np.linalg.matrix_rank(d, tol=1e-8)


def codes_of(rates, n: int, *, seed: int, norm: float = 1.0, n_patients: int = 20, tokens: str = "none"):
    """Latents that fire at given rates."""
    rng = np.random.default_rng(seed)
    fires = rng.random((n, len(rates))) < np.asarray(rates)
    out = anndata.AnnData(
        X=sp.csr_matrix(fires * np.arange(1, len(rates) + 1), dtype=np.float32),
        obs=pd.DataFrame({"patient": [f"p{i % n_patients}" for i in range(n)]}, index=[f"s{i}" for i in range(n)]),
        var=pd.DataFrame(index=[f"L{j:04d}" for j in range(len(rates))]),
    )  # fmt: skip
    out.obsm["embedding"] = norm * rng.normal(1, 0.1, (n, 16)).astype(np.float32)
    out.varm["decoder"] = np.eye(len(rates), 16, dtype=np.float32)
    out.uns["biosae"] = {"tokens": tokens}
    return out


def test_what_fires_on_noise_is_left_out_and_what_fires_on_the_target_alone_is_kept() -> None:
    target = codes_of([0.9, 0.9, 0.1, 0.8], 400, seed=0)
    found = specific(
        target, {"white": codes_of([0.0, 0.6, 0.0, 0.0], 200, seed=1), "phase": codes_of([0.0, 0, 0, 0.0], 200, seed=2)}
    ).set_index("latent")
    assert found.index[found["specific"]].tolist() == ["L0000", "L0003"]
    assert found.loc["L0003", "rank"] == 1  # ranked by mean code: 0.8 x 4 over 0.9 x 1
    assert pd.isna(found.loc["L0001", "rank"])
    row = found.loc["L0000"]
    assert row["rate_low"] < row["rate_target"] < row["rate_high"] and row["n_patients"] == 20
    assert row["rate_random_high"] == pytest.approx(1 - 0.025 ** (1 / 200))  # none of 200 fires
    assert found.loc["L0001", "rate_random"] == pytest.approx(0.6, abs=0.1)


def test_a_latent_must_be_silent_on_every_family_and_the_rate_is_relaxed_once() -> None:
    target = codes_of([0.9, 0.9], 300, seed=0)
    random = {"white": codes_of([0.0, 0.5], 400, seed=1), "phase": codes_of([0.08, 0.0], 400, seed=2)}
    found = specific(target, random)
    assert found["status"].unique().tolist() == ["relaxed"] and found.attrs["max_rate"] == 0.1
    assert found["specific"].tolist() == [True, False] and "0.05" in found["reason"].iloc[0]
    random["phase"] = codes_of([0.5, 0.0], 400, seed=2)
    assert specific(target, random)["status"].unique().tolist() == ["empty"]


def test_families_outside_of_the_range_of_norms_do_not_count() -> None:
    target = codes_of([0.9], 300, seed=0)
    far = codes_of([0.0], 300, seed=1, norm=5.0)
    near = codes_of([0.0], 300, seed=2)
    found = specific(target, {"white": far, "phase": near})
    assert found["status"].item() == "refused" and not found["specific"].item()
    families = found.attrs["families"].set_index("family")
    assert families["status"].to_dict() == {"white": "invalid_null", "phase": "ok"}
    third = specific(target, {"white": far, "phase": near, "patches": codes_of([0.0], 300, seed=3)})
    assert third["specific"].item()
    with pytest.raises(InputError, match="two or more"):
        specific(target, {"white": near})


def test_norms_that_nobody_kept_are_said_to_be_unchecked() -> None:
    target, families = codes_of([0.9], 300, seed=0), {}
    for i, name in enumerate(("white", "phase")):
        families[name] = codes_of([0.0], 300, seed=i)
        del families[name].obsm["embedding"]
    found = specific(target, families)
    assert found["specific"].item()
    assert found.attrs["families"]["status"].tolist() == ["not_checked"] * 2
    assert found.attrs["families"]["norm_sd"].isna().all() and "norms" in found["reason"].item()


def test_tokens_of_one_input_are_not_independent_inputs() -> None:
    target = codes_of([0.9], 300, seed=0)
    random = {name: codes_of([0.0], 400, seed=i) for i, name in enumerate(("white", "phase"))}
    for table in random.values():
        table.obs["sample_id"] = [f"s{i // 40}" for i in range(400)]  # 10 inputs of 40 tokens
    found = specific(target, random)
    assert found["rate_random_high"].item() == pytest.approx(1 - 0.025 ** (1 / 10))
    assert found.attrs["families"]["n_inputs"].tolist() == [10, 10]


def test_signed_codes_are_ranked_by_their_size() -> None:
    target = codes_of([1.0, 1.0], 300, seed=0)
    signs = np.where(np.arange(300) % 2, 1, -1)
    target.X = sp.csr_matrix(np.c_[np.full(300, 0.5), 3.0 * signs].astype(np.float32))
    random = {name: codes_of([0.0, 0.0], 400, seed=i) for i, name in enumerate(("white", "phase"))}
    assert specific(target, random).set_index("latent")["rank"].tolist() == [2, 1]


def test_shares_of_tokens_are_rates() -> None:
    target = codes_of([1.0, 1.0], 300, seed=0, tokens="fraction_active")
    target.X = sp.csr_matrix(np.tile([0.7, 0.2], (300, 1)).astype(np.float32))
    random = {name: codes_of([0.0, 0.0], 50, seed=1, tokens="fraction_active") for name in ("white", "phase")}
    found = specific(target, random)
    np.testing.assert_allclose(found["rate_target"], [0.7, 0.2], rtol=1e-6)
    assert found["specific"].tolist() == [True, False]


def domains(n_patients: int = 24, each: int = 12, seed: int = 0):
    """Three sites; L0000 carries site a and nothing else, L0001 and L0002 the others; the rest is noise."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(n_patients), each)
    site = np.array(list("abc"))[patient % 3]
    m, d = 60, 30
    codes = np.where(rng.random((len(site), m)) < 0.3, rng.gamma(4, 0.25, (len(site), m)), 0)
    for j, name in enumerate("abc"):
        codes[:, j] = np.where(site == name, rng.gamma(8, 0.25, len(site)), 0)
    atoms = rng.standard_normal((m, d))
    atoms[:3], atoms[3:, :3] = np.eye(3, d), 0
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    out = anndata.AnnData(
        X=sp.csr_matrix(codes, dtype=np.float32),
        obs=pd.DataFrame({"patient": patient.astype(str), "site": site}, index=[f"s{i}" for i in range(len(site))]),
        var=pd.DataFrame(index=[f"L{j:04d}" for j in range(m)]),
    )
    out.obsm["embedding"] = (codes @ atoms + 0.05 * rng.standard_normal((len(site), d))).astype(np.float32)
    out.varm["decoder"] = atoms.astype(np.float32)
    return out


def test_ablating_what_carries_a_domain_hurts_it_alone() -> None:
    adata = domains()
    found = ablate_directions(adata, ["L0000"], "site", "a")
    assert found.low > 0 and found.specificity > found.random.max() and found.beyond_random == 1
    rise = found.domains.set_index("domain")["rise"]
    assert rise["a"] > 0.2 and rise["a"] > 3 * rise[["b", "c"]].max()
    assert found.specificity == pytest.approx(rise["a"] - rise[["b", "c"]].max())
    assert (found.n_patients, found.n_samples) == (24, 288)
    wrong = ablate_directions(adata, ["L0001"], "site", "a")
    assert wrong.high < 0  # another domain suffers more
    nothing = ablate_directions(adata, ["L0040"], "site", "a")
    assert abs(nothing.specificity) < 0.05 and 0 < nothing.beyond_random < 1


def test_random_sets_are_centred_where_the_domain_means_nothing() -> None:
    adata = domains()
    by = np.random.default_rng(0).permutation(24)[adata.obs["patient"].astype(int)]
    adata.obs["arm"] = np.where(by % 2, "x", "y")
    found = ablate_directions(adata, ["L0040", "L0041"], "arm", "x")
    assert abs(found.random.mean()) < 3 * found.random.std(ddof=1) and len(found.random) == 20


def test_a_domain_of_one_patient_is_refused() -> None:
    adata = domains(n_patients=4)
    with pytest.raises(StatisticsError, match="b 1"):
        ablate_directions(adata, ["L0000"], "site", "a")
    with pytest.raises(InputError, match="no value 'z'"):
        ablate_directions(domains(), ["L0000"], "site", "z")


@pytest.mark.parametrize("shape", [(32, 40), (33, 41)])
def test_phase_scrambling_keeps_every_amplitude(shape) -> None:
    x = np.random.default_rng(0).uniform(50, 200, (*shape, 3))
    out = IMAGES["phase"](x, np.random.default_rng(1), {})
    np.testing.assert_allclose(np.abs(np.fft.fft2(out, axes=(0, 1))), np.abs(np.fft.fft2(x, axes=(0, 1))), rtol=1e-6)
    assert np.abs(np.corrcoef(x[..., 0].ravel(), out[..., 0].ravel())[0, 1]) < 0.2
    before, after = (np.corrcoef(v.reshape(-1, 3).T) for v in (x, out))
    np.testing.assert_allclose(after, before, atol=1e-9)  # colours go together as they did


@pytest.mark.parametrize("n", [256, 255])
def test_signal_surrogates_keep_spectra_and_cross_spectra(n: int) -> None:
    rng = np.random.default_rng(0)
    common = np.cumsum(rng.standard_normal(n))
    x = np.stack([common + rng.standard_normal(n), 2 * common + rng.standard_normal(n)])
    out = SIGNALS["phase"](x, np.random.default_rng(1))
    f, g = np.fft.rfft(x), np.fft.rfft(out)
    np.testing.assert_allclose(np.abs(g), np.abs(f), rtol=1e-6)
    np.testing.assert_allclose((g[0] * g[1].conj())[1:], (f[0] * f[1].conj())[1:], rtol=1e-6)
    np.testing.assert_allclose(np.corrcoef(out)[0, 1], np.corrcoef(x)[0, 1], rtol=1e-9)
    assert not np.allclose(out, x)


def test_shuffled_items_hold_the_same_values() -> None:
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 255, (67, 80, 3))
    out = IMAGES["patches"](image, rng, {})
    np.testing.assert_allclose(np.sort(out, axis=None), np.sort(image, axis=None))
    assert (out[64:] == image[64:]).all() and (out[:64, :80] != image[:64, :80]).any()
    signal = rng.standard_normal((3, 1001))
    shuffled = SIGNALS["segments"](signal, rng)
    np.testing.assert_allclose(np.sort(shuffled, axis=1), np.sort(signal, axis=1))
    order = [np.flatnonzero((signal == column[:, None]).all(axis=0))[0] for column in shuffled.T[:50]]
    assert (np.diff(order) == 1).sum() >= 48  # channels move together, in whole segments


def test_pink_noise_falls_with_frequency_and_white_does_not() -> None:
    levels = {"mean": [128.0] * 3, "sd": [20.0] * 3}
    frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128)[None]).ravel()
    for how, slope in (("pink", -2.0), ("white", 0.0)):
        x = IMAGES[how](np.zeros((128, 128, 3)), np.random.default_rng(0), levels)
        np.testing.assert_allclose(x.mean(axis=(0, 1)), 128, atol=1)
        np.testing.assert_allclose(x.std(axis=(0, 1)), 20, rtol=0.05)
        power = np.abs(np.fft.fft2(x[..., 0])).ravel() ** 2
        seen = (frequency > 0.02) & (frequency < 0.4)
        assert stats.linregress(np.log(frequency[seen]), np.log(power[seen])).slope == pytest.approx(slope, abs=0.1)


def test_altered_samples_are_the_same_whenever_read_and_survive_saving(tmp_path) -> None:
    samples = bs.data.phantom(n_patients=4, n_slides=1, n_tiles=2)
    kinds = (*MEANINGLESS["image"], *HARMLESS["image"])
    for how in kinds:
        other = altered(samples, how)
        assert len(other) == len(samples) and other[3].dtype == np.uint8 and other[3].shape == samples[3].shape
        assert (other[3] == altered(samples, how)[3]).all()
        assert (how in HARMLESS["image"]) == (list(other.ids) == list(samples.ids))
        assert other.fingerprint != samples.fingerprint
        if how in ("phase", "patches", "shift", "flip"):
            assert (other[3] != samples[3]).any()
    noise = altered(samples, "white")
    assert (noise[0] != noise[1]).any() and (noise[0] != altered(samples, "white", random_state=1)[0]).any()
    noise.save(tmp_path / "noise.parquet")
    assert (bs.Samples.load(tmp_path / "noise.parquet")[2] == noise[2]).all()
    assert (altered(samples, "blank", colour=(240, 241, 242))[0] == [240, 241, 242]).all()
    with pytest.raises(InputError, match="did you mean 'white'"):
        altered(samples, "whit")
