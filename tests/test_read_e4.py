"""Empatica E4 sessions: worn seconds, sleep and wake, windows of one state, damaged files."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import biosae as bs
from biosae.data.items import ReadError
from biosae.data.samples import Samples
from biosae.errors import InputError, TooManyFailuresError
from biosae.read.e4_files import STREAMS, open_e4
from biosae.read.wear import arm_angle

START = 1_600_000_000


def _session(folder: Path, seconds: float = 1000, *, seed: int = 0, late: dict[str, float] | None = None, **streams):
    """A session with noise; ``streams`` replaces the rows of some, None leaves one out. HR starts 10 s late."""
    rng = np.random.default_rng(seed)
    n = {name: int(seconds * s.rate) for name, s in STREAMS.items()}
    rows = {
        "ACC": rng.integers(-128, 128, (n["ACC"], 3)),
        "BVP": rng.normal(0, 50, n["BVP"]).round(2),
        "EDA": rng.uniform(0.5, 2, n["EDA"]).round(6),
        "TEMP": rng.uniform(32, 34, n["TEMP"]).round(2),
        "HR": rng.uniform(60, 80, n["HR"]).round(2),
    } | streams
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in rows.items():
        if values is None:
            continue
        values = np.asarray(values).reshape(len(values), -1)
        start = START + {"HR": 10.0, **(late or {})}.get(name, 0.0)
        head = [[f"{start:.6f}"] * values.shape[1], [f"{STREAMS[name].rate:.6f}"] * values.shape[1]]
        lines = [", ".join(h) for h in head] + [",".join(f"{v:g}" for v in row) for row in values]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    (folder / "IBI.csv").write_text(f"{START:.6f}, IBI\n83.5,0.609375\n99.75,0.84375\n")
    (folder / "tags.csv").write_text(f"{START + 12.5}\n")
    return folder


def _zip(folder: Path, target: Path, *, prefix: str = "") -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, prefix + file.name)
    return target


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _session(tmp_path_factory.mktemp("e4") / "night")


# -- worn or not, asleep or not ----------------------------------------------------------------------------------------


def _worn(seconds: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(seconds * 4, 1.0), np.full(seconds * 4, 33.0)


def test_one_sample_marks_its_second() -> None:
    eda, temp = _worn(1200)
    eda[4 * 600 + 2] = 0.04
    worn = bs.read.on_body(eda, temp, rate=4)
    assert worn.shape == (1200,) and np.flatnonzero(~worn).tolist() == [600]


@pytest.mark.parametrize(
    ("channel", "value", "fine"),
    [
        ("eda", 0.05, True), ("eda", 0.049, False), ("eda", 100.0, True), ("eda", 100.1, False),
        ("eda", np.nan, False), ("temp", 30.0, True), ("temp", 29.99, False), ("temp", 40.0, True),
        ("temp", 40.01, False), ("temp", np.nan, False),
    ],
)  # fmt: skip
def test_limits_of_a_worn_second(channel: str, value: float, fine: bool) -> None:
    eda, temp = _worn(900)
    (eda if channel == "eda" else temp)[4 * 450] = value
    assert bs.read.on_body(eda, temp, rate=4)[450] == fine


def test_worn_runs_below_five_minutes_are_off() -> None:
    eda, temp = _worn(1000)
    eda[4 * 299 : 4 * 300] = 0.0  # 4 min 59 s, a second off, 5 min, a second off, the rest
    eda[4 * 600 : 4 * 601] = 0.0
    worn = bs.read.on_body(eda, temp, rate=4)
    assert not worn[:300].any() and worn[300:600].all() and not worn[600] and worn[601:].all()
    assert not bs.read.on_body(*_worn(299), rate=4).any()
    assert bs.read.on_body(*_worn(300), rate=4).all()


def test_unfinished_seconds_are_left_out() -> None:
    eda, temp = _worn(400)
    assert len(bs.read.on_body(eda[:-1], temp[:-1], rate=4)) == 399
    assert bs.read.on_body(eda[:3], temp[:3], rate=4).shape == (0,)
    with pytest.raises(InputError, match="one length"):
        bs.read.on_body(eda, temp[:-1], rate=4)
    with pytest.raises(InputError, match="at least 1"):
        bs.read.on_body(eda, temp, rate=0.5)


def test_angle_of_the_arm() -> None:
    acc = np.array([[0, 0, 0, 1, 1, 0.0], [0, 0, 0, 0, 0, 3], [1, -1, 0, 0, 1, 4]])
    assert arm_angle(acc) == pytest.approx([90, -90, 0, 0, 45, np.degrees(np.arctan(4 / 3))])


def _posture(degrees: np.ndarray, rate: int) -> np.ndarray:
    """Acceleration of an arm that is held at an angle for each second."""
    angle = np.radians(np.repeat(degrees, rate))
    return np.stack([np.cos(angle), np.zeros_like(angle), np.sin(angle)])


@pytest.mark.parametrize(("still", "asleep"), [(300, False), (305, True), (600, True)])
def test_sleep_is_stillness_of_more_than_five_minutes(still: int, asleep: bool) -> None:
    restless = np.where(np.arange(200) // 5 % 2, 40.0, -40.0)  # a change in every block of 5 s
    degrees = np.concatenate([restless, np.full(still, 10.0), restless])
    state = bs.read.sleep_wake(_posture(degrees, 4), rate=4, worn=np.ones(len(degrees), bool))
    assert (state[200 : 200 + still] == asleep).all()
    assert not state[:200].any() and not state[200 + still :].any()


@pytest.mark.parametrize(("change", "asleep"), [(4.9, True), (5.1, False)])
def test_a_change_of_five_degrees_wakes(change: float, asleep: bool) -> None:
    degrees = np.where(np.arange(600) // 5 % 2, 10.0, 10.0 + change)
    state = bs.read.sleep_wake(_posture(degrees, 8), rate=8, worn=np.ones(600, bool))
    assert (state == asleep).all()


def test_sleep_is_judged_within_worn_runs() -> None:
    worn = np.ones(1000, bool)
    worn[400:410] = False
    state = bs.read.sleep_wake(_posture(np.full(1000, 20.0), 4), rate=4, worn=worn)
    assert (state[400:410] == 2).all() and (state[:400] == 1).all() and (state[410:] == 1).all()
    worn[290:300] = False  # 290 s before and 100 s behind are too short to be sleep
    state = bs.read.sleep_wake(_posture(np.full(1000, 20.0), 4), rate=4, worn=worn)
    assert (state[:290] == 0).all() and (state[300:400] == 0).all() and (state[410:] == 1).all()


def test_seconds_without_acceleration_have_no_state() -> None:
    acc = _posture(np.full(700, 20.0), 4)
    acc[1, 4 * 350] = np.nan
    state = bs.read.sleep_wake(acc, rate=4, worn=np.ones(700, bool))
    assert state[350] == 2 and (np.delete(state, 350) == 1).all()


def test_spikes_do_not_wake() -> None:
    acc = _posture(np.full(600, 20.0), 32)
    acc[:, ::200] = [[0.0], [3.0], [0.0]]  # one sample in 6 s, which medians over 5 s remove
    assert (bs.read.sleep_wake(acc, rate=32, worn=np.ones(600, bool)) == 1).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 400)), min_size=1, max_size=8), st.sampled_from([1, 4, 4.5]))
def test_worn_is_what_was_planted(parts: list[tuple[bool, int]], rate: float) -> None:
    planted = np.repeat([fine for fine, _ in parts], [n for _, n in parts])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], planted, [False]]).astype(int)))
    truth = planted.copy()
    for a, b in zip(edges[::2], edges[1::2]):
        truth[a:b] = b - a >= 300
    second = np.minimum((np.arange(round(len(planted) * rate)) / rate + 1e-9).astype(int), len(planted) - 1)
    temp = np.where(planted[second], 35.0, 20.0)
    worn = bs.read.on_body(np.ones(len(temp)), temp, rate=rate)
    assert (worn == truth[: len(worn)]).all() and len(planted) - len(worn) <= 1


# -- files -------------------------------------------------------------------------------------------------------------


def test_streams_on_one_axis_of_time(tmp_path: Path) -> None:
    eda = np.arange(8) + 0.5
    acc = np.array([[64, -64, 32], [0, 1, 2]] * 16)
    folder = _session(tmp_path / "s", 1, late={"EDA": 2.25}, EDA=eda, ACC=acc, BVP=None)
    recording = open_e4(str(folder))
    header = recording.header
    assert [c.name for c in header.channels] == ["ACC_x", "ACC_y", "ACC_z", "EDA", "TEMP", "HR"]
    assert {c.name: (c.rate, c.unit, c.n) for c in header.channels}["EDA"] == (4.0, "uS", 9 + 8)
    assert np.isnan(recording.read([3], 0, 9)).all()
    assert recording.read([3], 9, 8)[0] == pytest.approx(eda)
    assert recording.read([0, 1, 2], 0, 1)[:, 0].tolist() == [1.0, -1.0, 0.5]  # 1/64 g
    assert header.seconds == 11.0  # one second of HR from 10 s on
    assert header.facts["gaps"] == {"EDA": [0.0, 2.25], "HR": [0.0, 10.0]}
    marks = header.annotations
    assert marks["label"].tolist() == ["tag", "IBI", "IBI"] and marks["onset"].tolist() == [12.5, 83.5, 99.75]
    assert marks["value"].tolist()[1:] == [0.609375, 0.84375] and (marks["duration"] == 0).all()
    assert str(START)[:6] not in str(header)


def test_archive_equals_folder(session: Path, tmp_path: Path) -> None:
    options = {"patient": None, "rate": 8, "window": 60, "states": None}
    folder = bs.read.e4(session, **options)
    for prefix in ("", "session_1/", "../../outside/"):
        archive = _zip(session, tmp_path / f"{len(prefix)}.zip", prefix=prefix)
        packed = bs.read.e4(archive, **options)
        assert len(packed) == len(folder)
        assert all(np.array_equal(packed[i], folder[i], equal_nan=True) for i in range(len(folder)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.zip", "10.zip", "14.zip"]  # nothing was unpacked


@pytest.mark.parametrize(
    ("file", "change", "reason", "words"),
    [
        ("EDA.csv", lambda t: t.replace("\n", "\nx,", 3), "unreadable", "EDA.csv, line 2"),
        ("TEMP.csv", lambda t: t[:400] + "\n31.2x\n" + t[400:], "unreadable", "TEMP.csv, line"),
        ("ACC.csv", lambda t: t.rsplit(",", 1)[0], "unreadable", "is not 3 finite numbers"),
        ("ACC.csv", lambda t: t.replace("32.000000", "31.000000", 1), "unreadable", "ACC.csv, line 2"),
        ("BVP.csv", lambda t: t + "\n\n1.0\n", "unreadable", "BVP.csv, line"),
        ("BVP.csv", lambda t: t.replace("64.0", "0.0", 1), "unreadable", "rate of 0 Hz"),
        ("EDA.csv", lambda t: t + "nan\n", "unreadable", "EDA.csv, line 4003"),
        ("EDA.csv", lambda t: t + "1e39\n", "unreadable", "EDA.csv, line 4003"),
        ("EDA.csv", lambda t: "", "empty", "EDA.csv has no line"),
        ("EDA.csv", lambda t: t[:27], "empty", "no sample"),
        ("EDA.csv", lambda t: t.replace(str(START), "1", 1), "unreadable", "one session"),
        ("EDA.csv", lambda t: "9" * 5000 + t, "unreadable", "line 1"),
        ("IBI.csv", lambda t: t + "3\n", "unreadable", "IBI.csv, line 4"),
        ("tags.csv", lambda t: "now\n", "unreadable", "tags.csv, line 1"),
    ],
)  # fmt: skip
def test_damaged_files_name_the_line(session: Path, tmp_path: Path, file: str, change, reason: str, words: str) -> None:
    for source in session.iterdir():
        text = source.read_text()
        (tmp_path / source.name).write_text(change(text) if source.name == file else text)
    with pytest.raises(ReadError, match=words) as caught:
        open_e4(str(tmp_path))
    assert caught.value.reason == reason


def test_line_numbers_across_blocks(session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("biosae.read.e4_files._BLOCK", 1000)
    whole = open_e4(str(session))
    assert np.array_equal(whole.read([3], 0, 64_000)[0], np.loadtxt(session / "BVP.csv")[2:].astype(np.float32))
    _session(tmp_path, 500)
    lines = (tmp_path / "TEMP.csv").read_text().split("\n")
    lines[1233] = "warm"
    (tmp_path / "TEMP.csv").write_text("\n".join(lines))
    with pytest.raises(ReadError, match="line 1234: 'warm'"):
        open_e4(str(tmp_path))
    (tmp_path / "TEMP.csv").write_text(f"{START}\n4.0\n" + "3" * 3000)
    with pytest.raises(ReadError, match="no end of a line"):
        open_e4(str(tmp_path))


def test_absent_and_empty_streams(session: Path, tmp_path: Path) -> None:
    for name in ("ACC", "EDA", "TEMP"):
        (tmp_path / f"{name}.csv").write_bytes((session / f"{name}.csv").read_bytes())
    for name in ("HR", "IBI", "tags"):
        (tmp_path / f"{name}.csv").touch()
    header = open_e4(str(tmp_path)).header
    assert len(header.channels) == 5 and len(header.annotations) == 0
    with pytest.raises(TooManyFailuresError, match="no_channel"):
        bs.read.e4(tmp_path, patient=None, channels=["BVP"])
    for path, reason in ((tmp_path / "gone", "missing"), (tmp_path / "HR.csv", "empty"), (tmp_path.parent, "missing")):
        with pytest.raises(ReadError) as caught:
            open_e4(str(path))
        assert caught.value.reason == reason


def test_archives_that_are_refused(session: Path, tmp_path: Path) -> None:
    target = tmp_path / "bomb.zip"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:  # 60 MB of rows in some 60 kB
        archive.writestr("TEMP.csv", f"{START}\n1.0\n" + "1\n" * 30_000_000)
    assert target.stat().st_size < 200_000
    with pytest.raises(ReadError, match="more than 345600 rows") as caught:
        open_e4(str(target))
    assert caught.value.reason == "unsupported"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as archive:
        archive.write(session / "EDA.csv", "EDA.csv")
    with pytest.raises(ReadError, match="pack with deflate"):
        open_e4(str(target))
    with zipfile.ZipFile(target, "w") as archive:
        archive.write(session / "EDA.csv", "a/EDA.csv")
        archive.write(session / "EDA.csv", "b/EDA.csv")
    with pytest.raises(ReadError, match="twice"):
        open_e4(str(target))
    data = _zip(session, target).read_bytes()
    target.write_bytes(data[: len(data) // 2])
    with pytest.raises(ReadError, match="zip") as caught:
        open_e4(str(target))
    assert caught.value.reason == "unreadable"


# -- windows -----------------------------------------------------------------------------------------------------------


def _restless(seconds: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(-128, 128, (seconds * 32, 3))


def test_an_hour_gives_25_overlapping_or_7_disjoint_windows(tmp_path: Path) -> None:
    n = 3610  # 3600 s behind the first 10
    rng = np.random.default_rng(1)
    acc = np.repeat(rng.integers(-128, 128, (n // 5, 3)), 160, axis=0)  # the arm changes every 5 s
    _session(tmp_path / "s", n, ACC=acc, BVP=None, HR=None)
    options = {"patient": None, "channels": ["EDA", "TEMP"], "quality": False}
    overlapping = bs.read.e4(tmp_path, step=128, **options)
    assert len(overlapping) == 25 and len(bs.read.e4(tmp_path, **options)) == 7
    assert overlapping.obs["start"].tolist() == [10.0 + 128 * i for i in range(25)]
    assert (overlapping.obs["state"] == "wake").all() and (overlapping.obs["worn_share"] == 1).all()
    eda = np.loadtxt(tmp_path / "s" / "EDA.csv")[2:]
    assert np.array_equal(overlapping[1][0], eda[4 * 138 : 4 * 650].astype(np.float32))
    assert overlapping.rate == 4 and overlapping.unit == "native" and overlapping.channel_units == ("uS", "degC")


def test_no_window_spans_a_change_of_state(tmp_path: Path) -> None:
    n = 3000
    rng = np.random.default_rng(2)
    acc = np.repeat(rng.integers(-128, 128, (n // 5, 3)), 160, axis=0)
    acc[32 * 1010 : 32 * 2010] = [10, 20, 60]  # still for 1000 s
    temp = np.full(4 * n, 33.0)
    temp[4 * 2510 : 4 * 2600] = 25.0  # not worn for 90 s
    _session(tmp_path / "s", n, ACC=acc, TEMP=temp, BVP=None, HR=None)
    options = {"patient": None, "channels": ["EDA"], "window": 60, "step": 7, "quality": False}
    found = bs.read.e4(tmp_path, states=("wake", "sleep", "off"), **options).obs
    edges = [10, 1010, 2010, 2510, 2600, n]
    names = ["wake", "sleep", "wake", "off", "wake"]
    for start, state in zip(found["start"], found["state"]):
        part = np.searchsorted(edges, start + 6, side="right") - 1  # medians and blocks move an edge by up to 5 s
        assert names[part] == state
        assert start + 60 <= edges[part + 1] + 6
    assert set(found["state"]) == {"wake", "sleep", "off"}
    assert found.groupby("state")["worn_share"].first().to_dict() == {"off": 0.0, "sleep": 1.0, "wake": 1.0}
    only = bs.read.e4(tmp_path, states=["sleep"], **options).obs
    assert only["start"].tolist() == found.loc[found["state"] == "sleep", "start"].tolist()


def test_crop_trim_and_coverage(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    _session(tmp_path / "s", 1000, TEMP=rng.uniform(32, 34, 4 * 950).round(2), BVP=None)
    options = {"patient": None, "channels": ["EDA", "TEMP"], "states": None, "window": 100}
    cropped = bs.read.e4(tmp_path, **options)
    assert cropped.obs["start"].tolist() == [10.0 + 100 * i for i in range(9)] and (cropped.obs["coverage"] == 1).all()
    whole = bs.read.e4(tmp_path, crop=False, trim=0, **options)
    assert len(whole) == 10 and whole.obs["coverage"].tolist() == [1.0] * 9 + [0.75]
    assert np.isnan(whole[9][1]).sum() == 200 and whole.obs["missing_share"].iloc[9] == pytest.approx(0.25)
    late = bs.read.e4(tmp_path, **options | {"channels": ["HR"]})
    assert late.obs["start"].iloc[0] == 10.0 and late.unit == "bpm"  # HR is not trimmed, it starts 10 s late
    with pytest.raises(InputError, match="fewer than min_session=990"):
        bs.read.e4(tmp_path, min_session=990, **options)


def test_sessions_without_a_window_are_listed_and_not_counted(tmp_path: Path) -> None:
    _session(tmp_path / "long", 1000, BVP=None)
    _session(tmp_path / "short", 600, BVP=None)
    _session(tmp_path / "table", 1000, BVP=None, TEMP=np.full(4000, 22.0))
    with pytest.warns(UserWarning, match="2 of 3 recordings"):
        samples = bs.read.e4(tmp_path, patient=None, channels=["EDA"], window=30, max_failures=0)
    assert set(samples.obs["recording"]) == {"long"}
    why = samples.failures.set_index("item")["detail"]
    assert "min_session=900" in why["short"] and "never worn" in why["table"]


def test_rates_and_units_of_the_default_channels(session: Path) -> None:
    with pytest.raises(InputError, match="pass rate=64"):
        bs.read.e4(session, patient=None)
    samples = bs.read.e4(session, patient=None, rate=64, window=64, states=None)
    assert samples.channels == ("ACC_x", "ACC_y", "ACC_z", "BVP", "EDA", "TEMP")
    assert samples.channel_units == ("g", "g", "g", "au", "uS", "degC")
    x = samples[2]
    assert x.dtype == np.float32 and x.shape == (6, 64 * 64)
    bvp = np.loadtxt(session / "BVP.csv")[2:]
    first = round(samples.obs["start"].iloc[2] * 64)
    assert np.array_equal(x[3], bvp[first : first + 4096].astype(np.float32))
    assert 1 < np.abs(x[:3]).max() < 5 and x[4].min() > 0.3 and x[5].min() > 30
    difference = bs.read.e4(session, patient=None, channels=["ACC_x-ACC_y"], window=64, states=None)
    apart = bs.read.e4(session, patient=None, channels=["ACC_x", "ACC_y"], window=64, states=None)
    assert np.allclose(difference[0][0], apart[0][0] - apart[0][1], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": ["EDB"]}, "did you mean 'EDA'"), ({"channels": "EDA"}, "list of names"),
        ({"channels": ["EDA-ACC_x"]}, "rates differ"), ({"states": ["awake"]}, "'wake'"),
        ({"states": "wake"}, "states="), ({"trim": -1}, "trim"), ({"window": 0}, "window"),
        ({"patient": ...}, "patient"),
    ],
)  # fmt: skip
def test_wrong_questions(session: Path, options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        bs.read.e4(session, **{"patient": None, "channels": ["EDA"], **options})


def test_processes_give_the_same_as_one(tmp_path: Path) -> None:
    for i in range(20):  # more than one part of the work
        _session(tmp_path / f"s{i:02d}", 25, seed=i, BVP=None)
    (tmp_path / "s07" / "EDA.csv").write_text("damaged")
    options = {"patient": None, "channels": ["EDA", "TEMP"], "window": 5, "min_session": 0, "states": []}  # as None
    one, two = (bs.read.e4(tmp_path, n_jobs=n, max_failures=0.1, **options) for n in (1, 2))
    assert one.obs.equals(two.obs) and one.fingerprint == two.fingerprint
    assert two.failures["item"].tolist() == ["s07"] and set(one.obs["recording"]) == {
        f"s{i:02d}" for i in range(20) if i != 7
    }


def test_table_round_trip_pickle_threads(session: Path, tmp_path: Path) -> None:
    table = pd.DataFrame({"path": [session.name], "subject": ["7"], "state_at": ["night"]})
    samples = bs.read.e4(
        table, patient="subject", label="state_at", root=session.parent, rate=16, window=100, states=None, artefact=90
    )
    assert samples.obs["patient"].unique().tolist() == ["7"] and samples.roles["label"] == "state_at"
    samples.save(tmp_path / "s.parquet")
    loaded = Samples.load(tmp_path / "s.parquet")
    assert loaded.fingerprint == samples.fingerprint and loaded.channel_units == samples.channel_units
    again = pickle.loads(pickle.dumps(samples))  # noqa: S301
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(samples.__getitem__, range(len(samples))))
    for i, x in enumerate(threaded):
        assert np.array_equal(x, loaded[i]) and np.array_equal(x, again[i])


def test_real_session(shared: Path) -> None:
    """The streams of the pack were cut to different lengths; the manifest states their rates, rows and seconds."""
    pack = shared / "data" / "e4_wearable"
    manifest = pd.read_csv(pack / "manifest.csv").set_index("channel")
    recording = open_e4(str(pack / "flirt"))
    for channel in recording.header.channels:
        stated = manifest.loc[channel.name.split("_")[0]]
        late = 10 if channel.name == "HR" else 0
        assert channel.rate == stated["fs"] and channel.n == stated["rows"] + late * stated["fs"]
    assert (recording.header.annotations["label"] == "IBI").sum() == manifest.loc["IBI", "rows"]
    samples = bs.read.e4(pack, patient=None, channels=["EDA", "TEMP"], states=None)
    assert samples.obs["start"].tolist() == [10.0, 522.0] and (samples.obs["coverage"] == 1).all()
    temp = np.loadtxt(pack / "flirt" / "TEMP.csv")
    assert np.array_equal(samples[0][1], temp[2 + 40 : 2 + 40 + 2048].astype(np.float32))
    with pytest.raises(InputError, match="up to the end of ACC, fewer than min_session=900"):
        bs.read.e4(pack, patient=None, channels=["EDA", "TEMP"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = bs.read.e4(pack, patient=None, rate=32, window=30, min_session=60, states=("wake", "sleep", "off"))
    assert short[0].shape == (6, 960) and short.obs["state"].unique().tolist() == ["off"]  # EDA below 0.05 uS
