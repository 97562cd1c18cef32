"""The SAE estimator: planted truth, contracts, files, refusals."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from biosae.errors import BiosaeError, FormatError, IdentityError, InputError, NotFittedError
from biosae.sae import SAE
from biosae.sae.rows import Held, Rows

ARCHITECTURES = ("relu", "topk", "batchtopk", "matryoshka", "jumprelu")
SMALL = {"n_latents": 48, "k": 4, "n_steps": 80, "learning_rate": 5e-3, "random_state": 0, "device": "cpu"}


def planted(n=1500, d=24, m=32, k=3, *, offset=0.0, scale=1.0, seed=0):
    """Rows made of k unit atoms each with positive strengths, the atoms, and the strengths."""
    rng = np.random.default_rng(seed)
    atoms = rng.normal(size=(m, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    z = np.zeros((n, m))
    for row in z:
        row[rng.choice(m, k, replace=False)] = rng.uniform(0.5, 1.5, k)
    return (scale * (z @ atoms) + offset).astype(np.float32), atoms, z


X, ATOMS, STRENGTHS = planted(offset=3.0)


class Stored:
    """The parts of an embeddings store that the estimator uses."""

    def __init__(self, array, *, obs=None, identity=None, tokens=1):
        self.data, self.obs, self.identity, self.tokens_per_sample = array, obs, identity, tokens
        self.shape = array.shape
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.reads = 0

    def blocks(self, rows=65536):
        for start in range(0, len(self.data), rows):
            yield start, self.data[start : start + rows].astype(np.float32)

    def __getitem__(self, index):
        self.reads += 1
        return self.data[index].astype(np.float32)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def fitted(request):
    return SAE(request.param, l1=0.02, **SMALL).fit(X)


def digest(sae):
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in sae._model.state_dict().values())).hexdigest()


# ------------------------------------------------------------------------------------------------ truth


@pytest.mark.parametrize(("architecture", "l1"), [("topk", 0.0), ("batchtopk", 0.0), ("relu", 0.1)])
def test_recovers_a_planted_dictionary(architecture, l1):
    rows, atoms, _ = planted(n=4000, offset=5.0)
    settings = {
        "n_latents": 64,
        "k": 3,
        "l1": l1,
        "learning_rate": 5e-3,
        "n_steps": 500,
        "random_state": 1,
        "device": "cpu",
    }
    sae = SAE(architecture, **settings).fit(rows)
    best = (atoms @ sae.decoder_.T).max(1).mean()
    start = SAE(architecture, **settings | {"n_steps": 1, "decoder_init": "random"}).fit(rows)
    assert best > 0.9 > (atoms @ start.decoder_.T).max(1).mean() + 0.2
    assert sae.metrics_["fvu"] < 0.25 and sae.history_[-1]["loss"] < sae.history_[0]["loss"] / 2
    np.testing.assert_allclose(np.linalg.norm(sae.decoder_, axis=1), 1, atol=1e-5)


def test_codes_are_in_the_units_of_the_embedding():
    rows, atoms, z = planted(n=4000, scale=40.0)
    sae = SAE(n_latents=64, k=3, learning_rate=5e-3, n_steps=800, random_state=1, device="cpu").fit(rows)
    found = sae.transform(rows).toarray()
    cosine = atoms @ sae.decoder_.T
    atom, latent = np.unravel_index(cosine.argmax(), cosine.shape)
    on = (z[:, atom] > 0) & (found[:, latent] > 0)
    assert on.sum() > 50
    assert np.median(found[on, latent] / (40 * z[on, atom])) == pytest.approx(1, abs=0.25)


def test_metrics_recompute_from_the_codes(fitted):
    codes = fitted.transform(X)
    again = fitted.evaluate(X)
    assert again["l0"] == pytest.approx(codes.nnz / len(X))
    assert again["dead_share"] == pytest.approx((codes.getnnz(0) == 0).mean())
    x_hat = fitted.inverse_transform(codes).astype(float)
    direct = ((X - x_hat) ** 2).sum() / ((X - X.mean(0, dtype=float)) ** 2).sum()
    assert again["fvu"] == pytest.approx(direct, rel=1e-4)
    assert fitted.score(X) == -again["fvu"]
    parts = fitted.metrics_
    pooled = (parts["n_rows"] * parts["l0"] + parts["n_rows_val"] * parts["l0_val"]) / len(X)
    assert pooled == pytest.approx(again["l0"])
    assert parts["n_rows_val"] == 150 and parts["fvu_val"] > 0
    assert fitted.density_.shape == (48,) and fitted.density_.max() <= 1


def test_sparsity_of_each_rule():
    sae = SAE("topk", **SMALL).fit(X)
    assert sae.transform(X).getnnz(1).max() <= 4
    sae = SAE("batchtopk", **SMALL).fit(X)
    assert sae.metrics_["l0"] == pytest.approx(4, abs=0.01)
    assert sae.transform(X).getnnz(1).max() > 4
    strong, weak = (SAE("relu", l1=l1, **SMALL).fit(X).metrics_["l0"] for l1 in (1.0, 0.01))
    assert strong < weak


def test_decoding_agrees_with_the_torch_model(fitted):
    z = fitted.transform(X[:50])
    with torch.no_grad():
        _, codes, x_hat = fitted._model(torch.from_numpy(X[:50]))
    np.testing.assert_allclose(z.toarray(), codes.numpy(), atol=1e-5)
    for form in (z, z.tocsc(), z.toarray()):
        np.testing.assert_allclose(fitted.inverse_transform(form), x_hat.numpy(), atol=1e-5)


# ------------------------------------------------------------------------------------------------ properties


@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, len(X) - 1), min_size=1, max_size=300))
def test_code_of_a_row_does_not_depend_on_other_rows(fitted, rows):
    together = fitted.transform(X)[rows]
    apart = fitted.transform(X[rows])
    np.testing.assert_array_equal(together.indices, apart.indices)
    np.testing.assert_array_equal(together.indptr, apart.indptr)
    np.testing.assert_allclose(together.data, apart.data, rtol=1e-6)


def test_codes_form_a_clean_csr_matrix(fitted):
    z = fitted.transform(X)
    assert isinstance(z, scipy.sparse.csr_matrix) and z.dtype == np.float32 and z.shape == (len(X), 48)
    assert z.has_sorted_indices and (z.data > 0).all() and z.has_canonical_format


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scaling_and_shifting_the_data_scales_the_codes(architecture):
    base = X - X.mean(0)
    settings = SMALL | {"n_steps": 20}
    one = SAE(architecture, **settings).fit(base)
    two = SAE(architecture, **settings).fit(base * 8)
    np.testing.assert_allclose(two.transform(base * 8).toarray(), 8 * one.transform(base).toarray(), atol=2e-3)
    moved = SAE(architecture, **settings).fit(base + 4)
    np.testing.assert_allclose(moved.decoder_, one.decoder_, atol=2e-3)
    np.testing.assert_allclose(moved.bias_, one.bias_ + 4, atol=2e-3)


def test_same_seed_gives_the_same_bits_and_leaves_global_state_alone():
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    runs = [SAE(**SMALL | {"n_steps": 25, "random_state": seed}).fit(X) for seed in (7, 7, 8)]
    assert digest(runs[0]) == digest(runs[1]) != digest(runs[2])
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    free = SAE(**SMALL | {"n_steps": 25, "random_state": None}).fit(X)
    again = SAE(**SMALL | {"n_steps": 25, "random_state": free.random_state_}).fit(X)
    assert digest(free) == digest(again)


# ------------------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.astype(np.float64),
        lambda x: pd.DataFrame(x),
        torch.from_numpy,
        lambda x: torch.from_numpy(x).requires_grad_(),
        Stored,
        lambda x: x.tolist(),
    ],
    ids=["float64", "frame", "tensor", "grad", "stored", "list"],
)
def test_every_kind_of_table_gives_the_same_model(convert):
    settings = SMALL | {"n_steps": 5}
    expected = SAE(**settings).fit(X)
    found = SAE(**settings).fit(convert(X))
    assert digest(found) == digest(expected)
    np.testing.assert_array_equal(found.transform(convert(X)).toarray(), expected.transform(X).toarray())


def test_half_precision_tables():
    half = X.astype(np.float16)
    expected = SAE(**SMALL | {"n_steps": 5}).fit(half.astype(np.float32))
    assert digest(SAE(**SMALL | {"n_steps": 5}).fit(half)) == digest(expected)
    assert digest(SAE(**SMALL | {"n_steps": 5}).fit(torch.from_numpy(half))) == digest(expected)
    assert SAE(**SMALL | {"n_steps": 5}).fit(torch.from_numpy(X).bfloat16()).n_features_in_ == 24


def test_reading_from_a_store_equals_reading_from_memory(monkeypatch):
    """A table too large for memory is shuffled in another order (see Stream), whatever it is read from."""
    from biosae.sae import stream

    settings = SMALL | {"n_steps": 150}
    in_memory = SAE("batchtopk", **settings).fit(X)
    assert digest(SAE("batchtopk", **settings).fit(Stored(X))) == digest(in_memory)
    monkeypatch.setattr(stream, "IN_MEMORY", 0)
    stored = Stored(X)
    streamed = SAE("batchtopk", **settings).fit(stored)
    assert digest(streamed) == digest(SAE("batchtopk", **settings).fit(X)) != digest(in_memory)
    assert stored.reads > 12
    np.testing.assert_array_equal(streamed.normaliser_.mean, in_memory.normaliser_.mean)
    assert streamed.normaliser_.scale == in_memory.normaliser_.scale
    assert streamed.validation_ == in_memory.validation_
    assert streamed.metrics_["fvu"] == pytest.approx(in_memory.metrics_["fvu"], rel=0.1)


def test_not_finite_rows_are_named():
    bad = X.copy()
    bad[17, 3], bad[400, 0] = np.nan, np.inf
    with pytest.raises(InputError, match=r"row 17, 400"):
        SAE(**SMALL).fit(bad)
    obs = pd.DataFrame(index=[f"tile{i}" for i in range(len(X))])
    with pytest.raises(InputError, match=r"17 \(tile17\)"):
        SAE(**SMALL).fit(Stored(bad, obs=obs))
    sae = SAE(**SMALL | {"n_steps": 2}).fit(X)
    with pytest.raises(InputError, match="row 17"):
        sae.transform(bad)
    huge = X.astype(np.float64)
    huge[5] = 1e300
    with pytest.raises(InputError, match="row 5"):
        sae.transform(huge)


@pytest.mark.parametrize(
    ("table", "word"),
    [
        (scipy.sparse.csr_matrix(X), "sparse"),
        (torch.from_numpy(X).to_sparse(), "sparse"),
        (X[0], "reshape"),
        (X[None], "shape"),
        (X[:0], r"0 row\(s\)"),
        (X[:, :0], r"0 feature\(s\)"),
        (X[:5], "too few"),
        (X.astype(complex), "Complex"),
        (np.full((20, 3), "a"), "not numbers"),
    ],
    ids=["csr", "torch-sparse", "one-row", "three-axes", "no-rows", "no-columns", "five-rows", "complex", "text"],
)
def test_unusable_tables_are_refused(table, word):
    with pytest.raises(InputError, match=word):
        SAE(**SMALL).fit(table)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalise", ["none", "centre", "unit_mean_square", "centre_scale", "layernorm"])
@pytest.mark.parametrize(
    "table",
    [
        np.full((40, 3), 2.5, np.float32),
        np.zeros((30, 4), np.float32),
        np.arange(50, dtype=np.float32)[:, None],
        np.eye(9, 700, dtype=np.float32),
        np.vstack([np.zeros((20, 5)), np.random.default_rng(0).normal(size=(20, 5))]).astype(np.float32),
    ],
    ids=["constant", "zero", "one-column", "wide", "half-zero"],
)
def test_degenerate_tables_stay_finite(architecture, normalise, table):
    sae = SAE(architecture, n_latents=6, k=9, n_steps=12, normalise=normalise, random_state=0, device="cpu").fit(table)
    assert sae.k_ == 6
    z = sae.transform(table)
    x_hat = sae.inverse_transform(z, like=table)
    assert np.isfinite(x_hat).all() and np.isfinite(sae.decoder_).all() and np.isfinite(z.data).all()
    if np.ptp(table, axis=0).max() == 0:
        np.testing.assert_allclose(x_hat, table, atol=1e-5)
        assert sae.metrics_["fvu"] == 0
    assert sae.transform(table[:1]).shape == (1, 6)


def test_layernorm_is_undone_with_the_rows():
    sae = SAE(normalise="layernorm", **SMALL).fit(X)
    codes = sae.transform(X)
    with pytest.raises(InputError, match="like"):
        sae.inverse_transform(codes)
    x_hat = sae.inverse_transform(codes, like=X)
    direct = ((X - x_hat) ** 2).sum() / ((X - X.mean(0)) ** 2).sum()
    assert -sae.score(X) == pytest.approx(direct, rel=1e-4) and direct < 0.9
    np.testing.assert_allclose(sae.transform(3 * X + 2).toarray(), codes.toarray(), atol=2e-3)


def test_diverging_training_says_what_to_change():
    with pytest.raises(BiosaeError, match="learning_rate"):
        SAE(**SMALL | {"learning_rate": 1e30}).fit(X)


def test_wrong_width_and_not_fitted():
    for call in ("transform", "inverse_transform", "score", "save", "trained_on"):
        with pytest.raises(NotFittedError):
            getattr(SAE(), call)(X)
    sae = SAE(**SMALL | {"n_steps": 2}).fit(X)
    with pytest.raises(InputError, match="23 features"):
        sae.transform(X[:, 1:])
    with pytest.raises(InputError, match="48 latents"):
        sae.inverse_transform(X)


# ------------------------------------------------------------------------------------------------ groups, identity


def test_whole_groups_are_held_out():
    labels = np.repeat([f"p{i}" for i in range(30)], 50)
    sae = SAE(**SMALL | {"n_steps": 3}).fit(X, groups=labels)
    assert sae.validation_ == {"by": "groups", "n_groups": 3, "n_rows": 150}
    seen = sae.trained_on([f"p{i}" for i in range(30)])
    assert seen.sum() == 27 and not sae.trained_on(["somebody else"]).any()
    assert not any("p1" in h for h in sae.training_groups_) and len(sae.training_groups_) == 27
    held = np.isin(labels, [f"p{i}" for i in np.flatnonzero(~seen)])
    x_hat = sae.inverse_transform(sae.transform(X[held]))
    direct = ((X[held] - x_hat) ** 2).sum() / ((X[held] - X[held].mean(0)) ** 2).sum()
    assert sae.metrics_["fvu_val"] == pytest.approx(direct, rel=1e-4)


def test_patients_of_a_store_are_used_and_tokens_stay_together():
    obs = pd.DataFrame({"patient": [f"p{i // 10}" for i in range(150)]}, index=[f"s{i}" for i in range(150)])
    sae = SAE(**SMALL | {"n_steps": 3}).fit(Stored(X, obs=obs, tokens=10))
    assert sae.validation_["by"] == "patient" and sae.validation_["n_rows"] % 100 == 0
    sae = SAE(**SMALL | {"n_steps": 3}).fit(Stored(X, obs=obs[[]], tokens=10))
    assert sae.validation_["by"] == "sample" and sae.validation_["n_rows"] == 150
    with pytest.raises(InputError, match="without patients"):
        sae.trained_on(["p1"])
    with pytest.raises(InputError, match="3 entries"):
        SAE(**SMALL).fit(X, groups=["a", "b", "c"])


@given(st.lists(st.integers(0, 6), min_size=20, max_size=200), st.floats(0, 0.5), st.integers(0, 9))
@hypothesis_settings(max_examples=60, deadline=None)
def test_no_group_lies_on_both_sides(codes, share, seed):
    labels = np.asarray([str(c) for c in codes], dtype=object)
    rows = Rows(np.zeros((len(labels), 1), np.float32))
    held = Held.draw(rows, groups=labels, share=share, rng=np.random.default_rng(seed)).mask(0, len(labels))
    assert not set(labels[held]) & set(labels[~held]) and (~held).any()
    assert held.sum() <= max(2, 2 * round(share * len(labels)))


def test_two_large_patients_leave_nothing_to_hold_out():
    sae = SAE(**SMALL | {"n_steps": 3}).fit(X, groups=np.repeat(["a", "b"], 750))
    assert sae.validation_["n_rows"] == 0 and np.isnan(sae.metrics_["fvu_val"])
    assert sae.trained_on(["a", "b"]).all()


def test_embeddings_of_another_encoder_are_refused():
    ours = {"encoder": "one", "layer": "blocks.3", "pool": "cls", "dim": 24}
    sae = SAE(**SMALL | {"n_steps": 3}).fit(Stored(X, identity=ours))
    assert sae.identity_ == ours
    other = Stored(X, identity=ours | {"layer": "blocks.7"})
    for call in (sae.transform, sae.score, sae.evaluate):
        with pytest.raises(IdentityError, match=r"layer: trained on 'blocks.3', given 'blocks.7'") as caught:
            call(other)
        assert "encoder:" not in str(caught.value)
    assert sae.transform(X).shape == sae.transform(Stored(X, identity=dict(ours))).shape


# ------------------------------------------------------------------------------------------------ files


def test_round_trip_keeps_every_bit(fitted, tmp_path):
    fitted.save(tmp_path)
    again = SAE.load(tmp_path, device="cpu")
    assert digest(again) == digest(fitted) and again.get_params() == fitted.get_params()
    first, second = fitted.transform(X), again.transform(X)
    np.testing.assert_array_equal(first.toarray(), second.toarray())
    np.testing.assert_array_equal(fitted.inverse_transform(first), again.inverse_transform(second))
    assert again.metrics_ == fitted.metrics_ and again.history_ == fitted.history_
    np.testing.assert_array_equal(again.density_, fitted.density_)
    copy = pickle.loads(pickle.dumps(fitted))  # noqa: S301
    np.testing.assert_array_equal(copy.transform(X).toarray(), first.toarray())
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"model.safetensors", "config.json", "log.csv"}
    assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1  # readable in a shared folder
    log = pd.read_csv(tmp_path / "log.csv")
    pd.testing.assert_frame_equal(log, pd.DataFrame(fitted.history_), check_dtype=False, rtol=1e-8)


def test_saved_bytes_repeat_and_carry_licence_and_groups(tmp_path):
    identity = {"encoder": "one", "licence": "CC-BY-NC-4.0", "derivatives_restricted": True}
    obs = pd.DataFrame({"patient": np.repeat([f"case{i}" for i in range(30)], 50)})
    for name in ("a", "b"):
        SAE(**SMALL | {"n_steps": 3}).fit(Stored(X, obs=obs, identity=identity)).save(tmp_path / name)
    texts = [(tmp_path / name / "config.json").read_text() for name in ("a", "b")]
    assert texts[0] == texts[1] and "case1" not in texts[0]
    config = json.loads(texts[0])
    assert config["licence"] == "CC-BY-NC-4.0" and config["derivatives_restricted"] is True
    again = SAE.load(tmp_path / "a")
    assert again.trained_on([f"case{i}" for i in range(30)]).sum() == 27
    with pytest.raises(IdentityError):
        again.transform(Stored(X, identity={"encoder": "two"}))


@pytest.mark.parametrize(
    ("name", "options", "now"),
    [
        ("topk", {"multi": 4}, {"options": {"multi": 4, "pre_bias": False}}),
        ("mp", None, {"options": {"rule": "abs"}}),
        ("polysae", None, {"options": {"scale": 1.0}}),
        ("batchtopk", None, {"options": {"shrink": True}}),
        ("topk", None, {"architecture": "relu"}),
    ],
)
def test_settings_of_another_model_are_not_taken_for_those_of_the_fitted_one(name, options, now, tmp_path):
    """Saved with them, it would open as another model; the code of a row would be another."""
    x = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    sae = SAE(name, 12, 3, options=options, n_steps=2, random_state=0, device="cpu").fit(x)
    codes = sae.codes(x)
    before = sae.get_params()
    sae.set_params(**now)
    for call in (lambda: sae.codes(x), lambda: sae.save(tmp_path), lambda: sae.evaluate(x)):
        with pytest.raises(InputError, match="fit again"):
            call()
    sae.set_params(**before).save(tmp_path)
    assert (SAE.load(tmp_path, device="cpu").codes(x) != codes).nnz == 0


def test_layernorm_model_round_trip(tmp_path):
    sae = SAE(normalise="layernorm", **SMALL | {"n_steps": 3}).fit(X)
    sae.save(tmp_path)
    assert SAE.load(tmp_path).score(X) == sae.score(X)


def test_broken_folders_are_refused_by_name(tmp_path):
    sae = SAE(**SMALL | {"n_steps": 2}).fit(X)
    with pytest.raises(FormatError, match=r"holds no SAE"):
        SAE.load(tmp_path)

    def folder(name, **changes):
        sae.save(tmp_path / name)
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
        return tmp_path / name

    cases = [
        ({"format": "other"}, "not of a biosae SAE"),
        ({"version": 99}, "update biosae"),
        ({"sha256": "0" * 64}, "does not match"),
        ({"n_latents": 47}, "W_enc"),
        ({"history": ...}, "history"),
        ({"params": {"architecture": "topq"}}, "topq"),
        ({"params": {"colour": 1}}, "colour"),
    ]
    for i, (changes, word) in enumerate(cases):
        with pytest.raises(FormatError, match=word):
            SAE.load(folder(f"case{i}", **changes))
    path = folder("short")
    model = path / "model.safetensors"
    data = model.read_bytes()
    model.write_bytes(data[:-10])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        SAE.load(path)
    broken = folder("garbage", sha256=hashlib.sha256(b"not tensors").hexdigest())
    (broken / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(FormatError, match="not a readable"):
        SAE.load(broken)
    (path / "config.json").write_text('{"format": "bio')
    with pytest.raises(FormatError, match="not valid JSON"):
        SAE.load(path)
    model.unlink()
    with pytest.raises(FormatError, match="holds no SAE"):
        SAE.load(folder("gone").parent / "nowhere")


# ------------------------------------------------------------------------------------------------ scikit-learn


def test_works_inside_scikit_learn():
    from sklearn.base import clone
    from sklearn.exceptions import NotFittedError as SklearnNotFitted
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.utils.validation import check_is_fitted

    sae = SAE(**SMALL | {"n_steps": 10})
    copy = clone(sae)
    assert copy is not sae and copy.get_params() == sae.get_params()
    with pytest.raises(SklearnNotFitted):
        check_is_fitted(copy)
    check_is_fitted(copy.fit(X))
    assert not hasattr(clone(copy), "decoder_")
    target = STRENGTHS[:, 0]
    pipeline = make_pipeline(SAE(**SMALL), Ridge()).fit(X, target)
    assert pipeline.score(X, target) > 0.3
    search = GridSearchCV(sae, {"k": [1, 8]}, cv=2).fit(X)
    assert search.best_params_ == {"k": 8} and search.best_score_ < 0
    assert list(copy.get_feature_names_out()[:2]) == ["L0000", "L0001"]
    np.testing.assert_array_equal(SAE(**SMALL).fit_transform(X).toarray(), SAE(**SMALL).fit(X).transform(X).toarray())


def test_importing_the_room_loads_nothing_heavy():
    code = (
        "import sys, biosae.sae; "
        "bad = {'pandas', 'sklearn', 'timm', 'anndata', 'scanpy', 'matplotlib'} & set(sys.modules); "
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_scikit_learn_estimator_checks():
    from sklearn.utils.estimator_checks import check_estimator

    reasons = {"check_dtype_object": "a table of dicts raises InputError (a ValueError), not TypeError"}
    with pytest.warns(UserWarning, match="does not inherit"):
        results = check_estimator(
            SAE(n_steps=10, device="cpu", random_state=0), on_fail=None, expected_failed_checks=reasons
        )
    assert {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"} == {}
    assert sum(r["status"] == "passed" for r in results) > 40
