"""bs.read.edf and bs.read.record: files of known content, the formats' own libraries, and real recordings."""

from __future__ import annotations

import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from edf_files import write_edf, write_gdf

import biosae as bs
from biosae.data.items import ReadError
from biosae.data.samples import Samples
from biosae.errors import InputError, TooManyFailuresError
from biosae.read.edf import open_edf
from biosae.read.resample import piece

STEP = 2000 / 65535  # of 16-bit files with limits of +-1000 uV


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 100, (3, 1000))


@pytest.fixture
def eeg_formats(shared) -> Path:
    folder = shared / "data" / "eeg_formats"
    if not folder.is_dir():
        pytest.skip("no pack eeg_formats")
    return folder


def everything(path: Path) -> tuple:
    recording = open_edf(path)
    channels = recording.header.channels
    alike = [i for i, c in enumerate(channels) if c.rate == channels[0].rate]
    return recording.header, recording.read(alike, 0, channels[0].n)


# -- files of known content ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "step"), [("", STEP), ("EDF+C", STEP), ("BDF", 2000 / 2**24), ("BDF+C", 2000 / 2**24)]
)
def test_edf_and_bdf_give_the_values_that_were_written(tmp_path, x, kind, step):
    marks = [(1.5, 0.25, "spike"), (0.5, 0.0, "眼")]
    path = tmp_path / f"a.{kind[:3].lower() or 'edf'}"
    write_edf(path, {"Fz": (x[0], 100), "Cz": (x[1], 100)}, kind=kind, marks=marks)
    header, values = everything(path)
    assert [tuple(c) for c in header.channels] == [("Fz", 100.0, "uV", 1000), ("Cz", 100.0, "uV", 1000)]
    np.testing.assert_allclose(values, x[:2], atol=0.51 * step)
    expected = [(0.5, 0.0, "眼"), (1.5, 0.25, "spike")] if "+" in kind else []
    assert list(header.annotations.itertuples(index=False, name=None)) == expected
    assert header.seconds == 10
    assert header.facts["format"] == (kind or "EDF")


def test_random_access_equals_the_whole(tmp_path, x):
    for kind in ("EDF+C", "BDF"):
        path = write_edf(tmp_path / f"a.{kind[:3]}", {"Fz": (x[0], 100), "Cz": (x[1], 50)}, kind=kind, seconds=0.5)
        recording = open_edf(path)
        whole = recording.read([0], 0, 1000)
        for first, count in ((0, 1), (49, 2), (50, 50), (333, 400), (999, 1)):
            np.testing.assert_array_equal(recording.read([0], first, count), whole[:, first : first + count])


def test_mixed_rates_keep_their_rates(tmp_path):
    pyedflib = pytest.importorskip("pyedflib")
    path = str(tmp_path / "psg.edf")
    rates, units = [200, 100, 1], ["uV", "mV", "degC"]
    data = [np.sin(np.arange(r * 20) / r) * 90 for r in rates]
    writer = pyedflib.EdfWriter(path, 3, file_type=pyedflib.FILETYPE_EDFPLUS)
    heads = [
        {"label": n, "dimension": u, "sample_frequency": r, "physical_max": 100, "physical_min": -100,
         "digital_max": 32767, "digital_min": -32768, "transducer": "AgAgCl", "prefilter": "HP:0.1Hz"}
        for n, u, r in zip(("EEG Fpz-Cz", "EMG", "Temp"), units, rates)
    ]  # fmt: skip
    writer.setSignalHeaders(heads)
    writer.writeSamples(data)
    writer.writeAnnotation(3.5, 2.0, "Sleep stage 2")
    writer.close()
    header = bs.read.record(path)
    assert [(c.rate, c.unit, c.n) for c in header.channels] == [(200, "uV", 4000), (100, "mV", 2000), (1, "degC", 20)]
    assert header.annotations.iloc[0].tolist() == [3.5, 2.0, "Sleep stage 2"]
    for i, values in enumerate(data):
        np.testing.assert_allclose(open_edf(path).read([i], 0, len(values))[0], values, atol=200 / 65535)
    table = pd.DataFrame({"path": [path]})
    with pytest.raises(TooManyFailuresError, match=r"channels of 100, 200 Hz; pass rate="):
        bs.read.edf(table, patient=None, channels=["Fpz-Cz", "EMG"], n_jobs=1)
    samples = bs.read.edf(table, patient=None, channels=["Fpz-Cz", "EMG"], rate=50, window=5.0, n_jobs=1)
    assert samples.obs["channel_rates"].unique().tolist() == ["100,200"]
    t = 5 + np.arange(250) / 50
    np.testing.assert_allclose(samples[1], np.stack([90 * np.sin(t), 90e3 * np.sin(t)]), rtol=0.01, atol=5)


def test_discontinuous_files_have_gaps(tmp_path, x):
    onsets = [0.25, 1.25, 2.25, 7.25, 8.25, 20.75, 21.75, 22.75, 23.75, 24.75]
    marks = [(7.5, 1.0, "after the gap")]
    path = write_edf(
        tmp_path / "d.edf", {"Fz": (x[0], 100), "slow": (x[1, :100], 10)}, kind="EDF+D", onsets=onsets, marks=marks
    )
    header, values = everything(path)
    assert header.channels[0].n == 2550
    assert header.seconds == 25.5
    assert header.annotations.iloc[0].tolist() == [7.25, 1.0, "after the gap"]
    expected = np.full(2550, np.nan)
    for k, onset in enumerate(onsets):
        first = round((onset - 0.25) * 100)
        expected[first : first + 100] = x[0, 100 * k : 100 * (k + 1)]
    np.testing.assert_allclose(values[0], expected, atol=0.51 * STEP)
    np.testing.assert_array_equal(open_edf(path).read([0], 290, 500)[0], values[0, 290:790])
    samples = bs.read.edf(tmp_path, patient=None, channels=["Fz"], window=2.0, n_jobs=1)
    assert samples.obs["missing_share"][:5].tolist() == [0.0, 0.5, 1.0, 0.5, 0.5]
    assert np.isnan(samples[2]).all()
    np.testing.assert_allclose(samples[1][0, :100], x[0, 200:300], atol=0.02)


@pytest.mark.parametrize(
    ("rate", "seconds", "onsets", "first"),
    [
        (100, 1.0, [0, 1, 10.005, 11.005, 12.005, 20.01], [0, 100, 1001, 1101, 1201, 2001]),  # at half samples
        (128, 0.125, [0, 0.12, 0.25, 0.38, 0.5, 0.62], [0, 16, 32, 48, 64, 80]),  # two decimals
        (512, 1.0, [0, 1.001, 2.001, 3.001, 4.003, 5.003], [0, 512, 1024, 1536, 2050, 2562]),  # a gap of a sample
        (100, 1.0, [0, 1.004, 2.008, 3.012, 4.016, 5.02], [0, 100, 200, 301, 401, 501]),  # a clock that is slow
    ],
)
def test_records_that_follow_each_other_lose_no_sample(tmp_path, x, rate, seconds, onsets, first):
    size = round(rate * seconds)
    written = np.resize(x, 6 * size)
    path = write_edf(tmp_path / "d.edf", {"Fz": (written, rate)}, kind="EDF+D", seconds=seconds, onsets=onsets)
    _, values = everything(path)
    seen = values[0][np.isfinite(values[0])]
    np.testing.assert_allclose(seen, written, atol=0.51 * STEP)  # every sample, once, in order
    for k, start in enumerate(first):
        np.testing.assert_allclose(
            values[0, start : start + size], written[k * size : (k + 1) * size], atol=0.51 * STEP
        )


@pytest.mark.parametrize(("version", "dtype"), [("1.25", "<i2"), ("2.10", "<i2"), ("2.51", "i3"), ("2.20", "<f4")])
def test_gdf_gives_the_values_that_were_written(tmp_path, version, dtype):
    rng = np.random.default_rng(0)
    fast, slow = rng.integers(-3000, 3000, 500), rng.integers(-3000, 3000, 50)
    events = [(150, 769, 200), (300, 770, 100)]
    path = write_gdf(
        tmp_path / "a.gdf", {"C3": (fast, 100), "Resp": (slow, 10)}, version=version, events=events, dtype=dtype
    )
    recording = open_edf(path)
    assert [tuple(c) for c in recording.header.channels] == [("C3", 100, "uV", 500), ("Resp", 10, "uV", 50)]
    np.testing.assert_allclose(recording.read([0], 120, 300)[0], fast[120:420] / 10, atol=1e-9)
    np.testing.assert_allclose(recording.read([1], 0, 50)[0], slow / 10, atol=1e-9)
    assert recording.header.annotations.to_numpy().tolist() == [[1.5, 2.0, "769"], [3.0, 1.0, "770"]]


def test_names_that_repeat_and_channels_without_a_scale(tmp_path, x):
    path = write_edf(tmp_path / "a.edf", {"EKG": (x[0], 100), "EKG ": (x[1], 100), "Fz": (x[2], 100)})
    assert [c.name for c in bs.read.record(path).channels] == ["EKG-0", "EKG-1", "Fz"]
    raw = bytearray(path.read_bytes())
    at = 256 + 3 * (16 + 80 + 8)  # physical minima, then maxima
    raw[at : at + 8] = raw[at + 24 : at + 32]
    path.write_bytes(raw)
    header, values = everything(path)
    assert header.facts["unscaled"] == ["EKG-0"]
    assert np.isnan(values[0]).all()
    np.testing.assert_allclose(values[2], x[2], atol=STEP)


def test_nothing_of_the_patient_is_kept(tmp_path, x):
    path = write_edf(
        tmp_path / "a.edf", {"Fz": (x[0], 100)}, kind="EDF+C", patient="4711 M 01-JAN-1950 Erika_Mustermann"
    )
    said = repr(bs.read.record(path).facts) + repr(bs.read.record(path))
    samples = bs.read.edf(tmp_path, patient=None, n_jobs=1)
    said += samples.obs.to_csv() + repr(samples.meta)
    assert not any(word in said for word in ("4711", "1950", "Erika", "BK/JOP", "16.09", "2002"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda b: b"", "empty"),
        (lambda b: bytes(1000), "empty"),
        (lambda b: b[:200], "truncated"),
        (lambda b: b[:600], "truncated"),
        (lambda b: b[:-1], "truncated"),
        (lambda b: b + bytes(5000), "unreadable"),
        (lambda b: b"1" + b[1:], "unreadable"),
        (lambda b: b[:236] + b"abc     " + b[244:], "unreadable"),
        (lambda b: b[:236] + b"99999999" + b[244:], "truncated"),
        (lambda b: b[:236] + b"-1      " + b[244:], None),  # a recorder that did not finish
        (lambda b: b[:236] + b"-7      " + b[244:], "unreadable"),
        (lambda b: b[:244] + b"0       " + b[252:], "unreadable"),
        (lambda b: b[:244] + b"1e999   " + b[252:], "unreadable"),
        (lambda b: b[:252] + b"9999" + b[256:], "unreadable"),
    ],
)
def test_damaged_edf_says_what_is_wrong(tmp_path, x, damage, reason):
    path = write_edf(tmp_path / "a.edf", {"Fz": (x[0], 100), "Cz": (x[1], 100)})
    path.write_bytes(damage(path.read_bytes()))
    if reason is None:
        assert bs.read.record(path).seconds == 10
        return
    with pytest.raises(ReadError) as caught:
        open_edf(path)
    assert caught.value.reason == reason


def test_damaged_times_of_a_discontinuous_file(tmp_path, x):
    for onsets, reason in (([0, 1, 1.2], "unreadable"), ([0, 1, 9e5], "unsupported")):
        path = write_edf(tmp_path / "d.edf", {"Fz": (x[0], 100)}, kind="EDF+D", n_records=3, onsets=onsets)
        with pytest.raises(ReadError) as caught:
            open_edf(path)
        assert caught.value.reason == reason


def test_missing_and_foreign_files(tmp_path):
    for name in ("no.edf", "no.gdf", "no.set", "no.vhdr", "no.fif"):
        with pytest.raises(ReadError, match="missing"):
            open_edf(tmp_path / name)
    (tmp_path / "a.set").write_bytes(b"MATLAB 7.3 MAT-file".ljust(600))
    with pytest.raises(ReadError, match=r"unsupported.*-v7"):
        open_edf(tmp_path / "a.set")
    (tmp_path / "a.fif").write_bytes(b"\x80\x04\x95pickle" * 30)
    with pytest.raises(ReadError, match="unreadable: not a FIF"):
        open_edf(tmp_path / "a.fif")
    with pytest.raises(InputError, match=r"did you mean '.edf'"):
        bs.read.record(tmp_path / "a.edff")


def test_broken_recordings_are_listed_and_the_rest_is_read(tmp_path, x):
    for name in "abcd":
        write_edf(tmp_path / f"{name}.edf", {"Fz": (x[0], 100)})
    (tmp_path / "b.edf").write_bytes((tmp_path / "b.edf").read_bytes()[:-400])
    write_edf(tmp_path / "c.edf", {}, kind="EDF+C", marks=[(0, 30, "Sleep stage W")])
    samples = bs.read.edf(
        tmp_path, patient=None, window=5.0, max_failures=0.5, failures=tmp_path / "failures.csv", n_jobs=1
    )
    assert samples.obs["recording"].tolist() == ["a.edf", "a.edf", "d.edf", "d.edf"]
    assert samples.failures[["item", "reason"]].to_numpy().tolist() == [["b.edf", "truncated"], ["c.edf", "no_channel"]]
    assert "b.edf,read/edf,truncated" in (tmp_path / "failures.csv").read_text()
    with pytest.raises(TooManyFailuresError, match=r"b.edf: truncated"):
        bs.read.edf(tmp_path, patient=None, n_jobs=1)


def test_samples_travel(tmp_path, x):
    for name in "ab":
        write_edf(
            tmp_path / f"{name}.edf",
            {"Fz": (x[0], 100), "F7": (x[1], 100), "Status": (x[2], 100)},
            units={"Status": "Boolean"},
        )
    table = pd.DataFrame({"file": ["a.edf", "b.edf"], "subject": ["p1", "p2"], "sex": ["f", "m"]})
    table.to_csv(tmp_path / "t.csv", index=False)
    samples = bs.read.edf(
        tmp_path / "t.csv",
        patient="subject",
        path="file",
        channels=["Fz-F7", "F7"],
        unit="mV",
        rate=80,
        window=2.0,
        n_jobs=1,
    )
    assert (samples.item, samples.unit, samples.rate) == ("signal", "mV", 80)
    assert samples.obs["patient"].tolist() == ["p1"] * 5 + ["p2"] * 5
    samples.save(tmp_path / "s.parquet")
    for other in (Samples.load(tmp_path / "s.parquet"), pickle.loads(pickle.dumps(samples))):  # noqa: S301
        assert other.fingerprint == samples.fingerprint
        np.testing.assert_array_equal(other[7], samples[7])
    raw = np.stack([x[0] - x[1], x[1]]) / 1000
    expected = piece(lambda a, n: raw[:, a : a + n], 1000, rate=100, target=80, start=4.0, n_out=160)
    np.testing.assert_allclose(samples[2], expected, atol=2 * STEP / 1000)
    assert list(bs.read.edf(tmp_path, patient=None, n_jobs=1).channels) == ["Fz", "F7"]  # no trigger channel


def test_one_recording_is_a_source(tmp_path, x):
    path = write_edf(tmp_path / "a.edf", {"Fz": (x[0], 100)})
    samples = bs.read.edf(path, patient=None, window=2.0, n_jobs=1)
    assert samples.ids[:2].tolist() == ["a.edf@0", "a.edf@2"]
    np.testing.assert_allclose(samples[1][0], x[0, 200:400], atol=STEP)


def test_threads_read_alike(tmp_path, x):
    for name in "abcdefgh":  # more than handles are kept
        write_edf(tmp_path / f"{name}.edf", {"Fz": (x[0] * ord(name) / 100, 100)})
    samples = bs.read.edf(tmp_path, patient=None, window=1.0, n_jobs=1)
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    one = [samples[i] for i in order]
    names = set()

    def read(i: int) -> np.ndarray:
        names.add(threading.current_thread().name)
        return samples[i]

    with ThreadPoolExecutor(4) as pool:
        for mine, other in zip(one, pool.map(read, order)):
            np.testing.assert_array_equal(mine, other)
    assert len(names) > 1


def test_workers_find_the_same(tmp_path, x):
    for name in "abcd":
        write_edf(tmp_path / f"{name}.edf", {"Fz": (x[0], 100)})
    one, two = (bs.read.edf(tmp_path, patient=None, window=1.0, n_jobs=n) for n in (1, 2))
    pd.testing.assert_frame_equal(one.obs, two.obs)
    assert one.fingerprint == two.fingerprint


# -- real files ----------------------------------------------------------------------------------------------------


def test_every_file_of_the_pack_is_read(eeg_formats):
    manifest = pd.read_csv(eeg_formats / "manifest.csv")
    for row in manifest.itertuples():
        if row.reads != "ok":
            with pytest.raises(ReadError):
                open_edf(eeg_formats / row.path)
            continue
        header = bs.read.record(eeg_formats / row.path)
        assert len(header.channels) == row.n_channels, row.path
        if row.format == "set-epochs":
            assert header.channels[0].n == 4 * 8
        elif row.n_channels:
            assert max(c.rate for c in header.channels) == row.fs
            assert header.seconds == pytest.approx(row.seconds, abs=0.011)
            assert len(header.annotations) == row.n_annotations, row.path
    assert len(manifest) == 12


@pytest.mark.parametrize(
    "name",
    [
        "test_reduced.edf",
        "test_utf8_annotations.edf",
        "chtypes_edf.edf",
        "subsecond_starttime.edf",
        "test_bdf_stim_channel.bdf",
    ],
)
def test_edf_and_bdf_equal_pyedflib(eeg_formats, name):
    pyedflib = pytest.importorskip("pyedflib")
    path = str(eeg_formats / "files" / name)
    recording = open_edf(path)
    with pyedflib.EdfReader(path) as other:
        for i, channel in enumerate(recording.header.channels):
            assert (channel.name, channel.rate) == (other.getLabel(i).strip(), other.getSampleFrequency(i))
            np.testing.assert_allclose(recording.read([i], 0, channel.n)[0], other.readSignal(i), atol=1e-9)
        onsets, durations, labels = other.readAnnotations()
    marks = recording.header.annotations
    order = np.argsort(onsets, kind="stable")
    np.testing.assert_allclose(marks["onset"], onsets[order], atol=1e-6)
    np.testing.assert_allclose(marks["duration"], np.clip(durations[order], 0, None), atol=1e-6)
    assert marks["label"].tolist() == [str(label) for label in labels[order]]


@pytest.mark.parametrize(
    ("name", "unit", "factor"),
    [("test_1ch.gdf", "mV", 1e3), ("test_raw_2021.set", "uV", 1e6), ("test_raw_chanloc.set", "uV", 1e6),
     ("test_NO.vhdr", "uV", 1e6), ("neuromag122_test_file-raw.fif", "fT/cm", 1e13)],
)  # fmt: skip
def test_the_other_formats_equal_mne(eeg_formats, name, unit, factor):
    mne = pytest.importorskip("mne")
    path = eeg_formats / "files" / name
    raw = mne.io.read_raw(path, verbose="ERROR")
    recording = open_edf(path)
    channels = recording.header.channels
    assert [c.name for c in channels] == raw.ch_names
    picks = [i for i, c in enumerate(channels) if c.unit == unit]
    assert len(picks) == len(channels) - sum(kind == "stim" for kind in raw.get_channel_types())
    np.testing.assert_allclose(recording.read(picks, 37, 90), raw[picks, 37:127][0] * factor, rtol=1e-9)
    np.testing.assert_allclose(recording.read(picks[::-1][:2], 0, 9), raw[picks[::-1][:2], :9][0] * factor, rtol=1e-9)
    onset = raw.annotations.onset - raw.first_time
    np.testing.assert_allclose(recording.header.annotations["onset"], onset, atol=1e-9)
    assert recording.header.annotations["label"].tolist() == list(raw.annotations.description)


@pytest.mark.parametrize("dated", [True, False])
@pytest.mark.parametrize("cropped", [0.0, 5.0])
def test_a_mark_of_fif_stays_at_its_spike(tmp_path, dated, cropped):
    """Recordings that were cropped, or begin behind the clock's zero, with a date or without one."""
    mne = pytest.importorskip("mne")
    date = datetime(2020, 1, 1, tzinfo=UTC) if dated else None
    values = np.zeros((1, 2000))
    values[0, 1000] = 1e-4
    info = mne.create_info(["Cz"], 100.0, "eeg")
    raw = mne.io.RawArray(values, info, first_samp=300, verbose="ERROR").set_meas_date(date)
    raw.set_annotations(mne.Annotations([13.0 if dated else 10.0], [1.0], ["spike"], orig_time=date))
    path = tmp_path / "one_raw.fif"
    raw.crop(cropped).save(path, verbose="ERROR")
    samples = bs.read.edf(path, patient=None, around="spike", before=1.0, after=1.0, n_jobs=1)
    assert samples.obs["start"].tolist() == [9.0 - cropped] and samples[0][0].argmax() == 100


@pytest.mark.parametrize("naming", ["neuromag", "bids"])
def test_a_split_fif_of_a_folder_is_one_recording(tmp_path, naming):
    mne = pytest.importorskip("mne")
    raw = mne.io.RawArray(np.random.default_rng(0).normal(0, 1e-5, (4, 200_000)), mne.create_info(4, 100.0, "eeg"))
    raw.save(tmp_path / "one_eeg.fif", split_size="2MB", split_naming=naming, verbose="ERROR")
    assert len(list(tmp_path.iterdir())) > 2
    samples = bs.read.edf(tmp_path, patient=None, window=100.0, quality=False, n_jobs=1)
    assert len(set(samples.obs["recording"])) == 1 and len(samples) == 20
    np.testing.assert_allclose(samples[19], raw.get_data()[:, 190_000:] * 1e6, rtol=1e-4, atol=1e-3)
    for name in ("two_eeg.fif", "two_eeg-1.fif"):  # names alone do not make a part
        raw.copy().crop(0, 150).save(tmp_path / name, verbose="ERROR")
    again = bs.read.edf(tmp_path, patient=None, window=100.0, quality=False, n_jobs=1)
    assert len(set(again.obs["recording"])) == 3 and len(again) == 22


def test_conductance_of_brainvision(tmp_path):
    pytest.importorskip("mne")
    np.full(200, 3.0, "<f4").tofile(tmp_path / "a.eeg")
    for unit in ("uS", "µS", "mS", "S"):
        (tmp_path / "a.vhdr").write_text(
            "Brain Vision Data Exchange Header File Version 1.0\n[Common Infos]\nCodepage=UTF-8\nDataFile=a.eeg\n"
            "DataFormat=BINARY\nDataOrientation=MULTIPLEXED\nNumberOfChannels=1\nSamplingInterval=10000\n"
            f"[Binary Infos]\nBinaryFormat=IEEE_FLOAT_32\n[Channel Infos]\nCh1=GSR,,1,{unit}\n",
            encoding="utf-8",
        )
        recording = open_edf(tmp_path / "a.vhdr")
        assert recording.header.channels[0].unit == unit.replace("µ", "u")
        np.testing.assert_allclose(recording.read([0], 0, 5), 3.0)


def test_no_window_spans_a_pause_of_brainvision(tmp_path):
    pytest.importorskip("mne")
    np.r_[np.zeros(1000), np.ones(1000)].astype("<f4").tofile(tmp_path / "a.eeg")
    (tmp_path / "a.vhdr").write_text(
        "Brain Vision Data Exchange Header File Version 1.0\n[Common Infos]\nCodepage=UTF-8\nDataFile=a.eeg\n"
        "MarkerFile=a.vmrk\nDataFormat=BINARY\nDataOrientation=MULTIPLEXED\nNumberOfChannels=1\n"
        "SamplingInterval=10000\n[Binary Infos]\nBinaryFormat=IEEE_FLOAT_32\n[Channel Infos]\nCh1=Cz,,1,uV\n"
    )
    (tmp_path / "a.vmrk").write_text(
        "Brain Vision Data Exchange Marker File, Version 1.0\n[Common Infos]\nDataFile=a.eeg\n[Marker Infos]\n"
        "Mk1=New Segment,,1,1,0,20200101120000000000\nMk2=Stimulus,S  1,951,1,0\nMk3=Stimulus,S  1,1101,1,0\n"
        "Mk4=New Segment,,1001,1,0,20200101130000000000\n"
    )
    options = {"patient": None, "n_jobs": 1}
    windows = bs.read.edf(tmp_path / "a.vhdr", window=4.0, **options)
    assert windows.obs["start"].tolist() == [0.0, 4.0, 12.0, 16.0]
    assert bs.read.edf(tmp_path / "a.vhdr", window=5.0, **options).obs["start"].tolist() == [0.0, 5.0, 10.0, 15.0]
    marks = bs.read.edf(tmp_path / "a.vhdr", around="Stimulus/S  1", after=1.0, **options)
    assert marks.obs["start"].tolist() == [11.0] and (marks[0] == 1).all()
    assert len(bs.read.edf(tmp_path / "a.vhdr", **options)) == 1


def test_epochs_of_eeglab_lie_one_behind_the_other(eeg_formats):
    mne = pytest.importorskip("mne")
    path = eeg_formats / "files" / "test_epochs_onefile.set"
    epochs = mne.read_epochs_eeglab(path, verbose="ERROR").get_data(verbose="ERROR")
    labels = bs.read.record(path).annotations["label"].unique().tolist()
    samples = bs.read.edf(pd.DataFrame({"path": [str(path)]}), patient=None, around=labels, n_jobs=1)
    assert len(samples) == len(epochs)
    np.testing.assert_allclose(np.stack([samples[i] for i in range(4)]), epochs * 1e6, rtol=1e-5)
    seconds = bs.read.record(path).facts["epoch_seconds"]
    halves = bs.read.edf(path, patient=None, window=0.75 * seconds, n_jobs=1)  # the second would span two epochs
    assert halves.obs["start"].round(6).tolist()[:2] == [0.0, round(2.25 * seconds, 6)]


def test_parts_that_are_missing_or_short(eeg_formats, tmp_path):
    files = eeg_formats / "files"
    for name, part in (("test_NO.vhdr", "test_NO.eeg"), ("test_raw_chanloc.set", "test_raw_chanloc.fdt")):
        shutil.copyfile(files / name, tmp_path / name)
        with pytest.raises(ReadError, match="missing"):
            open_edf(tmp_path / name)
        (tmp_path / part).write_bytes((files / part).read_bytes()[:5000])
    with pytest.raises(ReadError, match="truncated"):
        open_edf(tmp_path / "test_raw_chanloc.set")


def test_eegbci_runs_and_their_tasks(shared):
    pack = shared / "data" / "eeg_eegbci_s001"
    names = ["Fc5", "EEG C3", "T7", "O1-O2"]
    samples = bs.read.edf(
        pack / "manifest.csv",
        patient="subject_id",
        channels=names,
        unit="uV",
        around=["T0", "T1", "T2"],
        after=4.0,
        n_jobs=1,
    )
    found = pd.crosstab(samples.obs["recording"], samples.obs["annotation"])
    assert found.loc["S001R04"].to_dict() == {"T0": 15, "T1": 8, "T2": 7}
    assert found.loc["S001R06"].to_dict() == {"T0": 15, "T1": 7, "T2": 8}
    assert samples.obs["channel_rates"].unique().tolist() == ["160"]
    assert samples[3].shape == (4, 640)
    assert (samples.obs["annotation_share"] == 1).all()


def test_alpha_rises_when_the_eyes_close(shared):
    from scipy.signal import welch

    pack = shared / "data" / "eeg_eegbci_s001"
    table = pd.read_csv(pack / "manifest.csv").query("run <= 2")
    samples = bs.read.edf(
        table,
        patient="subject_id",
        channels=["O1", "Oz", "O2"],
        unit="uV",
        window=2.0,
        artefact=300.0,
        root=pack,
        n_jobs=1,
    )
    power = {}
    for task in ("open", "closed"):
        rows = np.flatnonzero(samples.obs["task"].str.endswith(task))
        frequencies, density = welch(np.stack([samples[i] for i in rows]), samples.rate, nperseg=320)
        assert density.shape[:2] == (30, 3)
        power[task] = [
            density[..., (frequencies >= a) & (frequencies <= b)].sum(-1).mean(0) for a, b in ((8, 13), (20, 30))
        ]
    alpha, beta = (closed / opened for closed, opened in zip(power["closed"], power["open"]))
    assert (alpha > 2).all()
    assert (beta < alpha / 2).all()  # it is the alpha band, not the scale
    assert 10 < np.sqrt(power["open"][0]).mean() < 30  # microvolts, not volts
    assert samples.obs["artefact_share"].between(0, 0.01).all()


def test_openbci_pack(shared):
    pack = shared / "data" / "eeg_mi_openbci"
    samples = bs.read.edf(
        pack / "manifest.csv", patient="subject_id", around=["motor_imagery", "rest"], after=4.0, unit="uV", n_jobs=1
    )
    found = pd.crosstab(samples.obs["patient"], samples.obs["annotation"])
    assert found.shape == (7, 2)
    assert (found == 5).all().all()
    assert (len(samples.channels), samples.rate) == (15, 125)
    manifest = pd.read_csv(pack / "manifest.csv", index_col="sample_id")
    for name in ("S02_run0", "S07_run0"):
        _, values = everything(pack / manifest.loc[name, "path"])
        assert values.std() == pytest.approx(manifest.loc[name, "std_uv"], rel=0.01)


# -- MATLAB files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_whole_matlab_files_pass_and_damaged_ones_do_not(tmp_path, compressed):
    from scipy.io import savemat

    from biosae.read.mat5 import check_mat5

    values = {
        "numbers": np.arange(12.0).reshape(3, 4), "complex": np.array([1 + 2j, 3]), "text": "µ and text", "empty": [],
        "flags": np.array([True, False]), "cells": np.array([1, "two", np.eye(2)], dtype=object),
        "nested": {"a": {"b": [1, 2, 3]}, "c": "x"},
        "records": np.array([(1, 2.0), (3, 4.0)], dtype=[("i", "i2"), ("x", "f8")]),
    }  # fmt: skip
    path = tmp_path / "a.set"
    with open(path, "wb") as stream:
        savemat(stream, values, do_compression=compressed)
    check_mat5(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ReadError, match="truncated"):
        check_mat5(path)
    damaged = bytearray(whole)
    damaged[136 + 8 : 136 + 16] = b"\x63" * 8  # in the first variable
    path.write_bytes(damaged)
    with pytest.raises(ReadError, match="unreadable"):
        check_mat5(path)
