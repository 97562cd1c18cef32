"""Checkpoints of other libraries, written by those libraries, with inputs, codes and reconstructions: see README.md.

Run once for each library, in an environment that has it: ``python make.py saelens OUT``. Weights are random numbers of
this script, of d = 8 features and m = 16 latents.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

D, M, K, ROWS = 8, 16, 4, 12
LEVELS = [4, 8, 16]
SHARES = [0.25, 0.25, 0.5]


def numbers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def fill(parameters: dict[str, torch.Tensor], seed: int = 0) -> None:
    """Random values by name: atoms of lengths between 0.5 and 2, encoders near them, thresholds above 0."""
    for i, (name, tensor) in enumerate(sorted(parameters.items())):
        value = numbers(tuple(tensor.shape), 100 * seed + i)
        if "thresholds" in name:  # their logarithms
            value = -1 + 0.3 * value
        elif "threshold" in name:
            value = 0.3 + 0.2 * value.abs()
        elif tensor.ndim == 1:
            value = 0.3 * value
        elif tensor.ndim == 2:
            value = value / D**0.5
        tensor.data.copy_(value)


def rows(seed: int = 1) -> torch.Tensor:
    return 1.5 * numbers((ROWS, D), seed) + 0.5


def keep(folder: Path, x: torch.Tensor, codes: torch.Tensor, x_hat: torch.Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"x": x, "codes": codes, "x_hat": x_hat}
    np.savez_compressed(folder / "expected.npz", **{n: v.detach().float().numpy() for n, v in arrays.items()})
    print(folder, f"{(codes != 0).float().sum(1).mean():.1f} active")


# ------------------------------------------------------------------------------------------------------------ SAELens


def without_torchaudio() -> None:
    """A torchaudio of another CUDA keeps transformers, which SAELens imports, from being imported."""
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *a, **k: None if name.split(".")[0] == "torchaudio" else find(name, *a, **k)


def saelens(out: Path) -> None:
    without_torchaudio()
    import sae_lens
    from sae_lens import saes
    from sae_lens.training.activation_scaler import ActivationScaler

    out = out / "saelens"
    x = rows()

    def case(name: str, kind: str, *, save: str = "save_model", inputs: torch.Tensor = x, dtype=None, **settings):
        config = getattr(saes, f"{kind}Config")(d_in=D, d_sae=M, **({"dtype": dtype} if dtype else {}), **settings)
        sae = getattr(saes, kind)(config).eval()
        fill(dict(sae.named_parameters()) | dict(sae.named_buffers()))
        getattr(sae, save)(out / name)
        read = sae
        if "Training" not in kind or save == "save_inference_model":
            read = sae_lens.SAE.load_from_disk(out / name, dtype="float32")
        codes = read.encode(inputs)
        keep(out / name, inputs, codes, read.decode(codes))
        return sae

    case("standard", "StandardSAE")
    case("standard_without_prebias", "StandardSAE", apply_b_dec_to_input=False)
    case("standard_layer_norm", "StandardSAE", normalize_activations="layer_norm")
    case("standard_constant_norm_rescale", "StandardSAE", normalize_activations="constant_norm_rescale")
    case("standard_bfloat16", "StandardSAE", dtype="bfloat16")
    case("standard_float64", "StandardSAE", dtype="float64")
    case("topk", "TopKSAE", k=K)
    case("topk_rescaled", "TopKSAE", k=K, rescale_acts_by_decoder_norm=True)
    case("topk_layer_norm", "TopKSAE", k=K, normalize_activations="layer_norm", apply_b_dec_to_input=False)
    case("jumprelu", "JumpReLUSAE")
    case("gated", "GatedSAE")
    case("gated_without_prebias", "GatedSAE", apply_b_dec_to_input=False)
    case("abstopk", "AbsTopKSAE", k=K)
    case("abstopk_rescaled", "AbsTopKSAE", k=K, rescale_acts_by_decoder_norm=True)
    case("matching_pursuit", "MatchingPursuitSAE", residual_threshold=0.5, max_iterations=5)
    case("transcoder", "Transcoder", d_out=D, apply_b_dec_to_input=False)
    case("batchtopk_inference", "BatchTopKTrainingSAE", k=K, save="save_inference_model")
    case("topk_inference", "TopKTrainingSAE", k=K, save="save_inference_model")
    levels = {"k": K, "matryoshka_widths": list(LEVELS)}
    case("matryoshka_inference", "MatryoshkaBatchTopKTrainingSAE", save="save_inference_model", **levels)

    def training(name: str, kind: str, **settings) -> None:
        """A checkpoint of training: what it codes is what the library's own inference model of it codes."""
        sae = case(name, kind, **settings)
        sae.save_inference_model(out / "scratch")
        read = sae_lens.SAE.load_from_disk(out / "scratch")
        codes = read.encode(x)
        keep(out / name, x, codes, read.decode(codes))
        for file in (out / "scratch").iterdir():
            file.unlink()
        (out / "scratch").rmdir()

    training("batchtopk_training", "BatchTopKTrainingSAE", k=K)
    training("matryoshka_training", "MatryoshkaBatchTopKTrainingSAE", **levels)
    training("topk_training", "TopKTrainingSAE", k=K)

    # scaled and whitened training inputs: the factors lie beside the checkpoint; the rows given here are raw
    sae = case("expected_average", "JumpReLUSAE", normalize_activations="expected_average_only_in")
    scaler = ActivationScaler(scaling_factor=0.7)
    scaler.save(str(out / "expected_average" / "activation_scaler.json"))
    sae.fold_activation_norm_scaling_factor(0.7)
    codes = sae.encode(x)
    keep(out / "expected_average", x, codes, sae.decode(codes))
    for name, bias in (("whitened", True), ("whitened_without_prebias", False)):
        sae = case(name, "TopKSAE", k=K, normalize_activations="covariance_whitening", apply_b_dec_to_input=bias)
        scaler = ActivationScaler()
        scaler.estimate_whitening(D, iter([rows(s) for s in range(8)]), n_batches_for_norm_estimate=8)
        scaler.save(str(out / name / "activation_scaler.json"))
        white = scaler.whitening
        sae.fold_activation_whitening(white.mean, white.matrix, white.inverse_matrix)
        codes = sae.encode(x)
        keep(out / name, x, codes, sae.decode(codes))


def saelens_old(out: Path) -> None:
    """Releases before 6: one class for all architectures, other names in cfg.json."""
    without_torchaudio()
    import sae_lens
    from sae_lens.sae import SAE, SAEConfig

    major = sae_lens.__version__.split(".")[0]
    x = rows()

    def case(name: str, architecture: str, activation: str = "relu", **changes) -> None:
        settings = {
            "apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "context_size": 8, "model_name": "none",
            "hook_name": "none", "hook_layer": 0, "hook_head_index": None, "prepend_bos": False, "dataset_path": "",
            "dataset_trust_remote_code": False, "normalize_activations": "none", "dtype": "float32", "device": "cpu",
            "sae_lens_training_version": sae_lens.__version__, **changes,
        }  # fmt: skip
        config = SAEConfig(architecture=architecture, d_in=D, d_sae=M, activation_fn_str=activation, **settings)
        sae = SAE(config).eval()
        fill(dict(sae.named_parameters()))
        folder = out / f"saelens{major}" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        sae.save_model(str(folder))
        if name != "scaled":  # these releases cannot read their own files with a scaling factor
            sae = SAE.load_from_pretrained(str(folder))
        codes = sae.encode(x)
        keep(folder, x, codes, sae.decode(codes))

    case("standard", "standard")
    case("topk", "topk" if int(major) > 3 else "standard", "topk", activation_fn_kwargs={"k": K})
    case("jumprelu", "jumprelu")
    case("gated", "gated")
    case("scaled", "standard", finetuning_scaling_factor=True)


# ------------------------------------------------------------------------------------------------- dictionary_learning


def dictionary_learning(out: Path) -> None:
    import dictionary_learning.trainers as trainers
    from dictionary_learning.dictionary import AutoEncoderNew
    from dictionary_learning.training import trainSAE
    from dictionary_learning.utils import load_dictionary

    x = rows()
    common = {"activation_dim": D, "dict_size": M, "layer": 0, "lm_name": "none", "device": "cpu", "seed": 0}
    cases = {
        "AutoEncoder": ("StandardTrainer", {"steps": 10_000}),
        "AutoEncoder_april": ("StandardTrainerAprilUpdate", {"steps": 10_000}),
        "GatedAutoEncoder": ("GatedSAETrainer", {"steps": 10_000}),
        "JumpReluAutoEncoder": ("JumpReluTrainer", {"steps": 10_000}),
        "AutoEncoderTopK": ("TopKTrainer", {"steps": 10_000, "k": K}),
        "BatchTopKSAE": ("BatchTopKTrainer", {"steps": 10_000, "k": K}),
        "MatryoshkaBatchTopKSAE": ("MatryoshkaBatchTopKTrainer", {"steps": 10_000, "k": K, "group_fractions": SHARES}),
    }  # fmt: skip
    for name, (trainer, settings) in cases.items():
        base = find_trainer(trainers, trainer)

        class Filled(base):
            """The trainer, with our numbers in place of its first weights."""

            def __init__(self, *args, **kwargs) -> None:
                super().__init__(*args, **kwargs)
                tensors = dict(self.ae.named_parameters())
                if "threshold" in dict(self.ae.named_buffers()):
                    self.ae.threshold.fill_(0.4)
                fill(tensors)

        folder = out / "dictionary_learning" / name
        given = {**common, **settings, "trainer": Filled}
        trainSAE([x], [given], steps=0, save_dir=str(folder), device="cpu")
        for file in (folder / "trainer_0").iterdir():
            file.rename(folder / file.name)
        (folder / "trainer_0").rmdir()
        sae, _ = load_dictionary(str(folder), "cpu")
        codes = sae.encode(x)
        keep(folder, x, codes, sae.decode(codes))
    # no trainer of this release makes this class; the statements are those of trainSAE
    sae = AutoEncoderNew(D, M)
    fill(dict(sae.named_parameters()))
    folder = out / "dictionary_learning" / "AutoEncoderNew"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({name: value.cpu() for name, value in sae.state_dict().items()}, folder / "ae.pt")
    config = {"trainer": {"dict_class": "AutoEncoderNew", "activation_dim": D, "dict_size": M}}
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    sae, _ = load_dictionary(str(folder), "cpu")
    codes = sae.encode(x)
    keep(folder, x, codes, sae.decode(codes))


def find_trainer(package, name: str) -> type:
    import pkgutil

    for module in pkgutil.iter_modules(package.__path__):
        found = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), name, None)
        if found is not None:
            return found
    raise SystemExit(f"no trainer {name}")


# ------------------------------------------------------------------------------------------------------------ sparsify


def sparsify(out: Path) -> None:
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    x = rows()

    def case(name: str, *, dtype: torch.dtype = torch.float32, **settings) -> None:
        sae = SparseCoder(D, SparseCoderConfig(num_latents=M, k=K, **settings), dtype=dtype)
        fill(dict(sae.named_parameters()))
        if sae.cfg.normalize_decoder:
            sae.set_decoder_norm_to_unit_norm()
        folder = out / "sparsify" / name
        sae.save_to_disk(folder)
        sae = SparseCoder.load_from_disk(folder).float()
        values, index, _ = sae.encode(x)
        codes = torch.zeros(ROWS, M).scatter(1, index, values)
        keep(folder, x, codes, sae(x).sae_out)

    case("topk")
    case("topk_lengths", normalize_decoder=False)
    case("topk_bfloat16", dtype=torch.bfloat16)
    case("groupmax", activation="groupmax")
    case("transcoder", transcode=True)
    case("skip", skip_connection=True)


# -------------------------------------------------------------------------------------------------------- overcomplete


def overcomplete(out: Path) -> None:
    """The library has no format of its own: its users save the state dict, as torch recommends."""
    import overcomplete.sae as lib

    x = rows()

    def case(name: str, kind: str, *args, change=None, buffer=None, **settings) -> None:
        sae = getattr(lib, kind)(D, M, *args, **settings)
        if change:
            sae = change(sae)
        fill(dict(sae.named_parameters()))
        if kind.startswith("RA"):  # rows of W are shares
            sae.dictionary.W.data.abs_()
        if buffer is not None:
            sae.running_threshold = torch.tensor(buffer)
        sae.train()
        sae.get_dictionary()  # training normalises the stored atoms
        sae.eval()
        folder = out / "overcomplete" / name
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(sae.state_dict(), folder / "sae.pt")
        codes = sae.encode(x)[1]
        keep(folder, x, codes, sae.decode(codes))

    case("relu", "SAE")
    case("topk", "TopKSAE", K)
    case("topk_multiplier", "TopKSAE", K, dictionary_params={"normalization": "max_l2", "use_multiplier": True})
    case("topk_tied", "TopKSAE", K, change=lambda sae: sae.tied(bias=True))
    case("topk_untied", "TopKSAE", K, change=lambda sae: sae.untied(bias=False))
    case("topk_mlp", "TopKSAE", K, encoder_module="mlp_ln_3")
    case("batchtopk", "BatchTopKSAE", K, buffer=0.4)
    case("jumprelu", "JumpSAE")
    case("archetypal", "RATopKSAE", numbers((20, D), 5), K)
    case("archetypal_jumprelu", "RAJumpSAE", numbers((20, D), 5))
    case("matching_pursuit", "MpSAE", K)
    case("orthogonal_matching_pursuit", "OMPSAE", K)
    case("quantised", "QSAE")


# ---------------------------------------------------------------------------------------------------------------- saev


def saev(out: Path) -> None:
    """Release 0.1.0 of the package index."""
    from saev import config, nn

    x = rows()
    sae = nn.SparseAutoencoder(config.SparseAutoencoder(d_vit=D, exp_factor=M // D, n_reinit_samples=0))
    fill(dict(sae.named_parameters()))
    sae.normalize_w_dec()
    folder = out / "saev" / "release"
    nn.dump(str(folder / "sae.pt"), sae)
    x_hat, codes, _ = nn.load(str(folder / "sae.pt"))(x)
    keep(folder, x, codes, x_hat)


def saev_schema(out: Path) -> None:
    """The repository after its release: a header with a schema, no pre-bias, other activations."""
    from saev.nn import modeling as nn

    x = rows()
    kinds = {
        "relu": nn.Relu(), "topk": nn.TopK(top_k=K), "batchtopk": nn.BatchTopK(top_k=K), "topk_all": nn.TopK(top_k=12),
    }  # fmt: skip
    for name, activation in kinds.items():
        sae = nn.SparseAutoencoder(nn.SparseAutoencoderConfig(d_model=D, d_sae=M, activation=activation))
        fill(dict(sae.named_parameters()))
        if name == "batchtopk":
            sae.activation.threshold.fill_(0.4)
        sae.normalize_w_dec()
        folder = out / "saev" / f"schema{nn.SCHEMA_VERSION}_{name}"
        nn.dump(folder / "sae.pt", sae)
        done = nn.load(folder / "sae.pt").eval()(x)
        keep(folder, x, done.f_x, done.x_hats[:, -1])


# ------------------------------------------------------------------------------------------- two studies, from sources


def histoscope(out: Path, source: Path) -> None:
    """``source``: a checkout; only the model class is executed, the rest of that script is a command line."""
    text = (source / "pipeline" / "simple_sae_spider.py").read_text()
    tree = ast.parse(text)
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    names = {"nn": torch.nn, "torch": torch, "F": torch.nn.functional}
    exec(compile(tree, "simple_sae_spider.py", "exec"), names)
    x = torch.nn.functional.normalize(rows())
    cases = {
        "topk_tied": {"tie_weights": True, "use_pre_bias": True, "activation": "topk", "topk_k": K},
        "topk_all_tied": {"tie_weights": True, "use_pre_bias": True, "activation": "topk", "topk_k": 12},
        "relu_untied": {"tie_weights": False, "use_pre_bias": False, "activation": "relu"},
        "batchtopk_tied": {"tie_weights": True, "use_pre_bias": True, "activation": "batchtopk", "topk_k": K},
    }
    for name, settings in cases.items():
        sae = names["SparseAutoEncoder"](D, M, **settings)
        fill(dict(sae.named_parameters()))
        folder = out / "histoscope" / name
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(sae.state_dict(), folder / "model.pt")
        metadata = {
            "hyperparameters": {"input_dim": D, "hidden_dim": M, "topk_k": None, **settings},
            "dataset_args": {"zscore": False, "l2_normalize": False},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata))
        x_hat, codes = sae(x)
        keep(folder, x, codes, x_hat)


def sail(out: Path, source: Path) -> None:
    """``source``: a checkout; the checkpoint is written by Lightning, as in that study."""
    sys.path.insert(0, str(source / "src"))
    import lightning
    from matryoshka_sae import MatryoshkaSAELightning

    x = torch.nn.functional.normalize(rows())
    for name, tied in (("tied", True), ("untied", False)):
        module = MatryoshkaSAELightning(D, LEVELS, tied_weights=tied, k_values=[1, 2, 4])
        fill(dict(module.model.named_parameters()))
        module.model.inference_threshold.fill_(0.2)
        module.model._threshold_sum.fill_(20.0)
        module.model._threshold_count.fill_(100)
        module.model._threshold_estimated = True
        module.eval()
        folder = out / "sail" / name
        folder.mkdir(parents=True, exist_ok=True)
        trainer = lightning.Trainer(
            logger=False, enable_checkpointing=False, accelerator="cpu", devices=1, enable_progress_bar=False
        )
        trainer.strategy.connect(module)
        trainer.save_checkpoint(folder / "last.ckpt", weights_only=True)
        x_hat, _, codes = module(x)
        keep(folder, x, codes[-1], x_hat)


LIBRARIES = {
    "saelens": saelens, "saelens_old": saelens_old, "dictionary_learning": dictionary_learning, "sparsify": sparsify,
    "overcomplete": overcomplete, "saev": saev, "saev_schema": saev_schema, "histoscope": histoscope, "sail": sail,
}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", type=Path, help="checkout of the repository, for histoscope and sail")
    given = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        LIBRARIES[given.library](given.out, *([given.source] if given.source else []))
