"""Damaged files for readers: seeded mutations, read in another process under limits of memory and time.

``fuzz(...)`` answers with what went wrong; an empty list is what a test asserts. A mutated file may be read (the damage
lies where nobody looks) or end in a typed error; a crash, a hang, another exception or a blow-up of memory is a fault.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

SECONDS, MEMORY = 20, 4 * 2**30


def mutations(data: bytes, n: int, *, seed: int = 0, header: int = 4096) -> Iterator[tuple[str, bytes]]:
    """``n`` damaged copies of a file: (kind of damage, bytes).

    Kinds take turns: bits flipped all over or in the header, truncation, a block of zeros or of noise, a piece cut out
    or repeated, another file's magic.
    """
    draw = random.Random(seed)
    kinds = ("flip", "header_flip", "truncate", "zeros", "noise", "cut", "repeat", "number", "magic")
    for i in range(n):
        kind = kinds[i % len(kinds)]
        out = bytearray(data)
        at = draw.randrange(len(out))
        length = min(len(out) - at, draw.choice((1, 4, 64, 1024)))
        if kind in ("flip", "header_flip"):
            reach = len(out) if kind == "flip" else min(header, len(out))
            for _ in range(draw.choice((1, 4, 32))):
                out[draw.randrange(reach)] ^= 1 << draw.randrange(8)
        elif kind == "truncate":
            del out[at:]
        elif kind == "zeros":
            out[at : at + length] = bytes(length)
        elif kind == "noise":
            out[at : at + length] = draw.randbytes(length)
        elif kind == "cut":
            del out[at : at + length]
        elif kind == "repeat":
            out[at:at] = out[at : at + length]
        elif kind == "number":  # sizes and counts of a header become huge, negative or zero
            at = draw.randrange(max(1, min(header, len(out)) - 4))
            out[at : at + 4] = draw.choice((b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff", b"9999", b"-1  "))
        else:
            out[:4] = draw.choice((b"\x89PNG", b"II*\0", b"PK\3\4", b"\0\0\0\0"))
        yield kind, bytes(out)


def fuzz(
    read: str, seeds: Sequence[Path], folder: Path, *, n: int, seconds: float = SECONDS, memory: int = MEMORY
) -> list[str]:
    """Read the seed files, then ``n`` damaged copies of them; what went wrong, one line a file.

    A seed that ends in any error is a fault: what its copies end in would say nothing.

    Parameters
    ----------
    read
        ``"module:function"`` (importable from tests/ or the package) that takes the path of one file and reads all of
        it; it may raise errors of ``biosae.errors`` and nothing else.
    seeds
        Healthy files. Files beside a seed are not copied; give what the reader needs in one file, or let ``read``
        arrange it.
    seconds, memory
        Limits for one file and for the process's address space beyond what it has after its imports.
    """
    faults: list[str] = []
    jobs, whole = [], []
    for number, seed in enumerate(seeds):
        data = seed.read_bytes()
        whole.append(folder / f"{number:02d}_healthy{seed.suffix}")
        whole[-1].write_bytes(data)
        share = n // len(seeds) + (number < n % len(seeds))
        for i, (kind, damaged) in enumerate(mutations(data, share, seed=number)):
            path = folder / f"{number:02d}_{i:04d}_{kind}{seed.suffix}"
            path.write_bytes(damaged)
            jobs.append(path)
    while whole:
        whole = whole[_round(read, whole, seconds, memory, faults, healthy=True) :]
    while jobs:
        jobs = jobs[_round(read, jobs, seconds, memory, faults) :]
    return faults


def _round(
    read: str, jobs: list[Path], seconds: float, memory: int, faults: list[str], *, healthy: bool = False
) -> int:
    """One process through as many files as it survives; how many are done."""
    command = [sys.executable, __file__, read, str(seconds), str(memory), "healthy" if healthy else "damaged"]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        out, err = process.communicate("\n".join(str(p) for p in jobs) + "\n")
    lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"file"')]
    faults += [f"{line['file']}: {line['fault']}" for line in lines if line["fault"]]
    if len(lines) < len(jobs):
        last = " | ".join(err.strip().splitlines()[-6:])
        faults.append(f"{jobs[len(lines)].name}: the process ended with {process.returncode}: {last}")
        return len(lines) + 1
    return len(jobs)


def _work(read: str, seconds: float, memory: int, *, healthy: bool) -> None:
    """Read the files named on standard input; one JSON line each. Healthy files may not even end in a typed error."""
    import faulthandler
    import importlib
    import resource
    import warnings

    from biosae.errors import BiosaeError

    warnings.simplefilter("ignore")
    module, function = read.split(":")
    call = getattr(importlib.import_module(module), function)
    with open("/proc/self/statm") as stream:
        held = int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))
    for line in sys.stdin:
        path = line.strip()
        fault = ""
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            call(path)
        except BiosaeError as error:
            fault = f"healthy, but {type(error).__name__}: {error}" if healthy else ""
        except MemoryError:
            fault = "MemoryError: more memory than the limit"
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"file": os.path.basename(path), "fault": fault[:300]}), flush=True)


if __name__ == "__main__":
    _work(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), healthy=sys.argv[4] == "healthy")
