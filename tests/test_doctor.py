"""doctor: what it finds and how it says it."""

from __future__ import annotations

from biosae import doctor
from biosae.doctor import Finding
from biosae.settings import settings


def test_reports_versions_extras_and_places(monkeypatch, tmp_path):
    monkeypatch.setattr(settings, "weights_dirs", (tmp_path / "absent",))
    found = {f.topic: f for f in doctor.examine()}
    assert found["numpy"].state == "ok"
    assert found["weights"].state == "problem"
    assert found["network"].state == "note" and "offline" in found["network"].text
    assert set(found) >= {f"extra {extra}" for extra in doctor.EXTRAS}


def test_extras_are_those_of_the_project():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) | {"all"} == set(project["optional-dependencies"])


def test_missing_package_is_a_problem_with_the_command_that_mends_it(monkeypatch):
    monkeypatch.setattr(doctor, "versions", lambda packages=(): {"pynndescent": "0.7.1", "timm": None})
    found = {f.topic: f for f in doctor.examine()}
    assert found["timm"].state == "problem" and "pip install timm" in found["timm"].text
    assert found["pynndescent"].state == "problem" and "<0.7" in found["pynndescent"].text


def test_a_torchvision_that_does_not_fit_torch_is_explained(monkeypatch):
    real = doctor.importlib.import_module

    def broken(name):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    finding = next(f for f in doctor.examine() if f.topic == "torchvision" and f.state == "problem")
    assert "nms does not exist" in finding.text and "same index" in finding.text
    assert "CPU-only" in doctor.torchvision_mismatch(RuntimeError(), "2.13.0+cpu", None)


def test_text_marks_problems_and_counts_them():
    text = doctor.report([Finding("a", "ok", "fine"), Finding("bb", "problem", "broken")])
    assert text.splitlines()[:2] == ["  a   fine", "! bb  broken"] and "1 problem found." in text
