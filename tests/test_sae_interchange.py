"""Checkpoints of other libraries: files that they wrote give their codes; what is written has their layout."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import biosae as bs
from biosae.errors import FormatError, InputError, NotFittedError
from biosae.sae.activations import topk_signed
from biosae.sae.interchange import FORMATS, detect
from biosae.sae.interchange.files import LARGEST_CONFIG
from biosae.sae.interchange.weights import below

HERE = Path(__file__).parent / "reference" / "interchange"
MISSING = {
    "overcomplete/relu": {"architecture": "relu"}, "overcomplete/batchtopk": {"threshold": 0.4},
    "overcomplete/matching_pursuit": {"architecture": "mp", "k": 4},
    "overcomplete/orthogonal_matching_pursuit": {"architecture": "omp", "k": 4},
    "overcomplete/jumprelu": {}, "overcomplete/archetypal_jumprelu": {},
}  # fmt: skip
"""What overcomplete does not store; k = 4 for all others of it."""
REFUSED = {
    "saelens/transcoder": "predicts another layer", "sparsify/groupmax": "groupmax", "sparsify/skip": "linear map",
    "sparsify/transcoder": "predicts", "overcomplete/quantised": "quantised", "overcomplete/topk_mlp": "several layers",
}  # fmt: skip
BY_BATCH = "histoscope/batchtopk_tied"
CASES = sorted(str(file.parent.relative_to(HERE)) for file in HERE.glob("*/*/expected.npz"))
READABLE = [case for case in CASES if case not in REFUSED and case != BY_BATCH]
SAME = {"rtol": 1e-5, "atol": 1e-5}


def opened(case: str) -> bs.sae.SAE:
    return bs.sae.read(HERE / case, device="cpu", **arguments(case))


def arguments(case: str) -> dict:
    return MISSING.get(case, {"k": 4} if case.startswith("overcomplete") else {})


def expected(case: str) -> dict[str, np.ndarray]:
    return dict(np.load(HERE / case / "expected.npz"))


def copied(case: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(HERE / case, tmp_path / "copy"))


def outputs(sae: bs.sae.SAE, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    z = sae.codes(x)
    return z.toarray(), sae.inverse_transform(z, like=x)


def form(path: Path) -> dict[str, tuple]:
    """Names, shapes and types of what a file holds."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
    else:
        raw = path.read_bytes()
        tensors = torch.load(io.BytesIO(raw[raw.index(b"\n") + 1 :] if raw[:1] == b"{" else raw), weights_only=True)
    return {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}


# ------------------------------------------------------------------------------------------------------------- reading


def test_there_are_files_of_every_format():
    families = {case.split("/")[0].rstrip("0123456789") for case in READABLE}
    assert families == set(FORMATS)
    assert sum(f.stat().st_size for f in HERE.rglob("*") if f.is_file()) < 2**20


@pytest.mark.parametrize("case", READABLE)
def test_codes_and_reconstructions_are_the_librarys_own(case):
    sae, want = opened(case), expected(case)
    codes, x_hat = outputs(sae, want["x"])
    np.testing.assert_allclose(codes, want["codes"], **SAME)
    np.testing.assert_allclose(x_hat, want["x_hat"], **SAME)
    assert (codes != 0).any() and not np.allclose(x_hat, sae.bias_)


@pytest.mark.parametrize("case", READABLE)
def test_the_record_says_where_it_comes_from_and_nothing_that_is_not_known(case):
    sae = opened(case)
    origin = sae.provenance_["read_from"]
    assert origin["format"] == case.split("/")[0].rstrip("0123456789")
    assert sae.identity_ is None and sae.fingerprint_ is None and sae.metrics_ == {} and sae.n_steps_ == 0
    assert np.isnan(sae.density_).all() and sae.density_.shape == (16,)
    with pytest.raises(InputError, match="not recorded"):
        sae.trained_on(["patient 1"])


@pytest.mark.parametrize("case", [c for c in READABLE if any(part in c for part in ("/topk", "ated", "purs", "norm"))])
def test_a_read_sae_survives_our_own_folder(case, tmp_path):
    sae, x = opened(case), expected(case)["x"]
    sae.save(tmp_path)
    again = bs.sae.load(tmp_path, device="cpu")
    for one, two in zip(outputs(sae, x), outputs(again, x), strict=True):
        np.testing.assert_array_equal(one, two)
    assert again.provenance_ == json.loads(json.dumps(sae.provenance_))
    assert np.isfinite(again.evaluate(x)["fvu"])


def test_a_read_sae_is_like_any_other(tmp_path):
    sae, x = opened("saelens/topk"), np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    assert bs.sae.stability([sae, opened("saelens/jumprelu")]).n_dead == (0, 0)
    latents = bs.encode(sae, bs.Embeddings.from_array(x))
    np.testing.assert_allclose(latents.X.toarray(), sae.codes(x).toarray())
    for twin in (pickle.loads(pickle.dumps(sae)), copy.deepcopy(sae)):  # noqa: S301 our own bytes
        np.testing.assert_array_equal(twin.codes(x).toarray(), sae.codes(x).toarray())
    before = sae.evaluate(x)["fvu"]
    for _ in range(5):  # training goes on from the weights that were read
        sae.partial_fit(x)
    assert sae.evaluate(x)["fvu"] < before and np.isfinite(sae.density_).all()


def test_versions_and_licences_are_kept(tmp_path):
    assert opened("saelens/topk").provenance_["read_from"]["library_version"] == "6.54.12"
    assert opened("saelens3/topk").provenance_["read_from"]["library_version"] == "3.22.2"
    assert opened("saelens5/topk").provenance_["read_from"]["library_version"] == "5.11.0"
    folder = copied("sparsify/topk", tmp_path)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: cc-by-nc-4.0\n---\nlicense: not this one\n")
    assert bs.sae.read(folder).provenance_["read_from"]["licence"] == "cc-by-nc-4.0"
    assert opened("sparsify/topk").provenance_["read_from"]["licence"] is None


def test_architecture_k_and_levels_are_carried_over():
    for case, architecture, k in (
        ("saelens/matryoshka_inference", "matryoshka", 4), ("saelens/batchtopk_inference", "batchtopk", 4),
        ("saelens3/topk", "topk", 4), ("dictionary_learning/MatryoshkaBatchTopKSAE", "matryoshka", 4),
        ("saev/schema5_topk_all", "topk_signed", 12), ("sail/tied", "matryoshka", 4),
    ):  # fmt: skip
        sae = opened(case)
        assert (sae.architecture, sae.k_, sae.n_latents_, sae.n_features_in_) == (architecture, k, 16, 8)
    for case in ("saelens/matryoshka_training", "dictionary_learning/MatryoshkaBatchTopKSAE", "sail/untied"):
        assert tuple(opened(case)._model.ends) == (4, 8, 16)


def test_sail_codes_are_shrunken_by_its_threshold():
    state = torch.load(HERE / "sail/tied/last.ckpt", weights_only=True)["state_dict"]
    x = expected("sail/tied")["x"]
    a = (torch.from_numpy(x) - state["model.bias"]) @ state["model.encoder.weight"].T + state["model.encoder.bias"]
    codes = torch.relu(a - state["model.inference_threshold"]).numpy()
    np.testing.assert_allclose(opened("sail/tied").codes(x).toarray(), codes, atol=1e-6)


def test_saev_subtracts_the_bias_in_its_release_and_not_later():
    raw = (HERE / "saev/release/sae.pt").read_bytes()
    state = torch.load(io.BytesIO(raw[raw.index(b"\n") + 1 :]), weights_only=True)
    x = torch.from_numpy(expected("saev/release")["x"])
    with_bias = torch.relu((x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]).numpy()
    without = torch.relu(x @ state["W_enc"] + state["b_enc"]).numpy()
    np.testing.assert_allclose(opened("saev/release").codes(x.numpy()).toarray(), with_bias, atol=1e-5)
    assert np.abs(with_bias - without).max() > 0.1


def headed(tmp_path: Path, header: dict) -> Path:
    """The weights of the release of saev behind another header."""
    raw = (HERE / "saev/release/sae.pt").read_bytes()
    file = tmp_path / "sae.pt"
    file.write_bytes(json.dumps(header).encode() + raw[raw.index(b"\n") :])
    return file


def test_older_headers_of_saev(tmp_path):
    x, codes = expected("saev/release")["x"], expected("saev/release")["codes"]
    cfg = {"d_vit": 8, "exp_factor": 2}
    one = bs.sae.read(headed(tmp_path, {"schema": 1, "cls": "Relu", "cfg": cfg}))
    np.testing.assert_allclose(one.codes(x).toarray(), codes, **SAME)
    by_class = bs.sae.read(headed(tmp_path, {"schema": 1, "cls": "TopK", "cfg": {**cfg, "top_k": 3}}))
    assert (by_class.architecture, by_class.k_) == ("topk_signed", 3)
    two = {"schema": 2, "cfg": {**cfg, "activation": {"cls": "BatchTopK", "params": {"top_k": 5}}}}
    of_rows = bs.sae.read(headed(tmp_path, two))
    assert (np.diff(of_rows.codes(x).indptr) == 5).all()
    with pytest.raises(FormatError, match=r"schema 6.*update biosae"):
        bs.sae.read(headed(tmp_path, {"schema": 6, "cfg": cfg}))


def test_logarithms_of_thresholds_in_older_saelens(tmp_path):
    folder = copied("saelens/jumprelu", tmp_path)
    file = folder / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors["log_threshold"] = tensors.pop("threshold").log()
    save_file(tensors, file)
    want = expected("saelens/jumprelu")
    np.testing.assert_allclose(bs.sae.read(folder).codes(want["x"]).toarray(), want["codes"], **SAME)


def test_scale_of_rows_that_saelens_did_not_store(tmp_path):
    folder, want = copied("saelens/expected_average", tmp_path), expected("saelens/expected_average")
    (folder / "activation_scaler.json").unlink()
    with pytest.warns(UserWarning, match="does not hold"):
        unscaled = bs.sae.read(folder)
    np.testing.assert_allclose(unscaled.codes(0.7 * want["x"]).toarray(), want["codes"], **SAME)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled = bs.sae.read(folder, scale=0.7)
    np.testing.assert_allclose(scaled.codes(want["x"]).toarray(), want["codes"], **SAME)
    with pytest.raises(InputError, match="scale"):
        bs.sae.read(HERE / "saelens/topk", scale=2.0)


def test_a_closed_threshold_is_the_open_one_below_it():
    t = np.float32(0.4)
    assert np.float32(below(t)) < t and np.nextafter(np.float32(below(t)), np.float32(1)) == t


def test_rows_of_histoscope_of_unit_length(tmp_path):
    folder, want = copied("histoscope/topk_tied", tmp_path), expected("histoscope/topk_tied")
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["dataset_args"]["l2_normalize"] = True
    (folder / "metadata.json").write_text(json.dumps(metadata))
    sae, x = bs.sae.read(folder), 3 * want["x"]
    np.testing.assert_allclose(sae.codes(x).toarray(), want["codes"], **SAME)
    np.testing.assert_allclose(sae.inverse_transform(sae.codes(x), like=x), 3 * want["x_hat"], **SAME)
    metadata["dataset_args"]["zscore"] = True
    (folder / "metadata.json").write_text(json.dumps(metadata))
    assert "emb_stats.pt" in bs.sae.read(folder).provenance_["read_from"]["notes"][0]


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("case", "why"), REFUSED.items())
def test_what_has_no_counterpart_is_refused_with_the_reason(case, why):
    with pytest.raises(FormatError, match=why):
        bs.sae.read(HERE / case, **arguments(case))


def test_codes_that_depend_on_other_rows_need_a_threshold():
    with pytest.raises(InputError, match="threshold"):
        bs.sae.read(HERE / BY_BATCH)
    assert bs.sae.read(HERE / BY_BATCH, threshold=0.1).architecture == "batchtopk"


def test_what_a_state_dict_of_overcomplete_lacks_is_asked_for():
    for case, why in (
        ("overcomplete/topk", "Pass k="), ("overcomplete/matching_pursuit", "architecture='mp'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=why):
            bs.sae.read(HERE / case)
    with pytest.raises(InputError, match="running_threshold"):
        bs.sae.read(HERE / "overcomplete/batchtopk", architecture="batchtopk")
    with pytest.raises(FormatError, match="thresholds"):  # of another class than the one named
        bs.sae.read(HERE / "overcomplete/jumprelu", architecture="relu")


def test_arguments_of_read():
    with pytest.raises(InputError, match="did you mean 'saelens'"):
        bs.sae.read(HERE / "saelens/topk", format="saelense")
    with pytest.raises(InputError, match="does not take 'k'"):
        bs.sae.read(HERE / "saelens/topk", k=3)
    for wrong in ({"k": 0}, {"k": "4"}, {"k": True}, {"threshold": float("nan")}, {"architecture": 3}):
        with pytest.raises(InputError, match="makes no sense"):
            bs.sae.read(HERE / "overcomplete/topk", **wrong)
    with pytest.raises(FormatError, match="does not exist"):
        bs.sae.read(HERE / "nothing")


def test_formats_are_found_by_folder_and_by_file(tmp_path):
    for case in READABLE:
        assert detect(HERE / case) == case.split("/")[0].rstrip("0123456789")
    for case, file in (
        ("dictionary_learning/GatedAutoEncoder", "ae.pt"), ("sail/tied", "last.ckpt"), ("overcomplete/topk", "sae.pt"),
        ("saev/release", "sae.pt"), ("dictionary_learning/JumpReluAutoEncoder", "ae.pt"),
    ):  # fmt: skip
        renamed = tmp_path / f"any{Path(file).suffix}"
        shutil.copy(HERE / case / file, renamed)
        assert detect(renamed) == case.split("/")[0]
        want = expected(case)
        codes = bs.sae.read(renamed, **arguments(case)).codes(want["x"]).toarray()
        np.testing.assert_allclose(codes, want["codes"], **SAME)
    assert detect(HERE / "sparsify/topk/sae.safetensors") == "sparsify"
    with pytest.raises(FormatError, match="no checkpoint that is known"):
        detect(HERE)
    opened("saelens/topk").save(tmp_path / "own")
    with pytest.raises(FormatError, match=r"biosae\.sae\.load"):
        bs.sae.read(tmp_path / "own")


def test_topk_or_batchtopk_of_dictionary_learning_needs_its_configuration(tmp_path):
    shutil.copy(HERE / "dictionary_learning/BatchTopKSAE/ae.pt", tmp_path / "ae.pt")
    with pytest.raises(FormatError, match=r"config\.json"):
        bs.sae.read(tmp_path)


# ------------------------------------------------------------------------------------------- damaged and hostile files


class Runs:
    """Pickles to a call."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_code_in_a_pickle_is_not_run(tmp_path):
    target = tmp_path / "was_run"
    cases = ("sail/tied", "dictionary_learning/AutoEncoder", "overcomplete/topk", "saev/release")
    for number, case in enumerate(cases):
        folder = Path(shutil.copytree(HERE / case, tmp_path / str(number)))
        file = next(f for f in folder.iterdir() if f.suffix in (".pt", ".ckpt"))
        raw = file.read_bytes()
        header = raw[: raw.index(b"\n") + 1] if case.startswith("saev") else b""
        stream = io.BytesIO()
        torch.save({"state_dict": Runs(target), "W_enc": Runs(target)}, stream)
        for payload in (stream.getvalue(), pickle.dumps(Runs(target))):
            file.write_bytes(header + payload)
            with pytest.raises(FormatError, match="never loaded here"):
                bs.sae.read(folder, **arguments(case))
    assert not target.exists()


def test_a_whole_model_is_refused_with_what_to_do(tmp_path):
    torch.save(torch.nn.Linear(8, 16), tmp_path / "sae.pt")
    with pytest.raises(FormatError, match=r"state_dict\(\)"):
        bs.sae.read(tmp_path)


def test_tensors_that_claim_more_than_the_file_holds(tmp_path):
    folder = copied("dictionary_learning/JumpReluAutoEncoder", tmp_path)
    state = torch.load(folder / "ae.pt", weights_only=True)
    state["W_dec"] = torch.zeros(1).expand(10**7, 8)  # 320 MB of one stored number
    state["W_enc"] = torch.zeros(1).expand(8, 10**7)
    torch.save(state, folder / "ae.pt")
    with pytest.raises(FormatError, match="claims"):
        bs.sae.read(folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.pop("b_dec"), "no tensor 'b_dec'"),
        (lambda t: t.update(b_enc=torch.zeros(15)), "shape"),
        (lambda t: t.update(W_enc=t["W_enc"].T.contiguous()), "shape"),
        (lambda t: t["W_dec"].fill_(torch.nan), "NaN or infinity"),
        (lambda t: t.update(more=torch.zeros(3)), "does not know"),
        (lambda t: t.update(b_enc=torch.zeros(16, dtype=torch.complex64)), "holds no weights"),
    ],
)
def test_tensors_that_are_wrong(change, why, tmp_path):
    folder = copied("saelens/standard", tmp_path)
    tensors = load_file(folder / "sae_weights.safetensors")
    change(tensors)
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(FormatError, match=why):
        bs.sae.read(folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"d_in": 9}, "shape"), ({"d_sae": -1}, "whole number"), ({"d_in": "8"}, "whole number"),
        ({"k": 17}, "between 1 and the 16"), ({"k": 0}, "whole number"), ({"k": True}, "whole number"),
        ({"architecture": "mixture"}, "not known"), ({"normalize_activations": "power"}, "not known"),
        ({"activation_fn": "tanh-relu"}, "no counterpart"), ({"architecture": ["topk"]}, "wrong type"),
    ],
)  # fmt: skip
def test_configurations_that_are_wrong(change, why, tmp_path):
    folder = copied("saelens/topk", tmp_path)
    cfg = json.loads((folder / "cfg.json").read_text()) | change
    (folder / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(FormatError, match=why):
        bs.sae.read(folder)


def test_json_that_is_no_configuration(tmp_path):
    folder = copied("sparsify/topk", tmp_path)
    for text, why in (
        ("[1, 2]", "JSON object"), ("{", "not valid JSON"), ("[" * 100_000, "JSON"),
        (" " * (LARGEST_CONFIG + 1), "large"),
    ):  # fmt: skip
        (folder / "cfg.json").write_text(text)
        with pytest.raises(FormatError, match=why):
            bs.sae.read(folder)


FUZZED = [
    ("saelens/topk", "cfg.json"), ("saelens/jumprelu", "sae_weights.safetensors"), ("sparsify/topk", "sae.safetensors"),
    ("dictionary_learning/BatchTopKSAE", "ae.pt"), ("dictionary_learning/BatchTopKSAE", "config.json"),
    ("overcomplete/topk", "sae.pt"), ("saev/schema5_batchtopk", "sae.pt"), ("histoscope/topk_tied", "metadata.json"),
    ("sail/tied", "last.ckpt"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "name"), FUZZED)
@hypothesis_settings(max_examples=25)
@given(data=st.data())
def test_a_damaged_file_gives_an_error_of_ours_or_a_readable_sae(case, name, data, tmp_path_factory):
    folder = Path(shutil.copytree(HERE / case, tmp_path_factory.mktemp("fuzz") / "case"))
    raw = bytearray((folder / name).read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    for _ in range(data.draw(st.integers(1, 8))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sae = bs.sae.read(folder, device="cpu", **arguments(case))
        except (FormatError, InputError):
            return
    assert sae.codes(expected(case)["x"]).shape[1] == sae.n_latents_


ANY = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({"k": {}}),
    st.just([1, "2"]), st.just(10**400),
)  # fmt: skip


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("saelens/batchtopk_training", "cfg.json"), ("saelens3/topk", "cfg.json"), ("sparsify/topk", "cfg.json"),
        ("saelens/matching_pursuit", "cfg.json"), ("saelens/expected_average", "activation_scaler.json"),
        ("dictionary_learning/MatryoshkaBatchTopKSAE", "config.json"), ("histoscope/topk_tied", "metadata.json"),
        ("saev/schema5_batchtopk", "sae.pt"),
    ],
)  # fmt: skip
@hypothesis_settings(max_examples=40)
@given(data=st.data())
def test_a_configuration_of_other_types_gives_an_error_of_ours_or_a_readable_sae(case, name, data, tmp_path_factory):
    folder = Path(shutil.copytree(HERE / case, tmp_path_factory.mktemp("fuzz") / "case"))
    head, _, rest = (folder / name).read_bytes().partition(b"\n" if name == "sae.pt" else b"\0")
    config = json.loads(head)
    place = config
    for _ in range(3):
        inner = [key for key, value in place.items() if isinstance(value, dict) and value]
        if inner and data.draw(st.booleans()):
            place = place[data.draw(st.sampled_from(inner))]
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(ANY)
    (folder / name).write_bytes(json.dumps(config).encode() + (b"\n" + rest if rest else b""))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sae = bs.sae.read(folder, device="cpu", format=case.split("/")[0].rstrip("0123456789"))
        except (FormatError, InputError):
            return
    assert sae.codes(expected(case)["x"]).shape == (12, 16)


def test_a_zip_whose_members_are_gone(tmp_path):
    folder = copied("overcomplete/topk", tmp_path)
    with zipfile.ZipFile(folder / "sae.pt", "w") as archive:
        archive.writestr("archive/version", "3")
    with pytest.raises(FormatError):
        bs.sae.read(folder, k=4)


# ------------------------------------------------------------------------------------------------------------- writing

WRITTEN = [
    ("saelens", "saelens/standard"), ("saelens", "saelens/topk_rescaled"), ("saelens", "saelens/jumprelu"),
    ("saelens", "saelens/gated_without_prebias"), ("saelens", "saelens/abstopk"),
    ("saelens", "saelens/matching_pursuit"),
    ("saelens", "saelens/standard_layer_norm"), ("saelens", "saelens/standard_constant_norm_rescale"),
    ("saelens", "saelens/matryoshka_training"), ("saelens", "sail/tied"), ("saelens", "saev/schema5_batchtopk"),
    ("saelens", "overcomplete/jumprelu"), ("dictionary_learning", "dictionary_learning/AutoEncoder"),
    ("dictionary_learning", "dictionary_learning/AutoEncoderNew"), ("dictionary_learning", "saelens/gated"),
    ("dictionary_learning", "dictionary_learning/JumpReluAutoEncoder"), ("dictionary_learning", "sparsify/topk"),
    ("dictionary_learning", "dictionary_learning/BatchTopKSAE"), ("dictionary_learning", "saelens/matryoshka_training"),
    ("sparsify", "sparsify/topk"), ("sparsify", "saelens/whitened"), ("overcomplete", "overcomplete/relu"),
    ("overcomplete", "overcomplete/topk_tied"), ("overcomplete", "overcomplete/batchtopk"),
    ("overcomplete", "overcomplete/jumprelu"), ("saev", "saev/schema5_topk_all"), ("saev", "saev/schema5_batchtopk"),
    ("saev", "saev/release"),
]  # fmt: skip


SAELENS = ("standard", "topk", "jumprelu", "gated", "abstopk", "matching_pursuit")
DICTIONARY_LEARNING = (
    "AutoEncoder", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)  # fmt: skip


@pytest.mark.parametrize(("format", "case"), WRITTEN)
def test_what_is_written_reads_back_with_the_same_codes(format, case, tmp_path):
    sae, x = opened(case), expected(case)["x"]
    bs.sae.write(sae, tmp_path, format=format)
    missing = {}
    if format == "overcomplete":
        config = json.loads((tmp_path / "config.json").read_text())
        missing = {"architecture": {"SAE": "relu", "TopKSAE": "topk", "BatchTopKSAE": "batchtopk"}.get(config["class"])}
        missing |= {"k": config.get("top_k"), "threshold": config.get("running_threshold")}
    again = bs.sae.read(tmp_path, device="cpu", format=format, **missing)
    for one, two in zip(outputs(sae, x), outputs(again, x), strict=True):
        np.testing.assert_allclose(two, one, **SAME)
    assert detect(tmp_path) == format


@pytest.mark.parametrize(
    ("format", "case", "name"),
    [
        *(("saelens", f"saelens/{kind}", "sae_weights.safetensors") for kind in SAELENS),
        *(("dictionary_learning", f"dictionary_learning/{kind}", "ae.pt") for kind in DICTIONARY_LEARNING),
        ("sparsify", "sparsify/topk", "sae.safetensors"),
        ("overcomplete", "overcomplete/relu", "sae.pt"), ("overcomplete", "overcomplete/jumprelu", "sae.pt"),
        ("saev", "saev/schema5_relu", "sae.pt"), ("saev", "saev/schema5_topk", "sae.pt"),
        ("saev", "saev/schema5_batchtopk", "sae.pt"),
    ],
)  # fmt: skip
def test_files_have_the_layout_of_those_that_the_library_wrote(format, case, name, tmp_path):
    bs.sae.write(opened(case), tmp_path, format=format)
    assert form(tmp_path / name) == form(HERE / case / name)
    if name == "sae.pt" and format == "saev":
        ours, theirs = (json.loads(p.read_bytes().split(b"\n")[0]) for p in (tmp_path / name, HERE / case / name))
        assert ours.keys() == theirs.keys() and ours["cfg"].keys() == theirs["cfg"].keys()
    for config in ("cfg.json", "config.json"):
        if (HERE / case / config).is_file():
            ours, theirs = (json.loads((folder / config).read_text()) for folder in (tmp_path, HERE / case))
            if format == "dictionary_learning":
                ours, theirs = ours["trainer"], theirs["trainer"]
                assert ours.pop("written_by") == "biosae" and ours.items() <= theirs.items()
            else:
                ours.get("metadata", {}).clear(), theirs.get("metadata", {}).clear()
                assert ours.keys() == theirs.keys()
                assert {k: v for k, v in ours.items() if k != "expansion_factor"}.items() <= theirs.items()


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "relu", "gated", "abstopk", "topk_signed"])
def test_our_own_scalings_are_folded_into_what_is_written(architecture, tmp_path):
    x = (np.random.default_rng(0).normal(size=(64, 8)) * np.arange(1, 9) + 3).astype(np.float32)
    for normalise in ("centre_scale", "whiten"):
        sae = bs.sae.SAE(architecture, 16, 4, normalise=normalise, n_steps=2, device="cpu", random_state=0).fit(x)
        format = "saev" if architecture == "topk_signed" else "saelens"
        bs.sae.write(sae, tmp_path, format=format)
        for one, two in zip(outputs(sae, x), outputs(bs.sae.read(tmp_path, device="cpu"), x), strict=True):
            np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-4)  # rows are of size 30


def test_what_cannot_be_written_is_refused_with_the_reason(tmp_path):
    for format, case, why in (
        ("sparsify", "saelens/jumprelu", "top-k"), ("sparsify", "saelens/topk_layer_norm", "rows scaled one by one"),
        ("overcomplete", "saelens/topk", "bias"), ("saev", "saelens/jumprelu", "no counterpart"),
        ("dictionary_learning", "saelens/abstopk", "no counterpart"),
        ("saelens", "saev/schema5_topk", "negative codes"),
        ("dictionary_learning", "saelens/standard_layer_norm", "scale of their own"),
        ("saelens", "overcomplete/matching_pursuit", "positive"),
        ("saelens", "overcomplete/orthogonal_matching_pursuit", "omp"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=why):
            bs.sae.write(opened(case), tmp_path, format=format)
    sae = opened("saelens/topk")
    with pytest.raises(InputError, match="cannot be written"):
        bs.sae.write(sae, tmp_path, format="histoscope")
    with pytest.raises(InputError, match="only an SAE"):
        bs.sae.write(object(), tmp_path, format="saelens")
    with pytest.raises(NotFittedError):
        bs.sae.write(bs.sae.SAE(), tmp_path, format="saelens")
    with pytest.warns(UserWarning, match="negative"):
        bs.sae.write(sae, tmp_path, format="saev")


# --------------------------------------------------------------------------------------------------------- topk_signed


def test_topk_signed_keeps_the_largest_whatever_their_sign():
    a = torch.tensor([[3.0, -1.0, 2.0, -2.0], [-4.0, -1.0, -3.0, -1.0]])
    assert topk_signed(a, 2).tolist() == [[3.0, 0.0, 2.0, 0.0], [0.0, -1.0, 0.0, -1.0]]


def test_topk_signed_learns_what_topk_learns():
    truth = bs.sae.planted("sparse", n_rows=1024, d=16, n_atoms=24, k=3, random_state=0)
    found = {}
    for name in ("topk", "topk_signed"):
        sae = bs.sae.SAE(name, 32, 3, n_steps=300, device="cpu", random_state=0)
        found[name] = sae.fit(truth.rows).metrics_["fvu"]
    assert found["topk_signed"] < 0.3 and abs(found["topk_signed"] - found["topk"]) < 0.05
