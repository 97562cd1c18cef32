"""What a study reads: samples as a section describes them, parts of a split, and the content that skipping hangs on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from biosae.data import Samples
from biosae.errors import InputError
from biosae.files import hash_file, hash_json
from biosae.pipeline.config import SamplesConfig, find_input


def read_samples(section: SamplesConfig, *, base: Path, random_state: int) -> Samples:
    """Samples as a ``[samples]`` section describes them, split if it says so."""
    from biosae.data import phantom, split
    from biosae.read import images, tiles

    if section.source == "phantom":
        samples = phantom(**{"random_state": random_state, **section.phantom})
    else:
        reader = tiles if section.source == "tiles" else images
        options: dict[str, Any] = {**section.roles(), "id": section.id, "path": section.path, "mpp": section.mpp}
        if section.source == "tiles":
            options["size"] = section.size
        samples = reader(find_input(section.table, base=base), **options)
    if section.split_by is not None:
        s = section.split_by
        samples = split(samples, by=s.by, stratify=s.stratify, test=s.test, val=s.val, random_state=random_state)
    return samples


def in_split(obs: Any, part: str) -> Any:
    """Boolean mask (Series) of the rows whose ``split`` is ``part``; an :class:`InputError` where there is none."""
    if "split" not in obs:
        raise InputError(
            f"the samples have no split, so {part!r} cannot be taken; name split= or give [samples.split_by]"
        )
    mask = obs["split"].astype(str) == part
    if not mask.any():
        raise InputError(f"no sample has split {part!r}; there are: {', '.join(sorted(set(obs['split'].astype(str))))}")
    return mask


def content(path: Path) -> str:
    """Hash of a file's bytes; of a folder, the names, sizes and modification times of the files in it."""
    if path.is_file():
        beside = path.parent
        table = hash_file(path)
        return hash_json([table, _listing(beside)]) if path.suffix in (".csv", ".tsv", ".parquet") else table
    return hash_json(_listing(path))


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            stat = path.stat()
            found.append((path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns))
    return found
