"""NIfTI images against nibabel, planted atlases and closed forms; damaged and unusual files."""

from __future__ import annotations

import gzip
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import biosae as bs
from biosae.data.items import ReadError
from biosae.data.samples import Samples
from biosae.errors import InputError, TooManyFailuresError
from biosae.read.nifti import KINDS
from biosae.read.nifti_items import to_grey
from biosae.read.volumes import Regions, connectivity, load_atlas, open_volume

RAS = np.diag([2.0, 3.0, 4.0, 1.0])


def _save(
    path: Path, values: np.ndarray, affine: np.ndarray = RAS, *, kind="Nifti1Image", scale=None, units=None, tr=2.0
):
    image = getattr(nib, kind)(values, affine)
    image.header.set_xyzt_units(*(("mm", "sec") if units is None else units))
    if values.ndim == 4:
        image.header.set_zooms((*image.header.get_zooms()[:3], tr))
    if scale is not None:
        image.header.set_slope_inter(*scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def _one(path: Path, **options) -> Samples:
    return bs.read.nifti(path, patient=None, **options)


def _why(path: Path, **options) -> tuple[str, str]:
    with pytest.raises(TooManyFailuresError):
        _one(path, failures=path.parent / "failures.csv", **options)
    row = bs.data.failures.read_failures(path.parent / "failures.csv").iloc[-1]
    return row["reason"], row["detail"]


# -- values and orientation --------------------------------------------------------------------------------------------


def _affines() -> list[np.ndarray]:
    tilt = np.radians(12)
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    out = []
    for axes in ([0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 2, 1]):
        for signs in ([1, 1, 1], [-1, 1, 1], [-1, -1, 1], [1, -1, -1]):
            linear = np.zeros((3, 3))
            linear[axes, [0, 1, 2]] = np.array(signs) * [1.0, 2.0, 3.0]
            for rotation in (np.eye(3), turn):
                affine = np.eye(4)
                affine[:3, :3], affine[:3, 3] = rotation @ linear, [-7, 5, 11]
                out.append(affine)
    return out


@pytest.mark.parametrize("affine", _affines()[::3])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_volume_equals_nibabel(tmp_path: Path, affine: np.ndarray, suffix: str) -> None:
    values = np.random.default_rng(0).integers(-999, 999, (4, 5, 6, 2)).astype(np.int16)
    path = _save(tmp_path / f"a{suffix}", values, affine, scale=(0.25, -3.0))
    truth = nib.as_closest_canonical(nib.load(path))
    volume = open_volume(str(path))
    assert volume.shape == truth.shape[:3] and volume.n_volumes == 2 and volume.tr == 2.0
    assert volume.affine == pytest.approx(truth.affine, abs=1e-6)
    assert volume.orientation == "".join(nib.aff2axcodes(nib.load(path).affine))
    assert volume.spacing == pytest.approx(nib.affines.voxel_sizes(truth.affine), rel=1e-6)
    for t in (1, 0):
        assert np.array_equal(volume.scaled(volume.raw(t)), truth.get_fdata()[..., t])
    volume.check_end()
    volume.close()


def test_slices_stand_as_documented(tmp_path: Path) -> None:
    """A voxel with x to the right, y in front and z on top lies at the upper right of its axial slice."""
    values = np.zeros((4, 5, 6), np.float32)
    values[3, 4, 5] = 1.0
    for name, affine in {
        "ras": RAS, "las": np.array([[-2, 0, 0, 6.0], [0, 3, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1]]),
    }.items():  # fmt: skip
        path = _save(tmp_path / f"{name}.nii", values[::-1] if name == "las" else values, affine)
        axial = _one(path, limits=(0, 1))
        assert axial[5].shape == (5, 4, 3) and np.argwhere(axial[5][..., 0]).tolist() == [[0, 3]]
        coronal = _one(path, limits=(0, 1), plane="coronal")
        assert coronal[4].shape == (6, 4, 3) and np.argwhere(coronal[4][..., 0]).tolist() == [[0, 3]]
        sagittal = _one(path, limits=(0, 1), plane="sagittal")
        assert sagittal[3].shape == (6, 5, 3) and np.argwhere(sagittal[3][..., 0]).tolist() == [[0, 4]]
        assert axial.obs["position_mm"].tolist() == [0, 4, 8, 12, 16, 20]
        assert sagittal.obs["position_mm"].tolist() == [0, 2, 4, 6]
        row = coronal.obs.iloc[0]
        assert (row["row_mm"], row["column_mm"], row["slice_mm"]) == (4, 2, 3)
        assert row["orientation"] == name.upper() and row["oblique"] == 0 and row["placed"] == "sform"


def test_step_volume_and_foreground(tmp_path: Path) -> None:
    values = np.zeros((4, 5, 6, 3), np.uint8)
    values[..., 2] = np.arange(6) * 10
    values[:2, :, 4, 2] = 0
    path = _save(tmp_path / "a.nii.gz", values)
    samples = _one(path, volume=2, step=2, limits=(0, 100))
    assert samples.obs["slice"].tolist() == [0, 2, 4] and samples.ids.tolist() == [f"a.nii.gz@{i}" for i in (0, 2, 4)]
    assert samples.obs["foreground"].tolist() == [0.0, 1.0, 0.5]
    assert samples[1].max() == samples[1].min() == round(255 * 0.2)
    assert _why(path)[0] == "unsupported" and "pass volume=0" in _why(path)[1]
    assert _why(path, volume=3)[0] == "missing"


def test_percentiles_and_missing_values(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(50, 10, (6, 7, 8)).astype(np.float32)
    values[0, 0, 0], values[1, 1, 1], values[2, 2, 2] = np.nan, np.inf, -np.inf
    samples = _one(_save(tmp_path / "a.nii", values))
    low, high = np.percentile(values[np.isfinite(values)].astype(float), [0.5, 99.5])
    row = samples.obs.iloc[0]
    assert (row["limit_low"], row["limit_high"]) == pytest.approx((low, high))
    assert samples[0][-1, 0].tolist() == [0, 0, 0]
    assert samples[1][-2, 1].tolist() == [255, 255, 255] and samples[2][-3, 2].tolist() == [0, 0, 0]
    flat = _one(_save(tmp_path / "b.nii", np.full((3, 3, 3), 7, np.int16)))
    assert flat[0].max() == 0
    assert _why(_save(tmp_path / "c" / "c.nii", np.full((3, 3, 3), np.nan, np.float32)))[0] == "gaps"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20), st.floats(-1e3, 1e3), st.floats(0.01, 1e4))
def test_grey_levels(values: list[float], low: float, width: float) -> None:
    grey = to_grey(np.array(values)[None], low, low + width)[0]
    for value, level in zip(values, grey):
        share = min(max((value - low) / ((low + width) - low), 0), 1)
        assert abs(255 * share - level) <= 0.5 + 1e-6


# -- regions -----------------------------------------------------------------------------------------------------------


def test_atlas_on_another_grid_is_nearest_neighbour() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 5, (7, 6, 5)).astype(np.int32)
    atlas = np.array([[3.1, 0.2, 0, -9], [-0.2, 2.9, 0.1, -8], [0, -0.1, 3.3, -7], [0, 0, 0, 1]])
    image = np.array([[1.3, 0, 0.1, -10], [0, 1.7, 0, -9.1], [0.1, 0, 1.9, -8.3], [0, 0, 0, 1]])
    shape = (15, 11, 9)
    found = Regions(labels, atlas, [3, 1, 4], shape, image)
    truth = np.zeros(shape, int)
    for voxel in np.ndindex(shape):
        at = np.floor((np.linalg.inv(atlas) @ image @ [*voxel, 1])[:3] + 0.5).astype(int)
        if (at >= 0).all() and (at < labels.shape).all():
            truth[voxel] = labels[tuple(at)]
    assert found.counts.tolist() == [(truth == v).sum() for v in (3, 1, 4)]

    class Stored:
        n_volumes = 1
        values = rng.normal(size=shape)

        def raw(self, t: int) -> np.ndarray:
            return self.values

        def scaled(self, raw: np.ndarray) -> np.ndarray:
            return raw

    assert found.means(Stored(), 0) == pytest.approx([Stored.values[truth == v].mean() for v in (3, 1, 4)])


def _blocks(tmp_path: Path) -> Path:
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[:2], labels[2:4], labels[4:] = 10, 20, 30
    return _save(tmp_path / "atlas.nii.gz", labels)


NAMES = {10: "left", 20: "middle", 30: "right", 40: "nowhere"}


def test_scalars(tmp_path: Path) -> None:
    values = np.repeat([0.2, 0.5, 0.9], 2)[:, None, None] * np.ones((6, 6, 6))
    values[2, 0, 0], values[4:] = np.nan, np.nan
    fa = _save(tmp_path / "fa.nii", values.astype(np.float32))
    samples = _one(fa, as_="scalars", atlas=_blocks(tmp_path), regions=NAMES)
    assert samples.item == "features" and samples.meta["regions"] == ["left", "middle", "right", "nowhere"]
    assert samples[0] == pytest.approx([0.2, 0.5, np.nan, np.nan], nan_ok=True)
    assert samples.obs["empty_regions"].tolist() == ["nowhere"] and samples.ids.tolist() == ["fa.nii"]
    table = pd.DataFrame({"value": [30, 10], "name": ["right", "left"]})
    table.to_csv(tmp_path / "names.csv", index=False)
    from_file = _one(fa, as_="scalars", atlas=_blocks(tmp_path), regions=tmp_path / "names.csv")
    assert from_file.meta["regions"] == ["right", "left"] and np.isnan(from_file[0][0])
    numbered = _one(fa, as_="scalars", atlas=_blocks(tmp_path))
    assert numbered.meta["regions"] == ["10", "20", "30"]


def _bold(tmp_path: Path, n: int = 40) -> tuple[Path, np.ndarray]:
    """A 4-D image with planted regional series: two that go together, and one that is constant."""
    t = np.arange(n)
    planted = np.stack([np.sin(t / 3), 0.5 * np.sin(t / 3) + 0.3 * np.cos(t), np.full(n, 0.25)])
    values = np.repeat(planted, 2, axis=0)[:, None, None, :] * np.ones((6, 6, 6, n))
    values += np.array([1, -1])[None, :, None, None].repeat(3, axis=1) * 5  # differs by voxel, and averages out
    stored = np.rint((values + 1000) * 16).astype(np.int32)
    planted = (stored / 16 - 1000).reshape(3, 2, 6, 6, n).mean(axis=(1, 2, 3))
    return _save(tmp_path / "bold.nii.gz", stored, scale=(1 / 16, -1000), tr=1.5), planted


def test_regional_series(tmp_path: Path) -> None:
    bold, planted = _bold(tmp_path)
    options = {"as_": "regions", "atlas": _blocks(tmp_path), "regions": NAMES}
    samples = _one(bold, **options)
    assert samples.item == "signal" and samples.rate == pytest.approx(1 / 1.5) and samples.unit == "au"
    assert samples.channels == ("left", "middle", "right", "nowhere") and len(samples) == 1
    assert samples[0][:3] == pytest.approx(planted, abs=1e-4) and np.isnan(samples[0][3]).all()
    row = samples.obs.iloc[0]
    assert (row["tr"], row["duration"], row["constant_regions"]) == (1.5, 60.0, "right")
    windows = _one(bold, window=15, step=7.5, **options)
    assert windows.obs["start"].tolist() == [7.5 * i for i in range(7)] and windows[0].shape == (4, 10)
    assert windows[6][:3] == pytest.approx(planted[:, 30:40], abs=1e-4)
    assert _one(bold, tr=3.0, **options).rate == pytest.approx(1 / 3)


def test_connectivity_equals_numpy(tmp_path: Path) -> None:
    bold, planted = _bold(tmp_path)
    options = {"as_": "connectivity", "atlas": _blocks(tmp_path), "regions": NAMES}
    samples = _one(bold, **options)
    r = np.corrcoef(planted[:2])[0, 1]
    assert samples.meta["regions"][:3] == ["left ~ middle", "left ~ right", "left ~ nowhere"] and samples[0].shape == (
        6,
    )
    assert samples[0][0] == pytest.approx(r, abs=1e-5) and np.isnan(samples[0][1:]).all()
    assert _one(bold, fisher=True, **options)[0][0] == pytest.approx(np.arctanh(r), abs=1e-5)
    windows = _one(bold, window=30, **options)
    assert windows[1][0] == pytest.approx(np.corrcoef(planted[:2, 20:])[0, 1], abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(3, 30), st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_connectivity_properties(n: int, length: int, seed: int, scale: float) -> None:
    series = np.random.default_rng(seed).normal(size=(n, length))
    truth = np.corrcoef(series)[np.triu_indices(n, k=1)]
    assert connectivity(series) == pytest.approx(truth, abs=1e-9)
    assert connectivity(series * scale + 3) == pytest.approx(truth, abs=1e-5)
    series[0] = 4.0
    series[1, 0] = np.nan
    changed = connectivity(series)
    pairs = np.array(np.triu_indices(n, k=1))
    assert (np.isnan(changed) == (pairs < 2).any(axis=0)).all()
    assert connectivity(np.stack([series[-1]] * 2), fisher=True)[0] == pytest.approx(np.arctanh(1 - 1e-7)) or n == 2


def test_images_that_no_atlas_fits(tmp_path: Path) -> None:
    far = RAS.copy()
    far[:3, 3] = 500
    options = {"as_": "scalars", "atlas": _blocks(tmp_path)}
    ones = np.ones((6, 6, 6), np.float32)
    assert "in one space" in _why(_save(tmp_path / "far.nii", ones, far), **options)[1]
    image = nib.Nifti1Image(ones, RAS)
    image.header.set_xyzt_units("mm")
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "nowhere.nii")
    assert "place in space is unknown" in _why(tmp_path / "nowhere.nii", **options)[1]
    assert _one(tmp_path / "nowhere.nii").obs["placed"].unique().tolist() == ["none"]
    assert _why(_save(tmp_path / "short.nii", np.ones((6, 6, 6, 2), np.float32)), **options | {"as_": "regions"})[
        0
    ] == ("too_short")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"as_": "slice"}, "did you mean 'slices'"), ({"plane": "transverse"}, "'axial'"),
        ({"atlas": "x"}, "belongs to as_='scalars'"), ({"as_": "scalars"}, "needs atlas="),
        ({"as_": "regions", "plane": "axial"}, "belongs to as_='slices'"), ({"step": 1.5}, "whole number"),
        ({"percentiles": (5, 1)}, "rising"), ({"percentiles": (1, 101)}, "rising"), ({"volume": -1}, "from 0"),
        ({"limits": (0, 1), "percentiles": (1, 2)}, "not both"), ({"patient": ...}, "patient"),
        ({"space_unit": "inch"}, "'mm'"), ({"step": "2"}, "a number above 0"), ({"volume": "0"}, "from 0"),
        ({"limits": "ab"}, "rising"), ({"percentiles": 5}, "rising"), ({"limits": (0, None)}, "rising"),
    ],
)  # fmt: skip
def test_wrong_questions(tmp_path: Path, options: dict, words: str) -> None:
    path = _save(tmp_path / "a.nii", np.ones((3, 3, 3), np.int16))
    with pytest.raises(InputError, match=words):
        bs.read.nifti(path, **{"patient": None, **options})


@pytest.mark.parametrize("as_", KINDS)
def test_columns_that_the_reader_fills_are_refused_before_reading(tmp_path: Path, as_: str) -> None:
    path = _save(tmp_path / "a.nii", np.ones((6, 6, 6) if as_ in ("slices", "scalars") else (6, 6, 6, 4), np.float32))
    options = {"patient": None, "as_": as_} | ({} if as_ == "slices" else {"atlas": _blocks(tmp_path)})
    options |= {"tr": 2.0} if as_ in ("regions", "connectivity") else {}
    filled = [c for c in bs.read.nifti(path, **options).obs if c not in ("path", "recording")]
    assert len(filled) > 3
    for column in filled:
        table = pd.DataFrame({"path": ["none.nii"], column: ["x"]})
        with pytest.raises(InputError, match=f"column '{column}', which this reader fills"):
            bs.read.nifti(table, root=tmp_path, **options)


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        ({}, "empty"), ({99: "a"}, "none of the labels"), ({10: "a", 20: "a"}, "one name"),
        ({"x": "a"}, "whole numbers"),
        ({10.5: "a"}, "whole numbers"), (pd.DataFrame({"label": [10], "name": ["a"]}), "no column 'value'"),
        (pd.DataFrame({"value": [10, 10], "name": ["a", "b"]}), "each once"),
    ],
)  # fmt: skip
def test_wrong_regions(tmp_path: Path, regions: object, words: str) -> None:
    path = _save(tmp_path / "a.nii", np.ones((6, 6, 6), np.int16))
    with pytest.raises(InputError, match=words):
        _one(path, as_="scalars", atlas=_blocks(tmp_path), regions=regions)
    for values, why in (
        (np.full((3, 3, 3), 0.5, np.float32), "whole numbers"),
        (np.ones((3, 3, 3, 4), np.int16), "3-D"),
    ):
        atlas = _save(tmp_path / "bad.nii", values)
        with pytest.raises(InputError, match=why):
            _one(path, as_="scalars", atlas=atlas)


# -- units and damage --------------------------------------------------------------------------------------------------


def test_units_of_length_and_time(tmp_path: Path) -> None:
    values = np.ones((6, 6, 6, 5), np.int16)
    unknown = _save(tmp_path / "a.nii", values, units=("unknown", "msec"), tr=1500)
    reason, detail = _why(unknown, volume=0)
    assert reason == "no_unit" and "space_unit='mm'" in detail
    assert _one(unknown, volume=0, space_unit="mm").obs["row_mm"].iloc[0] == 3
    assert _one(unknown, volume=0, space_unit="micron").obs["row_mm"].iloc[0] == pytest.approx(0.003)
    metres = _save(tmp_path / "m.nii", values, np.diag([0.002, 0.003, 0.004, 1]), units=("meter", "sec"), tr=2000)
    assert _one(metres, volume=0, space_unit="mm").obs["slice_mm"].iloc[0] == pytest.approx(4)  # the header is heard
    options = {"as_": "regions", "atlas": _blocks(tmp_path)}
    assert _one(unknown, space_unit="mm", **options).obs["tr"].iloc[0] == pytest.approx(1.5)
    reason, detail = _why(metres, **options)
    assert reason == "no_unit" and "2000 sec" in detail and "tr=" in detail


def _damage(path: Path, at: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[at : at + len(data)] = data
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("at", "data", "reason"),
    [
        (344, b"xxxx", "unsupported"), (42, b"\xff\x7f" * 3, "unsupported"), (42, b"\x40\x01" * 3, "truncated"),
        (42, b"\x00\x80", "unreadable"), (70, b"\x20\x00", "unsupported"), (70, b"\x77\x77", "unreadable"),
        (108, np.float32(1e30).tobytes(), "unreadable"), (108, np.float32(-5).tobytes(), "unreadable"),
        (280, np.float32(np.nan).tobytes(), "unreadable"), (280, np.zeros(3, np.float32).tobytes(), "unreadable"),
        (116, np.float32(np.inf).tobytes(), "unreadable"),
    ],
)  # fmt: skip
def test_damaged_headers(tmp_path: Path, at: int, data: bytes, reason: str) -> None:
    path = _save(tmp_path / "a.nii", np.ones((5, 5, 5), np.int16), scale=(2.0, 1.0))
    _damage(path, at, data)
    with pytest.raises(ReadError) as caught:
        open_volume(str(path)).raw(0)
    assert caught.value.reason == reason


def test_files_that_are_not_whole(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 999, (9, 9, 9)).astype(np.int16)
    packed = _save(tmp_path / "a.nii.gz", values)
    data = packed.read_bytes()
    for name, part, reason in (
        ("cut.nii.gz", data[:-400], "truncated"), ("crc.nii.gz", data[:-8] + b"\0\0\0\0" + data[-4:], "unreadable"),
        ("no.nii.gz", b"x" * 900, "unreadable"), ("none.nii", b"", "empty"), ("plain.nii", data, "unreadable"),
        ("short.nii", gzip.decompress(data)[:-1], "truncated"), ("head.nii", gzip.decompress(data)[:200], "truncated"),
    ):  # fmt: skip
        (tmp_path / "part").mkdir(exist_ok=True)
        (tmp_path / "part" / name).write_bytes(part)
        assert _why(tmp_path / "part" / name)[0] == reason, name
    claim = bytearray(gzip.decompress(data)[:352])  # a header that asks for 64 MB, packed to less than a kilobyte
    claim[42:48] = np.array([400, 400, 200], "<i2").tobytes()
    (tmp_path / "part" / "bomb.nii.gz").write_bytes(gzip.compress(bytes(claim) + bytes(5000)))
    assert _why(tmp_path / "part" / "bomb.nii.gz")[0] == "truncated"


@pytest.mark.parametrize("kind", ["Nifti1Pair", "Nifti2Pair"])
def test_pairs(tmp_path: Path, kind: str) -> None:
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    _save(tmp_path / "a.hdr", values, kind=kind)
    for name in ("a.hdr", "a.img"):
        volume = open_volume(str(tmp_path / name))
        assert np.array_equal(volume.raw(0), values)
        volume.close()
    assert len(_one(tmp_path / "a.hdr")) == 4
    (tmp_path / "a.img").unlink()
    assert _why(tmp_path / "a.hdr") == ("missing", "no file a.img beside a.hdr")


def test_unusual_shapes_and_types(tmp_path: Path) -> None:
    flat = _one(_save(tmp_path / "flat.nii", np.ones((4, 5, 1, 1), np.float64)))
    assert len(flat) == 1 and flat[0].shape == (5, 4, 3)
    assert _why(_save(tmp_path / "five.nii", np.ones((3, 3, 3, 1, 2), np.float32)))[0] == "unsupported"
    assert _why(_save(tmp_path / "complex.nii", np.ones((3, 3, 3), np.complex64)))[0] == "unsupported"
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")]), RAS), tmp_path / "rgb.nii")
    assert _why(tmp_path / "rgb.nii", space_unit="mm")[0] == "unsupported"


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_one_file_keeps_root_and_path(tmp_path: Path) -> None:
    path = _save(tmp_path / "sub" / "a.nii", np.arange(27, dtype=np.int16).reshape(3, 3, 3))
    named = bs.read.nifti(path, patient=None, root=tmp_path, path="file")
    assert named.roles["path"] == "file" and set(named.obs["file"]) == {"sub/a.nii"} and named.root == tmp_path
    np.testing.assert_array_equal(named[1], _one(path)[1])
    assert set(_one(path).obs["path"]) == {"a.nii"}


def test_round_trip_pickle_threads(tmp_path: Path) -> None:
    _bold(tmp_path / "data")
    table = pd.DataFrame({"path": ["bold.nii.gz"], "subject": [7]})
    more = {"as_": "connectivity", "atlas": _blocks(tmp_path), "regions": NAMES, "window": 15}
    for options in ({"volume": 3, "plane": "sagittal"}, more, more | {"as_": "regions"}):
        samples = bs.read.nifti(table, patient="subject", root=tmp_path / "data", n_jobs=1, **options)
        assert samples.obs["patient"].unique().tolist() == ["7"]
        assert samples.obs["recording"].unique().tolist() == ["bold.nii.gz"]
        samples.save(tmp_path / "s.parquet")
        loaded, again = Samples.load(tmp_path / "s.parquet"), pickle.loads(pickle.dumps(samples))  # noqa: S301
        assert loaded.fingerprint == samples.fingerprint and loaded.rate == samples.rate
        assert loaded.meta == samples.meta and loaded.channels == samples.channels
        with ThreadPoolExecutor(4) as pool:
            for i, item in enumerate(pool.map(samples.__getitem__, range(len(samples)))):
                assert np.array_equal(item, loaded[i], equal_nan=True) and np.array_equal(
                    item, again[i], equal_nan=True
                )
    _save(tmp_path / "atlas.nii.gz", np.ones((6, 6, 6), np.uint8))
    load_atlas.cache_clear()
    with ThreadPoolExecutor(1) as pool, pytest.raises(ReadError, match="has changed"):  # a thread has files of its own
        pool.submit(Samples.load(tmp_path / "s.parquet").__getitem__, 0).result()


def test_real_images(shared: Path) -> None:
    """Every image of the pack against nibabel and the manifest; the header without its image is reported."""
    pack = shared / "data" / "nifti_small"
    manifest = pd.read_csv(pack / "manifest.csv").set_index("sample_id")
    table = manifest.reset_index()[["sample_id", "path", "shape"]].rename(columns={"shape": "stated"})
    with pytest.raises(TooManyFailuresError, match="no_unit"):  # one image states no unit of length, one has no values
        bs.read.nifti(table, patient=None, root=pack, volume=0, max_failures=0.2)
    samples = bs.read.nifti(table, patient=None, root=pack, volume=0, max_failures=0.2, space_unit="mm")
    failed = samples.failures
    assert failed["item"].tolist() == ["nifti1"] and failed["reason"].tolist() == ["missing"]
    for name, group in samples.obs.groupby("recording"):
        stored = nib.load(pack / manifest.loc[name, "path"])
        truth = nib.as_closest_canonical(stored)
        values = truth.get_fdata().reshape(*truth.shape[:3], -1)[..., 0]
        assert "x".join(map(str, stored.shape)) == manifest.loc[name, "shape"]
        assert len(group) == values.shape[2]
        row = group.iloc[0]
        sizes = nib.affines.voxel_sizes(truth.affine)
        assert (row["column_mm"], row["row_mm"], row["slice_mm"]) == pytest.approx(tuple(sizes), rel=1e-5)
        zooms = [float(z) for z in manifest.loc[name, "zooms"].split("x")[:3]]
        assert sorted(sizes) == pytest.approx(sorted(zooms), abs=0.02)
        assert row["orientation"] == "".join(nib.aff2axcodes(stored.affine))
        low, high = np.percentile(values, [0.5, 99.5])
        if high > low:
            for k in (0, values.shape[2] - 1):
                wanted = np.clip((values[:, :, k].T[::-1] - low) / (high - low), 0, 1) * 255
                assert np.abs(samples[f"{name}@{k}"][..., 0] - wanted).max() <= 0.5 + 1e-6


def test_real_series_with_an_atlas_on_another_grid(shared: Path, tmp_path: Path) -> None:
    """Means of the real fMRI crop in two halves of space, told by an atlas of another grid and orientation."""
    path = shared / "data" / "nifti_small" / "files" / "functional.nii"
    image = nib.load(path)
    data = image.get_fdata()
    x = nib.affines.apply_affine(image.affine, np.moveaxis(np.indices(image.shape[:3]), 0, -1))[..., 0]
    middle = float(np.median(x)) + 1.0
    extent = np.array([[x.min() - 30, -200, -200], [x.max() + 30, 200, 200]])
    n = int((extent[1, 0] - extent[0, 0]) // 0.5)
    labels = np.zeros((n, 2, 2), np.uint8)
    grid = extent[0, 0] + 0.5 * np.arange(n)
    labels[grid < middle], labels[grid >= middle] = 1, 2
    affine = np.array([[0.5, 0, 0, extent[0, 0]], [0, 400.0, 0, -200], [0, 0, 400.0, -200], [0, 0, 0, 1]])
    atlas = _save(tmp_path / "halves.nii.gz", labels[::-1].copy(), affine @ np.array(
        [[-1, 0, 0, n - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]
    ))  # fmt: skip
    samples = _one(path, as_="regions", atlas=atlas, regions={1: "left", 2: "right"})
    assert samples.rate == 0.5 and samples[0].shape == (2, 20)
    truth = np.stack([data[x < middle].mean(axis=0), data[x >= middle].mean(axis=0)])
    assert samples[0] == pytest.approx(truth, rel=1e-6)
