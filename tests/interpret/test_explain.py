"""Explanations: planted truth, worked numbers, disjoint patients, parsers, raters of known skill."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.stats import pearsonr
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from biosae.data.items import ReadError
from biosae.errors import InputError, StatisticsError
from biosae.interpret import explain as ex
from biosae.interpret.explain.maps import TokenMaps, coarse, displaced, highlight
from biosae.interpret.explain.questions import redacted
from biosae.interpret.explain.render import Marks, marked, sheet, to_rgb
from biosae.interpret.explain.score import auroc

N_PATIENTS, N_ITEMS, N_LATENTS, SIDE = 24, 20, 6, 4
ALL = tuple(ex.SCORERS)


class Tiles:
    """Grey tiles, a bright cell where latent 0 fires; one cannot be read."""

    item = "image"

    def __init__(self, cells: dict[str, np.ndarray], unreadable: tuple[str, ...] = ()) -> None:
        self.cells, self.unreadable, self.seen = cells, unreadable, []

    def __getitem__(self, name: str) -> np.ndarray:
        self.seen.append(name)
        if name in self.unreadable:
            raise ReadError("truncated", name)
        bright = np.kron(self.cells[name] > 0, np.ones((8, 8)))
        return np.repeat((100 + 120 * bright).astype(np.uint8)[..., None], 3, axis=2)


def study(*, signed: bool = False, random_state: int = 0) -> tuple[anndata.AnnData, anndata.AnnData, Tiles]:
    """Codes a sample (max of its tokens), codes a token, and tiles. L0 follows ``finding``; L5 hardly fires."""
    rng = np.random.default_rng(random_state)
    n = N_PATIENTS * N_ITEMS
    grids = rng.gamma(2, 1, (n, N_LATENTS, SIDE, SIDE)) * (rng.random((n, N_LATENTS, SIDE, SIDE)) < 0.15)
    grids *= (rng.random((n, N_LATENTS)) < 0.45)[..., None, None]
    grids[5:, 5] = 0
    if signed:
        grids[:, 1] *= rng.choice([-1, 1], n)[:, None, None]
    flat = grids.reshape(n, N_LATENTS, -1)
    codes = np.take_along_axis(flat, np.abs(flat).argmax(-1)[..., None], -1)[..., 0]
    ids = [f"P{i // N_ITEMS:02d}-tile{i:03d}" for i in range(n)]
    obs = pd.DataFrame(
        {
            "patient": [f"Doe-{i // N_ITEMS:02d}" for i in range(n)],
            "finding": np.where((codes[:, 0] > 0) ^ (rng.random(n) < 0.03), "present", "absent"),
            "size": rng.random(n),
        },
        index=pd.Index(ids, name="sample_id"),
    )
    var = pd.DataFrame(index=[f"L{j}" for j in range(N_LATENTS)])
    embedding = codes + 0.1 * rng.normal(size=codes.shape)
    adata = anndata.AnnData(csr_matrix(codes), obs=obs, var=var, obsm={"embedding": embedding})
    token = np.tile(np.arange(SIDE * SIDE), n)
    rows = pd.DataFrame(
        {"sample_id": np.repeat(ids, SIDE * SIDE), "token_row": token // SIDE, "token_col": token % SIDE},
        index=[str(i) for i in range(len(token))],
    )
    shuffle = rng.permutation(len(token))  # rows are joined by id, not by position
    X = flat.transpose(0, 2, 1).reshape(-1, N_LATENTS)
    tokens = anndata.AnnData(csr_matrix(X[shuffle]), obs=rows.iloc[shuffle], var=var)
    return adata, tokens, Tiles({name: grids[i, 0] for i, name in enumerate(ids)})


@pytest.fixture(scope="module")
def planted() -> tuple:
    adata, tokens, tiles = study()
    items = ex.choose(adata, n_write=20, n_score=40, min_active=100)
    texts = pd.DataFrame({"latent": adata.var_names, "tail": "+", "text": [f"feature {c}" for c in "abcdef"]})
    return adata, tokens, tiles, items, texts


# -- which items -------------------------------------------------------------------------------------------------------


def test_writing_and_scoring_share_no_patient(planted: tuple) -> None:
    adata, _, _, items, _ = planted
    by_part = items.table.groupby("part")["group"].agg(set)
    assert by_part["write"] and by_part["score"] and not by_part["write"] & by_part["score"]
    patient = adata.obs["patient"]
    assert set(patient[sorted(items.write_ids)]).isdisjoint(patient[sorted(items.score_ids)])
    assert (items.table["group"].to_numpy() == patient[items.table["sample_id"]].to_numpy()).all()


def test_quantiles_are_equal_and_silent_items_are_silent(planted: tuple) -> None:
    adata, _, _, items, _ = planted
    for latent, tail in items.scored:
        part = items.of(latent, tail, "score")
        assert not part["sample_id"].duplicated().any()
        codes = pd.Series(adata[:, latent].X.toarray().ravel(), adata.obs_names)
        assert np.allclose(codes[part["sample_id"]], part["activation"])
        assert ((part["activation"] > 0) == (part["kind"] == "active")).all()
        every = codes[sorted(items.score_ids)]
        every = every[every > 0].sort_values(ascending=False)
        tenth = pd.Series(
            np.concatenate([np.full(len(p), i) for i, p in enumerate(np.array_split(every, 10))]), every.index
        )
        active = part.loc[part["kind"] == "active", "sample_id"]
        assert (tenth[active].value_counts() == 4).all() and len(active) == 40
        assert (part["kind"] == "random").sum() == 40


def test_patients_take_turns() -> None:
    adata, *_ = study()
    items = ex.choose(adata, n_score=20, n_hard=0, min_active=100)
    for latent, tail in items.scored:
        silent = items.of(latent, tail, "score", "random")
        assert silent["group"].value_counts().max() == 2 and len(silent) == 20  # 12 patients, 20 items


def test_hard_negatives_are_the_nearest_silent_items(planted: tuple) -> None:
    adata, _, _, items, _ = planted
    unit = adata.obsm["embedding"][adata.obs_names.isin(items.score_ids)]
    unit = unit - unit.mean(0)
    rows = adata.obs_names[adata.obs_names.isin(items.score_ids)]
    unit = pd.DataFrame(unit / np.linalg.norm(unit, axis=1, keepdims=True), rows)
    part = items.of("L1", "+", "score")
    near = part.loc[part["kind"] == "near", "sample_id"]
    centre = unit.loc[part.loc[part["kind"] == "active", "sample_id"]].mean()
    codes = pd.Series(adata[:, "L1"].X.toarray().ravel(), adata.obs_names)[rows]
    free = rows[(codes == 0) & ~rows.isin(part.loc[part["kind"] == "random", "sample_id"])]
    assert set(near) == set((unit.loc[free] @ centre).nlargest(10).index)


def test_too_few_active_items_are_unscored_not_zero(planted: tuple) -> None:
    adata, _, tiles, items, texts = planted
    facts = items.latents.set_index("latent")
    assert facts.loc["L5", "status"] == "too_sparse" and (facts.drop("L5")["status"] == "ok").all()
    found = ex.trials(items, texts, samples=tiles)
    table = ex.score(found, ex.Oracle(found).ask([t.question for t in found]), items=items).set_index("latent")
    assert np.isnan(table.loc["L5", "estimate"]) and table.loc["L5", "status"] == "too_sparse"
    none = ex.choose(adata, min_active=10_000)
    empty = ex.score([], [], items=none, scorers=["detection"])
    assert len(empty) == N_LATENTS and set(empty["status"]) == {"too_sparse"} and empty["estimate"].isna().all()


def test_both_ends_of_signed_codes() -> None:
    adata, *_ = study(signed=True)
    items = ex.choose(adata, n_score=10, min_active=50)
    facts = items.latents.set_index(["latent", "tail"])
    assert facts.loc[("L1", "-"), "status"] == "ok" and facts.loc[("L0", "-"), "status"] == "dead"
    codes = pd.Series(adata[:, "L1"].X.toarray().ravel(), adata.obs_names)
    for tail, sign in (("+", 1), ("-", -1)):
        active = items.of("L1", tail, "score", "active")
        assert (sign * codes[active["sample_id"]] > 0).all()
        inside = codes[sorted(items.score_ids)]
        assert facts.loc[("L1", tail), "prevalence"] == pytest.approx((sign * inside > 0).mean())


def test_items_of_one_name_are_refused() -> None:
    adata, *_ = study()
    adata.obs_names = ["same" if i % 40 < 2 else name for i, name in enumerate(adata.obs_names)]
    with pytest.raises(InputError, match="'same' names 24 rows"):
        ex.choose(adata, min_active=100)


def test_near_duplicates_of_writing_items_do_not_score() -> None:
    """The same tile under two patients (a case that was scanned again) would be written from and scored on."""
    adata, *_ = study()
    assert ex.choose(adata, min_active=100).near_duplicates is None  # 6 numbers say too little
    adata.obsm["embedding"] = adata.obsm["embedding"] @ np.random.default_rng(0).normal(size=(N_LATENTS, 40))
    adata.obsm["embedding"] += 0.1 * np.random.default_rng(1).normal(size=(len(adata), 40))
    first = ex.choose(adata, min_active=100)
    assert first.near_duplicates == frozenset()
    write = [adata.obs_names.get_loc(name) for name in sorted(first.write_ids)[:30]]
    score = [adata.obs_names.get_loc(name) for name in sorted(first.score_ids)[:30]]
    X, embedding = adata.X.toarray(), adata.obsm["embedding"].copy()
    X[score], embedding[score] = X[write], embedding[write] * 1.0001
    again = adata.copy()
    again.X, again.obsm["embedding"] = csr_matrix(X), embedding
    found = ex.choose(again, min_active=100)
    names = set(adata.obs_names[score])
    assert found.near_duplicates == names and names <= found.score_ids
    assert set(found.table["sample_id"]).isdisjoint(names)
    inside = pd.Series(X[:, 0] > 0, adata.obs_names)[sorted(found.score_ids)]
    assert found.latents.set_index("latent").loc["L0", "prevalence"] == pytest.approx(inside.mean())


def test_cofiring_items_are_those_where_neighbours_are_active_above_the_floor() -> None:
    """Latents 1 to 3 are active where latent 0 is, and in some more items; all others are weakly on everywhere."""
    rng = np.random.default_rng(0)
    n, m = 480, 40
    own = np.arange(n) % 4 == 0
    shared = own | (np.arange(n) % 4 == 1)
    codes = rng.uniform(0.05, 0.2, (n, m))
    codes[:, 0] = np.where(own, rng.uniform(0.6, 1.0, n), 0.0)
    codes[shared, 1:4] = rng.uniform(0.8, 1.0, (shared.sum(), 3))
    codes[::20] = 1.0
    obs = pd.DataFrame({"patient": np.repeat(np.arange(24), 20)}, index=[f"s{i}" for i in range(n)])
    adata = anndata.AnnData(csr_matrix(codes), obs=obs, var=pd.DataFrame(index=[f"L{j}" for j in range(m)]))
    for sign in (1, -1):  # the other end of signed codes has neighbours too
        adata.X = csr_matrix(sign * codes + (sign < 0) * 2.0 * (np.arange(n) == 1)[:, None])
        items = ex.choose(adata, latents=["L0"], floor=0.3, min_active=50)
        found = items.of("L0", "+" if sign > 0 else "-", "score", "cofiring")
        where = [int(name[1:]) for name in found["sample_id"]]
        assert len(where) == 10 and all(i % 4 == 1 for i in where)
        assert found["group"].nunique() == 10  # items that are equally hard: patients take turns


def test_names_in_any_column_of_identifiers_are_known() -> None:
    adata, *_ = study()
    adata.obs["mrn"] = [f"MRN{i // N_ITEMS:04d}" for i in range(len(adata))]
    adata.obs["section_id"] = [f"BLK{i // N_ITEMS:02d}" for i in range(len(adata))]
    adata.obs["path"] = [f"scans/{p}/img{i:03d}.png" for i, p in enumerate(adata.obs["patient"])]
    items = ex.choose(adata, groups="mrn", min_active=100)
    text = "As in MRN0003, blk02 and img017.png or img017 of scans/doe-00/img017.png"
    assert redacted(text, items.identifiers) == "As in [removed], [removed] and [removed] or [removed] of [removed]"


def test_a_floor_makes_weak_items_silent() -> None:
    adata, *_ = study()
    items = ex.choose(adata, n_write=10, n_score=20, min_active=20, floor=0.4, latents=["L0"])
    codes = pd.Series(adata[:, "L0"].X.toarray().ravel(), adata.obs_names)
    line = 0.4 * codes[sorted(items.write_ids)].max()
    part = items.of("L0", "+", "score")
    assert ((part["activation"] > line) == (part["kind"] == "active")).all()
    assert (part.loc[part["kind"] == "random", "activation"] > 0).any()
    assert items.latents["prevalence"].iloc[0] == pytest.approx((codes[sorted(items.score_ids)] > line).mean())
    with pytest.raises(InputError, match="floor"):
        ex.choose(adata, floor=1.0)


def test_refusals() -> None:
    adata, tokens, *_ = study()
    del adata.obs["patient"]
    with pytest.raises(StatisticsError, match="assume_independent"):
        ex.choose(adata)
    assert ex.choose(adata, assume_independent=True, min_active=100).scored
    with pytest.raises(InputError, match="tokens"):
        ex.choose(tokens, groups="sample_id")
    with pytest.raises(InputError, match="did you mean 'L1'"):
        ex.choose(adata, latents=["L11"], assume_independent=True)
    adata.obs["patient"] = np.where(np.arange(len(adata)) % 2, "a", "b")
    with pytest.raises(StatisticsError, match="2 values of 'patient' leave 1 for writing"):
        ex.choose(adata)


# -- raters of known skill ---------------------------------------------------------------------------------------------


def rated(planted: tuple, backend: object, scorers: tuple[str, ...] = ALL) -> pd.DataFrame:
    _, tokens, tiles, items, texts = planted
    found = ex.trials(items, texts, samples=tiles, scorers=scorers, tokens=tokens)
    backend = ex.Oracle(found) if backend == "oracle" else backend
    return ex.score(found, backend.ask([t.question for t in found]), items=items)


def test_oracle_scores_one(planted: tuple) -> None:
    table = rated(planted, "oracle")
    done = table[table["latent"] != "L5"]
    assert len(done) == 5 * len(ALL)
    assert done["estimate"].to_numpy() == pytest.approx(1.0)
    shares = done[done["scorer"] != "simulation"]  # no interval without width: the binomial one of so many patients
    assert shares["ci_low"].to_numpy() == pytest.approx(0.025 ** (1 / shares["n_groups"].to_numpy(float)))
    assert (done["n_unparsed"] == 0).all()
    detection = done[done["scorer"] == "detection"]
    assert (detection["ppv"] == 1).all() and (detection["ppv_low"] < 1).all()


def test_coin_scores_chance(planted: tuple) -> None:
    table = pd.concat([rated(planted, ex.Coin(random_state=r)) for r in range(2)])
    for scorer, part in table[table["latent"] != "L5"].groupby("scorer"):
        error = 4 * part["estimate"].std() / np.sqrt(len(part)) + 0.01
        assert part["estimate"].mean() == pytest.approx(ex.MEASURES[scorer][1], abs=error), scorer
        assert part["estimate"].std() > 0


def test_shuffled_explanations_score_chance(planted: tuple) -> None:
    """A rater that reads the right feature off the explanation: right for its own, chance for another's."""
    adata, _, tiles, items, texts = planted
    codes = pd.DataFrame(adata.X.toarray() > 0, adata.obs_names, adata.var_names)
    latent = dict(zip(texts["text"], texts["latent"]))

    class Reader:
        name = "reader"

        def ask(self, questions: list) -> list:
            said = []
            for q in questions:
                name = next(latent[text] for text in latent if text in q.text)
                said.append(ex.Answer("yes" if codes.loc[q.pictures[0].sample_id, name] else "no"))
            return said

    found = ex.evaluate(items, texts, backend=Reader(), samples=tiles)
    mean = found.scores.groupby("explanations")["estimate"].mean()
    assert mean["own"] == 1.0
    assert mean["shuffled"] == pytest.approx(0.5, abs=0.08)
    assert set(found.summary["explanations"]) == {"own", "shuffled"}


def test_shuffled_leaves_no_explanation_in_place() -> None:
    table = pd.DataFrame({"latent": list("abcde"), "text": list("vwxyz")})
    for r in range(20):
        other = ex.shuffled(table, random_state=r)
        assert (other["text"] != table["text"]).all() and set(other["text"]) == set(table["text"])
    with pytest.raises(InputError, match="at least two"):
        ex.shuffled(table.iloc[:1])


def test_a_mapping_of_texts_and_texts_of_other_latents(planted: tuple) -> None:
    _, _, tiles, items, _ = planted
    found = ex.evaluate(items, {"L0": "bright", "L1": "dark"}, backend=ex.Coin(), samples=tiles)
    own = found.scores[found.scores["explanations"] == "own"].set_index("latent")
    assert own["estimate"].notna().sum() == 2 and own.loc["L2", "status"] == "not_asked"
    with pytest.raises(InputError, match=r"none of the 1 explanations.*did you mean 'L0'"):
        ex.trials(items, {"L00": "bright"}, samples=tiles)
    with pytest.raises(InputError, match="control=False"):
        ex.evaluate(items, {"L0": "bright"}, backend=ex.Coin(), samples=tiles)


def test_usage_is_of_this_evaluation(planted: tuple) -> None:
    _, _, tiles, items, texts = planted
    coin = ex.Coin()
    coin.usage = {"requests": 1}
    found = ex.evaluate(items, texts, backend=coin, samples=tiles)
    coin.usage["requests"] = 99
    assert found.usage == {"requests": 1}


def test_unparsed_answers_are_missing_and_counted(planted: tuple) -> None:
    _, _, tiles, items, texts = planted
    found = ex.trials(items, texts, samples=tiles)
    answers = ex.Oracle(found).ask([t.question for t in found])
    lost = [i for i, t in enumerate(found) if t.latent == "L0"][::3]
    for i in lost:
        answers[i] = ex.Answer("I cannot tell, yes or no")
    table = ex.score(found, answers, items=items).set_index("latent")
    assert table.loc["L0", "n_unparsed"] == len(lost) and table.loc["L0", "estimate"] == 1.0
    assert table.loc["L0", "n"] + len(lost) == table.loc["L1", "n"]
    silent = ex.score(found, [ex.Answer(None)] * len(found), items=items).set_index("latent")
    assert silent.loc["L0", "status"] == "no_answers" and np.isnan(silent.loc["L0", "estimate"])


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_worked_numbers() -> None:
    assert ex.ppv(0.9, 0.9, 0.01) == pytest.approx(0.08333333)
    assert round(float(ex.ppv(0.9, 0.9, 0.001)), 4) == 0.0089
    found = ex.confusion(40, 10, 10, 40)
    assert found["f1"] == pytest.approx(0.8) and found["balanced_accuracy"] == pytest.approx(0.8)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=4, max_size=60))
def test_confusion_against_scikit_learn(pairs: list[tuple[bool, bool]]) -> None:
    truth, said = (np.array(x) for x in zip(*pairs))
    if truth.all() or not truth.any():
        return
    found = ex.confusion(
        int((truth & said).sum()), int((~truth & said).sum()), int((truth & ~said).sum()), int((~truth & ~said).sum())
    )
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, said))
    assert found["f1"] == pytest.approx(f1_score(truth, said))


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=40))
def test_auroc_against_scikit_learn(pairs: list[tuple[int, bool]]) -> None:
    values, truth = (np.array(x) for x in zip(*pairs))
    if truth.all() or not truth.any():
        assert np.isnan(auroc(values, truth))
    else:
        assert auroc(values, truth) == pytest.approx(roc_auc_score(truth, values))


def test_simulation_is_the_correlation_of_the_concatenation(planted: tuple) -> None:
    _, tokens, tiles, items, texts = planted
    found = ex.trials(items, texts, samples=tiles, scorers=["simulation"], tokens=tokens)
    answers = ex.Coin(random_state=3).ask([t.question for t in found])
    table = ex.score(found, answers, items=items).set_index("latent")
    mine = [(t, ex.parse(a.text, "grid", t.question.size)) for t, a in zip(found, answers) if t.latent == "L2"]
    x, y = np.concatenate([a.ravel() for _, a in mine]), np.concatenate([t.truth.ravel() for t, _ in mine])
    assert table.loc["L2", "estimate"] == pytest.approx(pearsonr(x, y)[0])


def test_ppv_is_that_of_all_items_of_the_scoring_patients(planted: tuple) -> None:
    """A rater with noise: PPV from the balanced sample agrees with PPV counted on every scoring item."""
    adata, _, tiles, items, texts = planted
    rng = np.random.default_rng(0)
    codes = pd.Series(adata[:, "L0"].X.toarray().ravel() > 0, adata.obs_names)[sorted(items.score_ids)]
    said = codes.where(rng.random(len(codes)) < 0.8, ~codes)
    true = codes[said].mean()
    values = []
    for r in range(8):
        again = ex.choose(adata, n_score=60, random_state=0, latents=["L0"], n_hard=0, min_active=100)
        found = ex.trials(again, texts, samples=tiles, random_state=r)
        answers = [ex.Answer("yes" if said[t.question.pictures[0].sample_id] else "no") for t in found]
        values.append(ex.score(found, answers, items=again)["ppv"].iloc[0])
    assert np.mean(values) == pytest.approx(true, abs=0.08)


def test_frequency_weighted_f1() -> None:
    table = pd.DataFrame({
        "scorer": "detection", "measure": "balanced_accuracy", "chance": 0.5, "estimate": [0.9, 0.6, np.nan],
        "ci_low": [0.8, 0.4, np.nan], "f1": [0.9, 0.5, np.nan], "prevalence": [0.1, 0.3, 0.2], "n_unparsed": [1, 0, 0],
        "status": ["ok", "ok", "dead"],
    })  # fmt: skip
    row = ex.summary(table).iloc[0]
    assert row["f1_weighted"] == pytest.approx((0.1 * 0.9 + 0.3 * 0.5) / 0.4)
    assert (row["n_scored"], row["n_above"], row["unscored"]) == (2, 1, "dead 1")


def test_embedding_scorer(planted: tuple) -> None:
    adata, _, _, items, texts = planted
    images = pd.DataFrame((adata.X.toarray() > 0).astype(float) + 1e-3, adata.obs_names)
    axes = np.eye(N_LATENTS)
    right = ex.score_embedding(
        items, texts, embed_text=lambda t: axes[["abcdef".index(x[-1]) for x in t]], images=images
    )
    right = right.set_index("latent")
    assert (right["estimate"].drop("L5") > 0.9).all() and right.loc["L5", "status"] == "too_sparse"
    rng = np.random.default_rng(0)
    noise = pd.DataFrame(rng.normal(size=(len(adata), 8)), adata.obs_names)
    chance = ex.score_embedding(items, texts, embed_text=lambda t: rng.normal(size=(len(t), 8)), images=noise)
    assert chance["estimate"].mean() == pytest.approx(0.5, abs=0.1)
    with pytest.raises(InputError, match="repeat"):
        ex.score_embedding(items, texts, embed_text=lambda t: np.ones((len(t), 6)), images=pd.concat([images, images]))
    with pytest.raises(InputError, match="one image-text encoder"):
        ex.score_embedding(items, texts, embed_text=lambda t: np.ones((len(t), 3)), images=images)


# -- maps --------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.floats(0.02, 0.9))
def test_displaced_regions_lie_where_the_latent_is_silent(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    grid = rng.gamma(2, 1, (6, 7)) * (rng.random((6, 7)) < density)
    if not grid.any():
        return
    moved = displaced(grid, rng=rng)
    region = highlight(grid)
    assert region[grid == grid.max()].all() and (grid[region] >= 0.3 * grid.max()).all()
    turned = [region[::a, ::b] for a in (1, -1) for b in (1, -1)]
    every = [np.roll(one, (i, j), (0, 1)) for one in turned for i in range(6) for j in range(7)]
    if moved is None:
        assert all((one & (grid > 0)).any() for one in every)
    else:
        assert any((one == moved).all() for one in every) and not (moved & (grid > 0)).any()


def test_displaced_keeps_the_shape_where_there_is_room() -> None:
    grid = np.zeros((8, 8))
    grid[1, 1:4] = grid[2, 2] = 1.0
    moved = displaced(grid, rng=np.random.default_rng(0))
    r, c = np.nonzero(moved)
    assert set(zip(r - r.min(), c - c.min())) == {(0, 0), (0, 1), (0, 2), (1, 1)}


def test_blocks_cover_every_cell_once() -> None:
    tokens = study()[1]
    maps = TokenMaps(tokens)
    maps.shape = (14, 9)
    blocks = maps.blocks(7)
    assert blocks.rows == (0, 2, 4, 6, 8, 10, 12, 14) and blocks.columns[-1] == 9
    for i in range(14 * 9):
        one = np.zeros(14 * 9)
        one[i] = 2.0
        found = coarse(one.reshape(14, 9), (blocks.rows, blocks.columns))
        assert found.shape == (7, 7) and found.sum() == 2.0


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_nothing_of_the_patient_is_in_a_question(planted: tuple) -> None:
    adata, tokens, tiles, items, texts = planted
    leaky = texts.assign(text="seen in Doe-03 and p04-TILE081, not in others")
    found = ex.trials(items, leaky, samples=tiles, scorers=ALL, tokens=tokens)
    words = [*adata.obs_names, *adata.obs["patient"].unique(), *adata.var_names]
    for t in found:
        text = t.question.prompt + "".join(p.caption for p in t.question.pictures) + t.question.id
        assert not any(word.lower() in text.lower() for word in words)
    assert (
        "seen in [removed] and [removed], not in others"
        in next(t for t in found if t.scorer == "detection").question.text
    )


def test_redaction_takes_whole_words_and_is_no_pattern() -> None:
    assert redacted("P-1 and P-17 (a.c)", frozenset({"p-17", "a.c"})) == "P-1 and [removed] ([removed])"
    assert redacted("abc", frozenset({"a.c"})) == "abc"
    assert (
        redacted("Jo Doe, JO DOE-2 and jo doe", frozenset({"jo", "jo doe"}))
        == "[removed], [removed] DOE-2 and [removed]"
    )
    assert redacted("", frozenset({"abc"})) == "" and redacted("abc", frozenset()) == "abc"


@given(st.lists(st.sampled_from(["p-17", "slide 3", "x.9", "cell", "bright", "("]), max_size=12))
def test_redaction_leaves_no_identifier(words: list[str]) -> None:
    found = redacted(" ".join(words), frozenset({"p-17", "slide 3", "x.9"}))
    assert found == " ".join("[removed]" if w in ("p-17", "slide 3", "x.9") else w for w in words)


def test_questions_read_items_only_when_shown(planted: tuple) -> None:
    _, tokens, tiles, items, texts = planted
    tiles.seen.clear()
    found = ex.trials(items, texts, samples=tiles, scorers=ALL, tokens=tokens)
    assert not tiles.seen
    image = next(t for t in found if t.scorer == "intruder").question.image()
    assert len(tiles.seen) == 5 and image.dtype == np.uint8 and image.shape[1] == 5 * 228 - 4


def cell_marks(region: np.ndarray | None, shape: tuple[int, int], identity: dict | None = None) -> Marks:
    cells = None if region is None else tuple(map(tuple, region.tolist()))
    return Marks(shape, tuple(range(shape[0] + 1)), tuple(range(shape[1] + 1)), cells, identity)


def test_region_is_outlined_and_not_covered() -> None:
    rgb = np.full((256, 256, 3), 90, np.uint8)
    region = np.zeros((4, 4), bool)
    region[1:3, 1] = True
    changed = (marked(rgb, cell_marks(region, (4, 4)), None) != 90).any(axis=2)
    assert changed[60:68, 64:128].any() and changed[188:196, 64:128].any()
    assert not changed[80:180, 80:112].any() and not changed[:, 140:].any()


def test_marks_lie_where_the_encoder_looked() -> None:
    """An encoder that crops the central square sees columns 64 to 192 of an image of 256 x 128."""
    rgb = np.full((128, 256, 3), 90, np.uint8)
    identity = {"preprocess": {"size": 224, "resize": "crop"}}
    region = np.ones((2, 2), bool)
    changed = (marked(rgb, cell_marks(region, (2, 2), identity), None) != 90).any(axis=2)[:, ::2]  # enlarged by 2
    assert np.flatnonzero(changed.any(axis=0)).min() == pytest.approx(64, abs=2)
    assert np.flatnonzero(changed.any(axis=0)).max() == pytest.approx(192, abs=2)


def test_marks_on_signals_lie_in_time_and_on_the_channels_of_the_rows() -> None:
    class Recording:
        rate, channels = 100.0, ("a", "b", "c")

    item = np.zeros((3, 1000), np.float32)
    item[1] = np.sin(np.arange(1000) / 3)
    identity = {"preprocess": {"rate": 100.0, "length": 500, "channels": ["c", "b"]}}
    region = np.zeros((2, 5), bool)
    region[1, 4] = True  # channel b, 4 to 5 s of 10
    out = marked(item, cell_marks(region, (2, 5), identity), Recording())
    height, width = out.shape[:2]
    yellow = (out == (255, 236, 140)).all(axis=2)
    r, c = np.nonzero(yellow)
    assert r.min() >= height // 2 - 2 and c.min() == pytest.approx(0.4 * width, abs=3)
    assert c.max() == pytest.approx(0.5 * width, abs=3)
    dark = (out == 30).all(axis=2)
    assert dark[height // 2 :, : int(0.3 * width)].sum() > 5 * dark[: height // 2, : int(0.3 * width)].sum()


def test_signals_and_vectors_are_drawn() -> None:
    t = np.linspace(0, 1, 1000, dtype=np.float32)
    signal = np.stack([np.sin(20 * t), np.full_like(t, np.nan), np.where(t < 0.5, np.nan, 1)]).astype(np.float32)
    drawn = to_rgb(signal)
    dark = (drawn < 128).all(axis=2)
    height, width = dark.shape
    assert dark[: height // 3].any(axis=0).mean() > 0.95  # no gap in the trace
    assert not dark[height // 3 : 2 * height // 3].any()
    assert not dark[2 * height // 3 :, : width // 2 - 1].any() and dark[2 * height // 3 :, width // 2 + 1 :].any()
    assert to_rgb(np.arange(5, dtype=np.float32)).shape == drawn.shape
    many = to_rgb(np.where(np.arange(19)[:, None] == 18, np.sin(9 * t), 0).astype(np.float32))
    assert np.ptp(np.flatnonzero((many[-60:] < 128).all(axis=2).any(axis=1))) > 15  # the last of 19 channels is drawn
    assert sheet([drawn, drawn[:, :50]], ["1", "2"]).shape[2] == 3


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "form", "size", "answer"),
    [
        ("Yes.", "yes_no", (), True),
        ("**No**", "yes_no", (), False),
        ("The nuclei are dense.\nyes", "yes_no", (), True),
        ("No nuclei here, so the answer is\nno", "yes_no", (), False),
        ("<think>no, no, no</think>yes", "yes_no", (), True),
        ("<think>yes it is", "yes_no", (), None),
        ("yes and no", "yes_no", (), None),
        ("I am not sure", "yes_no", (), None),
        ("notable nuclei", "yes_no", (), None),
        ("", "yes_no", (), None),
        (None, "yes_no", (), None),
        ("I'm sorry, but I have no ability to view images.", "yes_no", (), None),
        ("There is no doubt that it fits.", "yes_no", (), None),
        ("Yes, dense nuclei.", "yes_no", (), True),
        ("No. There are none.\nThe tile is glass.", "yes_no", (), False),
        ("Yes.\nFinal answer: no", "yes_no", (), None),
        ("The tile is glass, so the answer is **no**.", "yes_no", (), False),
        ('{"answer": "yes"}', "yes_no", (), True),
        ("I cannot look at the 5 images", "choice", (5,), None),
        ("I am sorry, I was sent 1 picture.", "choice", (5,), None),
        ('{"answer": 4}', "choice", (5,), 4),
        ("(2)", "choice", (5,), 2),
        ("1. round cells\n2. round cells\n3. glass", "choice", (5,), None),
        ("I cannot view image 5", "choice", (5,), None),
        ("The odd one out is picture 4.", "choice", (5,), 4),
        ("Image #2 is different.", "choice", (5,), 2),
        ("Picture 3", "choice", (5,), 3),
        ("1, 2 and 4 are alike.\nThe odd one is 5.", "choice", (5,), 5),
        ("6", "choice", (5,), None),
        ("-3", "choice", (5,), None),
        ("3.5", "choice", (5,), None),
        ("2 or 3", "choice", (5,), None),
        ("Round\n**nuclei**", "text", (), "nuclei"),
    ],
)
def test_parse(text: str | None, form: str, size: tuple[int, ...], answer: object) -> None:
    assert ex.parse(text, form, size) == answer


def test_parse_grid() -> None:
    assert ex.parse("So:\n```json\n[ [0, 1],\n [10, 3] ]\n```", "grid", (2, 2)).tolist() == [[0, 1], [10, 3]]
    for bad in ("[[0, 1]]", "[[0, 1], [11, 3]]", "[[0, 1], [null, 3]]", "[[0, 1], [3]]", "none", "[[0,1],[2,NaN]]"):
        assert ex.parse(bad, "grid", (2, 2)) is None


@given(st.text(max_size=200), st.sampled_from(["yes_no", "choice", "grid", "text"]))
def test_parse_survives_anything(text: str, form: str) -> None:
    found = ex.parse(text, form, (2, 2) if form == "grid" else (5,))
    if form == "yes_no":
        assert found in (True, False, None)
    elif form == "choice":
        assert found is None or 1 <= found <= 5


# -- without a model ---------------------------------------------------------------------------------------------------


def test_template_finds_the_planted_term_and_look(planted: tuple) -> None:
    adata, tokens, tiles, items, _ = planted
    found = ex.template(adata, items, samples=tiles, terms=["finding", "size"], tokens=tokens).set_index("latent")
    assert found.loc["L0", "terms"] == "finding present"
    assert "is brighter" in found.loc["L0", "text"] or "has more contrast" in found.loc["L0", "text"]
    assert found.loc["L0", "text"].startswith("Goes with finding present")
    assert (found["terms"].drop("L0") == "").all()
    read = set(tiles.seen)
    tiles.seen.clear()
    ex.template(adata, items, samples=tiles)
    assert set(tiles.seen) <= items.write_ids and read


def test_appearance_rater_knows_what_is_bright(planted: tuple) -> None:
    adata, _, tiles, items, _ = planted
    found = ex.template(adata, items, samples=tiles, concepts={"L1": "stroma"})
    assert found.set_index("latent").loc["L1", "text"] == "Resembles stroma"
    result = ex.evaluate(items, found, backend=ex.AppearanceRater(found), samples=tiles, control=False)
    table = result.scores.set_index("latent")
    assert table.loc["L0", "estimate"] > 0.95
    assert table.loc["L1", "status"] == "no_answers" and table.loc["L2", "status"] == "not_asked"


def test_template_refuses_identifiers(planted: tuple) -> None:
    adata, _, _, items, _ = planted
    with pytest.raises(InputError, match="identifiers"):
        ex.template(adata, items, terms=["patient"])
    other = adata.copy()
    other.obs["case"] = other.obs["patient"]
    with pytest.raises(InputError, match="identifiers"):
        ex.template(other, items, terms=["case"])
    other.obs["patient"] = 100 + pd.factorize(other.obs["patient"])[0]
    other.obs["rate"] = 100 + np.arange(len(other)) % 50  # numbers that patients have too
    numbered = ex.choose(other, min_active=100, latents=["L0"])
    assert len(ex.template(other, numbered, terms=["rate"])) == 1


def test_writer_sees_writing_items_alone(planted: tuple) -> None:
    _, tokens, tiles, items, _ = planted
    tiles.seen.clear()
    prompts = []

    def model(image: np.ndarray, prompt: str) -> str:
        prompts.append(prompt)
        return "Thinking.\nBright cells as in Doe-01"

    found = ex.write(items, backend=ex.Ask(model, name="m"), samples=tiles, tokens=tokens, context="tiles of Doe-02")
    assert set(tiles.seen) <= items.write_ids and len(prompts) == len(items.scored) == len(found)
    assert set(found["text"]) == {"Bright cells as in [removed]"} and set(found["source"]) == {"m"}
    assert "Doe" not in "".join(prompts)


def test_an_item_that_cannot_be_read_is_a_missing_answer(planted: tuple) -> None:
    _, _, tiles, items, texts = planted
    broken = Tiles(tiles.cells, unreadable=tuple(tiles.cells))
    found = ex.trials(items, texts, samples=broken)
    answers = ex.Ask(lambda image, prompt: "yes", name="y").ask([t.question for t in found])
    assert {a.problem for a in answers} == {"unreadable item: truncated"}
