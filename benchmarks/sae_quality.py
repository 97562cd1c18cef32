"""How well sparse autoencoders of real embeddings do: reconstruction, sparsity, dead latents, return over seeds.

    python benchmarks/sae_quality.py --data DATA --weights WEIGHTS --cache CACHE --out OUT            # everything
    python benchmarks/sae_quality.py ... --only curves                                                # one part

``curves`` trains the five architectures over a grid of sparsity on patches of breast tumour, three seeds each, and
draws ``sae_curves``. ``rules`` varies one setting at a time on several sets: what the rules for ``None`` and the
presets rest on. DATA and WEIGHTS hold the packs named in :data:`SETS`; embeddings are kept in CACHE. OUT gets one JSON
and one CSV a part, one line a fit or a comparison of seeds, and the figures. Finished fits are not repeated.

Rows are held out by group (tile, patient, photo block): the same fifth for all fits of a set. With another seed a
model starts from other rows and sees the rows in another order, as a user would have it.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from biosae.errors import DivergedError
from biosae.files import write_json
from biosae.sae import SAE, stability
from biosae.settings import settings

SEEDS = (0, 1, 2)
HELD = 0.2
"""Share of the groups that no model sees."""
ARCHITECTURES = ("relu", "topk", "batchtopk", "matryoshka", "jumprelu")


# ---------------------------------------------------------------------------------------------------- embeddings


def _images(
    pack: str, encoder: str, *, group: str | None = None, pool: str = "tokens",
    mpp: float | None = None, **options: Any,
) -> Callable[[Path, Path, Path], tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Embeddings of all pictures of a pack; a group is a column of its table, or the picture."""

    def make(data: Path, weights: Path, cache: Path) -> tuple[np.ndarray, np.ndarray]:
        import biosae as bs

        table = data / pack / "manifest.csv"
        who = "patient_id" if "patient_id" in pd.read_csv(table, nrows=1) else None
        samples = bs.read.images(table, id="sample_id", patient=who)
        network = bs.encoders.load(weights / encoder, device="cpu", mpp=mpp, **options)
        out = cache / "embeddings" / pack
        found = bs.embeddings.embed(samples, network, pool=pool, out=out, n_jobs=0, dtype="float16")
        labels = found.obs[group] if group else found.obs.index
        return np.asarray(found.array(), np.float32), np.repeat(np.asarray(labels, str), found.tokens_per_sample)

    return make


def _ecg(data: Path, weights: Path, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the 1-D ResNet of wearable ECG (weights/wildecg_resnet1d), one for 0.16 s of one lead."""
    import scipy.io
    import scipy.signal
    from safetensors.torch import load_file

    state = load_file(weights / "wildecg_resnet1d" / "model.safetensors")
    table = pd.read_csv(data / "ecg_cinc2021" / "manifest.csv")
    rows, labels = [], []
    band = scipy.signal.butter(2, (0.5, 40), "bandpass", fs=100, output="sos")
    for _, record in table.iterrows():
        raw = scipy.io.loadmat(data / "ecg_cinc2021" / record["signal_path"])["val"].astype(np.float64)
        leads = scipy.signal.resample_poly(raw, 100, int(record["fs"]), axis=1)[:, :1000]
        leads = scipy.signal.sosfiltfilt(band, leads, axis=1)
        leads = (leads - leads.mean(1, keepdims=True)) / (leads.std(1, keepdims=True) + 1e-6)
        maps = wildecg(state, torch.from_numpy(leads[:, None]).float())
        rows.append(maps.transpose(1, 2).reshape(-1, maps.shape[1]).numpy())
        labels += [record["patient_id"]] * len(rows[-1])
    return np.concatenate(rows), np.asarray(labels, str)


@torch.inference_mode()
def wildecg(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Maps (n, 128, 63) of signals (n, 1, 1000): pre-activation 1-D ResNet, described in its ``config.json``."""
    from torch.nn import functional as F

    def conv(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        out = -(-x.shape[-1] // stride)
        total = max(0, (out - 1) * stride + 3 - x.shape[-1])
        padded = F.pad(x, (total // 2, total - total // 2))
        return F.conv1d(padded, state[f"{name}.conv.weight"], state.get(f"{name}.conv.bias"), stride=stride)

    def rectified(name: str, x: torch.Tensor) -> torch.Tensor:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.relu(F.batch_norm(x, mean, variance, state[f"{name}.weight"], state[f"{name}.bias"]))

    x = rectified("first_block_bn", conv("first_block_conv", x))
    for i in range(8):
        name, stride = f"basicblock_list.{i}", 1 + i % 2
        h = x if i == 0 else rectified(f"{name}.bn1", x)
        h = conv(f"{name}.conv2", rectified(f"{name}.bn2", conv(f"{name}.conv1", h, stride)))
        if stride == 2:
            x = F.max_pool1d(F.pad(x, (0, 1 if x.shape[-1] % 2 else 0)), 2, 2)
        more = h.shape[1] - x.shape[1]
        x = F.pad(x, (0, 0, more // 2, more - more // 2)) + h
    return rectified("final_bn", x)


SETS: dict[str, Callable[[Path, Path, Path], tuple[np.ndarray, np.ndarray]]] = {
    "breast": _images("her2st_spots", "nic_histology_multitask4", mpp=0.775, patch_stride=32),
    "chest": _images("covid_cxr", "mobilenetv2_imagenet", group="patient_id"),
    "leaf": _images("plantvillage_apple", "mobilenetv2_imagenet", group="photo_block", pool="default"),
    "ecg": _ecg,
}
"""Name of a set to its rows (n, d) and the group of each row."""


def load(name: str, folders: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Rows and groups of a set, from the cache if they are there."""
    file = folders.cache / f"{name}.npz"
    if not file.exists():
        X, groups = SETS[name](folders.data, folders.weights, folders.cache)
        np.savez(file, X=X.astype(np.float32), groups=groups)
    with np.load(file) as stored:
        return stored["X"], stored["groups"]


def divide(X: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are trained on and which held out: each group on one side."""
    names = np.unique(groups)
    held = np.random.default_rng(0).permutation(names)[: max(1, round(HELD * len(names)))]
    out = np.isin(groups, held)
    return np.flatnonzero(~out), np.flatnonzero(out)


# ---------------------------------------------------------------------------------------------------- fits


def fit(name: str, grid: dict[str, dict[str, Any]], seeds: tuple[int, ...], folders: argparse.Namespace) -> list[dict]:
    """Rows of one table: every setting of the grid on one set with each seed, and the agreement of the seeds.

    Parameters
    ----------
    grid
        Label to settings of :class:`biosae.sae.SAE`; ``rows`` among them takes that many training rows at random.

    Returns
    -------
    list of dict
        ``kind`` is ``fit`` or ``pair``.
    """
    X, groups = load(name, folders)
    train, held = divide(X, groups)
    outside, found = np.ascontiguousarray(X[held]), []
    for label, given in grid.items():
        mark = zlib.crc32(json.dumps([name, label, given, seeds, len(X)], sort_keys=True).encode())
        file = folders.cache / "fits" / f"{name}-{label}-{mark:08x}.json".replace("/", "_").replace(" ", "_")
        if file.exists():
            found += json.loads(file.read_text())
            continue
        chosen = dict(given)
        n = chosen.pop("rows", None)
        inside = train if n is None else np.sort(np.random.default_rng(1).permutation(train)[:n])
        shown = {"set": name, "d": X.shape[1], "rows": len(inside), "groups": len(np.unique(groups[inside]))}
        lines, models = [], []
        for seed in seeds:
            sae = SAE(**{"validation": 0.0, "device": "cpu", "random_state": seed, **chosen})
            started = time.process_time()
            line = {"kind": "fit", **shown, "label": label, "seed": seed}
            try:
                sae.fit(X[inside])
            except DivergedError as error:
                lines.append({**line, "error": str(error)})
                continue
            seconds = time.process_time() - started
            line |= {"architecture": sae.architecture, "m": sae.n_latents_, "k": sae.k_, "steps": sae.n_steps_}
            line |= {"batch": sae.batch_size_, "rate": sae.learning_rate_, "l1": sae.l1}
            here, there = sae.metrics_, sae.evaluate(outside)
            line |= {"fvu": here["fvu"], "fvu_held": there["fvu"], "l0": here["l0"], "l0_held": there["l0"]}
            line |= {"dead": here["dead_share"], "gamma": here["gamma"], "gamma_held": there["gamma"]}
            line |= {"densest": float(sae.density_.max()), "dense_share": float((sae.density_ > 0.1).mean())}
            line |= {"median_density": float(np.median(sae.density_)), "copies": copies(sae), "seconds": seconds}
            lines.append(line)
            models.append(sae)
        if len(models) > 1:
            some = outside[np.random.default_rng(2).permutation(len(outside))[:4096]]
            agreed = stability(models, some, n_null=2, null="second_moment", random_state=0)
            for pair in agreed.pairs:
                line = {"kind": "pair", **shown, "label": label, "seed": f"{pair.first}-{pair.second}"}
                line |= {"mmcs": pair.mmcs, "hungarian": pair.hungarian, "shared": pair.shared}
                line |= {f"null_{score}": value for score, value in pair.null_mean.items()}
                lines.append(line | {"activation": (pair.activation + pair.activation_back) / 2})
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, lines)
        found += lines
        report(lines)
    return found


def copies(sae: SAE, *, cosine: float = 0.7) -> float:
    """Share of live atoms that have another atom of the same model nearby: what makes finding them again easy."""
    atoms = sae.decoder_[sae.density_ > 0]
    near = atoms @ atoms.T
    np.fill_diagonal(near, -1)
    return float((near.max(1) >= cosine).mean())


def report(lines: list[dict[str, Any]]) -> None:
    """Means over seeds on one line."""

    def mean(key: str) -> float:
        values = [line[key] for line in lines if key in line]
        return float(np.mean(values)) if values else float("nan")

    first = next((line for line in lines if "m" in line), lines[0])
    print(
        f"{first['set']:7s}{first['label']:34s} n {first['rows']:6d} m {first.get('m', 0):5d} L0 {mean('l0'):5.1f}/"
        f"{mean('l0_held'):5.1f} FVU {mean('fvu'):.3f}/{mean('fvu_held'):.3f} dead {mean('dead'):6.1%} "
        f"shared {mean('shared'):.2f} ({mean('null_shared'):.2f}) mmcs {mean('mmcs'):.2f} ({mean('null_mmcs'):.2f}) "
        f"act {mean('activation'):.2f} gamma {mean('gamma'):.3f} {mean('seconds'):5.1f} s",
        flush=True,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- parts

BREAST = {"rows": 12_000, "n_latents": 256, "k": 16}
ECG = {"rows": 6_000, "n_latents": 256, "k": 8}
CHEST = {"rows": 4_000, "n_latents": 256, "k": 32, "n_steps": 500}
LEAF = {"n_latents": 128, "k": 32}
WIDE = LEAF | {"n_latents": 256}
RULES: list[tuple[str, tuple[int, ...], dict[str, dict[str, Any]]]] = [
    ("breast", SEEDS, {f"m {m}": BREAST | {"n_latents": m} for m in (64, 128, 256, 512, 1024)}),
    ("breast", SEEDS, {f"n 1000, m {m}": BREAST | {"rows": 1000, "n_latents": m} for m in (32, 64, 128, 256)}),
    ("breast", SEEDS, {f"n 3000, m {m}": BREAST | {"rows": 3000, "n_latents": m} for m in (64, 128, 256, 512)}),
    ("breast", SEEDS, {f"rate {r:g}": BREAST | {"learning_rate": r} for r in (1e-3, 8e-3)}),
    ("breast", SEEDS, {f"{e} epochs": BREAST | {"max_epochs": e} for e in (20, 180)}),
    ("breast", SEEDS, {"random atoms": BREAST | {"decoder_init": "random"}, "aux 0": BREAST | {"aux_k": 0}}),
    ("ecg", SEEDS, {f"k {k}, m 256": ECG | {"k": k} for k in (4, 8, 16)}),
    ("ecg", SEEDS, {f"k 8, m {m}": ECG | {"n_latents": m} for m in (64, 512)}),
    ("ecg", SEEDS, {"relu": ECG | {"architecture": "relu", "l1": 0.25}}),
    ("ecg", SEEDS, {"batchtopk": ECG | {"architecture": "batchtopk"}}),
    ("ecg", SEEDS, {"random atoms": ECG | {"decoder_init": "random"}}),
    ("leaf", SEEDS, {f"k {k}, m 128": LEAF | {"k": k} for k in (8, 32, 64)}),
    ("leaf", SEEDS, {f"k 32, m {m}": LEAF | {"n_latents": m} for m in (64, 256, 512)}),
    ("leaf", SEEDS, {"relu": WIDE | {"architecture": "relu", "l1": 0.25}}),
    ("leaf", SEEDS, {"batchtopk": WIDE | {"architecture": "batchtopk"}}),
    ("leaf", SEEDS, {"random atoms": WIDE | {"decoder_init": "random"}}),
    ("chest", SEEDS[:2], {f"k {k}, m 256": CHEST | {"k": k} for k in (16, 32, 64)}),
    ("chest", SEEDS[:2], {f"k 32, m {m}": CHEST | {"n_latents": m} for m in (128, 512)}),
    ("chest", SEEDS[:2], {"random atoms": CHEST | {"decoder_init": "random"}}),
    ("ecg", SEEDS, {"rate 0.008": ECG | {"learning_rate": 8e-3}}),
    ("leaf", SEEDS, {"rate 0.008": WIDE | {"learning_rate": 8e-3}}),
    ("chest", SEEDS[:2], {"rate 0.008": CHEST | {"learning_rate": 8e-3}}),
]  # fmt: skip


def rules(folders: argparse.Namespace) -> list[dict[str, Any]]:
    """Every line of :data:`RULES`, all ``topk``."""
    return [line for name, seeds, grid in RULES for line in fit(name, grid, seeds, folders)]


SPARSITY = (4, 8, 16, 32)
L1 = (1.2, 0.6, 0.25, 0.1)
"""Weights of ``relu`` that come out near :data:`SPARSITY` latents a row on this set."""
CURVES = {
    f"{name} {level:g}": {"architecture": name, **BREAST, **({"l1": level} if name == "relu" else {"k": level})}
    for name in ARCHITECTURES
    for level in (L1 if name == "relu" else SPARSITY)
}


def curves(folders: argparse.Namespace) -> list[dict[str, Any]]:
    """All architectures over the grid of sparsity, and the figure."""
    lines = fit("breast", CURVES, SEEDS, folders)
    draw(lines, folders.out / "sae_curves")
    return lines


PANELS = (
    ("fvu_held", "fit", "FVU, held-out tiles", None),
    ("fvu_gap", "fit", "FVU held out minus training", None),
    ("shared", "pair", "share of atoms found again\n(cosine ≥ 0.7, one to one)", "null_shared"),
    ("activation", "pair", "correlation of codes with\nthe best match, held out", None),
    ("dead", "fit", "dead latents", None),
    ("gamma_held", "fit", "γ (1: no shrinkage)", None),
)
MARKERS = dict(zip(ARCHITECTURES, "osD^v"))


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Six panels against L0 of the held-out rows; dots are means, bars reach over the seeds (or pairs of seeds)."""
    from biosae.pl import style

    table = pd.DataFrame(lines)
    table["fvu_gap"] = table["fvu_held"] - table["fvu"]
    fits = table[table["kind"] == "fit"]
    architecture = fits.groupby("label")["architecture"].first()
    sparsity = fits.groupby("label")["l0_held"].mean()
    with style.paper():
        fig = style.figure((7.2, 4.6))
        places = fig.subplots(2, 3)
        for ax, (key, kind, title, null) in zip(places.flat, PANELS):
            found = table[table["kind"] == kind].groupby("label")[key].agg(["mean", "min", "max"])
            for name, colour in zip(ARCHITECTURES, style.COLOURS):
                labels = [label for label in found.index if architecture[label] == name]
                labels.sort(key=sparsity.get)
                x, y = sparsity[labels], found.loc[labels]
                bars = [y["mean"] - y["min"], y["max"] - y["mean"]]
                ax.errorbar(x, y["mean"], bars, color=colour, marker=MARKERS[name], markersize=3.5, label=name,
                            capsize=1.5, elinewidth=0.7)  # fmt: skip
                if null:
                    chance = table[table["kind"] == kind].groupby("label")[null].mean()[labels]
                    ax.plot(x, chance, color=colour, linestyle=":", linewidth=0.8)
            ax.set_xscale("log", base=2)
            ticks = [2, 4, 8, 16, 32, 64]
            ax.set_xticks(ticks, [str(t) for t in ticks])
            ax.set_xlim(0.85 * sparsity.min(), 1.18 * sparsity.max())
            ax.set_xlabel("active latents a row (L0, held out)")
            ax.set_ylabel(title)
            if key == "fvu_held":
                ax.set_yscale("log", base=2)
                ax.set_yticks(levels := [0.05, 0.1, 0.2, 0.4, 0.8], [f"{v:.2g}" for v in levels])
            elif key != "gamma_held":
                ax.set_ylim(bottom=0)
        first, m, held = fits.iloc[0], int(fits["m"].iloc[0]), round(fits["groups"].iloc[0] * HELD / (1 - HELD))
        fig.suptitle(
            f"{int(first['rows']):,} patches of {int(first['groups'])} breast tumour tiles (2 patients), {held} tiles "
            f"held out, d = {int(first['d'])}, {m} latents, {int(first['steps'])} steps. "
            f"{len(SEEDS)} seeds: mean and range.\n"
            "Dotted: atoms of the other seed turned at random, second moment kept (mean)",
            fontsize=7, color="#555555",
        )  # fmt: skip
        handles, names = places.flat[0].get_legend_handles_labels()
        fig.legend(handles, names, loc="outside lower center", ncols=len(names))
        path.parent.mkdir(parents=True, exist_ok=True)
        style.save(fig, path)


# ---------------------------------------------------------------------------------------------------- command

PARTS = {"curves": curves, "rules": rules}


def write(lines: list[dict[str, Any]], path: Path) -> None:
    """The same lines as JSON and as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path.with_suffix(".json"), lines)
    names = list(dict.fromkeys(name for line in lines for name in line))
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, help in (
        ("data", "folder of data packs"), ("weights", "folder of encoders"), ("cache", "folder of embeddings and fits"),
        ("out", "folder of tables and figures"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=Path, required=True, help=help)
    parser.add_argument("--only", choices=list(PARTS), help="one part instead of all")
    parser.add_argument("--threads", type=int, default=1)
    folders = parser.parse_args()
    torch.set_num_threads(folders.threads)
    settings.progress = False
    folders.cache.mkdir(parents=True, exist_ok=True)
    for name, part in PARTS.items():
        if folders.only in (None, name):
            write(part(folders), folders.out / f"sae_{name}")


if __name__ == "__main__":
    main()
