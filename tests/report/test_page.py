"""The page says what the records say, loads nothing, and takes no text for markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from click_runner import click_runner
from evaluation_records import make_record

from hf_frmerge.cli.main import main
from hf_frmerge.errors import CheckpointError
from hf_frmerge.evaluation.record import MERGED, Generation, WorstToken
from hf_frmerge.merging.record.manifest import MANIFEST_FILE, REPORT_FILE, read_manifest
from hf_frmerge.report import tables
from hf_frmerge.report.facts import read_facts
from hf_frmerge.report.page import write_page
from hf_frmerge.report.style import PALETTE
from hf_frmerge.report.verdicts import verdicts

HOSTILE = "</bdi><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)> & \"quoted\" 'text'"


class Page(HTMLParser):
    """Elements with their attributes, the words of the page, and its tables as text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words = ""
        self.scripts: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._inside = ""
        self._table = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        actual = {name: value or "" for name, value in attrs}
        self.elements.append((tag, actual))
        if tag in ("script", "style"):
            self._inside = tag
        elif tag == "table":
            self._table = actual["id"]
            self.tables[self._table] = []
        elif tag == "tr" and self._table:
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""
        if tag == "table":
            self._table = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif not self._inside:
            self.words += data
            if self._table and self.tables[self._table] and self.tables[self._table][-1]:
                self.tables[self._table][-1][-1] += data.strip()

    def text(self) -> str:
        return re.sub(r"\s+", " ", self.words)


def page_of(folder: Path) -> Page:
    return Page(write_page(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text(evaluated: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of an evaluated merge."""
    return write_page(evaluated, tmp_path_factory.mktemp("page") / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_it_loads_nothing(text: str) -> None:
    assert "://" not in text and "@import" not in text
    assert set(re.findall(r"url\(\s*(.)", text)) == {"#"}  # clip paths of the figures
    for tag, attributes in Page(text).elements:
        assert tag not in ("iframe", "object", "embed", "form", "base", "video", "audio", "source")
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#")[:5] in ("#", "data:") or attributes[name].startswith("#"), (tag, name)
        assert not [name for name in attributes if name.startswith("on")], tag


def test_ids_are_unique_and_anchors_lead_somewhere(page: Page) -> None:
    elements = page.elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"][1:] for tag, attributes in elements if tag == "a"}
    assert targets and targets <= set(ids)
    referenced = {attributes[name] for _, attributes in elements for name in attributes if name == "aria-labelledby"}
    assert referenced <= set(ids)


def test_hostile_text_stays_text(merge: Callable[..., Path], page: Page) -> None:
    token = WorstToken("expert-math", "math", HOSTILE, HOSTILE, 3.0, HOSTILE, "\u202etxet\x00", 0.5, 0.1)
    generation = Generation(MERGED, HOSTILE, HOSTILE, HOSTILE, 0.1, 1.0)
    record = make_record(
        worst_tokens=[token], generations=[generation], commands=[HOSTILE], settings={HOSTILE: HOSTILE}
    )
    record.scores = [replace(score, domain=HOSTILE) for score in record.scores]
    folder = merge(record=record)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["notes"] = [HOSTILE]
    manifest["experts"][0]["id"] = HOSTILE
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    hostile = page_of(folder)
    assert len(hostile.scripts) == 1
    assert hostile.scripts == page.scripts
    assert not [tag for tag, _ in hostile.elements if tag == "img"]
    assert hostile.words.count("<script>alert(1)</script>") >= 8
    assert "⟨U+202E⟩txet⟨U+0000⟩" in hostile.words  # a token cannot turn the direction of the page


def test_the_only_script_is_the_one_the_policy_names(page: Page) -> None:
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")


def test_numbers_of_the_record_are_in_the_tables(page: Page) -> None:
    actual = page.tables
    assert actual["scores-0"] == [
        ["Model", "math", "code"],
        [MERGED, "9.97", "7.39"],
        ["base", "20.09", "12.18"],
        ["expert-math", "7.39", "13.46"],
        ["expert-code", "24.53", "4.48"],
    ]
    assert actual["distances"][1][:6] == [MERGED, "expert-math", "math", "0.300", "0.270", "0.600"]
    assert actual["distances"][1][7:] == ["0.110", "0.120", "0.0300", "80%", "1,000"]
    assert [row[:2] for row in actual["distances"][5:]] == [["expert-code", "expert-math"]] * 2  # the yardstick
    assert actual["objectives"][1] == ["math", "0.250", "0.200", "0.200", "0.500"]
    assert actual["layers"][5] == ["4", "3.00", "60.0%", "19.2", "60.0%"]


def test_geometry_of_the_manifest_is_in_the_table(merge: Callable[..., Path]) -> None:
    folder = merge(3, block="row")
    rows = {row[0]: row for row in page_of(folder).tables["blocks"]}
    for name, tensor in read_manifest(folder).tensors.items():
        geometry = vars(tensor.geometry)
        row = rows[name]
        assert int(row[1]) == tensor.n_blocks
        for cell, key in zip(row[3:7], ("mean_angle", "max_angle", "linear_norm_ratio", "norm_ratio"), strict=True):
            assert float(cell) == pytest.approx(geometry[key], rel=6e-3)
        assert int(row[8]) == geometry["n_iter"]
        assert row[10] == "0"


def test_very_many_tensors_are_put_together(merge: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = merge(2)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    template = manifest["tensors"].pop("model.layers.1.mlp.up_proj.weight")
    for number in range(7):
        entry: dict[str, Any] = json.loads(json.dumps(template))
        entry["geometry"] |= {"mean_angle": 0.1 * number, "max_angle": 0.2 * number, "norm_ratio": 1 - 0.1 * number}
        manifest["tensors"][f"model.layers.1.mlp.experts.{number}.up_proj.weight"] = entry
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    monkeypatch.setattr(tables, "MAX_ROWS", 10)
    rows = {row[0]: row for row in page_of(folder).tables["blocks"]}
    assert rows["layer 1: mlp.experts.*.up_proj"][1:2] == ["7"]
    assert rows["layer 1: mlp.experts.*.up_proj"][3:7:3] == ["0.300", "0.4000"]  # the mean angle, the worst ratio
    assert "model.embed_tokens.weight" in rows


@pytest.mark.parametrize(
    ("words", "level"),
    [
        ("70% of what expert-math gained on math and 50% of what expert-code gained on code", "watch"),
        ("On code it is farthest behind the best other model, perplexity 7.39 against 4.48 for expert-code", "watch"),
        ("Its predictions are 0.400 rad from an expert's on average", "good"),
        ("Two experts are 0.900 rad apart", "good"),
        ("On math the text goes on with “␣four”. expert-math gives that 90%, the merged model 5%", "fact"),
        ("Activations have collapsed in layer 4", "bad"),
        ("The mean converged", "good"),
    ],
)
def test_verdicts_name_the_worst(text: str, words: str, level: str) -> None:
    items = re.findall(r'<li class="(\w+)">(.*?)</li>', text, flags=re.DOTALL)
    (actual,) = [name for name, item in items if words in Page(item).text()]
    assert actual == level


def test_the_stated_error_of_distances_is_two_sided(text: str) -> None:
    assert "the means may be off by up to 0.00400 rad" in Page(text).text()


def test_without_an_evaluation_it_says_how_to_make_one(merge: Callable[..., Path]) -> None:
    page = page_of(merge())
    assert "Not evaluated yet." in page.text()
    assert "frmerge evaluate merged" in page.text()
    assert sorted(page.tables) == ["blocks"]


def test_no_path_of_this_machine_is_in_it(text: str, evaluated: Path) -> None:
    assert str(evaluated.parents[1]) not in text


def test_one_record_gives_one_page(evaluated: Path, text: str) -> None:
    path = write_page(evaluated)
    assert path == evaluated / REPORT_FILE
    assert path.read_text(encoding="utf-8") == text
    path.unlink()


def test_figures_take_their_colours_from_the_page(text: str) -> None:
    body = text[text.index("<body>") :]
    assert body.count("<svg") == 10  # five figures, for wide pages and for phones
    for role, (light, dark) in PALETTE.items():
        assert light not in body and dark not in body
        assert f"--{role}:{light};" in text and f"--{role}:{dark};" in text
    assert "DejaVu" not in body


def frmerge(*arguments: str | Path) -> Result:
    return click_runner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_writes_page_and_figures(evaluated: Path, tmp_path: Path) -> None:
    result = frmerge("report", evaluated, "--output", tmp_path / "page.html", "--figures", tmp_path / "figures")
    assert result.exit_code == 0, result.output
    names = ["recovery", "distances", "layers", "angles", "coefficients"]
    written = [tmp_path / "page.html", *(tmp_path / "figures" / f"{name}.png" for name in names)]
    assert result.stdout == "".join(f"Wrote {path}.\n" for path in written)
    assert all(path.is_file() for path in written)
    assert not (evaluated / REPORT_FILE).exists()


def test_the_command_refuses_a_folder_without_a_merge(tmp_path: Path) -> None:
    result = frmerge("report", tmp_path)
    assert result.exit_code == 1
    assert "has no merge_manifest.json" in result.stderr
    assert not list(tmp_path.iterdir())


def test_experts_that_gained_nothing_are_named(merge: Callable[..., Path]) -> None:
    rows = [replace(row, share=None) for row in make_record().recovery]
    actual = verdicts(read_facts(merge(record=make_record(recovery=rows))))
    (verdict,) = [verdict for verdict in actual if verdict.title == "The experts gained nothing to keep"]
    assert verdict.text.endswith("expert-math and expert-code.")


def test_a_torn_record_is_named(merge: Callable[..., Path]) -> None:
    folder = merge()
    (folder / "merge_evaluation.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"merge_evaluation\.json is not valid JSON"):
        write_page(folder)
