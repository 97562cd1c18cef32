"""From a TOML file to a run folder with tables, figures and a report, stage by stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from biosae.pipeline.config import PipelineConfig, load_config, parse_config
from biosae.pipeline.stages import run_stages
from biosae.pipeline.study import Study

__all__ = ["PipelineConfig", "load_config", "parse_config", "run"]


def run(
    config: str | Path | PipelineConfig,
    *,
    out: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    base: str | Path | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Run a study: every stage whose inputs or outputs have changed, and no other.

    Parameters
    ----------
    config
        Pipeline file, or a checked configuration.
    out
        Run folder (default ``runs/<name>``).
    overrides
        Dotted keys that replace what the file says (see :func:`load_config`).
    base
        Folder that relative paths in the configuration start from (default: that of the file).
    dry_run
        Say what would run, and why, and do nothing.
    say
        Receives a line per stage.

    Returns
    -------
    Path
        The run folder.

    Raises
    ------
    InputError, FormatError
        If the configuration cannot be used; whatever a stage raises otherwise. Finished stages are kept.
    """
    if isinstance(config, PipelineConfig):
        base = Path(base or ".")
    else:
        base = Path(base or Path(config).parent)
        config = load_config(config, overrides=overrides)
    folder = Path(out) if out is not None else Path("runs") / config.name
    if not dry_run:
        folder.mkdir(parents=True, exist_ok=True)
    run_stages(Study(config, base=base, folder=folder).stages(), folder, dry_run=dry_run, say=say)
    return folder
