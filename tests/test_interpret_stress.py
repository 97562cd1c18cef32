"""Stress cards: planted latents pass or fail as they must, numbers agree with others, refusals say why."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from biosae.errors import InputError, StatisticsError
from biosae.interpret import resampled
from biosae.interpret.stress import COLUMNS, THRESHOLDS, stress

PATIENTS, EACH, WIDTH, LATENTS = 48, 12, 24, 40


def table(codes: np.ndarray, atoms: np.ndarray, obs: pd.DataFrame, *, noise: float = 0.05, seed: int = 0, **uns):
    x = codes @ atoms + noise * np.random.default_rng(seed).standard_normal((len(codes), atoms.shape[1]))
    out = anndata.AnnData(
        X=sp.csr_matrix(codes, dtype=np.float32), obs=obs.copy(),
        var=pd.DataFrame(index=[f"L{j:04d}" for j in range(codes.shape[1])]),
    )  # fmt: skip
    out.obsm["embedding"], out.varm["decoder"] = x.astype(np.float32), atoms.astype(np.float32)
    out.uns["biosae"] = {"tokens": "none", "additive": True, **uns}
    return out


def planted(*, n_patients: int = PATIENTS, seed: int = 0):
    """L0000 is the label, L0001 the site, the others fire at random. The label is commoner at site a."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(n_patients), EACH)
    site = np.array(list("abcd"))[patient % 4]
    y = rng.random(len(patient)) < np.where(site == "a", 0.8, 0.35)
    codes = np.where(rng.random((len(y), LATENTS)) < 0.3, rng.gamma(4, 0.25, (len(y), LATENTS)), 0)
    codes[:, 0] = y * rng.uniform(0.9, 1.1, len(y)) * 3
    codes[:, 1] = (site == "a") * rng.uniform(0.9, 1.1, len(y)) * 3
    atoms = rng.standard_normal((LATENTS, WIDTH))
    atoms[:2] = 0
    atoms[2:, :2] = 0
    atoms[0, 0] = atoms[1, 1] = 1
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    obs = pd.DataFrame(
        {
            "patient": [f"p{p}" for p in patient], "site": site, "label": np.where(y, "tumour", "benign"),
            "amount": y + rng.uniform(0, 0.5, len(y)), "alike": (~y & (rng.random(len(y)) < 0.5)).astype(int),
        },
        index=[f"s{i}" for i in range(len(y))],
    )  # fmt: skip
    return codes, atoms, obs, y


@pytest.fixture(scope="module")
def cohort():
    codes, atoms, obs, _ = planted()
    rng = np.random.default_rng(5)
    order = [rng.permutation(LATENTS) for _ in range(3)]
    other_layer = table(codes[:, order[0]], atoms[order[0]], obs)[rng.permutation(len(obs))].copy()
    seeds = [
        table(codes[:, o] * 1.02, atoms[o] + 0.02 * rng.standard_normal(atoms.shape), obs) for o in order[1:]
    ]  # fmt: skip
    moved = codes * rng.uniform(0.98, 1.02, codes.shape)
    return {
        "adata": table(codes, atoms, obs), "context": "site", "look_alikes": "alike", "layers": {"early": other_layer},
        "seeds": seeds, "perturbed": {"colour": table(moved, atoms, obs)},
    }  # fmt: skip


def verdicts(card) -> dict[str, str]:
    return card.table.set_index("check")["verdict"].to_dict()


def card_of(cohort, latent: str, **options):
    settings = {**cohort, **options}
    return stress(settings.pop("adata"), latent, "label", positive="tumour", **settings)


def test_a_latent_equal_to_the_label_passes_every_check(cohort) -> None:
    card = card_of(cohort, "L0000")
    assert verdicts(card) == dict.fromkeys(THRESHOLDS, "passed"), card.table[["check", "score", "ci_low", "reason"]]
    assert list(card.table) == COLUMNS and card.claim == "high L0000 goes with label = tumour"
    assert (card.table["n_patients"] >= 19).all() and (card.table["n_samples"] >= 25).all()
    assert (card.table["ci_low"] < 1).all()  # no interval without width, however perfect
    assert json.loads(json.dumps(card.to_dict()))["checks"][0]["score"] == 1.0


def test_a_latent_equal_to_the_site_fails_context_and_look_alikes(cohort) -> None:
    card = card_of(cohort, "L0001", only=["association", "context", "look_alikes", "seeds"])
    assert verdicts(card)["association"] == "passed"  # it does go with the label, by way of the site
    assert verdicts(card)["context"] == verdicts(card)["look_alikes"] == "failed"
    score = card.table.set_index("check")["score"]
    assert score["context"] == 0 and score["look_alikes"] == 0
    assert verdicts(card)["seeds"] == "passed"  # a stable latent is not for that a right one


def test_a_latent_that_marks_absence_is_read_from_its_low_end(cohort) -> None:
    adata = cohort["adata"].copy()
    y = (adata.obs["label"] == "tumour").to_numpy()
    codes = adata.X.toarray()
    codes[:, 0] = np.where(y, 0, 2.0)
    adata.X = sp.csr_matrix(codes)
    card = stress(
        adata, "L0000", "label", positive="tumour", context="site", look_alikes="alike",
        only=["association", "context", "contradiction", "look_alikes"],
    )  # fmt: skip
    assert card.claim.startswith("low L0000")
    score = card.table.set_index("check")["score"]
    assert score[["association", "context", "contradiction", "look_alikes"]].tolist() == [1, 1, 1, 1]
    other = stress(adata, "L0000", "label", positive="tumour", direction="higher", only=["contradiction"])
    assert other.table.set_index("check")["score"]["contradiction"] == 0


def test_context_keeps_the_share_of_the_largest_effect_by_hand() -> None:
    codes, atoms, obs, y = planted()
    rng = np.random.default_rng(1)
    z = y + rng.normal(0, np.where(obs["site"] == "b", 3.0, 0.5)) + 10
    codes[:, 3] = z
    card = stress(table(codes, atoms, obs), "L0003", "label", positive="tumour", context="site", only=["context"])
    own = [roc_auc_score(y[obs["site"] == s], z[obs["site"] == s]) for s in "abcd"]
    every = [roc_auc_score(y, z), *own]
    row = card.table.set_index("check").loc["context"]
    assert row["score"] == pytest.approx((min(own) - 0.5) / (max(every) - 0.5), rel=1e-4)
    assert row["ci_low"] < row["score"] < row["ci_high"]
    detail = card.details["context:site"].set_index("stratum")["estimate"]
    np.testing.assert_allclose(detail[list("abcd")], own, rtol=1e-4)


def test_strata_with_one_class_are_listed_and_a_confounded_label_is_refused() -> None:
    codes, atoms, obs, y = planted()
    obs["site"] = np.where(y, "x", "y")
    row = stress(table(codes, atoms, obs), "L0000", "label", context="site", only=["context"]).table.iloc[0]
    assert row["verdict"] == "refused" and "cannot be told apart" in row["reason"] and "x, y" in row["reason"]
    obs["site"] = np.where(np.arange(len(y)) < 40, "lone", obs["patient"].str[-1].isin(list("01234")).astype(str))
    obs.loc[(obs["site"] == "lone") & ~y, "site"] = "True"
    row = stress(table(codes, atoms, obs), "L0000", "label", context="site", only=["context"]).table.iloc[0]
    assert "lone" in row["reading"] and row["verdict"] != "refused"


def test_contradiction_rate_counts_ties_and_both_ends_of_signed_codes() -> None:
    codes, atoms, obs, y = planted()
    codes[:, 4] = np.where(y, 1.0, -1.0)
    wrong = np.flatnonzero(y)[:20]
    codes[wrong, 4] = -1.0
    card = stress(table(codes, atoms, obs), "L0004", "label", positive="tumour", only=["contradiction"])
    tails = card.details["contradiction"].set_index("end")
    assert tails.loc["upper", "contradiction_rate"] == 0
    assert tails.loc["lower", "contradiction_rate"] == pytest.approx(20 / (20 + (~y).sum()))
    assert tails.loc["lower", "n_top"] == 20 + (~y).sum()  # all tie, so all count
    row = card.table.set_index("check").loc["contradiction"]
    assert row["score"] == pytest.approx(1 - 20 / len(y))


def test_few_firings_give_an_interval_only() -> None:
    codes, atoms, obs, y = planted()
    codes[:, 5] = 0
    codes[np.flatnonzero(y)[:100], 5] = np.linspace(1, 2, 100)
    card = stress(table(codes, atoms, obs), "L0005", "label", positive="tumour", only=["contradiction"])
    row = card.table.set_index("check").loc["contradiction"]
    assert row["n_samples"] == 10 and np.isnan(row["score"]) and "interval only" in row["reason"]


def test_look_alikes_at_95_percent_sensitivity_by_hand() -> None:
    codes, atoms, obs, y = planted()
    rng = np.random.default_rng(3)
    z = np.where(y, rng.normal(4, 1, len(y)), rng.normal(2, 1, len(y)))
    codes[:, 6] = z
    alike = obs["alike"].to_numpy(bool)
    card = stress(
        table(codes, atoms, obs),
        "L0006",
        "label",
        positive="tumour",
        look_alikes={"cell": alike | y},
        only=["look_alikes"],
    )
    z = codes[:, 6].astype(np.float32)
    threshold = np.sort(z[y])[::-1][int(np.ceil(0.95 * y.sum())) - 1]
    rate = (z[alike & ~y] >= threshold).mean()
    assert card.table.set_index("check").loc["look_alikes", "score"] == pytest.approx(1 - rate)
    assert card.details["look_alikes:cell"]["threshold"].item() == pytest.approx(threshold)


def test_masks_of_look_alikes_are_joined_by_id_and_hold_no_gaps(cohort) -> None:
    adata = cohort["adata"]
    alike = adata.obs["alike"].astype(bool)
    options = {"positive": "tumour", "only": ["look_alikes"]}
    said = [
        stress(adata, "L0001", "label", look_alikes={"x": mask}, **options).details["look_alikes:x"]
        for mask in (alike.to_numpy(), alike.sample(frac=1, random_state=0), alike.astype(int).to_numpy())
    ]
    pd.testing.assert_frame_equal(said[0], said[1])
    pd.testing.assert_frame_equal(said[0], said[2])
    gaps = alike.astype(float).to_numpy()
    gaps[3] = np.nan
    for bad in (gaps, alike.iloc[5:], alike.to_numpy()[:-1], np.arange(len(alike))):
        with pytest.raises(InputError, match="'x'"):
            stress(adata, "L0001", "label", look_alikes={"x": bad}, **options)


def test_a_table_without_atoms_is_a_refusal(cohort) -> None:
    adata, other = cohort["adata"].copy(), cohort["seeds"][0].copy()
    del other.varm["decoder"]
    row = card_of(cohort, "L0000", seeds=[other], only=["seeds"]).table.iloc[0]
    assert row["verdict"] == "refused" and "decoder" in row["reason"]
    del adata.varm["decoder"]
    rows = card_of(cohort, "L0000", adata=adata, only=["seeds", "dose", "neighbours"]).table
    assert (rows["verdict"] == "refused").all()


def test_a_dose_that_ruins_another_probe_closes_the_window() -> None:
    codes, atoms, obs, y = planted()
    obs["other"] = np.random.default_rng(0).integers(0, 2, len(y))
    codes[:, 2] = obs["other"] * 3.0
    atoms[2] = 0
    atoms[2, 2] = 1
    alone = stress(table(codes, atoms, obs), "L0000", "label", positive="tumour", off_targets="other", only=["dose"])
    assert alone.table.set_index("check").loc["dose", "score"] == 1
    atoms[0, 2] = 1.0  # adding the latent now reads as the other property too
    both = stress(table(codes, atoms, obs), "L0000", "label", positive="tumour", off_targets="other", only=["dose"])
    detail = both.details["dose"]
    assert both.table.set_index("check").loc["dose", "score"] < 0.6
    assert detail["loss:other"].iloc[-1] > 0.3 and detail["rise"].iloc[-1] > detail["rise"].iloc[1] > 0


def test_dose_is_refused_where_latents_do_not_add_up(cohort) -> None:
    adata = cohort["adata"].copy()
    adata.uns["biosae"]["additive"] = False
    row = stress(adata, "L0000", "label", positive="tumour", only=["dose"]).table.iloc[0]
    assert row["verdict"] == "refused" and "do not add" in row["reason"]
    del adata.obsm["embedding"]
    rows = stress(adata, "L0000", "label", positive="tumour", only=["dose", "neighbours"]).table.set_index("check")
    assert (rows.loc[["dose", "neighbours"], "verdict"] == "refused").all()
    assert "keep_embedding" in rows.loc["neighbours", "reason"]


def test_neighbours_that_share_their_examples_cannot_be_told_apart(cohort) -> None:
    adata = cohort["adata"].copy()
    codes, atoms = adata.X.toarray(), adata.varm["decoder"].copy()
    for j in range(7, 12):
        codes[:, j], atoms[j] = codes[:, 0], atoms[0]
    adata.X, adata.varm["decoder"] = sp.csr_matrix(codes), atoms
    card = stress(adata, "L0000", "label", positive="tumour", only=["neighbours"])
    row = card.table.set_index("check").loc["neighbours"]
    assert row["score"] == pytest.approx(0.5) and row["verdict"] == "failed"
    assert set(card.details["neighbours"]["latent"]) == {f"L{j:04d}" for j in range(7, 12)}


def test_seeds_find_the_same_atom_and_lose_one_that_is_gone(cohort) -> None:
    detail = card_of(cohort, "L0000", only=["seeds"]).details["seeds"]
    assert (detail["cosine"] > 0.95).all() and (detail["cosine"] > detail["cosine_null_q95"]).all()
    assert not detail["swapped"].any() and (detail["correlation"] > 0.999).all()
    gone = []
    for number, seed in enumerate(cohort["seeds"]):
        rng, other = np.random.default_rng(number), seed.copy()
        other.varm["decoder"] = rng.standard_normal(other.varm["decoder"].shape).astype(np.float32)
        other.X = sp.csr_matrix(sp.random(*other.shape, 0.2, random_state=number, dtype=np.float32))
        gone.append(other)
    assert verdicts(card_of(cohort, "L0000", seeds=gone, only=["seeds"]))["seeds"] == "failed"
    one = card_of(cohort, "L0000", seeds=cohort["seeds"][:1], only=["seeds"]).table.set_index("check").loc["seeds"]
    assert one["status"] == "few_seeds"


def test_layers_are_joined_by_id_and_chosen_in_other_patients(cohort) -> None:
    early = cohort["layers"]["early"]
    detail = card_of(cohort, "L0000", only=["layer"]).details["layer"]
    label = early.var_names[np.argmax(np.abs(early.varm["decoder"][:, 0]))]
    assert detail["latent"].unique().tolist() == [label] and len(detail) == 2
    np.testing.assert_allclose(detail["rho"], 1)
    assert detail["n_samples"].sum() == len(early)
    noise = early.copy()
    rng = np.random.default_rng(1)
    noise.X = sp.csr_matrix(rng.random(noise.shape).astype(np.float32))
    assert verdicts(card_of(cohort, "L0000", layers={"noise": noise}, only=["layer"]))["layer"] == "failed"
    renamed = early.copy()
    renamed.obs_names = [f"q{i}" for i in range(len(early))]
    with pytest.raises(InputError, match="none of these samples"):
        card_of(cohort, "L0000", layers={"early": renamed})


def test_two_patients_have_scores_and_no_interval() -> None:
    codes, atoms, obs, _ = planted(n_patients=2)
    obs["site"] = np.tile(list("ab"), len(obs) // 2)
    rows = stress(table(codes, atoms, obs), "L0000", "label", positive="tumour", context="site").table
    known = rows[rows["score"].notna()]
    assert {"association", "dose"} <= set(known["check"])
    assert (known["verdict"] == "no_interval").all() and known["reason"].str.contains("2 patients").all()
    assert rows.loc[rows["score"].isna(), "reason"].str.len().min() > 10


def test_numbers_need_a_cut_and_classes_a_name(cohort) -> None:
    adata = cohort["adata"]
    with pytest.raises(InputError, match="cut="):
        stress(adata, "L0000", "amount")
    card = stress(adata, "L0000", "amount", cut=0.9, only=["association"])
    assert card.claim == "high L0000 goes with amount > 0.9" and card.table["score"].iloc[0] == 1
    flag = adata.copy()
    flag.obs["flag"] = pd.array(flag.obs["label"] == "tumour", dtype="boolean")
    for positive, claim in ((None, "high L0000 goes with flag"), ("False", "low L0000 goes with not flag")):
        assert stress(flag, "L0000", "flag", positive=positive, only=["association"]).claim == claim
    with pytest.raises(InputError, match="4 classes"):
        stress(adata, "L0000", "site")
    with pytest.raises(InputError, match="did you mean 'tumour'"):
        stress(adata, "L0000", "label", positive="tumor")
    with pytest.raises(StatisticsError, match="groups="):
        stress(adata, "L0000", "label", groups="case")
    with pytest.raises(StatisticsError, match="nothing to tell apart"):
        stress(adata, "L0000", "amount", cut=9)


@given(st.integers(0, 10_000))
def test_weighted_numbers_are_those_of_repeated_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(6, 40))
    a, b = rng.integers(0, 6, n).astype(float), rng.integers(0, 6, n) + rng.integers(0, 2, n) * 0.5
    y = np.arange(n) % 2 == 0
    rows = rng.integers(0, n, n)
    weight = np.bincount(rows, minlength=n).astype(float)
    if len(set(y[rows])) == 2:
        assert resampled.Order(a).auroc(y, weight) == pytest.approx(roc_auc_score(y[rows], a[rows]))
    if np.ptp(a[rows]) and np.ptp(b[rows]):
        found = resampled.spearman(resampled.Order(a), resampled.Order(b), weight)
        assert found == pytest.approx(stats.spearmanr(a[rows], b[rows])[0])
        assert resampled.pearson(a, b, weight) == pytest.approx(np.corrcoef(a[rows], b[rows])[0, 1])
        assert resampled.pearson(a * 1e-8, b, weight) == pytest.approx(resampled.pearson(a, b, weight))
        u, v = a[rows], b[rows]
        lin = 2 * np.cov(u, v, bias=True)[0, 1] / (u.var() + v.var() + (u.mean() - v.mean()) ** 2)
        assert resampled.concordance(a, b, weight) == pytest.approx(lin)


def test_intervals_over_patients_cover_and_are_wider_than_over_samples() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 10)
    hits, widths = 0, []
    for _ in range(40):
        values = np.repeat(rng.random(30), 10)
        found = resampled.over_patients(lambda w, v=values: w @ v / w.sum(), groups)
        hits += found.low <= 0.5 <= found.high
        widths.append(found.high - found.low)
        assert (found.n_patients, found.n_samples, found.status) == (30, 300, "ok")
    assert hits >= 34 and np.mean(widths) > 2.5 * 2 * 1.96 * np.sqrt(1 / 12 / 300)
    sure = resampled.over_patients(lambda w: 1.0, groups)
    assert sure.low == pytest.approx(0.025 ** (1 / 30)) and sure.high == 1  # Clopper-Pearson of 30 of 30
