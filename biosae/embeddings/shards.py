"""The embeddings folder on disk: plan, shards, their indices, the closing files; described in docs/file-formats.md.

Order of writes is what makes a killed job resumable: a shard's data, then its index (the shard now counts), and after
the last shard ``obs.parquet``, then ``provenance.json`` (the folder is now complete). Every file is written under a
temporary name, flushed and renamed.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import FormatError, IdentityError, InputError
from biosae.files import atomic_path, canonical_json, hash_file, hash_json, read_json, sync_folder, write_json
from biosae.provenance import record

FORMAT = "biosae.embeddings"
VERSION = 1
DTYPES = ("float32", "float16")

# fields of a plan that must be the same for a folder to be continued, and what they are called in messages
_FIXED = {
    "identity_fingerprint": "encoder, layer, pooling or preprocessing",
    "samples_fingerprint": "samples",
    "dtype": "dtype",
    "shard_samples": "shard_samples",
}


def make_plan(
    *, identity: Mapping, identity_fingerprint: str, samples: Any, dtype: str, shard_samples: int
) -> dict[str, Any]:
    """What a folder is to hold, known before the first forward pass."""
    return {
        "format": FORMAT, "version": VERSION, "identity": dict(identity), "identity_fingerprint": identity_fingerprint,
        "samples_fingerprint": samples.fingerprint, "n_samples": len(samples), "dtype": dtype,
        "shard_samples": shard_samples,
    }  # fmt: skip


def plan_hash(plan: Mapping[str, Any]) -> str:
    """Hash over what every shard of a folder must share; stands in each shard's index."""
    return hash_json({name: plan[name] for name in ("version", *_FIXED)})


def shard_files(folder: Path, number: int) -> tuple[Path, Path]:
    """Data file and index file of a shard."""
    return folder / f"shard-{number:05d}.npy", folder / f"shard-{number:05d}.json"


def n_shards(plan: Mapping[str, Any]) -> int:
    """Number of shards: shard i holds samples ``i * shard_samples`` up to the next shard's first."""
    return -(-plan["n_samples"] // plan["shard_samples"])


def begin(folder: Path, plan: Mapping[str, Any], *, resume: bool) -> dict[int, dict[str, Any]]:
    """Open a folder for writing; returns the indices of the shards that are already committed.

    A shard whose data file is absent or has the wrong size is not counted, so it is computed again.

    Raises
    ------
    IdentityError
        If the folder was begun with another encoder, layer, pooling, samples, dtype or shard size.
    FormatError
        If the folder's own record is unreadable, of a newer version, or not ours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        _clear(folder)
    for leftover in folder.glob(".*.tmp*"):  # of a killed job
        leftover.unlink(missing_ok=True)
    if _begun(folder) is None:
        write_json(folder / "plan.json", plan)
        return {}
    return present(folder, plan)


def present(folder: Path, plan: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Indices of the committed shards of a folder that was begun with this plan; raises as :func:`begin`."""
    begun = _begun(folder)
    if begun is None:
        raise FormatError(f"{folder} has neither plan.json nor provenance.json; run embed() again")
    _check_format(begun, folder)
    other = [label for name, label in _FIXED.items() if begun[name] != plan[name]]
    if other:
        details = "; ".join(_differences(begun, plan))
        raise IdentityError(
            f"{folder} was begun with another {' and '.join(other)}{details and f' ({details})'}. "
            "Choose another out=, or pass resume=False (--no-resume) to delete it and start over"
        )
    entries = {number: committed(folder, plan, number) for number in range(n_shards(plan))}
    return {number: entry for number, entry in entries.items() if entry is not None}


def _begun(folder: Path) -> Any:
    return next((read_json(p) for p in (folder / "provenance.json", folder / "plan.json") if p.exists()), None)


def committed(folder: Path, plan: Mapping[str, Any], number: int) -> dict[str, Any] | None:
    """Index of a shard; None if it is not there, or its data are absent or of the wrong size."""
    data, index = shard_files(folder, number)
    if not index.exists():
        return None
    entry = read_json(index)
    whole = entry["plan"] == plan_hash(plan) and data.exists() and data.stat().st_size == entry["bytes"]
    return entry if whole else None


def _differences(begun: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    """What differs between two plans, value by value; what would be long (hashes, preprocessing) by name only."""
    there, now = (
        {**p["identity"], **{n: p[n] for n in ("n_samples", "dtype", "shard_samples")}} for p in (begun, plan)
    )
    found = []
    for name in now:
        if there.get(name) != now[name]:
            old, new = repr(there.get(name)), repr(now[name])
            found.append(f"{name}: {old} there, {new} now" if max(len(old), len(new)) <= 40 else f"{name} differs")
    return found


def _clear(folder: Path) -> None:
    """Delete our own files; indices first, so that no shard counts once its deletion has begun."""
    for pattern in ("shard-*.json", "shard-*.npy", "obs.parquet", "provenance.json", "plan.json"):
        for path in folder.glob(pattern):
            path.unlink()
    sync_folder(folder)


def commit(folder: Path, number: int, plan: Mapping[str, Any], blocks: Sequence[np.ndarray], **entry: Any) -> dict:
    """Write one shard: the rows of ``blocks`` one below the other, then its index. Returns the index.

    Parameters
    ----------
    folder, number, plan
        Which shard of which folder.
    blocks
        Arrays ``(rows_j, d)`` of the plan's dtype; at least one, which may have no rows.
    **entry
        Further fields of the index: ``ids``, ``failures``, ``tokens_per_sample``, ``grid``, ``batch_size``, ``device``.
    """
    data, index = shard_files(folder, number)
    rows, dim = sum(len(b) for b in blocks), blocks[0].shape[1]
    digest = hashlib.sha256()
    with atomic_path(data) as temporary, open(temporary, "wb") as stream:
        for piece in (_npy_header((rows, dim), plan["dtype"]), *(np.ascontiguousarray(b).data for b in blocks)):
            digest.update(piece)
            stream.write(piece)
        size = stream.tell()
    made = {
        **entry, "plan": plan_hash(plan), "rows": rows, "dim": dim, "bytes": size, "sha256": digest.hexdigest(),
    }  # fmt: skip
    write_json(index, made)
    return made


def _npy_header(shape: tuple[int, int], dtype: str) -> bytes:
    stream = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype).newbyteorder("<"))
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def finish(folder: Path, plan: Mapping[str, Any], entries: Sequence[Mapping], samples: Any) -> None:
    """Write ``obs.parquet`` and ``provenance.json`` once every shard is committed; unchanged files are left alone.

    Parameters
    ----------
    folder, plan
        The folder and what it was planned to hold.
    entries
        The index of every shard, in order.
    samples
        The samples: their ``obs`` (joined by id), ``roles`` and ``mpp``.
    """
    ids = [i for entry in entries for i in entry["ids"]]
    roles, mpp = dict(samples.roles), samples.mpp
    table = obs_bytes(samples.obs.loc[ids], roles=roles, mpp=mpp)
    filled = next((e for e in entries if e["rows"]), entries[0])
    shards = [
        {
            "file": shard_files(folder, number)[0].name, "rows": e["rows"], "bytes": e["bytes"], "sha256": e["sha256"],
            "ids_sha256": ids_hash(e["ids"]), "batch_size": e["batch_size"], "device": e["device"],
        }
        for number, e in enumerate(entries)
    ]  # fmt: skip
    facts = {
        **plan, "roles": roles, "mpp": mpp, "dim": filled["dim"], "grid": filled["grid"],
        "tokens_per_sample": filled["tokens_per_sample"] or 1, "n_embedded": len(ids),
        "n_failures": sum(len(e["failures"]) for e in entries), "n_rows": sum(e["rows"] for e in entries),
        "shards": shards, "obs_sha256": hashlib.sha256(table).hexdigest(),
    }  # fmt: skip
    target = folder / "provenance.json"
    if target.exists():
        written = read_json(target)
        software = written.pop("software", None)
        if software and canonical_json(written) == canonical_json(facts) and (folder / "obs.parquet").exists():
            (folder / "plan.json").unlink(missing_ok=True)
            return
    with atomic_path(folder / "obs.parquet") as temporary:
        temporary.write_bytes(table)
    write_json(target, {**facts, "software": record()})
    (folder / "plan.json").unlink(missing_ok=True)


def ids_hash(ids: Iterable[str]) -> str:
    """SHA-256 over sample ids in order."""
    return hash_json(list(ids))


def obs_bytes(obs: pd.DataFrame, *, roles: Mapping[str, str | None], mpp: float | None) -> bytes:
    """``obs`` as the bytes of a Parquet file, roles and mpp in the schema's metadata.

    Raises
    ------
    InputError
        If a column mixes types that Parquet cannot hold.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pa.Table.from_pandas(obs)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise InputError(f"a column of obs mixes types that Parquet cannot hold; convert it first ({error})") from None
    note = canonical_json({"format": FORMAT, "version": VERSION, "roles": roles, "mpp": mpp}).encode()
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), b"biosae": note}), sink)
    return sink.getvalue()


def read_finished(folder: Path, *, verify: bool) -> tuple[dict[str, Any], pd.DataFrame]:
    """Read and check ``provenance.json`` and ``obs.parquet`` of a complete folder.

    Sizes of all shards and the order of the ids are always checked; ``verify`` also hashes every file.

    Raises
    ------
    FormatError
        If the folder is unfinished, not ours, of a newer version, or a file is absent, truncated or altered.
    """
    facts = _provenance(folder)
    for shard in facts["shards"]:
        path = folder / shard["file"]
        size = path.stat().st_size if path.exists() else None
        if size != shard["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
            raise FormatError(f"{path} {state}; {_REDO}")
        if verify and hash_file(path) != shard["sha256"]:
            raise FormatError(f"{path} does not match its SHA-256 in provenance.json; delete that file and {_REDO}")
    obs = _read_obs(folder / "obs.parquet", facts["obs_sha256"] if verify else None)
    start, tokens = 0, facts["tokens_per_sample"]
    for shard in facts["shards"]:
        stop = start + shard["rows"] // tokens
        if ids_hash(obs.index[start:stop].tolist()) != shard["ids_sha256"]:
            raise FormatError(f"the ids in {folder / 'obs.parquet'} are not those of {shard['file']}; {_REDO_OBS}")
        start = stop
    if start != len(obs):
        raise FormatError(f"{folder / 'obs.parquet'} has {len(obs)} rows, the shards hold {start} samples; {_REDO_OBS}")
    return facts, obs


_REDO = "run embed() again with the same arguments: only the damaged shard is computed again"
_REDO_OBS = "delete obs.parquet and run embed() again with the same arguments: it is written anew, no shard is computed"


def _provenance(folder: Path) -> dict[str, Any]:
    path = folder / "provenance.json"
    if not path.exists():
        if (folder / "plan.json").exists():
            raise FormatError(f"{folder} is unfinished; run embed() again with the same arguments to complete it")
        below = [p.parent.relative_to(folder).as_posix() for p in sorted(folder.glob("*/*/provenance.json"))]
        hint = f", such as {folder / below[0]}" if below else " (<out>/<encoder>/<layer>)"
        raise FormatError(
            f"{folder} holds no embeddings (no provenance.json); give the folder of one encoder layer{hint}"
        )
    facts = read_json(path)
    _check_format(facts, folder)
    return facts


def _check_format(facts: Any, folder: Path) -> None:
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise FormatError(f"{folder} was not written by embed(); choose another folder")
    if facts["version"] > VERSION:
        raise FormatError(f"{folder} has format version {facts['version']}, this biosae reads {VERSION}; update biosae")


def _read_obs(path: Path, sha256: str | None) -> pd.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        raise FormatError(f"{path} is missing; {_REDO_OBS}")
    if sha256 is not None and hash_file(path) != sha256:
        raise FormatError(f"{path} does not match its SHA-256 in provenance.json; {_REDO_OBS}")
    try:
        table = pq.read_table(path)
        note = json.loads((table.schema.metadata or {})[b"biosae"])
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise FormatError(f"{path} is not a readable obs.parquet ({error}); {_REDO_OBS}") from None
    if note["format"] != FORMAT:
        raise FormatError(f"{path} was not written by embed(); {_REDO_OBS}")
    return table.to_pandas()


def open_shard(path: Path, *, rows: int, dim: int, dtype: str) -> np.memmap:
    """Memory-map one shard and check its header.

    Raises
    ------
    FormatError
        If the file is absent, truncated, or its header is not what the folder's provenance says.
    """
    try:
        data = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise FormatError(f"{path} cannot be read ({error}); delete it and {_REDO}") from None
    if data.shape != (rows, dim) or data.dtype != np.dtype(dtype):
        raise FormatError(f"{path} holds {data.dtype} {data.shape}, not {dtype} {(rows, dim)}; delete it and {_REDO}")
    return data
