"""The rating cards in a browser: answered, reloaded, saved, read back."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from biosae.interpret import explain as ex

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


class Tiles:
    def __getitem__(self, name: str) -> np.ndarray:
        return np.full((64, 64, 3), 40 * int(name[-1]), np.uint8)


def test_answers_survive_a_reload_and_come_back(tmp_path: Path) -> None:
    tiles = Tiles()
    asked = [ex.Question(f"Is it grey? ({i})", (ex.Picture(tiles, f"t{i}"),), "yes_no") for i in range(4)]
    asked.append(ex.Question("What is it?", (ex.Picture(tiles, "t5"),), "text"))
    cards = ex.Cards(tmp_path)
    cards.ask(asked)
    truth = {cards.id(asked[0]): "yes", cards.id(asked[2]): "no", cards.id(asked[4]): 'grey "<b>'}
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        failed: list[str] = []
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.on("request", lambda r: failed.append(r.url) if r.url.startswith("http") else None)
        page.goto((tmp_path / "cards.html").as_uri())
        assert page.locator("#done").inner_text() == "0 of 5 answered"
        for key, value in truth.items():
            if value in ("yes", "no"):
                page.locator(f'input[name="q-{key}"][value="{value}"]').check()
            else:
                page.locator(f'input[name="q-{key}"]').fill(value)
        page.reload()
        assert page.locator("#done").inner_text() == "3 of 5 answered"
        assert page.locator(f'input[name="q-{cards.id(asked[0])}"][value="yes"]').is_checked()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        with page.expect_download() as saved:
            page.locator("#save").click()
        saved.value.save_as(tmp_path / "answers.json")
        browser.close()
    assert not failed
    assert ex.read_answers(tmp_path / "answers.json") == truth
    assert [a.text for a in cards.ask(asked)] == ["yes", None, "no", None, 'grey "<b>']
