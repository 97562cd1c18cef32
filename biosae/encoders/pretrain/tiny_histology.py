"""Train the bundled tiny histology encoder on phantom tiles.

    python -m biosae.encoders.pretrain.tiny_histology --out biosae/encoders/weights/tiny_histology

Tiles are drawn one by one with independent counts of five cell types, so that the total says little about one type,
and each with its own random scanner. The network learns, from the embedding, the counts and the scanner's settings (the
encoder is to see the scanner, as real ones do), and, from each position of ``stage3``, which nuclei lie there. The
heads are thrown away. One thread and a seed give the same weights on the same machine and software; see
docs/phantom.md.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from biosae.data import phantom
from biosae.data.render import CELLS, MPP, draw, place
from biosae.data.scanner import Scanner, scan
from biosae.encoders.tiny import TinyHistologyNet
from biosae.files import atomic_path, hash_file, write_json
from biosae.provenance import versions

SIZE = 96
STRIDE = 8  # of stage3
TYPES = tuple(CELLS)
HELD_OUT_SEED = 1_000_003


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on, besides the software."""

    seed: int = 0
    n_tiles: int = 6000
    n_epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    map_weight: float = 1.0
    count_weight: float = 1.0
    scanner_weight: float = 0.5
    count_spread: float = 0.8


def training_tile(seed: int, i: int, *, count_spread: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One tile with random counts and a random scanner.

    Returns
    -------
    image
        ``uint8 (96, 96, 3)``.
    map
        Nuclei of each type whose centre lies in each cell of the ``stage3`` grid, ``float32 (5, 12, 12)``.
    settings
        Scanner settings and stain strengths, ``float32 (11,)``.
    """
    rng = np.random.default_rng([seed, 7, i, 0, 0])
    mean = np.exp(np.log([c.density for c in CELLS.values()]) - 0.2 + rng.normal(0, count_spread, len(TYPES)))
    layout = place(rng.poisson(mean), TYPES, size=SIZE, rng=rng)
    strength = np.exp(rng.normal(0, 0.15, 2))
    stains = draw(layout, TYPES, size=SIZE, rng=rng)
    shift = rng.normal(0, 0.05, (2, 3))
    scanner = Scanner(
        haematoxylin=tuple(shift[0]),
        eosin=tuple(shift[1]),
        gamma=float(np.exp(rng.normal(0, 0.12))),
        blur=float(rng.uniform(0, 1)),
        jpeg=int(rng.integers(55, 101)),
    )
    cells = np.zeros((len(TYPES), SIZE // STRIDE, SIZE // STRIDE), dtype=np.float32)
    np.add.at(cells, (layout.kind, (layout.y // STRIDE).astype(int), (layout.x // STRIDE).astype(int)), 1)
    settings = [*shift.ravel(), np.log(scanner.gamma), scanner.blur, scanner.jpeg / 100, *np.log(strength)]
    image = scan(stains[0] * strength[0], stains[1] * strength[1], scanner)
    return image, cells, np.array(settings, dtype=np.float32)


def normalise(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """``uint8 (B, H, W, 3)`` to normalised ``float32 (B, 3, H, W)``."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _blurred(maps: torch.Tensor) -> torch.Tensor:
    """Spread each nucleus over the 3 x 3 neighbourhood (weights 1 2 1), since its centre may lie near an edge."""
    side = torch.tensor([0.25, 0.5, 0.25])
    kernel = (side[:, None] * side).expand(maps.shape[1], 1, 3, 3)
    return nn.functional.conv2d(maps, kernel, padding=1, groups=maps.shape[1])


def train(recipe: Recipe) -> tuple[TinyHistologyNet, TinyHistologyNet, dict]:
    """Train; also returns the network before training, with calibrated batch normalisation, and the preprocessing."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(recipe.seed)
    tiles = [training_tile(recipe.seed, i, count_spread=recipe.count_spread) for i in range(recipe.n_tiles)]
    images, maps, settings = (np.stack(part) for part in zip(*tiles))
    pixels = images[:: max(len(images) // 500, 1)].reshape(-1, 3) / 255
    mean, std = (tuple(float(v) for v in np.round(f(pixels, axis=0), 3)) for f in (np.mean, np.std))
    settings = (settings - settings.mean(0)) / settings.std(0)
    counts = maps.sum((2, 3))
    counts = torch.from_numpy((counts - counts.mean(0)) / counts.std(0))
    settings, maps = torch.from_numpy(settings), _blurred(torch.from_numpy(maps))
    maps /= maps.std((0, 2, 3))[:, None, None]

    model = TinyHistologyNet()
    untrained = calibrated(TinyHistologyNet(), model, normalise(images[:512], mean, std))
    heads = nn.ModuleDict(
        {
            "map": nn.Conv2d(model.widths["stage3"], len(TYPES), 1),
            "count": nn.Linear(model.width, len(TYPES)),
            "scanner": nn.Linear(model.width, settings.shape[1]),
        }
    )
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    n_steps = recipe.n_epochs * (len(images) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=n_steps, pct_start=0.15)
    rng = np.random.default_rng([recipe.seed, 8, 0, 0, 0])
    model.train()
    model.to(memory_format=torch.channels_last)
    for epoch in range(recipe.n_epochs):
        order = rng.permutation(len(images))
        losses = []
        for rows in np.array_split(order, n_steps // recipe.n_epochs):
            x, target = normalise(images[rows], mean, std), maps[rows]
            turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
            x, target = (torch.rot90(v.flip(3) if mirror else v, turns, (2, 3)) for v in (x, target))
            features = model.forward_features(x.contiguous(memory_format=torch.channels_last))
            loss = torch.stack(
                [
                    recipe.map_weight * (heads["map"](features["stage3"]) - target).square().mean(),
                    recipe.count_weight * (heads["count"](features["embedding"]) - counts[rows]).square().mean(),
                    recipe.scanner_weight * (heads["scanner"](features["embedding"]) - settings[rows]).square().mean(),
                ]
            )
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        shown = ", ".join(f"{v:.3f}" for v in torch.stack(losses).mean(0))
        print(f"epoch {epoch + 1}/{recipe.n_epochs}: map, count, scanner loss {shown}", flush=True)
    preprocess = {"size": SIZE, "mean": mean, "std": std, "interpolation": "bicubic", "mpp": MPP}
    return model.eval(), untrained, preprocess


def calibrated(model: TinyHistologyNet, like: TinyHistologyNet, batch: torch.Tensor) -> TinyHistologyNet:
    """A copy of ``like``'s weights with batch normalisation statistics of ``batch``: the fair random control."""
    model.load_state_dict(like.state_dict())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # cumulative mean
    model.train()
    with torch.no_grad():
        model(batch)
    return model.eval()


def count_r2(
    models: dict[str, TinyHistologyNet],
    preprocess: dict,
    *,
    n_patients: int = 40,
    n_tiles: int = 25,
    random_state: int = HELD_OUT_SEED,
) -> dict[str, dict[str, float]]:
    """R2 of ridge regression of each type's count on the frozen embedding, patients held out, on an unseen phantom.

    The cohort has five cell types and four scanners whose settings were not trained on. The penalty is chosen on
    the training patients by leave-one-out. Predictions of five folds are pooled:
    ``R2 = 1 - sum (y - y_hat)^2 / sum (y - mean y)^2``.

    Returns
    -------
    dict
        Model name to type (and ``mean``) to R2.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    samples = phantom(
        n_patients=n_patients,
        n_tiles=n_tiles,
        cell_types=TYPES,
        scanners=("A", "B", "C", "D"),
        random_state=random_state,
    )
    y = samples.obs[samples.meta["targets"]].to_numpy(float)
    images = np.stack([samples[i] for i in range(len(samples))])
    ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 5, 13)))
    found = {}
    for name, model in models.items():
        with torch.no_grad():
            batches = np.array_split(images, -(-len(images) // 100))
            X = np.concatenate([model(normalise(b, preprocess["mean"], preprocess["std"])).numpy() for b in batches])
        predicted = cross_val_predict(ridge, X, y, groups=samples.obs["patient"], cv=GroupKFold(5))
        r2 = 1 - ((y - predicted) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)
        found[name] = {**dict(zip(TYPES, map(float, r2.round(3)))), "mean": float(r2.mean().round(3))}
    return found


README = """# Tiny histology encoder

{n_parameters:,} parameters, trained on {n_tiles:,} phantom tiles drawn by biosae and on nothing else. It serves the
demo and the tests. It has seen no patient tissue and is not for use on any.

Made by `python -m biosae.encoders.pretrain.tiny_histology --out <folder>` (seed {seed}, one thread, about
{minutes:.0f} minutes). Licence: Apache-2.0. `config.json` holds the architecture, preprocessing, recipe and SHA-256 of
the weights.

R2 of ridge regression of nucleus counts on the frozen embedding, patients held out, on a phantom with another seed and
other scanners:

| cell type | trained | random initialisation |
|---|---|---|
{rows}
"""


def main() -> None:
    """Train, evaluate and write ``model.safetensors``, ``config.json`` and ``README.md``."""
    from safetensors.torch import save

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--n-tiles", type=int, default=Recipe.n_tiles)
    parser.add_argument("--n-epochs", type=int, default=Recipe.n_epochs)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe(seed=arguments.seed, n_tiles=arguments.n_tiles, n_epochs=arguments.n_epochs)
    start = time.perf_counter()
    model, untrained, preprocess = train(recipe)
    minutes = (time.perf_counter() - start) / 60
    metrics = count_r2({"trained": model, "random_initialisation": untrained}, preprocess)
    weights = arguments.out / "model.safetensors"
    with atomic_path(weights) as temporary:
        temporary.write_bytes(save({k: v.contiguous() for k, v in model.state_dict().items()}))
    n_parameters = sum(p.numel() for p in model.parameters())
    config = {
        "name": "tiny-histology",
        "architecture": {
            "class": "biosae.encoders.tiny.TinyHistologyNet",
            "stage_widths": [model.widths[f"stage{i}"] for i in (1, 2, 3)],
            "width": model.width,
            "layers": list(model.layers),
            "n_parameters": n_parameters,
        },
        "preprocess": preprocess,
        "sha256": hash_file(weights),
        "licence": "Apache-2.0",
        "trained_on": "phantom tiles only",
        "recipe": recipe.__dict__,
        "held_out_count_r2": metrics,
        "versions": {k: v for k, v in versions().items() if k in ("biosae", "numpy", "scipy", "torch", "pillow")},
    }
    write_json(arguments.out / "config.json", config)
    rows = "\n".join(
        f"| {t} | {metrics['trained'][t]:.2f} | {metrics['random_initialisation'][t]:.2f} |" for t in (*TYPES, "mean")
    )
    text = README.format(
        n_parameters=n_parameters, n_tiles=recipe.n_tiles, seed=recipe.seed, minutes=minutes, rows=rows
    )
    with atomic_path(arguments.out / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text, f"trained in {minutes:.1f} minutes; sha256 {config['sha256']}", sep="\n")


if __name__ == "__main__":
    main()
