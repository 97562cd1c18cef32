"""Audits of signals, vectors and crops: planted defects are found, clean sets have none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

import biosae as bs
from biosae.data.items import ReadError
from biosae.data.overlap import connected_parts


class Planted:
    """Reader of arrays in memory, one a sample id."""

    def __init__(self, item: str, arrays: dict[str, np.ndarray], rate: float | None = None) -> None:
        self.item, self.arrays, self.rate = item, arrays, rate
        self.unit, self.channels = ("uV", ("a", "b", "c")) if item == "signal" else (None, ())

    def __call__(self, row: Any) -> np.ndarray:
        if row["sample_id"] == "gone":
            raise ReadError("truncated", "planted")
        return self.arrays[row["sample_id"]]

    def spec(self) -> dict[str, Any]:
        return {"kind": "planted", "item": self.item}


def cohort(item, arrays, rate=None, **columns):
    obs = pd.DataFrame({"patient": [f"p{i // 2}" for i in range(len(arrays))], **columns}, index=list(arrays))
    return bs.Samples(obs, Planted(item, arrays, rate), roles={"patient": "patient"})


def kinds(result):
    return {p.split(":")[0] for p in result.problems}


def signals(n=12):
    rng = np.random.default_rng(0)
    return {f"s{i:02d}": rng.normal(size=(3, 200)).astype("f4") for i in range(n)}


def test_clean_signals_and_vectors():
    result = cohort("signal", signals(), rate=100.0).audit()
    assert result.problems == []
    assert result.items.iloc[0][["n_channels", "n_times", "seconds", "missing_share", "n_flat"]].tolist() == [
        3, 200, 2.0, 0.0, 0,
    ]  # fmt: skip
    assert result.checks.set_index("check").loc["duplicates", "message"] == "no signal occurs twice"
    assert "image" not in str(result)
    vectors = {f"v{i}": np.random.default_rng(i).normal(size=7).astype("f4") for i in range(12)}
    result = cohort("features", vectors).audit()
    assert result.problems == []
    assert (result.items["length"] == 7).all()
    assert "image" not in str(result)


def test_defects_of_signals():
    arrays = signals()
    arrays["s03"][1] = 4.5  # one flat channel
    arrays["s04"][:] = np.nan  # nothing recorded
    arrays["s05"][2, 50:100] = np.nan
    arrays["s07"] = arrays["s00"].copy()  # another patient
    arrays["s08"] = arrays["s08"][:, :150]
    arrays["gone"] = arrays.pop("s09")
    result = cohort("signal", arrays, rate=100.0, split=["train", "test"] * 6).audit()
    found = "\n".join(result.problems)
    assert kinds(result) >= {"flat", "blank", "gaps", "duplicates", "sizes", "unreadable", "leakage"}
    assert "1 signal(s) occur more than once (2 samples), 1 with different patient" in found
    assert "1 signals flat or missing throughout" in found
    assert "2 signals have missing values, at most 100% of one" in found
    assert "2 sizes: 10 of 3 x 200, 1 of 3 x 150" in found
    assert "1 groups of identical signals lie in more than one part" in found
    assert result.items.loc["s05", "missing_share"] == pytest.approx(50 / 600)
    assert result.items["n_flat"].sum() == 1
    assert set(result.duplicates["sample_id"]) == {"s00", "s07"}


def test_equal_values_are_equal_signals_whatever_their_gaps_are_made_of():
    one = signals(2)["s00"]
    one[0, 0] = 0.0
    other = one.copy()
    other[0, 0] = -0.0
    one[1, 3] = np.nan
    other.view(np.uint32)[1, 3] = 0xFFC00001  # another NaN
    result = cohort("signal", {"a": one, "b": other, **signals(8)}, rate=1.0).audit()
    assert result.duplicates["sample_id"].tolist() == ["a", "b"]


def test_defects_of_vectors():
    vectors = {f"v{i}": np.random.default_rng(i).normal(size=7).astype("f4") for i in range(12)}
    vectors["v1"][3] = np.inf
    vectors["v2"][:] = 3
    vectors["v5"] = vectors["v4"].copy()
    vectors["v6"] = vectors["v6"][:5]
    result = cohort("features", vectors).audit()
    assert kinds(result) == {"finite", "blank", "duplicates", "sizes"}
    assert "1 vectors hold NaN or infinity" in "\n".join(result.problems)


def test_seconds_where_rates_differ():
    result = cohort("signal", signals(10), duration=[2.0] * 9 + [4.0]).audit()
    assert result.items["seconds"].tolist() == [2.0] * 9 + [4.0]


def test_recordings_sequences_and_files_must_not_cross_the_split():
    split = ["train"] * 6 + ["test"] * 6
    units = {"recording": [f"r{i}" for i in range(6)] * 2, "sequence": ["q"] * 12, "location": list("ab") * 6}
    result = cohort("signal", signals(), rate=1.0, split=split, **units).audit(read=False)
    assert result.leakage["unit"].value_counts().to_dict() == {"recording": 6, "sequence": 1}
    assert "6 recordings and 1 sequences lie in more than one part" in "\n".join(result.problems)
    assert any("6 recordings belong to several patients" in p for p in result.problems)
    assert result.counts.set_index("what").loc[["recording", "sequence", "location"], "n"].tolist() == [6, 1, 2]
    crops = cohort("signal", signals(), rate=1.0, split=split, path=["x.png", "y.png"] + ["z.png"] * 10)
    assert crops.audit(read=False).leakage.to_numpy().tolist() == [["file", "z.png", "test, train", 10]]


def test_parts_of_a_table_that_share_no_level():
    table = pd.DataFrame([[3, 0, 0], [1, 2, 0], [0, 4, 0], [0, 0, 5]], index=list("abcd"))
    assert connected_parts(table) == [["a", "b", "c"], ["d"]]  # a and c are joined through b
    obs = {"label": list("aabbccdd") * 2, "site": list("nnnnnsss") * 2}
    result = cohort("signal", signals(16), rate=1.0, **obs).audit(read=False)
    assert result.overlap["n_parts"].tolist() == [1]
    obs["site"] = list("nnnnmmss") * 2
    result = cohort("signal", signals(16), rate=1.0, **obs).audit(read=False)
    assert result.overlap[["n_parts", "parts"]].to_numpy().tolist() == [[3, "a, b | c | d"]]
    assert any(p.startswith("inseparable: label by site: labels fall into 3 sets") for p in result.problems)


def test_records_of_three_hospitals(shared, tmp_path):
    """A record that is copied under another name, with another header, is found by its values."""
    pytest.importorskip("wfdb")
    folder = shared / "data" / "ecg_cinc2021"
    table = pd.read_csv(folder / "manifest.csv").iloc[:8]
    (tmp_path / "records").mkdir()
    for name in table["sample_id"]:
        for end in ("hea", "mat"):
            data = (folder / "records" / f"{name}.{end}").read_bytes()
            (tmp_path / "records" / f"{name}.{end}").write_bytes(data)
            if name == table["sample_id"].iloc[0]:
                twin = data if end == "mat" else data.replace(name.encode(), b"TWIN1").replace(b"#Age", b"#Years")
                (tmp_path / "records" / f"TWIN1.{end}").write_bytes(twin)
    twin = table.iloc[[0]].assign(sample_id="TWIN1", path="records/TWIN1.hea", patient_id="another")
    samples = bs.read.wfdb(pd.concat([table, twin]), root=tmp_path, patient="patient_id", site="site", n_jobs=1)
    result = samples.audit(n_jobs=1)
    assert {i.split("@")[0] for i in result.duplicates["sample_id"]} == {table["sample_id"].iloc[0], "TWIN1"}
    assert not result.duplicates["same_file"].any()
    assert "1 with different patient" in "\n".join(result.problems)
