"""WFDB records: values, units, rates, gaps, annotations and beats, against the wfdb package and hand-built files."""

from __future__ import annotations

import pickle
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import biosae as bs
from biosae.data.items import ReadError
from biosae.data.samples import Samples
from biosae.errors import InputError, TooManyFailuresError
from biosae.read.wfdb import LEADS, open_wfdb, patient_facts
from biosae.read.wfdb_marks import AAMI, BEATS

package = pytest.importorskip("wfdb")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write(folder: Path, header: str, **files: bytes) -> Path:
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    (folder / "r.hea").write_text(header)
    return folder / "r.hea"


def shorts(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}h", *values)


def record(folder: Path, name: str, seconds: float = 10, rate: float = 100, beats: str = "") -> pd.DataFrame:
    """A record of two leads whose lead I counts samples in uV; a beat each second."""
    n = int(seconds * rate)
    signal = np.stack([np.arange(n) % 30000 / 1000, np.zeros(n)], axis=1)
    package.wrsamp(
        name, fs=rate, units=["mV", "mV"], sig_name=["I", "II"], p_signal=signal, fmt=["16", "16"],
        adc_gain=[1000.0, 1000.0], baseline=[0, 0], write_dir=str(folder),
    )  # fmt: skip
    if beats:
        at = np.arange(1, len(beats) + 1) * rate
        package.wrann(name, "atr", sample=at.astype(int), symbol=list(beats), write_dir=str(folder))
    return pd.DataFrame({"path": [f"{name}.hea"], "who": [name]})


# -- values ------------------------------------------------------------------------------------------------------


def test_every_record_of_the_pack_equals_the_wfdb_package_or_is_reported(shared: Path) -> None:
    folder = shared / "data" / "ecg_wfdb_formats"
    table = pd.read_csv(folder / "manifest.csv")
    for row in table.itertuples():
        if row.reads != "ok":
            with pytest.raises(ReadError, match="missing: no signal file n16"):
                open_wfdb(folder / row.path)
            continue
        recording = open_wfdb(folder / row.path)
        truth = package.rdrecord(str(folder / row.path)[:-4], smooth_frames=False)
        for i, channel in enumerate(recording.header.channels):
            want = truth.e_p_signal[i]
            np.testing.assert_allclose(recording.read([i], 0, channel.n)[0], want, rtol=1e-7, err_msg=row.path)
            at = channel.n // 3
            np.testing.assert_allclose(recording.read([i], at, 97)[0], want[at : at + 97], rtol=1e-7)
            assert channel.rate == truth.fs * truth.samps_per_frame[i]
            assert (channel.name, channel.unit) == (truth.sig_name[i], truth.units[i])


def test_matlab_records_of_three_hospitals(shared: Path) -> None:
    folder = shared / "data" / "ecg_cinc2021"
    samples = bs.read.wfdb(folder / "manifest.csv", patient="patient_id", site="site", channels=LEADS, n_jobs=1)
    assert len(samples) == 35 and samples.rate == 500 and samples.unit == "mV" and samples.channels == LEADS
    for i in (0, 20, 34):
        truth = package.rdrecord(str(samples.file(i))[:-4])
        np.testing.assert_allclose(samples[i], truth.p_signal.T, atol=1e-6)
    means = [float(np.abs(samples[i]).mean()) for i in range(35)]
    np.testing.assert_allclose(means, samples.obs["mean_abs_mv"], atol=1e-4)


def packed(format: str, values: np.ndarray) -> bytes:
    """Samples as signal(5) describes the format, bit by bit."""
    if format == "8":
        return bytes((int(d) & 255) for d in np.diff(values, prepend=0))
    if format == "61":
        return struct.pack(f">{len(values)}h", *values)
    if format == "160":
        return struct.pack(f"<{len(values)}H", *(values + 32768))
    out = bytearray()
    per, bits = (2, 12) if format == "212" else (3, 10)
    for i in range(0, len(values), per):
        block = [int(v) & ((1 << bits) - 1) for v in values[i : i + per]] + [0] * per
        a, b, c = block[:3]
        if format == "212":  # low byte of a; high nibbles of b and a; low byte of b
            whole = (a & 255, (b >> 8) << 4 | a >> 8, b & 255)
            used = 2 if i + 1 == len(values) else 3
        elif format == "310":  # words of 16 bits: ten of a (b) above bit 0, five of c above bit 11
            whole = (a << 1 | (c & 31) << 11).to_bytes(2, "little") + (b << 1 | (c >> 5) << 11).to_bytes(2, "little")
            used = {1: 2, 2: 4, 0: 4}[len(values[i : i + per]) % 3]
        else:  # 311: thirty bits of one word
            whole = (a | b << 10 | c << 20).to_bytes(4, "little")
            used = {1: 2, 2: 3, 0: 4}[len(values[i : i + per]) % 3]
        out += bytes(whole)[:used]
    return bytes(out)


@pytest.mark.parametrize("format", ["8", "61", "160", "212", "310", "311"])
@pytest.mark.parametrize("n", [999, 1000, 1001])
def test_each_packed_format(format: str, n: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(n)
    bits = {"212": 11, "310": 9, "311": 9}.get(format, 15)
    values = rng.integers(-(2**bits) + 1, 2**bits, n)
    if format == "8":
        values = np.cumsum(rng.integers(-128, 128, n))
    path = write(tmp_path, f"r 1 250 {n}\nr.dat {format} 100(3)/mV 12 0 0 0 0 II\n", r__dat=packed(format, values))
    recording = open_wfdb(path)
    for first, count in ((0, n), (0, 1), (1, 7), (500, n - 500), (n - 1, 1), (333, 0)):
        got = recording.read([0], first, count)
        np.testing.assert_allclose(got, (values[None, first : first + count] - 3) / 100, rtol=1e-12)
    np.testing.assert_allclose(recording.read([0], 0, n)[0], package.rdrecord(str(tmp_path / "r")).p_signal[:, 0])
    (tmp_path / "r.dat").write_bytes(packed(format, values)[:-1])
    with pytest.raises(ReadError, match="truncated"):
        open_wfdb(path)


@pytest.mark.parametrize("format", ["16", "24", "32", "80", "508", "516", "524"])
def test_each_format_gives_back_what_the_wfdb_package_wrote(format: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bits = {"80": 7, "508": 7, "24": 23, "524": 23, "32": 31}.get(format, 15)
    digital = rng.integers(-(2**bits) + 1, 2**bits, (1001, 3))
    package.wrsamp(
        "r", fs=250, units=["mV"] * 3, sig_name=list("abc"), d_signal=digital, fmt=[format] * 3,
        adc_gain=[100.0] * 3, baseline=[3] * 3, write_dir=str(tmp_path),
    )  # fmt: skip
    recording = open_wfdb(tmp_path / "r")
    np.testing.assert_allclose(recording.read([0, 1, 2], 0, 1001), (digital.T - 3) / 100, rtol=1e-12)
    for first, count in ((0, 1), (1, 7), (500, 501), (1000, 1), (333, 0)):
        got = recording.read([2, 0], first, count)
        np.testing.assert_allclose(got, (digital.T[[2, 0], first : first + count] - 3) / 100, rtol=1e-12)


def test_missing_sample_codes_are_nan(tmp_path: Path) -> None:
    path = write(tmp_path, "r 1 100 4\nr.dat 16 200 16 0 0 0 0 II\n", r__dat=shorts(200, -32768, -200, 100))
    np.testing.assert_array_equal(open_wfdb(path).read([0], 0, 4), [[1.0, np.nan, -1.0, 0.5]])


def test_several_samples_a_frame_keep_their_own_rate_and_skew(tmp_path: Path) -> None:
    # frames of two samples of a and one of b; b is stored one frame late
    data = shorts(0, 1, -9, 2, 3, 10, 4, 5, 20)
    path = write(tmp_path, "r 2 50 3\nr.dat 16x2 1/mV 16 0 0 0 0 a\nr.dat 16:1 1/mV 16 0 0 0 0 b\n", r__dat=data)
    recording = open_wfdb(path)
    assert [(c.name, c.rate, c.n) for c in recording.header.channels] == [("a", 100, 6), ("b", 50, 3)]
    np.testing.assert_array_equal(recording.read([0], 1, 4), [[1, 2, 3, 4]])
    np.testing.assert_array_equal(recording.read([1], 0, 3), [[10, 20, np.nan]])
    np.testing.assert_array_equal(recording.read([1], 1, 1), [[20]])
    samples = bs.read.wfdb(path, patient=None, channels=["a", "b"], rate=50, quality=False)
    assert samples[0].shape == (2, 3)
    with pytest.raises(TooManyFailuresError, match="pass rate="):
        bs.read.wfdb(path, patient=None, channels=["a", "b"])


def segmented(folder: Path, *, variable: bool) -> Path:
    write(folder, "a 2 100 3\na.dat 16 10/mV 16 0 0 0 0 I\na.dat 16 1000/uV 16 0 0 0 0 II\n",
          a__dat=shorts(10, 1000, 20, 2000, 30, 3000))  # fmt: skip
    (folder / "r.hea").rename(folder / "a.hea")
    second = "b 1 100 2\nb.dat 16 10/mV 16 0 0 0 0 I\n"
    if not variable:
        second = "b 2 100 2\nb.dat 16 10/mV 16 0 0 0 0 I\nb.dat 16 10/mV 16 0 0 0 0 II\n"
    values = (70, 80) if variable else (70, 5, 80, 5)
    write(folder, second, b__dat=shorts(*values))
    (folder / "r.hea").rename(folder / "b.hea")
    if variable:
        (folder / "r_layout.hea").write_text("r_layout 2 100 0\n~ 0 10/mV 16 0 0 0 0 I\n~ 0 1000/uV 16 0 0 0 0 II\n")
        return write(folder, "r/4 2 100 8\nr_layout 0\na 3\n~ 3\nb 2\n")
    return write(folder, "r/3 2 100 8\na 3\n~ 3\nb 2\n")


@pytest.mark.parametrize("variable", [False, True])
def test_segments_are_joined_and_gaps_are_nan(variable: bool, tmp_path: Path) -> None:
    path = segmented(tmp_path, variable=variable)
    recording = open_wfdb(path)
    nan = np.nan
    np.testing.assert_array_equal(recording.read([0], 0, 8), [[1, 2, 3, nan, nan, nan, 7, 8]])
    last = nan if variable else 500.0  # the second segment has mV, the record uV
    np.testing.assert_array_equal(recording.read([1], 0, 8), [[1, 2, 3, nan, nan, nan, last, last]])
    np.testing.assert_array_equal(recording.read([0, 1], 2, 5)[0], [3, nan, nan, nan, 7])
    assert [c.unit for c in recording.header.channels] == ["mV", "uV"]
    if variable:
        truth = package.rdrecord(str(path)[:-4], smooth_frames=False)
        np.testing.assert_array_equal(recording.read([0, 1], 0, 8), np.stack(truth.e_p_signal))
    samples = bs.read.wfdb(tmp_path, patient=None, channels=["I", "II"], window=0.04)
    assert samples.obs["path"].unique().tolist() == ["r.hea"]  # segments are no records of their own
    assert samples.obs["missing_share"].tolist() == [0.25, 0.75 if variable else 0.5]
    np.testing.assert_allclose(samples[0][1], [0.001, 0.002, 0.003, nan])


# -- units -------------------------------------------------------------------------------------------------------


def test_units_are_stated_assumed_as_the_format_says_or_asked_for(tmp_path: Path) -> None:
    lines = "r 3 100 2\nr.dat 16 1000/uV 16 0 0 0 0 a\nr.dat 16 100 16 0 0 0 0 b\nr.dat 16 0 16 0 0 0 0 c\n"
    path = write(tmp_path, lines, r__dat=shorts(1000, 100, 200, 2000, 200, 400))
    assert [c.unit for c in open_wfdb(path).header.channels] == ["uV", "mV", None]
    with pytest.raises(TooManyFailuresError, match=r"no_unit.*units="):
        bs.read.wfdb(path, patient=None)
    samples = bs.read.wfdb(path, patient=None, units={"c": "mV"}, quality=False)
    np.testing.assert_allclose(samples[0], [[0.001, 0.002], [1, 2], [1, 2]], rtol=1e-6)
    assert bs.read.wfdb(path, patient=None, channels=["a"], unit="uV")[0].tolist() == [[1, 2]]


# -- damage ------------------------------------------------------------------------------------------------------

GOOD = "r 1 100 4\nr.dat 16 200 16 0 0 0 0 II\n"


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (GOOD, None, "missing"),
        (GOOD, b"", "empty"),
        (GOOD, shorts(1, 2, 3), "truncated"),
        (GOOD.replace("100 4", "100 400000000000"), shorts(1, 2, 3, 4), "truncated"),
        (GOOD.replace("r.dat 16", "r.dat 999"), shorts(1, 2, 3, 4), "unsupported"),
        (GOOD.replace("r.dat 16", "r.dat 516"), shorts(1, 2, 3, 4), "unreadable"),
        (GOOD.replace("r.dat", "../r.dat"), shorts(1, 2, 3, 4), "unreadable"),
        (GOOD.replace("r.dat", "/etc/passwd"), shorts(1, 2, 3, 4), "unreadable"),
        (GOOD.replace("r.dat", "http://physionet.org/r.dat"), shorts(1, 2, 3, 4), "unreadable"),
        (GOOD.replace("r 1", "r 2"), shorts(1, 2, 3, 4), "truncated"),
        (GOOD.replace(" 100 ", " 0 "), shorts(1, 2, 3, 4), "unreadable"),
        ("", shorts(1, 2, 3, 4), "empty"),
        ("\x89PNG\r\n", shorts(1, 2, 3, 4), "unreadable"),
        ("r/1 1 100 4\nr 4\n", shorts(1, 2, 3, 4), "unreadable"),
        ("r/1 1 100 5\ns 4\n", shorts(1, 2, 3, 4), "unreadable"),
        ("r/1 1 100 4\ns 4\n", shorts(1, 2, 3, 4), "missing"),
    ],
)
def test_damage_is_a_read_error(header: str, data: bytes | None, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path, header, **({} if data is None else {"r__dat": data}))
    with pytest.raises(ReadError) as caught:
        open_wfdb(path)
    assert caught.value.reason == reason


def test_a_flac_file_cut_short_is_found_when_it_is_opened(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-9999, 9999, (20000, 1))
    package.wrsamp(
        "r", fs=250, units=["mV"], sig_name=["II"], d_signal=noise, fmt=["516"], adc_gain=[100.0], baseline=[0],
        write_dir=str(tmp_path),
    )  # fmt: skip
    file = tmp_path / "r.dat"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ReadError) as caught:
        open_wfdb(tmp_path / "r")
    assert caught.value.reason in ("truncated", "unreadable")


def test_a_missing_record_is_named_and_no_network_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="missing: no header 100"):
        open_wfdb(tmp_path / "mitdb" / "100")
    with pytest.raises(ReadError, match="missing"):
        open_wfdb("s3://bucket/100")
    write(tmp_path, GOOD, r__dat=shorts(1, 2, 3, 4))
    with pytest.raises(ReadError, match="missing: no annotation file r"):
        open_wfdb(tmp_path / "r", "qrs")
    with pytest.raises(InputError, match="annotator="):
        bs.read.wfdb(tmp_path, patient=None, annotator="../x")


def test_one_broken_record_of_many_is_listed(tmp_path: Path) -> None:
    tables = [record(tmp_path, name) for name in "abcd"]
    (tmp_path / "c.dat").write_bytes(b"\0" * 100)
    table = pd.concat(tables, ignore_index=True)
    with pytest.raises(TooManyFailuresError):
        bs.read.wfdb(table, patient="who", root=tmp_path, window=2)
    samples = bs.read.wfdb(
        table, patient="who", root=tmp_path, window=2, max_failures=0.5, failures=tmp_path / "failures.csv"
    )
    assert len(samples) == 15
    assert samples.failures[["item", "reason"]].values.tolist() == [["c.hea", "truncated"]]
    assert "truncated" in (tmp_path / "failures.csv").read_text()


# -- annotations -------------------------------------------------------------------------------------------------


def test_annotations_equal_the_wfdb_package(shared: Path) -> None:
    formats, af = shared / "data" / "ecg_wfdb_formats" / "records", shared / "data" / "ecg_cpsc2021_af" / "records"
    files = [f for e in ("atr", "qrs", "gqrsh", "gqrsl", "sqrs") for f in sorted(formats.glob(f"*.{e}"))]
    files += sorted(af.glob("*.atr"))
    assert len(files) == 17
    for file in files:
        truth = package.rdann(str(file.with_suffix("")), file.suffix[1:])
        marks = open_wfdb(file.with_suffix(".hea"), file.suffix[1:]).header.annotations
        np.testing.assert_allclose(marks["onset"], truth.sample / truth.fs)
        assert marks["symbol"].tolist() == truth.symbol
        assert marks["note"].tolist() == [note.strip("\0") for note in truth.aux_note]


def test_annotations_written_by_the_wfdb_package(tmp_path: Path) -> None:
    record(tmp_path, "r", seconds=3000, rate=100)
    at = np.array([0, 100, 110, 250000, 299999])  # the fourth needs a long interval
    package.wrann(
        "r", "ann", sample=at, symbol=["+", "N", "~", "V", "+"], aux_note=["(AFIB", "", "noisy", "", "(N"],
        chan=np.array([0, 1, 1, 0, 0]), fs=100, write_dir=str(tmp_path),
    )  # fmt: skip
    marks = open_wfdb(tmp_path / "r", "ann").header.annotations
    assert marks["onset"].tolist() == [0, 1, 1.1, 2500, 2999.99]
    assert marks["label"].tolist() == ["AFIB", "N", "~", "V", "N"]
    assert marks["symbol"].tolist() == ["+", "N", "~", "V", "+"]
    assert marks["duration"].round(6).tolist() == [2999.99, 0, 0, 0, 0.01]
    assert marks["note"].tolist() == ["(AFIB", "", "noisy", "", "(N"]
    assert marks["channel"].tolist() == [0, 1, 1, 0, 0]


def test_annotations_of_another_resolution(tmp_path: Path) -> None:
    record(tmp_path, "r", rate=100)
    package.wrann("r", "qrs", sample=np.array([500, 1000]), symbol=["N", "N"], fs=500, write_dir=str(tmp_path))
    assert open_wfdb(tmp_path / "r", "qrs").header.annotations["onset"].tolist() == [1, 2]


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty"), (b"\x64\x04", "truncated"), (None, "unreadable")])
def test_damaged_annotations(data: bytes | None, reason: str, tmp_path: Path) -> None:
    record(tmp_path, "r", seconds=2, beats="NNNNNNNN" if data is None else "N")
    if data is not None:
        (tmp_path / "r.atr").write_bytes(data)
    with pytest.raises(ReadError) as caught:
        open_wfdb(tmp_path / "r")
    assert caught.value.reason == reason


def test_codes_are_those_of_the_format() -> None:
    from wfdb.io.annotation import ann_label_table

    from biosae.read.wfdb_marks import SYMBOLS

    table = ann_label_table[ann_label_table["label_store"] > 0]
    assert dict(zip(table["label_store"], table["symbol"])) == SYMBOLS
    assert set(AAMI) == set(BEATS) <= set(SYMBOLS.values())
    published = {"N": "NLRej", "S": "aJAS", "V": "VE", "F": "F", "Q": "/fQ"}  # the standard's table for MIT-BIH records
    for kind, symbols in published.items():
        assert {AAMI[s] for s in symbols} == {kind}
    assert set(AAMI) - set("".join(published.values())) == set("Bnr?")


# -- windows and beats -------------------------------------------------------------------------------------------


def test_mit_bih_100_beats_align_with_annotations(shared: Path) -> None:
    file = shared / "data" / "ecg_wfdb_formats" / "records" / "100.hea"
    samples = bs.read.wfdb(file, patient=None, channels=["MLII"], beats=["N"], before=0.3, after=0.5, quality=False)
    assert len(samples) == 2237 and samples[0].shape == (1, 288)  # two of the 2239 lie too near to the ends
    mark, reach = 108, 18  # .3 s and 50 ms at 360 Hz
    near = np.stack([samples[i][0, mark - reach : mark + reach + 1] for i in range(len(samples))])
    away = np.abs(near.argmax(axis=1) - reach)
    assert (away <= 2).mean() > 0.95
    assert (away <= 2).mean() > 0.99 and away.max() <= 4  # measured; the marks are at the peaks
    assert samples.obs["rr_previous"].median() == pytest.approx(0.80, abs=0.02)


def test_beats_have_symbol_class_and_interval(tmp_path: Path) -> None:
    table = record(tmp_path, "r", beats="NNVNAN/N")
    samples = bs.read.wfdb(table, patient="who", root=tmp_path, beats=True, before=0.25, after=0.25)
    assert samples.obs["symbol"].tolist() == list("NNVNAN/N")
    assert samples.obs["aami"].tolist() == list("NNVNSNQN")
    assert np.isnan(samples.obs["rr_previous"].iloc[0]) and (samples.obs["rr_previous"].iloc[1:] == 1).all()
    np.testing.assert_allclose(samples[2][0], np.arange(275, 325) / 1000, rtol=1e-6)
    assert samples.ids[2] == "r.hea@2.75"
    wanted = bs.read.wfdb(table, patient="who", root=tmp_path, beats=["V", "A"])
    assert wanted.obs["symbol"].tolist() == ["V", "A"] and wanted.obs["rr_previous"].tolist() == [1, 1]
    assert wanted[0].shape == (2, 80)
    with pytest.raises(InputError, match="marks no beat"):
        bs.read.wfdb(table, patient="who", root=tmp_path, beats=["+"])
    with pytest.raises(InputError, match="one of them"):
        bs.read.wfdb(table, patient="who", root=tmp_path, beats=True, window=2)
    with pytest.raises(InputError, match="no annotated beat"):
        bs.read.wfdb(record(tmp_path, "q"), patient="who", root=tmp_path, beats=True)


def test_windows_count_beats_and_name_the_rhythm(tmp_path: Path) -> None:
    table = pd.concat([record(tmp_path, "r"), record(tmp_path, "bare")], ignore_index=True)
    package.wrann(
        "r", "atr", sample=np.array([30, 100, 200, 300, 350, 600]), symbol=["+", "N", "N", "N", "+", "V"],
        aux_note=["(N", "", "", "", "(AFIB", ""], write_dir=str(tmp_path),
    )  # fmt: skip
    samples = bs.read.wfdb(table, patient="who", root=tmp_path, window=4)
    assert samples.obs["start"].tolist() == [0, 4, 0, 4]
    assert samples.obs["rhythm"].tolist()[:2] == ["N", "AFIB"]
    np.testing.assert_allclose(samples.obs["rhythm_share"][:2], [3.2 / 4, 1])
    assert samples.obs["n_beats"].tolist()[:2] == [3, 1]
    assert samples.obs["rr_mean"].iloc[0] == 1 and np.isnan(samples.obs["rr_mean"].iloc[1])
    assert samples.obs.loc[samples.obs["who"] == "bare", ["rhythm", "n_beats", "rr_mean"]].isna().all(axis=None)
    episodes = bs.read.wfdb(table[:1], patient="who", root=tmp_path, around="AFIB")
    assert episodes.obs[["start", "duration"]].values.tolist() == [[3.5, 6.5]] and episodes[0].shape == (2, 650)


def test_atrial_fibrillation_pack(shared: Path) -> None:
    folder = shared / "data" / "ecg_cpsc2021_af"
    samples = bs.read.wfdb(folder / "manifest.csv", patient="patient_id", window=10, n_jobs=1)
    obs = samples.obs
    assert len(samples) == 309 and samples.rate == 200 and samples.channels == ("I", "II")
    persistent = obs["rhythm_class"] == "persistent atrial fibrillation"
    assert set(obs.loc[persistent, "rhythm"]) == {"AFIB"}
    assert obs.loc[obs["rhythm_class"] == "non atrial fibrillation", "rhythm"].isna().all()
    assert {"AFIB", "N"} <= set(obs.loc[obs["rhythm_class"].str.startswith("paroxysmal"), "rhythm"])
    mean = obs.groupby("recording")["rr_mean"].mean()
    stated = obs.groupby("recording")["mean_rr_s"].first()
    assert np.abs(mean - stated).max() < 0.1


def test_comments_are_kept_only_where_asked(shared: Path) -> None:
    folder = shared / "data" / "ecg_wfdb_formats" / "records"
    plain = bs.read.wfdb(folder / "s0010_re.hea", patient=None, channels=["ii"])
    assert not {"age", "sex", "dx"} & set(plain.obs)
    text = plain.obs.to_csv()
    assert "1990" not in text and "Sep" not in text
    named = bs.read.wfdb(folder / "s0010_re.hea", patient=None, channels=["ii"], columns=["age", "sex", "dx"])
    assert named.obs[["age", "sex", "dx"]].values.tolist() == [[81.0, "female", "Myocardial infarction"]]
    with pytest.raises(InputError, match="columns="):
        bs.read.wfdb(folder / "s0010_re.hea", patient=None, columns=["name"])


def test_forms_of_comments() -> None:
    assert patient_facts(["Age: 74", "Sex: Male", "Dx: 164889003,55930002"]) == {
        "age": 74.0, "sex": "male", "dx": "164889003,55930002",
    }  # fmt: skip
    assert patient_facts(["Age: 97"]) == {"age": 90.0}
    assert patient_facts(["69 M 1085 1629 x1", "Aldomet, Inderal"]) == {"age": 69.0, "sex": "male"}
    assert patient_facts(["Age: NaN", "Sex: Unknown", "Dx: Unknown", "Name: A. Person", "Heritage: x"]) == {}


# -- contract ----------------------------------------------------------------------------------------------------


def test_saved_pickled_and_in_threads(tmp_path: Path) -> None:
    samples = bs.read.wfdb(record(tmp_path, "r", beats="NNNN"), patient="who", root=tmp_path, window=1, rate=50)
    samples.save(tmp_path / "samples.parquet")
    again, copied = Samples.load(tmp_path / "samples.parquet"), pickle.loads(pickle.dumps(samples))  # noqa: S301
    assert again.fingerprint == samples.fingerprint == copied.fingerprint
    want = [samples[i] for i in range(len(samples))]
    assert want[0].dtype == np.float32 and want[0].shape == (2, 50)
    with ThreadPoolExecutor(4) as pool:
        for got in (list(pool.map(s.__getitem__, list(range(len(want))) * 3)) for s in (again, copied)):
            np.testing.assert_array_equal(np.stack(got), np.stack(want * 3))


def test_another_annotator_survives_saving(tmp_path: Path) -> None:
    table = record(tmp_path, "r", beats="NNNN")
    package.wrann("r", "qrs", sample=np.array([150, 450]), symbol=["N", "V"], write_dir=str(tmp_path))
    samples = bs.read.wfdb(table, patient="who", root=tmp_path, beats=True, annotator="qrs")
    assert samples.obs["symbol"].tolist() == ["N", "V"]
    samples.save(tmp_path / "samples.parquet")
    np.testing.assert_array_equal(Samples.load(tmp_path / "samples.parquet")[1], samples[1])


def test_patient_must_be_spoken_of(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="patient="):
        bs.read.wfdb(record(tmp_path, "r"))
