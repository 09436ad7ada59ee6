"""The page as Chromium shows it: on a laptop and a phone, light and dark."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from comparison_records import make_comparison
from evaluation_records import make_record

from hf_frmerge.evaluation.comparison_record import save_comparison
from hf_frmerge.report.comparison_page import write_comparison_page
from hf_frmerge.report.page import write_page
from hf_frmerge.report.style import PALETTE

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as actual:
        yield actual


@pytest.fixture(scope="module")
def page(merge: Callable[..., Path]) -> Path:
    return write_page(merge(3, record=make_record(30)))


def column(browser: Browser, table: str, index: int) -> list[str]:
    cells = f"[...document.querySelectorAll('#{table} tbody tr')].map((row) => row.cells[{index}].textContent)"
    return list(browser.evaluate(cells))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    save_comparison(folder, make_comparison())
    return write_comparison_page(folder)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("of", ["page", "comparison"])
def test_it_fits_asks_for_nothing_and_has_no_errors(
    browser: Browser, request: pytest.FixtureRequest, of: str, width: int, dark: bool
) -> None:
    browser.open(request.getfixturevalue(of), width, dark=dark)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    # Nothing sticks out but what scrolls in a box of its own, or is clipped by a figure.
    outside = browser.evaluate(
        """[...document.querySelectorAll("body *")].filter((element) => !element.closest(".scroll table, svg g")
            && element.getBoundingClientRect().right > innerWidth + 0.5).map((element) => element.outerHTML)"""
    )
    assert outside == []
    assert browser.requests == []
    assert browser.errors == []
    paper = PALETTE["paper"][dark]
    colour = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == f"rgb({int(paper[1:3], 16)}, {int(paper[3:5], 16)}, {int(paper[5:], 16)})"


@pytest.mark.parametrize(("width", "shown"), [(375, "narrow"), (1280, "wide")])
def test_figures_suit_the_width(browser: Browser, page: Path, width: int, shown: str) -> None:
    browser.open(page, width)
    heights = browser.evaluate(
        "[...document.querySelectorAll('figure > div')].map((div) => [div.className, div.offsetHeight])"
    )
    assert len(heights) == 10
    assert all((height > 0) == (name == shown) for name, height in heights)
    texts = f"[...document.querySelectorAll('.{shown} text')]"
    smallest = browser.evaluate(f"Math.min(...{texts}.map((text) => text.getBoundingClientRect().height))")
    assert smallest >= 9  # CSS pixels from the top of a letter to the foot of one


def test_ink_of_the_figures_turns_with_the_scheme(browser: Browser, page: Path) -> None:
    colours = []
    for dark in (False, True):
        browser.open(page, 1280, dark=dark)
        colours.append(browser.evaluate("getComputedStyle(document.querySelector('#figure-layers text')).fill"))
    assert colours[0] != colours[1]


def test_headings_sort(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    button = "#layers th:nth-child(4) button"
    heading = "document.querySelector('#layers th:nth-child(4)').getAttribute('aria-sort')"
    ranks = [float(cell.replace(",", "")) for cell in column(browser, "layers", 3)]
    assert ranks != sorted(ranks)  # layer 4 is out of order
    assert browser.evaluate(heading) == "none"
    for order in ("descending", "ascending", "descending"):
        browser.click(button)
        assert browser.evaluate(heading) == order
        actual = [float(cell.replace(",", "")) for cell in column(browser, "layers", 3)]
        assert actual == sorted(ranks, reverse=order == "descending")
    assert sorted(column(browser, "layers", 0), key=int) == [str(layer) for layer in range(31)]  # whole rows move
    browser.click("#distances th:nth-child(2) button")
    names = column(browser, "distances", 1)
    assert names == sorted(names)
    assert browser.errors == []


def test_headings_sort_from_the_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    browser.evaluate("document.querySelector('#distances th:nth-child(4) button').focus()")
    for kind in ("rawKeyDown", "char", "keyUp"):
        browser.send(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13
        )
    means = [float(cell) for cell in column(browser, "distances", 3)]
    assert means == sorted(means, reverse=True) and means[0] > means[-1]


def test_long_tables_open_on_demand(browser: Browser, page: Path) -> None:
    browser.open(page, 375)
    visible = "[...document.querySelectorAll('#layers tbody tr')].filter((row) => row.offsetHeight).length"
    assert browser.evaluate(visible) == 12
    browser.click("#layers-title + .limited .more input")
    assert browser.evaluate(visible) == 31


PAYLOADS = (
    "<img src=x onerror=\"document.title='owned'\"><b id=evil>",
    "</td></script></title></style></svg><script>document.title='owned'</script><a id=evil href=https://evil.example>",
    '" onmouseover="document.title=\'owned\'" autofocus onfocus="document.title=\'owned\'" id="evil',
    "{{ 7 * 7777 }}&lt;b id=evil&gt;<!--",
)


def test_what_strangers_wrote_does_nothing_in_a_browser(browser: Browser, merge: Callable[..., Path]) -> None:
    record = make_record(3)
    for payload in PAYLOADS:
        token = replace(record.worst_tokens[0], context=payload, token=payload, expert_guess=payload, domain=payload)
        record.worst_tokens.append(token)
        record.generations.append(replace(record.generations[-1], prompt=payload, text=payload))
        record.scores += [replace(score, domain=payload) for score in record.scores[:2]]
        record.commands.append(payload)
        record.settings[payload] = payload
    folder = merge(3, record=record)
    manifest = json.loads((folder / "merge_manifest.json").read_text())
    manifest["notes"] = list(PAYLOADS)
    manifest["experts"][0]["id"], manifest["experts"][1]["id"] = PAYLOADS[:2]
    manifest["tensors"] |= {f"{payload}.weight": next(iter(manifest["tensors"].values())) for payload in PAYLOADS}
    (folder / "merge_manifest.json").write_text(json.dumps(manifest))
    page = write_page(folder)
    browser.open(page, 1280)
    title = browser.evaluate("document.title")
    assert "owned" not in title or "<" in title
    assert browser.evaluate("document.querySelectorAll('#evil, img, a[href*=evil]').length") == 0
    assert browser.evaluate("document.querySelectorAll('[onmouseover], [onfocus], [onerror]').length") == 0
    assert browser.evaluate("document.body.textContent.includes('54439')") is False
    assert browser.evaluate("document.body.textContent.split('<b id=evil>').length") > 4  # it is there, as text
    assert browser.requests == [] and browser.errors == []
