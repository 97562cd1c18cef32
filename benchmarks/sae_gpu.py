"""The sparse training step in Triton against dense autograd in plain torch, on a CUDA device.

First the kernels are compared with the dense form in float64 on the device, and a step is run with every wait for the
device forbidden. Then each method trains from the same start on the same batches, alternated in one process, and is
timed with the device's own clock. "product share" is the rate of the one dense product that no method can do without
(2 n m d operations for the scores) over the whole step, as a share of the device's measured rate of bfloat16 products.

    python benchmarks/sae_gpu.py                                        # d 1024, m 32768, k 64
    python benchmarks/sae_gpu.py --width 1536 --latents 131072 --out gpu.json

Speed on a GPU has not been measured in this project so far: no machine with a GPU was at hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F

from biosae.files import atomic_path
from biosae.sae.kernels import triton_cuda as tc
from biosae.sae.kernels.codes import Codes

RATE, BETAS, EPS, CLIP = 1e-4, (0.9, 0.999), 6.25e-10, 1.0


def start(width: int, n_latents: int, *, device: torch.device) -> dict[str, torch.Tensor]:
    """Parameters: unit atoms, encoder rows equal to them, biases zero."""
    generator = torch.Generator(device).manual_seed(0)
    atoms = F.normalize(torch.randn(n_latents, width, generator=generator, device=device), dim=1)
    return {
        "W_dec": atoms,
        "W_enc": atoms.clone(),
        "b_enc": torch.zeros(n_latents, device=device),
        "b_dec": torch.zeros(width, device=device),
    }


def planted(n: int, width: int, *, device: torch.device, seed: int) -> torch.Tensor:
    """Rows made of 32 of 2 d directions, of which low numbers are frequent (as 1 / sqrt(rank)), and noise; (n, d)."""
    generator = torch.Generator(device).manual_seed(1)
    atoms = F.normalize(torch.randn(2 * width, width, generator=generator, device=device), dim=1)
    generator.manual_seed(seed)
    often = torch.arange(1, 2 * width + 1, device=device).rsqrt().expand(n, -1)
    active = often.multinomial(min(32, width), generator=generator)
    size = torch.rand(active.shape, generator=generator, device=device) + 0.5
    z = torch.zeros(n, 2 * width, device=device).scatter_(1, active, size)
    return z @ atoms + 0.05 * torch.randn(n, width, generator=generator, device=device)


class Sparse:
    """The step by the kernels; with ``prefilter`` the scores are ranked in bfloat16 and the best made again."""

    def __init__(self, parameters: dict[str, torch.Tensor], *, k: int, prefilter: bool) -> None:
        self.p = {name: table.clone() for name, table in parameters.items()}
        self.moments = {name: (torch.zeros_like(t), torch.zeros_like(t)) for name, t in self.p.items()}
        self.k, self.step = k, 0
        self.low = self.p["W_enc"].bfloat16() if prefilter else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        p, ends = self.p, (len(self.p["W_enc"]),)
        self.step += 1
        centred = x - p["b_dec"]
        codes = tc.select_topk(centred, p["W_enc"], p["b_enc"], self.k, low=self.low)
        error = tc.decode(codes, p["W_dec"], ends) - centred
        grads = error * (2 / len(x))
        slopes = torch.where(codes.values > 0, tc.code_gradient(codes, grads, p["W_dec"], ends), 0)
        g = tc.latent_gradient(codes, slopes, centred, grads, ends, p["W_dec"])
        by_bias = grads[0].sum(0) - g.bias @ p["W_enc"]
        factor = (CLIP / ((g.square.sum() + by_bias.square().sum()).sqrt() + 1e-6)).clamp(max=1)
        for name, grad in (("W_dec", g.dec), ("W_enc", g.enc), ("b_enc", g.bias), ("b_dec", by_bias)):
            tc.adam_(
                p[name], grad, *self.moments[name], step=self.step, rate=RATE, betas=BETAS, eps=EPS, factor=factor,
                unit=name == "W_dec",
            )  # fmt: skip
        if self.low is not None:
            self.low.copy_(p["W_enc"])
        return error.square().sum() / len(x)


class Dense:
    """The step by autograd through the dense codes (n, m); with ``autocast`` products are bfloat16."""

    def __init__(self, parameters: dict[str, torch.Tensor], *, k: int, autocast: bool) -> None:
        self.p = {name: table.clone().requires_grad_() for name, table in parameters.items()}
        self.k, self.autocast = k, autocast
        self.adam = torch.optim.Adam(self.p.values(), lr=RATE, betas=BETAS, eps=EPS, fused=True)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        p = self.p
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            centred = x - p["b_dec"]
            top = F.linear(centred, p["W_enc"], p["b_enc"]).topk(self.k, dim=1, sorted=False)
            z = top.values.new_zeros(len(x), len(p["W_enc"])).scatter(1, top.indices, top.values.relu())
            loss = (z @ p["W_dec"] - centred).float().square().sum() / len(x)
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            along = (p["W_dec"].grad * p["W_dec"]).sum(1, keepdim=True)
            p["W_dec"].grad.addcmul_(along, p["W_dec"], value=-1)
            torch.nn.utils.clip_grad_norm_(p.values(), CLIP)
            self.adam.step()
            p["W_dec"].div_(p["W_dec"].norm(dim=1, keepdim=True).clamp_min(1e-12))
        return loss.detach()


METHODS: dict[str, Callable[..., Sparse | Dense]] = {
    "dense float32": lambda p, k: Dense(p, k=k, autocast=False),
    "dense bf16 autocast": lambda p, k: Dense(p, k=k, autocast=True),
    "sparse float32": lambda p, k: Sparse(p, k=k, prefilter=False),
    "sparse bf16 prefilter": lambda p, k: Sparse(p, k=k, prefilter=True),
}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest number."""
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30))


def check(*, n: int, width: int, n_latents: int, k: int, device: torch.device) -> dict[str, float]:
    """Errors of the kernels against the dense form in float64, for one and for three prefixes; sizes as given."""
    p, x = start(width, n_latents, device=device), planted(n, width, device=device, seed=2)
    scores = x.double() @ p["W_enc"].double().T
    codes = tc.select_topk(x, p["W_enc"], p["b_enc"], k)
    rows = codes.rows()
    found = {
        # the k-th score may be a tie within rounding, so the values are compared, not the places
        "select_topk": relative(codes.values.view(n, -1).sort(1).values, scores.topk(k).values.relu().sort(1).values),
        "scores": relative(codes.values, scores[rows, codes.indices.long()].relu()),
    }
    for ends in ((n_latents,), (n_latents // 8, n_latents // 3, n_latents)):
        tag = f" G={len(ends)}"
        z = codes.dense(n_latents).double().requires_grad_()
        atoms = p["W_dec"].double().requires_grad_()
        outs = torch.stack([z[:, :e] @ atoms[:e] for e in ends])
        residual = outs.detach() - x
        (residual * outs).sum().backward()
        grads = residual.flip(0).cumsum(0).flip(0).float()
        slopes = tc.code_gradient(codes, grads, p["W_dec"], ends)
        s = Codes(codes.indptr, codes.indices, slopes).dense(n_latents).double()
        g = tc.latent_gradient(codes, slopes, x, grads, ends, p["W_dec"])
        again = tc.latent_gradient(codes, slopes, x, grads, ends, p["W_dec"])
        projected = atoms.grad - (atoms.grad * atoms.detach()).sum(1, keepdim=True) * atoms.detach()
        found |= {
            f"decode{tag}": relative(tc.decode(codes, p["W_dec"], ends), outs.detach()),
            f"code_gradient{tag}": relative(slopes, z.grad[rows, codes.indices.long()]),
            f"latent_gradient dec{tag}": relative(g.dec, projected),
            f"latent_gradient enc{tag}": relative(g.enc, s.T @ x.double()),
            f"latent_gradient bias{tag}": relative(g.bias, s.sum(0)),
            f"repeated bits differ{tag}": float(not (torch.equal(g.dec, again.dec) and torch.equal(g.enc, again.enc))),
        }
    a, b = (METHODS[name](p, k) for name in ("dense float32", "sparse float32"))
    for seed in range(5):
        batch = planted(n, width, device=device, seed=3 + seed)
        a(batch), b(batch)
    moves = {name: (b.p[name] - p[name], (a.p[name].detach() - p[name]).double()) for name in p}
    return found | {
        f"{name} moved in 5 steps": float((got - want).norm() / want.norm()) for name, (got, want) in moves.items()
    }


def product_rate(*, side: int = 8192, repeats: int = 20) -> float:
    """Operations per second of a large square bfloat16 product."""
    a = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    return 2 * side**3 / median(seconds(lambda: a @ a) for _ in range(repeats))


def seconds(work: Callable[[], object]) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    work()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def measure(name: str, options: argparse.Namespace, batches: list[torch.Tensor]) -> dict[str, float]:
    """One training of one method from the start: seconds a step, peak memory, loss of the last step."""
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    step = METHODS[name](start(options.width, options.latents, device=batches[0].device), options.k)
    for x in batches[:3]:
        step(x)
    torch.cuda.reset_peak_memory_stats()
    losses: list[torch.Tensor] = []
    spent = seconds(lambda: losses.extend(step(batches[i % len(batches)]) for i in range(options.steps)))
    peak = torch.cuda.max_memory_allocated() - held
    return {"seconds": spent / options.steps, "peak_bytes": peak, "loss": float(losses[-1])}


def never_waits(options: argparse.Namespace, batches: list[torch.Tensor]) -> None:
    """Run sparse steps while torch turns every wait for the device into an error."""
    for name in ("sparse float32", "sparse bf16 prefilter"):
        step = METHODS[name](start(options.width, options.latents, device=batches[0].device), options.k)
        step(batches[0])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(batches[1])
        finally:
            torch.cuda.set_sync_debug_mode("default")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--latents", type=int, default=32768)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("sae_gpu.json"), help="JSON file of all numbers")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "sae_gpu.py needs a machine with a CUDA device, and torch sees none here; nothing was measured."
        )
    good, reason = tc.available()
    if not good:
        raise SystemExit(f"the Triton kernels cannot be used here: {reason}")
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}; {reason}")
    errors = check(n=512, width=options.width, n_latents=2048, k=min(options.k, 2048), device=device)
    errors |= {
        f"{name}, width 100": e for name, e in check(n=300, width=100, n_latents=500, k=20, device=device).items()
    }
    for name, error in errors.items():
        print(f"{name:44}{error:>12.2e}")
    batches = [planted(options.batch_size, options.width, device=device, seed=100 + i) for i in range(8)]
    never_waits(options, batches)
    print("no sparse step waits for the device")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for _ in range(options.repeats):
        for name in METHODS:
            runs[name].append(measure(name, options, batches))
    rate = product_rate()
    print(f"\nbfloat16 product {rate / 1e12:.0f} Tflop/s; d {options.width}, m {options.latents}, k {options.k}, batch "
          f"{options.batch_size}; medians of {options.repeats}")  # fmt: skip
    heads = (
        ("ms/step", 10),
        ("samples/s", 12),
        ("x bf16 dense", 14),
        ("product share", 15),
        ("peak GiB", 10),
        ("loss", 10),
    )
    print(f"{'method':24}" + "".join(f"{head:>{width}}" for head, width in heads))
    table = {}
    reference = median(r["seconds"] for r in runs["dense bf16 autocast"])
    for name, found in runs.items():
        r = {key: median(one[key] for one in found) for key in found[0]}
        r["samples_per_second"] = options.batch_size / r["seconds"]
        r["speedup_over_dense_bf16"] = reference / r["seconds"]
        r["product_share"] = 2 * options.batch_size * options.latents * options.width / r["seconds"] / rate
        table[name] = r
        print(
            f"{name:24}{1000 * r['seconds']:>10.2f}{r['samples_per_second']:>12.0f}"
            f"{r['speedup_over_dense_bf16']:>14.2f}{r['product_share']:>15.3f}"
            f"{r['peak_bytes'] / 2**30:>10.2f}{r['loss']:>10.4f}"
        )
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "kernels": reason,
        "shape": {name: getattr(options, name) for name in ("width", "latents", "k", "batch_size", "steps", "repeats")},
        "bf16_product_per_second": rate,
        "relative_errors": errors,
        "methods": table,
        "runs": runs,
    }
    with atomic_path(options.out) as path:
        path.write_text(json.dumps(result, indent=2))
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
