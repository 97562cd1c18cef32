"""One contestant, one run, in a process of its own; the answer is one line of JSON."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saebench.feed import Run, Unavailable
from saebench.measure import Memory, others, quality

MARK = "RESULT "


def work(spec: dict[str, Any]) -> dict[str, Any]:
    """Train as ``spec`` says.

    Parameters
    ----------
    spec
        ``module`` (of ``peers``), ``matrix`` and ``held`` (paths), ``run`` (fields of :class:`Run`), ``threads``,
        ``judge`` (whether to measure the quality too).

    Returns
    -------
    dict
        ``status`` (``ok``, or why not), ``version``, and where it was ``ok`` the numbers of the run.
    """
    torch.set_num_threads(spec["threads"])
    module = importlib.import_module(f"peers.{spec['module']}")
    package = getattr(module, "PACKAGE", None)
    try:
        version = importlib.metadata.version(package) if package else None
    except importlib.metadata.PackageNotFoundError:
        return {"status": "not installed"}
    try:
        run = Run(**spec["run"])
        matrix = Path(spec["matrix"])
        if "source" not in run.options:
            matrix = torch.from_numpy(np.load(matrix))
        with Memory() as memory:
            apply = module.train(matrix, run)
        found = {"status": "ok", "version": version, "memory": memory.peak - memory.before}
        found |= {"anonymous": memory.peak, "peak": memory.resident}
        if run.span is not None:
            wall, cpu, _ = run.span
            found |= {
                "wall": wall / run.timed_steps, "cpu": cpu / run.timed_steps, "steps": run.timed_steps,
                "cores": cpu / wall, "others": others(run.span), "setup": run.setup, "batch": run.batch_size,
            }  # fmt: skip
        if spec["judge"]:
            found |= quality(apply, seen=matrix, held=torch.from_numpy(np.load(spec["held"])))
        return found
    except Unavailable as reason:
        return {"status": str(reason), "version": version}
    except Exception as error:
        traceback.print_exc()
        return {"status": f"failed: {type(error).__name__}: {str(error)[:200]}", "version": version}


def main(text: str) -> None:
    """Entry of the subprocess: ``text`` is the spec as JSON."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(MARK + json.dumps(work(json.loads(text))), flush=True)
