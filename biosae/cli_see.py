"""``biosae search | diff | atlas | export``: what a latent means, what is like it, and files for other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from biosae.errors import InputError

see_app = typer.Typer()

Latents = Annotated[Path, typer.Argument(help="latents.h5ad of 'biosae encode' or of a run.")]
Names = Annotated[Path | None, typer.Option(help="Names of latents that the atlas saved (JSON).")]
Seed = Annotated[int, typer.Option("--random-state", help="Seed.")]


@see_app.command("search")
def search_command(
    latents: Latents,
    item: Annotated[list[str] | None, typer.Option(help="What is like this sample (repeatable).")] = None,
    property: Annotated[str | None, typer.Option(help="Phrase, such as 'high L0042, no L0107'.")] = None,
    weight: Annotated[list[str] | None, typer.Option(help="Weighted sum, such as L0042=1 (repeatable).")] = None,
    text: Annotated[str | None, typer.Option(help="Words; needs --tower.")] = None,
    tower: Annotated[str | None, typer.Option(help="Image-text encoder that the embeddings come from.")] = None,
    n: Annotated[int, typer.Option("-n", "--n", help="Items wanted.")] = 10,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="With --item a column that must differ, such as patient; else column=value (repeatable)."),
    ] = None,
    use_rep: Annotated[str, typer.Option(help="With --item: X (codes) or a key of obsm, such as embedding.")] = "X",
    metric: Annotated[str, typer.Option(help="With --item: cosine, dot, euclidean or jaccard.")] = "cosine",
    names: Names = None,
    out: Annotated[Path | None, typer.Option("--out", help="Table to write (CSV or Parquet).")] = None,
) -> None:
    """Samples like another one, with a property, by a sum of latents, or by words."""
    from biosae import search

    if sum(bool(given) for given in (item, property, weight, text)) != 1:
        raise InputError("say what to search by: one of --item, --property, --weight and --text")
    if text and not tower:
        raise InputError("--text needs --tower: the image-text encoder that the embeddings come from")
    adata = _named(latents, names)
    if item:
        rules = tuple(exclude or ())
        found = search.by_item(adata, list(item), n=n, exclude=rules, use_rep=use_rep, metric=metric)
    else:
        barred = _values(adata.obs, exclude)
        if property:
            found = search.by_property(adata, property, n=n, exclude=barred)
        elif weight:
            found = search.by_weights(adata, dict(map(_weight, weight)), n=n, exclude=barred)
        else:
            from biosae.encoders import text_tower

            found = search.by_text(adata, text, text_tower(tower), n=n, exclude=barred)
    if out is not None:
        _write(out, found)
    typer.echo(found.to_string(index=False) if len(found) else "nothing found")


@see_app.command("diff")
def diff_command(
    latents: Latents,
    by: Annotated[str, typer.Argument(help="Column of obs that says which cohort a sample is of.")],
    out: Annotated[Path, typer.Option("--out", help="Table to write (CSV or Parquet).")],
    cohort: Annotated[list[str] | None, typer.Option(help="Two values of the column: A, then B.")] = None,
    document: Annotated[str | None, typer.Option(help="Column such as slide: which of them a latent is in.")] = None,
    n_tiles: Annotated[int | None, typer.Option(help="Samples drawn of every document or patient.")] = None,
    paired: Annotated[bool | None, typer.Option("--paired/--unpaired", help="Patients in both cohorts.")] = None,
    covariate: Annotated[list[str] | None, typer.Option(help="Column to adjust for (repeatable).")] = None,
    blocks: Annotated[str | None, typer.Option(help="Column within which patients may be exchanged.")] = None,
    groups: Annotated[str, typer.Option(help="Column of independent groups.")] = "patient",
    min_frequency: float = 0.01,
    n_permutations: int = 9999,
    assume_independent: Annotated[
        bool, typer.Option("--assume-independent", help="Say aloud that samples are independent.")
    ] = False,
    names: Names = None,
    random_state: Seed = 0,
) -> None:
    """How often each latent fires in two cohorts, tested over patients."""
    from biosae.search import diff

    if cohort and len(cohort) != 2:
        raise InputError(f"--cohort was given {len(cohort)} times; give it twice, A and then B")
    adata = _named(latents, names)
    pair = tuple(_value(adata.obs, by, text) for text in cohort) if cohort else None
    table = diff(
        adata, by, cohorts=pair, document=document, n_tiles=n_tiles, paired=paired, covariates=tuple(covariate or ()),
        blocks=blocks, groups=groups, min_frequency=min_frequency, n_permutations=n_permutations,
        assume_independent=assume_independent, random_state=random_state,
    )  # fmt: skip
    about = table.attrs["biosae"]
    if "name" in adata.var:
        table.insert(1, "name", table["latent"].map(adata.var["name"]))
    _write(out, table)
    typer.echo(table.head(10).to_string(index=False))
    low = int((table["q"] <= 0.05).sum())
    typer.echo(f"A {about['a']}, B {about['b']}: {low} of {about['m_tested']} latents tested have q <= 0.05. {out}")


@see_app.command("atlas")
def atlas_command(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path | None, typer.Option("--out", help="HTML file (default <folder>/atlas.html).")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    n_examples: Annotated[int, typer.Option(help="Samples of each kind that a latent shows.")] = 6,
    max_mb: Annotated[float, typer.Option(help="Largest size of the page, in MB.")] = 20.0,
    n_cards: Annotated[int, typer.Option(help="Stress cards of the leading latents.")] = 12,
    spatial: Annotated[
        list[str] | None, typer.Option(help="Column of places, first x, then y, where these are not known otherwise.")
    ] = None,
    show_ids: Annotated[bool, typer.Option("--show-ids", help="Print slide and patient ids.")] = False,
    random_state: Seed = 0,
) -> None:
    """One self-contained page to search, see, doubt and name every latent of a run."""
    from biosae.atlas import build

    if spatial and len(spatial) != 2:
        raise InputError(f"--spatial was given {len(spatial)} times; give it twice, x and then y")
    page = build(
        folder, out=out, title=title, n_examples=n_examples, max_mb=max_mb, n_cards=n_cards,
        spatial=tuple(spatial) if spatial else None, show_ids=show_ids, random_state=random_state,
    )  # fmt: skip
    typer.echo(f"{page}")


@see_app.command("export")
def export_command(
    source: Annotated[Path, typer.Argument(help="latents.h5ad, or the folder of an SAE for a model with its card.")],
    out: Annotated[Path, typer.Option("--out", help="File or folder to write.")],
    format: Annotated[
        str | None, typer.Option(help="h5ad, zarr, parquet, npz, faiss, spatialdata or cellxgene; default by suffix.")
    ] = None,
    column: Annotated[list[str] | None, typer.Option(help="Column of obs of your own to keep (repeatable).")] = None,
    show_ids: Annotated[bool, typer.Option("--show-ids", help="Keep ids, and every column.")] = False,
    key: Annotated[Path | None, typer.Option(help="CSV to write that leads from pseudonyms back to ids.")] = None,
    licence: Annotated[str | None, typer.Option(help="The encoder's licence, where none is recorded.")] = None,
    names: Names = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="Of the format, e.g. --option metric=dot (repeatable).")
    ] = None,
) -> None:
    """Latents, or an SAE with a model card, for other tools: no patient identifiers, and the encoder's terms."""
    from biosae import export
    from biosae.files import write_table

    options = dict(map(_option, option or []))
    if source.is_dir():
        if format or column or key or names:
            raise InputError("--format, --column, --key and --names are for latents; an SAE becomes a model folder")
        known = ("title", "data", "data_licence")
        if unknown := [name for name in options if name not in known]:
            raise InputError(f"--option {unknown[0]}: a model takes {', '.join(known)}")
        export.write_model(source, out, licence=licence, show_ids=show_ids, **options)
        facts = json.loads((out / "config.json").read_text(encoding="utf-8"))
    else:
        adata = _named(source, names)
        export.write(
            adata, out, format=format, columns=tuple(column or ()), show_ids=show_ids, licence=licence, **options
        )
        if key is not None:
            write_table(key, export.pseudonyms(adata))
        facts = adata.uns.get("biosae", {})
    typer.echo(f"{out}\n{export.inherited(facts, licence=licence).statement}")


def _named(latents: Path, names: Path | None) -> Any:
    from biosae.files import read_h5ad
    from biosae.interpret import read_names

    adata = read_h5ad(latents)
    if names is not None:
        read_names(names, adata, on_conflict="new")
    return adata


def _write(path: Path, table: Any) -> None:
    """A table as CSV or Parquet. In CSV an apostrophe stands before text that a spreadsheet would run as a formula."""
    from biosae.files import write_table

    if path.suffix != ".parquet":
        text = table.select_dtypes(["object", "string", "category"]).columns
        table = table.assign(**{c: table[c].astype(object).map(_inert) for c in text})
    write_table(path, table)


def _inert(value: Any) -> Any:
    if not isinstance(value, str) or value[:1] not in ("=", "+", "-", "@", "\t", "\r"):
        return value
    try:
        float(value)
    except ValueError:
        return "'" + value
    return value


def _values(obs: Any, rules: list[str] | None) -> dict[str, list[Any]]:
    """``column=value`` of the command line as values of ``obs``."""
    out: dict[str, list[Any]] = {}
    for rule in rules or []:
        column, sign, text = rule.partition("=")
        if not sign:
            raise InputError(f"--exclude {rule}: write column=value; a column alone goes with --item")
        out.setdefault(column, []).append(_value(obs, column, text))
    return out


def _value(obs: Any, column: str, text: str) -> Any:
    """The value of the column that is written so; the text itself where there is none."""
    if column not in obs:
        return text
    return next((value for value in obs[column].dropna().unique() if str(value) == text), text)


def _weight(text: str) -> tuple[str, float]:
    latent, _, number = text.rpartition("=")
    try:
        return latent, float(number)
    except ValueError:
        raise InputError(f"--weight {text}: write latent=number, such as L0042=1") from None


def _option(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign:
        raise InputError(f"--option {text}: write key=value")
    return key, value
