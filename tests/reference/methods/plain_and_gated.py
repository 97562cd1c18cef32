"""Numbers of other implementations for relu, gated, jumprelu, topk, batchtopk, matryoshka, abstopk and threshold.

    python plain_and_gated.py FOLDER

FOLDER holds ``sae.py`` of github.com/bartbussmann/BatchTopK (b9aab1c). The packages dictionary_learning 0.1.0, sae_lens
6.54.12 and overcomplete 0.3.0 (PyPI) must be importable. Weights and rows are random numbers drawn here from numpy.
Where their conventions differ from ours is said beside the numbers and in tests/test_sae_plain.py.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path

import numpy as np
import torch

# sae_lens imports language-model tools that import torchaudio, which is not needed here
torchaudio = types.ModuleType("torchaudio")
torchaudio.__spec__, torchaudio.__version__ = importlib.machinery.ModuleSpec("torchaudio", None), "0"
sys.modules["torchaudio"] = torchaudio
sys.path.insert(0, sys.argv[1])

import sae as bussmann  # noqa: E402  (bartbussmann/BatchTopK)
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew  # noqa: E402
from dictionary_learning.trainers.gdm import GatedSAETrainer  # noqa: E402
from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate  # noqa: E402
from dictionary_learning.trainers.top_k import TopKTrainer  # noqa: E402
from overcomplete.sae import jump_sae, kernels  # noqa: E402
from sae_lens.saes import abstopk_sae, jumprelu_sae  # noqa: E402

N, D, M, K, LAMBDA = 12, 6, 16, 3, 0.1
GROUPS = (4, 4, 8)
rng = np.random.default_rng(20_260)
draw = {
    "x": rng.normal(size=(N, D)), "W_enc": rng.normal(size=(M, D)) / D**0.5, "b_enc": 0.1 * rng.normal(size=M),
    "W_dec": rng.normal(size=(M, D)), "b_dec": 0.2 * rng.normal(size=D), "b_mag": 0.1 * rng.normal(size=M),
    "r_mag": 0.3 * rng.normal(size=M), "threshold": rng.uniform(0.1, 0.6, size=M),
}  # fmt: skip
draw["W_dec"] /= np.linalg.norm(draw["W_dec"], axis=1, keepdims=True)
draw["W_free"] = draw["W_dec"] * rng.uniform(0.3, 2, size=(M, 1))
draw = {name: value.astype(np.float32) for name, value in draw.items()}
T = {name: torch.from_numpy(value) for name, value in draw.items()}
out: dict[str, np.ndarray] = dict(draw)


def keep(name: str, value) -> None:
    out[name] = value.detach().numpy().astype(np.float32) if torch.is_tensor(value) else np.float32(value)


def put(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    parameter.data = value.clone()


def common(steps: int = 10) -> dict:
    return {
        "steps": steps, "activation_dim": D, "dict_size": M, "layer": 0, "lm_name": "none", "device": "cpu",
        "warmup_steps": 1,
    }  # fmt: skip


# gated ---------------------------------------------------------------------------------------------------------------
trainer = GatedSAETrainer(**common(), l1_penalty=LAMBDA, sparsity_warmup_steps=None)
ae = trainer.ae
for p, v in (
    (ae.encoder.weight, "W_enc"), (ae.decoder.weight, None), (ae.decoder_bias, "b_dec"), (ae.gate_bias, "b_enc"),
    (ae.mag_bias, "b_mag"), (ae.r_mag, "r_mag"),
):  # fmt: skip
    put(p, T["W_dec"].T if v is None else T[v])
loss = trainer.loss(T["x"], step=5)
loss.backward()
keep("gated.loss", loss)
keep("gated.codes", ae.encode(T["x"]))
keep("gated.x_hat", ae(T["x"]))
for name, p in (
    ("W_enc", ae.encoder.weight), ("b_dec", ae.decoder_bias), ("b_enc", ae.gate_bias), ("b_mag", ae.mag_bias),
    ("r_mag", ae.r_mag),
):  # fmt: skip
    keep(f"gated.by_{name}", p.grad)
keep("gated.by_W_dec", ae.decoder.weight.grad.T)

# relu, April update --------------------------------------------------------------------------------------------------
for kind, cls in (("april_pre_bias", AutoEncoder), ("april", AutoEncoderNew)):
    trainer = StandardTrainerAprilUpdate(**common(), dict_class=cls, l1_penalty=LAMBDA, sparsity_warmup_steps=None)
    ae = trainer.ae
    put(ae.encoder.weight, T["W_enc"])
    put(ae.encoder.bias, T["b_enc"])
    put(ae.decoder.weight, T["W_free"].T)
    bias = ae.bias if cls is AutoEncoder else ae.decoder.bias
    put(bias, T["b_dec"])
    loss = trainer.loss(T["x"], step=5)
    loss.backward()
    keep(f"{kind}.loss", loss)  # AutoEncoderNew: its codes are already times the norm, so the penalty is z ||d||^2
    keep(f"{kind}.codes", ae.encode(T["x"]))
    keep(f"{kind}.x_hat", ae(T["x"]))
    for name, grad in (
        ("W_enc", ae.encoder.weight.grad), ("b_enc", ae.encoder.bias.grad), ("W_dec", ae.decoder.weight.grad.T),
        ("b_dec", bias.grad),
    ):  # fmt: skip
        keep(f"{kind}.by_{name}", grad)

# jumprelu ------------------------------------------------------------------------------------------------------------
trainer = JumpReluTrainer(**common(), target_l0=K, sparsity_penalty=0.7, sparsity_warmup_steps=None, bandwidth=0.1)
ae = trainer.ae
for p, v in ((ae.W_enc, T["W_enc"].T), (ae.b_enc, T["b_enc"]), (ae.W_dec, T["W_dec"]), (ae.b_dec, T["b_dec"])):
    put(p, v)
put(ae.threshold, T["threshold"])
# its L0 is a step of z, not of a: the same numbers only where no a lies in (theta - eps / 2, theta]; such rows go
a = T["x"] @ ae.W_enc + ae.b_enc
between = ((a > ae.threshold - 0.051) & (a <= ae.threshold)).any(1)
rows = T["x"][~between]
loss = trainer.loss(rows, step=5)
loss.backward()
keep("jumprelu.x", rows)
keep("jumprelu.loss", loss)
keep("jumprelu.codes", ae.encode(rows))
for name, grad in (
    ("W_enc", ae.W_enc.grad.T), ("b_enc", ae.b_enc.grad), ("W_dec", ae.W_dec.grad), ("b_dec", ae.b_dec.grad),
    ("threshold", ae.threshold.grad),
):  # fmt: skip
    keep(f"jumprelu.by_{name}", grad)
for mode, scale in (("step", None), ("tanh", 4.0)):  # SAELens lays the window about a, as we do: all rows
    cfg = jumprelu_sae.JumpReLUTrainingSAEConfig(
        d_in=D, d_sae=M, jumprelu_bandwidth=0.3, jumprelu_sparsity_loss_mode=mode, l0_coefficient=0.05,
        apply_b_dec_to_input=True, jumprelu_tanh_scale=scale or 4.0, normalize_activations="none",
    )  # fmt: skip
    lens = jumprelu_sae.JumpReLUTrainingSAE(cfg)
    for p, v in ((lens.W_enc, T["W_enc"].T), (lens.b_enc, T["b_enc"]), (lens.W_dec, T["W_free"]),
                 (lens.b_dec, T["b_dec"]), (lens.threshold, T["threshold"])):  # fmt: skip
        put(p, v)
    step = jumprelu_sae.TrainStepInput(
        sae_in=T["x"], coefficients={"l0": 0.05}, dead_neuron_mask=None, n_training_steps=1, is_logging_step=False
    )
    found = lens.training_forward_pass(step)
    found.loss.backward()
    keep(f"lens_{mode}.loss", found.loss)
    keep(f"lens_{mode}.codes", found.feature_acts)
    for name, grad in (
        ("W_enc", lens.W_enc.grad.T), ("b_enc", lens.b_enc.grad), ("W_dec", lens.W_dec.grad),
        ("b_dec", lens.b_dec.grad), ("threshold", lens.threshold.grad),
    ):  # fmt: skip
        keep(f"lens_{mode}.by_{name}", grad)

# a >= theta (OverComplete) -------------------------------------------------------------------------------------------
a = (T["x"] @ T["W_enc"].T + T["b_enc"]).clone()
a[0, :4] = T["threshold"][:4]  # exactly on the threshold
a, theta = a.requires_grad_(True), T["threshold"].clone().requires_grad_(True)
z = jump_sae.jump_relu(a, theta, kernels.rectangle_kernel, 0.3)
weights = torch.from_numpy(rng.normal(size=(N, M)).astype(np.float32))
(z * weights).sum().backward()
keep("overcomplete.a", a)
keep("overcomplete.codes", z)
keep("overcomplete.weights", weights)
keep("overcomplete.by_a", a.grad)
keep("overcomplete.by_threshold", theta.grad)  # its kernel is divided by eps once more

# topk with AuxK (dictionary_learning) --------------------------------------------------------------------------------
trainer = TopKTrainer(**common(), k=K, auxk_alpha=0.25)
ae = trainer.ae
for p, v in ((ae.encoder.weight, T["W_enc"]), (ae.encoder.bias, T["b_enc"]), (ae.decoder.weight, T["W_dec"].T),
             (ae.b_dec, T["b_dec"])):  # fmt: skip
    put(p, v)
trainer.num_tokens_since_fired[:] = 10**8
trainer.top_k_aux = 2
fired = ae.encode(T["x"]).detach()
loss = trainer.loss(T["x"], step=0)  # takes those off the list that fire in this batch
keep("topk.dead", (trainer.num_tokens_since_fired >= 10**7).nonzero().squeeze(1))
loss.backward()
keep("topk.loss", loss)
keep("topk.codes", fired)
for name, grad in (
    ("W_enc", ae.encoder.weight.grad), ("b_enc", ae.encoder.bias.grad), ("W_dec", ae.decoder.weight.grad.T),
    ("b_dec", ae.b_dec.grad),
):  # fmt: skip
    keep(f"topk.by_{name}", grad)

# matryoshka ----------------------------------------------------------------------------------------------------------
trainer = MatryoshkaBatchTopKTrainer(**common(), k=K, group_fractions=[g / M for g in GROUPS], auxk_alpha=0.0)
ae = trainer.ae
for p, v in ((ae.W_enc, T["W_enc"].T), (ae.b_enc, T["b_enc"]), (ae.W_dec, T["W_dec"]), (ae.b_dec, T["b_dec"])):
    put(p, v)
loss = trainer.loss(T["x"], step=0)
loss.backward()
keep("matryoshka.loss", loss)  # sum over groups divided by the squared number of groups
keep("matryoshka.codes", ae.encode(T["x"], use_threshold=False))
for name, grad in (
    ("W_enc", ae.W_enc.grad.T), ("b_enc", ae.b_enc.grad), ("W_dec", ae.W_dec.grad), ("b_dec", ae.b_dec.grad),
):  # fmt: skip
    keep(f"matryoshka.by_{name}", grad)

# BatchTopK repository: no encoder bias in topk and batchtopk, errors averaged over the width -------------------------
cfg = {
    "seed": 0, "act_size": D, "dict_size": M, "device": "cpu", "dtype": torch.float32, "top_k": K, "top_k_aux": 2,
    "l1_coeff": 0.0, "aux_penalty": 0.0, "n_batches_to_dead": 10, "input_unit_norm": False, "bandwidth": 0.3,
}  # fmt: skip
for name, cls, l1 in (
    ("topk", bussmann.TopKSAE, 0.0), ("batchtopk", bussmann.BatchTopKSAE, 0.0), ("relu", bussmann.VanillaSAE, 0.02),
):  # fmt: skip
    model = cls(cfg | {"l1_coeff": l1})
    for p, v in ((model.W_enc, T["W_enc"].T), (model.b_enc, T["b_enc"]), (model.W_dec, T["W_dec"]),
                 (model.b_dec, T["b_dec"])):  # fmt: skip
        put(p, v)
    found = model(T["x"])
    found["loss"].backward()
    keep(f"bussmann_{name}.loss", found["loss"])
    keep(f"bussmann_{name}.codes", found["feature_acts"])
    keep(f"bussmann_{name}.x_hat", found["sae_out"])
    for grad_name, grad in (("W_enc", model.W_enc.grad.T), ("W_dec", model.W_dec.grad), ("b_dec", model.b_dec.grad)):
        keep(f"bussmann_{name}.by_{grad_name}", grad)
    if name == "relu":
        keep("bussmann_relu.by_b_enc", model.b_enc.grad)

# abstopk -------------------------------------------------------------------------------------------------------------
a = ((T["x"] - T["b_dec"]) @ T["W_enc"].T + T["b_enc"]).requires_grad_(True)
z = abstopk_sae.AbsTopK(K)(a)
(z * weights).sum().backward()
keep("abstopk.codes", z)
keep("abstopk.by_a", a.grad)

np.savez(Path(__file__).with_suffix(".npz"), **out)
print(len(out), "arrays")
