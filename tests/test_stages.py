"""Pipeline: configuration and stage skipping."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from biosae.errors import FormatError, InputError, TooManyFailuresError
from biosae.pipeline import run
from biosae.pipeline.config import find_input, load_config, parse_config, parse_samples
from biosae.pipeline.inputs import content, read_samples
from biosae.pipeline.stages import Stage, run_stages
from biosae.settings import settings

MINIMAL = {
    "name": "x",
    "samples": {"source": "phantom"},
    "encoders": [{"name": "tiny-histology"}],
    "associate": {"targets": ["a"]},
}


def stages(folder: Path, parameter: int, ran: list[str]) -> list[Stage]:
    def work(name: str) -> None:
        ran.append(name)
        (folder / name).write_text(f"{name} {parameter}")

    first = Stage("first", {"parameter": parameter}, ("a.txt",), lambda: work("a.txt"))
    second = Stage("second", {"first": first.key}, ("b.txt",), lambda: work("b.txt"))
    return [first, second, Stage("apart", {}, ("c.txt",), lambda: work("c.txt"))]


def test_stages_run_once_and_again_only_when_something_changed(tmp_path: Path):
    ran: list[str] = []
    said: list[str] = []

    def go(parameter: int = 1, **options: bool) -> dict[str, str]:
        ran.clear()
        return run_stages(stages(tmp_path, parameter, ran), tmp_path, say=said.append, **options)

    go()
    assert ran == ["a.txt", "b.txt", "c.txt"]
    assert set(go().values()) == {"skipped"} and ran == []

    assert go(2, dry_run=True) == {"first": "inputs changed", "second": "inputs changed", "apart": "skipped"}
    assert ran == [] and (tmp_path / "a.txt").read_text() == "a.txt 1"
    go(2)
    assert ran == ["a.txt", "b.txt"]

    (tmp_path / "c.txt").write_text("edited by hand")
    assert go(2)["apart"] == "ran" and ran == ["c.txt"]
    (tmp_path / "b.txt").unlink()
    assert go(2)["second"] == "ran" and ran == ["b.txt"]

    (tmp_path / "stages" / "first.json").write_text("{")
    assert go(2, dry_run=True)["first"] == "record unreadable"

    log = pd.read_csv(tmp_path / "log.csv")
    assert list(log["stage"]) == ["first", "second", "apart", "first", "second", "apart", "second"]
    assert (log["peak_rss_mb"] > 1).all()


def test_a_stage_that_fails_leaves_no_record(tmp_path: Path):
    def fail() -> None:
        raise RuntimeError("no disk")

    with pytest.raises(RuntimeError):
        run_stages([Stage("bad", {}, ("a",), fail)], tmp_path, say=lambda text: None)
    assert not (tmp_path / "stages" / "bad.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampels": {}}, "unknown key 'sampels'; did you mean 'samples'"),
        ({"sae": {"n_latent": 4}}, "did you mean 'n_latents'"),
        ({"samples": {"source": "tiles", "table": "t.csv"}}, "patient_unknown = true"),
        ({"samples": {"source": "tiles", "patient": "p"}}, "'table' is needed"),
        ({"encoders": []}, "at least 1"),
        ({"encoders": [{"name": "a", "role": "control"}]}, 'role = "main"'),
        ({"encoders": [{"name": "a"}, {"name": "a"}]}, "list its layers instead"),
        ({"transfer": {"samples": {"source": "phantom"}, "targets": {"b": "c"}}}, "'b' is not tested"),
        ({"associate": {"targets": ["a"], "n_permutations": -1}}, "greater than or equal to 0"),
    ],
)
def test_configuration_errors_say_what_to_write(change: dict, message: str):
    with pytest.raises(InputError, match=message):
        parse_config({**MINIMAL, **change})


def test_overrides_reach_tables_and_lists(tmp_path: Path):
    path = tmp_path / "p.toml"
    path.write_text(
        'name = "x"\n[samples]\nsource = "phantom"\n[[encoders]]\nname = "a"\n[associate]\ntargets = ["t"]\n'
    )
    config = load_config(path, overrides={"sae.n_latents": 512, "encoders.0.weights": "w"})
    assert config.sae.n_latents == 512 and config.encoders[0].weights == "w"
    with pytest.raises(InputError, match="no such place"):
        load_config(path, overrides={"encoders.7.weights": "w"})
    path.write_text("name = ")
    with pytest.raises(FormatError, match="not valid TOML"):
        load_config(path)
    with pytest.raises(FormatError, match="does not exist"):
        load_config(tmp_path / "none.toml")


def test_a_typo_is_found_before_anything_is_embedded(tmp_path: Path):
    def study(**change: object) -> None:
        run(parse_config({**MINIMAL, **change}), out=tmp_path / "run", say=lambda text: None)

    phantom = {"source": "phantom", "phantom": {"n_patients": 4, "n_tiles": 2}}
    with pytest.raises(InputError, match="did you mean 'tiny-histology'"):
        run(parse_config({**MINIMAL, "encoders": [{"name": "tinyhistology"}]}), out=tmp_path / "run", dry_run=True)
    with pytest.raises(InputError, match=r"'no/such\.safetensors' was not found"):
        study(samples=phantom, encoders=[{"name": "tiny_histology", "weights": "no/such.safetensors"}])
    with pytest.raises(InputError, match=r"associate\.targets.*did you mean 'count_plasma'"):
        study(samples=phantom, associate={"targets": ["count_plasm"]})
    with pytest.raises(InputError, match=r"confounders\.technical.*'scaner'"):
        study(
            samples=phantom, associate={"targets": ["count_plasma"]},
            confounders={"technical": ["scaner"], "biology": ["count_plasma"]},
        )  # fmt: skip
    with pytest.raises(InputError, match="replicate: the samples have no column 'split'"):
        study(samples=phantom, associate={"targets": ["count_plasma"]}, replicate={})
    assert not (tmp_path / "run/embeddings").exists()


def test_an_encoder_from_a_folder_is_named_as_it_calls_itself(tmp_path: Path):
    from biosae.encoders.tiny import TINY_FOLDER

    config = {
        **MINIMAL,
        "samples": {"source": "phantom", "phantom": {"n_patients": 4, "n_tiles": 2}},
        "associate": {"targets": ["count_plasma"], "controls": False},
        "encoders": [{"name": "mine", "source": str(TINY_FOLDER)}],
        "sae": {"n_latents": 8, "k": 2, "options": {"n_steps": 5}},
    }
    with pytest.raises(InputError, match="is called 'tiny-histology'"):
        run(parse_config(config), out=tmp_path, say=lambda text: None)
    config["encoders"][0]["name"] = "tiny_histology"
    run(parse_config(config), out=tmp_path, say=lambda text: None)
    assert (tmp_path / "embeddings/tiny-histology/final/provenance.json").exists()


def test_find_input_looks_beside_the_file_then_in_the_data_folder(tmp_path: Path, monkeypatch):
    base, data = tmp_path / "base", tmp_path / "data"
    for folder in (base, data):
        folder.mkdir()
        (folder / "t.csv").write_text("x")
    monkeypatch.setattr(settings, "data_dir", data)
    assert find_input("t.csv", base=base) == base / "t.csv"
    (base / "t.csv").unlink()
    assert find_input("t.csv", base=base) == data / "t.csv"
    with pytest.raises(InputError, match="--data-dir"):
        find_input("other.csv", base=base)


def test_indicators_and_filters_of_samples(tmp_path):
    """A missing value stays missing in an indicator; it is not a zero."""
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [("P1", "M", "PA"), ("P2", "F", "AP"), ("P3", None, "AP"), ("P4", "M", "L")]
    table = pd.DataFrame(rows, columns=["case", "sex", "view"]).assign(path="a.png", id=list("abcd"))
    table.to_csv(tmp_path / "t.csv", index=False)
    raw = {
        "source": "images", "table": str(tmp_path / "t.csv"), "patient": "case", "id": "id",
        "where": {"view": ["PA", "AP"]}, "indicators": {"male": {"column": "sex", "values": ["M"]}},
    }  # fmt: skip
    samples = read_samples(parse_samples(raw), base=tmp_path, random_state=0)
    assert samples.ids.tolist() == ["a", "b", "c"]
    assert samples.obs["male"].iloc[:2].tolist() == [1.0, 0.0]
    assert np.isnan(samples.obs["male"].iloc[2])
    with pytest.raises(InputError, match="'view' never is 'XX'"):
        read_samples(parse_samples({**raw, "where": {"view": ["PA", "XX"]}}), base=tmp_path, random_state=0)
    wanted = {"view": ["L"], "sex": ["F"]}
    with pytest.raises(InputError, match="keeps no row"):
        read_samples(parse_samples({**raw, "where": wanted}), base=tmp_path, random_state=0)
    with pytest.raises(InputError, match="did you mean 'view'"):
        read_samples(parse_samples({**raw, "where": {"views": ["PA"]}}), base=tmp_path, random_state=0)
    with pytest.raises(InputError, match="takes no 'rates'"):
        read_samples(parse_samples({**raw, "options": {"rates": 3}}), base=tmp_path, random_state=0)
    wrong = {"indicators": {"male": {"column": "sex", "values": ["m"]}}}
    with pytest.raises(InputError, match="'sex' never is 'm'; Valid: 'M', 'F'"):
        read_samples(parse_samples({**raw, **wrong}), base=tmp_path, random_state=0)
    half = pd.read_csv(tmp_path / "t.csv").assign(path=["a.png", "a.png", "none.png", "a.png"])
    half.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(TooManyFailuresError):
        read_samples(parse_samples(raw), base=tmp_path, random_state=0, max_failures=0.2)
    with pytest.warns(UserWarning, match="1 of 4 files are missing"):
        assert len(read_samples(parse_samples(raw), base=tmp_path, random_state=0, max_failures=0.3)) == 3


def test_what_lies_beside_a_table_and_is_no_data_does_not_count(tmp_path):
    """A run folder, a pipeline file or a repository beside the table would make every run begin anew."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"1")
    (tmp_path / "t.csv").write_text("path\nimages/a.png\n")
    before = content(tmp_path / "t.csv")
    for name in ("study.toml", "look.ipynb", ".git/index", "runs/x/stages/samples.json", "runs/x/report.html"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert content(tmp_path / "t.csv") == before
    (tmp_path / "images" / "a.png").write_bytes(b"22")
    assert content(tmp_path / "t.csv") != before
    assert content(tmp_path / "images") != content(tmp_path)
