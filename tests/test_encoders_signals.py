"""Encoders of signals: units, gaps and channels before the network; the networks against stored numbers."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import biosae as bs
from biosae.data.items import ReadError
from biosae.data.samples import Samples
from biosae.encoders.signals import AMPLITUDES, SignalPreprocess
from biosae.errors import InputError, WeightsError
from biosae.files import hash_file

TEN_TWENTY = ("Fp1", "Fp2", "F7", "F3", "Fz", "F4", "F8", "T7", "C3", "Cz", "C4", "T8", "P7", "P3", "Pz", "P4", "P8",
              "O1", "O2")  # fmt: skip
RNG = np.random.default_rng(0)


class Signals:
    """A reader of arrays kept in memory."""

    item = "signal"

    def __init__(self, items: list[np.ndarray], *, rate: float | None, unit: str, channels: tuple[str, ...]) -> None:
        self.items, self.rate, self.unit, self.channels = items, rate, unit, channels

    def __call__(self, row: Any) -> np.ndarray:
        return self.items[int(row["number"])]

    def spec(self) -> dict[str, Any]:
        return {"kind": "memory", "unit": self.unit, "rate": self.rate, "channels": list(self.channels)}


def signals(
    items: list[np.ndarray], *, rate: float | None, unit: str = "uV", channels: tuple[str, ...] = ("II",)
) -> Samples:
    obs = pd.DataFrame({"number": range(len(items))}, index=[f"s{i}" for i in range(len(items))])
    reader = Signals([x.astype(np.float32) for x in items], rate=rate, unit=unit, channels=channels)
    return Samples(obs, reader, roles={"patient": None})


# -- preprocessing -----------------------------------------------------------------------------------------------------


def test_amplitude_rules_by_hand() -> None:
    x = np.array([[-300.0, 100.0, 200.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    one = {name: AMPLITUDES[name](x.copy()) for name in AMPLITUDES}
    assert np.array_equal(one["none"], x)
    np.testing.assert_allclose(one["per_100"][0], [-3, 1, 2, 0])
    np.testing.assert_allclose(one["zscore"][0], x[0] / np.sqrt(35000))  # mean 0, variance 140000 / 4
    np.testing.assert_allclose(one["percentile_95"][0], x[0] / 285, rtol=1e-6)  # 95th percentile of 0 100 200 300
    # quartiles -75 and 125 about the median 50: nothing is clipped
    np.testing.assert_allclose(one["iqr"][0], (x[0] - 50) / 200)
    for name in ("zscore", "zscore_clip15", "iqr"):
        assert np.array_equal(one[name][1], np.zeros(4)), name
    spike = np.r_[np.zeros(999), 1.0][None]
    assert AMPLITUDES["zscore"](spike).max() > 30 and AMPLITUDES["zscore_clip15"](spike).max() == 15


def test_a_flat_channel_is_zero_behind_the_band_pass() -> None:
    """A lead that hangs at -5 mV holds no signal; what the filter leaves of it is rounding."""
    step = SignalPreprocess(rate=100, amplitude="zscore", band=(0.5, 40.0))
    wave = np.sin(np.arange(1000) / 5)
    found = step(np.stack([np.full(1000, -5.0), wave]).astype(np.float32))
    assert not found[0].any() and 0.9 < found[1].std() < 1.1


def test_labram_gets_microvolts_by_100_from_volts(tmp_path: Path) -> None:
    """Trap of a factor of 1e4: 50 uV given in V, mV or uV is 0.5 at the network."""
    pytest.importorskip("skorch", reason="braindecode is not installed")
    encoder = bs.encoders.load("labram", weights="random", band=(0, 1000), seconds=2, args={"num_layers": 1})
    wave = 50e-6 * np.sin(np.linspace(0, 40, 400))[None].repeat(2, 0)
    found, prints = [], set()
    for unit, scale in (("V", 1.0), ("mV", 1e3), ("uV", 1e6)):
        samples = signals([wave * scale], rate=200, unit=unit, channels=("EEG Fz-REF", "Cz"))
        suited = encoder.suited(samples)
        found.append(suited.preprocess(samples[0]))
        prints.add(bs.encoders.fingerprint(suited.identity()))
        assert suited.identity()["given"]["unit"] == unit
    assert abs(found[0].abs().max() - 0.5) < 1e-3 and len(prints) == 1
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)
    with pytest.raises(InputError, match=r"expects uV.*g \(acceleration\)"):
        encoder.suited(signals([wave], rate=200, unit="g", channels=("Fz", "Cz")))


def test_gaps_are_bridged_when_short_and_refused_when_long() -> None:
    step = SignalPreprocess(rate=100, max_gap=0.1, max_missing=0.2)
    line = np.arange(100.0)[None]
    holed = line.copy()
    holed[0, 20:30] = np.nan
    torch.testing.assert_close(step(holed), torch.from_numpy(line).float())
    holed[0, 30] = np.nan
    with pytest.raises(ReadError, match=r"gaps: 11.0% .* 0.11 s"):
        step(holed)
    sparse = line.copy()
    sparse[0, ::4] = np.inf
    with pytest.raises(ReadError, match=r"25\.0%"):
        step(sparse)
    with pytest.raises(ReadError, match="gaps"):
        step(np.full((1, 100), np.nan))


def test_lengths_channels_and_shapes() -> None:
    step = SignalPreprocess(rate=100, n_channels=1, length=1000)
    with pytest.raises(ReadError, match=r"too_short.*1000 \(10 s\)"):
        step(np.zeros((1, 999)))
    with pytest.raises(ReadError, match=r"wrong_size.*window="):
        step(np.zeros((1, 1001)))
    with pytest.raises(InputError, match="1 channels"):
        step(np.zeros((2, 1000)))
    with pytest.raises(InputError, match="float"):
        step(np.zeros((1, 1000), int))
    assert SignalPreprocess(multiple=300)(np.zeros((2, 1000))).shape == (2, 900)
    for bad in ({"amplitude": "z"}, {"rate": 0}, {"unit": "bananas"}, {"band": (5, 1)}, {"length": 5, "multiple": 6}):
        with pytest.raises(InputError):
            SignalPreprocess(**bad)


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(AMPLITUDES)))
def test_preprocessing_is_picklable_and_does_not_change_its_input(seed: int, amplitude: str) -> None:
    x = np.random.default_rng(seed).normal(0, 30, (3, 240)).astype(np.float32)
    kept = x.copy()
    step = SignalPreprocess(rate=60, amplitude=amplitude, band=(0.5, 20.0), take=(2, 0), factors=(1.0, 2.0))
    out = step(x)
    assert out.dtype == torch.float32 and out.shape == (2, 240) and torch.isfinite(out).all()
    assert np.array_equal(x, kept)
    torch.testing.assert_close(pickle.loads(pickle.dumps(step))(x), out)  # noqa: S301
    json.dumps(step.spec())


def test_band_pass_keeps_what_is_inside() -> None:
    t = np.arange(3000) / 100
    inside, drift, fast = np.sin(2 * np.pi * 10 * t), 5 * np.sin(2 * np.pi * 0.05 * t), np.sin(2 * np.pi * 48 * t)
    out = SignalPreprocess(rate=100, band=(0.5, 40))((inside + drift + fast)[None])[0].numpy()
    middle = slice(300, -300)
    assert np.abs(out - inside)[middle].max() < 0.1
    at_half_the_rate = SignalPreprocess(rate=100, band=(0.0, 50.0))((inside + fast)[None])[0]
    torch.testing.assert_close(at_half_the_rate, torch.from_numpy(inside + fast).float())


# -- what samples are refused ------------------------------------------------------------------------------------------


def test_samples_that_do_not_suit_are_refused_with_the_remedy(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bs.settings, "weights_dirs", (shared / "weights",))
    encoder = bs.encoders.load("wildecg-resnet1d")
    x = [np.zeros((1, 1000))]
    with pytest.raises(InputError, match=r"expects 100 Hz, the samples have 250 Hz; read .*rate=100.*window=10"):
        encoder.suited(signals(x, rate=250))
    with pytest.raises(InputError, match="rates that differ"):
        encoder.suited(signals(x, rate=None))
    with pytest.raises(InputError, match=r"takes 1 channel.*2 \(I, II\).*channels=\['\.\.\.'\]"):
        encoder.suited(signals([np.zeros((2, 1000))], rate=100, channels=("I", "II")))
    with pytest.raises(InputError, match="takes an image"):
        bs.encoders.load("tiny-histology").suited(signals(x, rate=100))
    with pytest.raises(InputError, match="micrometres"):
        bs.encoders.load("wildecg-resnet1d", mpp=0.5)
    with pytest.raises(InputError, match=r"'mean'.*'rate'"):
        bs.encoders.load("wildecg-resnet1d", mean="half")
    with pytest.raises(InputError, match=r"\(B, 1, T\)"):
        encoder.forward(torch.zeros(2, 1000))


def test_channels_are_taken_by_name_in_the_networks_order() -> None:
    encoder = bs.encoders.load("spectral", channels=["V5", "II"])
    samples = signals([np.stack([np.full(600, 1.0), np.full(600, 2.0), np.full(600, 3.0)])], rate=100, unit="mV",
                      channels=("MLII", "V1", "v5"))  # fmt: skip
    suited = encoder.suited(samples)
    assert suited.preprocess(samples[0])[:, 0].tolist() == [3.0, 1.0]
    assert suited.feature_names[0].startswith("V5.") and suited.dim() == 22
    with pytest.raises(InputError, match=r"needs the channels V5, II; not \(or not once\) there: V5"):
        encoder.suited(signals([np.zeros((1, 600))], rate=100, unit="mV", channels=("II",)))


# -- the trained networks ----------------------------------------------------------------------------------------------


@pytest.fixture
def weights(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bs.settings, "weights_dirs", (shared / "weights",))
    return shared / "weights"


def check(found: torch.Tensor, stored: dict, *, atol: float, first: float | None = None) -> None:
    flat = found.flatten()
    assert flat.numel() == stored["n"]
    np.testing.assert_allclose(flat[:8], stored["first8"], atol=first or atol)
    np.testing.assert_allclose([flat.mean(), flat.std()], [stored["mean"], stored["std"]], atol=atol)


def test_wildecg_equals_its_reference(weights: Path) -> None:
    stored = json.loads((weights / "wildecg_resnet1d" / "reference.json").read_text())
    t = np.arange(1000) / 100
    wave = 3 * np.exp(-(((t % 0.8 - 0.4) / 0.02) ** 2)) - 0.2 * np.cos(2 * np.pi * t / 0.8)
    x = torch.from_numpy(wave).float()[None, None]
    encoder = bs.encoders.load("wildecg-resnet1d")
    tokens = encoder.forward(x, encoder.layers, "tokens")
    check(tokens["final"].transpose(1, 2), stored["tokens_128x63"], atol=1e-4)
    check(encoder.forward(x)["final"], stored["embedding"], atol=1e-4)
    check(encoder.pretext(x), stored["pretext_logits"], atol=1e-3)
    torch.testing.assert_close(encoder.forward(x)["final"], tokens["final"].mean(1))
    for layer in encoder.layers:
        assert tokens[layer].shape == (1, np.prod(encoder.grid(layer, (1, 1000))), encoder.dim(layer, "tokens"))
    assert encoder.weights_sha256 == hash_file(weights / "wildecg_resnet1d" / "model.safetensors")


def robust_input() -> torch.Tensor:
    """The reference's formula in float32 (its nearly empty frequency bins hold the rounding of float32)."""
    tau = (np.arange(1800) / 60).astype(np.float32)
    epochs = [np.sin(2 * np.pi * (1 + e) * tau) + 0.5 * np.cos(2 * np.pi * (0.7 + 0.1 * e) * tau**2 / 30)
              for e in range(21)]  # fmt: skip
    return torch.from_numpy(np.concatenate(epochs).astype(np.float32))[None, None]


def test_robustsleepnet_equals_its_reference(weights: Path) -> None:
    """The spectrogram within the stated tolerance. Behind it the stored numbers depend on rounding: pure sinusoids
    leave bins that hold nothing but the error of float32, and the logarithm makes of it values as large as the
    signal's. So what follows is compared with as much slack as another rounding of the same formula makes."""
    stored = json.loads((weights / "robustsleepnet_eeg" / "reference.json").read_text())
    encoder = bs.encoders.load("robustsleepnet-eeg")
    x = robust_input()
    found = encoder.forward(x, encoder.layers, "tokens")
    spectrogram = found["spectrogram"].unflatten(1, (21, 28)).transpose(2, 3)
    check(spectrogram, stored["spectrogram_standardised"], atol=1e-3)
    for layer, key in (
        ("frames", "frame_tokens_21x28x128"), ("epochs", "epoch_50"), ("final", "sequence_100"),
    ):  # fmt: skip
        check(found[layer], stored[key], atol=3e-3, first=0.03)
    logits = encoder.stages(x)
    check(logits, stored["logits"], atol=0.01, first=0.08)
    assert logits.argmax(-1)[0].tolist() == stored["argmax"]
    torch.testing.assert_close(encoder.forward(x)["final"], found["final"].mean(1))


def test_robustsleepnet_against_a_plain_implementation(weights: Path) -> None:
    """Every stage from the tensors by name, in float64, on noise (where no bin is empty) of three derivations."""
    state = {k: v.double() for k, v in load_file(weights / "robustsleepnet_eeg" / "model.safetensors").items()}
    x = torch.randn(2, 3, 4 * 1800, generator=torch.Generator().manual_seed(1))
    encoder = bs.encoders.load("robustsleepnet-eeg")

    def linear(y: torch.Tensor, name: str) -> torch.Tensor:
        return y @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)

    def attend(y: torch.Tensor, name: str, dim: int) -> torch.Tensor:
        score = linear(torch.tanh(linear(y, f"{name}.context_matrix")), f"{name}.context_vector")
        weight = score.exp() / score.exp().sum(dim, keepdim=True)
        return (weight * y).sum(dim)

    def gru(y: torch.Tensor, name: str) -> torch.Tensor:
        def direction(steps: list[int], tail: str) -> list[torch.Tensor]:
            hidden = state[f"{name}.weight_hh_l0{tail}"].shape[1]
            h, out = torch.zeros(len(y), hidden, dtype=torch.float64), {}
            for t in steps:
                a = y[:, t] @ state[f"{name}.weight_ih_l0{tail}"].T + state[f"{name}.bias_ih_l0{tail}"]
                b = h @ state[f"{name}.weight_hh_l0{tail}"].T + state[f"{name}.bias_hh_l0{tail}"]
                (ar, az, an), (br, bz, bn) = a.chunk(3, -1), b.chunk(3, -1)
                r, z = torch.sigmoid(ar + br), torch.sigmoid(az + bz)
                h = (1 - z) * torch.tanh(an + r * bn) + z * h
                out[t] = h
            return [out[t] for t in range(y.shape[1])]

        n = y.shape[1]
        both = zip(direction(list(range(n)), ""), direction(list(range(n))[::-1], "_reverse"))
        return torch.stack([torch.cat(pair, -1) for pair in both], 1)

    epochs = x.double().unflatten(-1, (4, 1800)).clamp(-20, 20) / 20
    hann = torch.from_numpy(np.hanning(128))
    k = torch.arange(65).double()[:, None] * torch.arange(128) * 2 * torch.pi / 128
    frames = torch.stack([epochs[..., i * 60 : i * 60 + 128] * hann / hann.sum() for i in range(28)], -2)
    log = ((frames @ k.cos().T) ** 2 + (frames @ k.sin().T) ** 2).clamp(min=1e-20).log10()
    spec = (log - log.mean((2, 3), keepdim=True)) / log.std((2, 3), keepdim=True)
    base = "encoder_eeg.encoder"
    filtered = linear(spec, f"{base}.filter_reduction")
    heads = [attend(filtered, f"{base}.channel_attention.attention_{i}", 1) for i in range(4)]
    frame = gru(torch.cat(heads, -1).flatten(0, 1), f"{base}.gru").unflatten(0, (2, 4))
    epoch = attend(linear(frame, "reducer_eeg.reduction"), "reducer_eeg.attention", 2)
    sequence = epoch
    for i in range(2):
        name = f"sequence_encoder.encoder.{i}"
        sequence = (linear(sequence, f"{name}.residual_connection") + gru(sequence, f"{name}.gru")) / 2
    found = encoder.forward(x, encoder.layers, "tokens")
    for layer, expected in (("spectrogram", spec), ("frames", frame), ("epochs", epoch), ("final", sequence)):
        torch.testing.assert_close(found[layer], expected.flatten(1, -2).float(), atol=2e-4, rtol=1e-3)
        assert encoder.grid(layer, (3, 7200))[0] * encoder.grid(layer, (3, 7200))[1] == found[layer].shape[1]
    torch.testing.assert_close(encoder.stages(x), linear(sequence, "classifier").float(), atol=1e-3, rtol=1e-3)


def test_robustsleepnet_depends_on_the_other_epochs_and_not_on_the_order_of_channels(weights: Path) -> None:
    encoder = bs.encoders.load("robustsleepnet-eeg")
    x = torch.randn(1, 2, 5 * 1800, generator=torch.Generator().manual_seed(2))
    whole = encoder.forward(x, "epochs", "tokens")["epochs"]
    alone = encoder.forward(x[..., :1800], "epochs", "tokens")["epochs"]
    assert not torch.allclose(whole[:, :1], alone, atol=0.05)
    torch.testing.assert_close(encoder.forward(x.flip(1), "epochs", "tokens")["epochs"], whole, atol=1e-4, rtol=1e-3)
    with pytest.raises(InputError, match="multiple of 1800"):
        encoder.forward(torch.zeros(1, 2, 2000))
    assert encoder.preprocess(RNG.normal(size=(2, 4000)).astype(np.float32)).shape == (2, 3600)


def test_sleep_stages_of_made_epochs(weights: Path) -> None:
    """110 epochs: Wake (alpha and beta), N2 (theta, spindles, K complexes) and N3 (slow waves), in uV and in V."""
    from scipy.signal import butter, sosfiltfilt

    rng, rate = np.random.default_rng(0), 60
    kind = np.repeat([0, 2, 3, 2, 3, 0, 2, 3, 2, 0, 2], 10)
    n = len(kind) * 1800
    t, k = np.arange(n) / rate, np.repeat(kind, 1800)

    def band(low: float, high: float, sd: float) -> np.ndarray:
        x = sosfiltfilt(butter(3, [low, high], "bandpass", fs=rate, output="sos"), rng.normal(size=n))
        return sd * x / x.std()

    f = np.fft.rfftfreq(n, 1 / rate)
    pink = np.fft.irfft(np.fft.rfft(rng.normal(size=n)) / np.maximum(f, 0.3) ** 0.9, n)
    pink /= pink.std()
    spindle = np.exp(-((((t + rng.uniform(-1, 1)) % 6 - 3) / 0.35) ** 2)) * np.sin(2 * np.pi * 13.3 * t)
    complexes = 60 * np.exp(-(((t % 12 - 5) / 0.25) ** 2)) - 40 * np.exp(-(((t % 12 - 5.6) / 0.4) ** 2))
    wake = 4 * pink + band(8, 12, 12) + band(15, 29, 8)
    n2 = 8 * pink + band(4, 7, 8) + 18 * spindle - complexes + band(0.5, 2, 10) + band(15, 29, 1.5)
    n3 = 10 * pink + band(0.5, 2, 45) + band(2, 4, 15) + band(15, 29, 1)
    night = np.select([k == 0, k == 2], [wake, n2], n3)[None]
    encoder = bs.encoders.load("robustsleepnet-eeg")
    stages = [
        encoder.stages(encoder.preprocess((night * scale).astype(np.float32))[None]).argmax(-1)[0].numpy()
        for scale in (1, 1e-6)
    ]
    assert (stages[0] == kind).mean() > 0.97 and (stages[0] == stages[1]).all()


def test_folders_random_controls_and_changed_weights(weights: Path, tmp_path: Path) -> None:
    x = torch.randn(1, 1, 1000, generator=torch.Generator().manual_seed(0))
    by_name, by_path = bs.encoders.load("wildecg-resnet1d"), bs.encoders.load(weights / "wildecg_resnet1d")
    assert by_name.identity() == by_path.identity()
    copy = tmp_path / "my_ecg"
    shutil.copytree(weights / "wildecg_resnet1d", copy, copy_function=shutil.copyfile)
    copy.chmod(0o755)
    mine = bs.encoders.load(copy)
    torch.testing.assert_close(mine.forward(x)["final"], by_name.forward(x)["final"])
    assert mine.info.name == "my-ecg" and mine.info.licence == "unknown"
    assert bs.encoders.fingerprint(mine.identity()) == bs.encoders.fingerprint(by_name.identity())
    control = bs.encoders.load("wildecg-resnet1d", weights="random", random_state=3)
    assert control.weights_sha256 == "random:3" and "RANDOM WEIGHTS" in repr(control)
    assert not torch.allclose(control.forward(x)["final"], by_name.forward(x)["final"])
    file = copy / "model.safetensors"
    state = load_file(file)
    state["final_bn.bias"] += 1e-3
    save_file(state, file)
    with pytest.raises(WeightsError, match="SHA-256 expected 7a17c05c"):
        bs.encoders.load(copy)
    del state["pretext.0.weight"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="SHA-256 expected"):
        bs.encoders.load("wildecg-resnet1d", weights=tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="another kind"):
        bs.encoders.load("robustsleepnet-eeg", weights=weights / "wildecg_resnet1d")


def test_pretext_head_sees_real_ecg_turned_over_and_shuffled(weights: Path, shared: Path) -> None:
    """MIT-BIH record 100, MLII at 100 Hz: the stored facts about 'invert' and 'permute'."""
    record = pd.DataFrame({"path": [str(shared / "data" / "ecg_wfdb_formats" / "records" / "100.hea")]})
    samples = bs.read.wfdb(record, patient=None, channels=["MLII"], rate=100, window=10, quality=False)
    encoder = bs.encoders.load("wildecg-resnet1d").suited(samples)
    windows = [samples[i] for i in range(0, len(samples), 10)]
    rng = np.random.default_rng(0)

    def chance(items: list[np.ndarray]) -> np.ndarray:
        return encoder.pretext(torch.stack([encoder.preprocess(x) for x in items])).sigmoid().numpy()

    def shuffle(x: np.ndarray) -> np.ndarray:
        pieces = np.array_split(x, 8, axis=1)
        return np.concatenate([pieces[i] for i in rng.permutation(8)], 1)

    plain, inverted, shuffled = chance(windows), chance([-x for x in windows]), chance([shuffle(x) for x in windows])
    assert plain[:, 6].max() < 0.01 and inverted[:, 6].min() > 0.99
    assert plain[:, 3].mean() < 0.05 and shuffled[:, 3].mean() > 0.6


def test_embeddings_of_real_ecg(weights: Path, shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "ecg_cpsc2021_af"
    table = pd.read_csv(folder / "manifest.csv").iloc[:2]
    samples = bs.read.wfdb(table, patient="patient_id", id="sample_id", root=folder, channels=["II"], rate=100,
                           window=10, quality=False)  # fmt: skip
    emb = bs.encoders.embed(samples, "wildecg-resnet1d", layer=["blocks.3", -1], out=tmp_path)
    assert emb["final"].shape == (len(samples), 128) and emb["blocks.3"].shape == (len(samples), 32)
    encoder = bs.encoders.load("wildecg-resnet1d").suited(samples)
    one = encoder.forward(encoder.preprocess(samples[3])[None])["final"][0].numpy()
    np.testing.assert_allclose(emb["final"][3], one, atol=1e-4)
    assert emb["final"].identity["given"] == {"unit": "mV", "channels": ["II"], "rate": 100.0}
    tokens = bs.encoders.embed(samples, encoder, pool="tokens", out=tmp_path / "tokens")
    assert tokens.tokens_per_sample == 63 and list(tokens.grid) == [1, 63]


# -- braindecode -------------------------------------------------------------------------------------------------------

SMALL: dict[str, dict[str, Any]] = {
    "labram": {"num_layers": 2, "n_times": 800, "sfreq": 200, "n_chans": 128},
    "cbramod": {"n_layer": 2, "n_times": 800, "sfreq": 200, "n_chans": 19, "return_encoder_output": True},
    "biot-prest-16chs": {"num_layers": 2, "n_times": 1000, "sfreq": 200, "n_chans": 16},
    "eegpt": {"depth": 2, "n_times": 1024, "sfreq": 256, "embed_dim": 32, "chs_info": TEN_TWENTY},
    "signal-jepa": {"transformer__num_encoder_layers": 2, "n_times": 512, "sfreq": 128, "chs_info": TEN_TWENTY},
    "eegdino-small": {"n_layer": 2, "n_times": 800, "sfreq": 200, "n_chans": 19},
}


def save_braindecode(folder: Path, name: str) -> tuple[Any, torch.Tensor, tuple[str, ...]]:
    """A class with random weights, written as its own ``save_pretrained`` does; the network, an input and its names."""
    from biosae.encoders.eeg_models import _labram_order, braindecode_models, channel_info

    arch = bs.encoders.info(name).arch
    args = dict(SMALL[name])
    names = tuple(args.get("chs_info", ())) or bs.encoders.info(name).channels
    names = names or tuple(f"c{i}" for i in range(args["n_chans"]))
    if "chs_info" in args:
        args["chs_info"] = channel_info(args["chs_info"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = getattr(braindecode_models(), arch)(n_outputs=2, **args).eval()
        for value in made.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape) * 0.02)
    made.save_pretrained(folder)
    if name == "labram":
        names = tuple(_labram_order())[:30:3]
    x = torch.randn(2, len(names), args["n_times"], generator=torch.Generator().manual_seed(0))
    return made, x, names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(SMALL))
def test_braindecode_folder_gives_the_classes_own_features(tmp_path: Path, name: str) -> None:
    pytest.importorskip("skorch", reason="braindecode is not installed")
    made, x, names = save_braindecode(tmp_path / name, name)
    options = {"ch_names": list(names)} if name == "labram" else {}
    with torch.no_grad():
        own = made(x.clone(), return_features=True, **options)
    encoder = bs.encoders.load(f"braindecode:{bs.encoders.info(name).arch}", weights=tmp_path / name)
    n_channels = encoder.preprocess.n_channels
    samples = signals([x[0].numpy()], rate=SMALL[name]["sfreq"], channels=names)
    suited = encoder.suited(samples)
    assert n_channels in (None, len(names)) and encoder.weights_sha256 == hash_file(
        tmp_path / name / "model.safetensors"
    )
    tokens = suited.forward(x, -1, "tokens")["final"]
    pooled = suited.forward(x, -1)["final"]
    features = own["features"]
    if features.ndim == 2:  # BIOT: the mean of its tokens
        torch.testing.assert_close(pooled, features)
    else:
        torch.testing.assert_close(tokens, features.flatten(1, -2))
        torch.testing.assert_close(pooled, features.flatten(1, -2).mean(1))
    rows, columns = suited.grid(-1, tuple(x.shape[1:]))
    assert tokens.shape == (2, rows * columns, encoder.dim(-1, "tokens"))
    if own["cls_token"] is not None:
        torch.testing.assert_close(suited.forward(x, -1, "cls")["final"], own["cls_token"])
    else:
        with pytest.raises(InputError, match="no class token"):
            suited.forward(x, -1, "cls")
    for layer in encoder.layers[:-1]:
        assert suited.forward(x, layer, "tokens")[layer].shape == tokens.shape
    if len(encoder.layers) > 1:  # the first rows of a batch do not depend on the others
        torch.testing.assert_close(suited.forward(x[:1], "blocks.0")["blocks.0"], suited.forward(x, 0)["blocks.0"][:1])
    identity = json.loads(json.dumps(suited.identity()))
    assert identity["architecture"]["arch"] == bs.encoders.info(name).arch


@pytest.mark.filterwarnings("ignore")
def test_cbramod_is_band_passed_as_in_its_training() -> None:
    """0.3 to 75 Hz: an offset of a millivolt does not reach the network, 10 Hz passes."""
    pytest.importorskip("skorch", reason="braindecode is not installed")
    step = bs.encoders.load("cbramod", weights="random", args={"n_layer": 1}).preprocess
    wave = 50 * np.sin(2 * np.pi * 10 * np.arange(2000) / 200)[None]
    found = step((wave + 1000).astype(np.float32)).numpy()
    assert np.abs(found - wave / 100)[:, 400:-400].max() < 0.02


@pytest.mark.filterwarnings("ignore")
def test_biot_takes_its_derivations_by_name_in_their_order(tmp_path: Path) -> None:
    """Each derivation has an embedding of its own: another order, or electrodes instead, would be other channels."""
    pytest.importorskip("skorch", reason="braindecode is not installed")
    _, x, names = save_braindecode(tmp_path / "biot-prest-16chs", "biot-prest-16chs")
    assert names[:4] == ("FP1-F7", "F7-T7", "T7-P7", "P7-O1") and len(names) == 16
    encoder = bs.encoders.load("biot-prest-16chs", weights=tmp_path / "biot-prest-16chs")
    turned = signals([x[0].numpy()[::-1]], rate=200, channels=names[::-1])
    found = encoder.suited(turned).preprocess(turned[0])
    torch.testing.assert_close(found, encoder.preprocess(x[0].numpy()))
    with pytest.raises(InputError, match="FP1-F7"):
        encoder.suited(signals([x[0].numpy()], rate=200, channels=TEN_TWENTY[:16]))


@pytest.mark.filterwarnings("ignore")
def test_braindecode_tokens_go_channel_by_channel(tmp_path: Path) -> None:
    """A change in one second of one electrode moves that token of the first block's input most."""
    pytest.importorskip("skorch", reason="braindecode is not installed")
    for name, columns in (("labram", 4), ("cbramod", 4), ("eegdino-small", 4)):
        _, x, names = save_braindecode(tmp_path / name, name)
        encoder = bs.encoders.load(f"braindecode:{bs.encoders.info(name).arch}", weights=tmp_path / name)
        suited = encoder.suited(signals([x[0].numpy()], rate=200, channels=names))
        other = x.clone()
        other[:, 2, 200:400] *= -2
        moved = (suited.forward(x, 0, "tokens")["blocks.0"] - suited.forward(other, 0, "tokens")["blocks.0"]).norm(
            dim=-1
        )
        assert moved.argmax(1).tolist() == [2 * columns + 1] * 2, name


@pytest.mark.filterwarnings("ignore")
def test_labram_takes_shorter_windows_with_the_first_moments(tmp_path: Path) -> None:
    pytest.importorskip("skorch", reason="braindecode is not installed")
    made, x, names = save_braindecode(tmp_path / "labram", "labram")
    samples = signals([x[0, :, :400].numpy()], rate=200, channels=names)
    whole = bs.encoders.load("labram", weights=tmp_path / "labram").suited(samples)
    with pytest.raises(ReadError, match=r"too_short.*800 \(4 s\).*seconds="):
        whole.preprocess(samples[0])
    with pytest.raises(InputError, match="windows of 800 samples, got 400"):
        whole.forward(x[..., :400])
    half = bs.encoders.load("labram", weights=tmp_path / "labram", seconds=2).suited(samples)
    assert torch.equal(half.model.temporal_embedding, made.temporal_embedding[:, :3])
    assert half.forward(half.preprocess(samples[0])[None], -1, "tokens")["final"].shape == (1, len(names) * 2, 200)
    assert bs.encoders.fingerprint(half.identity()) != bs.encoders.fingerprint(whole.identity())


@pytest.mark.filterwarnings("ignore")
def test_braindecode_refusals(tmp_path: Path) -> None:
    pytest.importorskip("skorch", reason="braindecode is not installed")
    folder = tmp_path / "cbramod"
    save_braindecode(folder, "cbramod")
    with pytest.raises(InputError, match="which class of braindecode"):
        bs.encoders.load(save_alias(folder, tmp_path / "nameless"))
    with pytest.raises(InputError, match="'CBraMod'"):
        bs.encoders.load("braindecode:CBramod", weights=folder)
    assert bs.encoders.load(folder).info.name == "cbramod"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"activation": "os.system"}))
    with pytest.raises(WeightsError, match=r"no layer of torch\.nn"):
        bs.encoders.load("braindecode:CBraMod", weights=folder)
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    with pytest.raises(WeightsError, match="does not fit"):
        bs.encoders.load("braindecode:CBraMod", weights=folder)
    with pytest.raises(WeightsError, match="table of positions"):
        bs.encoders.load("reve-base")
    with pytest.raises(InputError, match="names"):
        bs.encoders.load("labram", weights="random", args={"num_layers": 1}).forward(torch.zeros(1, 3, 3000))
    labram = bs.encoders.load("labram", weights="random", args={"num_layers": 1})
    with pytest.raises(InputError, match="knows no electrode 'ECG1'"):
        labram.suited(signals([np.zeros((1, 400))], rate=200, channels=("ECG1",)))
    with pytest.raises(InputError, match=r"eegpt.*n_chans could not be inferred"):
        bs.encoders.load("eegpt", weights="random")
    save_braindecode(tmp_path / "eegpt", "eegpt")
    with pytest.warns(UserWarning, match="unit of eegpt"):
        bs.encoders.load("eegpt", weights=tmp_path / "eegpt")


def save_alias(folder: Path, other: Path) -> Path:
    shutil.copytree(folder, other)
    return other
