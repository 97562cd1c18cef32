"""Search by sparse codes against search by dense embeddings on three cohorts: the tables of docs/search/retrieval.md.

    python benchmarks/retrieval.py --data DATA --weights WEIGHTS --work WORK --docs docs/search/retrieval.md

Blood smears (txl_pbc_blood), colorectal tiles (crc_histopheno), camera traps (camera_trap_small_mammals). Dictionaries
are trained on patch embeddings of the training part only and with several seeds; queries are the other images, and
the gallery is everything. Embeddings are compared as they are and after the mean of the training part is taken off,
which a dictionary does too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from pages import insert

import biosae as bs
from biosae.pl import style
from biosae.search.evaluate import clustered_mean

ROOT = Path(__file__).resolve().parents[1]
REPS = ("X", "codes_max", "embedding", "centred")  # the last is what the others are compared with
NAMES = {"X": "codes, mean", "codes_max": "codes, max", "embedding": "embedding", "centred": "embedding, centred"}
BLOOD = [("site", ()), ("site", ("near_dup_group",))]
BLOOD += [(label, rule) for label in ("platelets", "red_cells") for rule in ((), ("near_dup_group",), ("site",))]
KINDS = ["epithelial", "inflammatory", "fibroblast", "other"]
SAE = {"architecture": "topk", "n_latents": 512, "k": 16, "batch_size": 1024, "n_steps": 400}


def tokens(samples: Any, name: str, layers: list[str], work: Path, **options: Any) -> dict[str, bs.Embeddings]:
    """Patch embeddings of every layer, made once."""
    encoder = bs.encoders.load(name, **options)
    found = bs.encoders.embed(samples, encoder, layer=layers, pool="tokens", out=work, n_jobs=1)
    return found if isinstance(found, dict) else {layers[0]: found}


def latents(emb: bs.Embeddings, train: np.ndarray, seed: int) -> anndata.AnnData:
    """Codes (mean, and max in obsm) and embeddings of all samples; the dictionary saw the rows of ``train`` only."""
    part = emb.select(train)
    sae = bs.sae.SAE(**SAE, random_state=seed).fit(part.array())
    sae.identity_ = emb.identity
    adata = bs.encode(sae, emb, tokens="mean")
    adata.obsm["codes_max"] = bs.encode(sae, emb, tokens="max", keep_embedding=False).X
    adata.obsm["centred"] = adata.obsm["embedding"] - adata.obsm["embedding"][train].mean(axis=0)
    return adata


def study(
    emb: bs.Embeddings, questions: list[tuple[str, tuple[str, ...]]], groups: str, seeds: int, asked: Any = True
) -> pd.DataFrame:
    """Every question (label, exclude) to every representation, for each seed of the dictionary."""
    train = emb.obs["split"].eq("train").to_numpy()
    tables = []
    for seed in range(seeds):
        adata = latents(emb, train, seed)
        for label, exclude in questions:
            table = bs.search.evaluate(
                adata, label, use_rep=REPS, exclude=exclude, groups=groups, queries=~train & asked, k=10
            )
            tables.append(table.assign(exclude=", ".join(exclude) or "nothing", seed=seed))
    return pd.concat(tables, ignore_index=True)


def blood_labels(table: pd.DataFrame) -> None:
    table["platelets"] = np.where(table["count_platelet"] > 0, "some", "none")
    third = table.groupby("site", observed=True)["count_rbc"].rank(pct=True, method="average")
    table["red_cells"] = pd.cut(third, [0, 1 / 3, 2 / 3, 1], labels=["few", "middle", "many"]).astype(str)


def pooled(run: Path) -> pd.DataFrame:
    """The same questions to the codes of a finished run, whose dictionaries saw pooled embeddings."""
    tables = []
    for file in [run / "latents.h5ad", *sorted(run.glob("views/*/latents.h5ad"))]:
        adata = anndata.read_h5ad(file)
        blood_labels(adata.obs)
        train = adata.obs["split"].eq("train").to_numpy()
        adata.obsm["centred"] = adata.obsm["embedding"] - adata.obsm["embedding"][train].mean(axis=0)
        identity = adata.uns["biosae"]["identity"]
        for label, exclude in BLOOD:
            table = bs.search.evaluate(
                adata, label, use_rep=("X", "embedding", "centred"), exclude=exclude, groups="near_dup_group",
                queries=~train, k=10,
            )  # fmt: skip
            name = f"blood, pooled / {identity['encoder']} {identity['layer']}"
            tables.append(table.assign(exclude=", ".join(exclude) or "nothing", seed=0, study=name))
    return pd.concat(tables, ignore_index=True)


def blood(data: Path, work: Path, seeds: int) -> dict[str, pd.DataFrame]:
    folder = data / "txl_pbc_blood"
    table = pd.read_csv(folder / "manifest.csv")
    blood_labels(table)
    samples = bs.read.images(table, root=folder, patient=None, site="site", split="split", id="sample_id")
    found = tokens(
        samples, "mobilenetv2-imagenet", ["final", "blocks.4"], work / "blood", resize="squash", crop_pct=1.0
    )
    return {f"blood / mobilenetv2 {layer}": study(emb, BLOOD, "near_dup_group", seeds) for layer, emb in found.items()}


def colon(data: Path, work: Path, seeds: int) -> dict[str, pd.DataFrame]:
    folder = data / "crc_histopheno"
    table = pd.read_csv(folder / "manifest.csv")
    counts = table[[f"count_{kind}" for kind in KINDS]].to_numpy()
    clear = (counts.sum(1) >= 10) & (counts.max(1) > 0.5 * counts.sum(1))
    table["dominant"] = pd.Series(np.array(KINDS)[counts.argmax(1)]).where(clear)
    table["colour_cluster"] = table["colour_cluster"].astype(str)
    samples = bs.read.images(
        table, root=folder, patient=None, slide="image_id", split="split", id="sample_id", mpp=0.55
    )
    questions = [("dominant", ()), ("dominant", ("image_id",)), ("dominant", ("image_id", "colour_cluster"))]
    out = {}
    for name, layers in (("nic-histology-multitask4", ["bn4"]), ("mobilenetv2-imagenet", ["final"])):
        for layer, emb in tokens(samples, name, layers, work / "colon").items():
            out[f"colon / {name} {layer}"] = study(emb, questions, "image_id", seeds)
    return out


def late(work: Path, seeds: int) -> pd.DataFrame:
    """Whole fields (four tiles) of the colon: mean codes against MaxSim over patches, codes against embeddings."""
    emb = bs.Embeddings.open(next((work / "colon").glob("nic*/bn4")))
    field = emb.obs["image_id"].astype(str)
    counts = emb.obs[[f"count_{kind}" for kind in KINDS]].groupby(field).sum()
    label = counts.idxmax(axis=1)[(counts.sum(1) >= 10) & (counts.max(1) > 0.5 * counts.sum(1))]
    train = emb.obs["split"].eq("train").to_numpy()
    asked = [f for f in label.index if f not in set(field[train])]
    lines = []
    for seed in range(seeds):
        sae = bs.sae.SAE(**SAE, random_state=seed).fit(emb.select(train).array())
        sae.identity_ = emb.identity
        patches = bs.encode(sae, emb, tokens=None)
        dense = patches.obsm["embedding"]
        patches.obsm["centred"] = dense - dense[patches.obs["split"].eq("train").to_numpy()].mean(0)
        pooled = bs.stats.aggregate(bs.encode(sae, emb, tokens="mean"), by="image_id")
        centred = pd.DataFrame(patches.obsm["centred"]).groupby(patches.obs["image_id"].to_numpy()).mean()
        for rep, whole in (("X", pooled.X), ("centred", centred.loc[pooled.obs_names].to_numpy())):
            near = bs.search.Index(whole, obs=pooled.obs).search(list(asked), n=pooled.n_obs)
            scores = pd.DataFrame(
                [dict(zip(near.ids[rows[rows >= 0]], line)) for rows, line in zip(near.rows, near.scores)], asked
            )
            bags = bs.search.late_interaction(patches, by="image_id", use_rep=rep)
            for how, table in (("mean over patches", scores), ("MaxSim over patches", bags)):
                for query in asked:
                    others = [f for f in label.index if f != query]
                    found = bs.search.ranking_measures(label[others] == label[query], table.loc[query, others])
                    lines.append({"seed": seed, "rep": rep, "how": how, "query": query, **found})
    return pd.DataFrame(lines)


def camera_samples(data: Path) -> Any:
    folder = data / "camera_trap_small_mammals"
    table = pd.read_csv(folder / "manifest.csv")
    table["animal"] = table["animal_present"].map({0.0: "no", 1.0: "yes"})
    return bs.read.images(table, root=folder, patient=None, location="camera_id", split="split", id="sample_id")


def cameras(data: Path, work: Path, seeds: int) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """Search by image over cameras, and retrieval of a property whose latents were chosen on the other cameras."""
    emb = tokens(camera_samples(data), "mobilenetv2-imagenet", ["final"], work / "cameras")["final"]
    animals = emb.obs["animal"].eq("yes").to_numpy()
    search = study(emb, [("animal", ()), ("animal", ("camera_id",))], "camera_id", seeds, animals)
    lines = []
    for camera in sorted(emb.obs["camera_id"].unique()):
        here = emb.obs["camera_id"].eq(camera).to_numpy()
        for seed in range(seeds):
            adata = latents(emb, ~here, seed)
            adata = adata[adata.obs["animal"].notna()].copy()
            lines += property_lines(adata, camera, seed)
    return {"cameras / mobilenetv2-imagenet final": search}, pd.DataFrame(lines)


def relevance_of(adata: anndata.AnnData, elsewhere: np.ndarray) -> pd.Series:
    """AUROC of every latent for animals, from the pictures of ``elsewhere``."""
    tested = bs.stats.associate(
        adata[elsewhere].copy(), ["animal"], unit="sample", method="auroc", controls=False, assume_independent=True
    )
    return tested.set_index("latent")["estimate"]


def animal_figure(data: Path, work: Path, path: Path, shown: int = 8) -> None:
    """The first pictures of each held-out camera, as the ten latents chosen on the others rank them."""
    samples = camera_samples(data)
    emb = tokens(samples, "mobilenetv2-imagenet", ["final"], work / "cameras")["final"]
    names = sorted(emb.obs["camera_id"].unique())
    with style.paper():
        fig = style.figure((6.9, 3.1))
        axes = fig.subplots(len(names), shown)
        for row, camera in zip(axes, names):
            here = emb.obs["camera_id"].eq(camera).to_numpy()
            adata = latents(emb, ~here, 0)
            adata = adata[adata.obs["animal"].notna()].copy()
            relevance = relevance_of(adata, adata.obs["camera_id"].ne(camera).to_numpy())
            found = bs.search.by_relevance(adata, relevance, n=shown, exclude={"camera_id": other(adata, camera)})
            for rank, (ax, name) in enumerate(zip(row, found["sample_id"]), 1):
                ax.imshow(samples[name])
                ax.set_xticks([])
                ax.set_yticks([])
                ax.set_xlabel(f"{rank}: " + ("animal" if adata.obs.loc[name, "animal"] == "yes" else "none"))
            row[0].set_ylabel(camera.replace("vj_ga_hu_", "camera "))
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)


def property_lines(adata: anndata.AnnData, camera: str, seed: int) -> list[dict[str, Any]]:
    """Animals of one camera, ranked by what the other cameras teach."""
    from sklearn.linear_model import LogisticRegression

    here = adata.obs["camera_id"].eq(camera).to_numpy()
    wanted = adata.obs["animal"].eq("yes").to_numpy()
    rankings: dict[str, np.ndarray] = {}
    for pool, codes in (("mean", adata.X), ("max", adata.obsm["codes_max"])):
        part = anndata.AnnData(sp.csr_matrix(codes), obs=adata.obs, var=adata.var[[]])
        relevance = relevance_of(part, ~here)
        found = bs.search.by_relevance(part, relevance, n=part.n_obs, exclude={"camera_id": other(adata, camera)})
        rankings[f"10 latents, {pool}"] = found.set_index("sample_id")["score"]
        best = relevance.idxmax()
        found = bs.search.by_weights(part, {best: 1.0}, n=part.n_obs, exclude={"camera_id": other(adata, camera)})
        rankings[f"best latent, {pool}"] = found.set_index("sample_id")["score"]
        rng = np.random.default_rng(seed)
        alive = part.var_names[np.asarray((part[~here].X != 0).sum(0)).ravel() > 0]
        null = []
        for _ in range(200):
            drawn = pd.Series(1.0, index=rng.choice(alive, 10, replace=False))
            found = bs.search.by_relevance(part, drawn, n=part.n_obs, exclude={"camera_id": other(adata, camera)})
            null.append(average_precision(found.set_index("sample_id")["score"], adata, wanted))
        rankings[f"10 random latents, {pool}"] = np.array(null)
    dense = adata.obsm["embedding"]
    scaled = (dense - dense[~here].mean(0)) / (dense[~here].std(0) + 1e-6)
    model = LogisticRegression(C=0.01, max_iter=2000, class_weight="balanced").fit(scaled[~here], wanted[~here])
    rankings["logistic regression on embedding"] = pd.Series(
        model.decision_function(scaled[here]), adata.obs_names[here]
    )
    direction = dense[~here & wanted].mean(0) - dense[~here & ~wanted].mean(0)
    rankings["difference of mean embeddings"] = pd.Series(dense[here] @ direction, adata.obs_names[here])
    rankings["no information"] = pd.Series(0.0, adata.obs_names[here])
    lines = []
    for name, ranking in rankings.items():
        null = isinstance(ranking, np.ndarray)
        lines.append({
            "camera": camera, "seed": seed, "method": name, "n": int(here.sum()), "animals": int((here & wanted).sum()),
            "ap": float(ranking.mean()) if null else average_precision(ranking, adata, wanted),
            "ap_95": float(np.quantile(ranking, 0.95)) if null else np.nan,
        })  # fmt: skip
    return lines


def other(adata: anndata.AnnData, camera: str) -> list[str]:
    return [c for c in adata.obs["camera_id"].unique() if c != camera]


def average_precision(scores: pd.Series, adata: anndata.AnnData, wanted: np.ndarray) -> float:
    truth = pd.Series(wanted, adata.obs_names)[scores.index]
    return bs.search.ranking_measures(truth.to_numpy().astype(int), scores.to_numpy())["ap"]


def sections(work: Path) -> dict[str, str]:
    """Tables of the page from the numbers in ``work``: what seed 0 found, and over how much the seeds spread."""
    out = {}
    for name in ("blood", "pooled", "colon", "cameras"):
        if (work / f"{name}.csv").exists():
            out[name] = search_table(pd.read_csv(work / f"{name}.csv", keep_default_na=False, na_values=[""]))
    if (work / "late.csv").exists():
        out["late"] = late_table(pd.read_csv(work / "late.csv"))
    if (work / "animals.csv").exists():
        out["animals"] = animal_table(pd.read_csv(work / "animals.csv"))
    return out


def search_table(numbers: pd.DataFrame) -> str:
    lines = []
    for study, part in numbers.groupby("study", sort=False):
        facts, n_seeds = part.iloc[0], part["seed"].nunique()
        reps = [rep for rep in NAMES if (part["use_rep"] == rep).any()]
        spread_over = f", range over {n_seeds} dictionaries" if n_seeds > 1 else ""
        lines += [
            f"**{study}**, {facts['n_queries']} queries in {facts['n_groups']} groups; mAP, 95 % interval"
            f"{spread_over}.",
            "",
            "| label | excluded | " + " | ".join(NAMES[rep] for rep in reps)
            + " | chance | codes, mean - embedding, centred | NDCG@10, same order |",
            "| --- | ---" + " | ---" * (len(reps) + 3) + " |",
        ]  # fmt: skip
        for (label, exclude), rows in part.groupby(["label", "exclude"], sort=False):
            ap = rows[rows["measure"] == "ap"]
            first = ap[ap["seed"] == 0].set_index("use_rep")
            cells = [label, exclude]
            for rep in reps:
                seeds = ap[ap["use_rep"] == rep]["estimate"]
                learnt = n_seeds > 1 and rep in ("X", "codes_max")
                cells.append(
                    interval(first.loc[rep]) + (f" [{seeds.min():.3f} to {seeds.max():.3f}]" if learnt else "")
                )
            ndcg = rows[(rows["measure"] == "ndcg@10") & (rows["seed"] == 0)].set_index("use_rep")["estimate"]
            cells += [f"{first.loc['X', 'chance']:.3f}", interval(first.loc["X - centred"], sign="+")]
            cells.append(", ".join(f"{ndcg[rep]:.3f}" for rep in reps))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def interval(row: pd.Series, sign: str = "") -> str:
    return f"{row['estimate']:{sign}.3f} ({row['ci_low']:{sign}.3f}, {row['ci_high']:{sign}.3f})"


def late_table(numbers: pd.DataFrame) -> str:
    lines = [
        "| patches compared by | mean over patches | MaxSim over patches | MaxSim - mean |",
        "| --- | --- | --- | --- |",
    ]
    for rep, rows in numbers.groupby("rep", sort=False):
        cells = [NAMES[rep].replace(", mean", "")]
        wide = rows.pivot_table(index=["seed", "query"], columns="how", values="ap")
        wide["difference"] = wide["MaxSim over patches"] - wide["mean over patches"]
        for how, sign in (("mean over patches", ""), ("MaxSim over patches", ""), ("difference", "+")):
            by_seed = wide[how].groupby("seed").mean()
            first = wide[how].loc[0].to_numpy()
            row = pd.Series(clustered_mean(first, np.arange(len(first)), difference=how == "difference"))
            spread = f" [{by_seed.min():{sign}.3f} to {by_seed.max():{sign}.3f}]" if rep == "X" else ""
            cells.append(interval(row, sign) + spread)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def animal_table(numbers: pd.DataFrame) -> str:
    cameras = numbers.groupby("camera")[["n", "animals"]].first()
    heads = [f"{camera} ({facts['animals']} of {facts['n']})" for camera, facts in cameras.iterrows()]
    lines = ["| ranking | " + " | ".join(heads) + " |", "| ---" + " | ---" * len(heads) + " |"]
    for method, rows in numbers.groupby("method", sort=False):
        cells = []
        for camera in cameras.index:
            part = rows[rows["camera"] == camera]
            low, high = part["ap"].min(), part["ap"].max()
            cell = f"{part['ap'].mean():.3f}" + (f" [{low:.3f} to {high:.3f}]" if high - low > 5e-4 else "")
            cells.append(cell + (f", 95 % below {part['ap_95'].max():.3f}" if part["ap_95"].notna().any() else ""))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="embeddings are kept here")
    parser.add_argument("--figure", type=Path, help="where the figure of animals is written")
    parser.add_argument("--run", type=Path, help="run folder of pipelines/blood_smear_counts.toml, to search its codes")
    parser.add_argument("--docs", type=Path, help="page whose sections between markers are replaced")
    parser.add_argument(
        "--only", choices=("blood", "colon", "cameras", "none"), help="one cohort; none: write the page only"
    )
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    bs.settings.weights_dirs = [options.weights]
    bs.settings.offline, bs.settings.progress = True, False
    chosen = {None: ["blood", "colon", "cameras"], "none": []}.get(options.only, [options.only])
    for name in chosen:
        if name == "cameras":
            tables, animals = cameras(options.data, options.work, options.seeds)
            animals.to_csv(options.work / "animals.csv", index=False)
        else:
            tables = {"blood": blood, "colon": colon}[name](options.data, options.work, options.seeds)
        if name == "colon":
            late(options.work, options.seeds).to_csv(options.work / "late.csv", index=False)
        whole = pd.concat([table.assign(study=study) for study, table in tables.items()])
        whole.to_csv(options.work / f"{name}.csv", index=False)
    if options.run:
        pooled(options.run).to_csv(options.work / "pooled.csv", index=False)
    if options.figure:
        animal_figure(options.data, options.work, options.figure)
    if options.docs:
        for name, text in sections(options.work).items():
            insert(options.docs, name, text)


if __name__ == "__main__":
    main()
