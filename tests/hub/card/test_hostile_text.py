"""What strangers wrote stays text on the card: no link, heading, HTML, image or list of theirs, whatever the field."""

from __future__ import annotations

import ast
import re
import shlex
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml
from card_examples import full
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hf_frmerge.evaluation.record import MERGED, EvaluationRecord, Recovered, Score
from hf_frmerge.hub.card.card import USER_BEGIN, USER_END, read_user_section, render_card, write_card
from hf_frmerge.hub.card.commands import (
    install_command,
    reproduce_command,
    reproduce_python,
    usage_python,
    verify_command,
)
from hf_frmerge.hub.card.data import CardSource, MergeCard
from hf_frmerge.hub.card.licences import SourceMetadata, read_source_metadata
from hf_frmerge.hub.card.markdown import code, escape, fence, sentence
from hf_frmerge.hub.card.tasks import Task

COMMONMARK = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])

PAYLOADS = {
    "html": "<img src=x onerror=alert(1)>",
    "script": "</code></pre><script>alert(1)</script>",
    "link": "[click](http://evil.example)",
    "image": "![i](http://evil.example/i.png)",
    "code": "x`<b>y</b>`[a](http://evil.example)",
    "two backticks": "x``<b>y</b>``[a](http://evil.example)",
    "fence": "x\n```\n\n# H\n\n[click](http://evil.example)\n",
    "tilde fence": "x\n~~~\n# H\n",
    "cell": "a | [click](http://evil.example) | b \\| c",
    "bare address": "http://evil.example www.evil.example a@evil.example",
    "comment": f"--><b>x</b>\n{USER_END}\n",
    "section": f"\n{USER_END}\n\n# By the author\n\n{USER_BEGIN}\n",
    "heading": "# H",
    "underlined heading": "x\n===\ny\n---\n",
    "list": "- x",
    "number": "1. x",
    "quote": "> x",
    "rule": "---",
    "yaml": "mit\nevil: true\n---\n# H",
    "jinja": "{{ 7 * 7777 }}{% for x in y %}",
    "python": 'x"); import os; os.system("reboot',
    "shell": "x; reboot #'$(reboot)",
    "directions": "\u202e\x1b[2J\x85\u2028",
    "backslash": "\\",
    "space before and after": " x ",
    "indented": "    x",
}


def card_with(text: str) -> MergeCard:
    """A card in which `text` is in every field that others fill: names, licences, notes, versions, evaluation."""
    metadata = SourceMetadata("other", text, text, (text,), (text,), (text,), f"@misc{{x, title={{{text}}}}}")
    record = EvaluationRecord(
        models={text: "expert", MERGED: "merged"},
        weights={text: 1.0},
        settings={"dtype": text, "block_size": text},
        scores=[Score(name, text, {"loss": 1.0, text: 2.0}, n_tokens=5) for name in (text, MERGED)],
        recovery=[Recovered(MERGED, text, text, 1.0, 0.5, 0.5)],
        distances=[replace(row, other=text, domain=text) for row in full().evaluation.distances[:1]],
        worst_tokens=[
            replace(full().evaluation.worst_tokens[0], expert=text, domain=text, context=text, token=text,
                    expert_guess=text, merged_guess=text)
        ],
        generations=[replace(full().evaluation.generations[-1], domain=text, prompt=text, text=text)],
        commands=[text],
    )  # fmt: skip
    return MergeCard(
        model_name=text,
        output_kind="adapter",
        sources=[
            CardSource(text, weight=0.5, metadata=metadata),
            CardSource("b", repo_id=f"org/{text}", commit=text, weight=0.5, metadata=metadata),
            CardSource(text, repo_id=text, role="base", metadata=replace(metadata, licence=text)),
        ],
        method=text,
        block=text,
        norm=text,
        non_default_arguments={"weight_rules": [text], "allow_license": text, "dtype": text},
        evaluation=record,
        notes=[text, f"`{text}` is not as in {text}."],
        versions={"hf_frmerge": text, text: text},
    )


def shape(markdown: str) -> Counter[str]:
    """What a card is built of: elements by kind, links and images by target, HTML by its text."""
    found: Counter[str] = Counter()
    blocks = COMMONMARK.parse(markdown)
    for token in [*blocks, *(child for block in blocks for child in block.children or ())]:
        if token.type in ("html_block", "html_inline"):
            found[token.content.strip()] += 1
        elif str(token.attrs.get("href")).startswith("https://huggingface.co/"):
            continue  # whether a name can be that of a repository
        elif token.type in ("link_open", "image"):
            found[f"{token.type} {token.attrs.get('href') or token.attrs.get('src')}"] += 1
        elif token.type not in ("text", "softbreak", "inline", "text_special", "code_inline", "link_close"):
            found[token.type] += 1
    return found


def body_of(card: str) -> str:
    """A card without its front matter, which must be YAML with the keys of the Hub alone."""
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    known = {
        "base_model", "base_model_relation", "library_name", "pipeline_tag", "license", "license_name", "license_link",
        "language", "datasets", "tags", "model-index",
    }  # fmt: skip
    assert set(yaml.safe_load(front)) <= known
    return body


@cache
def harmless_shape(user_section: str = "") -> Counter[str]:
    return shape(body_of(render_card(card_with("some words"), user_section=user_section)))


@pytest.mark.parametrize("text", PAYLOADS.values(), ids=PAYLOADS)
def test_a_payload_in_every_field_changes_nothing_but_words(text: str) -> None:
    card = render_card(card_with(text), user_section="Mine.")
    assert shape(body_of(card)) == harmless_shape("Mine.")
    assert read_user_section(card) == "Mine."
    assert "54439" not in card


@settings(deadline=None, max_examples=30)
@given(st.text(alphabet="ab1 \n`~|[]()<>!#*_-+=.:\\\"'@&;{}$/\x1b\u202e", min_size=1).filter(str.strip))
def test_no_text_in_every_field_changes_anything_but_words(text: str) -> None:
    assert shape(body_of(render_card(card_with(text)))) == harmless_shape()


@settings(deadline=None, max_examples=150)
@given(st.text(alphabet="ab1 \n`|[]()<>!#*_-+=.\\\"'&;/", min_size=1).filter(str.strip))
def test_text_code_and_blocks_are_shown_as_they_are(text: str) -> None:
    line = text.replace("\n", "⏎")
    (paragraph,) = [t for t in COMMONMARK.parse(f"x {escape(text)} x") if t.type == "inline"]
    assert "".join(child.content for child in paragraph.children) == f"x {line} x"
    (paragraph,) = [t for t in COMMONMARK.parse(f"x {code(text)} x") if t.type == "inline"]
    assert [child.content.strip() for child in paragraph.children] == ["x", line.strip(), "x"]
    (block,) = COMMONMARK.parse(fence(text, "bash"))
    assert block.content.removesuffix("\n") == re.sub("(?m)^<!--", " <!--", text)


def test_a_sentence_keeps_its_code_and_nothing_else() -> None:
    assert sentence("Every source is under `apache-2.0`.") == "Every source is under `apache-2.0`."
    assert sentence("`a` is [not](b) `c") == r"`a` is \[not\](b) \`c"
    assert sentence("- x") == r"\- x" and sentence("1. x") == r"1\. x" and sentence("2 x") == "2 x"


@pytest.mark.parametrize("text", PAYLOADS.values(), ids=PAYLOADS)
def test_names_stay_within_the_code_and_the_commands_of_a_card(text: str) -> None:
    """Readers copy them: Python reads the names as strings, a shell as single words."""
    card = card_with(text)
    card = replace(card, output_kind="full", task=Task("text-generation", "AutoModelForCausalLM"))
    (model, tokenizer) = (
        call.args[0].value
        for call in ast.walk(ast.parse(usage_python(card)))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "from_pretrained"
    )
    assert model == tokenizer == f"./{text}"
    names = {node.value for node in ast.walk(ast.parse(reproduce_python(card))) if isinstance(node, ast.Constant)}
    assert {source.pinned for source in card.experts} <= names
    assert shlex.split(install_command(card)) == ["pip", "install", f"hf_frmerge=={text}"]
    assert shlex.split(verify_command(card, text))[:3] == ["frmerge", "verify", text]
    assert set(shlex.split(reproduce_command(card))) >= {source.pinned for source in card.experts}


def test_a_card_s_user_section_cannot_be_written_by_others(tmp_path: Path) -> None:
    """Commands are shown in blocks of code, in which nothing can be escaped."""
    record = EvaluationRecord(commands=[USER_BEGIN, f"a\n{USER_END}"])
    card = replace(full(), evaluation=record)
    path = write_card(card, tmp_path)
    assert read_user_section(path.read_text(encoding="utf-8")) == ""
    assert write_card(card, tmp_path).read_text(encoding="utf-8") == render_card(card)


def test_front_matter_of_a_source_is_read_as_one_line_each(tmp_path: Path) -> None:
    fields = {"license": "mit\nevil: true\x1b", "license_name": "a\n---\nb", "tags": ["x\ny"]}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(fields)}---\n", encoding="utf-8")
    metadata = read_source_metadata(tmp_path)
    assert (metadata.licence, metadata.licence_name) == ("mit⏎evil: true⟨u+001b⟩", "a⏎---⏎b")
    assert metadata.tags == ("x⏎y",)
