"""Time and size of the atlas of a run.

    python benchmarks/atlas.py OUT RUN [RUN ...]

It writes ``OUT/<run>.html`` for every run folder and prints one JSON line each: latents, rows, seconds and processor
seconds, size of the page in MB, side of its pictures.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import biosae as bs
from biosae.settings import settings


def main(out: str, *runs: str) -> None:
    settings.progress = False
    Path(out).mkdir(parents=True, exist_ok=True)
    for run in map(Path, runs):
        began, used = time.perf_counter(), time.process_time()
        page = bs.atlas.build(run, out=Path(out) / f"{run.name}.html", n_cards=0)
        seconds, cpu = time.perf_counter() - began, time.process_time() - used
        text = page.read_text(encoding="utf-8")
        data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
        found = {
            "run": run.name, "latents": len(data["latents"]["id"]), "rows": data["n_rows"],
            "pictures": len(data["pictures"]["src"]), "side": data["pictures"]["side"], "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1), "mb": round(page.stat().st_size / 1e6, 1),
        }  # fmt: skip
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
