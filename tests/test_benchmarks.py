"""The benchmark of SAEs judges everyone alike: its numbers, its order of rows, its rejection of noisy rounds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_quality_of_a_known_reconstruction() -> None:
    from saebench.measure import quality

    held, seen = torch.randn(3000, 5) + 3, torch.randn(2500, 5)
    mean = held.mean(0)

    def apply(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fired = torch.zeros(len(x), 4, dtype=torch.bool)
        fired[:, 0] = True
        fired[:, 1] = x[:, 0] > 1e9
        return fired, mean + 0.75 * (x - mean)

    found = quality(apply, seen=seen, held=held)
    assert found["fvu"] == pytest.approx(1 / 16, rel=1e-5)
    assert found["l0"] == 1 and found["dead"] == 0.75


def test_everyone_sees_the_same_batches_and_a_whole_pass_sees_every_row() -> None:
    from saebench.feed import Feed, Run

    matrix = torch.arange(12.0)[:, None]
    run = Run(8, 2, 4, steps=6, warm=2, learning_rate=None, seed=3)
    one, other = (Feed(matrix, run) for _ in range(2))
    rows = [b.flatten().tolist() for b in one.first(6)]
    assert rows == [matrix[i].flatten().tolist() for _, i in zip(range(6), other.numbers())]
    assert sorted(v for batch in rows[:3] for v in batch) == list(range(12)) and rows[:3] != rows[3:]
    one.close()
    assert run.timed_steps == 3 and run.span[0] >= 0


def test_planted_shares_of_variance() -> None:
    from saebench.data import synthetic

    rows = synthetic(4000, 48, atoms=256, rank=4)
    assert rows.dtype == np.float32 and np.abs(rows.mean(0)).max() < 1e-3
    assert np.square(rows).mean() == pytest.approx(1, abs=0.05)
    np.testing.assert_array_equal(rows, synthetic(4000, 48, atoms=256, rank=4))
    spectrum = np.linalg.eigvalsh(np.cov(rows.T))[::-1] / 48
    assert spectrum[:4].sum() > 0.2 + 0.8 * 4 / 48 * 0.8  # background above an even share of the rest


def test_busy_rounds_do_not_count() -> None:
    from saebench.summary import medians, speed

    numbers = dict.fromkeys(("cpu", "cores", "memory", "anonymous", "peak", "setup"), 1.0)
    numbers |= {"status": "ok", "batch": 100}
    records = [
        {"contestant": "a", "counts": quiet, "wall": wall, "others": load, **numbers}
        for wall, load, quiet in ((1.0, 0.0, True), (9.0, 0.5, False), (2.0, 0.05, True), (4.0, 0.0, True))
    ] + [
        {"contestant": "b", "counts": False, "wall": 1.0, "others": 0.9, **numbers},
        {"contestant": "c", "counts": False, "status": "not installed"},
    ]
    found = medians(records)
    assert speed(found, "a") == 50 and found["a"]["rejected"] == 1
    assert found["b"]["status"] == "no quiet round" and speed(found, "b") is None
    assert found["c"]["status"] == "not installed"


def test_section_replaces_itself_and_nothing_else(tmp_path: Path) -> None:
    from pages import insert

    page = tmp_path / "page.md"
    page.write_text("# Benchmarks\n\nbefore\n")
    insert(page, "sae", "one\n")
    once = page.read_text()
    assert once == "# Benchmarks\n\nbefore\n\n<!-- sae:begin -->\none\n<!-- sae:end -->\n"
    page.write_text(once + "\nafter\n")
    insert(page, "sae", "two")
    assert page.read_text() == once.replace("one", "two") + "\nafter\n"
    page.write_text("before <!-- sae:begin --> after\n")
    with pytest.raises(SystemExit, match="must both stand"):
        insert(page, "sae", "two")
    assert page.read_text() == "before <!-- sae:begin --> after\n", "nothing is lost"


def test_worker_trains_the_dense_loop_and_reports_an_absent_peer(tmp_path: Path) -> None:
    from saebench.contestants import CASES, small
    from saebench.data import write_synthetic

    case = small(CASES[0])
    matrix, held = write_synthetic(tmp_path, n=case.n, d=case.d)
    spec = {
        "matrix": str(matrix), "held": str(held), "threads": 1, "judge": True,
        "run": {
            "n_latents": case.m, "k": case.k, "batch_size": case.batch, "steps": 25, "warm": 2, "learning_rate": 2e-3,
            "seed": 0, "options": {},
        },
    }  # fmt: skip

    def ask(module: str) -> dict:
        command = [sys.executable, str(BENCHMARKS / "sae.py"), "worker", json.dumps(spec | {"module": module})]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return json.loads(lines[-1].removeprefix("RESULT "))

    found = ask("plain")
    assert found["status"] == "ok" and found["steps"] == 22 and found["wall"] > 0
    assert 0 < found["fvu"] < 0.9 and found["l0"] <= case.k
    if not _installed("overcomplete"):
        assert ask("overcomplete_train") == {"status": "not installed"}


def test_statistics_measure_every_task_and_write_the_section(tmp_path: Path) -> None:
    page, out = tmp_path / "page.md", tmp_path / "stats.json"
    page.write_text("before\n<!-- stats:begin -->\nold\n<!-- stats:end -->\nafter\n")
    command = [sys.executable, str(BENCHMARKS / "stats.py"), "--smoke", "--repeats", "1", "--out", str(out)]
    subprocess.run([*command, "--docs", str(page)], check=True, capture_output=True, text=True)
    found = json.loads(out.read_text())["tasks"]
    assert len(found) == 7 and all(row["cpu_s"] > 0 for row in found.values())
    assert found["Pearson"]["dense_cpu_s"] > 0 and found["Wilcoxon"]["loop_cpu_s"] > found["Wilcoxon"]["cpu_s"]
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert all(f"| {name} |" in text for name in found)


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None
