"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator
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


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is written to the user's cache, the secret of pseudonyms least of all."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(settings, "cache_dir", folder)
        patch.setenv("BIOSAE_CACHE_DIR", str(folder))  # processes that tests start
        yield


@pytest.fixture(autouse=True)
def _quiet_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "offline", True)
    monkeypatch.setattr(settings, "progress", False)
