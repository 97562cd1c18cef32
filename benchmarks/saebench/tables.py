"""The section of docs/benchmarks.md, written from the raw results."""

from __future__ import annotations

from importlib import import_module
from statistics import median
from typing import Any

from saebench import contestants as who
from saebench.summary import medians, speed

HOW = """\
## Sparse autoencoders: biosae against other libraries

`python benchmarks/sae.py all --peers-python PEERS/bin/python --shared SHARED` makes this section and its figures; the
raw rounds are in `benchmarks/results/sae.json`. The peers live in an environment of their own that shares torch:

    python -m venv PEERS && echo SITE_PACKAGES_WITH_TORCH > PEERS/lib/python3.11/site-packages/shared.pth
    PEERS/bin/pip install eai-sparsify overcomplete einops dictionary-learning sae-lens "matplotlib<3.11"

Everyone trains a TopK autoencoder on the same float32 rows, in the same order, with the same batch, k, width, steps
and threads, each run in a process of its own. Rounds alternate; a round in which other processes used more than a
tenth of the machine is thrown away and repeated. Speed is that of the whole loop in its steady state: initialisation,
compilation and the first steps are left out and given as "start". Memory: growth of anonymous memory during training,
and peak resident memory of the process. FVU: one function for everyone, on held-out rows; dead: latents that no
training row activates. The synthetic rows have a planted sparse dictionary (70 % of the variance), a low-rank
background (20 %) and noise (10 %)."""


def section(results: dict[str, Any]) -> str:
    """Markdown of everything measured so far."""
    parts = [HOW]
    if "machine" in results:
        m = results["machine"]
        parts.append(
            f"Machine: {m['cpu']}, {m['cores']} cores ({', '.join(m['instructions']) or 'no wide instructions'}), "
            f"{m['threads']} threads; torch {m['torch']}, Python {m['python']}."
        )
    for entry in results.get("peers", {}).values():
        parts.append(_case(entry))
    if results.get("peers"):
        parts.append("![Speed of training](images/sae_peers.png)")
        parts.append(_notes(results["peers"]))
    if results.get("scaling"):
        parts.append(
            "### Cost against size\n\n![Cost of one step](images/sae_scaling.png)\n\n"
            "Seconds of one step against the rows of a batch, the features d, the latents m and the active latents k, "
            f"one changed at a time from {who.BASE.batch:,} rows, d {who.BASE.d}, m {who.BASE.m:,}, k {who.BASE.k}. "
            "A run costs its number of steps times this; n rows seen once are n / batch steps.\n\n"
            + _ratios(results["scaling"])
        )
    if results.get("streaming"):
        parts.append(_streaming(results["streaming"]))
    if results.get("loss"):
        parts.append(_loss(results["loss"]))
    return "\n\n".join(parts)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _case(entry: dict[str, Any]) -> str:
    case, found = entry["case"], medians(entry["rounds"])
    judged = {(r["contestant"], r["rate"]): r for r in entry["quality"] if r["status"] == "ok"}
    dense, product = speed(found, who.DENSE), speed(found, who.PRODUCT)
    rows = []
    for one in who.CONTESTANTS:
        mine = found.get(one.label, {"status": "not run"})
        if mine["status"] != "ok":
            rows.append([one.label, mine["status"], *["-"] * 11])
            continue
        rate = speed(found, one.label)
        quality = [judged.get((one.label, name), {}) for name in ("own", "common")]
        rows.append(
            [
                one.label, f"{rate:,.0f}", _ratio(rate, dense), _ratio(product, rate),
                f"{mine['batch'] / mine['cpu']:,.0f}", f"{mine['cores']:.2f}", f"{mine['memory']:,.0f}",
                f"{mine['peak']:,.0f}", f"{mine['setup']:.1f}", *[_number(q.get("fvu"), ".3f") for q in quality],
                *[_number(q.get("dead"), ".1%") for q in quality],
            ]
        )  # fmt: skip
    head = [
        "", "rows/s", "x dense", "encoder products a step", "rows per CPU-s", "cores", "training MB", "peak MB",
        "start, s", "FVU", f"FVU, rate {who.COMMON_RATE:g}", "dead", f"dead, rate {who.COMMON_RATE:g}",
    ]  # fmt: skip
    title = f"### {case['name']}: d {case['d']:,}, {case['m']:,} latents, k {case['k']}, {case['batch']:,} rows a step"
    rounds = [r for r in entry["rounds"] if r["status"] == "ok"]
    rejected = sum(not r["counts"] for r in rounds)
    note = (
        f"{case['n']:,} rows. Medians of the rounds that count ({len(rounds) - rejected} of {len(rounds)} in all; "
        f"{rejected} rejected because the machine was busy). Quality after {case['steps']} steps, with each library's "
        f"own learning rate and with {who.COMMON_RATE:g} for all."
    )
    return "\n\n".join([title, _table(head, rows), note, _goals(found)])


def _goals(found: dict[str, dict[str, Any]]) -> str:
    """Ratios that the project set itself."""
    peers = {c.label: v for c in who.CONTESTANTS if c.kind == "peer" and (v := speed(found, c.label))}
    best = max(peers, key=peers.get) if peers else None
    lines = []
    for label in (who.OURS, who.OURS_LOW, "biosae, torch only"):
        ours = speed(found, label)
        if not ours:
            continue
        against = [
            (speed(found, who.DENSE), "the dense step in float32"),
            (speed(found, who.PLAIN_LOW), "the dense loop in bf16 autocast"),
            (peers.get(best), f"the fastest peer ({best})"),
        ]
        text = "; ".join(f"{ours / other:.1f} x {name}" for other, name in against if other)
        lines += [f"- {label}: {text}"] if text else []
    return "\n".join(lines) or "No run of biosae counts yet."


def _notes(found: dict[str, Any]) -> str:
    versions: dict[str, str] = {}
    for entry in found.values():
        versions |= {r["contestant"]: r["version"] for r in entry["rounds"] if r.get("version")}
    rows, seen = [], set()
    for one in who.CONTESTANTS:
        if one.kind != "peer" or one.module in seen:
            continue
        seen.add(one.module)
        module = import_module(f"peers.{one.module}")
        about = " ".join(module.__doc__.split())
        rows.append([module.PACKAGE, versions.get(one.label, "not installed"), module.ENTRY, about])
    return (
        "What was called, all from the same matrix in memory; learning rates rise over the first 5 % of the steps "
        "wherever the library has that setting, everything else is its default. biosae writes its history at 50 points "
        "of a run, which is part of its time; so few steps make that share larger than in real use. AuxK is at work in "
        "nobody's timed rounds (a latent is dead after 10 million rows there, the default of two of the peers).\n\n"
        + _table(["package", "version", "entry", "notes"], rows)
    )


def _ratios(records: list[dict[str, Any]]) -> str:
    """Steps in units of one encoder product, over the whole grid."""
    found: dict[str, list[float]] = {}
    for axis, value in dict.fromkeys((r["axis"], r["value"]) for r in records):
        point = medians([r for r in records if (r["axis"], r["value"]) == (axis, value)])
        product = speed(point, who.PRODUCT)
        for label in point:
            if label != who.PRODUCT and product and speed(point, label):
                found.setdefault(label, []).append(product / speed(point, label))
    rows = [[label, f"{min(v):.2f}", f"{median(v):.2f}", f"{max(v):.2f}"] for label, v in found.items()]
    return _table(["encoder products a step", "least", "median", "most"], rows)


def _streaming(records: list[dict[str, Any]]) -> str:
    rows = []
    for n in dict.fromkeys(r["n"] for r in records):
        found = medians([r for r in records if r["n"] == n])
        memory = speed(found, "in memory")
        for label, one in found.items():
            if one["status"] != "ok":
                rows.append([f"{n:,}", label, one["status"], "-", "-", "-", "-"])
                continue
            rate = speed(found, label)
            rows.append(
                [f"{n:,}", label, f"{rate:,.0f}", _ratio(rate, memory, ".3f"), f"{one['cores']:.2f}",
                 f"{one['anonymous']:,.0f}", f"{one['peak']:,.0f}"]
            )  # fmt: skip
    head = ["rows", "", "rows/s", "of in memory", "cores", "peak anonymous MB", "peak resident MB"]
    return (
        f"### Streaming\n\nfloat16 rows of width {records[0]['d']} from an embeddings folder on disk against the same "
        "rows in memory, alternated. Anonymous memory counts; resident memory also holds pages of the mapped files, "
        "which the system takes back when it needs them. What is read may lie in the system's cache.\n\n"
        + _table(head, rows)
    )


def _loss(records: list[dict[str, Any]]) -> str:
    rows = []
    for test, variant in dict.fromkeys((r["test"], r["variant"]) for r in records):
        mine = [r for r in records if (r["test"], r["variant"]) == (test, variant)]
        rows.append([test, variant, *(", ".join(f"{r[name]:+.2f}" for r in mine) for name in ("loss", "fvu"))])
    return (
        "### Same loss as the dense step\n\nPer cent by which the loss (last tenth of the steps) and the FVU of all "
        "rows after training differ from the dense backend, one number a seed; same rows, order and first weights. "
        "In test B a latent fires in one step of eight, where optimisers that skip silent latents end 4 to 9 % "
        "higher.\n\n" + _table(["test", "backend", "loss %", "FVU %"], rows)
    )


def _ratio(a: float | None, b: float | None, form: str = ".2f") -> str:
    return _number(a / b if a and b else None, form)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
