"""Maps of tokens: edges against the preprocessing itself, codes against their places, recordings against windows."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from biosae.encoders.preprocess import Preprocess
from biosae.errors import InputError
from biosae.interpret import grid_box, recording_map, token_map

HALF = (0.5, 0.5, 0.5)


def seen(preprocess: Preprocess, height: int, width: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Edges of the input on the image, read off two ramps that went through the preprocessing itself."""
    ramps = []
    for axis, side in ((1, width), (0, height)):
        line = (np.arange(side) + 0.5) / side * 255
        ramp = np.broadcast_to(line[None, :] if axis == 1 else line[:, None], (height, width))
        from PIL import Image

        ramps.append(np.asarray(preprocess._resized(Image.fromarray(ramp.astype(np.float32)))))
    x, y = ramps[0].mean(axis=0) / 255 * width, ramps[1].mean(axis=1) / 255 * height
    ends = []
    for line in (x, y):
        n = len(line)
        inner = slice(n // 4, n - n // 4)  # away from the borders, where the filter is cut
        slope, start = np.polyfit(np.arange(n)[inner] + 0.5, line[inner], 1)
        ends.append((start, start + slope * n))
    return np.array([ends[0][0], ends[1][0], ends[0][1], ends[1][1]]), (len(x), len(y))


@given(
    width=st.integers(60, 300),
    height=st.integers(60, 300),
    size=st.sampled_from([None, 32, 56, 57]),
    resize=st.sampled_from(["shorter", "squash", "crop"]),
    crop_pct=st.sampled_from([1.0, 0.875, 0.7]),
    matched=st.booleans(),
)
def test_the_grid_lies_where_the_preprocessing_looked(width, height, size, resize, crop_pct, matched):
    scale = {"tile_mpp": 0.5, "target_mpp": 0.4, "match_mpp": True} if matched else {}
    preprocess = Preprocess(HALF, HALF, size=size, resize=resize, crop_pct=crop_pct, interpolation="bilinear", **scale)
    identity = {"preprocess": preprocess.spec(), "tile_mpp": 0.5}
    expected, _ = seen(preprocess, height, width)
    box = grid_box(identity, (height, width), (4, 4))
    np.testing.assert_allclose(box, expected, atol=0.02 * max(width, height) / (size or 100) + 0.05)


def test_without_a_preprocessing_the_grid_covers_the_item():
    assert grid_box(None, (30, 40, 3), (2, 2)) == (0, 0, 40, 30)
    with pytest.raises(InputError, match="micrometres"):
        grid_box({"preprocess": {"rescale_to_mpp": 1.0, "size": None}}, (30, 40), (2, 2))


@pytest.mark.parametrize("layer", ["bn1", "bn2", "bn3", "bn4", "final"])
def test_cells_of_unpadded_convolutions_are_centred_on_what_they_see(layer):
    """The gradient of a cell with regard to the input is not zero on a square about the cell's centre only."""
    import torch

    from biosae.encoders.nic import NicNet

    torch.manual_seed(0)
    net = NicNet(patch_stride=32).eval()
    x = torch.randn(1, 3, 150, 150, requires_grad=True)
    y = net.maps(x)[layer]
    rows, columns = y.shape[2:]
    row, column = rows // 2, columns - 1
    y[0, :, row, column].sum().backward()
    hit = x.grad[0].abs().sum(0).numpy() > 0
    centre = [(np.flatnonzero(hit.any(axis=a))[[0, -1]] + 0.5).mean() for a in (0, 1)]  # x, y
    identity = {"architecture": {"arch": "nic", "args": {"patch_stride": 32}}, "layer": layer, "preprocess": {}}
    left, upper, right, lower = grid_box(identity, (150, 150), (rows, columns))
    assert left + (column + 0.5) * (right - left) / columns == pytest.approx(centre[0], abs=0.51)
    assert upper + (row + 0.5) * (lower - upper) / rows == pytest.approx(centre[1], abs=0.51)


class Items:
    """Stands in for samples."""

    def __init__(self, items, kind="image", **facts):
        self.items, self.item, self.mpp = items, kind, None
        self.channels, self.rate, self.unit = (), None, None
        self.__dict__.update(facts)

    def __getitem__(self, name):
        return self.items[name]


def tokens(codes: np.ndarray, identity=None, **obs) -> anndata.AnnData:
    """One latent on (samples, rows, columns) of tokens."""
    n, rows, columns = codes.shape
    table = pd.DataFrame(
        {
            "sample_id": np.repeat([f"s{i}" for i in range(n)], rows * columns),
            "token_row": np.tile(np.repeat(np.arange(rows), columns), n),
            "token_col": np.tile(np.arange(columns), n * rows),
        },
        index=[f"t{i}" for i in range(codes.size)],
    )
    for name, values in obs.items():
        table[name] = np.repeat(np.broadcast_to(values, n), rows * columns)
    out = anndata.AnnData(csr_matrix(codes.reshape(-1, 1).astype(np.float32)), obs=table)
    out.var_names = ["L0000"]
    out.uns["biosae"] = {"identity": identity} if identity else {}
    return out


def test_codes_lie_at_their_rows_and_columns_in_any_order_of_rows():
    codes = np.arange(24, dtype=float).reshape(2, 3, 4)
    adata = tokens(codes)[np.random.default_rng(0).permutation(24)].copy()
    found = token_map(adata, "L0000", "s1")
    np.testing.assert_array_equal(found.values, codes[1])
    assert found.box == (0, 0, 4, 3) and found.kind is None and found.n_active == 12


def test_a_map_of_an_image_carries_the_image_and_its_place():
    preprocess = Preprocess(HALF, HALF, size=56, crop_pct=0.875)
    image = np.zeros((100, 128, 3), np.uint8)
    adata = tokens(np.ones((1, 4, 4)), {"preprocess": preprocess.spec()})
    found = token_map(adata, "L0000", "s0", samples=Items({"s0": image}, mpp=0.25))
    assert found.item is image and found.kind == "image" and found.mpp == 0.25
    # 128 x 100 px become 81 x 64, of which 56 x 56 are seen from (12, 4) on
    assert found.box == pytest.approx((12 * 128 / 81, 6.25, 68 * 128 / 81, 93.75))


@pytest.mark.parametrize(("rows", "names"), [(1, ()), (2, ("II", "V1"))])
def test_a_map_of_a_signal_has_seconds_and_leads(rows, names):
    identity = {"preprocess": {"rate": 100.0, "multiple": 50, "channels": ["II", "V1"]}}
    adata = tokens(np.ones((1, rows, 5)), identity)
    samples = Items({"s0": np.zeros((3, 260), np.float32)}, "signal", rate=100.0, unit="mV", channels=("I", "II", "V1"))
    found = token_map(adata, "L0000", "s0", samples=samples)
    assert found.box == (0, 0, 2.5, rows)  # the last 10 samples are not seen
    assert found.rows == names and found.channels == ("I", "II", "V1") and found.unit == "mV"


def windows(start, codes, duration=10.0) -> anndata.AnnData:
    obs = pd.DataFrame({"recording": "r1", "start": np.asarray(start, float), "duration": duration},
                       index=[f"w{i}" for i in range(len(start))])  # fmt: skip
    out = anndata.AnnData(csr_matrix(np.asarray(codes, np.float32)[:, None]), obs=obs)
    out.var_names = ["L0000"]
    return out


def test_windows_of_a_recording_lie_at_their_time_with_gaps():
    found = recording_map(windows([0, 10, 40, 30], [1, 0, 5, 2]), "L0000", "r1")
    assert found.box == (0, 0, 50, 1)
    np.testing.assert_array_equal(found.values, np.array([[1, 0, np.nan, 2, 5]], np.float32))


def test_overlapping_windows_are_averaged():
    found = recording_map(windows([0, 5, 10], [1, 3, 0]), "L0000", "r1")
    np.testing.assert_allclose(found.values, [[1, 2, 1.5, 0]])


@pytest.mark.parametrize(("stride", "length"), [(20, 30), (7.5, 30), (10, 25)])
def test_windows_that_overlap_in_part_are_averaged_over_the_time_that_they_share(stride, length):
    codes = np.array([1.0, 4.0, 2.0, 0.0, 3.0])
    starts = np.arange(5) * stride
    found = recording_map(windows(starts, codes, duration=length), "L0000", "r1")
    left, _, right, _ = found.box
    assert (left, right) == (0, starts[-1] + length)
    middle = (np.arange(found.values.shape[1]) + 0.5) * (right - left) / found.values.shape[1]
    inside = (middle >= starts[:, None]) & (middle < starts[:, None] + length)
    np.testing.assert_allclose(found.values[0], (codes[:, None] * inside).sum(0) / inside.sum(0), atol=1e-6)


def test_windows_at_uneven_times_lie_within_a_thousandth_of_the_recording_of_their_time():
    starts = np.cumsum(np.random.default_rng(0).uniform(0.4, 1.2, 40))
    codes = np.arange(1, 41)
    found = recording_map(windows(starts, codes, duration=0.3), "L0000", "r1")
    left, _, right, _ = found.box
    step = (right - left) / found.values.shape[1]
    for start, code in zip(starts, codes):
        at = np.flatnonzero(found.values[0] == code)
        assert abs(left + at[0] * step - start) < 1e-3 * (right - left)
        assert abs(len(at) * step - 0.3) < 2e-3 * (right - left)


def test_recordings_of_two_patients_with_one_name_are_not_mixed():
    adata = windows([0, 10], [1, 3])
    adata.obs["patient"] = ["a", "b"]
    with pytest.raises(InputError, match="2 patients"):
        recording_map(adata, "L0000", "r1")


def test_tokens_that_were_left_out_do_not_move_the_others():
    adata = tokens(np.arange(24, dtype=float).reshape(2, 3, 4))
    adata.uns["biosae"]["tokens_per_sample"] = 12
    lower = adata[(adata.obs["token_row"] < 2).to_numpy()].copy()
    with pytest.raises(InputError, match="8 of 12 tokens"):
        token_map(lower, "L0000", "s0")


def test_tokens_of_a_recording_are_the_maps_of_its_windows_side_by_side():
    codes = np.random.default_rng(0).poisson(1, (3, 2, 4)).astype(float)
    identity = {"preprocess": {"rate": 10.0, "channels": ["A", "B"]}}
    adata = tokens(codes, identity, recording="r1", start=[0.0, 2.0, 4.0], duration=2.0)
    found = recording_map(adata, "L0000", "r1")
    np.testing.assert_allclose(found.values, np.concatenate(list(codes), axis=1), atol=1e-6)
    assert found.box == (0, 0, 6, 2) and found.rows == ("A", "B")


def test_what_is_missing_is_named():
    pooled = windows([0], [1])
    with pytest.raises(InputError, match="tokens=None"):
        token_map(pooled, "L0000", "w0")
    with pytest.raises(InputError, match="not windows"):
        recording_map(tokens(np.ones((1, 1, 1))), "L0000", "r1")
    with pytest.raises(InputError, match="'s9'"):
        token_map(tokens(np.ones((1, 1, 1))), "L0000", "s9")
    with pytest.raises(InputError, match="L0001"):
        token_map(tokens(np.ones((1, 1, 1))), "L0001", "s0")
    with pytest.raises(InputError, match="no recording 'r2'"):
        recording_map(pooled, "L0000", "r2")
    with pytest.raises(InputError, match="rate"):
        grid_box({}, (2, 100), (1, 4), kind="signal")
