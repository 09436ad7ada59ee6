"""Experts whose tokenizers differ: rows are matched by token, and tokenizer, config and weights agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from merge_reference import merged_reference
from safetensors.torch import load_file
from sparse_reference import naive
from token_families import TEXTS, VOCABULARY_TENSORS, aligned_rows, bpe, renumbered, save_expert, vocabulary_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.suite.inputs import find_inputs
from hf_frmerge.evaluation.suite.settings import ModelSet
from hf_frmerge.merger import FisherRaoMerger
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.planning.plan import MergePlan
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance.diff import diff_merges
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify
from hf_frmerge.wording.vocabulary import vocabulary_sentence

WEIGHTS = [0.5, 0.2, 0.3]


def merge(experts: list[Path], out: Path, base: Path | None = None, weights: Any = None, **options: Any) -> MergePlan:
    args = MergingArguments(str(out), **options)
    plan = build_plan([str(expert) for expert in experts], args, weights, str(base) if base else None)
    run_merge(plan, StepObserver(), Processes())
    plan.close()
    return plan


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with padding; experts that add tokens, in another order, share one, and lack one of the base."""
    root = tmp_path_factory.mktemp("family")
    save_expert(root / "base", special=["<base>"], n_rows=300)
    save_expert(root / "math", special=["<base>", "<turn>"], added=["<a>"], n_rows=304, seed=1)
    save_expert(root / "code", renumbered(bpe()), added=["<b>"], special=["<turn>", "<c>"], seed=2)
    save_expert(root / "chat", special=["<base>"], n_rows=300, seed=3, template="{{ messages }}")
    return root


def all_three(family: Path) -> list[Path]:
    return [family / name for name in ("math", "code", "chat")]


@pytest.mark.parametrize("source", ["base", "union", "code"])
@pytest.mark.parametrize(
    ("method", "space", "block"),
    [
        ("linear", "weights", "tensor"),
        ("karcher", "weights", "tensor"),
        ("karcher", "weights", "row"),
        ("karcher", "deltas", "tensor"),
        ("task_arithmetic", "deltas", "tensor"),
    ],
)
def test_span_methods_merge_the_rows_of_a_token(
    family: Path, tmp_path: Path, source: str, method: str, space: str, block: str
) -> None:
    base = family / "base"
    merge(all_three(family), tmp_path, base, WEIGHTS, method=method, space=space, block=block, tokenizer_source=source)
    output, n_rows = vocabulary_of(tmp_path), json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    merged = load_file(tmp_path / "model.safetensors")
    for name in VOCABULARY_TENSORS:
        experts, origin = aligned_rows(name, output, n_rows, all_three(family), base, WEIGHTS)
        expected = merged_reference(
            method,
            [torch.tensor(rows) for rows in experts],
            WEIGHTS,
            torch.tensor(origin) if space == "deltas" else None,
            n_rows if block == "row" else 1,
        )
        np.testing.assert_allclose(merged[name].double().numpy(), expected, rtol=1e-5, atol=2e-6, err_msg=name)
    assert verify(str(tmp_path)).ok


@pytest.mark.parametrize("method", ["ties", "dare_linear", "della", "sce", "consensus"])
def test_sparse_methods_merge_the_rows_of_a_token(family: Path, tmp_path: Path, method: str) -> None:
    base = family / "base"
    merge(all_three(family), tmp_path, base, WEIGHTS, method=method, space="deltas", tokenizer_source="union")
    output, n_rows = vocabulary_of(tmp_path), json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    merged = load_file(tmp_path / "model.safetensors")
    for name in VOCABULARY_TENSORS:
        experts, origin = aligned_rows(name, output, n_rows, all_three(family), base, WEIGHTS)
        assert origin is not None
        # Rows that are filled in are rounded to float32 once, as if they had been stored so.
        origin = origin.astype(np.float32).astype(np.float64).reshape(-1)
        deltas = np.stack([rows.astype(np.float32).astype(np.float64).reshape(-1) - origin for rows in experts])
        expected = origin + naive(method, deltas, WEIGHTS, [(name, origin.size, 16)])
        actual = merged[name].double().numpy()
        # Where the base lacks a token that several experts have, it gets their mean: their deltas add up to zero, and
        # rounding alone decides which sign wins a vote.
        ids = [vocabulary_of(folder) for folder in (*all_three(family), base)]
        holders = {token: sum(token in each for each in ids[:-1]) for token in output if token not in ids[-1]}
        unclear = {output[token] for token, n in holders.items() if n > 1}
        clear = np.array([row not in unclear for row in range(n_rows)])
        assert 0 < (~clear).sum() < 5
        np.testing.assert_allclose(actual[clear], expected.reshape(n_rows, -1)[clear], rtol=1e-5, atol=2e-6)
    assert verify(str(tmp_path)).ok


def test_a_spectral_method_averages_the_rows_of_a_token(family: Path, tmp_path: Path) -> None:
    base, weights = family / "base", [1 / 3] * 3
    merge(all_three(family), tmp_path, base, method="tsv_m", space="deltas", tokenizer_source="union")
    output, n_rows = vocabulary_of(tmp_path), json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    for name in VOCABULARY_TENSORS:
        experts, _ = aligned_rows(name, output, n_rows, all_three(family), base, weights)
        merged = load_file(tmp_path / "model.safetensors")[name].double().numpy()
        np.testing.assert_allclose(merged, np.mean(experts, axis=0), rtol=1e-5, atol=2e-6)
    assert verify(str(tmp_path)).ok


def generate(folder: Path, text: str) -> tuple[list[int], str]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt")
    made = model.generate(inputs.input_ids, max_new_tokens=4, do_sample=False)[0].tolist()
    return inputs.input_ids[0].tolist(), tokenizer.decode(made)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_union_reads_and_writes_the_tokens_of_all(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    kept: dict[str, Any] = {"tied": tied, "dtype": dtype}
    save_expert(tmp_path / "base", **kept)
    save_expert(tmp_path / "math", added=["<a>"], special=["<turn>"], seed=1, eos="<turn>", **kept)
    save_expert(tmp_path / "code", special=["<turn>", "<b>"], n_rows=304, seed=2, **kept)
    out = tmp_path / "out"
    merge([tmp_path / "math", tmp_path / "code"], out, tmp_path / "base", tokenizer_source="union", method="linear")
    expected = {**vocabulary_of(tmp_path / "base")}
    expected |= {token: len(expected) + place for place, token in enumerate(["<a>", "<turn>", "<b>"])}
    assert vocabulary_of(out) == expected
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("hello <turn>there<b><a>").input_ids == [
        *tokenizer("hello ").input_ids, expected["<turn>"], *tokenizer("there").input_ids,
        expected["<b>"], expected["<a>"],
    ]  # fmt: skip
    assert tokenizer.decode([expected["<turn>"], expected["<a>"]], skip_special_tokens=True) == "<a>"
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.vocab_size == len(expected) == model.get_input_embeddings().num_embeddings
    assert (model.config.tie_word_embeddings, "lm_head.weight" in load_file(out / "model.safetensors")) == (
        tied,
        not tied,
    )
    # A token that one expert has alone keeps its row exactly.
    for name, token in (("math", "<a>"), ("code", "<b>")):
        theirs = load_file(tmp_path / name / "model.safetensors")["model.embed_tokens.weight"]
        row = model.get_input_embeddings().weight[expected[token]]
        assert torch.equal(row, theirs[vocabulary_of(tmp_path / name)[token]])
    ids, text = generate(out, "hello<b><turn>")
    assert ids[-2:] == [expected["<b>"], expected["<turn>"]] and text.startswith("hello<b><turn>")
    assert verify(str(out)).ok


def test_equal_vocabularies_change_nothing(tmp_path: Path) -> None:
    experts = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(experts):
        save_expert(folder, special=["<turn>"], n_rows=304, seed=seed)
    merge(experts, tmp_path / "without")
    for source in ("union", "b", "1"):
        out = tmp_path / f"out-{source}"
        plan = merge(experts, out, tokenizer_source=source)
        assert plan.vocabulary is None and not any(model.weights.row_maps for model in plan.models)
        for name in ("model.safetensors", "merge_coefficients.safetensors", "config.json", "generation_config.json"):
            assert (out / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
        assert vocabulary_of(out) == vocabulary_of(tmp_path / "without")


def test_rows_without_a_token_are_padding(tmp_path: Path) -> None:
    """More rows than tokens are kept, as are padding rows that all have; new ones hold the mean of the donor's."""
    save_expert(tmp_path / "a", n_rows=300)
    save_expert(tmp_path / "b", special=["<turn>"], n_rows=296, seed=1)
    plan = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", tokenizer_source="union", pad_to_multiple_of=64)
    assert vocabulary_of(tmp_path / "out")["<turn>"] == 290
    merged = load_file(tmp_path / "out/model.safetensors")
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 320
    for name in VOCABULARY_TENSORS:
        experts, _ = aligned_rows(
            name, vocabulary_of(tmp_path / "out"), 320, [tmp_path / "a", tmp_path / "b"], None, [0.5, 0.5]
        )
        expected = merged_reference("karcher", [torch.tensor(rows) for rows in experts], [0.5, 0.5], None)
        np.testing.assert_allclose(merged[name].double().numpy(), expected, rtol=1e-5, atol=2e-6)
    assert any("20 rows that no model has hold the mean of all rows of" in note for note in plan.notes)
    ids, _ = generate(tmp_path / "out", "hello<turn>")
    assert ids[-1] == 290


def test_the_rows_of_a_chosen_expert_are_not_cut(tmp_path: Path) -> None:
    save_expert(tmp_path / "a")
    save_expert(tmp_path / "b", special=["<turn>"], n_rows=320, seed=1)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", tokenizer_source="b")
    assert load_file(tmp_path / "out/model.safetensors")["lm_head.weight"].shape[0] == 320
    assert vocabulary_of(tmp_path / "out") == vocabulary_of(tmp_path / "b")
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "cut", tokenizer_source="a")
    assert load_file(tmp_path / "cut/model.safetensors")["lm_head.weight"].shape[0] == 290


def test_tokens_of_other_merges_are_reached(tmp_path: Path) -> None:
    """Two tokenizers trained on different texts: the union cuts a text of the second into its tokens."""
    other = bpe(["zzz zzz zzzz qqq qqqq qqq"] * 4, 264)
    save_expert(tmp_path / "a")
    save_expert(tmp_path / "b", other, seed=1)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", tokenizer_source="union")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    first, second = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("a", "b"))
    assert set(tokenizer.get_vocab()) == set(first.get_vocab()) | set(second.get_vocab())
    for text in TEXTS[:3]:
        assert tokenizer.tokenize(text) == first.tokenize(text)
    assert tokenizer.tokenize("zzzz qqqq") == second.tokenize("zzzz qqqq")
    ids = tokenizer("hello zzzz").input_ids
    assert tokenizer.decode(ids) == "hello zzzz"
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.tensor([ids]))


# The record


def test_the_record_says_what_was_mapped(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = merge(all_three(family), out, family / "base", WEIGHTS, tokenizer_source="union")
    manifest = read_manifest(out)
    record, output = manifest.vocabulary, vocabulary_of(out)
    assert record is not None and manifest.arguments["tokenizer_source"] == "union"
    assert (record.n_tokens, record.n_rows, set(record.tensors)) == (len(output), 300, set(VOCABULARY_TENSORS))
    assert [model.spec for model in record.models] == ["base", "math", "code", "chat"]
    for model in record.models:
        own = vocabulary_of(family / model.spec)
        assert model.n_tokens == len(own)
        assert model.n_filled == len(output.keys() - own.keys()) and model.n_dropped == 0
    assert vocabulary_sentence(record) == (
        "Tokens: 295 in 300 rows (union), by token in 2 tensors; filled in 4 for base, 2 for math, 2 for code, 4 for "
        "chat."
    )
    notes = " ".join(manifest.report.notes)
    assert "are merged token by token: 295 tokens in 300 rows" in notes and "'code' lacks 2 of these tokens" in notes
    assert str(family) not in (out / "merge_manifest.json").read_text()
    assert plan.describe()["vocabulary"]["n_rows"] == 300


def test_a_token_that_is_left_out_is_named(family: Path, tmp_path: Path) -> None:
    plan = merge(all_three(family), tmp_path / "out", family / "base", tokenizer_source="base")
    assert any("2 tokens of" in note and "their rows: '<a>', '<turn>'." in note for note in plan.notes)
    assert any("3 tokens of" in note and "'<b>', '<turn>', '<c>'" in note for note in plan.notes)


def test_verify_sees_changes_and_reproduce_repeats(family: Path, tmp_path: Path) -> None:
    experts = all_three(family)
    merge(experts, tmp_path / "out", family / "base", WEIGHTS, tokenizer_source="code", settings_from="chat")
    again = reproduce(str(tmp_path / "out"), str(tmp_path / "again"))
    assert again.identical and again.n_tensors == len(load_file(tmp_path / "out/model.safetensors"))
    file = tmp_path / "out/tokenizer_config.json"
    file.write_text(file.read_text().replace("<eos>", "<eoS>"))
    assert [problem for problem in verify(str(tmp_path / "out")).problems if "tokenizer_config.json" in problem]


class _Killed(Exception):
    pass


class _KillAfter(StepObserver):
    """Stops a merge after a number of tensors, as a kill would."""

    def __init__(self, n_left: int) -> None:
        self.n_left = n_left

    def end(self, outcome: Any) -> bool:
        self.n_left -= 1
        if self.n_left < 0:
            raise _Killed
        return True


def test_a_merge_that_was_killed_is_resumed(family: Path, tmp_path: Path) -> None:
    experts = [str(folder) for folder in all_three(family)]
    options: dict[str, Any] = {"tokenizer_source": "union", "pad_to_multiple_of": 8}
    merge(all_three(family), tmp_path / "whole", family / "base", WEIGHTS, **options)
    with pytest.raises(_Killed):
        plan = build_plan(experts, MergingArguments(str(tmp_path / "out"), **options), WEIGHTS, str(family / "base"))
        run_merge(plan, _KillAfter(2), Processes())
    merge(all_three(family), tmp_path / "out", family / "base", WEIGHTS, resume_from_checkpoint=True, **options)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_diff_tells_two_vocabularies_apart(family: Path, tmp_path: Path) -> None:
    for source in ("union", "base"):
        merge(all_three(family), tmp_path / source, family / "base", WEIGHTS, tokenizer_source=source)
    difference = diff_merges(str(tmp_path / "union"), str(tmp_path / "base"))
    assert [(c.what, c.a, c.b) for c in difference.arguments] == [("tokenizer_source", "union", "base")]


def test_a_given_table_is_applied_to_the_rows_of_a_token(family: Path, tmp_path: Path) -> None:
    experts, base = all_three(family), family / "base"
    merge(experts, tmp_path / "out", base, WEIGHTS, tokenizer_source="union")
    merge(
        experts, tmp_path / "given", base, WEIGHTS, coefficients=str(tmp_path / "out"), tokenizer_source="union"
    )  # with the weights, by which rows are filled
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "given" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_no_bit_depends_on_threads_or_on_where_the_models_lie(family: Path, tmp_path: Path) -> None:
    experts, base = all_three(family), family / "base"
    merge(experts, tmp_path / "one", base, WEIGHTS, tokenizer_source="code", num_workers=1)
    merge(experts, tmp_path / "many", base, WEIGHTS, tokenizer_source="code", num_workers=4, memory_budget="64MiB")
    memory = fsspec.filesystem("memory")
    for folder in (*experts, base):
        memory.put(str(folder), f"/{tmp_path.name}/{folder.name}", recursive=True)
    urls = [f"memory://{tmp_path.name}/{folder.name}" for folder in (*experts, base)]
    args = MergingArguments(str(tmp_path / "remote"), tokenizer_source=urls[1])
    plan = build_plan(urls[:-1], args, WEIGHTS, urls[-1])
    run_merge(plan, StepObserver(), Processes())
    for name in ("model.safetensors", "tokenizer.json", "config.json", "merge_coefficients.safetensors"):
        for other in ("many", "remote"):
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_calibration_needs_one_vocabulary(family: Path, tmp_path: Path) -> None:
    args = MergingArguments(str(tmp_path / "out"), tokenizer_source="union")
    merger = FisherRaoMerger(
        list(map(str, all_three(family))), args=args, base_model=str(family / "base"), calibration_dataset="self"
    )
    with pytest.raises(ArgumentError, match="compares its models over one vocabulary, and these have different ones"):
        merger.merge()
    assert not (tmp_path / "out/config.json").exists()


def test_models_with_other_ids_are_not_compared(tmp_path: Path) -> None:
    """Two models of one size, whose tokenizers would make other texts of the same ids."""
    save_expert(tmp_path / "a")
    save_expert(tmp_path / "b", renumbered(bpe()), seed=1)
    models = ModelSet({"a": tmp_path / "a", "b": tmp_path / "b"}, {"a": "expert", "b": "merged"})
    with pytest.raises(ArgumentError, match=r"\d+ tokens have other ids in 'b' than in 'a'"):
        find_inputs(models, {"text": [{"text": "hello world"}] * 8}, block_size=8, packing=True)
