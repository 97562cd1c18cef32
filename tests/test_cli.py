"""The command line as a user meets it: the ordinary way once, and every mistake as one message and exit status 2."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

import biosae as bs
from biosae import cli
from biosae.settings import Settings, settings

LAYER = "emb/tiny-histology/final"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small cohort, taken through every command to latents and a table."""
    folder = tmp_path_factory.mktemp("study")
    bs.data.phantom(n_patients=6, n_tiles=4, out=folder / "tiles", random_state=0)
    assert run(
        "embed", folder / "tiles/samples.csv", "tiny-histology", "--patient", "patient", "--mpp", "0.5",
        "--out", folder / "emb",
    ) == 0  # fmt: skip
    assert run("train", folder / LAYER, "--out", folder / "sae", "--n-latents", "16", "--k", "2") == 0
    assert run("encode", folder / "sae", folder / LAYER, "--out", folder / "latents.h5ad") == 0
    return folder


def run(*arguments: object) -> int:
    """Exit status of ``biosae <arguments>``, run in this process with settings put back afterwards."""
    before, argv, show = asdict(settings), sys.argv, warnings.showwarning
    sys.argv = ["biosae", "--quiet", "--offline", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv, warnings.showwarning = argv, show
        for name, value in before.items():
            setattr(settings, name, value)
    return 0


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one message with which the command is refused."""
    capsys.readouterr()
    assert run(*arguments) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    messages = [line for line in text.splitlines() if not line.startswith("biosae: note:")]
    assert messages[0].startswith("biosae: ")
    return "\n".join(messages)


def test_a_table_of_results_comes_out(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "associations.csv"
    with_option = ("associate", study / "latents.h5ad", "count_plasma", "--unit", "patient", "--out", out, "--option")
    assert run(*with_option, "correction=storey") == 0
    assert run(*with_option, "corection=storey") == 2
    assert run("associate", study / "latents.h5ad", "count_plasma", "--unit", "patient", "--out", out) == 0
    table = pd.read_csv(out)
    assert set(table["source"]) == {"latent", "raw", "pca"} and (table["target"] == "count_plasma").all()
    assert "count_plasma" in capsys.readouterr().out


def test_saved_samples_need_no_columns(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    saved = tmp_path / "samples.parquet"
    bs.read.tiles(study / "tiles/samples.csv", patient="patient", mpp=0.5).save(saved)
    assert run("data", "audit", saved) == 0
    assert "6 patients" in capsys.readouterr().out
    assert "without --patient" in refused(capsys, "data", "audit", saved, "--patient", "patient")


def test_wrong_tables(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = study / "tiles/samples.csv"
    assert "--patient-unknown" in refused(capsys, "data", "audit", table)
    assert "did you mean 'patient'" in refused(capsys, "data", "audit", table, "--patient", "patients")
    assert "no file or folder" in refused(capsys, "data", "audit", tmp_path / "nope.csv", "--patient-unknown")
    empty = tmp_path / "empty.csv"
    empty.write_text("path,patient\n")
    assert "no rows" in refused(capsys, "data", "audit", empty, "--patient", "patient")
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1")
    assert "not a readable Parquet file" in refused(capsys, "data", "audit", damaged, "--patient", "patient")


def test_a_folder_in_use(study: Path, capsys: pytest.CaptureFixture) -> None:
    command = ("embed", study / "tiles/samples.csv", "tiny-histology", "--patient", "patient", "--mpp", "0.5")
    out = study / "taken"
    assert run(*command, "--out", out) == 0
    message = refused(capsys, *command, "--out", out, "--pool", "mean", "--layer", "final")
    assert "pool: 'head' there, 'mean' now" in message and "--no-resume" in message
    assert run(*command, "--out", out, "--pool", "mean", "--no-resume") == 0


def test_wrong_encoders(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def embed(*more: object) -> str:
        common = (study / "tiles/samples.csv", "--patient", "patient", "--mpp", "0.5", "--out", tmp_path / "e")
        return refused(capsys, "embed", *common, *more)

    assert "did you mean 'tiny-histology'" in embed("tiny-histologi")
    assert "--weights-dir" in embed("nic-histology-multitask4")
    assert "Valid:" in embed("tiny-histology", "--layer", "stage9")
    assert "not a weight file" in embed("nic-histology-multitask4", "--weights", study / "tiles/samples.csv")


def test_wrong_folders(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert f"such as {study / LAYER}" in refused(capsys, "train", study / "emb", "--out", tmp_path)
    assert "no split" in refused(capsys, "train", study / LAYER, "--out", tmp_path, "--split", "trai")
    assert "holds no SAE" in refused(capsys, "encode", study, study / LAYER, "--out", tmp_path / "x.h5ad")
    assert "does not exist" in refused(
        capsys, "associate", tmp_path / "x.h5ad", "label", "--unit", "patient", "--out", "a"
    )
    assert "holds no latents.h5ad" in refused(capsys, "report", tmp_path)


def test_damaged_files(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sae = shutil.copytree(study / "sae", tmp_path / "sae")
    (sae / "model.safetensors").write_bytes(b"short")
    assert "copy the folder again" in refused(capsys, "encode", sae, study / LAYER, "--out", tmp_path / "x.h5ad")
    part = tmp_path / "part.h5ad"
    part.write_bytes((study / "latents.h5ad").read_bytes()[:3000])
    assert "encode again" in refused(
        capsys, "associate", part, "label", "--unit", "patient", "--out", tmp_path / "a.csv"
    )


def test_a_file_where_a_folder_is_needed(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    taken = tmp_path / "taken"
    taken.write_text("x")
    message = refused(capsys, "train", study / LAYER, "--out", taken, "--n-latents", "16", "--k", "2")
    assert "taken" in message and "Check the paths" in message


def test_a_full_disk(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    message = refused(capsys, "encode", study / "sae", study / LAYER, "--out", tmp_path / "x.h5ad")
    assert "Free some space" in message
    assert not list(tmp_path.iterdir())


def test_control_c(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> Callable:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal did not arrive")

    monkeypatch.setattr("biosae.embeddings.extract._run", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = run(
            "embed", study / "tiles/samples.csv", "tiny-histology", "--patient", "patient", "--mpp", "0.5",
            "--out", tmp_path,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130
    assert "same command again" in capsys.readouterr().err


def test_a_setting_for_one_folder() -> None:
    assert Settings(weights_dirs="weights").weights_dirs == (Path("weights"),)
    assert Settings(weights_dirs=Path("weights")).weights_dirs == (Path("weights"),)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from biosae.settings import resolve_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(bs.errors.InputError, match="Valid: 'auto', 'cuda'"):
        resolve_device("gpu")
    with pytest.raises(bs.errors.InputError, match="no usable cuda"):
        resolve_device("cuda:1")
    monkeypatch.setattr(settings, "device", "cuda")
    with pytest.raises(bs.errors.InputError, match="no usable cuda"):
        bs.encoders.load("tiny-histology")
    monkeypatch.setattr(settings, "device", "cpu")
    assert resolve_device("auto") == resolve_device(None) == "cpu"


def test_mistakes_in_python(tmp_path: Path) -> None:
    frame = pd.DataFrame({"path": ["a.png"], "who": ["p"]})
    with pytest.raises(bs.errors.InputError, match="patient=None if nobody knows"):
        bs.read.tiles(frame, mpp=1)
    with pytest.raises(bs.errors.InputError, match="pass a file, a folder or a pandas DataFrame"):
        bs.read.images({"path": ["a.png"]}, patient=None)
    with pytest.raises(bs.errors.InputError, match="read it first"):
        bs.encoders.embed("tiles.csv", "tiny-histology", out=tmp_path)


def test_encoders_are_listed_and_checked(monkeypatch, capsys):
    monkeypatch.setattr(settings, "weights_dirs", ())
    assert run("encoders", "list", "--item", "signal", "--loadable") == 0
    listed = capsys.readouterr().out
    assert "wildecg-resnet1d" in listed and "uni2-h" not in listed
    assert run("encoders", "check", "eeg-bandpower") == 0
    assert "none needed" in capsys.readouterr().out
    assert run("encoders", "check", "wildecg-resnet1d") == 1
    assert "missing" in capsys.readouterr().out


def test_read_keeps_samples_and_lists_what_it_cannot_use(tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "good.png")
    (tmp_path / "note.dcm").write_bytes(b"no image at all")
    out = tmp_path / "out/samples.parquet"
    assert run("read", "images", tmp_path / "good.png", "--patient-unknown", "--out", out) == 2
    assert "did you mean" in refused(
        capsys, "read", "images", tmp_path, "--patient-unknown", "--out", out, "--option", "pagee=0"
    )
    assert run("read", "images", tmp_path, "--patient-unknown", "--out", out) == 0
    assert bs.Samples.load(out).ids.tolist() == ["good.png"]
    message = refused(capsys, "read", "images", "nowhere", "--patient-unknown", "--out", out.with_suffix(".csv"))
    assert "saved as Parquet" in message  # before anything is read
    message = refused(capsys, "read", "dicom", tmp_path, "--patient-unknown", "--out", out)
    assert "max_failures" in message and "failures.csv" in message
    assert (tmp_path / "out/failures.csv").is_file()
