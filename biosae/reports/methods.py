"""A methods paragraph written from what was run, with its n, and nothing that was not."""

from __future__ import annotations

import numpy as np
import pandas as pd

from biosae.data.items import NOUNS
from biosae.data.roles import CONFOUNDERS, UNITS
from biosae.pl import results, style
from biosae.pl.retrieval import REPRESENTATIONS
from biosae.reports.run import Run

_METHODS = {
    "pearson": "Pearson correlation",
    "spearman": "Spearman rank correlation with average ranks for ties",
    "kendall": "Kendall's tau-b",
    "auroc": "the area under the ROC curve",
    "wilcoxon": "the Wilcoxon rank-sum test",
    "mannwhitney": "the Mann-Whitney U test",
    "welch": "Welch's t-test",
    "kruskal": "the Kruskal-Wallis test",
    "fisher": "Fisher's exact test",
    "ols": "linear regression",
    "poisson": "Poisson regression",
    "negbin": "negative binomial regression",
    "ordinal": "proportional-odds regression",
    "cox": "Cox regression with Efron's handling of ties",
    "lmm": "a linear mixed model",
}
_CORRECTIONS = {
    "bh": "the false discovery rate was controlled by the Benjamini-Hochberg procedure",
    "by": "the false discovery rate was controlled by the Benjamini-Yekutieli procedure",
    "bonferroni": "the family-wise error rate was controlled by Bonferroni's correction",
    "storey": "the false discovery rate was controlled by Storey's q-value",
    "hierarchical": "the false discovery rate was controlled over targets and, within selected targets, over latents",
    "holm": "the family-wise error rate was controlled by Holm's procedure",
}


def methods(run: Run) -> list[str]:
    """Paragraphs on the cohort, the encoder, the dictionary, the statistics, what was compared, and the software."""
    parts = (_cohort(run), _dictionary(run), _statistics(run), _two_cohorts(run), _retrieval(run), _software(run))
    return [p for p in parts if p]


def _cohort(run: Run) -> str:
    obs, identity = run.obs, run.facts.get("identity", {})
    text = f"The cohort comprised {style.count(len(obs), 'sample')}"
    parts = [style.count(obs[r].nunique(), r) for r in (*UNITS, *CONFOUNDERS) if run.role(r) is not None]
    text += f" from {_and(parts)}." if parts else "; patients were not known."
    failed = 0 if run.failures is None else run.failures.iloc[:, 0].nunique()  # some fail at several stages
    if failed:
        text += f" {style.count(failed, 'sample')} could not be read and {'was' if failed == 1 else 'were'} left out."
    if not identity:
        return text
    items = NOUNS[getattr(run.samples, "item", "image")].capitalize()
    text += f" {items} were embedded by the frozen encoder {identity.get('encoder', 'of unknown name')}"
    details = [
        f"layer {identity['layer']}" if identity.get("layer") is not None else "",
        f"{identity['pool']} pooling" if identity.get("pool") is not None else "",
        f"{identity['dim']} dimensions" if identity.get("dim") is not None else "",
    ]
    details = [d for d in details if d]
    return text + (f" ({', '.join(details)})." if details else ".")


CODERS = {
    "Baseline": ("decomposition", "method not recorded"),
    "ITDA": ("dictionary of embeddings", "ITDA"),
    "Pursuit": ("dictionary of a trained coder", "coded by pursuit"),
    "SemiNMF": ("factorisation with non-negative codes", "semi-NMF"),
}
"""Class of what is no sparse autoencoder: what it is, and its name where no setting gives one."""


def _dictionary(run: Run) -> str:
    sae = run.facts.get("sae", {})
    if not sae:
        return ""
    config = {**sae, **(sae.get("config") or sae.get("settings") or {})}
    metrics = {
        **{k: v for k, v in sae.items() if not isinstance(v, dict)},
        **(run.facts.get("metrics") or sae.get("metrics") or {}),
    }
    what, plain = CODERS.get(sae.get("class"), ("sparse autoencoder", "architecture not recorded"))
    text = f"A {what} ({config.get('architecture') or config.get('method') or plain}"
    text += f", {run.adata.n_vars:,} latents"
    text += f", k = {config['k']}" if config.get("k") is not None else ""
    text += ") was fitted to these embeddings" if sae.get("class") in CODERS else ") was trained on these embeddings"
    text += f" with seed {config['random_state']}" if config.get("random_state") is not None else ""
    fvu = next((metrics[k] for k in ("fvu_val", "fvu") if isinstance(metrics.get(k), (int, float))), np.nan)
    fvu = metrics.get("fvu", np.nan) if np.isnan(fvu) else fvu
    if not np.isnan(fvu):
        where = "held-out rows" if fvu == metrics.get("fvu_val") else "the training rows"
        text += f"; it left a fraction {fvu:.3f} of the variance of {where} unexplained"
    l0 = metrics.get("l0")
    text += f", with {l0:.1f} latents active a row" if isinstance(l0, (int, float)) else ""
    return text + "."


def _statistics(run: Run) -> str:
    table = run.associations
    tested = table[results.was_tested(table)]
    if tested.empty:
        return "No association could be tested."
    names = [
        _METHODS.get(str(m), str(m).replace("_", " ")) for m in pd.unique(tested.get("method", pd.Series(dtype=str)))
    ]
    config = run.choices
    latents = tested[tested["source"] == "latent"]
    text = (
        f"Each latent was tested against {style.count(tested['target'].nunique(), 'target')} by {_and(names)}, "
        f"with the {_and([str(u).replace('_', ' ') for u in pd.unique(tested['unit'])])} as the unit of analysis: "
        f"{results.units_phrase(latents if len(latents) else tested)}."
    )
    if config.get("aggregate") and config.get("unit", "sample") != "sample":
        words = {"mean": "mean", "max": "maximum", "fraction_active": "share of samples with a non-zero code"}
        how = str(config["aggregate"])
        most = f"mean of the {how[3:]} largest codes" if how.startswith("top") else how
        text += f" The value of a latent in a unit was the {words.get(how, most)}"
        text += "." if config["aggregate"] == "fraction_active" else " over its samples."
    if config.get("assume_independent"):
        text += " Units were taken as independent although they may share patients."
    if config.get("covariates"):
        text += f" Estimates were adjusted for {_and([_covariate(str(c)) for c in config['covariates']])}."
    if config.get("exposure"):
        text += f" The logarithm of {config['exposure']} was an offset of the counts."
    if config.get("event"):
        text += f" Times that did not end in {config['event']} were censored."
    if config.get("strata"):
        effects = "random" if config.get("pooling") == "random" else "fixed"
        text += f" Estimates were made within {config['strata']} and combined over its levels by {effects} effects."
    groups = latents["n_groups"].max() if "n_groups" in latents and len(latents) else np.nan
    if config.get("groups") and np.isfinite(groups) and groups < latents["n_units"].max():
        text += (
            f" p-values and intervals count {style.count(groups, str(config['groups']).replace('_', ' '))} "
            "as independent, not the units within them."
        )
    text += _training(config)
    correction = str(config.get("correction", "bh")).lower()
    text += f" Over the {len(latents):,} tests of latents, {_CORRECTIONS.get(correction, correction)}."
    if "p_maxt" in tested and tested["p_maxt"].notna().any():
        b = config.get("n_permutations")
        text += (
            " Family-wise p-values for the best latent came from the permutation distribution of the largest statistic"
        )
        text += f" ({int(b):,} permutations{_SCHEMES.get(str(config.get('permute')), '')})." if b else "."
    controls = [s for s in ("raw", "pca") if (tested["source"] == s).any()]
    if controls:
        said = _and([{"raw": "the encoder's own dimensions", "pca": "principal components"}[s] for s in controls])
        text += f" The same tests were run on {said} as controls, each as its own family."
    refused = results.status_counts(table)
    if len(refused):
        said = ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in refused.items())
        text += f" {int(refused.sum()):,} tests were withheld ({said})."
    return text


_SCHEMES = {
    "within": ", samples rearranged within their group",
    "between": ", groups rearranged as wholes",
    "spatial": ", tiles of a slide shifted as a whole",
}


def _covariate(name: str) -> str:
    """``spline(age, df=4)`` in words."""
    inside = name.removeprefix("spline(").removesuffix(")").split(",")[0].strip()
    return f"{inside} (natural cubic spline)" if name.startswith("spline(") else name


def _training(config: dict) -> str:
    """How many of the patients the dictionary was trained on."""
    known = config.get("sae_training") or {}
    if not known.get("known"):
        return ""
    what = "groups" if known.get("n_groups") is not None else "samples"
    on, total = int(known[f"n_{what}_trained_on"]), int(known[f"n_{what}"])
    noun = str(config.get("groups") or "group") if what == "groups" else "sample"
    return f" The dictionary of latents had been trained on {on:,} of the {style.count(total, noun)} tested."


def _two_cohorts(run: Run) -> str:
    table = run.tables.get("diff")
    if table is None:
        return ""
    facts = run.cohorts
    asked = (run.study.get("config") or {}).get("diff") or {}
    first, noun = table.iloc[0], facts["noun"]
    what = f"{facts['document']}s in which any sample fires" if facts.get("document") else "samples in which it fires"
    sides = _and([f"{facts[s]} ({style.count(first[f'n_{s}'], noun)})" for s in "ab"])
    text = f"How often a latent fires was compared between {sides}"
    text += f", each {noun} giving the share of its {what}." if noun != "sample" else "."
    if facts.get("n_tiles"):
        per = facts.get("document") or noun
        text += f" Each {per} was cut to {style.count(facts['n_tiles'], 'sample')} drawn at random."
    how = [str(h) for h in pd.unique(table.loc[table["p"].notna(), "inference"]) if str(h) not in ("", "nan")]
    if facts.get("paired"):
        text += f" The same {noun}s were in both, and p-values came from their differences ({'; '.join(how)})."
    elif how:
        draws = "; ".join(dict.fromkeys(h.split(";")[0].removeprefix("permutation, ") for h in how))
        text += f" p-values came from rearranging {noun}s between the two"
        text += f", within {asked['blocks']}" if asked.get("blocks") else ""
        text += f" ({draws})."
    if facts.get("covariates"):
        text += f" p-values were adjusted for {_and([_covariate(str(c)) for c in facts['covariates']])}."
    if facts.get("assume_independent"):
        text += " Samples were taken as independent although they may share patients."
    text += (
        f" Over the {int(table['p'].notna().sum()):,} latents tested"
        + (f" (those that fire in at least {asked['min_frequency']:.0%})" if asked.get("min_frequency") else "")
        + f", {_CORRECTIONS['bh']}."
    )
    if "pairs" in run.tables:
        pairs = run.tables["pairs"]
        within = pairs.attrs.get("biosae", {}).get("strata")
        text += f" {style.count(int(pairs['p'].notna().sum()), 'pair')} of latents were tested for firing together"
        text += f" within {within}" if within else ""
        text += ", with normalised pointwise mutual information as description."
    return text


_METRICS = {
    "cosine": "cosine similarity", "dot": "the inner product", "euclidean": "Euclidean distance",
    "jaccard": "the Jaccard index of which latents fire",
}  # fmt: skip


def _retrieval(run: Run) -> str:
    table = run.tables.get("retrieval")
    measured = table[table["estimate"].notna()] if table is not None and "estimate" in table else None
    if measured is None or measured.empty:
        return ""
    reps = [r for r in pd.unique(measured["use_rep"].astype(str)) if " - " not in r]
    metric = str(measured["metric"].iloc[0])
    by = _and([REPRESENTATIONS.get(r, r) for r in reps])
    text = (
        f"In a search by example, {int(measured['n_queries'].max()):,} queries ranked the samples by "
        f"{_METRICS.get(metric, metric)} of their {by}; relevant was what has the query's "
        f"{_and([str(v) for v in pd.unique(measured['label'])])}. The query itself was never ranked"
    )
    excluded = [str(v) for v in pd.unique(measured["excluded"]) if v != "nothing"]
    text += f"; rankings were repeated without samples that share its {'; or its '.join(excluded)}" if excluded else ""
    groups = str(measured["groups"].iloc[0])
    text += (
        ". Reported is mean average precision, as expected over the orders of equal scores, beside that of a random "
        "order, with 95 % intervals from cluster-robust variances (CR2), "
    )
    if groups == "every query":
        return text + "queries taken as independent."
    return text + f"{style.count(measured['n_groups'].max(), groups.replace('_', ' '))} taken as independent."


def _software(run: Run) -> str:
    versions = run.provenance.get("versions") or run.facts.get("provenance", {}).get("versions") or {}
    shown = ("biosae", "torch", "timm", "open-clip-torch", "numpy", "scipy", "statsmodels", "anndata")
    said = [f"{name} {versions[name]}" for name in shown if versions.get(name)]
    return f"Software: {', '.join(said)}." if said else ""


def _and(items: list[str]) -> str:
    items = [i for i in items if i]
    return (
        items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else "an unstated method"
    )
