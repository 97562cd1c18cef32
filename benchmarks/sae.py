"""Sparse autoencoders of biosae against other libraries: speed, memory and quality at equal work.

    python benchmarks/sae.py all --peers-python PEERS/bin/python --shared SHARED
    python benchmarks/sae.py peers|scaling|streaming|loss|report ...      # one part; each keeps the others' results
    python benchmarks/sae.py all --smoke --docs /tmp/benchmarks.md ...    # toy sizes, to see that everything runs

Everyone gets the same rows in the same order, in a process of its own with fixed threads. Rounds alternate; a round in
which other processes used more than a tenth of the machine is repeated. Results: raw rounds as JSON, a section of
docs/benchmarks.md, figures in docs/images. The peers live in an environment of their own (docs/benchmarks.md says how).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from pages import insert, keep
from saebench import contestants as who
from saebench import data, worker
from saebench.rounds import Setting, judged, timed

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("peers", "scaling", "streaming", "loss")


def peers(results: dict[str, Any], options: argparse.Namespace, setting: Setting) -> None:
    """Everyone at the shapes of the table, and on real patch embeddings."""
    cases = [*who.CASES, who.REAL] if options.shared else who.CASES
    found = results.setdefault("peers", {})
    for case in cases:
        if options.cases and case.name not in options.cases:
            continue
        case = who.small(case) if options.smoke else case
        if case.name == who.REAL.name:
            paths = data.write_real(options.work, options.shared, every=20 if options.smoke else 1)
            n, d = data.shape(paths[0])
            case = replace(case, n=n, d=d, batch=min(4096, max(256, n // 16), n))
        else:
            paths = data.write_synthetic(options.work, n=case.n, d=case.d)
        entry = found.setdefault(case.name, {"rounds": [], "quality": []})
        entry["case"] = case.as_dict()
        for name, measure in (("rounds", timed), ("quality", judged)):
            if name in options.measure:
                entry[name] = []
                for record in measure(who.CONTESTANTS, case, paths, setting):
                    entry[name].append(record)
                    keep(results, options.out)


def scaling(results: dict[str, Any], options: argparse.Namespace, setting: Setting) -> None:
    """Seconds a step against rows a step, features, latents and active latents, one changed at a time."""
    labels = (who.OURS, who.OURS_LOW, who.DENSE, who.PRODUCT)
    ones = [c for c in who.CONTESTANTS if c.label in labels]
    base = who.small(who.BASE) if options.smoke else who.BASE
    found = results["scaling"] = []
    done: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for axis, values in who.SWEEPS.items():
        for value in (v // 8 for v in values) if options.smoke else values:
            case = who.sweep(base, axis, value)
            sizes = (case.d, case.m, case.k, case.batch)
            if sizes not in done:  # the middle of every sweep is the same
                paths = data.write_synthetic(options.work, n=case.n, d=case.d)
                done[sizes] = list(timed(ones, case, paths, setting))
            found += [{"axis": axis, "value": value, "case": case.as_dict(), **record} for record in done[sizes]]
            keep(results, options.out)


def streaming(results: dict[str, Any], options: argparse.Namespace, setting: Setting) -> None:
    """Training from a store on disk against training from the same rows in memory."""
    from saebench.streaming import CASE, CASE_SMALL, contestants, store

    case = CASE_SMALL if options.smoke else CASE
    found = results["streaming"] = []
    for n in [20_000] if options.smoke else options.rows:
        with tempfile.TemporaryDirectory(dir=options.work, prefix="store_") as folder:
            array = store(Path(folder), n=n, d=case.d)
            for record in timed(contestants(), replace(case, n=n), (array, array), setting):
                found.append({"n": n, "d": case.d, "batch": case.batch, **record})
                keep(results, options.out)


def loss(results: dict[str, Any], options: argparse.Namespace, setting: Setting) -> None:
    """Loss of every backend against the dense one, same seed and batches."""
    from saebench.loss import compare

    found = results["loss"] = []
    for record in compare(seeds=range(2 if options.smoke else 4), smoke=options.smoke, threads=setting.threads):
        found.append(record)
        keep(results, options.out)


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    name = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags]
    return {
        "cpu": name, "cores": os.cpu_count(), "threads": threads, "instructions": wide, "torch": torch.__version__,
        "python": platform.python_version(),
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        worker.main(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("all", *PARTS, "report"))
    parser.add_argument("--peers-python", help="interpreter of the environment that has the peers")
    parser.add_argument("--shared", type=Path, help="folder with data/her2st_spots and weights/, for real embeddings")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "biosae_bench", help="cache of data")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/sae.json", help="raw results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/benchmarks.md", help="page that gets the tables")
    parser.add_argument("--cases", nargs="*", help=f"of peers: {[c.name for c in who.CASES]} and {who.REAL.name!r}")
    parser.add_argument(
        "--measure",
        nargs="*",
        default=["rounds", "quality"],
        help="of peers: rounds (speed; needs a quiet machine), quality",
    )
    parser.add_argument(
        "--rates", nargs="*", default=["own", "common"], help="learning rates at which quality is judged"
    )
    parser.add_argument("--rows", type=int, nargs="*", default=[500_000, 2_000_000], help="of streaming")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-others", type=float, default=0.10, help="share of the machine others may use")
    parser.add_argument("--tries", type=int, default=6, help="how often a round is repeated on a busy machine")
    parser.add_argument("--pause", type=float, default=20.0, help="seconds before it is repeated")
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        options.peers_python, options.threads, options.rounds, options.max_others, options.tries, options.pause,
        rates=tuple(options.rates),
    )  # fmt: skip
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in PARTS if options.part == "all" else [p for p in PARTS if p == options.part]:
        results["machine"] = machine(options.threads)
        {"peers": peers, "scaling": scaling, "streaming": streaming, "loss": loss}[part](results, options, setting)
    from saebench.figures import draw
    from saebench.tables import section

    draw(results, options.docs.parent / "images")
    insert(options.docs, "sae", section(results))


if __name__ == "__main__":
    main()
