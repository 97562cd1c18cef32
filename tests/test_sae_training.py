"""Training: planted truth, schedules, dead latents, averages, clipping, early stop, divergence, several models."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from biosae.errors import DivergedError, InputError
from biosae.sae import SAE, step
from biosae.sae.config import SAEConfig, k_at, penalty_at, rate_at, resolve
from biosae.sae.fitting import empty_model, fit_many, trainer_of
from biosae.sae.loop import run
from biosae.sae.normalise import Normaliser
from biosae.sae.train import BETAS, EPS, Trainer

ARCHITECTURES = ("relu", "topk", "batchtopk", "matryoshka", "jumprelu")
BACKENDS = ("numba", "torch", "dense")
SMALL = {
    "n_latents": 48, "k": 4, "batch_size": 128, "n_steps": 40, "learning_rate": 5e-3, "random_state": 0,
    "device": "cpu",
}  # fmt: skip


def planted(n=1500, d=24, m=32, k=3, *, offset=0.0, seed=0):
    """Rows made of k unit atoms each with positive strengths; and the atoms."""
    rng = np.random.default_rng(seed)
    atoms = rng.normal(size=(m, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    z = np.zeros((n, m))
    for row in z:
        row[rng.choice(m, k, replace=False)] = rng.uniform(0.5, 1.5, k)
    return (z @ atoms + offset).astype(np.float32), atoms


X, ATOMS = planted(offset=3.0)


def digest(sae):
    parts = [value.numpy().tobytes() for value in sae._model.state_dict().values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def trainer(rows=X, seed=0, **settings):
    """A trainer on rows that are scaled already, and its batches."""
    config = SAEConfig(**SMALL | settings)
    plan = resolve(config, len(rows), rows.shape[1])
    made = trainer_of(config, plan, Normaliser.fit("centre_scale", [rows]), rows, seed, torch.device("cpu"))
    g = np.random.default_rng(seed)
    batches = [torch.from_numpy(rows[g.permutation(len(rows))[: plan.batch_size]]) for _ in range(plan.n_steps)]
    return made, batches


# -------------------------------------------------------------------------------------------------- planted truth


PLANTED, TRUE = planted(n=4000, offset=5.0)
KINDS = {
    "relu": {"l1": 0.1},
    "topk": {},
    "batchtopk": {},
    "matryoshka": {"prefixes": (0.5, 1.0)},
    "jumprelu": {"bandwidth": 0.2, "threshold": 0.1},
}


def recovery(decoder):
    return (TRUE @ decoder.T).max(1).mean()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_recovers_a_planted_dictionary(architecture):
    settings = {"n_latents": 64, "k": 3, "learning_rate": 5e-3, "n_steps": 400, "random_state": 1, "device": "cpu"}
    sae = SAE(architecture, **settings | KINDS[architecture], decoder_init="random").fit(PLANTED)
    rng = np.random.default_rng(77)
    random = rng.normal(size=(64, 24))
    baseline = recovery(random / np.linalg.norm(random, axis=1, keepdims=True))
    assert recovery(sae.decoder_) > 0.9 > baseline + 0.2
    assert sae.metrics_["fvu"] < 0.25 and sae.history_[-1]["fvu"] < sae.history_[0]["fvu"] / 2
    np.testing.assert_allclose(np.linalg.norm(sae.decoder_, axis=1), 1, atol=1e-5)
    if architecture in ("jumprelu", "batchtopk", "matryoshka"):
        assert sae.metrics_["l0"] == pytest.approx(3, rel=0.15)


# ------------------------------------------------------------------------- checks every implementation must pass


@pytest.fixture(scope="module", params=[(a, b) for a in ARCHITECTURES for b in BACKENDS], ids="-".join)
def fitted(request):
    architecture, backend = request.param
    return SAE(architecture, backend=backend, **SMALL).fit(X)


def test_codes_of_a_row_do_not_depend_on_the_others(fitted, tmp_path):
    whole = fitted.transform(X[:300]).toarray()
    for size, stop in ((1, 20), (7, 300), (256, 300)):
        parts = [fitted.transform(X[start : min(start + size, stop)]).toarray() for start in range(0, stop, size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole[:stop])
    fitted.save(tmp_path)
    np.testing.assert_array_equal(SAE.load(tmp_path, device="cpu").transform(X[:300]).toarray(), whole)


def test_single_and_double_precision_agree_and_seeds_reproduce(fitted):
    again = SAE(**fitted.get_params()).fit(X)
    assert digest(again) == digest(fitted) and again.history_ == fitted.history_
    x = torch.from_numpy(X[:200])
    with torch.no_grad():
        single = fitted._model(x)
        double = fitted._model.double()(x.double())
    fitted._model.float()
    torch.testing.assert_close(single[0].double(), double[0], rtol=1e-4, atol=1e-4)
    same = ((single[1] > 0) == (double[1] > 0)).all(1)
    assert same.float().mean() > 0.98  # the others have two scores, or one and the threshold, nearly equal
    torch.testing.assert_close(single[2][same].double(), double[2][same], rtol=1e-4, atol=1e-4)


def test_decoding_codes_is_the_forward_pass_and_metrics_recompute(fitted):
    codes = fitted.transform(X)
    x_hat = fitted.inverse_transform(codes)
    with torch.no_grad():
        _, z, forward = fitted._model(torch.from_numpy(X))
    np.testing.assert_allclose(codes.toarray(), z.numpy(), atol=2e-5)
    np.testing.assert_allclose(x_hat, forward.numpy(), atol=1e-4)
    again = fitted.evaluate(X)
    assert again["l0"] == pytest.approx(codes.nnz / len(X))
    assert again["dead_share"] == pytest.approx((codes.getnnz(0) == 0).mean())
    error = ((X - x_hat.astype(float)) ** 2).sum() / ((X - X.mean(0, dtype=float)) ** 2).sum()
    assert again["fvu"] == pytest.approx(error, rel=1e-4)


def test_atoms_stay_unit_vectors_and_the_loss_falls(fitted):
    np.testing.assert_allclose(np.linalg.norm(fitted.decoder_.astype(float), axis=1), 1, atol=1e-5)
    assert fitted.history_[-1]["fvu"] < 0.8 * fitted.history_[0]["fvu"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalise", ["centre_scale", "none"])
def test_degenerate_rows_stay_finite(architecture, backend, normalise):
    """Zero and constant input, k above m and above the positives, m below d, single-row batches."""
    for table in (
        np.zeros((9, 4)),
        np.full((9, 3), 2.5),
        np.eye(8, 30),
        np.vstack([np.zeros((5, 4)), np.ones((5, 4))]),
    ):
        rows = table.astype(np.float32)
        sae = SAE(
            architecture, n_latents=5, k=9, batch_size=1, n_steps=20, backend=backend, normalise=normalise,
            random_state=0, device="cpu", dead_after=3, aux_k=2, resample_every=4,
        )  # fmt: skip
        with np.testing.suppress_warnings() as quiet:
            quiet.filter(UserWarning)
            sae.fit(rows)
        codes = sae.transform(rows)
        assert np.isfinite(codes.data).all() and np.isfinite(sae.inverse_transform(codes)).all()
        assert all(np.isfinite([point["loss"], point["l0"], point["dead"]]).all() for point in sae.history_)
        assert all(point["fvu"] in (0, np.inf) for point in sae.history_)  # of one row alone


# ------------------------------------------------------------------------------------------ backends, equal steps


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_backends_reach_the_loss_of_the_dense_reference(architecture):
    """At equal steps within 1 %, over two seeds, with latents that go dead and come back."""
    more = {"n_steps": 100, "dead_after": 400, "aux_k": 8} | KINDS[architecture]
    found = {}
    for name, change in {
        "dense": {"backend": "dense"}, "numba": {"backend": "numba"}, "torch": {"backend": "torch"},
        "bfloat16": {"backend": "numba", "prefilter": "bfloat16"},
    }.items():  # fmt: skip
        runs = [SAE(architecture, **SMALL | more | change | {"random_state": seed}).fit(X) for seed in (0, 1)]
        found[name] = np.mean([[point["fvu"] for point in sae.history_[-5:]] for sae in runs])
    for name, fvu in found.items():
        assert fvu == pytest.approx(found["dense"], rel=0.01), (name, found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_verify_counts_what_the_prefilter_misses_and_changes_nothing(architecture):
    settings = SMALL | KINDS[architecture]
    sae = SAE(architecture, prefilter="verify", **settings).fit(X)
    assert digest(sae) == digest(SAE(architecture, prefilter="bfloat16", **settings).fit(X))
    assert all(0 <= point["missed"] < 0.02 for point in sae.history_)


def test_verify_finds_a_prefilter_that_is_blind(monkeypatch):
    """A prefilter that scores half of the latents as 0 misses all their entries."""
    made, batches = trainer(n_steps=2)
    model, x = made.model, made.normalise(batches[0])
    want = made._wanted()
    codes = made.ops.select_topk(x - made.weights["b_dec"], made.weights["W_enc"], made.weights["b_enc"], 4)
    on = codes.indices[codes.values > 0]
    blind = (on < 24).float().mean()

    def half_blind(rows, weight, bias, k, *, low=None):
        if low is not None:
            weight = weight.clone()
            weight[:24] = 0
        return kernel(rows, weight, bias, k)

    kernel = made.ops.select_topk
    monkeypatch.setattr(made.ops, "select_topk", half_blind)
    assert step.missed(model, x, want, made.ops) == pytest.approx(float(blind), abs=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_rows_are_those_numbers_in_float32(dtype, backend):
    half = torch.from_numpy(X).to(getattr(torch, dtype))
    one = SAE(backend=backend, **SMALL | {"n_steps": 5}).fit(half)
    assert digest(one) == digest(SAE(backend=backend, **SMALL | {"n_steps": 5}).fit(half.float()))


# ------------------------------------------------------------------------------------------------------ schedules


def test_schedules_have_the_shapes_that_are_documented():
    plan = resolve(
        SAEConfig(
            n_steps=100, n_latents=64, warmup=0.1, decay=0.2, learning_rate=1.0, l1_warmup=0.25, k=4, k_start=24,
            k_anneal=0.2,
        ),
        1000, 48,
    )  # fmt: skip
    assert [penalty_at(plan, s) for s in range(100)] == pytest.approx(np.minimum(1, np.arange(1, 101) / 25))
    assert [k_at(plan, s) for s in range(21)] == list(range(24, 3, -1)) and k_at(plan, 99) == 4
    up = resolve(SAEConfig(n_steps=100, k=9, k_start=1, k_anneal=0.5), 1000, 48)
    assert [k_at(up, s) for s in (0, 25, 50, 99)] == [1, 5, 9, 9]
    rates = [rate_at(plan, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[50] == 1 and rates[-1] == pytest.approx(0.05)


def test_training_follows_the_schedules(monkeypatch):
    seen, whole = [], step.sparse

    def noted(model, x, want, *rest, **more):
        seen.append(want)
        return whole(model, x, want, *rest, **more)

    monkeypatch.setattr("biosae.sae.train.sparse", noted)
    sae = SAE("topk", **SMALL | {"k_start": 14, "k_anneal": 0.25, "warmup": 0.1, "decay": 0.5}).fit(X)
    plan = resolve(sae, 1350, 24)
    assert [want.k for want in seen] == [k_at(plan, s) for s in range(40)] == [*range(14, 4, -1), *[4] * 30]
    assert [point["lr"] for point in sae.history_] == [rate_at(plan, s) for s in range(40)]
    assert [point["l0"] for point in sae.history_] == pytest.approx([want.k for want in seen], rel=0.25)
    seen.clear()
    monkeypatch.setattr("biosae.sae.train.SWITCH", 1.0)
    SAE("relu", **SMALL | {"l1": 0.4, "l1_warmup": 0.25, "backend": "torch"}).fit(X)
    assert [want.weight for want in seen] == pytest.approx(list(0.4 * np.minimum(1, np.arange(1, 41) / 10)))


# ------------------------------------------------------------------------------------------------- one step by hand


@pytest.mark.parametrize("clip", [None, 0.05, 1e6])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trainer_equals_a_plain_loop_with_adam_and_clip_grad_norm(architecture, clip):
    """20 steps of the Trainer against autograd, torch's clipping and Adam, projection and renormalisation."""
    settings = KINDS[architecture] | {"n_steps": 20, "aux_k": 0}
    made, batches = trainer(architecture=architecture, clip_norm=clip, **settings)
    model = empty_model(made.config, made.plan, 24)
    model.load_state_dict(made.model.state_dict())
    model.double().train()
    adam = torch.optim.Adam(model.parameters(), betas=BETAS, eps=EPS)
    norms = []
    for number, batch in enumerate(batches):
        x = made.normalise(batch)
        step.dense(model, x.double(), made._wanted())  # leaves the gradients in the parameters
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        adam.param_groups[0]["lr"] = rate_at(made.plan, number)
        adam.step()
        with torch.no_grad():
            model.W_dec.div_(model.W_dec.norm(dim=1, keepdim=True))
            if architecture == "jumprelu":
                model.threshold.clamp_(min=0)
        made.step(batch)
        for name, weight in made.weights.items():
            expected = dict(model.named_parameters())[name].detach()
            off = (weight.double() - expected).abs().max() / expected.abs().max()
            assert off < 2e-3, (number, name, float(off))  # single precision, through Adam's division
            weight.copy_(expected)  # what is compared is one step at a time: rounding may choose another latent
    assert clip != 0.05 or min(norms) > 0.05


# --------------------------------------------------------------------------------------------- averages, dead latents


def test_the_moving_average_is_the_one_computed_by_hand():
    made, batches = trainer(ema=0.8)
    mean = {name: weight.clone().double() for name, weight in made.weights.items()}
    for batch in batches:
        made.step(batch)
        mean = {name: 0.8 * mean[name] + 0.2 * weight for name, weight in made.weights.items()}
    last = {name: weight.clone() for name, weight in made.weights.items()}
    made.finish()
    mean["W_dec"] /= mean["W_dec"].norm(dim=1, keepdim=True)
    for name, value in mean.items():
        torch.testing.assert_close(made.weights[name].double(), value, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(made.weights[name], last[name], atol=1e-4)


def test_latents_are_dead_after_so_many_rows_and_auxk_trains_them():
    made, batches = trainer(dead_after=500, n_steps=24)
    with torch.no_grad():
        made.weights["b_enc"][10:20] = -50.0
    before = made.weights["W_dec"][10:20].clone()
    for number, batch in enumerate(batches):
        made.step(batch)
        assert (made.since_fired[10:20] == (number + 1) * 128).all()
        if number < 7:
            assert len(made.dead) == 0
        else:  # looked at every 8 steps
            assert set(range(10, 20)) <= set(made.dead.tolist())
    # scores of -50 are not positive, so that AuxK cannot reach them; with a bias within reach it does
    torch.testing.assert_close(made.weights["W_dec"][10:20], before)
    made, batches = trainer(dead_after=500, n_steps=24)
    with torch.no_grad():
        made.weights["W_enc"][10:20] *= 0.05
        before = made.weights["W_dec"][10:20].clone()
    for batch in batches[:8]:
        made.step(batch)
    dead = [j for j in made.dead.tolist() if 10 <= j < 20]
    assert len(dead) > 5
    made.step(batches[8])
    assert (made.weights["W_dec"][dead] - before[[j - 10 for j in dead]]).norm(dim=1).max() > 1e-4


def test_resampling_revives_silent_latents_and_resets_their_moments():
    made, batches = trainer(resample_every=8, aux_k=0, decay=0.0, n_steps=40)
    with torch.no_grad():
        made.weights["b_enc"][:12] = -50.0
    for batch in batches[:7]:
        made.step(batch)
    for first, second in made.moments.values():
        first.add_(1e-3)
        second.add_(1e-3)
    silent = made.since_fired + 128 >= 4 * 128
    silent[12:] = False
    made.step(batches[7])  # looks at what was silent over the last 4 of 8 steps
    weights, idle = made.weights, silent.nonzero().squeeze(1)
    assert len(idle) == 12 and not weights["b_enc"][idle].any() and not made.since_fired[idle].any()
    for name in ("W_dec", "W_enc", "b_enc"):
        for moment in made.moments[name]:
            assert not moment[idle].any() and moment[12:].abs().sum() > 0
    x = made.normalise(batches[7]) - weights["b_dec"]
    cosine = torch.nn.functional.normalize(x) @ weights["W_dec"][idle].T
    torch.testing.assert_close(cosine.max(0).values, torch.ones(12), atol=1e-5, rtol=0)  # rows of this batch
    used = (made.since_fired < 4 * 128) & ~silent
    size = weights["W_enc"][idle].norm(dim=1)
    torch.testing.assert_close(size, size[:1].expand(12))
    assert float(size[0] / weights["W_enc"][used].norm(dim=1).mean()) == pytest.approx(0.2, rel=0.05)
    fired = torch.zeros(48, dtype=torch.bool)
    for batch in batches[8:30]:
        made.step(batch)
        fired |= made.since_fired == 0
    assert fired[:12].sum() >= 10


# -------------------------------------------------------------------------------------------- early stop, divergence


def test_early_stopping_keeps_the_best_weights():
    """60 rows of noise are learnt by heart: the held-out error falls and then rises."""
    noise = np.random.default_rng(3).standard_normal((80, 24)).astype(np.float32)
    settings = SMALL | {"n_steps": 50, "learning_rate": 0.05, "validation": 0.25, "patience": 4, "decay": 0.0}
    settings["encoder_init"] = "probes"  # whatever the number of steps
    free = SAE(**settings).fit(noise)
    sae = SAE(early_stopping=True, **settings).fit(noise)
    errors = [point["fvu_val"] for point in sae.history_]
    best = int(np.argmin(errors))
    assert len(errors) < len(free.history_) == 50 and len(errors) == best + 1 + 4
    assert sae.history_ == free.history_[: len(errors)]
    # the model is that of the best look: a run of that many steps ends at the same weights, as no rate changes
    same = SAE(early_stopping=True, **settings | {"warmup": 0.0}).fit(noise)
    errors = [point["fvu_val"] for point in same.history_]
    short = SAE(**settings | {"n_steps": int(np.argmin(errors)) + 1, "warmup": 0.0}).fit(noise)
    assert digest(same) == digest(short)
    assert same.metrics_["fvu_val"] == pytest.approx(min(errors), rel=1e-3)


def test_early_stopping_without_rows_to_hold_out_keeps_the_last_weights():
    two = np.repeat(["a", "b"], 750)
    one, other = (SAE(early_stopping=stop, **SMALL).fit(X, groups=two) for stop in (True, False))
    assert one.validation_["n_rows"] == 0 and digest(one) == digest(other)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "settings", [{"learning_rate": 1e3}, {"learning_rate": 1e30}, {"learning_rate": 1e30, "ema": 0.9}]
)
def test_divergence_is_raised_and_leaves_good_weights(architecture, settings):
    sae = SAE(architecture, clip_norm=None, **SMALL | {"warmup": 0.0} | settings)
    with pytest.raises(DivergedError, match=r"keeps its weights of step 0\..*learning_rate"):
        sae.fit(X)
    start = SAE(architecture, **SMALL | {"n_steps": 1, "learning_rate": 1e-12}).fit(X)
    np.testing.assert_allclose(sae.decoder_, start.decoder_, atol=1e-6)
    assert sae.metrics_["fvu"] < 2


def test_a_training_that_diverges_late_keeps_the_last_logged_weights():
    made, batches = trainer()
    for number, batch in enumerate(batches[:20]):
        if number == 19:
            before = {name: weight.clone() for name, weight in made.weights.items()}
        made.step(batch)
    with torch.no_grad():
        made.weights["W_enc"].fill_(float("nan"))
    with pytest.raises(DivergedError, match="diverged at step 21; the model keeps its weights of step 19"):
        made.step(batches[20])
    made.finish()
    assert made.finished
    for name, value in before.items():
        assert torch.equal(made.weights[name], value)


# ------------------------------------------------------------------------------------------------- callbacks, input


def test_callbacks_get_step_and_numbers():
    seen = []
    sae = SAE(callbacks=(lambda step, numbers: seen.append((step, numbers)),), **SMALL | {"n_steps": 120}).fit(X)
    assert [step for step, _ in seen] == [point["step"] for point in sae.history_] == list(range(2, 121, 2))
    assert [numbers for _, numbers in seen] == sae.history_
    assert set(seen[0][1]) == {"step", "loss", "fvu", "l0", "dead", "fvu_val", "lr"}
    seen[0][1]["loss"] = "changed by a callback"
    assert sae.history_[0]["loss"] != "changed by a callback"


@pytest.mark.parametrize("form", ["table", "chunks"])
def test_rows_that_are_not_finite_are_named(form):
    bad = X.copy()
    bad[17, 3], bad[400, 0] = np.nan, np.inf
    rows = bad if form == "table" else [bad[:300], bad[300:]]
    with pytest.raises(InputError, match="17"):
        SAE(**SMALL).fit(rows)
    sae = SAE(**SMALL).fit(X)
    for call in (sae.partial_fit, sae.transform, sae.evaluate):
        with pytest.raises(InputError, match=r"row (17|400)"):
            call(bad)


def test_chunks_train_like_a_table():
    chunks = [X[:500], X[500:600], X[600:]]
    sae = SAE(**SMALL | {"n_steps": 150}).fit(chunks)
    again = SAE(**SMALL | {"n_steps": 150}).fit(lambda: iter(chunks))
    assert digest(sae) == digest(again) and sae.validation_["n_rows"] == 0
    table = SAE(**SMALL | {"n_steps": 150, "validation": 0.0}).fit(X)
    assert sae.evaluate(X)["fvu"] == pytest.approx(table.metrics_["fvu"], rel=0.1)
    with pytest.raises(InputError, match="n_steps"):
        SAE(**SMALL | {"n_steps": None}).fit(chunks)


# --------------------------------------------------------------------------------------------------- several models


def test_the_first_of_many_models_is_the_one_fitted_alone():
    changes = [{}, {"random_state": 5}, {"k": 2}, {"architecture": "batchtopk"}, {"n_latents": 20, "normalise": "l2"},
               {"n_steps": 25}, {"architecture": "relu"}]  # fmt: skip
    models = fit_many([SAE(**SMALL | change) for change in changes], X)
    assert digest(models[0]) == digest(SAE(**SMALL).fit(X))
    assert models[0].history_ == SAE(**SMALL).fit(X).history_
    assert digest(models[3]) == digest(SAE(**SMALL | changes[3]).fit(X))  # of the same seed, so of the same stream
    assert digest(models[5]) == digest(SAE(**SMALL | changes[5]).fit(X)) and len(models[5].history_) == 25
    assert len({digest(model) for model in models}) == 7
    assert models[4].n_latents_ == 20 and models[4].normaliser_.rowwise


def test_models_of_different_batch_sizes_are_refused():
    with pytest.raises(InputError, match=r"one batch size.*\[64, 128\]"):
        fit_many([SAE(**SMALL), SAE(**SMALL | {"batch_size": 64})], X)
    with pytest.raises(InputError, match="at least one"):
        fit_many([], X)


def test_one_of_many_that_diverges_stops_all_with_good_weights():
    models = [SAE(**SMALL), SAE(**SMALL | {"learning_rate": 1e30, "clip_norm": None})]
    with pytest.raises(DivergedError):
        fit_many(models, X)
    assert all(np.isfinite(model.decoder_).all() and model.metrics_["fvu"] < 2 for model in models)


# ------------------------------------------------------------------------------------------- partial_fit, warm start

PART = SMALL | {"validation": 0.0}


def test_partial_fit_goes_on_where_it_was():
    one = SAE(**PART).partial_fit(X[:750])
    scaling, steps = one.normaliser_, one.n_steps_
    assert steps == len(range(0, 750, one.batch_size_)) and one.metrics_["n_rows"] == 750
    fvu = []
    for _ in range(15):
        one.partial_fit(5 + 2 * X[750:])  # other rows do not change the scaling
        fvu.append(one.metrics_["fvu"])
    assert one.normaliser_ is scaling and one.n_steps_ == 16 * steps and one.n_latents_ == 48
    assert fvu[-1] < 0.7 * fvu[0]
    np.testing.assert_allclose(np.linalg.norm(one.decoder_, axis=1), 1, atol=1e-5)
    again = SAE(**PART).partial_fit(X[:750])
    for _ in range(15):
        again.partial_fit(5 + 2 * X[750:])
    assert digest(again) == digest(one)


def test_partial_fit_of_two_halves_keeps_one_optimiser():
    """Two calls do the steps of one trainer: the moments of the first half are there in the second."""
    sae = SAE(**PART).partial_fit(X[:512])
    trainer = sae._trainer
    first = trainer.moments["W_dec"][0].clone()
    sae.partial_fit(X[:512])
    assert sae._trainer is trainer and trainer.done == 2 * 4 and first.abs().sum() > 0
    assert trainer.moments["W_dec"][1].abs().sum() > 0 and sae.n_steps_ == 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_partial_fit_after_fit_or_load_goes_on_from_the_weights(architecture, tmp_path):
    sae = SAE(architecture, **PART | {"n_steps": 150, "learning_rate": 1e-3}).fit(X)
    sae.save(tmp_path)
    before, steps = sae.metrics_["fvu"], sae.n_steps_
    loaded = SAE.load(tmp_path, device="cpu")
    for model in (sae, loaded):
        model.partial_fit(X)
        assert model.metrics_["fvu"] < 1.1 * before and model.n_steps_ == steps + len(range(0, 1500, 128))
    assert digest(sae) == digest(loaded)
    with pytest.raises(InputError, match="features"):
        sae.partial_fit(X[:, 1:])


def test_a_new_fit_forgets_partial_fits():
    sae = SAE(**PART).partial_fit(X).fit(X)
    assert digest(sae) == digest(SAE(**PART).fit(X)) and sae._trainer is None


def test_warm_start_goes_on_from_the_last_fit():
    settings = PART | {"n_steps": 100, "warm_start": True}
    sae = SAE(**settings).fit(X)
    first, atoms = sae.metrics_["fvu"], sae.decoder_.copy()
    assert digest(sae) == digest(SAE(**settings | {"warm_start": False}).fit(X))
    sae.set_params(learning_rate=1e-12).fit(X)  # no step moves anything: what is left is fold and unfold
    np.testing.assert_allclose(sae.decoder_, atoms, atol=1e-5)
    assert sae.metrics_["fvu"] == pytest.approx(first, rel=1e-3)
    sae.set_params(learning_rate=5e-3).fit(X)
    assert sae.history_[0]["fvu"] < 1.2 * first and sae.metrics_["fvu"] < first


OF_ONE_TABLE = ("gated", "abstopk", "topk_signed", "threshold", "polysae", "mp", "variational", "archetypal")


@pytest.mark.parametrize("name", OF_ONE_TABLE)
def test_methods_go_on_from_the_last_fit_or_a_file(name, tmp_path):
    sae = SAE(name, **PART | {"n_steps": 10}).fit(X)
    sae.save(tmp_path)
    codes, fvu = sae.codes(X), sae.metrics_["fvu"]
    for model in (sae, SAE.load(tmp_path, device="cpu")):
        model.set_params(warm_start=True, learning_rate=1e-12).fit(X)  # no step moves anything
        np.testing.assert_allclose(model.codes(X).toarray(), codes.toarray(), atol=1e-4)
        model.set_params(learning_rate=5e-3).partial_fit(X)
        assert model.metrics_["fvu"] < 1.2 * fvu and model.n_steps_ == 10 + len(range(0, 1500, 128))


def test_what_goes_on_has_the_options_that_it_began_with():
    sae = SAE("gated", options={"l1": 0.1}, warm_start=True, **PART | {"n_steps": 3}).fit(X)
    sae.set_params(options={"l1": 5.0})
    for again in (sae.fit, sae.partial_fit):
        with pytest.raises(InputError, match=r"l1=0\.1"):
            again(X)
    sae.set_params(warm_start=False).fit(X)
    assert sae._model.options.l1 == 5.0
    sae = SAE("mp", warm_start=True, **PART | {"n_steps": 3}).fit(X)
    sae.set_params(options={"tolerance": 0.5}).fit(X)
    assert sae._model.options.tolerance == 0.5


def test_resampled_thresholds_start_where_the_options_say():
    sae = SAE("jumprelu", options={"threshold": 0.5, "bandwidth": 1e-6}, resample_every=4, **PART | {"n_steps": 8})
    threshold = sae.fit(X)._model.threshold
    torch.testing.assert_close(threshold, torch.full_like(threshold, 0.5), atol=0.05, rtol=0)


def test_a_resampled_gate_starts_with_its_magnitude():
    """A latent whose magnitude stayed closed would never fire again, whatever its new direction."""
    made, batches = trainer(architecture="gated", resample_every=4, n_steps=8, decay=0.0)
    made.weights["b_mag"][:8] = -100
    for batch in batches[:4]:
        made.step(batch)
    assert bool((made.weights["b_mag"] > -1).all()) and not bool(made.moments["b_mag"][0][:8].any())


def test_resampling_with_a_second_table():
    settings = PART | {"n_latents": 256, "k": 2, "n_steps": 8, "resample_every": 4}
    sae = SAE("gsae", **settings).fit(X, partner=X[:, ::-1].copy())
    assert np.isfinite(sae.metrics_["fvu"])
    with pytest.raises(InputError, match="two tables"):
        SAE("transcoder", **settings).fit(X, partner=X)


# --------------------------------------------------------------------------------------------------------- the loop


def test_the_loop_asks_for_batches_from_the_step_at_which_the_models_are():
    made, batches = trainer(n_steps=12)
    for batch in batches[:5]:
        made.step(batch)
    asked = []

    def stream(start):
        asked.append(start)
        yield from batches[start:]

    run([made], stream)
    assert asked == [5] and made.done == 12 and made.finished
    run([made], stream)
    assert asked == [5]
    whole, _ = trainer(n_steps=12)
    for batch in batches:
        whole.step(batch)
    assert isinstance(whole, Trainer) and all(torch.equal(made.weights[n], w) for n, w in whole.weights.items())


def test_partial_fit_names_a_bad_row_before_it_learns():
    rows = torch.randn(600, 8, generator=torch.Generator().manual_seed(0)).numpy()
    sae = SAE(n_latents=16, k=2, batch_size=256, random_state=0).partial_fit(rows)
    before = sae.decoder_.copy()
    bad = rows.copy()
    bad[577, 3] = float("nan")
    with pytest.raises(InputError, match="577"):
        sae.partial_fit(bad)
    np.testing.assert_array_equal(sae.decoder_, before)
    again = SAE(n_latents=16, k=2, batch_size=256, random_state=0).partial_fit(rows).partial_fit(rows)
    np.testing.assert_array_equal(sae.partial_fit(rows).decoder_, again.decoder_)


def test_what_goes_on_keeps_its_patients_and_refuses_other_models(tmp_path):
    rows = torch.randn(600, 8, generator=torch.Generator().manual_seed(0)).numpy()
    settings = {"n_latents": 16, "k": 2, "n_steps": 5, "random_state": 0, "validation": 0, "warm_start": True}
    sae = SAE(**settings).fit(rows[:300], groups=["a", "b", "c"] * 100)
    sae.fit(rows[300:], groups=["d"] * 300)
    assert sae.trained_on(["a", "c", "d", "e"]).tolist() == [True, True, True, False]
    sae.set_params(k=5).fit(rows, groups=["d"] * 600)
    assert (np.diff(sae.transform(rows).indptr) > 2).any()  # the k that it was trained with, not the first one
    sae.partial_fit(rows)  # nobody knows whose rows these are
    with pytest.raises(InputError, match="not recorded"):
        sae.trained_on(["a"])
    with pytest.raises(InputError, match="has architecture='topk'"):
        sae.set_params(architecture="relu").fit(rows)
    with pytest.raises(InputError, match="n_latents=16"):
        sae.set_params(architecture="topk", n_latents=32).fit(rows)
    with pytest.raises(InputError, match="7 features"):
        sae.set_params(n_latents=None).fit(rows[:, :7])
    with pytest.raises(InputError, match="folder each"):
        fit_many([SAE(checkpoint=str(tmp_path)), SAE(checkpoint=str(tmp_path / "."))], rows)
