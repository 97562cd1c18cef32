"""The table of samples and the way to read item i."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.items import ITEMS, NOUNS, Reader, make_reader, noun_of
from biosae.data.roles import canonical_obs
from biosae.errors import FormatError, InputError
from biosae.files import atomic_path, canonical_json, hash_json, stamp

FORMAT_VERSION = 1


class _Row(Mapping):
    """One row of ``obs`` as a mapping, without building a Series; ``path`` is resolved against the root."""

    def __init__(self, samples: Samples, i: int) -> None:
        self._samples, self._i = samples, i

    def __getitem__(self, key: str) -> Any:
        obs = self._samples.obs
        if key == "sample_id":
            return obs.index[self._i]
        value = obs[key].iloc[self._i]
        if key not in ("path", "mask") or not isinstance(value, str):
            return value
        root = self._samples.root
        return value if root is None else str(root / value)

    def __iter__(self) -> Iterator[str]:
        yield "sample_id"
        yield from self._samples.obs.columns

    def __len__(self) -> int:
        return self._samples.obs.shape[1] + 1


class Samples:
    """A table with one row a sample, and a reader: a picklable map-style dataset of images, signals or vectors.

    Parameters
    ----------
    obs
        Table whose index holds the sample ids (unique strings).
    reader
        Callable that takes a row (mapping of column to value) and returns an item; see :class:`Reader`.
    roles
        Role to column name. ``patient`` must be there; ``None`` says that the patient is unknown. The column of
        each role is also kept under the role's own name (the canonical column). A column that already bears the
        name of a role takes that role when no other column was named for it (``patient`` excepted).
    mpp
        Micrometres per pixel of every sample. For one value a row name a column in ``roles["mpp"]``.
    root
        Folder against which relative paths are resolved.
    meta
        Plain, JSON-ready facts that travel with the samples.

    Raises
    ------
    InputError
        For ids that repeat, columns that are absent, two columns that claim one role, or missing patients.

    Examples
    --------
    >>> import biosae as bs
    >>> samples = bs.read.tiles("tiles.csv", patient="case", site="centre", mpp=0.5)  # doctest: +SKIP
    >>> samples[0].shape  # doctest: +SKIP
    (256, 256, 3)
    """

    def __init__(
        self,
        obs: pd.DataFrame,
        reader: Reader,
        *,
        roles: Mapping[str, str | None],
        mpp: float | None = None,
        root: str | os.PathLike | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self.obs, self.roles = canonical_obs(obs, roles)
        self.reader = reader
        self.root = None if root is None else Path(root)
        self.meta = dict(meta or {})
        self._mpp = None if mpp is None else _positive(mpp)
        if self._mpp is not None and "mpp" in self.obs and not np.allclose(self.obs["mpp"], self._mpp):
            raise InputError(f"mpp={mpp} differs from the column 'mpp'; pass mpp='mpp' to use the column, or rename it")

    # -- size and looks ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.obs)

    def __repr__(self) -> str:
        named = ", ".join(f"{r}={c!r}" for r, c in self.roles.items() if r != "path")
        patients = f"{self.obs['patient'].nunique()} patients" if "patient" in self.obs else "patients unknown"
        return f"Samples: {len(self)} {NOUNS[self.item]}, {patients}, {self._scale()}; {named}"

    def _scale(self) -> str:
        """The physical scale in words."""
        if self.item != "signal":
            return "mpp unknown" if self.mpp is None else f"{self.mpp:g} um/px"
        rate = "rates differ" if self.rate is None else f"{self.rate:g} Hz"
        return f"{len(self.channels)} channels, {rate}, {self.unit}"

    def _repr_html_(self) -> str:
        import html

        return f"<p>{html.escape(repr(self))}</p>{self.obs.head(5).to_html()}"

    @property
    def ids(self) -> pd.Index:
        """Sample ids, in row order."""
        return self.obs.index

    @property
    def mpp(self) -> float | None:
        """Micrometres per pixel; None where unknown or where the rows of ``obs["mpp"]`` differ."""
        if self._mpp is not None or "mpp" not in self.obs or not len(self):
            return self._mpp
        values = self.obs["mpp"].to_numpy(float)
        return float(values[0]) if (values == values[0]).all() else None

    @property
    def item(self) -> str:
        """Kind of item: a key of ``ITEMS``."""
        return getattr(self.reader, "item", "image")

    @property
    def noun(self) -> str:
        """What one item is called in captions: tile, image, radiograph, crop, slice, recording window, ..."""
        return noun_of(self.reader.spec(), self.item, self.obs, self.meta)

    @property
    def rate(self) -> float | None:
        """Samples a second (Hz) of every signal; None where they differ, or for other items."""
        return getattr(self.reader, "rate", None)

    @property
    def unit(self) -> str | None:
        """Physical unit of the signals' values, ``"native"`` where the channels' differ; None for other items."""
        return getattr(self.reader, "unit", None)

    @property
    def channel_units(self) -> tuple[str, ...]:
        """Physical unit of each of ``channels``; empty for other items."""
        units = getattr(self.reader, "channel_units", None)
        return tuple(units) if units is not None else tuple(self.unit for _ in self.channels)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the signals' channels, in order; empty for other items."""
        return tuple(getattr(self.reader, "channels", None) or ())

    @property
    def failures(self) -> pd.DataFrame:
        """What the reader listed and could not use: columns ``item, stage, reason, detail``."""
        return pd.DataFrame(self.meta.get("failures", []), columns=["item", "stage", "reason", "detail"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over ids, paths as written in ``obs``, where in the files the items lie, and the reader's settings;
        not over the files' contents."""
        paths = self.obs["path"].tolist() if "path" in self.obs else None
        facts = {"ids": self.ids.tolist(), "paths": paths, "reader": self.reader.spec()}
        where = {c: self.obs[c].tolist() for c in getattr(self.reader, "columns", ()) if c in self.obs}
        return hash_json(facts | ({"where": where} if where else {}))

    def files_hash(self, rows: slice = slice(None), *, look_into: int = 16) -> str | None:
        """SHA-256 over the sizes of the files of some rows and, of up to ``look_into`` of them (evenly chosen), their
        first and last 64 KiB; None where the samples do not come from files.

        Sees files that were replaced under the same name, wherever they lie. A file that is absent counts as such.
        """
        if "path" not in self.obs:
            return None
        rows = np.arange(len(self))[rows]
        files = list(dict.fromkeys(self.file(int(i)) for i in rows))
        chosen = set(np.linspace(0, len(files) - 1, min(len(files), look_into)).astype(int).tolist())
        return hash_json([stamp(file, ends=i in chosen) for i, file in enumerate(files)])

    # -- items ---------------------------------------------------------------------------------------------------

    def file(self, i: int) -> Path | None:
        """Path of item ``i`` on this machine, or None if the samples do not come from files."""
        if "path" not in self.obs:
            return None
        path = Path(self.obs["path"].iloc[i])
        return path if self.root is None else self.root / path

    def __getitem__(self, i: int | str) -> np.ndarray:
        """Read one item, by position or by id.

        Returns
        -------
        ``uint8 (H, W, 3)`` RGB for images, ``float32 (C, T)`` for signals (NaN where nothing was recorded),
        ``float32 (d,)`` for features.

        Raises
        ------
        ReadError
            If this item cannot be read; other items are not touched.
        """
        item = self.reader(self.row(self._at(i)))
        dtype, n_axes, what = ITEMS[self.item]
        if item.dtype != dtype or item.ndim != n_axes or (self.item == "image" and item.shape[2] != 3):
            raise TypeError(f"the reader returned {item.dtype} {item.shape}, not {np.dtype(dtype)}, {what}")
        return item

    def mask(self, i: int | str) -> np.ndarray:
        """Part labels of item ``i`` (the role ``mask``), ``uint8`` or ``uint16 (H, W)``, aligned with ``samples[i]``.

        Raises
        ------
        InputError
            If the samples have no masks.
        ReadError
            If this mask cannot be read, or its size is not that of the image.
        """
        if "mask" not in self.obs or not hasattr(self.reader, "mask"):
            raise InputError("these samples have no masks; read images with mask= the column of the masks' files")
        return self.reader.mask(self.row(self._at(i)))

    def _at(self, i: int | str) -> int:
        """Position of an item given by position or by id."""
        if isinstance(i, str):
            if i not in self.obs.index:
                raise InputError(f"no sample {i!r}")
            return int(self.obs.index.get_loc(i))
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"sample {i} of {n}")
        return int(i) % n

    def row(self, i: int) -> Mapping[str, Any]:
        """Row ``i`` as a reader gets it: column to value, ``sample_id``, and ``path`` (and ``mask``) resolved."""
        return _Row(self, i)

    def select(self, which: Sequence | np.ndarray | pd.Series | slice) -> Samples:
        """Samples of some rows.

        Parameters
        ----------
        which
            Boolean mask (a Series is aligned by id), ids in the wanted order, or integer positions or a slice.
        """
        if isinstance(which, slice):
            return self._like(self.obs.iloc[which])
        if isinstance(which, pd.Series) and which.dtype == bool:
            if not self.ids.isin(which.index).all():
                raise InputError("the mask's index does not hold every sample id; pass a plain array to go by position")
            which = which.reindex(self.ids)
        array = np.asarray(which)
        if array.dtype == bool:
            if array.shape != (len(self),):
                raise InputError(f"the mask has shape {array.shape}, the samples need ({len(self)},)")
            return self._like(self.obs[array])
        if array.size == 0 or np.issubdtype(array.dtype, np.integer):
            return self._like(self.obs.iloc[array.astype(int)])
        absent = pd.Index(array).difference(self.ids)
        if len(absent):
            raise InputError(f"{len(absent)} ids are not among the samples, e.g. {str(absent[0])!r}")
        return self._like(self.obs.loc[array])

    def with_obs(self, **columns: Any) -> Samples:
        """Samples with columns added or replaced; a Series is joined by id, anything else goes by row order."""
        stale = [r for r, c in self.roles.items() if c in columns and r != c and r not in columns]
        obs = self.obs.drop(columns=stale)
        for name, values in columns.items():
            obs[name] = values
        roles = {r: r if r in columns else c for r, c in self.roles.items()}
        return Samples(obs, self.reader, roles=roles, mpp=self._mpp, root=self.root, meta=self.meta)

    def _like(self, obs: pd.DataFrame) -> Samples:
        return Samples(obs, self.reader, roles=self.roles, mpp=self._mpp, root=self.root, meta=self.meta)

    # -- disk ----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write ``obs`` as Parquet, with roles, mpp, root, meta and the reader's settings in the schema's metadata.

        Paths are stored as they are in ``obs`` (relative to the root where they lie under it). No pickle.

        Raises
        ------
        InputError
            If the suffix is not ``.parquet`` or a column holds values that Parquet cannot.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        if path.suffix != ".parquet":
            raise InputError(f"samples are saved as Parquet; name the file {path.with_suffix('.parquet').name!r}")
        try:
            table = pa.Table.from_pandas(self.obs)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(f"a column mixes types that Parquet cannot hold; convert it first ({error})") from None
        record = {
            "format": "biosae.samples", "version": FORMAT_VERSION, "roles": self.roles, "mpp": self._mpp,
            "reader": self.reader.spec(), "meta": self.meta,
        }  # fmt: skip
        if self.root is not None:
            root = self.root.resolve()
            record["root"] = str(root)
            record["root_from_file"] = _relative(root, path.resolve().parent)
        metadata = {**(table.schema.metadata or {}), b"biosae": canonical_json(record).encode()}
        with atomic_path(path) as temporary:
            pq.write_table(table.replace_schema_metadata(metadata), temporary)

    @classmethod
    def load(cls, path: str | os.PathLike, *, root: str | os.PathLike | None = None) -> Samples:
        """Read what :meth:`save` wrote.

        Parameters
        ----------
        path
            The Parquet file.
        root
            Where the image files lie now. By default the stored root, or, if that is gone, the folder that lies
            to the Parquet file as the root did when it was saved.

        Raises
        ------
        FormatError
            If the file is absent, damaged, of a newer version, or not written by :meth:`save`.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        if not path.is_file():
            raise FormatError(f"{path} does not exist")
        try:
            table = pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise FormatError(f"{path} is not a readable Parquet file ({error})") from None
        stored = (table.schema.metadata or {}).get(b"biosae")
        if stored is None:
            raise FormatError(
                f"{path} is a plain Parquet table; read it with bs.read.tiles or bs.read.images, naming patient="
            )
        record = json.loads(stored)
        if record.get("format") != "biosae.samples" or record["version"] > FORMAT_VERSION:
            raise FormatError(f"{path} is {record.get('format')} version {record.get('version')}; update biosae")
        if root is None and "root" in record:
            root = Path(record["root"])
            beside = record["root_from_file"]
            if not root.is_dir() and beside is not None and (path.resolve().parent / beside).is_dir():
                root = (path.resolve().parent / beside).resolve()
        spec = record["reader"]
        return cls(
            table.to_pandas(),
            make_reader(spec),
            roles=record["roles"],
            mpp=record["mpp"],
            root=root,
            meta=record["meta"],
        )

    # -- checks --------------------------------------------------------------------------------------------------

    def audit(self, **options: Any) -> Any:
        """Look for what would spoil a study; see :func:`biosae.data.audit.audit`."""
        from biosae.data.audit import audit

        return audit(self, **options)


def _positive(mpp: float) -> float:
    if isinstance(mpp, (bool, str)) or not np.isscalar(mpp) or not mpp > 0 or not np.isfinite(mpp):
        raise InputError(f"mpp={mpp!r} must be a positive number of micrometres per pixel, or the name of a column")
    return float(mpp)


def _relative(target: Path, start: Path) -> str | None:
    try:
        return Path(os.path.relpath(target, start)).as_posix()
    except ValueError:  # another drive
        return None
