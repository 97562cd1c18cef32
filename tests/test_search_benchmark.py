"""The benchmark of search runs and its tools agree; the tables of the retrieval page are those of its numbers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_all_tools_find_the_same_neighbours() -> None:
    pytest.importorskip("faiss")
    import search

    found = search.measure(search.SMALL, repeats=1)
    for tools in found["found"].values():
        assert all(row["same"] > 0.98 for row in tools.values())  # float32 of faiss may swap near ties
    assert "| sparse codes | biosae |" in search.table(found)


def test_codes_of_the_benchmark_have_k_different_latents() -> None:
    import search

    X = search.codes(500, 64, 6, seed=0)
    X.sum_duplicates()
    assert (X.getnnz(axis=1) == 6).all() and X.getnnz(axis=0).max() > 3 * X.getnnz(axis=0).mean()


def test_animal_table_averages_seeds() -> None:
    import retrieval

    numbers = pd.DataFrame(
        [
            ("c1", 0, "best", 10, 3, 0.5, None),
            ("c1", 1, "best", 10, 3, 0.7, None),
            ("c1", 0, "random", 10, 3, 0.3, 0.4),
        ],
        columns=["camera", "seed", "method", "n", "animals", "ap", "ap_95"],
    )
    lines = retrieval.animal_table(numbers).splitlines()
    assert lines[0] == "| ranking | c1 (3 of 10) |"
    assert lines[2:] == ["| best | 0.600 [0.500 to 0.700] |", "| random | 0.300, 95 % below 0.400 |"]
