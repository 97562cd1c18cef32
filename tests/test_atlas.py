"""What the atlas puts on its page is what the run says: maps, places, pictures within budget, text that cannot act."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from atlas_pages import HOSTILE
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from synthetic_run import FakeSamples, make_run

import biosae as bs
from biosae.atlas import cards, gallery, packing, pictures, tables, where
from biosae.atlas import page as atlas_page
from biosae.errors import InputError
from biosae.files import read_h5ad, write_h5ad, write_json
from biosae.pl.traces import picture
from biosae.reports.run import load


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


@given(st.recursive(st.text() | st.just(HOSTILE), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_in_a_script_tag_ends_nothing_and_reads_back(value: Any) -> None:
    text = packing.script_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=50))
def test_quantised_codes_are_near_and_never_fall_silent(values: list[float]) -> None:
    codes = np.asarray(values, np.float32)
    scale = float(np.abs(codes).max())
    steps = packing.quantised(codes, scale)
    assert ((steps == 0) == (codes == 0)).all() and (np.sign(steps) == np.sign(codes)).all()
    np.testing.assert_allclose(steps / 127 * scale, codes, atol=scale / 126)


def test_numbers_are_plain() -> None:
    assert packing.numbers([np.float32(0.123456), np.nan, np.inf, 12.0, None]) == [0.1235, None, None, 12, None]
    assert packing.texts(["a", None, "b", "a", np.nan, ""]) == (["a", "b"], [0, -1, 1, 0, -1, -1])


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("atlas") / "run")


def test_the_largest_share_of_one_patient(run_folder: Path) -> None:
    run = load(run_folder)
    codes = run.adata.X.tocsc()
    found = tables.latents(run, codes)
    sums = pd.DataFrame(codes.toarray()).groupby(run.adata.obs["patient"].astype(str).to_numpy()).sum()
    want = (sums.max() / sums.sum()).to_numpy()
    assert found["top_share"][10] is None  # dead
    alive = np.delete(np.arange(64), range(10, 15))
    np.testing.assert_allclose(want[alive], [found["top_share"][j] for j in alive], rtol=0.01)
    histogram = tables.histograms(codes)
    assert histogram[10] is None and sum(histogram[3]["counts"]) == run.adata.var["n_active"].iloc[3]


def test_associations_stand_by_latent_and_evidence(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load(run_folder)
    rows = tables.associations(run)
    assert rows["n_all"] == len(rows["latent"]) == 128 and rows["latent"] == sorted(rows["latent"])
    table = run.associations[run.associations["source"] == "latent"].set_index(["latent", "target"])
    first = rows["rank"].index(0)
    target = rows["target"]["words"][rows["target"]["at"][first]]
    assert table["p"].idxmin() == (f"L{rows['latent'][first]:04d}", target)
    dead = [i for i, latent in enumerate(rows["latent"]) if latent == 12]
    assert {rows["status"]["words"][rows["status"]["at"][i]] for i in dead} == {"dead"}
    assert min(rows["rank"][i] for i in dead) >= sum(table["p"].notna())
    monkeypatch.setattr(tables, "MOST_ROWS", 64)
    few = tables.associations(run)
    assert few["latent"] == list(range(64)) and few["n_all"] == 128
    assert few["rank"][3] == 0


def test_neighbours_are_the_nearest_directions() -> None:
    decoder = np.array([[1, 0], [0.9, 0.1], [0, 1], [-1, 0], [0, 0]], np.float32)
    found = tables.neighbours(decoder)
    assert [pair[0] for pair in found[0]] == [1, 2, 4, 3] and found[0][0][1] == pytest.approx(0.994)


def test_pictures_keep_to_their_budget_whole_and_in_order(run_folder: Path) -> None:
    adata = read_h5ad(run_folder / "latents.h5ad")
    samples = FakeSamples(adata.obs, unreadable=(adata.obs_names[5],))
    ids = list(adata.obs_names[:60])
    order = np.arange(60)[::-1]
    large = pictures.pictures(samples, ids, order, budget=1e9)
    assert large["side"] == pictures.SIDES[0] and large["n_left_out"] == 0 and large["why"] == {5: "truncated"}
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(large["src"][7]))))
    assert shown.shape == (96, 96, 3)  # no larger than the item itself
    assert np.abs(shown.astype(int) - samples[ids[7]]).mean() < 6
    spent = sum(len(text) for text in large["src"] if text)
    for budget in (spent * 0.6, 20_000, 0):
        small = pictures.pictures(samples, ids, order, budget=budget)
        assert sum(len(text) for text in small["src"] if text) <= budget + 4 * 60
        held = [at for at in order if small["src"][at]]
        assert small["n_left_out"] == 59 - len(held)
        assert all(at > max((i for i in small["why"] if i != 5), default=-1) - 30 for at in held)
    tall = np.zeros((300, 100, 3), np.uint8)
    assert Image.open(io.BytesIO(pictures.webp(tall, 150))).size == (50, 150)


@dataclass
class Tokens:
    """A run whose embeddings have tokens, with its galleries."""

    run: Any
    sae: Any
    emb: Any
    shown: list[dict[str, Any]]
    items: gallery.Items


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    folder = tmp_path_factory.mktemp("tokens") / "run"
    samples = bs.data.phantom(n_patients=6, n_tiles=3, random_state=0)
    emb = bs.encoders.embed(samples, "tiny-histology", pool="tokens", out=folder / "embeddings", n_jobs=1)
    sae = bs.sae.SAE("topk", n_latents=10, k=2, n_steps=30, random_state=0).fit(emb)
    encoder, layer = emb.identity["encoder"], emb.identity["layer"]
    sae.save(folder / "sae" / f"{encoder}__{layer}")
    adata = bs.encode(sae, emb, tokens="max")
    write_h5ad(folder / "latents.h5ad", adata)
    rows = {"latent": adata.var_names, "target": "t", "estimate": 0.1, "p": np.nan, "q": np.nan, "status": "dead"}
    pd.DataFrame(rows).to_csv(folder / "associations.csv", index=False)
    write_json(folder / "study.json", {"title": "Tokens", "primary": {"encoder": encoder, "layer": layer}})
    run = load(folder, samples=samples)
    shown, items = gallery.galleries(run, run.adata.X.tocsc(), n=3, random_state=0)
    return Tokens(run, sae, emb, shown, items)


def test_token_maps_are_the_codes_of_the_tokens(tokens: Tokens) -> None:
    found, reason = where.token_maps(tokens.run, tokens.shown, tokens.items, budget=1e7)
    assert reason == "" and found["grid"] == list(tokens.emb.grid) and not found["reduced"] and not found["left_out"]
    kept = bs.encode(tokens.sae, tokens.emb, tokens=None)
    seen = 0
    for latent, held in found["latents"].items():
        codes = np.frombuffer(base64.b64decode(held["codes"]), np.int8).reshape(-1, *found["grid"])
        places = [(kind, place) for kind, listed in held["at"].items() for place in listed]
        assert len(places) == len(codes)
        for (kind, place), grid in zip(places, codes):
            item = tokens.shown[latent][kind]["items"][place]
            want = bs.interpret.token_map(
                kept, f"L{latent:04d}", tokens.items.ids[item], samples=tokens.run.samples if not seen else None
            )
            np.testing.assert_allclose(grid / 127 * held["scale"], want.values, atol=held["scale"] / 120)
            assert ((grid != 0) == (want.values != 0)).all()
            if not seen:
                height, width = want.item.shape[:2]
                edges = np.asarray(want.box) / (width, height, width, height)
                np.testing.assert_allclose(found["boxes"]["edges"][found["boxes"]["of"][item]], edges, atol=1e-4)
            seen += 1
    assert seen > 20


def test_maps_of_another_dictionary_are_not_shown(tokens: Tokens) -> None:
    fingerprint = tokens.run.adata.uns["biosae"].pop("fingerprint")
    found, reason = where.token_maps(tokens.run, tokens.shown, tokens.items, budget=1e7)
    tokens.run.adata.uns["biosae"]["fingerprint"] = fingerprint
    assert found is None and "another SAE" in reason


def test_maps_over_budget_leave_the_later_examples_out(tokens: Tokens) -> None:
    cells = int(np.prod(tokens.emb.grid))
    found, _ = where.token_maps(tokens.run, tokens.shown, tokens.items, budget=cells * 4 / 3 * 12)
    places = [place for held in found["latents"].values() for listed in held["at"].values() for place in listed]
    assert found["left_out"] and places == [0] * 12  # the first of each kind before any second


def test_fine_grids_keep_the_largest_code_of_a_block() -> None:
    grid = np.zeros((1, 4, 5), np.float32)
    grid[0, 1, 2], grid[0, 0, 3], grid[0, 3, 4] = 2, -3, 1
    assert where._reduced(grid, (2, 5), rows_too=False).tolist() == [[[0, 0, 2, -3, 0], [0, 0, 0, 0, 1]]]
    assert where._reduced(grid, (1, 5), rows_too=True).tolist() == [[[0, 0, 2, -3, 1]]]


def test_time_lies_where_the_picture_of_a_signal_has_it() -> None:
    first, last = where.TRACE
    for share in (0.0, 0.25, 0.8):
        signal = np.zeros((1, 1001), np.float32)
        signal[0, round(share * 1000)] = 50
        dark = (picture(signal).min(axis=2) < 160).sum(axis=0)
        column = (np.argmax(dark) + 0.5) / len(dark)
        assert column == pytest.approx(first + (last - first) * share, abs=1.5 / len(dark))


def test_slides_hold_every_firing_tile_at_its_place(run_folder: Path) -> None:
    run = load(run_folder)
    rng = np.random.default_rng(0)
    run.adata.obs["x"], run.adata.obs["y"] = rng.permutation(240) * 10.0, 5.0
    run.adata.obs.loc[run.adata.obs_names[0], "x"] = np.nan
    codes = run.adata.X.tocsc()
    found, _ = where.slides(run, codes, list(range(64)), spatial=("x", "y"), budget=1e9)
    held = found["latents"][3]
    tiles = np.frombuffer(base64.b64decode(held["tiles"]), "<u2")
    steps = np.frombuffer(base64.b64decode(held["codes"]), np.int8)
    obs, column = run.adata.obs[1:], codes[1:, 3].toarray().ravel()
    x, slide = np.asarray(found["x"]), np.asarray(found["names"])[found["slide"]]
    row = pd.Index(obs["x"]).get_indexer(x)  # x is another in every row
    assert sorted(row) == list(range(239)) and (np.diff(found["slide"]) >= 0).all()
    assert slide.tolist() == [run.pseudonym(v) for v in obs["slide"].iloc[row]]
    assert sorted(row[tiles]) == np.flatnonzero(column).tolist()
    np.testing.assert_allclose(steps / 127 * held["scale"], column[row[tiles]], atol=held["scale"] / 120)
    assert sorted(found["names"]) == found["names"] and all(re.fullmatch(r"S\d+", name) for name in found["names"])
    less, _ = where.slides(run, codes, [5, 3, 4], spatial=("x", "y"), budget=len(tiles) * 4)
    assert list(less["latents"]) == [5] and less["n_left_out"] == 2
    assert where.slides(run, codes, [0], spatial=None, budget=1e9)[0] is None
    with pytest.raises(InputError, match="two columns"):
        where.slides(run, codes, [0], spatial=("x", "z"), budget=1e9)


def test_the_page_is_one_file_of_the_size_asked_for(run_folder: Path, tmp_path: Path) -> None:
    adata = read_h5ad(run_folder / "latents.h5ad")
    out = bs.atlas.build(
        run_folder, out=tmp_path / "a.html", samples=FakeSamples(adata.obs), n_cards=0, n_examples=3, max_mb=0.5
    )
    assert out.stat().st_size < 500_000 and list(tmp_path.iterdir()) == [out]
    data = data_of(out)
    assert data["n_patients"] == 20 and len(data["latents"]["id"]) == 64
    assert data["fingerprint"] == bs.interpret.dictionary_fingerprint(adata)
    bare = bs.atlas.build(run_folder, out=tmp_path / "b.html", n_cards=0, n_examples=1)  # no samples, no pictures
    assert any("no image is shown" in note for note in data_of(bare)["notes"])


def test_short_ids_notes_and_the_order_of_slides_stay_behind(tmp_path: Path) -> None:
    """Ids of two characters are in no text: not in a stress card that names its worst slide, not in a note."""
    make_run(tmp_path / "run")
    adata = read_h5ad(tmp_path / "run/latents.h5ad")
    adata.obs["slide"] = [f"Q{i}" for i in np.arange(adata.n_obs) % 4]
    adata.var["name"], adata.var["note"] = "", ""
    adata.var.loc["L0005", ["name", "note"]] = ["ramirez-003", "best in Ramirez-007_x, see /home/anna/Ramirez-007"]
    write_h5ad(tmp_path / "run/latents.h5ad", adata)
    own = bs.interpret.stress(adata, "L0003", "count_a", cut=8, context="slide")
    assert re.search(r"worst: Q\d", own.table["reading"].str.cat())
    out = bs.atlas.build(
        tmp_path / "run", out=tmp_path / "a.html", cards=[own], n_cards=2, spatial=("count_a", "count_b")
    )
    data, text = data_of(out), out.read_text()
    made = [card for held in data["cards"].values() for card in held]
    read = [check["reading"] for card in made for check in card["checks"] if "strata of slide" in check["reading"]]
    assert len(read) >= 2 and all(re.search(r"worst: S\d\d;", reading) for reading in read)
    assert [card.get("chosen", False) for card in made].count(False) == 1
    slides = {k: v for k, v in data.pop("slides").items() if k != "latents"}
    assert not re.search(r"\bQ[0-3]\b", json.dumps([data, slides])) and not re.search("(?i)ramirez-|/home", text)
    at = data["latents"]["id"].index("L0005")
    assert re.fullmatch(r"P\d\d", data["latents"]["given_name"][at]) and "P" in data["latents"]["given_note"][at]
    assert np.all(np.diff(slides["slide"]) >= 0)
    shown = bs.atlas.build(tmp_path / "run", out=tmp_path / "b.html", n_cards=0, n_examples=1, show_ids=True)
    assert "Ramirez-007_x" in shown.read_text()


def test_pseudonyms_of_a_page_depend_on_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run")
    made = []
    for i in range(2):
        monkeypatch.setattr(bs.settings, "cache_dir", tmp_path / str(i))
        made.append(load(tmp_path / "run").pseudonyms)
    assert made[0].keys() == made[1].keys() and made[0] != made[1]
    assert load(tmp_path / "run").pseudonyms == made[1]


def test_a_card_of_another_run_is_refused_and_classes_are_those_of_the_latent(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    run = load(tmp_path / "run")
    card = bs.interpret.stress(run.adata, "L0003", "count_a", cut=8)
    with pytest.raises(InputError, match="'L9999'"):
        cards.stress_cards(run, [dataclasses.replace(card, latent="L9999")], n=0, random_state=0)
    stain = np.where(run.adata.X[:, 7].toarray().ravel() > 1, "violet", np.where(np.arange(240) % 3, "pink", "red"))
    run.adata.obs["stain"] = pd.Series(stain, index=run.adata.obs_names).where(np.arange(240) % 7 > 3)  # most missing
    assert cards._question(run, "L0007", "stain")["positive"] == "violet"


def test_the_size_of_items_is_told(run_folder: Path) -> None:
    samples = FakeSamples(load(run_folder).adata.obs)
    assert pictures.described(samples, list(samples.obs.index[:3])) == ""
    samples.mpp = 0.5
    assert pictures.described(samples, list(samples.obs.index[:3])) == "48 × 48 µm"

    class Signals:
        item, rate, obs = "signal", 250.0, pd.DataFrame(index=["a", "b"])
        channels = ("I", "II")

        def __getitem__(self, i: int) -> np.ndarray:
            return np.zeros((2, 2500), np.float32)

    assert pictures.described(Signals(), ["a", "b"]) == "10 s; I, II, from above; each on a scale of its own"
    Signals.channels = tuple(f"C{i}" for i in range(64))
    assert "C11, from above (of 64 channels)" in pictures.described(Signals(), ["a"])


@pytest.mark.parametrize("wrong", [{"n_examples": 0}, {"n_cards": -1}, {"max_mb": 0}])
def test_wrong_numbers_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        bs.atlas.build(tmp_path, **wrong)


def test_the_policy_allows_this_script_and_this_style_alone() -> None:
    text = atlas_page._render({"title": HOSTILE, "question": HOSTILE}, {"a": HOSTILE})
    assert text.count("<script") == 2 and text.count("<style") == 1 and "<img" not in text
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src &#39;none&#39;") and "unsafe" not in policy and "http" not in policy
