"""Samples: roles and ids, items, selection, round trips through pickle and Parquet; and the shared failures.csv."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import biosae as bs
from biosae.data import READERS, FailureLog, ReadError, Samples, read_failures
from biosae.data.items import make_reader
from biosae.errors import FormatError, InputError, TooManyFailuresError


class Plain:
    """A reader without files: a square whose grey level is in the row."""

    def __init__(self, *, side: int = 2) -> None:
        self.side = side

    def __call__(self, row):
        if row["level"] < 0:
            raise ReadError("unreadable", f"level of {row['sample_id']}")
        return np.full((self.side, self.side, 3), row["level"], dtype=np.uint8)

    def spec(self):
        return {"kind": "plain", "side": self.side}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(READERS, "plain", Plain)


def table(**columns):
    columns = {"case": ["x", "x", "y", "z"], "level": [1, 2, 3, -1], **columns}
    return pd.DataFrame(columns, index=["a", "b", "c", "d"])


def make(roles=None, **columns):
    return Samples(table(**columns), Plain(), roles={"patient": "case", **(roles or {})})


# -- roles and ids -----------------------------------------------------------------------------------------------------


def test_roles_give_canonical_columns_beside_the_users():
    samples = make({"site": "centre", "label": "level"}, centre=[1, 2, 2, np.nan], split=["train", "test"] * 2)
    assert samples.roles == {"patient": "case", "site": "centre", "label": "level", "split": "split"}
    assert samples.obs["patient"].tolist() == ["x", "x", "y", "z"]
    assert samples.obs["site"].tolist()[:3] == ["1", "2", "2"]  # names are text, whole numbers stay whole
    assert pd.isna(samples.obs["site"].iloc[3])
    assert samples.obs["centre"].dtype == float
    assert samples.obs["label"].tolist() == [1, 2, 3, -1]
    assert samples.obs.index.name == "sample_id"


def test_patient_must_be_said():
    with pytest.raises(InputError, match="roles must name the patient"):
        Samples(table(), Plain(), roles={})
    with pytest.raises(InputError, match="pass patient='patient'"):
        Samples(table(patient=list("pqrs")), Plain(), roles={"patient": None})
    unknown = Samples(table(), Plain(), roles={"patient": None})
    assert unknown.roles["patient"] is None
    assert "patient" not in unknown.obs
    assert "patients unknown" in repr(unknown)


@pytest.mark.parametrize("gap", [None, np.nan, "", pd.NA])
def test_missing_patients_are_named(gap):
    with pytest.raises(InputError, match=r"1 of 4 rows have no patient in column 'case' \(samples 'c'\)"):
        make(case=["x", "x", gap, "z"])


def test_two_columns_cannot_claim_one_role():
    with pytest.raises(InputError, match="pass site='site', or rename"):
        make({"site": "centre"}, centre=list("pqrs"), site=list("abcd"))
    same = make({"site": "centre"}, centre=[1, 2, 3, 4], site=["1", "2", "3", "4"])  # the same content is no conflict
    assert same.roles["site"] == "centre"
    with pytest.raises(InputError, match="no column 'cse' for patient; did you mean 'case'"):
        make({"patient": "cse"})
    with pytest.raises(InputError, match="'scaner' is no role; did you mean 'scanner'"):
        make({"scaner": "case"})


def test_ids_are_unique_text():
    obs = table()
    obs.index = [7, 7, 8, 8]
    with pytest.raises(InputError, match="2 sample ids occur more than once"):
        Samples(obs, Plain(), roles={"patient": "case"})
    obs.index = [7, 8, 9, 10]
    assert Samples(obs, Plain(), roles={"patient": "case"}).ids.tolist() == ["7", "8", "9", "10"]
    obs["sample_id"] = ["other"] * 4
    with pytest.raises(InputError, match="'sample_id' differs from the ids"):
        Samples(obs, Plain(), roles={"patient": "case"})


# -- items -------------------------------------------------------------------------------------------------------------


def test_items_by_position_and_id():
    samples = make()
    assert len(samples) == 4
    assert samples[1].max() == samples["b"].max() == samples[-3].max() == samples[np.int64(1)].max() == 2
    with pytest.raises(ReadError, match="unreadable: level of d"):
        samples[3]
    assert samples[2].max() == 3  # one broken item does not touch the others
    with pytest.raises(IndexError):
        samples[4]
    with pytest.raises(InputError, match="no sample 'q'"):
        samples["q"]


def test_select():
    samples = make(kind=pd.Categorical(["u", "v", "u", "v"]))
    assert samples.select(["c", "a"]).ids.tolist() == ["c", "a"]
    assert samples.select(np.array([False, True, True, False])).ids.tolist() == ["b", "c"]
    shuffled = (samples.obs["kind"] == "u").sample(frac=1, random_state=1)
    assert samples.select(shuffled).ids.tolist() == ["a", "c"]  # a Series is joined by id
    assert samples.select(slice(1, 3)).ids.tolist() == samples.select([1, 2]).ids.tolist() == ["b", "c"]
    assert len(samples.select([])) == 0
    assert samples.select(["a"]).obs["kind"].dtype == samples.obs["kind"].dtype
    with pytest.raises(InputError, match=r"1 ids are not among the samples, e\.g\. 'q'"):
        samples.select(["a", "q"])
    with pytest.raises(InputError, match="mask has shape"):
        samples.select([True])


def test_with_obs_joins_by_id_and_keeps_roles_true():
    samples = make({"label": "level"})
    more = samples.with_obs(extra=pd.Series({"d": 4, "c": 3, "b": 2, "a": 1}), level=[5, 6, 7, 8])
    assert more.obs["extra"].tolist() == [1, 2, 3, 4]
    assert more.obs["label"].tolist() == [5, 6, 7, 8]  # the canonical column follows its source
    assert samples.obs["label"].tolist() == [1, 2, 3, -1]
    renamed = samples.with_obs(patient=list("pqrs"))
    assert renamed.roles["patient"] == "patient"
    assert renamed.obs["patient"].tolist() == list("pqrs")


def test_fingerprint_is_of_ids_paths_and_reader():
    samples = make()
    assert samples.fingerprint == make(extra=[1, 2, 3, 4]).fingerprint
    others = {
        samples.select([1, 0, 2, 3]).fingerprint,
        samples.select([0, 1]).fingerprint,
        Samples(table(), Plain(side=3), roles={"patient": "case"}).fingerprint,
        Samples(table(path=list("klmn")), Plain(), roles={"patient": "case"}).fingerprint,
    }
    assert len(others - {samples.fingerprint}) == 4


# -- round trips -------------------------------------------------------------------------------------------------------


def test_pickle():
    samples = pickle.loads(pickle.dumps(make()))  # noqa: S301
    assert samples.obs.equals(make().obs)
    assert samples[0].max() == 1


def test_parquet_keeps_everything(tmp_path):
    obs = table(
        whole=pd.array([1, None, 3, 4], dtype="Int64"),
        truth=pd.array([True, None, False, True], dtype="boolean"),
        grade=pd.Categorical(["lo", "hi", "lo", None], ["lo", "hi"], ordered=True),
        text=["007", None, "", "x"],
        share=[0.1, np.nan, 0.3, 1e-300],
    )
    samples = Samples(
        obs, Plain(side=5), roles={"patient": "case", "label": "grade"}, mpp=0.25, meta={"planted": {"L": [1, 2.5]}}
    )
    samples.save(tmp_path / "s.parquet")
    back = Samples.load(tmp_path / "s.parquet")
    pd.testing.assert_frame_equal(back.obs, samples.obs)
    assert (back.roles, back.mpp, back.meta) == (samples.roles, 0.25, {"planted": {"L": [1, 2.5]}})
    assert back.fingerprint == samples.fingerprint
    assert back[0].shape == (5, 5, 3)
    first = (tmp_path / "s.parquet").read_bytes()
    back.save(tmp_path / "again.parquet")
    assert Samples.load(tmp_path / "again.parquet").obs.equals(samples.obs)
    samples.save(tmp_path / "s.parquet")
    assert (tmp_path / "s.parquet").read_bytes() == first


def test_saved_samples_follow_their_files(tmp_path):
    from PIL import Image

    study = tmp_path / "study"
    (study / "images").mkdir(parents=True)
    Image.new("RGB", (3, 2), (9, 8, 7)).save(study / "images" / "a.png")
    (study / "t.csv").write_text("path,case\nimages/a.png,01\n")
    bs.read.images(study / "t.csv", patient="case").save(study / "runs" / "s.parquet")
    shutil.move(study, tmp_path / "moved")  # table and files together
    samples = Samples.load(tmp_path / "moved" / "runs" / "s.parquet")
    assert samples[0][0, 0].tolist() == [9, 8, 7]
    assert samples.obs["path"].tolist() == ["images/a.png"]
    shutil.move(tmp_path / "moved" / "images", tmp_path / "elsewhere" / "images")  # files alone
    lost = Samples.load(tmp_path / "moved" / "runs" / "s.parquet")
    with pytest.raises(ReadError, match="missing"):
        lost[0]
    found = Samples.load(tmp_path / "moved" / "runs" / "s.parquet", root=tmp_path / "elsewhere")
    assert found[0].shape == (2, 3, 3)


def test_what_is_not_ours_is_refused(tmp_path):
    with pytest.raises(FormatError, match="does not exist"):
        Samples.load(tmp_path / "absent.parquet")
    table().to_parquet(tmp_path / "plain.parquet")
    with pytest.raises(FormatError, match=r"plain Parquet table; read it with bs\.read"):
        Samples.load(tmp_path / "plain.parquet")
    make().save(tmp_path / "s.parquet")
    data = (tmp_path / "s.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match="not a readable Parquet"):
        Samples.load(tmp_path / "cut.parquet")
    with pytest.raises(InputError, match=r"name the file 's\.parquet'"):
        make().save(tmp_path / "s.csv")
    with pytest.raises(InputError, match="mixes types"):
        make(odd=[1, "x", 2.5, b"y"]).save(tmp_path / "odd.parquet")
    with pytest.raises(FormatError, match="no reader 'plian'; did you mean 'plain'"):
        make_reader({"kind": "plian"})


# -- failures.csv ------------------------------------------------------------------------------------------------------


def test_failures_are_on_disk_at_once_and_stop_the_stage(tmp_path):
    path = tmp_path / "run" / "failures.csv"
    log = FailureLog(path, stage="embed", total=100, max_failures=0.02)
    assert not path.exists()
    log.add("a", "truncated", 'two\nlines, "quoted"')
    log.add("a", "truncated", "again")  # an item fails once
    assert read_failures(path).to_numpy().tolist() == [["a", "embed", "truncated", 'two lines, "quoted"']]
    log.add("b", "missing")
    with pytest.raises(TooManyFailuresError, match=r"3 of 100 items failed \(2 missing, 1 truncated\).*failures.csv"):
        log.add("c", "missing")
    assert len(read_failures(path)) == 3


def test_stages_share_the_file(tmp_path):
    path = tmp_path / "failures.csv"
    FailureLog(path, stage="one", total=10, max_failures=1).add("a", "missing")
    FailureLog(path, stage="two", total=10, max_failures=1).add("a", "empty")
    assert FailureLog(path, stage="one", total=10, resume=True).reasons == {"a": "missing"}
    FailureLog(path, stage="one", total=10)  # a fresh run of the stage forgets its own rows only
    assert read_failures(path)["stage"].tolist() == ["two"]


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "failures.csv"
    FailureLog(path, stage="one", total=10, max_failures=1).add("a", "missing")
    with open(path, "a") as stream:
        stream.write("b,one,mis")
    assert read_failures(path)["item"].tolist() == ["a"]
    log = FailureLog(path, stage="one", total=10, max_failures=1, resume=True)
    log.add("c", "empty")
    assert read_failures(path)["item"].tolist() == ["a", "c"]


@settings(max_examples=30, deadline=None)
@given(
    total=st.integers(1, 60), n_failed=st.integers(0, 60), share=st.sampled_from([0, 0.05, 0.1, 0.5, 1])
)  # fmt: skip
def test_the_stop_is_exact(tmp_path_factory, total, n_failed, share):
    n_failed = min(n_failed, total)
    log = FailureLog(tmp_path_factory.mktemp("f") / "failures.csv", stage="s", total=total, max_failures=share)
    stopped = False
    for i in range(n_failed):
        try:
            log.add(str(i), "missing")
        except TooManyFailuresError:
            stopped = True
            break
    assert stopped == (n_failed > share * total)


def test_max_failures_is_a_share(tmp_path):
    with pytest.raises(InputError, match="share between 0 and 1"):
        FailureLog(tmp_path / "f.csv", stage="s", total=1, max_failures=5)
