"""Baselines without weights: closed forms, real recordings, names and units."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import biosae as bs
from biosae.data.samples import Samples
from biosae.encoders import baselines
from biosae.errors import InputError

RATE = 200.0
T = np.arange(2000) / RATE


class Rows:
    """A reader of arrays kept in memory, of any kind of item."""

    def __init__(self, items: list[np.ndarray], item: str, **facts: Any) -> None:
        self.items, self.item = items, item
        self.__dict__.update(facts)

    def __call__(self, row: Any) -> np.ndarray:
        return self.items[int(row["number"])]

    def spec(self) -> dict[str, Any]:
        return {"kind": "memory"}


def samples_of(items: list[np.ndarray], item: str = "signal", **facts: Any) -> Samples:
    obs = pd.DataFrame({"number": range(len(items))}, index=[f"s{i}" for i in range(len(items))])
    return Samples(obs, Rows(items, item, **facts), roles={"patient": None})


def features(name: str, x: np.ndarray, *, rate: float = RATE, unit: str = "uV", **facts: Any) -> pd.Series:
    """The features of one signal, by name."""
    channels = facts.pop("channels", tuple(f"c{i}" for i in range(len(x))))
    samples = samples_of([x.astype(np.float32)], rate=rate, unit=unit, channels=channels, **facts)
    encoder = bs.encoders.load(name).suited(samples)
    values = encoder.forward(encoder.preprocess(samples[0])[None])["final"]
    assert values.shape == (1, encoder.dim()) and len(set(encoder.feature_names)) == encoder.dim()
    assert len(encoder.feature_units) == encoder.dim()
    return pd.Series(values[0].numpy(), index=encoder.feature_names)


def test_band_power_of_a_sinusoid_is_half_its_squared_amplitude() -> None:
    x = np.stack([20 * np.sin(2 * np.pi * 10 * T), 6 * np.sin(2 * np.pi * 20 * T) + 3 * np.sin(2 * np.pi * 6 * T)])
    found = features("eeg-bandpower", x)
    np.testing.assert_allclose(10 ** found["c0.alpha_log_power"], 200, rtol=1e-3)
    np.testing.assert_allclose(10 ** found["c1.beta_log_power"], 18, rtol=1e-3)
    np.testing.assert_allclose(10 ** found["c1.theta_log_power"], 4.5, rtol=1e-3)
    np.testing.assert_allclose(found["c0.alpha_relative_power"], 1, atol=1e-3)
    np.testing.assert_allclose(found["c1.theta_relative_power"], 4.5 / 22.5, atol=1e-3)
    assert 10 <= found["c0.spectral_edge_95"] <= 10.5
    np.testing.assert_allclose(found["c0.hjorth_activity"], np.log10(200), atol=1e-3)
    np.testing.assert_allclose(found["c0.hjorth_mobility"], 2 * np.pi * 10, rtol=0.01)  # of a sinusoid: 2 pi f
    np.testing.assert_allclose(found["c0.hjorth_complexity"], 1, atol=0.01)
    shares = found[[f"c1.{b}_relative_power" for b in baselines.EEG_BANDS]]
    np.testing.assert_allclose(shares.sum(), 1, atol=1e-5)


def test_units_are_turned_and_the_fingerprint_does_not_see_it() -> None:
    x = 20 * np.sin(2 * np.pi * 10 * T)[None]
    micro, volts = features("eeg-bandpower", x), features("eeg-bandpower", x * 1e-6, unit="V")
    np.testing.assert_allclose(micro, volts, rtol=1e-3, atol=1e-4)
    prints = {
        bs.encoders.fingerprint(
            bs.encoders.load("eeg-bandpower").suited(samples_of([x], rate=RATE, unit=u, channels=("c0",))).identity()
        )
        for u in ("V", "uV")
    }
    assert len(prints) == 1
    with pytest.raises(InputError, match="expects uV"):
        features("eeg-bandpower", x, unit="g")


def ecg(beats: np.ndarray, seconds: float, rate: float = 250.0) -> np.ndarray:
    """Two leads with a P, R and T wave at each beat: R 1.2 and -0.6 mV, T 0.3 and 0.15 mV, P 0.12 mV."""
    t = np.arange(round(seconds * rate)) / rate
    wave = lambda at, height, width: height * np.exp(-(((t - at) / width) ** 2))  # noqa: E731
    first = sum(wave(b, 1.2, 0.012) + wave(b + 0.26, 0.3, 0.05) + wave(b - 0.14, 0.12, 0.02) for b in beats)
    second = sum(wave(b, -0.6, 0.012) + wave(b + 0.26, 0.15, 0.05) for b in beats)
    return np.stack([first, second])


def test_ecg_of_known_beats() -> None:
    rng = np.random.default_rng(0)
    rr = np.round(rng.uniform(0.6, 1.1, 20) * 250) / 250
    beats = 0.5 + np.concatenate([[0], np.cumsum(rr)])
    x = ecg(beats, beats[-1] + 0.8) + rng.normal(0, 0.01, (2, round((beats[-1] + 0.8) * 250)))
    np.testing.assert_allclose(baselines.r_peaks(x, 250) / 250, beats, atol=0.009)
    found = features("ecg-morphology", x, rate=250, unit="mV", channels=("II", "V1"))
    for name, expected in {
        "rr_mean": rr.mean(), "rr_sd": rr.std(), "rr_rmssd": np.sqrt(np.mean(np.diff(rr) ** 2)),
        "rr_cv": rr.std() / rr.mean(), "n_beats_per_min": 60 / rr.mean(), "rr_range": np.ptp(rr),
        "rr_pnn50": (np.abs(np.diff(rr)) > 0.05).mean(), "II.r_amplitude": 1.2, "V1.r_amplitude": -0.6,
        "II.t_amplitude": 0.3, "V1.t_amplitude": 0.15, "II.p_amplitude": 0.12,
    }.items():  # fmt: skip
        np.testing.assert_allclose(found[name], expected, rtol=0.06, atol=0.02, err_msg=name)


def test_ecg_without_beats_is_not_a_number() -> None:
    found = features("ecg-morphology", ecg(np.array([1.0, 2.0]), 4.0), rate=250, unit="mV")
    assert found["rr_mean"] != found["rr_mean"] and np.isfinite(found["c0.sd"])


@pytest.mark.parametrize(("record", "leads"), [("100", [0]), ("100", [0, 1])])
def test_r_peaks_against_the_annotations_of_mit_bih(shared: Path, record: str, leads: list[int]) -> None:
    wfdb = pytest.importorskip("wfdb")
    path = str(shared / "data" / "ecg_wfdb_formats" / "records" / record)
    signal, marks = wfdb.rdrecord(path), wfdb.rdann(path, "atr")
    beats = marks.sample[np.isin(marks.symbol, list("NLRBAaJSVrFejnE/fQ"))]
    found = baselines.r_peaks(signal.p_signal[:, leads].T, 360.0)
    distance = np.abs(found[:, None] - beats[None]).min(0)
    hit = (distance <= 0.075 * 360).sum()
    assert len(beats) == 2273 and hit / len(beats) > 0.998 and hit / len(found) > 0.998


def test_rhythm_of_real_holter_ecg(shared: Path, tmp_path: Path) -> None:
    """RR intervals are those of the annotations, and irregular where the annotations say fibrillation."""
    from scipy.stats import mannwhitneyu

    folder = shared / "data" / "ecg_cpsc2021_af"
    samples = bs.read.wfdb(folder / "manifest.csv", patient="patient_id", id="sample_id", window=10, quality=False)
    emb = bs.encoders.embed(samples, "ecg-morphology", out=tmp_path, max_failures=0.1)
    found = pd.DataFrame(emb.array(), columns=emb.identity["features"], index=emb.obs.index)
    stated = emb.obs["rr_mean"].astype(float)
    known = stated.notna()
    assert known.sum() > 250 and (found.loc[known, "rr_mean"] - stated[known]).abs().median() < 0.002
    assert np.corrcoef(found.loc[known, "rr_mean"], stated[known])[0, 1] > 0.95
    fibrillation = emb.obs["rhythm"].astype(str).str.contains("AFIB")
    for name, least in (("rr_cv", 0.8), ("rr_pnn50", 0.8)):
        u = mannwhitneyu(found.loc[fibrillation, name], found.loc[~fibrillation, name]).statistic
        assert u / (fibrillation.sum() * (~fibrillation).sum()) > least, name


def test_alpha_with_closed_eyes(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "eeg_eegbci_s001"
    table = pd.read_csv(folder / "manifest.csv").iloc[:2]
    samples = bs.read.edf(table, patient="subject_id", id="sample_id", root=folder, window=4, quality=False,
                          channels=["O1", "O2", "Fz"])  # fmt: skip
    emb = bs.encoders.embed(samples, "eeg-bandpower", out=tmp_path)
    alpha = [emb.identity["features"].index(f"{c}.alpha_log_power") for c in ("O1", "O2", "Fz")]
    closed = (emb.obs["task"] == "baseline_eyes_closed").to_numpy()
    power = 10 ** emb.array()[:, alpha]
    gain = np.median(power[closed], 0) / np.median(power[~closed], 0)
    assert (gain[:2] > 2).all() and gain[2] < gain[:2].min()


def test_wearable_statistics_of_a_line_and_a_wave() -> None:
    t = np.arange(64 * 120) / 64
    x = np.stack([2 + 0.5 * t / 60, np.sin(2 * np.pi * 1.5 * t)])
    found = features("wearable-statistics", x, rate=64, unit="uS")
    np.testing.assert_allclose([found["c0.slope"], found["c0.mean"]], [0.5, 2.5], rtol=1e-3)
    np.testing.assert_allclose(found["c0.mean_absolute_change"], 0.5 / 60, rtol=1e-3)
    np.testing.assert_allclose([found["c0.percentile_5"], found["c0.percentile_95"]], [2.05, 2.95], rtol=1e-3)
    np.testing.assert_allclose(10 ** found["c1.0.5-2Hz_log_power"], 0.5, rtol=0.01)
    assert abs(found["c1.slope"]) < 0.02 and "c1.2-8Hz_log_power" in found
    slow = features("wearable-statistics", x[:, ::16], rate=4, unit="uS")
    assert "c0.0.5-2Hz_log_power" in slow and "c0.2-8Hz_log_power" not in slow


def test_channels_of_different_units_keep_them() -> None:
    x = np.stack([np.sin(T), 30 + 0 * T]).astype(np.float32)
    samples = samples_of([x], rate=RATE, unit="native", channels=("EDA", "TEMP"), channel_units=("uS", "degC"))
    encoder = bs.encoders.load("wearable-statistics").suited(samples)
    units = dict(zip(encoder.feature_names, encoder.feature_units))
    assert units["EDA.mean"] == "uS" and units["TEMP.slope"] == "degC/min"
    assert encoder.identity()["units"] == encoder.feature_units
    assert np.isfinite(encoder.forward(encoder.preprocess(x)[None])["final"]).all()


def test_spectral_octaves_hold_the_power() -> None:
    x = 4 * np.sin(2 * np.pi * 30 * T)[None]
    found = features("spectral", x)
    power = 10 ** found.filter(like="log_power")
    assert power.idxmax() == "c0.25-50Hz_log_power"
    np.testing.assert_allclose(power.max(), 8, rtol=0.01)
    np.testing.assert_allclose(found["c0.spectral_centroid"], 30, atol=0.3)
    np.testing.assert_allclose(10 ** found["c0.log_sd"], np.sqrt(8), rtol=0.01)


def test_colour_and_texture(tmp_path: Path) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[..., 0], image[:, ::2, 1] = 255, 255  # red everywhere, green in stripes of 1 px along x
    encoder = bs.encoders.load("colour-texture")
    values = encoder.forward(encoder.preprocess(image)[None])["final"][0].numpy()
    found = pd.Series(values, index=encoder.feature_names)
    assert found["red.mean"] == 1 and found["blue.mean"] == 0 and found["green.mean"] == 0.5
    assert found["green.quantile_5"] == 0 and found["green.quantile_95"] == 1
    np.testing.assert_allclose(found["gradient_x_1px"], np.log10(1 / 9), atol=1e-5)  # grey steps of 1/3
    assert found["gradient_y_1px"] == -12 and found["gradient_x_2px"] == -12
    samples = samples_of([image, image], "image")
    emb = bs.encoders.embed(samples, "colour-texture", out=tmp_path)
    np.testing.assert_allclose(emb[0], values, rtol=1e-6)
    with pytest.raises(InputError, match="one vector an item"):
        encoder.forward(encoder.preprocess(image)[None], -1, "tokens")


def test_identity_gives_vectors_back(tmp_path: Path) -> None:
    X = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    samples = samples_of(list(X), "features")
    emb = bs.encoders.embed(samples, "identity", out=tmp_path)
    assert np.array_equal(emb.array(), X)
    with pytest.raises(InputError, match=r"width of identity.*suited"):
        bs.encoders.load("identity").dim()
    with pytest.raises(InputError, match=r"takes an? features"):
        bs.encoders.load("identity").suited(samples_of([X], rate=1.0, unit="uV", channels=("a",)))


def test_how_to_read_for_a_baseline() -> None:
    for name, arguments in (("spectral", "..."), ("eeg-bandpower", "..., unit='uV'")):
        assert bs.encoders.load(name).reading() == f"bs.read.edf or bs.read.wfdb({arguments})"


def test_refusals(tmp_path: Path) -> None:
    x = np.zeros((1, 300), np.float32)
    encoder = bs.encoders.load("eeg-bandpower")
    with pytest.raises(InputError, match="has no weights"):
        bs.encoders.load("eeg-bandpower", weights="random")
    with pytest.raises(InputError, match="float64"):
        bs.encoders.load("eeg-bandpower", precision="bfloat16")
    with pytest.raises(InputError, match=r"suited\(samples\)"):
        _ = encoder.feature_names
    with pytest.raises(InputError, match=r"suited\(samples\)"):
        encoder.forward(torch.zeros(1, 1, 300))
    with pytest.raises(InputError, match="at least 90 Hz, the samples have 60"):
        encoder.suited(samples_of([x], rate=60.0, unit="uV", channels=("a",)))
    with pytest.raises(InputError, match="one rate"):
        encoder.suited(samples_of([x], rate=None, unit="uV", channels=("a",)))
    short = samples_of([x], rate=200.0, unit="uV", channels=("a",)).with_obs(duration=[1.5])
    with pytest.raises(InputError, match=r"at least 2 s, the longest has 1\.5 s.*window="):
        encoder.suited(short)
    suited = encoder.suited(samples_of([x], rate=200.0, unit="uV", channels=("a",)))
    with pytest.raises(InputError, match=r"at least 2 s, got 1\.5"):
        suited.forward(torch.zeros(1, 1, 300))
    assert suited.weights_sha256 == "none:1" and suited.source == "no weights"
    identity = suited.identity()
    json.dumps(identity)
    other = bs.encoders.load("spectral").suited(samples_of([x], rate=200.0, unit="uV", channels=("a",))).identity()
    assert bs.encoders.fingerprint(identity) != bs.encoders.fingerprint(other)
    assert torch.isfinite(suited.forward(torch.zeros(1, 1, 400))["final"]).all()  # a flat channel
