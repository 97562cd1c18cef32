"""The status vocabulary: why a row of a result table has, or has not, a p-value."""

from __future__ import annotations

import pandas as pd

STATUS: dict[str, str] = {
    "ok": "tested",
    "few_groups": "tested; 3 to 19 independent groups, so permutation or t with groups - 1 df was forced",
    "one_class": "the target has one value after rows without a label are left out: nothing to estimate",
    "dead": "the latent never fires in these rows",
    "constant": "the latent has one non-zero value in all rows",
    "too_small": "fewer rows than the estimate needs (3, or 4 + number of adjusting columns)",
    "unidentifiable": "the covariates determine the target (R2 > 0.95) or the latent (VIF > 10), or the number of "
    "samples that a pooled unit holds does (R2 > 0.8)",
    "too_few_groups": "fewer than 3 independent groups: estimate only, no interval or p",
    "no_groups": "nothing says which samples are independent: estimate only",
    "undefined": "no neighbour tells biology from site: the index has no value",
    "too_sparse": "the latent fires in too few rows or groups, or fewer than 3 events: estimate shown, p withheld",
    "separated": "the latent (with the covariates) tells the classes or events apart without a fault, so that the "
    "model's estimate is infinite: see its AUROC or exact test",
    "not_converged": "the model's equations have no solution on these rows: nothing to show",
}
"""status -> meaning."""

TESTED = ("ok", "few_groups")
"""Statuses whose rows carry a p-value and are counted in the multiplicity family."""


def evidence(result: pd.DataFrame) -> pd.DataFrame:
    """How many of the planned tests were made, and why the others were not.

    Parameters
    ----------
    result
        Table of :func:`biosae.stats.associate`.

    Returns
    -------
    DataFrame
        One row a (target, source, status), the tested first: ``target, source, status, n, share`` (of the target and
        source), ``tested, reason``. What determines an unidentifiable target is named.
    """
    facts = result.attrs.get("biosae", {}).get("targets", {})
    count = result.groupby(["target", "source", "status"], sort=False).size().rename("n").reset_index()
    count["share"] = count["n"] / count.groupby(["target", "source"])["n"].transform("sum")
    count["tested"] = count["status"].isin(TESTED)
    count["reason"] = [
        (status == "unidentifiable" and facts.get(target, {}).get("unidentifiable")) or STATUS.get(status, "")
        for target, status in zip(count["target"], count["status"])
    ]
    place = {name: i for i, name in enumerate(dict.fromkeys(result["target"]))}
    source = {name: i for i, name in enumerate(dict.fromkeys(result["source"]))}
    order = pd.DataFrame(
        {"t": count["target"].map(place), "s": count["source"].map(source), "no": ~count["tested"], "n": -count["n"]}
    )
    return count.loc[order.sort_values(["t", "s", "no", "n"], kind="stable").index].reset_index(drop=True)
