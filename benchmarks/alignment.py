"""Alignment of latents with hand-made masks of three public data sets, against k-means, PCA, ICA and random controls.

    python benchmarks/alignment.py DATA WEIGHTS OUT [cells|lungs|leaves ...]

DATA and WEIGHTS hold the packs and the encoders by name. Of every data set the split that comes with it is used:
dictionaries and probes see the training part, all numbers are of the test part. It writes ``OUT/<study>.csv``,
``<study>_audit.csv``, ``<study>_separability.csv`` and the figures of docs/interpret/alignment.md; embeddings are kept
in ``OUT/work``.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import biosae as bs
from biosae.interpret.masks import preprocess_of
from biosae.pl.style import figure, paper
from biosae.settings import settings

LATENTS, K = 512, 16
UNTRAINED = 400
"""Samples, at most, of the control with an untrained encoder."""
BUDGETS = (10, 25, 50, 100)


@dataclass
class Study:
    """One data set: where it is, what its masks name, who is independent, and the label that proposes."""

    pack: str
    parts: dict[int, str]
    patient: str | None
    groups: str
    known: str
    encoder: str
    weights: str
    limit: int | None = None
    """Samples drawn at random; None for all."""


STUDIES = {
    "cells": Study(
        "wbc_two_devices", {1: "cytoplasm", 2: "nucleus"}, None, "content_hash", "cell_class", "mobilenetv2-imagenet",
        "mobilenetv2_imagenet",
    ),
    "lungs": Study(
        "covid_cxr", {1: "lung"}, "patient_id", "patient", "label_covid", "mobilenetv2-imagenet", "mobilenetv2_imagenet"
    ),
    "leaves": Study(
        "plantvillage_apple", {1: "leaf"}, "photo_block", "patient", "disease", "mobilenetv2-inat-bird",
        "mobilenetv2_inat_bird", 500,
    ),
}  # fmt: skip


def samples_of(study: Study, data: Path) -> bs.Samples:
    table = pd.read_csv(data / study.pack / "manifest.csv")
    return bs.read.images(
        table, root=data / study.pack, patient=study.patient, id="sample_id", mask="mask_path", parts=study.parts,
        split="split",
    )  # fmt: skip


def embedded(study: Study, samples: bs.Samples, weights: Path, out: Path, *, random: bool) -> bs.Embeddings:
    folder = weights / study.weights
    encoder = bs.encoders.load(study.encoder, weights="random" if random else folder)
    return bs.encoders.embed(
        samples, encoder, layer="blocks.4", pool="tokens", out=out / ("random" if random else "trained"), n_jobs=1
    )


def dictionaries(train: bs.Embeddings, emb: bs.Embeddings, rows: np.ndarray) -> dict[str, Any]:
    d = train.shape[1]
    sae = {"n_latents": LATENTS, "k": K, "n_steps": 1500, "random_state": 0}
    baseline = bs.sae.Baseline
    return {
        "BatchTopK": bs.sae.SAE("batchtopk", **sae).fit(train),
        "Matryoshka": bs.sae.SAE("matryoshka", **sae).fit(train),
        "k-means": baseline("kmeans", n_latents=LATENTS, random_state=0).fit(train),
        "PCA": baseline("pca", n_latents=d, random_state=0).fit(train),
        "ICA": baseline("ica", n_latents=d, random_state=0).fit(train),
        "raw dimensions": "raw",
        "random directions": bs.interpret.random_codes(emb, n_latents=LATENTS, k=K, rows=rows, random_state=0),
    }


def run(name: str, data: Path, weights: Path, out: Path) -> None:
    study = STUDIES[name]
    started = time.perf_counter()
    samples = samples_of(study, data)
    emb = embedded(study, samples, weights, out / "work" / name, random=False)
    drawn = np.random.default_rng(0).permutation(len(samples))[: study.limit]
    emb = emb.select(np.sort(drawn))
    labels = bs.interpret.token_parts(samples, emb)
    if len(study.parts) == 1:
        labels = labels.drop(columns="background")  # the same question the other way round
    in_train = (emb.obs["split"] == "train").to_numpy()
    rows = np.flatnonzero(np.repeat(in_train, emb.tokens_per_sample))
    models = dictionaries(emb.select(in_train), emb, rows)
    print(name, "fitted after", round(time.perf_counter() - started), "s", flush=True)
    options = {"groups": study.groups, "n_null": 3}
    table = bs.interpret.compare_alignment(models, emb, labels, **options)
    untrained = embedded(study, samples.select(np.sort(drawn[:UNTRAINED])), weights, out / "work" / name, random=True)
    seen = (untrained.obs["split"] == "train").to_numpy()
    blind = bs.sae.SAE("batchtopk", n_latents=LATENTS, k=K, n_steps=1500, random_state=0).fit(untrained.select(seen))
    control = bs.interpret.compare_alignment({"untrained encoder": blind}, untrained, labels, **options)
    table = pd.concat([table, control], ignore_index=True)
    table.to_csv(out / f"{name}.csv", index=False)
    with paper():
        bs.pl.save(bs.pl.alignment(table[table["class"] != "background"]), out / f"alignment_{name}")
    tokens = bs.encode(models["BatchTopK"], emb, tokens=None, keep_embedding=False)
    maps(name, samples, emb, labels, tokens, table[table["model"] == "BatchTopK"], out)
    parts = labels.drop(columns="background", errors="ignore")
    common = table.loc[table["class"].isin(parts.columns), "prevalence"].max()
    audit = bs.interpret.propose_audit(
        tokens, study.known, parts, groups=study.groups, budgets=BUDGETS, threshold=max(0.3, common + 0.1)
    )
    audit["threshold"] = audit.attrs["biosae"]["threshold"]
    audit.to_csv(out / f"{name}_audit.csv", index=False)
    separable(models, emb, labels, tokens, study.groups).to_csv(out / f"{name}_separability.csv", index=False)
    print(name, "done after", round(time.perf_counter() - started), "s", flush=True)


def separable(
    models: dict[str, Any], emb: bs.Embeddings, labels: pd.DataFrame, tokens: Any, groups: str
) -> pd.DataFrame:
    """Mean separability of test tokens by part."""
    import anndata

    test = (tokens.obs["split"] == "test").to_numpy()
    if labels.shape[1] == 1:
        labels = labels.assign(background=1 - labels.iloc[:, 0])
    part = labels.fillna(-1).idxmax(axis=1).where(labels.notna().all(axis=1))
    obs = tokens.obs.assign(part=part.reindex(tokens.obs_names).astype(object))[test]
    rows = []
    for name in ("BatchTopK", "k-means", "raw dimensions", "random directions"):
        model = models[name]
        codes = emb.array() if isinstance(model, str) else model.codes(emb) if hasattr(model, "codes") else model
        part = anndata.AnnData(codes[np.flatnonzero(test)], obs=obs)
        found = bs.interpret.separability(part, "part", groups=groups, n_null=2)
        live = found[found["status"] != "dead"]
        facts = found.attrs["biosae"]
        rows.append({
            "model": name, "n_live": len(live), "mean": facts["mean"], "top_decile": facts["top_decile"],
            "null_mean": live["null_mean"].mean(), "n_concepts": len(facts["concepts"]),
        })  # fmt: skip
    return pd.DataFrame(rows)


def maps(
    name: str,
    samples: bs.Samples,
    emb: bs.Embeddings,
    labels: pd.DataFrame,
    tokens: Any,
    chosen: pd.DataFrame,
    out: Path,
) -> None:
    """The chosen latents on five test samples drawn at random, beside the masks that the encoder's input has."""
    preprocess = preprocess_of(emb, samples)
    masked = labels.notna().all(axis=1).to_numpy().reshape(-1, emb.tokens_per_sample).all(1)
    test = np.flatnonzero((emb.obs["split"] == "test").to_numpy() & masked)
    drawn = np.sort(np.random.default_rng(0).choice(test, 5, replace=False))
    shown = chosen[chosen["class"] != "background"]
    with paper():
        fig = figure((7, 1.5 * (1 + 2 * len(shown))))
        grid = fig.subplots(1 + 2 * len(shown), 5, squeeze=False)
        for column, i in enumerate(drawn):
            image = shown_as(preprocess, samples[str(emb.obs.index[i])])
            panels = [(image, "image", {})]
            span = slice(i * emb.tokens_per_sample, (i + 1) * emb.tokens_per_sample)
            for _, row in shown.iterrows():
                code = tokens[span, row["latent"]].X.toarray().ravel() * np.sign(row["weight"])
                part = labels[row["class"]].to_numpy()[span]
                top = float(np.abs(tokens[:, row["latent"]].X).max())
                panels.append((part.reshape(emb.grid), f"mask: {row['class']}", {"cmap": "gray", "vmin": 0, "vmax": 1}))
                panels.append((code.reshape(emb.grid), row["latent"], {"cmap": "magma", "vmin": 0, "vmax": top}))
            for ax, (panel, title, style) in zip(grid[:, column], panels):
                ax.imshow(panel, **style)
                ax.set_xticks([])
                ax.set_yticks([])
                if column == 0:
                    ax.set_ylabel(title)
        bs.pl.save(fig, out / f"alignment_{name}_maps", dpi=150)


def shown_as(preprocess: Any, image: np.ndarray) -> np.ndarray:
    """The image as the encoder sees it, (h, w, 3) from 0 to 1."""
    return np.stack([np.clip(preprocess.coverage(channel / 255), 0, 1) for channel in np.moveaxis(image, -1, 0)], -1)


def main() -> None:
    data, weights, out = (Path(p) for p in sys.argv[1:4])
    out.mkdir(parents=True, exist_ok=True)
    settings.progress = False
    for name in sys.argv[4:] or STUDIES:
        run(name, data, weights, out)


if __name__ == "__main__":
    main()
