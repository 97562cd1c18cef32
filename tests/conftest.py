"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

from biosae.settings import settings

# no deadline: machines are busy and kernels are compiled at their first call. The same examples in every run, so that a
# failure belongs to the change that made it; new ones are looked for with ``pytest --hypothesis-profile=explore``
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile("steady")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data packs and pretrained weights that lies beside the project; never part of it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the folder of real data and weights is not beside the project")
    return SHARED


@pytest.fixture(autouse=True)
def _quiet_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "offline", True)
    monkeypatch.setattr(settings, "progress", False)
