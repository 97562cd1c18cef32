"""Yardsticks: a dense TopK step by autograd (float32 or bf16 autocast), and one encoder product."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from saebench.feed import Feed, Run, Unavailable
from saebench.measure import Apply, clocks
from torch.nn import functional as F

ENTRY = "a plain loop: linear, topk, scatter, matmul, backward, projection, clipping, fused Adam, unit atoms"
CHUNK = 512
"""Rows of one encoder product; larger outputs cost page faults."""


def train(matrix: torch.Tensor, run: Run) -> Apply | None:
    """``options["product"]``: only encoder products; ``options["autocast"]``: bf16 where autocast allows it."""
    if run.options.get("product"):
        return _product(matrix, run)
    torch.manual_seed(run.seed)
    feed = Feed(matrix, run)
    decoder = torch.nn.Parameter(F.normalize(torch.randn(run.n_latents, matrix.shape[1]), dim=1))
    encoder = torch.nn.Parameter(decoder.detach().clone())
    b_enc = torch.nn.Parameter(torch.zeros(run.n_latents))
    b_dec = torch.nn.Parameter(matrix[: 2 * run.batch_size].mean(0))
    parameters = [encoder, b_enc, decoder, b_dec]
    adam = torch.optim.Adam(parameters, lr=run.learning_rate or 1e-3, fused=True)

    def codes(x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(F.linear(x - b_dec, encoder, b_enc))
        best = a.topk(run.k, dim=1, sorted=False)
        return torch.zeros_like(a).scatter(1, best.indices, best.values)

    precision = torch.autocast("cpu", torch.bfloat16) if run.options.get("autocast") else nullcontext()
    for x in feed.first(run.steps):
        with precision:
            x_hat = codes(x) @ decoder + b_dec
            loss = (x.float() - x_hat.float()).square().sum(1).mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            decoder /= decoder.norm(dim=1, keepdim=True).clamp_min(1e-12)
    feed.close()

    def apply(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = codes(x)
        return z > 0, z @ decoder + b_dec

    return apply


@torch.no_grad()
def _product(matrix: torch.Tensor, run: Run) -> None:
    x = matrix[: run.batch_size].contiguous()
    weight, bias = torch.randn(run.n_latents, x.shape[1]), torch.zeros(run.n_latents)
    if not torch.backends.mkldnn.is_available():
        raise Unavailable("this torch has no oneDNN")
    start = clocks()
    for step in range(run.warm + run.steps):
        if step == run.warm:
            first = clocks()
        for rows in x.split(CHUNK):
            torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    run.span, run.timed_steps = clocks() - first, run.steps
    run.setup = float(first[0] - start[0])
