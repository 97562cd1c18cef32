"""The command line: every stage is a command named as its function; ``biosae run`` arranges them."""

from __future__ import annotations

import errno
import inspect
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from biosae.cli_data import data_app
from biosae.cli_encoders import encoders_app
from biosae.cli_see import see_app
from biosae.errors import BiosaeError, InputError, nearest
from biosae.settings import settings

app = typer.Typer(
    help="Interpretable, tested features from frozen biomedical encoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(encoders_app, name="encoders")
app.add_typer(see_app)

Out = Annotated[Path, typer.Option("--out", help="Where to write.")]
Seed = Annotated[int, typer.Option("--random-state", help="Seed.")]
Patient = Annotated[str | None, typer.Option(help="Column of patients; leave out together with --patient-unknown.")]
Unknown = Annotated[bool, typer.Option("--patient-unknown", help="Say aloud that patients are not known.")]
Role = Annotated[str | None, typer.Option(help="Column of this role.")]


@app.callback()
def _settings(
    data_dir: Annotated[Path | None, typer.Option(help="Folder where data named in a pipeline are looked for.")] = None,
    weights_dir: Annotated[list[Path] | None, typer.Option(help="Folder searched for encoder weights by name.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Forbid every download.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    if data_dir is not None:
        settings.data_dir = data_dir
    if weights_dir:
        settings.weights_dirs = tuple(weights_dir)
    settings.offline = settings.offline or offline
    settings.progress = settings.progress and not quiet


@app.command()
def doctor() -> None:
    """Versions, extras, GPU, cache and network; says what would fail and how to mend it."""
    from biosae.doctor import main as examine

    raise typer.Exit(examine())


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A smaller cohort.")] = False,
    random_state: Seed = 0,
) -> None:
    """The whole way on a phantom cohort whose truth is known; ends with a report."""
    from biosae.demo import demo as run_demo

    result = run_demo(out, quick=quick, random_state=random_state, say=_say)
    table = result["recovery"].to_string(index=False, float_format=lambda v: f"{v:.3f}")
    _say("\nPlanted counts and the latents that follow them (Spearman rho; p corrected over all latents by max-T):")
    _say(table)
    _say(f"\nScanner: {len(result['technical'])} of {result['n_latents_flagged_on']} latents are flagged as technical.")
    for row in result["readout"].itertuples():
        _say(
            f"  {row.factor} read from {row.features}: balanced accuracy {row.balanced_accuracy:.2f} "
            f"[{row.ci_low:.2f}, {row.ci_high:.2f}], chance {row.chance:.2f}"
        )
    found, tested = result["null_discoveries"], result["null_tests"]
    _say(f"\nNo-effect cohort: {found} of {tested} tests have q <= 0.05 (expected: none).")
    _say(f"Report: {result['report']}")


@app.command()
def run(
    pipeline: Annotated[Path, typer.Argument(help="Pipeline file (TOML).")],
    out: Annotated[Path | None, typer.Option("--out", help="Run folder (default runs/<name>).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and why; do nothing.")] = False,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Replace a value, e.g. --set sae.n_latents=512 (repeatable).")
    ] = None,
) -> None:
    """Run a study: every stage whose inputs or outputs have changed, and no other."""
    from biosae.pipeline import run as run_pipeline

    overrides = dict(_assignment(text) for text in change or [])
    folder = run_pipeline(pipeline, out=out, overrides=overrides, dry_run=dry_run, say=_say)
    if not dry_run:
        _say(f"Run folder: {folder}")


@app.command("read")
def read_command(
    reader: Annotated[str, typer.Argument(help="tiles, images, wsi, dicom, edf, wfdb, e4 or nifti.")],
    table: Annotated[Path, typer.Argument(help="CSV, Parquet, folder or file.")],
    out: Annotated[Path, typer.Option("--out", help="The samples.parquet to write.")],
    patient: Patient = None,
    patient_unknown: Unknown = False,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="Argument of the reader, e.g. --option rate=100 (repeatable).")
    ] = None,
) -> None:
    """Read a cohort of any modality once and keep its samples.parquet, which embed and audit take; lists failures."""
    from biosae.pipeline.config import parse_samples
    from biosae.pipeline.inputs import read_samples

    if out.suffix != ".parquet":  # said now, not after hours of reading
        raise InputError(f"samples are saved as Parquet; name the file {out.with_suffix('.parquet').name!r}")
    options = dict(_assignment(text) for text in option or [])
    section = parse_samples(
        {"source": reader, "table": str(table.absolute()), "patient": patient, "patient_unknown": patient_unknown,
         "options": options}
    )  # fmt: skip
    samples = read_samples(section, base=Path.cwd(), random_state=0, failures=out.parent / "failures.csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    samples.save(out)
    _say(f"{out}: {samples!r}")
    if len(samples.failures):
        _say(f"{len(samples.failures)} could not be used:")
        for row in samples.failures.itertuples():
            _say(f"  {row.item}: {row.reason}: {row.detail}")


@app.command()
def embed(
    table: Annotated[Path, typer.Argument(help="CSV, Parquet, folder of images, or a samples.parquet of biosae.")],
    encoder: Annotated[str, typer.Argument(help="Catalogue name or folder of an encoder.")],
    out: Out,
    patient: Patient = None,
    patient_unknown: Unknown = False,
    slide: Role = None,
    site: Role = None,
    scanner: Role = None,
    label: Role = None,
    split: Role = None,
    mpp: Annotated[float | None, typer.Option(help="Micrometres per pixel of the tiles.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="Layer name (repeatable).")] = None,
    pool: Annotated[str, typer.Option(help="default, cls, mean, cls+mean or tokens.")] = "default",
    weights: Annotated[str | None, typer.Option(help="File or folder of weights.")] = None,
    batch_size: int = 64,
    max_failures: Annotated[float, typer.Option(help="Largest share of samples that may fail, 0 to 1.")] = 0.05,
    retry_failures: Annotated[bool, typer.Option("--retry-failures", help="Try again what failed before.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with what is in the folder, or delete it and start over.")] = True,
) -> None:
    """Samples through a frozen encoder into an embeddings folder; resumes where it was stopped; torchrun shares it."""
    from biosae.embeddings.extract import embed as run_embed
    from biosae.embeddings.ranks import device_here, from_environment
    from biosae.encoders import load

    roles = {"slide": slide, "site": site, "scanner": scanner, "label": label, "split": split}
    samples = _samples(table, patient, patient_unknown, **roles, mpp=mpp)
    made = run_embed(
        samples,
        load(encoder, weights=weights, device=device_here()),
        layer=list(layer or ["final"]),
        pool=pool,
        out=out,
        batch_size=batch_size,
        max_failures=max_failures,
        retry_failures=retry_failures,
        resume=resume,
    )
    if from_environment()[0] == 0:
        for name, emb in made.items():
            _say(f"{name}: {emb.shape[0]} x {emb.shape[1]}")


@app.command()
def train(
    embeddings: Annotated[Path, typer.Argument(help="Embeddings folder.")],
    out: Out,
    architecture: Annotated[
        str, typer.Option(help="topk, batchtopk, relu, gated, gba ..., or itda, pca ...: docs/methods/index.md.")
    ] = "topk",
    n_latents: Annotated[int | None, typer.Option(help="Latents (default: chosen by the data).")] = None,
    k: Annotated[int | None, typer.Option(help="Active latents a row (default: chosen by the width).")] = None,
    n_steps: Annotated[int | None, typer.Option(help="Training steps (default: about 60 passes).")] = None,
    split: Annotated[str | None, typer.Option(help="Fit on this split only.")] = None,
    parallel: Annotated[str | None, typer.Option(help="Under torchrun, shared are: data or latents.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="Further setting, e.g. --option l1=0.1 (repeatable).")
    ] = None,
    random_state: Seed = 0,
) -> None:
    """Fit a sparse autoencoder (or what it is compared with) to an embeddings folder.

    Started again after a kill, it goes on.
    """
    from biosae.embeddings.store import Embeddings
    from biosae.pipeline.inputs import in_split
    from biosae.sae.distributed import writes
    from biosae.sae.named import named

    emb = Embeddings.open(embeddings)
    if split is not None:
        emb = emb.select(in_split(emb.obs, split))
    unfinished = out / "unfinished"
    given = {"n_latents": n_latents, "k": k, "n_steps": n_steps, "parallel": parallel}
    given = {name: value for name, value in given.items() if value is not None}
    sae = named(architecture, random_state=random_state, **given, **dict(_assignment(text) for text in option or []))
    if "checkpoint" in sae.names():
        sae.set_params(checkpoint=str(unfinished))
    sae.fit(emb).save(out)
    if not writes(parallel):
        return
    shutil.rmtree(unfinished, ignore_errors=True)
    for name, value in sae.metrics_.items():
        _say(f"{name}: {value}")


@app.command()
def encode(
    sae: Annotated[Path, typer.Argument(help="SAE folder.")],
    embeddings: Annotated[Path, typer.Argument(help="Embeddings folder of the same encoder, layer and preprocessing.")],
    out: Out,
    tokens: Annotated[str, typer.Option(help="mean, max or fraction_active over a sample's tokens.")] = "mean",
) -> None:
    """Codes of every sample as AnnData (.h5ad)."""
    from biosae.embeddings.store import Embeddings
    from biosae.files import write_h5ad
    from biosae.latents import encode as run_encode
    from biosae.sae import load

    adata = run_encode(load(sae), Embeddings.open(embeddings), tokens=tokens)
    write_h5ad(out, adata)
    _say(f"{out}: {adata.n_obs} samples x {adata.n_vars} latents")


@app.command()
def associate(
    latents: Annotated[Path, typer.Argument(help="latents.h5ad")],
    targets: Annotated[list[str], typer.Argument(help="Columns of obs to test against.")],
    out: Out,
    unit: Annotated[str, typer.Option(help="sample, or a column of obs such as patient.")],
    method: str = "auto",
    covariate: Annotated[list[str] | None, typer.Option(help="Column to adjust for (repeatable).")] = None,
    strata: Annotated[str | None, typer.Option(help="Column to test within.")] = None,
    n_permutations: int = 0,
    assume_independent: Annotated[
        bool, typer.Option("--assume-independent", help="Say aloud that samples are independent.")
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="Further argument of bs.stats.associate, e.g. --option correction=storey."),
    ] = None,
    random_state: Seed = 0,
) -> None:
    """Test every latent against every target; raw dimensions and principal components as controls."""
    from biosae.files import read_h5ad, write_table
    from biosae.stats import associate as run_associate
    from biosae.stats import summary

    named = {
        "unit": unit, "method": method, "covariates": covariate or [], "strata": strata,
        "n_permutations": n_permutations, "assume_independent": assume_independent, "random_state": random_state,
    }  # fmt: skip
    result = run_associate(read_h5ad(latents), targets, **named, **_further(option, run_associate, named))
    write_table(out, result)
    _say(summary(result).to_string(index=False))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path | None, typer.Option("--out", help="HTML file (default <folder>/report.html).")] = None,
    show_ids: Annotated[bool, typer.Option("--show-ids", help="Print sample and patient ids.")] = False,
) -> None:
    """One self-contained HTML report of a run folder."""
    from biosae.reports import report as make_report

    _say(str(make_report(folder, out=out, show_ids=show_ids)))


@data_app.command("audit")
def data_audit(
    table: Annotated[Path, typer.Argument(help="CSV, Parquet, folder of images, or a samples.parquet of biosae.")],
    patient: Patient = None,
    patient_unknown: Unknown = False,
    slide: Role = None,
    site: Role = None,
    scanner: Role = None,
    label: Role = None,
    split: Role = None,
    read: Annotated[bool, typer.Option(help="Open every file: finds unreadable ones and duplicates.")] = True,
) -> None:
    """Patients, sites, labels, duplicates, unreadable files, label-by-confounder overlap, leakage across splits."""
    roles = {"slide": slide, "site": site, "scanner": scanner, "label": label, "split": split}
    _say(str(_samples(table, patient, patient_unknown, **roles).audit(read=read)))


@data_app.command("phantom")
def data_phantom(
    out: Out,
    n_patients: int = 24,
    n_tiles: int = 20,
    scanner_effect: float = 1.0,
    label_scanner_correlation: float = 0.0,
    random_state: Seed = 0,
) -> None:
    """Write a rendered phantom cohort (PNG tiles and samples.csv) with known cell counts."""
    from biosae.data import phantom

    samples = phantom(
        n_patients=n_patients,
        n_tiles=n_tiles,
        scanner_effect=scanner_effect,
        label_scanner_correlation=label_scanner_correlation,
        out=out,
        random_state=random_state,
    )
    _say(f"{out}: {samples!r}")


def _samples(table: Path, patient: str | None, patient_unknown: bool, **options: Any) -> Any:
    """Samples of a table or folder; a saved ``samples.parquet`` knows its roles, so none are given."""
    options = {name: value for name, value in options.items() if value is not None}
    if table.suffix == ".parquet" and patient is None and not patient_unknown and not options:
        from biosae.data import Samples

        return Samples.load(table)
    if (patient is None) != patient_unknown:
        raise InputError("name the column of patients with --patient, or say --patient-unknown")
    from biosae.read import tiles

    return tiles(table, patient=patient, **options)


def _assignment(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign:
        raise InputError(f"--set {text}: write key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _further(option: list[str] | None, function: Any, named: dict[str, Any]) -> dict[str, Any]:
    """Arguments given as ``--option key=value``: those of the function that have no option of their own."""
    further = dict(_assignment(text) for text in option or [])
    known = [name for name in inspect.signature(function).parameters if name not in {"adata", "targets", *named}]
    for name in further:
        if name not in known:
            raise InputError(f"--option {name}: no such argument; {nearest(name, known)}")
    return further


def _say(text: str) -> None:
    typer.echo(text)


def main() -> None:
    """Entry point: users' errors and the file system's become one message and exit status 2, without a traceback."""
    warnings.showwarning = lambda message, *_: typer.echo(f"biosae: note: {message}", err=True)
    try:
        app()
    except SystemExit as end:
        if end.code == 130:  # Ctrl-C
            typer.echo("biosae: stopped. Give the same command again to go on: what is finished is kept", err=True)
        raise
    except BiosaeError as error:
        typer.echo(f"biosae: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        typer.echo(f"biosae: {what}{error.strerror or error}. {_ADVICE.get(error.errno, _OTHER_ADVICE)}", err=True)
        sys.exit(2)


_ADVICE = {
    errno.ENOSPC: "Free some space and give the same command again: what is finished is kept",
    errno.EACCES: "Choose a place that you may read and write",
    errno.EROFS: "Choose a place that can be written to",
}
_OTHER_ADVICE = "Check the paths of the command: a file may stand where a folder is needed, or the other way round"


if __name__ == "__main__":
    main()
