"""Baselines without weights: plain features with names, so that a latent can be compared with what was known before.

Every baseline gives one vector an item at ``final``; ``feature_names`` and ``feature_units`` say what each value is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from biosae.encoders.base import Encoder, Layer
from biosae.encoders.signals import SignalEncoder
from biosae.errors import InputError

VERSION = 1
"""Raised whenever the numbers of a baseline change; part of ``weights_sha256`` (``"none:1"``)."""
FLOOR = 1e-12
"""Least power before a logarithm, in squared units of the channel."""
EEG_BANDS = {"delta": (1, 4), "theta": (4, 8), "alpha": (8, 13), "beta": (13, 30), "gamma": (30, 45)}
ECG_BANDS = {"0.5-5Hz": (0.5, 5), "5-15Hz": (5, 15), "15-40Hz": (15, 40)}
WEARABLE_BANDS = {"0.1-0.5Hz": (0.1, 0.5), "0.5-2Hz": (0.5, 2), "2-8Hz": (2, 8)}

Column = tuple[str, str]
"""Name and unit of a feature."""


class Extractor(NamedTuple):
    """A baseline: names and units for (channels, units, rate), values ``(B, d)`` of ``(B, C, T)`` at a rate, least
    rate (Hz) and least length (s)."""

    columns: Callable[[Sequence[str], Sequence[str], float], list[Column]]
    values: Callable[[np.ndarray, float], np.ndarray]
    least_rate: float
    least_seconds: float


def spectrum(x: np.ndarray, rate: float, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (Hz) and one-sided power density (unit^2/Hz) along the last axis: Welch's method, Hann windows of
    ``seconds`` (or the whole signal, if shorter) with half overlap, mean removed."""
    from scipy.signal import welch

    return welch(x, rate, nperseg=min(x.shape[-1], round(seconds * rate)), axis=-1)


def band_power(f: np.ndarray, density: np.ndarray, low: float, high: float) -> np.ndarray:
    """Power (unit^2) in ``low <= f < high`` Hz: sum of the density times the bin width."""
    return density[..., (f >= low) & (f < high)].sum(-1) * (f[1] - f[0])


def _log(power: np.ndarray) -> np.ndarray:
    return np.log10(np.maximum(power, FLOOR))


def _by_channel(columns: Callable[[str, float], list[Column]]) -> Callable[..., list[Column]]:
    def named(channels: Sequence[str], units: Sequence[str], rate: float) -> list[Column]:
        return [(f"{c}.{name}", unit) for c, u in zip(channels, units) for name, unit in columns(u, rate)]

    return named


# -- EEG ---------------------------------------------------------------------------------------------------------------


def _eeg_columns(unit: str, rate: float) -> list[Column]:
    return [
        *((f"{b}_log_power", f"log10 {unit}^2") for b in EEG_BANDS),
        *((f"{b}_relative_power", "share") for b in EEG_BANDS),
        ("spectral_edge_95", "Hz"), ("hjorth_activity", f"log10 {unit}^2"), ("hjorth_mobility", "1/s"),
        ("hjorth_complexity", "1"),
    ]  # fmt: skip


def eeg_bandpower(x: np.ndarray, rate: float) -> np.ndarray:
    """Per channel: log10 power of the five bands, their shares of 1-45 Hz, the frequency below which 95 % of the power
    of 1-45 Hz lies, and Hjorth's activity ``var(x)`` (log10), mobility ``sqrt(var(x') / var(x))`` and complexity
    ``mobility(x') / mobility(x)`` (Hjorth 1970, doi 10.1016/0013-4694(70)90143-4). ``(B, C * 14)``."""
    f, density = spectrum(x, rate, 2.0)
    power = np.stack([band_power(f, density, *b) for b in EEG_BANDS.values()], -1)
    inside = (f >= 1) & (f < 45)
    total = np.maximum(power.sum(-1, keepdims=True), FLOOR)
    cumulative = np.cumsum(density[..., inside], -1)
    edge = f[inside][np.argmax(cumulative >= 0.95 * cumulative[..., -1:], axis=-1)]
    first, second = np.diff(x) * rate, np.diff(x, n=2) * rate**2
    v0, v1, v2 = (np.maximum(d.var(-1), FLOOR) for d in (x, first, second))
    mobility = np.sqrt(v1 / v0)
    hjorth = np.stack([edge, np.log10(v0), mobility, np.sqrt(v2 / v1) / mobility], -1)
    return np.concatenate([_log(power), power / total, hjorth], -1).reshape(len(x), -1)


# -- ECG ---------------------------------------------------------------------------------------------------------------

_RHYTHM: list[Column] = [
    ("n_beats_per_min", "1/min"), ("rr_mean", "s"), ("rr_sd", "s"), ("rr_rmssd", "s"), ("rr_cv", "1"),
    ("rr_pnn50", "share"), ("rr_range", "s"),
]  # fmt: skip
_WAVES = {"p": (-0.20, -0.08), "q": (-0.06, 0.0), "r": (-0.03, 0.03), "s": (0.0, 0.08), "t": (0.15, 0.40)}


def r_peaks(x: np.ndarray, rate: float) -> np.ndarray:
    """Positions (samples) of the R peaks of one ECG ``(C, T)``.

    The slope of the 5-20 Hz band is squared, summed over leads (each divided by its 99th percentile) and averaged over
    0.12 s; peaks of this energy at least 0.3 s apart and above a third of its local 95th percentile (over 4 s) are
    beats, placed at the largest deviation of the band within 0.08 s. After Pan and Tompkins 1985, doi
    10.1109/TBME.1985.325532.
    """
    from scipy.ndimage import percentile_filter, uniform_filter1d
    from scipy.signal import butter, find_peaks, sosfiltfilt

    sos = butter(2, (5, min(20, 0.45 * rate)), "bandpass", fs=rate, output="sos")
    band = sosfiltfilt(sos, x, axis=1)
    slope = np.gradient(band, axis=1) ** 2
    energy = (slope / np.maximum(np.quantile(slope, 0.99, axis=1, keepdims=True), FLOOR)).sum(0)
    energy = uniform_filter1d(energy, max(1, round(0.12 * rate)))
    coarse = max(1, round(rate / 25))  # the local level needs no more than 25 values a second
    level = percentile_filter(energy[::coarse], 95, size=min(100, len(energy[::coarse])))
    level = np.interp(np.arange(len(energy)), np.arange(len(level)) * coarse, level)
    found, _ = find_peaks(energy, distance=max(1, round(0.3 * rate)))
    found = found[energy[found] > level[found] / 3]
    reach = round(0.08 * rate)
    height = np.abs(band).sum(0)
    at = [max(0, i - reach) + int(np.argmax(height[max(0, i - reach) : i + reach + 1])) for i in found]
    return np.unique(at)


def _ecg_columns(channels: Sequence[str], units: Sequence[str], rate: float) -> list[Column]:
    per_lead = [
        [*((f"{c}.{w}_amplitude", u) for w in _WAVES), (f"{c}.beat_sd", u), (f"{c}.sd", u),
         *((f"{c}.{b}_log_power", f"log10 {u}^2") for b in ECG_BANDS)]
        for c, u in zip(channels, units)
    ]  # fmt: skip
    return [*_RHYTHM, *(column for lead in per_lead for column in lead)]


def ecg_morphology(x: np.ndarray, rate: float) -> np.ndarray:
    """Rhythm (beats a minute, mean, SD, RMSSD, coefficient of variation, share of successive differences above 50 ms
    and range of the RR intervals) and per lead: the median beat's extreme of the P, Q, R, S and T windows relative to
    the level 0.08 to 0.05 s before R, the SD of the median beat, the SD of the lead, and log10 power of three bands.
    NaN where there are fewer than three beats. ``(B, 7 + C * 10)``."""
    f, density = spectrum(x, rate, 4.0)
    power = np.stack([_log(band_power(f, density, *b)) for b in ECG_BANDS.values()], -1)
    rows = []
    for item, lead_power in zip(x, power):
        rhythm, beat = _beats(item, rate)
        rows.append(np.concatenate([rhythm, np.concatenate([beat, item.std(-1)[:, None], lead_power], -1).ravel()]))
    return np.array(rows)


def _beats(x: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Rhythm ``(7,)`` and per lead amplitudes of the median beat ``(C, 6)`` of one ECG."""
    peaks = r_peaks(x, rate)
    before, after = round(0.25 * rate), round(0.45 * rate)
    inside = peaks[(peaks >= before) & (peaks + after < x.shape[1])]
    if len(peaks) < 3 or not len(inside):
        return np.full(len(_RHYTHM), np.nan), np.full((len(x), len(_WAVES) + 1), np.nan)
    rr = np.diff(peaks) / rate
    step = np.diff(rr)
    rhythm = [60 / rr.mean(), rr.mean(), rr.std(), np.sqrt((step**2).mean()), rr.std() / rr.mean(),
              (np.abs(step) > 0.05).mean(), np.ptp(rr)]  # fmt: skip
    beat = np.median([x[:, i - before : i + after] for i in inside], axis=0)
    time = (np.arange(before + after) - before) / rate
    beat = beat - np.median(beat[:, (time >= -0.08) & (time <= -0.05)], axis=1, keepdims=True)
    waves = []
    for low, high in _WAVES.values():
        part = beat[:, (time >= low) & (time <= high)]
        waves.append(np.take_along_axis(part, np.abs(part).argmax(1)[:, None], 1)[:, 0])
    return np.array(rhythm), np.stack([*waves, beat.std(1)], -1)


# -- wearables and any signal ------------------------------------------------------------------------------------------


def _wearable_columns(unit: str, rate: float) -> list[Column]:
    bands = [b for b, (_, high) in WEARABLE_BANDS.items() if high <= rate / 2]
    return [
        ("mean", unit), ("sd", unit), ("slope", f"{unit}/min"), ("percentile_5", unit), ("percentile_95", unit),
        ("mean_absolute_change", f"{unit}/s"), *((f"{b}_log_power", f"log10 {unit}^2") for b in bands),
    ]  # fmt: skip


def wearable_statistics(x: np.ndarray, rate: float) -> np.ndarray:
    """Per channel: mean, SD, slope of the least-squares line (unit a minute), 5th and 95th percentile, mean absolute
    change a second, and log10 power of the bands that lie below half the rate. ``(B, C * (6 + bands))``."""
    time = np.arange(x.shape[-1]) / rate / 60
    time = time - time.mean()
    low, high = np.quantile(x, (0.05, 0.95), axis=-1)
    change = np.abs(np.diff(x)).mean(-1) * rate
    slope = (x * time).sum(-1) / (time**2).sum()
    f, density = spectrum(x, rate, 60.0)
    bands = [_log(band_power(f, density, *b)) for b in WEARABLE_BANDS.values() if b[1] <= rate / 2]
    return np.stack([x.mean(-1), x.std(-1), slope, low, high, change, *bands], -1).reshape(len(x), -1)


def _octaves(rate: float) -> list[tuple[float, float]]:
    return [(rate / 2 ** (k + 1), rate / 2**k) for k in range(8, 0, -1)]


def _spectral_columns(unit: str, rate: float) -> list[Column]:
    return [
        *((f"{low:.4g}-{high:.4g}Hz_log_power", f"log10 {unit}^2") for low, high in _octaves(rate)),
        ("spectral_centroid", "Hz"), ("spectral_entropy", "bits"), ("log_sd", f"log10 {unit}"),
    ]  # fmt: skip


def spectral(x: np.ndarray, rate: float) -> np.ndarray:
    """Per channel: log10 power in eight octaves below half the rate, centroid and Shannon entropy (over the bins) of
    the spectrum, log10 SD. ``(B, C * 11)``."""
    f, density = spectrum(x, rate, 512 / rate)
    power = np.stack([band_power(f, density, *b) for b in _octaves(rate)], -1)
    share = np.maximum(density, FLOOR**2)
    share = share / share.sum(-1, keepdims=True)
    centroid, entropy = (share * f).sum(-1), -(share * np.log2(share)).sum(-1)
    last = np.stack([centroid, entropy, _log(x.var(-1)) / 2], -1)
    return np.concatenate([_log(power), last], -1).reshape(len(x), -1)


SIGNALS: dict[str, Extractor] = {
    "eeg-bandpower": Extractor(_by_channel(_eeg_columns), eeg_bandpower, 90.0, 2.0),
    "ecg-morphology": Extractor(_ecg_columns, ecg_morphology, 80.0, 3.0),
    "wearable-statistics": Extractor(_by_channel(_wearable_columns), wearable_statistics, 1.0, 10.0),
    "spectral": Extractor(_by_channel(_spectral_columns), spectral, 0.1, 0.0),
}


class _Named:
    """What baselines share: one layer, one pooling, names of the values."""

    def resolve_pool(self, layer: int | str, pool: str) -> str:
        if pool not in ("default", "head"):
            raise InputError(f"{self.info.name} gives one vector an item: pool={pool!r} is not possible, use 'default'")
        return super().resolve_pool(layer, pool)

    @property
    def feature_names(self) -> list[str]:
        """Name of each value of the embedding."""
        return [name for name, _ in self._columns()]

    @property
    def feature_units(self) -> list[str]:
        """Physical unit of each value of the embedding."""
        return [unit for _, unit in self._columns()]

    def dim(self, layer: int | str = -1, pool: str = "default") -> int:
        self.resolve_pool(layer, pool)
        return len(self._columns())


def _only_float32(kwargs: dict[str, Any], name: str) -> None:
    if kwargs.get("precision", "float32") != "float32":
        raise InputError(f"{name} is computed in float64 from float32 values; leave out precision=")


class SignalBaseline(_Named, SignalEncoder):
    """Named features of signals; channels, units and rate are those of the samples (:meth:`suited`)."""

    def __init__(self, model: nn.Module, info: Any, *args: Any, **kwargs: Any) -> None:
        _only_float32(kwargs, info.name)
        self._extractor = SIGNALS[info.arch]
        self._units: tuple[str, ...] | None = None
        super().__init__(model, info, *args, {"final": Layer(0, 1)}, head_width=0, **kwargs)

    def suited(self, samples: Any) -> SignalBaseline:
        other = super().suited(samples)
        if samples.rate is None:
            self._refuse("needs signals of one rate (rate=...)")
        least = self._extractor.least_rate
        if samples.rate < least:
            self._refuse(f"needs at least {least:g} Hz, the samples have {samples.rate:g}")
        p = other.preprocess
        names = p.channels or tuple(samples.channels)
        other._units = tuple(samples.channel_units[i] if p.unit is None else p.unit for i in p.take)
        length = max(2, round(self._extractor.least_seconds * samples.rate))
        if "duration" in samples.obs and (samples.obs["duration"] * samples.rate).max() < length - 0.5:
            self._refuse(
                f"needs windows of at least {length / samples.rate:g} s, the longest has "
                f"{samples.obs['duration'].max():g} s: read longer ones with window="
            )
        other.preprocess = replace(p, rate=samples.rate, channels=names, n_channels=len(names))
        other._least = length
        return other

    _least = 2

    def _columns(self) -> list[Column]:
        if self._units is None:
            raise InputError(
                f"the features of {self.info.name} depend on the signals' channels, units and rate: take "
                "encoder.suited(samples)"
            )
        return self._extractor.columns(self.preprocess.channels, self._units, self.preprocess.rate)

    def identity(self, layer: int | str = -1, pool: str = "default") -> dict[str, Any]:
        own = super().identity(layer, pool)
        return own | {"features": self.feature_names, "units": self.feature_units}

    def _check_batch(self, batch: torch.Tensor) -> None:
        super()._check_batch(batch)
        self._columns()
        if batch.shape[2] < self._least:
            raise InputError(
                f"{self.info.name} needs windows of at least {self._least / self.preprocess.rate:g} s, got "
                f"{batch.shape[2] / self.preprocess.rate:g}"
            )

    def _run(self, x: torch.Tensor, pools: dict[str, str]) -> dict[str, torch.Tensor]:
        values = self._extractor.values(x.cpu().double().numpy(), self.preprocess.rate)
        return {"final": torch.from_numpy(values)}


class IdentityEncoder(_Named, Encoder):
    """Vectors as they are, for features that were computed elsewhere."""

    item = "features"

    def __init__(self, model: nn.Module, info: Any, *args: Any, **kwargs: Any) -> None:
        _only_float32(kwargs, info.name)
        self._names: tuple[str, ...] | None = None
        super().__init__(model, info, *args, {"final": Layer(0, 1)}, head_width=0, **kwargs)

    def at_mpp(self, mpp: float | None, *, match_mpp: bool | None = None) -> IdentityEncoder:
        """The encoder itself; a vector has no physical scale."""
        if mpp is not None or match_mpp:
            raise InputError(f"{self.info.name} takes vectors; leave out mpp=")
        return self

    def suited(self, samples: Any) -> IdentityEncoder:
        """The encoder set to the length of the samples' vectors (that of the first that can be read)."""
        from biosae.data.items import ReadError

        self._check_item(samples)
        other = copy.copy(self)
        names = samples.channels
        for i in range(len(samples) if not names else 0):
            try:
                names = tuple(f"feature_{j:04d}" for j in range(len(samples[i])))
                break
            except ReadError:
                continue
        if not names:
            raise InputError("none of the vectors could be read")
        other._names = tuple(names)
        return other

    def _columns(self) -> list[Column]:
        if self._names is None:
            raise InputError(f"the width of {self.info.name} is that of the vectors: take encoder.suited(samples)")
        return [(name, "1") for name in self._names]

    def _check_batch(self, batch: torch.Tensor) -> None:
        if batch.ndim != 2 or batch.shape[1] != self.dim():
            raise InputError(f"a batch must be (B, {self.dim()}), got {tuple(batch.shape)}")

    def _run(self, x: torch.Tensor, pools: dict[str, str]) -> dict[str, torch.Tensor]:
        return {"final": x.clone()}


class Vector:
    """The preprocessing of :class:`IdentityEncoder`: none."""

    def spec(self) -> dict[str, Any]:
        return {}

    def __call__(self, vector: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float32))


_COLOURS = ("red", "green", "blue")
_SCALES = 4


class ColourTextureEncoder(_Named, Encoder):
    """Colour and texture of an image: per channel mean, SD and five quantiles; correlation of the channels; and log10
    energy of the grey image's gradients at four scales (1, 2, 4, 8 px)."""

    def __init__(self, model: nn.Module, info: Any, *args: Any, **kwargs: Any) -> None:
        _only_float32(kwargs, info.name)
        width = 3 * 7 + 3 + 2 * _SCALES
        super().__init__(model, info, *args, {"final": Layer(width, 1)}, head_width=width, **kwargs)

    def _columns(self) -> list[Column]:
        kinds = ("mean", "sd", "quantile_5", "quantile_25", "quantile_50", "quantile_75", "quantile_95")
        return [
            *((f"{c}.{k}", "0..1") for c in _COLOURS for k in kinds),
            *((f"{a}_{b}.correlation", "1") for a, b in (("red", "green"), ("red", "blue"), ("green", "blue"))),
            *((f"gradient_{axis}_{2**s}px", "log10 (0..1)^2") for s in range(_SCALES) for axis in ("x", "y")),
        ]

    def _check_size(self, input_hw: tuple[int, int]) -> None:
        if min(input_hw) < 2**_SCALES:
            raise InputError(f"{self.info.name} needs images of at least {2**_SCALES} px, got {input_hw}")

    def _run(self, x: torch.Tensor, pools: dict[str, str]) -> dict[str, torch.Tensor]:
        flat = x.flatten(2)
        levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], device=x.device)
        marks = torch.quantile(flat[..., :: max(1, flat.shape[-1] // 65536)], levels, dim=-1).permute(1, 2, 0)
        mean, sd = flat.mean(-1), flat.std(-1)
        colour = torch.cat([mean[..., None], sd[..., None], marks], -1).flatten(1)
        z = (flat - mean[..., None]) / sd.clamp(min=1e-6)[..., None]
        pairs = torch.stack([(z[:, a] * z[:, b]).mean(-1) for a, b in ((0, 1), (0, 2), (1, 2))], -1)
        grey, energy = x.mean(1, keepdim=True), []
        for _ in range(_SCALES):
            for axis in (3, 2):
                energy.append(grey.diff(dim=axis).square().mean((1, 2, 3)).clamp(min=FLOOR).log10())
            grey = nn.functional.avg_pool2d(grey, 2)
        return {"final": torch.cat([colour, pairs, torch.stack(energy, -1)], -1)}
