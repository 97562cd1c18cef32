"""Manifests: what they may say, where they are found, and that those of biosae are true of the data at hand."""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import zipfile
from pathlib import Path

import pandas as pd
import pytest

import biosae as bs
from biosae.cli import main
from biosae.data import manifests
from biosae.data.hashes import listing
from biosae.data.roles import ROLES
from biosae.errors import FormatError, InputError
from biosae.settings import settings

PACKS = (
    "camera_trap_small_mammals", "covid_cxr", "crc_histopheno", "dicom_zoo", "e4_wearable", "ecg_cinc2021",
    "ecg_cpsc2021_af", "ecg_wfdb_formats", "eeg_eegbci_s001", "eeg_formats", "eeg_mi_openbci", "her2st_spots",
    "nifti_small", "plantvillage_apple", "txl_pbc_blood", "violaceae_herbarium", "wbc_two_devices", "wsi_small",
)  # fmt: skip
PUBLIC = (
    "ade20k", "chbmit", "chexpert", "cinc2021", "conic", "cpsc2018", "cub_200_2011", "e4selflearning", "eegmmidb",
    "fish_vista", "hest", "inat2021", "lizard", "midogpp", "mimic_cxr", "mimic_cxr_jpg", "mitdb", "monusac",
    "nct_crc_he", "nih_chestxray14", "nucls", "padchest", "pannuke", "pathmnist", "pcam", "ptb_xl", "sleep_edfx",
    "snapshot_serengeti", "tuh_eeg", "vindr_cxr",
)  # fmt: skip
MINIMAL = """name = "toy"
title = "Toy"
modality = "ecg"
access = "open"
citation = "Nobody (2020)"
confirmed = ["the page of the toy"]
"""
FILE = '\n[[files]]\npath = "a.csv"\nurls = ["https://example.org/a.csv"]\n'


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(settings, "data_dir", tmp_path / "data")


def written(folder: Path, text: str, name: str = "toy") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.toml").write_text(text)
    return folder / f"{name}.toml"


def test_all_are_there_and_say_what_they_must() -> None:
    table = bs.data.list()
    assert sorted(table.index) == sorted(PACKS + PUBLIC)
    for name in table.index:
        known = bs.data.info(name)
        assert known.confirmed and known.citation, name
        assert known.licence or any("licence" in text for text in known.left_out), name
        assert known.downloadable or known.steps, name
        assert set(known.roles) <= set(ROLES), name
        assert known.split is not None, name
        if known.access != "open":
            assert known.steps and not known.downloadable, name
        if known.source is None:
            assert known.homepage, name
        if name in PUBLIC and known.downloadable and known.hash_list is None:
            for file in known.files:  # every file has a hash, or the manifest says that none is published
                assert file.hash or any("hash" in text for text in known.left_out), (name, file.path)


def test_the_table_can_be_narrowed() -> None:
    ecg = bs.data.list(modality="ecg")
    assert set(ecg["modality"]) == {"ecg"} and "ptb_xl" in ecg.index
    closed = bs.data.list(access="credentialed")
    assert set(closed.index) == {"mimic_cxr", "mimic_cxr_jpg", "vindr_cxr"}
    assert bs.data.list(modality="eeg", access="credentialed").empty
    everything = bs.data.list()
    assert everything.loc["ptb_xl", "n_patients"] == 18869 and everything.loc["ptb_xl", "n_samples"] == 21799
    assert everything.loc["pcam", "bytes"] == 8028222167
    assert pd.isna(everything.loc["pannuke", "bytes"])  # not published, so not known
    with pytest.raises(InputError, match="did you mean 'radiology'"):
        bs.data.list(modality="radiologie")
    with pytest.raises(InputError, match="did you mean 'open'"):
        bs.data.list(access="opened")


def test_names_are_forgiving_and_wrong_ones_get_the_nearest() -> None:
    assert bs.data.info("PTB-XL").name == "ptb_xl"
    with pytest.raises(InputError, match="did you mean 'pannuke'"):
        bs.data.info("panuke")


def test_the_text_for_people_has_every_fact() -> None:
    text = repr(bs.data.info("mimic_cxr_jpg"))
    for part in ("credentialed", "10.13026/jsn5-t979", "65,379 patients", "wget", "SHA256SUMS.txt", "read from:"):
        assert part in text
    assert all(len(line) <= 130 for line in text.splitlines() if " " in line.strip())


def test_the_example_of_the_page_is_a_manifest(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs/data/manifests.md").read_text(encoding="utf-8")
    text = page.split("```toml\n")[1].split("```")[0]
    known = bs.data.info(written(tmp_path, text, "my_cohort"))
    assert known.downloadable and known.units.rate == (500.0, 100.0) and known.folders[0].files == 834


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (MINIMAL + 'licens = "MIT"\n' + FILE, "unknown key 'licens'; did you mean 'licence'"),
        (MINIMAL + FILE + 'sha1 = "x"\n', "unknown key 'sha1'; did you mean 'sha256'"),
        (MINIMAL + FILE + 'sha256 = "abc"\n', "SHA-256"),
        (MINIMAL + FILE + 'md5 = "abc"\n', "MD5"),
        (MINIMAL + FILE + "bytes = -1\n", "greater than or equal to 0"),
        (MINIMAL + FILE.replace("https:", "ftp:"), "web address"),
        (MINIMAL + FILE.replace('"a.csv"', '"../a.csv"'), "relative path"),
        (MINIMAL + FILE.replace('"a.csv"', '"/a.csv"'), "relative path"),
        (MINIMAL + FILE + FILE, "listed twice: a.csv"),
        (MINIMAL + 'doi = "doi.org/1"\n' + FILE, "DOI"),
        (MINIMAL + 'path = "x"\n' + FILE, "unknown key 'path'"),
        (MINIMAL + 'hash_list = "SHA256SUMS.txt"\n', "base_urls"),
        (MINIMAL + 'base_urls = ["https://example.org/db/"]\n', "hash_list"),
        (MINIMAL + 'source = "toy"\n', "local:<folder>"),
        (MINIMAL, "steps"),
        (MINIMAL + FILE + '\n[roles]\npatiens = "id"\n', "did you mean 'patient'"),
        (MINIMAL.replace('"ecg"', '"ekg"') + FILE, "modality"),
        (MINIMAL.replace('access = "open"\n', "") + FILE, "access"),
        (MINIMAL.replace('"toy"', '"tot"') + FILE, "must agree"),
        (MINIMAL + "= 1", "not valid TOML"),
    ],
)
def test_a_wrong_manifest_is_refused_by_name(tmp_path: Path, text: str, why: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(FormatError) as caught:
        bs.data.info(path)
    assert why in str(caught.value) and str(path) in str(caught.value)


def test_own_manifests_are_found_and_come_first(tmp_path: Path) -> None:
    path = written(tmp_path / "elsewhere", MINIMAL + FILE)
    assert bs.data.info(path).files[0].urls == ("https://example.org/a.csv",)
    with pytest.raises(InputError):
        bs.data.info("toy")
    written(settings.data_dir / "manifests", MINIMAL + FILE)
    assert bs.data.info("toy").title == "Toy"
    assert "toy" in bs.data.list().index
    written(settings.data_dir / "manifests", MINIMAL.replace('"toy"', '"pcam"') + FILE, "pcam")
    assert bs.data.info("pcam").title == "Toy"
    with pytest.raises(FormatError, match="does not exist"):
        bs.data.info(tmp_path / "none.toml")


def test_manifests_are_found_in_a_wheel_and_in_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkout = Path(__file__).parents[1] / "data_manifests"
    assert manifests.folders() == [checkout]
    installed = tmp_path / "site-packages/biosae"
    written(installed / "data_manifests", MINIMAL + FILE)
    written(installed.parent / "data_manifests", MINIMAL, "of_somebody_else")
    monkeypatch.setattr(manifests, "__file__", str(installed / "data/manifests.py"))
    assert manifests.folders() == [installed / "data_manifests"]
    assert list(bs.data.list().index) == ["toy"]


@pytest.mark.slow
def test_the_wheel_carries_the_manifests(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    root = Path(__file__).parents[1]
    (made,) = wheel.WheelBuilder(str(root)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(made) as bundle:
        inside = {name for name in bundle.namelist() if name.endswith(".toml") and "data_manifests" in name}
    assert inside == {f"biosae/data_manifests/{name}.toml" for name in PACKS + PUBLIC}


def test_the_listing_is_what_sha256sum_would_write(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for path, body in (("b/x", b"one"), ("a.txt", b"two"), (".hidden", b"three"), ("b/.DS_Store", b"four")):
        (tmp_path / path).write_bytes(body)
    text = f"{hashlib.sha256(b'two').hexdigest()}  a.txt\n{hashlib.sha256(b'one').hexdigest()}  b/x\n"
    assert listing(tmp_path) == (2, 6, hashlib.sha256(text.encode()).hexdigest())


@pytest.mark.parametrize("name", PACKS)
def test_packs_are_as_described(shared: Path, name: str) -> None:
    known, folder = bs.data.info(name), shared / "data" / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not beside the project")
    found = bs.data.verify(name, folder)
    assert set(found["status"]) == {"ok"}, found
    top = {p.name + ("/" if p.is_dir() else "") for p in folder.iterdir() if not p.name.startswith(".")}
    assert top - {"README.md"} == set(found["file"])
    table = pd.read_csv(folder / known.table)
    for role, column in known.roles.items():
        assert column in table, role
    for pattern in (p.strip() for text in known.columns for p in text.split(",")):
        assert fnmatch.filter(table.columns, pattern), pattern
    assert known.n["samples"] == len(table)
    if "patients" in known.n:
        assert known.n["patients"] == table[known.roles["patient"]].nunique()
    if known.split.column:
        assert known.split.column in table
    settings.data_dir = shared / "data"
    assert known.folder == folder and bs.data.fetch(name) == folder


def test_verify_says_what_is_wrong_with_a_folder(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ecg"
    shutil.copytree(shared / "data/ecg_cpsc2021_af", folder)
    (folder / "records/data_101_6.dat").unlink()
    found = bs.data.verify("ecg_cpsc2021_af", folder).set_index("file")["status"]
    assert dict(found) == {"manifest.csv": "ok", "records/": "missing", "records/data_101_6.dat": "missing"}
    shutil.copy(shared / "data/ecg_cpsc2021_af/records/data_101_6.dat", folder / "records")
    record = folder / "records/data_101_8.dat"
    body = record.read_bytes()
    record.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    assert bs.data.verify("ecg_cpsc2021_af", folder).set_index("file")["status"]["records/"] == "wrong hash"
    record.write_bytes(body[:-1])
    assert bs.data.verify("ecg_cpsc2021_af", folder).set_index("file")["status"]["records/"] == "wrong size"
    record.write_bytes(body)
    (folder / "records/.DS_Store").touch()
    (folder / "manifest.csv").write_text("path\n")
    found = bs.data.verify("ecg_cpsc2021_af", folder).set_index("file")["status"]
    assert dict(found) == {"manifest.csv": "wrong size", "records/": "ok"}
    shutil.rmtree(folder / "records")
    assert bs.data.verify("ecg_cpsc2021_af", folder).set_index("file")["status"]["records/"] == "missing"


def test_files_without_hash_or_size_are_unknown(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + FILE)
    (tmp_path / "a.csv").touch()
    assert list(bs.data.verify(path, tmp_path)["status"]) == ["unknown"]
    with pytest.raises(InputError, match="is not a folder"):
        bs.data.verify(path, tmp_path / "none")
    with pytest.raises(InputError, match="nothing to compare"):
        bs.data.verify("padchest", tmp_path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["biosae", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert run(monkeypatch, "data", "list", "--modality", "radiology") == 0
    text = capsys.readouterr().out
    assert "mimic_cxr_jpg" in text and "ptb_xl" not in text
    assert run(monkeypatch, "data", "list", "--modality", "eeg", "--access", "credentialed") == 0
    assert run(monkeypatch, "data", "info", "hest") == 0
    assert "CC BY-NC-SA 4.0" in capsys.readouterr().out
    assert run(monkeypatch, "data", "fetch", "chexpert") == 2
    assert "Research Use Agreement" in capsys.readouterr().err
    path = written(tmp_path, MINIMAL + FILE + f'sha256 = "{hashlib.sha256(b"x").hexdigest()}"\n')
    (tmp_path / "a.csv").write_bytes(b"x")
    assert run(monkeypatch, "data", "verify", path, "--folder", tmp_path) == 0
    assert run(monkeypatch, "data", "fetch", path, "--out", tmp_path) == 0  # whole, so nothing is downloaded
    (tmp_path / "a.csv").write_bytes(b"y")
    assert run(monkeypatch, "data", "verify", path, "--folder", tmp_path) == 1
    assert "wrong hash" in capsys.readouterr().out
    assert run(monkeypatch, "data", "fetch", path, "--out", tmp_path) == 2
    assert "settings.offline" in capsys.readouterr().err
