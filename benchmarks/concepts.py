"""Cell types of a latent and a device taken out of codes, on white blood cells of two devices.

    python benchmarks/concepts.py DATA WEIGHTS OUT

Numbers of docs/interpret/concepts.md. OUT is that of benchmarks/alignment.py, whose embeddings are used again; here
``cells_enrichment.csv`` and ``cells_attenuation.csv`` are added. The SAE and what is taken out are learnt on the
training part, and read on the other images.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from alignment import LATENTS, STUDIES, K, embedded, samples_of

import biosae as bs
from biosae.settings import settings

ONTOLOGY = {
    "neutrophil": "granulocyte", "eosinophil": "granulocyte", "basophil": "granulocyte", "granulocyte": "leukocyte",
    "lymphocyte": "mononuclear cell", "monocyte": "mononuclear cell", "mononuclear cell": "leukocyte",
}  # fmt: skip


def main() -> None:
    data, weights, out = (Path(p) for p in sys.argv[1:4])
    settings.progress = False
    study = STUDIES["cells"]
    emb = embedded(study, samples_of(study, data), weights, out / "work" / "cells", random=False)
    train = (emb.obs["split"] == "train").to_numpy()
    sae = bs.sae.SAE("batchtopk", n_latents=LATENTS, k=K, n_steps=1500, random_state=0).fit(emb.select(train))
    adata = bs.encode(sae, emb)
    adata.obs["device"] = adata.obs["source_dataset"].astype(str)
    enriched = bs.interpret.enrichment(
        adata, "cell_class", ontology=bs.interpret.Ontology(ONTOLOGY), groups="content_hash", strata="device"
    )
    enriched.to_csv(out / "cells_enrichment.csv", index=False)
    print(enriched[enriched["chosen"]]["term"].value_counts())
    rows, other = [], adata[~train].copy()
    for how in ("none", "app", "range", "full"):
        for n_latents in (32, 512):
            edited = other.copy()
            if how != "none":
                edit = bs.interpret.attenuation(adata[train], "device", "1", how=how, n_latents=n_latents)
                edited.X = edit(other.X)
            read = bs.stats.readout(
                edited, ["device", "cell_class"], groups="content_hash", features=["latents"], random_state=0
            ).set_index("factor")
            rows.append({
                "how": how, "n_latents": n_latents, "kept": float(abs(edited.X).sum() / abs(other.X).sum()),
                **{f: read.loc[f, "balanced_accuracy"] for f in ("device", "cell_class")},
                "n_samples": edited.n_obs,
            })  # fmt: skip
    found = pd.DataFrame(rows).drop_duplicates(subset=["how", "device", "cell_class", "kept"])
    found.to_csv(out / "cells_attenuation.csv", index=False)
    print(found)


if __name__ == "__main__":
    main()
