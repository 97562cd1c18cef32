"""Commands on named encoders: ``biosae encoders list`` and ``check``."""

from __future__ import annotations

from typing import Annotated

import typer

encoders_app = typer.Typer(help="Named encoders: what there is, expects, lacks.", no_args_is_help=True)


@encoders_app.command("list")
def encoders_list(
    domain: Annotated[str | None, typer.Option(help="Such as pathology, radiology, EEG or ecology.")] = None,
    item: Annotated[str | None, typer.Option(help="image, signal or features.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licences that hold this text.")] = None,
    loadable: Annotated[bool | None, typer.Option(help="Only those that biosae loads, or only the others.")] = None,
) -> None:
    """Encoders of the catalogue."""
    from biosae.encoders.catalog import table

    found = table(domain, item=item, licence=licence, loadable=loadable)
    columns = ["domain", "item", "library", "loadable", "width", "mpp", "rate", "gated", "licence"]
    typer.echo(found[columns].astype(object).where(found[columns].notna(), "").reset_index().to_string(index=False))


@encoders_app.command("check")
def encoders_check(name: Annotated[str, typer.Argument(help="Name of the catalogue.")]) -> None:
    """Licence, gate, where the weights are, what the encoder expects; exits with 1 where something is missing."""
    from biosae.encoders.checking import check

    found = check(name)
    typer.echo(repr(found))
    raise typer.Exit(0 if found.ready else 1)
