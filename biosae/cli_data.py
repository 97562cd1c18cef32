"""Commands on public data sets: ``biosae data list``, ``info``, ``fetch`` and ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(help="Find, fetch and check data sets; look at, split or make a cohort.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of a data set (see 'biosae data list'), or a manifest (.toml).")]


@data_app.command("list")
def data_list(
    modality: Annotated[str | None, typer.Option(help="Only this one, e.g. pathology, radiology, ecg, eeg.")] = None,
    access: Annotated[str | None, typer.Option(help="open, registration, agreement or credentialed.")] = None,
) -> None:
    """Data sets that a manifest describes."""
    from biosae.data.manifests import human, table

    found = table(modality, access)
    if found.empty:
        typer.echo("No data set is both.")
        return
    shown = found[["modality", "access", "licence", "title"]].copy()
    shown["licence"] = shown["licence"].fillna("not stated").str.slice(0, 24)
    shown["title"] = shown["title"].str.slice(0, 60)
    shown.insert(3, "size", found["bytes"].astype(object).map(human, na_action="ignore").fillna(""))
    typer.echo(shown.reset_index().to_string(index=False))


@data_app.command("info")
def data_info(name: Name) -> None:
    """Everything known of a data set: terms, citation, units, columns, split rule, files, and where it was read."""
    from biosae.data.manifests import info

    typer.echo(str(info(name)))


@data_app.command("fetch")
def data_fetch(
    name: Name,
    out: Annotated[Path | None, typer.Option("--out", help="Folder (default <data-dir>/<name>).")] = None,
    files: Annotated[list[str] | None, typer.Option("--files", help="Only files like this (repeatable).")] = None,
    mirror: Annotated[str | None, typer.Option(help="Only addresses that contain this text.")] = None,
    n_jobs: Annotated[int | None, typer.Option(help="Transfers at the same time.")] = None,
    unpack: Annotated[bool, typer.Option("--unpack", help="Also unpack archives.")] = False,
) -> None:
    """Download what is missing of a data set; goes on where it was stopped, and checks sizes and hashes."""
    from biosae.data.fetch import fetch
    from biosae.data.manifests import info

    manifest = info(name)
    folder = fetch(manifest, out=out, files=files or None, mirror=mirror, n_jobs=n_jobs, unpack=unpack)
    typer.echo(str(folder))
    if manifest.downloadable and manifest.steps:
        typer.echo("Not brought by fetch:\n" + "\n".join(f"  {step}" for step in manifest.steps))


@data_app.command("verify")
def data_verify(
    name: Name,
    folder: Annotated[Path | None, typer.Option("--folder", help="Where it lies (default <data-dir>/<name>).")] = None,
) -> None:
    """Compare a folder with the published sizes and hashes; exit status 1 if something is missing or differs."""
    from biosae.data.fetch import verify

    found = verify(name, folder)
    counts = found["status"].value_counts()
    bad = found[~found["status"].isin(["ok", "unknown"])]
    if len(bad):
        typer.echo(bad.to_string(index=False))
    typer.echo(", ".join(f"{count} {status}" for status, count in counts.items()))
    if len(bad):
        raise typer.Exit(1)
