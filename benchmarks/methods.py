"""All sparse-coding methods side by side: planted atoms found again, cost, and what they do with patches of tissue.

    python benchmarks/methods.py --only recovery --out OUT
    python benchmarks/methods.py --only time --data DATA --weights WEIGHTS --cache CACHE --out OUT
    python benchmarks/methods.py --only compare --data DATA --weights WEIGHTS --cache CACHE --out OUT

``recovery`` fits every method to every kind of planted rows (:func:`biosae.sae.planted`) and says how much of the true
dictionary it found. ``time`` fits each to patches of breast tumour (``breast`` of ``sae_quality.py``) and gives CPU
seconds as a multiple of ``topk`` in the same run. ``compare`` is :func:`biosae.sae.compare` on those patches with the
cell-type proportions of each tile as labels, and its figure. OUT gets ``methods_<part>.json`` and tables in Markdown;
finished fits of ``recovery`` are not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from biosae.files import write_json
from biosae.sae import compare, planted, recovery
from biosae.sae.coder import Coder
from biosae.sae.compare import AXES
from biosae.sae.config import ARCHITECTURES
from biosae.sae.methods import METHODS, method
from biosae.sae.named import OTHERS, named
from biosae.sae.synthetic import KINDS
from biosae.settings import settings

NAMES = [*dict.fromkeys([*ARCHITECTURES, *METHODS, *OTHERS])]
PLANTED = {"n_rows": 4096, "d": 32, "n_atoms": 64, "k": 4}
LEARNT = {"n_latents": 64, "k": 4, "n_steps": 600, "batch_size": 256, "validation": 0.0, "device": "cpu"}
SEEDS = (0, 1)
PLANTED_SEEDS = (0,)
SPECIAL: dict[str, dict[str, Any]] = {"nmf": {"negative": "shift"}, "kmeans": {"k": None}}
"""What a method needs to run at all."""
LABELS = ("prop_epithelial", "prop_plasma_cells", "prop_cafs", "prop_t_cells")


def coder(name: str, seed: int, *, d: int, **wanted: Any) -> Coder:
    """A coder of this name with those of the settings that it has."""
    found = named(name)
    given = {**wanted, **SPECIAL.get(name, {}), "random_state": seed}
    if name in AXES:
        given["n_latents"] = min(given["n_latents"], d)
    return found.set_params(**{key: value for key, value in given.items() if key in found.names()})


def second_table(name: str, rows: np.ndarray) -> np.ndarray | None:
    """For methods with two tables: the same rows seen from another side, turned at random."""
    kind = method(name).partner if name in METHODS else None
    if kind in (None, "gradient"):
        return None
    turn, _ = np.linalg.qr(np.random.default_rng(9).standard_normal((rows.shape[1], rows.shape[1])))
    return (rows @ turn).astype(np.float32)


def fit(model: Coder, name: str, rows: np.ndarray) -> float:
    """Fit; CPU seconds."""
    partner = second_table(name, rows)
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(rows) if partner is None else model.fit(rows, partner=partner)
    return time.process_time() - started


def names(args: argparse.Namespace) -> list[str]:
    """Methods to run, ``topk`` first."""
    chosen = args.methods or NAMES
    return ["topk", *(name for name in chosen if name != "topk")]


def planted_atoms(args: argparse.Namespace) -> None:
    """Recovery of planted dictionaries."""
    file = args.out / "methods_recovery.json"
    lines = json.loads(file.read_text()) if file.exists() else []
    done = {(line["kind"], line["method"], line["seed"]) for line in lines if "error" not in line}
    lines = [line for line in lines if "error" not in line]
    for kind in KINDS:
        for seed in PLANTED_SEEDS:
            truth = planted(kind, **PLANTED, random_state=seed)
            for name in names(args):
                if (kind, name, seed) in done:
                    continue
                line: dict[str, Any] = {"kind": kind, "method": name, "seed": seed}
                try:
                    model = coder(name, seed, d=PLANTED["d"], **LEARNT)
                    line["seconds"] = fit(model, name, truth.rows)
                    signed = bool(model.codes(truth.rows[:512]).data.min(initial=0) < 0)
                    kind_of_table = method(name).partner if name in METHODS else None
                    atoms = second_table(name, truth.atoms) if kind_of_table == "target" else truth.atoms
                    line |= recovery(model.decoder_, atoms, signed=signed)
                    line |= {"fvu": model.metrics_["fvu"], "l0": model.metrics_["l0"], "signed": signed}
                except Exception as error:  # the others go on; the line says why
                    line["error"] = f"{type(error).__name__}: {error}"
                lines.append(line)
                write_json(file, lines)
                print(line, flush=True)
    table = pd.DataFrame(lines)
    mean = table.pivot_table(index="method", columns="kind", values=["mean_max_cosine", "share_found"])
    order = [name for name in NAMES if name in mean.index]
    out = ["| method | " + " | ".join(KINDS) + " |", "| --- " * (len(KINDS) + 1) + "|"]
    for name in order:
        cells = [
            f"{mean.loc[name, ('mean_max_cosine', kind)]:.2f} ({mean.loc[name, ('share_found', kind)]:.0%})"
            for kind in KINDS
        ]
        out.append(f"| `{name}` | " + " | ".join(cells) + " |")
    (args.out / "methods_recovery.md").write_text("\n".join(out) + "\n")


def patches(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Rows, tile of each row, and the table of tiles."""
    from sae_quality import load

    X, tiles = load("breast", args)
    return X, tiles, pd.read_csv(args.data / "her2st_spots" / "manifest.csv").set_index("sample_id")


def cost(args: argparse.Namespace) -> None:
    """CPU seconds of a fit as a multiple of ``topk``, which is timed before and after."""
    X, _, _ = patches(args)
    rows = X[np.sort(np.random.default_rng(0).permutation(len(X))[:6000])]
    wanted = {"n_latents": 256, "k": 16, "n_steps": 200, "d": X.shape[1], "validation": 0.0, "device": "cpu"}
    fit(coder("topk", 0, **wanted), "topk", rows)  # kernels are compiled
    lines = []
    for name in [*names(args), "topk"]:
        try:
            if name in OTHERS or name not in METHODS or name in ARCHITECTURES:
                fit(coder(name, 0, **wanted | {"n_steps": 5}), name, rows)
            lines.append({"method": name, "seconds": fit(coder(name, 0, **wanted), name, rows)})
        except Exception as error:  # the others go on; the line says why
            lines.append({"method": name, "error": f"{type(error).__name__}: {error}"})
        print(lines[-1], flush=True)
    base = float(np.mean([line["seconds"] for line in lines if line["method"] == "topk"]))
    for line in lines:
        line["ratio"] = line.get("seconds", np.nan) / base
    write_json(args.out / "methods_time.json", {"topk_seconds": base, "settings": wanted, "fits": lines})


def side_by_side(args: argparse.Namespace) -> None:
    """Table and figure of ``compare``."""
    from biosae import pl

    X, tiles, about = patches(args)
    chosen = np.sort(np.random.default_rng(1).permutation(len(X))[: args.rows])
    labels = {name: about.loc[tiles[chosen], name].to_numpy() for name in LABELS}
    wanted = {"n_steps": args.steps, "device": "cpu"}
    given = []
    for name in names(args):
        once = wanted if name in ARCHITECTURES else {**wanted, "k": args.k[len(args.k) // 2]}
        given.append(coder(name, 0, d=X.shape[1], n_latents=256, **once))
    table = compare(X[chosen], methods=given, seeds=SEEDS, k=args.k, labels=labels, groups=tiles[chosen], n_null=10)
    table.to_csv(args.out / "methods_compare.csv", index=False)
    pl.save(pl.sae_comparison(table), args.out / "methods_compare")
    print(
        table.groupby(["method", "k"], dropna=False)[["fvu_val", "l0_val", "dead_share", "shared"]].mean().to_string()
    )
    print(table.loc[table["error"] != "", ["method", "seed", "error"]].to_string())


PARTS = {"recovery": planted_atoms, "time": cost, "compare": side_by_side}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="*", default=list(PARTS))
    parser.add_argument("--methods", nargs="*", help="some of them; all by default")
    parser.add_argument(
        "--k", type=int, nargs="*", default=[8, 16, 32], help="of compare; plug-ins take the middle one"
    )
    parser.add_argument("--rows", type=int, default=12_000, help="patches of compare")
    parser.add_argument("--steps", type=int, default=960, help="training steps of compare")
    for folder in ("data", "weights", "cache"):
        parser.add_argument(f"--{folder}", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    settings.progress = False
    torch.set_num_threads(1)
    for part in args.only:
        PARTS[part](args)


if __name__ == "__main__":
    main()
