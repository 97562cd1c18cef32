"""Triton kernels: their tests under Triton's interpreter, in a process of its own, and compilation to machine code.

Whether a program is interpreted is decided when Triton is first imported, hence the second process, which runs
``triton_interpreted.py``. Neither needs a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_interpreted import normal, random_codes

from biosae.sae.kernels import triton_cuda as tc
from biosae.sae.kernels.codes import Gradient

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = Path(__file__).with_name("triton_interpreted.py")


def test_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(INTERPRETED)]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_is_said():
    assert tc.available() == (False, "there is no CUDA device")


@pytest.mark.parametrize(("capability", "width"), [(80, 1024), (90, 100)])
def test_programs_compile_to_machine_code_without_atomics(capability, width, monkeypatch, tmp_path):
    """The types, the constants and the numbers of warps are those of real calls; ptxas accepts the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32"}
    compiled = []

    def compile_instead(name, grid, *arguments, tile, **constants):
        program = getattr(tc._programs(), name)
        signature, constants, hints = {}, dict(constants), {}
        for place, (argument, value) in enumerate(zip(program.arg_names, arguments)):
            if isinstance(value, torch.Tensor):
                signature[argument] = types[value.dtype]
                hints[(place,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[argument] = "constexpr" if value == 1 else "i32"  # as at run time
                constants.update({argument: 1} if value == 1 else {})
            else:
                signature[argument] = "fp32"
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(program, signature, constexprs=constants, attrs=hints)
        options = {"num_warps": tc.warps(tile), "enable_fp_fusion": True}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert len(made.asm["cubin"]) > 0
        assert not any(word in made.asm["ptx"] for word in ("atom.", "red.global", "red.relaxed"))
        compiled.append(name)

    monkeypatch.setattr(tc, "_launch", compile_instead)
    n, m, k = 64, 48, 8
    x, weight = normal(n, width), normal(m, width)
    codes = random_codes(n, m, k)
    tc.select_topk(x, weight, torch.zeros(m), k)
    for ends, extra in (((m,), None), ((16, 32, m), (torch.arange(3), Gradient.empty(weight[:3])))):
        grads = normal(len(ends), n, width)
        tc.decode(codes, weight, ends)
        slopes = tc.code_gradient(codes, grads, weight, ends)
        tc.latent_gradient(codes, slopes, x, grads, ends, weight, extra=extra)
    rule = {"step": 1, "rate": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "factor": torch.ones((), dtype=torch.float64)}
    tc.adam_(weight, weight, weight, weight, unit=True, **rule)
    tc.adam_(x[0], x[0], x[0], x[0], **rule)
    every = {"keep_largest", "decode_rows", "entry_products", "piece_sums", "latent_rows", "adam_rows"}
    assert set(compiled) == every
