"""Names and notes: round trips, rules of merging, and files that want to do harm."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given

from biosae.errors import BiosaeError, FormatError, IdentityError, InputError
from biosae.interpret import dictionary_fingerprint, read_names, write_names
from biosae.interpret.names import FIELDS, LARGEST_FILE


def latents(m: int = 6, *, seed: int = 0, **var: dict[str, str]) -> anndata.AnnData:
    names = [f"L{j:04d}" for j in range(m)]
    adata = anndata.AnnData(sp.eye(m, format="csr", dtype=np.float32), var=pd.DataFrame(index=names))
    adata.varm["decoder"] = np.random.default_rng(seed).normal(size=(m, 3)).astype(np.float32)
    for field, texts in var.items():
        adata.var[field] = [texts.get(name, "") for name in names]
    return adata


def saved(folder: Path, *entries: dict, **changes: object) -> Path:
    file = folder / "names.json"
    content = {"format": "biosae-names", "version": 1, "fingerprint": dictionary_fingerprint(latents()),
               "latents": list(entries), **changes}  # fmt: skip
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def test_names_come_into_var_and_say_what_changed(tmp_path):
    adata = latents(name={"L0001": "mucus", "L0002": "edge"})
    file = saved(
        tmp_path, {"latent": "L0000", "name": "plasma cells", "note": "near vessels\n\tsee L0003", "status": "sure"},
        {"latent": "L0001", "name": "mucus", "note": None}, {"latent": "L0002", "name": "", "note": "a fold?"},
    )  # fmt: skip
    table = read_names(file, adata)
    assert adata.var["name"].tolist() == ["plasma cells", "mucus", "edge", "", "", ""]  # an empty text deletes nothing
    assert adata.var["note"]["L0000"] == "near vessels\n\tsee L0003" and adata.var["status"]["L0000"] == "sure"
    assert table[["latent", "field", "change"]].to_numpy().tolist() == [
        ["L0000", "name", "new"], ["L0000", "note", "new"], ["L0000", "status", "new"],
        ["L0001", "name", "same"], ["L0002", "note", "new"],
    ]  # fmt: skip
    assert set(read_names(file, adata)["change"]) == {"same"}


@pytest.mark.parametrize(("rule", "name", "change"), [("new", "file's", "replaced"), ("old", "mine", "kept")])
def test_conflicts_are_settled_as_asked(rule, name, change, tmp_path):
    adata = latents(name={"L0003": "mine"})
    file = saved(tmp_path, {"latent": "L0003", "name": "file's"}, {"latent": "L0004", "name": "other"})
    before = adata.var.copy()
    with pytest.raises(InputError, match=r"differ in 1 texts.*mine.*file's.*Nothing was taken"):
        read_names(file, adata)
    pd.testing.assert_frame_equal(adata.var, before)
    table = read_names(file, adata, on_conflict=rule)
    assert adata.var["name"]["L0003"] == name and adata.var["name"]["L0004"] == "other"
    assert table["change"].tolist() == [change, "new"] and table["before"].tolist() == ["mine", ""]


def test_names_belong_to_a_dictionary_not_to_a_cohort(tmp_path):
    file = saved(tmp_path, {"latent": "L0000", "name": "x"})
    read_names(file, latents()[:2].copy())  # other samples, same dictionary
    with pytest.raises(IdentityError, match="another dictionary"):
        read_names(file, latents(seed=1))
    other = latents(seed=1)
    read_names(file, other, other_dictionary=True)
    assert other.var["name"].iloc[0] == "x"
    bare = latents()
    del bare.varm["decoder"]
    with pytest.raises(InputError, match="no 'decoder'"):
        read_names(file, bare)


def test_names_survive_h5ad_and_serve_search(tmp_path):
    from biosae.search import by_property

    adata = latents()
    read_names(saved(tmp_path, {"latent": "L0004", "name": "plasma cells"}), adata)
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert by_property(back, "high 'plasma cells'")["sample_id"].tolist() == ["4"]
    write_names(back, tmp_path / "again.json")
    again = latents()
    read_names(tmp_path / "again.json", again)
    assert again.var["name"].tolist() == adata.var["name"].tolist()


text = st.text(st.characters(exclude_categories=()), max_size=30).filter(lambda t: "000" not in t)


@given(entries=st.dictionaries(st.integers(0, 5), st.fixed_dictionaries(dict.fromkeys(FIELDS, text))))
def test_what_is_written_is_read(entries, tmp_path_factory):
    """Any Unicode: what was taken once is a fixed point."""
    folder = tmp_path_factory.mktemp("names")
    first, second = latents(), latents()
    listed = [{"latent": f"L{j:04d}", **texts} for j, texts in entries.items()]
    read_names(saved(folder, *listed), first)
    write_names(first, folder / "second.json")
    read_names(folder / "second.json", second)
    pd.testing.assert_frame_equal(first.var, second.var)
    joined = "".join(first.var.to_numpy().ravel())
    assert not set(joined) & set("\x00\x1b\u202e\u2066\ufeff\ud800") and "\n" not in "".join(first.var["name"])


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["format", "version", "fingerprint", "latents", "latent", "name"]), inner)
        ),
    ),
    field=st.sampled_from(["format", "version", "fingerprint", "latents", "latents[]", ""]),
)
def test_any_json_is_taken_whole_or_refused_with_a_reason(value, field, tmp_path_factory):
    folder, adata = tmp_path_factory.mktemp("any"), latents()
    before = adata.var.copy()
    if field == "latents[]":
        file = saved(folder, {"latent": "L0001", "name": "good"}, value)
    elif field:
        file = saved(folder, {"latent": "L0001", "name": "good"}, **{field: value})
    else:
        file = folder / "names.json"
        file.write_text(json.dumps(value))
    try:
        read_names(file, adata)
    except BiosaeError:
        pd.testing.assert_frame_equal(adata.var, before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"format": "biosae-names", "version": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'"biosae-names"', "no file of names"),
        (b'{"format": "biosae.codes"}', "no file of names"),
        (b'{"format": "biosae-names", "version": 2}', "update biosae"),
        (b'{"format": "biosae-names", "version": true}', "has version True"),
        (b'{"format": "biosae-names", "version": 1, "fingerprint": 3, "latents": []}', "must be text"),
    ],
)
def test_damaged_files_are_refused(content, message, tmp_path):
    file = tmp_path / "names.json"
    file.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_names(file, latents())


def test_a_file_too_large_is_not_read(tmp_path):
    file = tmp_path / "names.json"
    with open(file, "wb") as stream:
        stream.truncate(LARGEST_FILE + 1)
    with pytest.raises(FormatError, match="at most"):
        read_names(file, latents())
    with pytest.raises(FormatError, match="does not exist"):
        read_names(tmp_path / "none.json", latents())


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ([{"latent": "L0001"}, {"latent": "L0001", "name": "x"}], FormatError, "twice"),
        ([{"latent": 1, "name": "x"}], FormatError, "names no latent"),
        (["L0001"], FormatError, "names no latent"),
        ([{"latent": "L0001", "name": ["x"]}], FormatError, "is not text"),
        ([{"latent": "L0001", "name": "x" * 201}], FormatError, "over 200"),
        ([{"latent": "L0009", "name": "x"}], InputError, "no latent 'L0009' here; did you mean"),
        ([{"latent": "__proto__", "name": "x"}], InputError, "no latent"),
        ([{"latent": "L0001", "name": "l0002 "}], InputError, "is another latent"),
        ([{"latent": "L0001", "name": "L00\u200b02"}], InputError, "is another latent"),  # a blank of no width
    ],
)
def test_entries_that_mislead_are_refused_whole(entries, error, message, tmp_path):
    adata = latents()
    with pytest.raises(error, match=message):
        read_names(saved(tmp_path, {"latent": "L0000", "name": "good"}, *entries), adata)
    assert list(adata.var.columns) == []


def test_markup_and_directions_stay_or_go(tmp_path):
    adata = latents()
    hostile = {
        "latent": "L0001",
        "name": "<script>alert(1)</script>",
        "note": "safe\u202eexe.txt\x00\x1b[2J",
        "other": {},
    }
    read_names(saved(tmp_path, hostile), adata)
    assert adata.var["name"]["L0001"] == "<script>alert(1)</script>"  # text; who draws it escapes it
    assert adata.var["note"]["L0001"] == "safeexe.txt[2J" and "other" not in adata.var


def test_writing_refuses_what_could_not_be_read(tmp_path):
    with pytest.raises(InputError, match="name of L0002 has 201 characters"):
        write_names(latents(name={"L0002": "x" * 201}), tmp_path / "names.json")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="did you mean 'new'"):
        read_names(tmp_path / "names.json", latents(), on_conflict="newer")


def test_a_long_latent_makes_a_short_message_and_a_folder_is_no_file(tmp_path):
    with pytest.raises(InputError) as caught:
        read_names(saved(tmp_path, {"latent": "x" * 100_000, "name": "a"}), latents())
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
    with pytest.raises(FormatError, match="cannot be read"):
        read_names(tmp_path, latents())


def test_a_name_that_only_looks_like_no_other_latent_is_refused(tmp_path):
    with pytest.raises(InputError, match="another latent"):
        read_names(saved(tmp_path, {"latent": "L0000", "name": "L00\u200d01"}), latents())  # a joiner is not seen
