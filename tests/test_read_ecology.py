"""Crops by boxes and masks of parts: hand-made images with known content, and real packs."""

from __future__ import annotations

import json
import pickle
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import biosae as bs
from biosae.data import ReadError
from biosae.errors import InputError
from biosae.read.crops import crop_rows
from biosae.read.decode import decode, decode_mask, image_size

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)  # 60 wide, 40 high


@pytest.fixture
def photos(tmp_path):
    """Two photographs, their masks, and a table of both."""
    labels = (np.arange(40)[:, None] // 10 * 60 + np.arange(60)[None, :]).astype(np.uint8) % 4
    for name in ("a", "b"):
        Image.fromarray(NOISE if name == "a" else NOISE[:, ::-1]).save(tmp_path / f"{name}.png")
        Image.fromarray(labels).save(tmp_path / f"{name}_mask.png")
    table = {"sample_id": ["a", "b"], "path": ["a.png", "b.png"], "mask": ["a_mask.png", "b_mask.png"]}
    pd.DataFrame(table).to_csv(tmp_path / "photos.csv", index=False)
    return tmp_path, labels


def crops(folder, boxes, **options):
    return bs.read.images(folder / "photos.csv", patient=None, boxes=pd.DataFrame(boxes), **options)


def test_one_box_in_every_form_is_the_same_crop(photos):
    folder, labels = photos
    forms = [
        ("xywh", False, {"x": [12], "y": [8], "width": [30], "height": [20]}),
        ("xyxy", False, {"x_min": [12], "y_min": [8], "x_max": [42], "y_max": [28]}),
        ("cxcywh", False, {"x_center": [27], "y_center": [18], "width": [30], "height": [20]}),
        ("xywh", True, {"x": [0.2], "y": [0.2], "width": [0.5], "height": [0.5]}),
        ("xyxy", None, {"x_min": [0.2], "y_min": [0.2], "x_max": [0.7], "y_max": [0.7]}),
        ("cxcywh", None, {"x_center": [0.45], "y_center": [0.45], "width": [0.5], "height": [0.5]}),
    ]
    for box_format, relative, columns in forms:
        samples = crops(folder, {"sample_id": ["a"], **columns}, box_format=box_format, relative=relative)
        np.testing.assert_array_equal(samples["a#0"], NOISE[8:28, 12:42])
        np.testing.assert_array_equal(samples.mask("a#0"), labels[8:28, 12:42])
        where = samples.obs.iloc[0][["image_id", "box_x", "box_y", "box_width", "box_height", "box_clipped"]].tolist()
        assert where == ["a", 12, 8, 30, 20, False]
        assert samples.meta["images_without_box"] == 1


def test_padding_squares_and_edges(photos):
    folder, _ = photos
    box = {
        "sample_id": ["a", "a", "b"],
        "x": [10, -6, 50],
        "y": [10, 4, 30],
        "width": [20, 16, 20],
        "height": [10, 8, 9],
    }
    plain = crops(folder, box)
    assert plain.obs[["box_x", "box_y", "box_width", "box_height"]].to_numpy().tolist() == [
        [10, 10, 20, 10],
        [0, 4, 10, 8],
        [50, 30, 10, 9],
    ]
    assert plain.obs["box_clipped"].tolist() == [False, True, True]
    grown = crops(folder, box, pad=0.1).obs
    assert grown.iloc[0][["box_x", "box_y", "box_width", "box_height"]].tolist() == [8, 9, 24, 12]
    square = crops(folder, box, square=True)
    assert square.obs[["box_x", "box_y", "box_width", "box_height"]].to_numpy().tolist() == [
        [10, 5, 20, 20],
        [0, 0, 16, 16],
        [40, 20, 20, 20],  # moved into the image
    ]
    assert [square[i].shape for i in range(3)] == [(20, 20, 3), (16, 16, 3), (20, 20, 3)]
    assert crops(folder, {k: v[:1] for k, v in box.items()}, pad=5, square=True)[0].shape == (40, 40, 3)


@given(
    st.lists(st.tuples(*[st.floats(-0.5, 1.2)] * 2, *[st.floats(0.001, 1.5)] * 2), min_size=1, max_size=20),
    st.integers(1, 50), st.integers(1, 50), st.floats(0, 2), st.booleans(),
)  # fmt: skip
def test_every_crop_lies_in_its_image(corners, width, height, pad, square):
    table = pd.DataFrame([("a", i, x, y, x + w, y + h) for i, (x, y, w, h) in enumerate(corners)])
    table.columns = ["_image", "_number", "_left", "_top", "_right", "_bottom"]
    rows, lost = crop_rows(table, {"a": (width, height)}, relative=True, pad=pad, square=square, box_id=None)
    assert len(rows) + len(lost) == len(table)
    x, y, w, h = (rows[c].to_numpy() for c in ("box_x", "box_y", "box_width", "box_height"))
    assert (np.r_[x, y] >= 0).all() and (np.r_[w, h] >= 1).all()
    assert (x + w <= width).all() and (y + h <= height).all()
    assert not square or (w == h).all()
    if pad == 0 and not square:  # a crop holds every pixel of which its box covers more than a trace
        inside = table.loc[[int(name.split("#")[1]) for name in rows.index]]
        assert (x <= np.maximum(inside["_left"] * width, 0) + 1e-3).all()
        assert (x + w >= np.minimum(inside["_right"] * width, width) - 1e-3).all()


def test_boxes_that_cannot_be_meant(photos):
    folder, _ = photos
    box = {"sample_id": ["a"], "x": [12.0], "y": [8.0], "width": [30.0], "height": [20.0]}
    cases = [
        (box | {"width": [1.0], "x": [1.0], "y": [0.0], "height": [1.0]}, {}, "relative=True or relative=False"),
        (box | {"width": [0.0]}, {}, "have no area"),
        (box | {"x": ["wide"]}, {}, "hold no numbers"),
        (box | {"sample_id": ["c"]}, {}, "no box belongs to an image"),
        (box | {"x": [60.0]}, {}, "no box lies in an image"),
        (box, {"box_format": "xyxy"}, "pass box_format='xywh'"),
        (box, {"box_format": "yolo"}, "Valid: 'xywh'"),
        (box, {"min_confidence": 0.5}, "needs a column 'confidence'"),
        (box, {"box_image": "file"}, "no column names the image"),
        (box, {"box_id": "number"}, "no column 'number'"),
        (box, {"pad": -1}, "pad=-1"),
        (box | {"mask": ["x"]}, {}, "has a column 'mask', and so have the boxes"),
    ]
    for boxes, options, message in cases:
        with pytest.raises(InputError, match=message):
            crops(folder, boxes, **options)


def test_boxes_outside_are_listed(photos):
    folder, _ = photos
    boxes = {"sample_id": ["a"] * 9 + ["c"], "x": [1.0] * 8 + [70.0, 1.0], "y": 3.0, "width": 20.0, "height": 10.0}
    with pytest.raises(InputError, match="1 of 9 boxes lie outside"):
        crops(folder, boxes)
    with pytest.warns(UserWarning, match="2 images or boxes are not used"):
        samples = crops(folder, boxes, max_failures=0.2)
    assert samples.failures[["item", "reason"]].to_numpy().tolist() == [["c", "missing"], ["a#8", "wrong_size"]]
    assert len(samples) == 8


def test_output_of_megadetector(photos):
    folder, _ = photos
    (folder / "found.json").write_text(json.dumps({
        "info": {"format_version": "1.3"},
        "detection_categories": {"1": "animal", "2": "person"},
        "images": [
            {"file": "a.png", "detections": [
                {"category": "1", "conf": 0.05, "bbox": [0, 0, 0.1, 0.1]},
                {"category": "1", "conf": 0.93, "bbox": [0.2, 0.2, 0.5, 0.5]},
            ]},
            {"file": "b.png", "detections": [{"category": "2", "conf": 0.4, "bbox": [0.5, 0, 0.5, 1]}]},
            {"file": "broken.png", "failure": "Failure image access", "detections": None},
        ],
    }))  # fmt: skip
    read = {"patient": None, "boxes": folder / "found.json"}
    with pytest.raises(InputError, match="min_confidence="):
        bs.read.images(folder / "photos.csv", **read)
    samples = bs.read.images(folder / "photos.csv", min_confidence=0.2, label="class", **read)
    assert samples.ids.tolist() == ["a#1", "b#0"]  # numbers of the file, whatever is left out
    assert samples.obs[["class", "confidence", "label"]].to_numpy().tolist() == [
        ["animal", 0.93, "animal"],
        ["person", 0.4, "person"],
    ]
    np.testing.assert_array_equal(samples["a#1"], NOISE[8:28, 12:42])
    (folder / "found.json").write_text('{"images": [{"file": "a.png", "detections": [{"conf": "x"}]}]}')
    with pytest.raises(InputError, match="no MegaDetector output"):
        bs.read.images(folder / "photos.csv", min_confidence=0.2, **read)


def test_crops_are_saved_pickled_and_read_in_threads(photos):
    folder, _ = photos
    n = 30
    boxes = {"sample_id": ["a", "b"] * n, "x": np.arange(2 * n) % 40, "y": 5, "width": 12, "height": 7.0}
    samples = crops(folder, boxes | {"name": [f"crop {i}" for i in range(2 * n)]}, box_id="name", square=True)
    assert samples.ids[3] == "crop 3"
    samples.save(folder / "crops.parquet")
    again = bs.Samples.load(folder / "crops.parquet")
    assert again.fingerprint == samples.fingerprint
    moved = samples.with_obs(box_x=samples.obs["box_x"] + 1)
    assert moved.fingerprint != samples.fingerprint  # another place in the same file
    truth = [samples[i] for i in range(2 * n)]
    with ThreadPoolExecutor(4) as pool:
        for i, crop in enumerate(pool.map(pickle.loads(pickle.dumps(again)).__getitem__, range(2 * n))):  # noqa: S301
            np.testing.assert_array_equal(crop, truth[i])
    Image.fromarray(NOISE[:10, :10]).save(folder / "a.png")  # the photograph was replaced by a smaller one
    fresh = bs.Samples.load(folder / "crops.parquet").select(["crop 38"])
    with ThreadPoolExecutor(1) as pool, pytest.raises(ReadError, match="wrong_size"):
        pool.submit(fresh.__getitem__, 0).result()


def test_size_from_the_header_is_that_of_the_decoded_image(tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        for kind in ("png", "jpg", "tif", "webp"):
            path = tmp_path / f"{orientation}.{kind}"
            Image.fromarray(NOISE).save(path, exif=exif)
            assert image_size(path) == decode(path).shape[1::-1]
    Image.fromarray(NOISE).save(tmp_path / "plain.bmp")
    assert image_size(tmp_path / "plain.bmp") == (60, 40)
    with pytest.raises(ReadError, match="missing"):
        image_size(tmp_path / "none.png")


def test_masks_are_numbers_as_stored(tmp_path):
    labels = RNG.integers(0, 5, (12, 9)).astype(np.uint8)
    palette = Image.fromarray(labels, "L").convert("P")
    palette.putdata(labels.ravel().tolist())
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200, 1, 2, 3])
    cases = {
        "grey.png": Image.fromarray(labels), "palette.png": palette, "grey.tif": Image.fromarray(labels),
        "three.png": Image.fromarray(np.repeat(labels[:, :, None], 3, axis=2)), "grey.bmp": Image.fromarray(labels),
    }  # fmt: skip
    for name, image in cases.items():
        image.save(tmp_path / name)
        found = decode_mask(tmp_path / name)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, labels)
    many = labels.astype(np.uint16) * 700
    Image.fromarray(many).save(tmp_path / "many.png")
    np.testing.assert_array_equal(decode_mask(tmp_path / "many.png"), many)
    Image.fromarray(labels > 2).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(decode_mask(tmp_path / "bits.png"), labels > 2)
    Image.fromarray(NOISE).save(tmp_path / "colours.png")
    Image.fromarray(labels).save(tmp_path / "lossy.jpg")
    for name in ("colours.png", "lossy.jpg"):
        with pytest.raises(ReadError, match="unsupported"):
            decode_mask(tmp_path / name)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_few_bits_keep_their_numbers(tmp_path, bits):
    """Pillow spreads grey of 2 and 4 bits over 0 to 255, and inverts where white is zero; labels are neither."""
    labels = RNG.integers(0, 2**bits, (6, 16)).astype(np.uint8)
    packed = [np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :]).tobytes() for row in labels]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 16, 6, bits, 0, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in packed))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode_mask(png), labels)
    tifffile = pytest.importorskip("tifffile")
    for photometric in ("minisblack", "miniswhite"):
        for how in ({"bitspersample": bits}, {"bitspersample": 8}, {"bitspersample": 8, "compression": "zlib"}):
            pixels = labels.astype(bool) if how["bitspersample"] == 1 else labels
            tifffile.imwrite(tmp_path / "m.tif", pixels, photometric=photometric, **how)
            np.testing.assert_array_equal(decode_mask(tmp_path / "m.tif"), labels)


def test_crops_of_a_photograph_that_was_replaced(photos):
    folder, _ = photos
    boxes = {"sample_id": ["a"], "x": [0], "y": [0], "width": [60], "height": [40]}
    np.testing.assert_array_equal(crops(folder, boxes)[0], NOISE)
    Image.fromarray(NOISE[::-1]).save(folder / "a.png")
    np.testing.assert_array_equal(crops(folder, boxes)[0], NOISE[::-1])


def test_photographs_without_a_box_may_share_a_file(photos):
    folder, _ = photos
    table = pd.DataFrame({"sample_id": ["a", "b", "c"], "path": ["a.png", "b.png", "b.png"]})
    boxes = pd.DataFrame({"path": ["a.png"], "x": [3], "y": [4], "width": [5], "height": [6]})
    assert bs.read.images(table, patient=None, boxes=boxes, root=folder).ids.tolist() == ["a#0"]
    with pytest.raises(InputError, match="by their ids"):
        bs.read.images(table, patient=None, boxes=boxes.assign(path="b.png"), root=folder)


def test_masks_must_fit_their_image(photos):
    folder, labels = photos
    table = pd.read_csv(folder / "photos.csv")
    Image.fromarray(labels[:, :-1]).save(folder / "b_mask.png")
    samples = bs.read.images(table.assign(mask=["a_mask.png", "b_mask.png"]), patient=None, root=folder)
    np.testing.assert_array_equal(samples.mask("a"), labels)
    with pytest.raises(ReadError, match="wrong_size: the mask has 59 x 40 pixels, its image 60 x 40"):
        samples.mask("b")
    samples = bs.read.images(table.assign(mask=["a_mask.png", None]), patient=None, root=folder)
    with pytest.raises(ReadError, match="missing: this sample has no mask"):
        samples.mask(1)
    with pytest.raises(InputError, match="no masks"):
        bs.read.images(table.drop(columns="mask"), patient=None, root=folder).mask(0)
    with pytest.raises(InputError, match="pass mask="):
        bs.read.images(table.drop(columns="mask"), patient=None, root=folder, parts={1: "x"})
    named = bs.read.images(table, patient=None, root=folder, mask="mask", parts={"1": "leaf"})  # as TOML has it
    assert named.meta["parts"] == {"leaf": 1}
    for wrong in ({1: "x", 2: "x"}, {-1: "x"}, {1.5: "x"}, {"one": "x"}, {70000: "x"}):
        with pytest.raises(InputError, match="different names to whole numbers"):
            bs.read.images(table, patient=None, root=folder, mask="mask", parts=wrong)


@pytest.mark.parametrize("shape", [(8, 8), (8, 12)])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_masks_of_turned_photographs(tmp_path, shape, kind):
    """Which of two orders a mask is in nobody sees where both have its size; the photograph itself tells."""
    stored = (np.arange(shape[0] * shape[1]) % 2).astype(np.uint8).reshape(shape)
    stored[0] = 1
    for turn, truth in ((3, np.rot90(stored, 2)), (6, np.rot90(stored, -1))):
        exif, own, upright = Image.Exif(), Image.Exif(), Image.Exif()
        exif[274], own[274], upright[274] = turn, turn, 1
        Image.fromarray(stored * 255).save(tmp_path / f"photo.{kind}", exif=exif)
        Image.fromarray(stored).save(tmp_path / "plain.png")
        Image.fromarray(stored).save(tmp_path / "own.png", exif=own)
        Image.fromarray(np.ascontiguousarray(truth)).save(tmp_path / "upright.tif", exif=upright)
        table = pd.DataFrame({"sample_id": list("abc"), "path": f"photo.{kind}",
                              "mask": ["plain.png", "own.png", "upright.tif"]})  # fmt: skip
        samples = bs.read.images(table, patient=None, root=tmp_path)
        fits = turn == 3 or shape[0] == shape[1]
        with pytest.raises(ReadError, match="unsupported: .*states none" if fits else "wrong_size"):
            samples.mask("a")
        for name in "bc":
            np.testing.assert_array_equal(samples.mask(name), samples[name][:, :, 0] // 255)
            np.testing.assert_array_equal(samples.mask(name), truth)
        if not fits:  # its size says that it was drawn on the image as shown
            Image.fromarray(np.ascontiguousarray(truth)).save(tmp_path / "plain.png")
            np.testing.assert_array_equal(samples.mask("a"), truth)


# -- real packs --------------------------------------------------------------------------------------------------------


def test_nuclei_of_two_devices(shared):
    """The share of the nucleus is that of the pack's own table, and a nucleus is darker than its cytoplasm."""
    samples = bs.read.images(
        shared / "data" / "wbc_two_devices" / "manifest.csv", patient=None, mask="mask_path", scanner="device",
        parts={0: "background", 1: "cytoplasm", 2: "nucleus"},
    )  # fmt: skip
    assert samples.meta["parts"] == {"background": 0, "cytoplasm": 1, "nucleus": 2}
    parts, darker = samples.meta["parts"], 0
    for i in range(0, len(samples), 3):
        mask, image = samples.mask(i), samples[i]
        assert mask.shape == image.shape[:2]
        nucleus, cytoplasm = mask == parts["nucleus"], mask == parts["cytoplasm"]
        assert nucleus.mean() == pytest.approx(samples.obs["nucleus_area_frac"].iloc[i], abs=6e-5)
        assert cytoplasm.mean() == pytest.approx(samples.obs["cytoplasm_area_frac"].iloc[i], abs=6e-5)
        if cytoplasm.any():
            darker += image[nucleus].mean() < image[cytoplasm].mean()
        else:
            darker += 1
    assert darker >= 0.98 * len(range(0, len(samples), 3))


def test_cells_of_smears_by_their_boxes(shared):
    """White cells hold a dark nucleus, red cells do not; every box becomes a crop of the stated size."""
    folder = shared / "data" / "txl_pbc_blood"
    samples = bs.read.images(
        folder / "manifest.csv", patient=None, boxes=folder / "boxes.csv", box_format="cxcywh", label="cls"
    )
    boxes = pd.read_csv(folder / "boxes.csv")
    assert len(samples) == len(boxes)
    stated = boxes["width"].to_numpy() * samples.obs["stored_width"].to_numpy()
    assert (np.abs(samples.obs["box_width"] - stated) <= 2).mean() > 0.99
    assert (
        samples.obs.groupby("image_id")["cls"]
        .apply(lambda c: (c == "WBC").sum())
        .equals(samples.obs.groupby("image_id")["count_wbc"].first())
    )
    wide = samples.select(((samples.obs["source"] == "bccd") & (samples.obs["box_width"] > 15)).to_numpy())
    darkest = {
        cell: np.median([np.quantile(wide[i].min(axis=2), 0.1) for i in wide.ids[wide.obs["cls"] == cell][:60]])
        for cell in ("WBC", "RBC")
    }
    assert darkest["WBC"] < darkest["RBC"] - 30


def test_cameras_and_herbaria_are_locations(shared):
    data = shared / "data"
    traps = bs.read.images(data / "camera_trap_small_mammals" / "manifest.csv", patient=None, location="camera_id")
    assert traps.obs["location"].nunique() == 3
    sheets = bs.read.images(
        data / "violaceae_herbarium" / "manifest.csv", patient=None, location="herbarium_code", label="species_code"
    )
    result = sheets.audit(read=False)
    assert result.overlap["confounder"].tolist() == ["location"]
    assert result.counts.set_index("what").loc["location", "n"] == 8


def test_disease_and_collector_of_leaves_cannot_be_separated(shared):
    leaves = bs.read.images(
        shared / "data" / "plantvillage_apple" / "manifest.csv", patient=None, mask="mask_path", sequence="photo_block",
        collector="collector", label="disease", split="split",
    )  # fmt: skip
    result = leaves.audit(read=False)
    row = result.overlap.set_index("confounder").loc["collector"]
    assert (row["n_parts"], row["parts"]) == (3, "apple_scab, cedar_apple_rust | black_rot | healthy")
    assert any(p.startswith("inseparable: label by collector: labels fall into 3 sets") for p in result.problems)
    healthy = leaves.audit(label="label_healthy", read=False)
    assert healthy.overlap["inseparable"].tolist() == [True]
    assert not (result.leakage["unit"] == "sequence").any()  # the pack's split never cuts a block of photographs
    for i in (0, 500, 1000):
        mask, image = leaves.mask(i), leaves[i]
        assert mask.mean() == pytest.approx(leaves.obs["leaf_area_frac"].iloc[i], abs=6e-5)
        assert image[mask == 1].mean() > 3 * image[mask == 0].mean()  # the background was made black
