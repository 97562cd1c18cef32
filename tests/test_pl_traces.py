"""Traces: what is drawn is what was given, no peak is lost, the bar is as long as it says."""

import numpy as np
import pytest

from biosae import pl
from biosae.errors import InputError
from biosae.pl.traces import picture


def test_peaks_survive_thinning_and_gaps_stay():
    x = np.zeros((2, 50_000))
    x[0, 33_333] = 7.0
    x[1, 100:200] = np.nan
    ax = pl.traces(x, rate=500.0, unit="uV", channels=["Cz", "Pz"])
    first, second = (line.get_ydata() for line in ax.lines[:2])
    assert np.nanmax(first) == 7.0
    peak = ax.lines[0].get_xdata()[np.nanargmax(first)]
    assert peak == pytest.approx(33_333 / 500, abs=0.1)
    assert np.isnan(second).any()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["Cz", "Pz"]
    assert ax.get_xlabel() == "time (s)"


@pytest.mark.parametrize("at", [0, 2_999, 3_000, 3_001])  # 1001 stretches of 3, the last of 2
def test_no_peak_is_lost_at_either_end(at):
    x = np.zeros((1, 3_002))
    x[0, at] = -7.0
    line = pl.traces(x, rate=100.0, unit="uV").lines[0]
    assert line.get_ydata().min() == -7.0
    assert line.get_xdata()[np.argmin(line.get_ydata())] == pytest.approx(at / 100, abs=0.03)
    assert line.get_xdata().max() <= 30.02


def test_names_are_of_all_channels_or_of_none():
    x = np.zeros((3, 50))
    for names in (["Cz"], ["Cz", "Pz"], list("abcd")):
        with pytest.raises(InputError, match=f"{len(names)} names for 3 channels"):
            pl.traces(x, rate=1.0, unit="uV", channels=names)
    ax = pl.traces(x, rate=1.0, unit="uV", channels=list("abc"), max_channels=2)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]


def test_bar_is_as_long_as_its_label_says():
    x = np.vstack([np.linspace(-30, 30, 400), np.linspace(-3, 3, 400)])
    ax = pl.traces(x, rate=100.0, unit="uV")
    bar = ax.lines[-1].get_ydata()
    assert ax.texts[-1].get_text() == "50 µV"
    assert abs(bar[0] - bar[1]) == 50


def test_short_traces_are_drawn_point_by_point():
    x = np.random.default_rng(0).normal(size=(1, 300))
    ax = pl.traces(x, rate=100.0, unit="mV", start=12.0)
    drawn = ax.lines[0].get_ydata()
    assert np.allclose(drawn, x[0] - np.median(x[0]))
    assert ax.get_xlim() == (12.0, 15.0)
    with pytest.raises(InputError, match="channels, time"):
        pl.traces(x[0], rate=1.0, unit="mV")


def test_pictures_of_every_kind():
    image = np.zeros((4, 5, 3), np.uint8)
    assert picture(image) is image
    wave = np.sin(np.linspace(0, 20, 500, dtype=np.float32))[None]
    drawn = picture(wave)
    assert drawn.shape == (224, 224, 3)
    assert (drawn < 128).any()
    flat = picture(np.zeros((1, 500), np.float32))
    assert (flat < 128).any(axis=(1, 2)).sum() < 8 < (drawn < 128).any(axis=(1, 2)).sum()
    assert picture(np.arange(8, dtype=np.float32)).shape == (224, 224, 3)
