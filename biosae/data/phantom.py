"""A phantom cohort: rendered histology tiles whose nuclei, patients, labels and scanners are planted, hence known."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.items import make_reader
from biosae.data.render import CELLS, MPP, Layout, draw, place
from biosae.data.samples import Samples
from biosae.data.scanner import SCANNERS, scan
from biosae.errors import InputError, nearest
from biosae.files import atomic_path, write_json, write_table

LABELS = ("control", "inflamed")
LABEL_TYPES = ("lymphocyte", "plasma")  # the types that the label shifts
LABEL_SHIFT = 0.7  # shift of their log-mean count at label_effect = 1
TILE_SD = 0.4  # spread of log-mean counts between tiles of a slide
SITES_PER_SCANNER = 2
_ID = re.compile(r"P(\d+)-S(\d+)-T(\d+)")
_COHORT, _PIXELS, _DECOY = 0, 1, 2  # independent random streams
_ASSIGN, _PATIENT, _SLIDE, _TILE, _PLACE, _DRAW, _STAIN, _THIN = range(8)  # what a stream is drawn for


class Cohort:
    """All random draws of one phantom. Any tile follows from the parameters and its id alone, in any order or process.

    Parameters
    ----------
    parameters
        The keyword arguments of :func:`phantom`, without ``out``.
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.parameters = dict(parameters)
        self.types = tuple(parameters["cell_types"])
        self.size = int(parameters["size"])
        self._seed = int(parameters["random_state"])

    def _rng(self, purpose: int, stream: int, patient: int = 0, slide: int = 0, tile: int = 0) -> np.random.Generator:
        # always six words: numpy pads shorter seeds with zeros, and two purposes would share their numbers
        return np.random.default_rng([self._seed, purpose, stream, patient, slide, tile])

    @cached_property
    def patients(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Label, scanner and site index of each patient, each ``(n_patients,)``."""
        n, n_scanners = self.parameters["n_patients"], len(self.parameters["scanners"])
        rng = self._rng(_ASSIGN, _COHORT)
        scanner = rng.permutation(np.arange(n) % n_scanners)
        label, site = np.zeros(n, dtype=int), np.zeros(n, dtype=int)
        lean = np.linspace(-1, 1, n_scanners) if n_scanners > 1 else np.zeros(1)
        wanted, given = 0.0, 0
        for j in range(n_scanners):
            members = rng.permutation(np.flatnonzero(scanner == j))
            wanted += len(members) * (0.5 + 0.5 * self.parameters["label_scanner_correlation"] * lean[j])
            positive = int(np.floor(wanted + 0.5)) - given
            given += positive
            label[members[:positive]] = 1
            site[rng.permutation(members)] = SITES_PER_SCANNER * j + np.arange(len(members)) % SITES_PER_SCANNER
        return label, scanner, site

    def counts(self, stream: int, patient: int, slide: int, tile: int) -> np.ndarray:
        """Wanted nuclei per type: Poisson around a log-normal mean with patient, slide and tile effects.

        The label shifts the pixels' stream only; the decoy stream knows no label.
        """
        p, k = self.parameters, len(self.types)
        log_mean = np.log([CELLS[t].density * (self.size / 96) ** 2 for t in self.types])
        log_mean += self._rng(_PATIENT, stream, patient).normal(0, 1, k) * p["patient_sd"]
        log_mean += self._rng(_SLIDE, stream, patient, slide).normal(0, 1, k) * p["slide_sd"]
        rng = self._rng(_TILE, stream, patient, slide, tile)
        log_mean += rng.normal(0, 1, k) * TILE_SD
        if stream == _PIXELS and self.patients[0][patient]:
            log_mean += [LABEL_SHIFT * p["label_effect"] * (t in LABEL_TYPES) for t in self.types]
        return rng.poisson(np.exp(log_mean))

    def layout(self, patient: int, slide: int, tile: int, stream: int = _PIXELS) -> Layout:
        """Where the nuclei of a tile lie."""
        wanted = self.counts(stream, patient, slide, tile)
        return place(wanted, self.types, size=self.size, rng=self._rng(_PLACE, stream, patient, slide, tile))

    def reported(self, patient: int, slide: int, tile: int) -> np.ndarray:
        """Counts written to ``obs``: a true nucleus is kept with probability ``count_effect``, the rest are decoys."""
        effect, k = self.parameters["count_effect"], len(self.types)
        true = self.layout(patient, slide, tile).counts(k)
        if effect == 1:
            return true
        decoy = self.layout(patient, slide, tile, _DECOY).counts(k)
        rng = self._rng(_THIN, _DECOY, patient, slide, tile)
        return rng.binomial(true, effect) + rng.binomial(decoy, 1 - effect)

    def image(self, patient: int, slide: int, tile: int) -> np.ndarray:
        """The rendered tile, ``uint8 (size, size, 3)``."""
        p = self.parameters
        layout = self.layout(patient, slide, tile)
        stains = draw(layout, self.types, size=self.size, rng=self._rng(_DRAW, _PIXELS, patient, slide, tile))
        strength = np.exp(self._rng(_STAIN, _PIXELS, patient, slide).normal(0, 0.12, 2) * p["stain_variation"])
        scanner = SCANNERS[self.patients[1][patient]].scaled(p["scanner_effect"])
        return scan(stains[0] * strength[0], stains[1] * strength[1], scanner)

    def table(self) -> pd.DataFrame:
        """``obs`` of the cohort, one row a tile."""
        p = self.parameters
        label, scanner, site = self.patients
        rows, counts = [], []
        for i in range(p["n_patients"]):
            for s in range(p["n_slides"]):
                for t in range(p["n_tiles"]):
                    patient, slide = f"P{i:03d}", f"P{i:03d}-S{s}"
                    rows.append((f"{slide}-T{t:03d}", patient, slide, site[i], scanner[i], label[i]))
                    counts.append(self.reported(i, s, t))
        obs = pd.DataFrame(rows, columns=["sample_id", "patient", "slide", "site", "scanner", "label"])
        obs["site"] = [f"site_{j + 1}" for j in obs["site"]]
        obs["scanner"] = [p["scanners"][j] for j in obs["scanner"]]
        obs["label"] = [LABELS[j] for j in obs["label"]]
        obs["mpp"] = MPP
        obs[[f"count_{t}" for t in self.types]] = np.array(counts, dtype=np.int64)
        return obs.set_index("sample_id")


def _indices(sample_id: str) -> tuple[int, int, int]:
    found = _ID.fullmatch(str(sample_id))
    if not found:
        raise InputError(f"sample {sample_id!r} is not a tile of a phantom; its ids look like 'P003-S0-T012'")
    return tuple(int(v) for v in found.groups())


class PhantomReader:
    """Renders the tile that a row's ``sample_id`` names. Picklable; holds parameters only."""

    kind = "phantom"

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.parameters = dict(parameters)

    @cached_property
    def _cohort(self) -> Cohort:
        return Cohort(self.parameters)

    def __call__(self, row: Mapping[str, Any]) -> np.ndarray:
        return self._cohort.image(*_indices(row["sample_id"]))

    def __getstate__(self) -> dict[str, Any]:
        return {"parameters": self.parameters}

    def spec(self) -> dict[str, Any]:
        """What rebuilds this reader."""
        return {"kind": self.kind, "parameters": self.parameters}


def phantom(
    kind: str = "histology",
    *,
    n_patients: int = 24,
    n_slides: int = 1,
    n_tiles: int = 20,
    size: int = 96,
    cell_types: Sequence[str] = ("epithelial", "lymphocyte", "plasma", "fibroblast"),
    scanners: Sequence[str] = ("A", "B"),
    scanner_effect: float = 1.0,
    label_scanner_correlation: float = 0.0,
    label_effect: float = 1.0,
    count_effect: float = 1.0,
    patient_sd: float = 0.35,
    slide_sd: float = 0.15,
    stain_variation: float = 1.0,
    out: str | os.PathLike | None = None,
    random_state: int = 0,
) -> Samples:
    """A cohort of rendered tiles with planted nuclei, patients, labels and scanners.

    The number of nuclei of type ``c`` in tile ``t`` of slide ``s`` of patient ``i`` is Poisson with
    ``log mean = log m_c + u_ic + v_isc + w_istc + 0.7 * label_effect * label_i * [c is lymphocyte or plasma]``, where
    ``u``, ``v`` and ``w`` are normal with standard deviations ``patient_sd``, ``slide_sd`` and 0.4. Nuclei that find no
    room are left out, and ``obs`` counts those drawn.

    Parameters
    ----------
    kind
        Only ``"histology"``.
    n_patients, n_slides, n_tiles
        Patients, slides per patient, tiles per slide.
    size
        Edge of a tile in pixels of 0.5 micrometres, 48 to 1024. Mean counts grow with the area.
    cell_types
        Among ``epithelial lymphocyte plasma fibroblast macrophage``.
    scanners
        Names of one to four scanners. A patient is scanned on one scanner; each scanner serves two sites, which have
        no effect of their own.
    scanner_effect
        Strength of the scanners' stain vectors, gamma, blur and JPEG; 0 makes them identical.
    label_scanner_correlation
        Association of the patients' label with the scanner, -1 to 1. With two scanners it is the phi coefficient, up to
        rounding to whole patients. With more, ``P(inflamed)`` runs evenly from ``(1 - r) / 2`` to ``(1 + r) / 2``.
    label_effect
        Multiple of 0.7 by which ``inflamed`` shifts the log-mean counts of lymphocytes and plasma cells.
    count_effect
        Probability that a reported count comes from the nuclei drawn. At 1 the counts in ``obs`` are exact. At 0 they
        come from a second, unseen cohort with the same distribution (without the label's shift), hence are
        independent of the pixels and of the label.
    patient_sd, slide_sd
        Spread of log-mean counts between patients, and between slides of a patient.
    stain_variation
        Multiple of 12 % spread of each stain's strength between slides, unrelated to anything else.
    out
        A folder to write PNG tiles and ``samples.csv`` to. The Samples returned read these files, and so can
        ``biosae.read.tiles(out + "/samples.csv", patient="patient", ...)``. None renders tiles when they are read.
    random_state
        Seed. A tile depends on the parameters and its id, not on order, subset or number of workers.

    Returns
    -------
    Samples
        ``obs`` has ``patient slide site scanner label mpp`` and an integer ``count_<type>`` per cell type. ``meta`` has
        ``phantom`` (the parameters), ``targets`` (all count columns), ``planted`` (those in the pixels),
        ``label_targets`` (count columns that the label shifts), ``technical`` (``["scanner"]`` or empty) and
        ``label_scanner_phi`` (as realised, None without exactly two scanners).

    Raises
    ------
    InputError
        If an argument is out of its range or not a known name.

    Notes
    -----
    The null phantom has ``scanner_effect=0, label_effect=0, count_effect=0``. Every association with a count, the
    label, the scanner or the site is then false. Counts and pixels still vary between patients, as in real cohorts, so
    a test that takes tiles for independent units finds too many: use the patient as the unit, or set
    ``patient_sd=slide_sd=0`` as well, which makes the reported counts of tiles independent of each other.

    Examples
    --------
    >>> samples = phantom(n_patients=2, n_tiles=1)
    >>> samples[0].shape
    (96, 96, 3)
    """
    parameters = {
        "n_patients": n_patients,
        "n_slides": n_slides,
        "n_tiles": n_tiles,
        "size": size,
        "cell_types": list(cell_types),
        "scanners": [str(s) for s in scanners],
        "scanner_effect": scanner_effect,
        "label_scanner_correlation": label_scanner_correlation,
        "label_effect": label_effect,
        "count_effect": count_effect,
        "patient_sd": patient_sd,
        "slide_sd": slide_sd,
        "stain_variation": stain_variation,
        "random_state": random_state,
    }
    _check(kind, parameters)
    cohort = Cohort(parameters)
    roles = {role: role for role in ("patient", "slide", "site", "scanner", "label", "mpp")}
    samples = Samples(cohort.table(), PhantomReader(parameters), roles=roles, meta=_meta(cohort))
    return samples if out is None else _write(samples, Path(out))


_RANGES = {
    "n_patients": (1, 100_000),
    "n_slides": (1, 1000),
    "n_tiles": (1, 100_000),
    "size": (48, 1024),
    "random_state": (0, 2**63),
    "scanner_effect": (0, 3),
    "label_scanner_correlation": (-1, 1),
    "label_effect": (-3, 3),
    "count_effect": (0, 1),
    "patient_sd": (0, 2),
    "slide_sd": (0, 2),
    "stain_variation": (0, 5),
}
_WHOLE = ("n_patients", "n_slides", "n_tiles", "size", "random_state")


def _check(kind: str, parameters: dict[str, Any]) -> None:
    if kind != "histology":
        raise InputError(f"no phantom of kind {kind!r}; {nearest(kind, ['histology'])}")
    for name, (low, high) in _RANGES.items():
        value, whole = parameters[name], name in _WHOLE
        if isinstance(value, bool) or not isinstance(value, (int, np.integer) if whole else (int, float, np.number)):
            raise InputError(f"{name}={value!r} must be a {'whole ' * whole}number")
        if not low <= value <= high:
            raise InputError(f"{name}={value!r} must lie between {low} and {high}")
        parameters[name] = int(value) if whole else float(value)
    for name in ("cell_types", "scanners"):
        names = parameters[name]
        if not names or len(set(names)) < len(names):
            raise InputError(f"{name}={names!r} must hold at least one name, and each only once")
    for name in parameters["cell_types"]:
        if name not in CELLS:
            raise InputError(f"no cell type {name!r}; {nearest(name, CELLS)}")
    if len(parameters["scanners"]) > len(SCANNERS):
        raise InputError(f"{len(parameters['scanners'])} scanners; the phantom knows {len(SCANNERS)}, give fewer names")
    if len(parameters["scanners"]) == 1 and parameters["label_scanner_correlation"]:
        raise InputError("label_scanner_correlation needs at least two scanners; give two names or set it to 0")


def _meta(cohort: Cohort) -> dict[str, Any]:
    p = cohort.parameters
    targets = [f"count_{t}" for t in cohort.types]
    label, scanner, _ = cohort.patients
    varied = len(p["scanners"]) == 2 and len(set(label)) == 2 and len(set(scanner)) == 2
    shifted = [f"count_{t}" for t in cohort.types if t in LABEL_TYPES]
    return {
        "phantom": p,
        "targets": targets,
        "planted": targets if p["count_effect"] > 0 else [],
        "label_targets": shifted if p["label_effect"] else [],
        "technical": ["scanner"] if p["scanner_effect"] > 0 and len(p["scanners"]) > 1 else [],
        "label_scanner_phi": float(np.corrcoef(label, scanner)[0, 1]) if varied else None,
    }


def nuclei(samples: Samples, i: int) -> pd.DataFrame:
    """The nuclei drawn in sample ``i`` of a phantom.

    Returns
    -------
    pandas.DataFrame
        ``x`` (to the right) and ``y`` (down) of the centre in pixels, pixel centres being whole numbers; ``type``;
        ``long`` and ``short`` semi-axis in pixels; ``angle`` of the long axis in radians from x towards y.

    Raises
    ------
    InputError
        If the samples are not a phantom's.
    """
    if "phantom" not in samples.meta:
        raise InputError("these samples are not a phantom's: no planted nuclei are known")
    cohort = Cohort(samples.meta["phantom"])
    layout = cohort.layout(*_indices(samples.obs.index[i]))
    kinds = pd.Categorical.from_codes(layout.kind, categories=list(cohort.types))
    return pd.DataFrame(
        {"x": layout.x, "y": layout.y, "type": kinds, "long": layout.long, "short": layout.short, "angle": layout.angle}
    )


def _write(rendered: Samples, out: Path) -> Samples:
    from PIL import Image

    obs, roles, meta = rendered.obs, rendered.roles, rendered.meta
    for i, sample_id in enumerate(obs.index):
        with atomic_path(out / "tiles" / f"{sample_id}.png") as temporary:
            Image.fromarray(rendered[i]).save(temporary)
    obs = obs.assign(path=[f"tiles/{sample_id}.png" for sample_id in obs.index])
    write_table(out / "samples.csv", obs.reset_index())
    write_json(out / "phantom.json", meta)
    return Samples(obs, make_reader({"kind": "image"}), roles={**roles, "path": "path"}, root=out, meta=meta)
