"""report.html in headless Chromium, without a network: on a phone and on a desk, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdtrain.commands.pages.report import write_report
from sdtrain.training.watching.report.comparison import Comparison, Row
from sdtrain.training.watching.report.comparison import page as compared
from tests.conftest import small_run
from tests.training.report.browser import CHROMIUM, DRIVER, Browser, browser
from tests.training.report.small_folders import SCRIPT, noise, run_folder

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Debian's packages chromium and chromium-driver are not here"),
]


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    prompts = (SCRIPT, "a" * 300, "a green circle on a white background")
    table = {**small_run(folder, pictures), "name": "n" * 90}
    return write_report(run_folder(folder / "a", table, prompts=prompts, previews=9, steps=90, side_px=128))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width_px", [320, 400, 768, 1440])
def test_the_page_fits_says_nothing_to_the_console_and_asks_for_nothing(
    window: Browser, page: Path, width_px: int, dark: bool
) -> None:
    window.log("performance")
    window.show(page, width_px, dark=dark)
    window.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert window.run("return document.documentElement.scrollWidth") <= width_px
    assert window.log("browser") == []
    asked = [url for url in window.requests() if not url.startswith("data:")]
    assert asked == [page.as_uri()]
    paper, ink = window.run("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    assert (_lightness(paper) < _lightness(ink)) == dark


def _lightness(colour: str) -> float:
    return sum(float(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")[:3])


@pytest.mark.parametrize("width_px", [400, 1440])
def test_a_comparison_fits_too(window: Browser, tmp_path: Path, width_px: int) -> None:
    drawn = [[[noise(64, 0)] * 2]] * 3
    rows = [Row(f"step {step}", drawn) for step in (2, 4)]
    path = tmp_path / "compare.html"
    path.write_text(compared(Comparison("a" * 90, [SCRIPT], [0, 1], [0, 0.5, 1], rows)), encoding="utf-8")
    window.log("browser")
    window.show(path, width_px)
    assert window.run("return document.documentElement.scrollWidth") <= width_px
    assert window.run(
        "return [...document.images].every(one => (one.loading = 'eager') && one.complete && one.naturalWidth === 64)"
    )
    assert window.run("return document.scripts.length") == 0
    assert window.log("browser") == []


def test_the_network_is_blocked_by_the_page_itself(window: Browser, page: Path) -> None:
    window.show(page, 1440)
    window.run("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/a.png'}))")
    said = [entry["message"] for entry in window.log("browser")]
    assert any("Content Security Policy" in text for text in said), said


def test_the_sliders_compare_two_pictures(window: Browser, page: Path) -> None:
    window.show(page, 1440)
    state: list[Any] = window.run(
        """const row = document.querySelector('.row'), step = row.querySelector('.step');
        const imgs = [...row.querySelectorAll('.strip img')], [before, after] = row.querySelectorAll('.stage img');
        step.value = 2; step.dispatchEvent(new Event('input'));
        return [before.src === imgs[0].src, after.src === imgs[2].src, row.querySelector('output').textContent,
                after.naturalWidth > 0, imgs[2].alt];"""
    )
    assert state == [True, True, state[4], True, state[4]]


def test_the_page_is_whole_without_its_script(window: Browser, page: Path) -> None:
    window.show(page, 1440, script=False)
    found = window.run(
        """return [[...document.querySelectorAll('.strip img')].length, document.querySelectorAll('.chart svg').length,
        getComputedStyle(document.querySelector('.compare')).display]"""
    )
    assert found[0] >= 9
    assert found[1] >= 6
    assert found[2] == "none"
    window.show(page, 1440)


def test_it_can_be_read_without_colour(window: Browser, page: Path) -> None:
    """Lines of one chart differ in their dashes, and words of the page have contrast enough."""
    for dark in (False, True):
        window.show(page, 1440, dark=dark)
        charts = window.run(
            """const dashes = one => one.getAttribute('stroke-dasharray') + one.classList.contains('faint');
            return [...document.querySelectorAll('.chart')].map(
                chart => [...chart.querySelectorAll('polyline')].map(dashes))"""
        )
        assert max(map(len, charts)) >= 2
        assert all(len(set(lines)) == len(lines) for lines in charts)
        words = window.run(
            """const of = (what, name) => getComputedStyle(document.querySelector(what))[name];
            return [of('body', 'backgroundColor'), of('body', 'color'), of('.quiet', 'color')]"""
        )
        assert min(_contrast(words[0], word) for word in words[1:]) >= 4.5


def _contrast(one: str, other: str) -> float:
    """The contrast of two colours (WCAG 2.2, 1.4.3)."""
    shares = []
    for colour in (one, other):
        parts = [float(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        shares.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(shares) + 0.05) / (min(shares) + 0.05)
