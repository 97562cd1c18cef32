"""The engine of signals: resampling, channels and units, windows, handles, scan."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from edf_files import write_edf
from hypothesis import given, settings
from hypothesis import strategies as st
from joblib import effective_n_jobs
from scipy.signal import resample_poly

import biosae as bs
from biosae.data.failures import read_failures
from biosae.data.items import ReadError
from biosae.data.samples import Samples
from biosae.errors import InputError, TooManyFailuresError
from biosae.read.channels import UNITS, canonical_channel, canonical_unit, factor, find_channels, is_trigger
from biosae.read.handles import Handles
from biosae.read.resample import _low_pass, piece, ratio
from biosae.read.scan import scan
from biosae.read.signals import Channel, Header, SignalReader
from biosae.read.windows import covering, quality

RATES = [(512, 128), (160, 100), (250, 256), (100, 256), (500, 125), (4, 64), (256, 250), (1000, 360)]


def resampled(x: np.ndarray, rate: float, target: float, start: float = 0.0, n_out: int | None = None) -> np.ndarray:
    x = np.atleast_2d(x)
    up, down = ratio(rate, target)
    n_out = -(-x.shape[1] * up // down) if n_out is None else n_out
    return piece(lambda a, n: x[:, a : a + n], x.shape[1], rate=rate, target=target, start=start, n_out=n_out)


class Memory:
    """A recording in memory."""

    def __init__(self, *channels: tuple[str, np.ndarray, float, str | None], marks: list | None = None) -> None:
        self.data = [x for _, x, _, _ in channels]
        self.reads: list[tuple[int, int]] = []
        annotations = pd.DataFrame(marks or [], columns=["onset", "duration", "label"])
        self.header = Header(
            tuple(Channel(name, rate, unit, len(x)) for name, x, rate, unit in channels),
            max(len(x) / rate for _, x, rate, _ in channels),
            annotations,
        )

    def read(self, channels, first, count):
        self.reads.append((first, count))
        return np.stack([self.data[c][first : first + count] for c in channels]).astype(float)

    def close(self):
        pass


def reader(*channels: str, unit: str = "uV", **options) -> SignalReader:
    return SignalReader(format="edf", channels=channels, unit=unit, **options)


# -- resampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "target"), RATES)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.85])
def test_a_sine_below_the_new_nyquist_keeps_amplitude_and_phase(rate, target, share):
    f = share * min(rate, target) / 2
    t = np.arange(400 * max(1, rate // target)) / rate
    y = resampled(np.sin(2 * np.pi * f * t + 0.7), rate, target)[0]
    moments = np.arange(len(y)) / target
    inside = (moments > 40 / min(rate, target)) & (moments < t[-1] - 40 / min(rate, target))
    assert inside.sum() > 50
    np.testing.assert_allclose(y[inside], np.sin(2 * np.pi * f * moments[inside] + 0.7), atol=0.01)


@pytest.mark.parametrize(("rate", "target"), [(512, 128), (160, 100), (500, 125), (1000, 360)])
@pytest.mark.parametrize("share", [1.0, 1.02, 1.1, 1.3])
def test_a_sine_above_the_new_nyquist_is_attenuated_by_60_dB(rate, target, share):
    f = share * target / 2
    assert f < rate / 2
    t = np.arange(600 * rate // target) / rate
    y = resampled(np.cos(2 * np.pi * f * t), rate, target)[0, 100:-100]
    assert 20 * np.log10(np.abs(y).max()) < -60


@pytest.mark.parametrize(("rate", "target"), [(100, 256), (160, 100), (512, 128)])
def test_a_constant_stays_the_same_constant(rate, target):
    np.testing.assert_allclose(resampled(np.full(500, 20_000.0), rate, target), 20_000.0, rtol=1e-12)


@pytest.mark.parametrize(("rate", "target"), RATES)
def test_equals_scipy_with_the_same_taps(rate, target):
    x = np.random.default_rng(0).normal(size=600 * max(1, rate // target))
    up, down = ratio(rate, target)
    other = resample_poly(x, up, down, window=_low_pass(up, down) / up)
    mine = resampled(x, rate, target)[0]
    edge = 40 * max(1, -(-target // rate))
    np.testing.assert_allclose(mine[edge:-edge], other[: len(mine)][edge:-edge], atol=1e-12)


def test_agrees_with_scipys_own_filter_on_a_band_that_both_pass():
    rng = np.random.default_rng(1)
    t = np.arange(4000) / 500
    x = sum(np.sin(2 * np.pi * f * t + p) for f, p in zip(rng.uniform(1, 35, 8), rng.uniform(0, 6, 8)))
    mine, other = resampled(x, 500, 125)[0], resample_poly(x, 1, 4, window=("kaiser", 5.0))
    np.testing.assert_allclose(mine[50:-50], other[50:-50], atol=0.01 * x.std())


@settings(max_examples=60, deadline=None)
@given(
    pair=st.sampled_from([(160, 100), (100, 256), (512, 128), (8, 8), (5, 7)]),
    gaps=st.lists(st.tuples(st.integers(0, 900), st.integers(1, 400)), max_size=4),
    start=st.integers(0, 400), n_out=st.integers(1, 200), seed=st.integers(0, 10),
)  # fmt: skip
def test_a_piece_equals_the_same_part_of_the_whole(pair, gaps, start, n_out, seed):
    rate, target = pair
    x = np.random.default_rng(seed).normal(size=(2, 900)) + 1000.0
    for first, length in gaps:
        x[seed % 2, first : first + length] = np.nan
    whole = resampled(x, rate, target, n_out=start + n_out)
    part = resampled(x, rate, target, start=start / target, n_out=n_out)
    np.testing.assert_allclose(part, whole[:, start:], rtol=0, atol=1e-9)


def test_gaps_stay_gaps_and_do_not_leak():
    x = np.full(4000, 7.0)
    x[1000:1004] = np.nan  # shorter than the filter
    x[2000:3000] = np.nan  # longer
    y = resampled(x, 100, 25)[0]
    nearest = np.rint(np.arange(len(y)) * 4).astype(int)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x[nearest]))
    np.testing.assert_allclose(y[~np.isnan(y)], 7.0, rtol=1e-12)


def test_only_what_a_piece_needs_is_read():
    recording = Memory(("Fz", np.zeros(1_000_000), 500.0, "uV"))
    reader("Fz", rate=125).window(recording, 1000.0, 2.0)
    assert sum(n for _, n in recording.reads) < 3000


@pytest.mark.parametrize(
    ("rate", "target"), [(0, 100), (100, -1), (float("nan"), 1), (1e-9, 100), (9999.7, 9998.3), (100, float("inf"))]
)
def test_rates_without_a_small_ratio_are_refused(rate, target):
    with pytest.raises(InputError):
        ratio(rate, target)
    assert ratio(44100.0, 8000.0) == (80, 441)


# -- channels and units --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [("Fc5.", "FC5"), ("EEG Fp1-REF", "fp1"), ("EEG FP1-LE", "Fp1"), ("T3", "T7"), ("T6", "P8"), ("MLII", "II"),
     ("T4-T6", "T8-P8"), ("EEG F7-T3", "F7-T7"), ("POL C3", "C3"), ("Af7.", "AF7")],
)  # fmt: skip
def test_two_spellings_of_one_electrode(one, other):
    assert canonical_channel(one) == canonical_channel(other)
    assert find_channels([one], [other]) == [(0, None)]


def test_channels_that_are_not_the_same():
    for wanted, present in (("EEG 1", "EOG 1"), ("C3", "C3-A2"), ("ECG 1", "EMG 1"), ("Fp1", "Fp2")):
        with pytest.raises(InputError):
            find_channels([wanted], [present])
    with pytest.raises(InputError, match="fits 2 channels"):
        find_channels(["C3"], ["EEG C3-REF", "POL C3"])


def test_a_difference_is_a_channel_of_that_name_or_two():
    assert find_channels(["Fp1-F7"], ["F7", "EEG FP1-F7", "Fp1"]) == [(1, None)]
    assert find_channels(["Fp1-F7", "Cz"], ["EEG F7-REF", "Cz..", "Fp1."]) == [(2, 0), (1, None)]
    with pytest.raises(InputError, match="Cz"):
        find_channels(["Fp1-Cx"], ["Fp1", "Cz"])


def test_triggers():
    assert all(map(is_trigger, ["Status", "STI 014", "STI101", "Trigger", "Event marker"]))
    assert not any(map(is_trigger, ["Fz", "Stimulated Fz", "EEG 001", "P3"]))


@given(st.sampled_from(sorted(UNITS)), st.sampled_from(sorted(UNITS)))
def test_factors_go_there_and_back(one, other):
    if UNITS[one][0] != UNITS[other][0]:
        with pytest.raises(InputError, match="cannot be turned"):
            factor(one, other)
        return
    assert factor(one, other) * factor(other, one) == pytest.approx(1, rel=1e-12)


def test_worked_factors_and_spellings_of_units():
    assert factor("V", "uV") == 1e6
    assert factor("mV", "uV") == 1000
    assert factor("T/m", "fT/cm") == 1e13
    for text, unit in {
        "µV": "uV",
        "μV": "uV",
        "UV": "uV",
        "mv": "mV",
        "Degc": "degC",
        "": None,
        "Boolean": None,
    }.items():
        assert canonical_unit(text) == unit
    assert canonical_unit(None) is None
    with pytest.raises(InputError, match="no unit 'parsec'"):
        factor("parsec", "uV")


# -- windows of one recording --------------------------------------------------------------------------------------


def test_units_montage_and_reference():
    t = np.arange(100.0)
    recording = Memory(("EEG Fp1-REF", t, 100, "mV"), ("F7.", 2 * t, 100, "uV"), ("Cz", -t, 100, None))
    x = reader("Fp1-F7", "F7", "Fp1", units={"Cz": "uV"}).window(recording, 0.1, 0.5)
    np.testing.assert_allclose(x, np.stack([1000 * t - 2 * t, 2 * t, 1000 * t])[:, 10:60], rtol=1e-6)
    x = reader("F7", "Cz", units="uV", reference="average").window(recording, 0, 1)
    np.testing.assert_allclose(x, [1.5 * t, -1.5 * t], rtol=1e-6)
    with pytest.raises(ReadError, match=r"no_unit.*'Cz' states no unit.*units="):
        reader("F7", "Cz").window(recording, 0, 1)
    with pytest.raises(ReadError, match=r"no_unit.*cannot be turned into.*channels="):
        reader("F7", unit="degC").window(recording, 0, 1)
    assert recording.reads and reader("F7").spec()["kind"] == "signal"


def test_the_average_leaves_gaps_out():
    a, b = np.full(10, 4.0), np.full(10, 8.0)
    b[3] = np.nan
    x = reader("a", "b", reference="average").window(Memory(("a", a, 10, "uV"), ("b", b, 10, "uV")), 0, 1)
    assert x[:, 0].tolist() == [-2, 2] and x[0, 3] == 0 and np.isnan(x[1, 3])


def test_mixed_rates_are_refused_or_resampled():
    slow, fast = np.arange(20.0), np.arange(200.0) / 10
    recording = Memory(("a", slow, 10, "uV"), ("b", fast, 100, "uV"))
    with pytest.raises(ReadError, match=r"unsupported.*10, 100 Hz.*rate="):
        reader("a", "b").window(recording, 0, 1)
    x = reader("a", "b", rate=20).window(recording, 0.5, 1.0)
    np.testing.assert_allclose(x, np.tile(5 + np.arange(20) / 2, (2, 1)), atol=0.05)
    with pytest.raises(ReadError, match=r"unsupported.*whole numbers"):
        reader("a", rate=0.00031).window(recording, 0, 1)


@given(st.floats(0, 5), st.sampled_from([10.0, 128.0, 99.5]))
@settings(deadline=None)
def test_a_window_begins_at_the_nearest_sample(start, rate):
    recording = Memory(("a", np.arange(10 * int(rate)), rate, "uV"))
    x = reader("a").window(recording, start, 1.0)
    assert x.shape == (1, round(rate))
    assert abs(x[0, 0] / rate - start) <= 0.5 / rate + 1e-6
    assert (np.diff(x[0]) == 1).all()


def test_windows_beyond_the_recording_or_below_a_sample():
    recording = Memory(("a", np.arange(100), 10, "uV"))
    for start, duration in ((9.5, 1.0), (-1, 1), (0, 0.01)):
        with pytest.raises(ReadError, match="too_short"):
            reader("a").window(recording, start, duration)


def test_covering():
    marks = pd.DataFrame({"onset": [0.0, 4.0, 5.0], "duration": [4.0, 1.0, 2.0], "label": ["T0", "T1", "T0"]})
    assert covering(marks, 0, 4) == ("T0", 1.0)
    assert covering(marks, 3, 4) == ("T0", 0.75)
    assert covering(marks, 4, 1) == ("T1", 1.0)
    assert covering(marks, 7, 1) == (None, 0.0)
    one = pd.DataFrame({"onset": [0.0], "duration": [1.0], "label": ["AFIB"]})
    assert covering(one, 0, 100) == (None, 0.0), "a mark on one hundredth of a window does not name it"
    assert covering(one, 0, 2) == ("AFIB", 0.5)


def test_quality_of_a_window():
    x = np.ones((4, 100)) * np.sin(np.arange(100))
    x *= 50
    x[1] = 3.0  # flat
    x[2, :60] = np.nan  # mostly missing
    x[3, :25] = 500  # artefact
    found = quality(x.astype(np.float32), reader("a", "EEG b", "c", "d"), 150.0)
    assert found["missing_share"] == pytest.approx(0.15)
    assert (found["flat_channels"], found["bad_channels"]) == ("EEG b", "EEG b, c")
    assert found["artefact_share"] == pytest.approx(25 / 340)
    unlooked = quality(np.full((1, 9), np.nan, np.float32), reader("a"), None)
    assert np.isnan(unlooked["artefact_share"])
    assert (unlooked["flat_channels"], unlooked["bad_channels"]) == ("", "a")


def test_header_shows_rates_units_and_marks():
    shown = repr(Memory(("a", np.zeros(20), 10, "uV"), ("b", np.zeros(2), 1, None), marks=[(0, 1, "T1")]).header)
    assert "2 channels, 2 s, 1 annotations" in shown
    assert "1 at 10 Hz in uV: a" in shown
    assert "1 at 1 Hz in no stated unit: b" in shown
    assert "'T1' x 1" in shown


# -- tables of recordings ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i, name in enumerate("abc"):
        x = rng.normal(0, 20, (2, 1000 + 100 * i))
        marks = [(1.0, 2.0, "T1"), (5.0, 2.0, "T2"), (5.0, 1.0, "T2"), (9.0, 0.0, "click")]
        write_edf(tmp_path / f"{name}.edf", {"Fz": (x[0], 100), "Cz": (x[1], 100)}, kind="EDF+C", marks=marks)
    return tmp_path


def test_windows_of_one_length(folder):
    samples = bs.read.edf(folder, patient=None, window=3.0, step=1.5, n_jobs=1)
    assert samples.obs.groupby("recording").size().to_dict() == {"a.edf": 5, "b.edf": 6, "c.edf": 7}
    assert samples.ids[:3].tolist() == ["a.edf@0", "a.edf@1.5", "a.edf@3"]
    assert (samples.rate, samples.unit, samples.channels) == (100, "uV", ("Fz", "Cz"))
    np.testing.assert_array_equal(samples["a.edf@1.5"][:, 150:], samples["a.edf@3"][:, :150])
    row = samples.obs.loc["a.edf@1.5"]
    assert (row["annotation"], row["channel_rates"]) == ("T1", "100")
    assert row["annotation_share"] == pytest.approx(0.5)


def test_windows_around_annotations(folder):
    samples = bs.read.edf(folder, patient=None, around=["T2", "T1"], before=0.5, after=1.0, n_jobs=1)
    assert samples.ids[:3].tolist() == ["a.edf@0.5", "a.edf@4.5", "a.edf@4.5#2"]
    assert samples.obs["annotation"][:3].tolist() == ["T1", "T2", "T2"]
    assert all(samples[i].shape == (2, 150) for i in range(len(samples)))
    own = bs.read.edf(folder, patient=None, around="T2", n_jobs=1)
    assert own.obs["duration"][:2].tolist() == [2.0, 1.0]
    with pytest.raises(InputError, match=r"no annotation 'T3'; there are 'T2' x 2"):
        bs.read.edf(folder, patient=None, around="T3", n_jobs=1)
    with pytest.raises(InputError, match="no duration"):
        bs.read.edf(folder, patient=None, around="click", n_jobs=1)


def test_ids_of_a_long_recording_differ(tmp_path):
    write_edf(tmp_path / "long.edf", {"Fz": (np.sin(np.arange(40_000)), 1)}, seconds=100.0)
    samples = bs.read.edf(tmp_path, patient=None, window=2.0, quality=False, n_jobs=1)
    assert len(samples) == 20_000
    assert samples.ids[-1] == "long.edf@39998"


@pytest.mark.parametrize(
    ("options", "said"),
    [({"window": 1, "around": "T1"}, "not both"), ({"step": 1}, "needs window"), ({"window": 0}, "above 0"),
     ({"window": float("inf")}, "above 0"), ({"rate": -3}, "above 0"), ({"unit": "parsec"}, "no known unit"),
     ({"before": float("nan")}, "before"), ({"channels": "Fz"}, "list of names"), ({"reference": "mean"}, "average"),
     ({"window": 100}, "it has 10 s")],
)  # fmt: skip
def test_questions_that_are_refused(folder, options, said):
    with pytest.raises(InputError, match=said):
        bs.read.edf(folder, patient=None, n_jobs=1, **options)


@pytest.mark.parametrize("name", ["duration", "annotation", "missing_share"])
def test_a_column_that_the_reader_fills_is_refused_before_any_file_is_read(tmp_path, name):
    table = pd.DataFrame({"path": ["absent.edf"], name: [1.0]})
    with pytest.raises(InputError, match=f"column '{name}', which this reader fills; rename it"):
        bs.read.edf(table, patient=None, root=tmp_path, window=1.0)


def test_refusals_say_the_remedy(folder):
    with pytest.raises(InputError, match="patient=None"):
        bs.read.edf(folder)
    with pytest.raises(TooManyFailuresError, match=r"no_channel: no channel 'Oz'.*'Fz'"):
        bs.read.edf(folder, patient=None, channels=["Oz"], unit="uV", n_jobs=1)
    write_edf(folder / "d.edf", {"Fz": (np.zeros(100), 100), "Cz": (np.zeros(100), 100)}, unit="furlong")
    with pytest.raises(TooManyFailuresError, match=r"states the unit 'furlong', which is unknown; pass units="):
        bs.read.edf(folder, patient=None, n_jobs=1)
    assert len(bs.read.edf(folder, patient=None, units="uV", n_jobs=1)) == 4
    table = pd.DataFrame({"path": ["a.edf"], "start": [3]})
    with pytest.raises(InputError, match="a column 'start'"):
        bs.read.edf(table, patient=None, root=folder, n_jobs=1)


def test_a_window_below_one_sample_is_listed(folder):
    with pytest.raises(TooManyFailuresError, match="less than one sample at 100 Hz"):
        bs.read.edf(folder, patient=None, window=1.0, step=1e-5, n_jobs=1)


# -- handles -------------------------------------------------------------------------------------------------------


class Opened:
    def __init__(self, path: str) -> None:
        if path == "bad":
            raise ReadError("missing", "bad")
        self.path, self.closed = path, False

    def close(self) -> None:
        self.closed = True


def test_the_least_recently_used_handle_is_closed():
    handles = Handles(Opened, size=2)
    a, b = handles.get("a"), handles.get("b")
    assert handles.get("a") is a
    c = handles.get("c")
    assert (a.closed, b.closed, c.closed) == (False, True, False)
    assert handles.get("b") is not b
    with pytest.raises(ReadError):
        handles.get("bad")
    assert handles.get("b") is handles.get("b")


def test_a_file_that_was_written_anew_is_opened_again(tmp_path):
    handles, path = Handles(Opened), str(tmp_path / "a")
    Path(path).write_text("1")
    first = handles.get(path)
    assert handles.get(path) is first
    Path(path).write_text("22")
    assert handles.get(path) is not first


def test_each_thread_has_handles_of_its_own_and_copies_have_none():
    handles = Handles(Opened)
    mine, others = handles.get("a"), []
    thread = threading.Thread(target=lambda: others.append(handles.get("a")))
    thread.start()
    thread.join()
    assert others[0] is not mine
    assert pickle.loads(pickle.dumps(handles)).get("a") is not mine  # noqa: S301


def test_a_fork_opens_for_itself():
    handles = Handles(Opened)
    mine = handles.get("a")
    child = os.fork()
    if child == 0:
        os._exit(0 if handles.get("a") is not mine else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert handles.get("a") is mine


# -- scan ----------------------------------------------------------------------------------------------------------


class Length:
    """Characters of the path; paths with an x cannot be used."""

    def __call__(self, row):
        if "x" in row["path"]:
            raise ReadError("unreadable", "it has an x")
        return len(row["path"])


def rows(n: int, *, bad: tuple[int, ...] = ()) -> Samples:
    names = [f"{'x' if i in bad else ''}{'p' * (i + 1)}" for i in range(n)]
    return Samples(
        pd.DataFrame({"path": names}, index=[f"s{i}" for i in range(n)]), reader("a"), roles={"patient": None}
    )


def test_scan_keeps_the_order_and_lists_failures(tmp_path):
    out = tmp_path / "failures.csv"
    options = {"max_failures": 0.2, "failures": out, "stage": "look", "unit": "file"}
    found, lost = scan(rows(20, bad=(3, 7)), Length(), n_jobs=1, **options)
    assert list(found) == [f"s{i}" for i in range(20) if i not in (3, 7)]
    assert found["s9"] == 10
    assert lost == [[f"s{i}", "look", "unreadable", "it has an x"] for i in (3, 7)]
    assert read_failures(out).to_numpy().tolist() == lost
    again, lost_again = scan(rows(20, bad=(3, 7)), Length(), n_jobs=2, **options)
    assert (list(again.items()), lost_again) == (list(found.items()), lost)


class Worker:
    """Number of the process that looks."""

    def __call__(self, row):
        return os.getpid()


@pytest.mark.skipif(effective_n_jobs(-1) < 2, reason="one core")
def test_scan_takes_minus_one_for_every_core():
    options = {"max_failures": 0, "failures": None, "stage": "look", "unit": "file"}
    assert os.getpid() not in scan(rows(20), Worker(), n_jobs=-1, **options)[0].values()
    for one in (0, 1):
        assert set(scan(rows(3), Worker(), n_jobs=one, **options)[0].values()) == {os.getpid()}


def test_scan_stops_when_too_many_fail(tmp_path):
    options = {"n_jobs": 1, "max_failures": 0.1, "stage": "look", "unit": "file"}
    with pytest.raises(TooManyFailuresError, match=r"s3: unreadable: it has an x.*failures='failures.csv'"):
        scan(rows(20, bad=(3, 5, 7)), Length(), failures=None, **options)
    with pytest.raises(TooManyFailuresError, match="listed in"):
        scan(rows(20, bad=(3, 5, 7)), Length(), failures=tmp_path / "f.csv", **options)
    assert len(read_failures(tmp_path / "f.csv")) == 3


def test_scan_shows_progress(monkeypatch, capfd):
    monkeypatch.setattr(bs.settings, "progress", True)
    scan(rows(5), Length(), n_jobs=None, max_failures=0, failures=None, stage="look", unit="file")
    assert "look: 100%" in capfd.readouterr().err


def test_arguments_that_are_no_numbers_or_make_no_sense_are_refused(tmp_path):
    table = pd.DataFrame({"path": ["a.edf"]})
    for options, words in (
        ({"window": "2"}, "window='2' must be a number"), ({"rate": "100"}, "rate='100'"),
        ({"window": 2.0, "before": 0.5}, "around="), ({"artefact": 150.0}, "unit='uV'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            bs.read.edf(table, root=tmp_path, patient=None, **options)


def test_a_window_of_more_values_than_memory_holds_is_refused():
    class Long(Memory):
        def read(self, channels, first, count):
            raise AssertionError("nothing is read")

    recording = Long(("a", np.zeros(10), 1e9, "uV"))
    object.__setattr__(recording.header, "channels", (recording.header.channels[0]._replace(n=10**12),))
    with pytest.raises(ReadError, match=r"unsupported.*pass window="):
        reader("a").window(recording, 0, 900)
