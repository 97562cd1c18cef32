"""The atlas in a browser: search, open, name, save, reload, load; hostile words; speed; accessibility."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from atlas_pages import hostile_run, many, stress_card, write

import biosae as bs
from biosae.files import read_h5ad

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, samples = hostile_run(tmp_path_factory.mktemp("atlas") / "run")
    bs.atlas.build(folder, samples=samples, n_examples=4, cards=[stress_card()], n_cards=0)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}")
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def tab(browser: Any, run: Path) -> Iterator[Any]:
    """The page of the run, with what it asked for and what went wrong."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.errors, page.asked = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto((run / "atlas.html").as_uri())
    page.wait_for_selector("#table tbody tr[data-latent]")
    yield page
    context.close()


def shown(tab: Any) -> list[str]:
    return tab.locator("#table tbody th a").all_inner_texts()


def has_value(tab: Any, name: str) -> None:
    """Wait until the open latent has this name; the page's policy forbids waiting by evaluated text."""
    from playwright.sync_api import expect

    expect(tab.locator("#name")).to_have_value(name)


def test_search_open_name_save_reload_load(tab: Any, run: Path, tmp_path: Path) -> None:
    assert tab.locator("#count").inner_text() == "64 latents"
    assert shown(tab)[0] == "L0003"  # the planted association stands first
    tab.fill("#query", "l0042")
    assert shown(tab) == ["L0042"] and tab.locator("#count").inner_text() == "1 of 64 latents"
    tab.click("#table tbody tr[data-latent]")
    assert tab.locator("#latent h2").inner_text() == "L0042" and tab.url.endswith("#L0042")
    tab.fill("#name", "plasma  cells ")
    tab.press("#name", "Enter")
    tab.fill("#note", "near misses:\nlymphocytes")
    tab.select_option("#status", "doubtful")
    tab.fill("#query", "PLASMA")
    assert shown(tab) == ["L0042"]
    tab.reload()
    assert tab.input_value("#name") == "plasma cells" and tab.input_value("#status") == "doubtful"
    with tab.expect_download() as download:
        tab.click("#save")
    saved = tmp_path / "names.json"
    download.value.save_as(saved)
    content = json.loads(saved.read_text(encoding="utf-8"))
    assert {entry["latent"] for entry in content["latents"]} == {"L0007", "L0042"}
    adata = read_h5ad(run / "latents.h5ad")
    bs.interpret.read_names(saved, adata, on_conflict="new")
    assert adata.var.loc["L0042", ["name", "note", "status"]].tolist() == [
        "plasma cells", "near misses:\nlymphocytes", "doubtful",
    ]  # fmt: skip
    tab.evaluate("localStorage.clear()")
    tab.reload()
    assert tab.input_value("#name") == ""
    tab.set_input_files("#file", saved)
    has_value(tab, "plasma cells")
    tab.reload()
    assert tab.input_value("#note") == "near misses:\nlymphocytes"
    assert tab.errors == []


def test_a_file_that_differs_asks_and_one_of_another_dictionary_is_refused(tab: Any, tmp_path: Path) -> None:
    fingerprint = tab.evaluate("JSON.parse(document.getElementById('data').textContent).fingerprint")
    entry = {"latent": "L0007", "name": "the scanner", "note": "", "status": ""}
    file = tmp_path / "names.json"

    def give(**change: Any) -> None:
        content = {"format": "biosae-names", "version": 1, "fingerprint": fingerprint, "latents": [entry]}
        file.write_text(json.dumps(content | change), encoding="utf-8")
        tab.set_input_files("#file", file)
        tab.wait_for_selector("#question[open]")

    give(fingerprint="0" * 64)
    assert "another dictionary" in tab.locator("#question-text").inner_text()
    tab.click("#question-buttons button")
    give(latents=[entry | {"latent": "L9999"}])
    assert "no latent L9999" in tab.locator("#question-text").inner_text()
    tab.click("#question-buttons button")
    file.write_text("{", encoding="utf-8")
    tab.set_input_files("#file", file)
    tab.wait_for_selector("#question[open]")
    tab.click("#question-buttons button")
    tab.goto(tab.url.split("#")[0] + "#L0007")
    before = tab.input_value("#name")
    give()
    tab.click("text=Keep mine")
    assert tab.input_value("#name") == before
    give()
    tab.click("text=Take the file's")
    has_value(tab, "the scanner")
    assert tab.input_value("#note") != ""  # an empty text of the file deletes nothing


def test_hostile_words_do_not_act(tab: Any) -> None:
    for latent in ("L0003", "L0007"):
        tab.goto(tab.url.split("#")[0] + f"#{latent}")
        assert tab.locator("#latent h2").inner_text() == latent
    assert "<script>" in tab.locator("h1").inner_text()  # told as text
    assert "<img" in tab.input_value("#name")
    tab.click("#help")
    assert "<img" in tab.locator("#about .question").inner_text()
    tab.keyboard.press("Escape")
    tab.fill("#name", "</script><script>window.pwned=1</script>")
    tab.press("#name", "Enter")
    tab.goto(tab.url.split("#")[0] + "#<img src=x onerror=window.pwned=1>")
    assert tab.evaluate("window.pwned") is None
    assert tab.locator("img[onerror]").count() == 0 and tab.locator("script").count() == 2


def test_policy_stops_scripts_and_requests(tab: Any) -> None:
    assert all(url.startswith(("file:", "data:", "blob:")) for url in tab.asked)
    assert tab.evaluate("fetch('https://example.org').then(() => 'went out', () => 'stopped')") == "stopped"
    tab.evaluate(
        """() => {
          const script = document.createElement('script');
          script.textContent = 'window.pwned = 1';
          document.body.append(script);
          const hostile = '<img src=x onerror="window.pwned = 2"><a href="javascript:window.pwned = 3" id=bad>x</a>';
          document.body.insertAdjacentHTML('beforeend', hostile);
        }"""
    )
    tab.evaluate("document.getElementById('bad').click()")
    tab.wait_for_timeout(100)
    assert tab.evaluate("window.pwned") is None


def test_no_name_of_a_patient_is_in_the_page(run: Path) -> None:
    text = (run / "atlas.html").read_text(encoding="utf-8")
    assert "Ramirez" not in text and "/home/" not in text and "http-equiv" in text
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", text)


def test_keys_move_open_and_close(tab: Any) -> None:
    order = shown(tab)
    tab.keyboard.press("/")
    assert tab.evaluate("document.activeElement.id") == "query"
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.textContent") == order[1]
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#latent h2")
    assert tab.locator("#latent h2").inner_text() == order[1]
    tab.keyboard.press("j")
    tab.wait_for_selector(f"#latent h2:text-is('{order[2]}')")
    tab.keyboard.press("n")
    assert tab.evaluate("document.activeElement.id") == "name"
    tab.keyboard.type("jk")
    assert tab.input_value("#name") == "jk"  # single keys rest while one writes
    tab.keyboard.press("Escape")
    tab.keyboard.press("Escape")
    assert tab.locator("#latent h2").count() == 0
    assert tab.evaluate("document.activeElement.textContent") == order[2]
    tab.keyboard.press("End")
    assert tab.evaluate("document.activeElement.closest('tr').getAttribute('aria-rowindex')") == "65"


def test_by_keys_alone_from_search_to_a_saved_name(tab: Any, run: Path, tmp_path: Path) -> None:
    """No pointer: search, open, name, note, status, save, and back to the table."""
    tab.keyboard.press("/")
    tab.keyboard.type("l0021")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#latent h2:text-is('L0021')")
    tab.keyboard.press("n")
    tab.keyboard.type("vessel wall")
    tab.keyboard.press("Tab")
    tab.keyboard.press("c")  # confirmed
    tab.keyboard.press("Tab")
    tab.keyboard.type("seen in all controls")
    for _ in range(60):  # back to the buttons of the page
        tab.keyboard.press("Shift+Tab")
        if tab.evaluate("document.activeElement.id") == "save":
            break
    with tab.expect_download() as download:
        tab.keyboard.press("Enter")
    download.value.save_as(tmp_path / "names.json")
    adata = read_h5ad(run / "latents.h5ad")
    bs.interpret.read_names(tmp_path / "names.json", adata, on_conflict="new")
    assert adata.var.loc["L0021", ["name", "status", "note"]].tolist() == [
        "vessel wall", "confirmed", "seen in all controls",
    ]  # fmt: skip
    tab.keyboard.press("Escape")
    assert tab.locator("#latent h2").count() == 0 and tab.errors == []


def test_a_phone_shows_estimate_interval_p_and_n_without_scrolling_sideways(browser: Any, run: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto((run / "atlas.html").as_uri() + "#L0003")
    region = page.get_by_role("region", name="Associations")
    assert region.evaluate("node => node.scrollWidth <= node.clientWidth + 1")
    row = region.locator("tbody tr").first.inner_text()
    assert re.search(r"\d+ (patient|sample|tile)s?", row) and re.search(r"\d\.\d+ to \d\.\d+", row)
    assert region.locator("thead").inner_text().split()[-2:] == ["p", "q"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_latents_may_be_called_like_parts_of_the_language(tab: Any, browser: Any, tmp_path: Path) -> None:
    data = tab.evaluate("JSON.parse(document.getElementById('data').textContent)")
    odd = ["constructor", "__proto__", "toString", "\u202ereversed", "a b/#%?"]
    data["latents"]["id"][: len(odd)] = odd
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.on("pageerror", lambda error: errors.append(str(error)))
    errors: list[str] = []
    file = write(data, tmp_path / "atlas.html")
    for name in odd:
        page.goto(file.as_uri())
        page.fill("#query", name)
        page.press("#query", "Enter")
        page.wait_for_selector("#latent h2")
        assert page.locator("#latent h2").text_content() == name
        page.fill("#name", f"name of {name}")
        page.press("#name", "Enter")
        page.reload()
        assert page.input_value("#name") == f"name of {name}".replace("\u202e", "")
    assert errors == []
    page.close()


def test_sorting_and_filters_agree_with_the_table(tab: Any, run: Path) -> None:
    adata = read_h5ad(run / "latents.h5ad")
    tab.click("th.active button")
    values = adata.var["density"].round(6)
    assert values[shown(tab)[0]] == values.max() and values[shown(tab)].is_monotonic_decreasing
    assert tab.locator("th.active").get_attribute("aria-sort") == "descending"
    tab.select_option("#which", "named")
    assert shown(tab) == ["L0007"]
    tab.select_option("#which", "all")
    tab.select_option("#flag", "technical")
    assert shown(tab) == ["L0007"]


def test_examples_are_those_of_interpret(tab: Any, run: Path) -> None:
    adata = read_h5ad(run / "latents.h5ad")
    want = bs.interpret.examples(adata, "L0003", n=4, kinds=("top", "spread", "active", "near", "inactive"))
    tab.goto(tab.url.split("#")[0] + "#L0003")
    got = tab.locator(".kind.top .said b").all_inner_texts()
    assert [float(v) for v in got] == pytest.approx(want.loc[want["kind"] == "top", "activation"], abs=0.006)
    assert tab.locator(".kind.inactive .said b").all_inner_texts() == ["silent"] * 4
    assert tab.locator(".kind").count() == 5


def test_a_reader_can_be_tested(tab: Any) -> None:
    tab.goto(tab.url.split("#")[0] + "#L0003")
    tab.click("text=Test yourself")
    tiles = tab.locator("#viewer .guess")
    assert tiles.count() == 12 and not any(tiles.locator(".said").all_inner_texts())
    tab.click("text=Show the answer")  # nothing was marked: right wherever it is silent
    assert tab.locator("#viewer [role=status]").inner_text() == "6 of 12 right; guessing gives 6 on average."


def test_2000_latents_stay_small_and_quick(tab: Any, browser: Any, tmp_path: Path) -> None:
    data = tab.evaluate("JSON.parse(document.getElementById('data').textContent)")
    file = write(many(data, 2000), tmp_path / "atlas.html")
    assert file.stat().st_size < 60e6
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(file.as_uri())
    page.wait_for_selector("#table tbody tr[data-latent]")
    assert page.locator("#count").inner_text() == "2,000 latents"
    assert page.locator("#table tbody tr").count() < 60  # only what is in view
    took = page.evaluate(
        """() => {
          const get = id => document.getElementById(id), best = {};
          const time = (name, act) => {
            const from = performance.now(); act(); document.body.offsetHeight;
            best[name] = Math.min(best[name] ?? Infinity, performance.now() - from);
          };
          const type = text => { get('query').value = text; get('query').dispatchEvent(new Event('input')); };
          for (let i = 0; i < 5; i++) {
            time('search', () => type('l1' + i));
            time('clear', () => type(''));
            time('sort', () => document.querySelector('th.active button').click());
            time('scroll', () => { get('scroll').scrollTop = 9000 * i + 500; dispatchEvent(new Event('resize')); });
            time('open', () => { location.hash = 'L01' + (10 + i); dispatchEvent(new Event('hashchange')); });
          }
          return best;
        }"""
    )
    assert max(took.values()) < 100, took
    page.close()


AXE = [
    Path(os.environ.get("AXE_CORE", "")),
    Path(__file__).parents[1] / "node_modules/axe-core/axe.min.js",
    Path(tempfile.gettempdir()) / "axe/node_modules/axe-core/axe.min.js",
]


@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Any, run: Path, scheme: str, width: int) -> None:
    axe = next((path for path in AXE if path.is_file()), None)
    if axe is None:
        pytest.skip("axe-core is not there: npm install axe-core in a folder, AXE_CORE=.../axe.min.js")
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    page = context.new_page()
    for where, act in {"": None, "#L0003": None, "#L0007": "#help", "#L0009": "text=Test yourself"}.items():
        page.goto((run / "atlas.html").as_uri() + where)
        page.wait_for_selector("#table tbody tr[data-latent]", state="attached")
        if act:
            page.click(act)
        page.evaluate(axe.read_text(encoding="utf-8"))
        found = page.evaluate("axe.run(document).then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html)]))")
        assert found == [], (where, found)
        page.keyboard.press("Escape")
    context.close()
