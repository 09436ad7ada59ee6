from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from card_examples import EXAMPLES, adapter, full, mixed
from evaluation_records import make_record
from huggingface_hub import ModelCard

from hf_frmerge.evaluation.record import EvaluationRecord, Recovered, Score
from hf_frmerge.hub.card.card import USER_BEGIN, USER_END, licence_of, render_card, write_card
from hf_frmerge.hub.card.commands import result_arguments
from hf_frmerge.hub.card.data import CardSource, CardStatistics, MergeCard
from hf_frmerge.hub.card.licences import SourceMetadata
from hf_frmerge.merging.record.summary import ROUNDING_ANGLE
from hf_frmerge.wording.geometry import Geometry, gap_sentence
from hf_frmerge.wording.metrics import METRICS

MODEL_CARDS = Path(__file__).parents[3] / "model_cards"


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_examples_in_the_repository_are_what_the_code_renders(name: str):
    assert (MODEL_CARDS / f"{name}.md").read_text(encoding="utf-8") == render_card(EXAMPLES[name]()), (
        "The card changed. If that is wanted: python tests/hub/card_examples.py"
    )


def test_the_examples_have_the_figures_they_show():
    shown = {
        path for text in MODEL_CARDS.glob("*.md") for path in re.findall(r"\]\((figures/.*?)\)", text.read_text())
    }
    assert shown == {f"figures/{path.name}" for path in (MODEL_CARDS / "figures").iterdir()} != set()


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_front_matter_survives_the_round_trip(name: str, tmp_path: Path):
    card = EXAMPLES[name]()
    loaded = ModelCard.load(write_card(card, tmp_path))
    assert str(loaded) == (tmp_path / "README.md").read_text(encoding="utf-8").rstrip("\n") + "\n"
    assert loaded.data.to_dict() == yaml.safe_load(str(loaded).split("---")[1])
    assert {"merge", "hf-frmerge"} <= set(loaded.data.tags)


def test_full_model_is_a_merge_of_the_hub_ids_alone(tmp_path: Path):
    data = ModelCard.load(write_card(full(), tmp_path)).data
    assert data.base_model == ["ann/austen-135m", "ann/bible-135m"]
    assert data.base_model_relation == "merge"
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert data.language == ["en", "code"]
    assert data.datasets == ["ann/austen"]  # the local path of another is not a dataset id


def test_adapter_is_an_adapter_of_its_base(tmp_path: Path):
    data = ModelCard.load(write_card(adapter(), tmp_path)).data
    assert (data.base_model, data.base_model_relation, data.library_name) == (["meta/small-1b"], "adapter", "peft")


def test_mixed_merge_counts_the_base_and_inherits_the_warning_tag(tmp_path: Path):
    data = ModelCard.load(write_card(mixed(), tmp_path)).data
    assert data.base_model == ["org/german-encoder", "org/encoder"]
    assert "license" not in data.to_dict()
    assert "not-for-all-audiences" in data.tags
    assert "fisher-rao" not in data.tags


def test_model_index_holds_the_merged_model_s_own_numbers(tmp_path: Path):
    card = full()
    data = ModelCard.load(write_card(card, tmp_path)).data
    got = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    record = card.evaluation
    expected = {("all texts of the evaluation", "effective_rank"): 0.83}
    for score in record.scores:
        if score.model == "merged":
            expected[score.domain, "perplexity"] = score.metrics["perplexity"]
            expected[score.domain, "accuracy"] = score.metrics["token_accuracy"]
    for row in record.recovery:
        expected[row.domain, "recovery"] = row.share
    for row in record.objectives:
        expected[row.domain, "objective"] = row.value
        expected[row.domain, "to_barycentre"] = row.to_barycentre.mean
    for row in record.distances:
        if row.model == "merged":
            key = row.domain, "fisher_rao"
            expected[key] = max(expected.get(key, 0), row.fisher_rao.mean)
    assert {key: got[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert data.model_name == card.model_name
    assert ModelCard(str(ModelCard.load(tmp_path / "README.md"))).data.eval_results == data.eval_results


def test_numbers_that_are_not_finite_stay_out_of_the_model_index(tmp_path: Path):
    record = EvaluationRecord(scores=[Score("merged", "x", {"loss": math.nan, "f1": math.inf, "accuracy": 0.5})])
    path = write_card(replace(full(), evaluation=record), tmp_path)
    (result,) = ModelCard.load(path).data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.5)
    loss = METRICS["loss"]
    assert f"**{loss.heading}**. {loss.meaning}\n\n|  | x |" in path.read_text()  # but the reader sees it


def test_all_local_sources_leave_base_model_out(tmp_path: Path):
    card = MergeCard("m", "full", [CardSource("a", weight=0.5), CardSource("b", weight=0.5)])
    data = ModelCard.load(write_card(card, tmp_path)).data.to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data


def secret_evaluation(secret: str) -> EvaluationRecord:
    one, text = f"{secret}/experts/one", f"{secret}/data.txt"
    record = EvaluationRecord(models={one: "expert", "merged": "merged"}, weights={one: 1.0})
    record.scores = [Score(one, text, {"loss": 1.0}), Score("merged", text, {"loss": 2.0})]
    record.recovery = [Recovered("merged", one, text, 1.0, 0.5, 0.5)]
    record.distances = [replace(make_record().distances[0], other=one, domain=text)]
    record.objectives = [replace(make_record().objectives[0], domain=text)]
    record.worst_tokens = [replace(make_record().worst_tokens[0], expert=one, domain=text)]
    record.generations = [replace(make_record().generations[-1], domain=text)]
    record.commands = [f"lm_eval --model_args pretrained={secret}/out"]
    return record


def test_no_path_and_no_token_of_any_field_reaches_the_card():
    secret = "/home/ann/secret"
    private_licence = SourceMetadata("other", "x", f"{secret}/LICENSE")
    text = render_card(
        MergeCard(
            model_name=f"{secret}/out",
            output_kind="full",
            sources=[
                CardSource(f"{secret}/experts/one/", weight=0.5),
                CardSource("../../secret-lab/two", weight=0.5, metadata=private_licence),
                CardSource(f"{secret}/base", role="base"),
            ],
            non_default_arguments={
                "weight_rules": [f"{secret}/rules=1,0"],
                "hub_token": "hunter2",
                "other_token": "hunter3",
                "unknown": f"{secret}/x",
                "output_dir": f"{secret}/out",
            },
            command=f"frmerge merge {secret}/experts/one/ ../../secret-lab/two --output-dir {secret}/out",
            python=f'FisherRaoMerger(["{secret}/experts/one/"])',
            evaluation=secret_evaluation(secret),
            notes=[f"{secret}/base: the tokenizer differs."],
        )
    )
    assert "secret" not in text
    assert "/home" not in text
    assert "hunter" not in text
    assert "frmerge merge ./one ./two --output-dir ./out" in text


def test_user_section_survives_and_the_rest_is_new(tmp_path: Path):
    path = write_card(full(), tmp_path)
    mine = "My own words.\n\n{{ not a template }} | <b>kept</b>\n---\n## Even a heading"
    path.write_text(path.read_text().replace(USER_BEGIN + "\n\n", f"{USER_BEGIN}\n{mine}\n"))
    write_card(replace(full(), model_name="renamed"), tmp_path)
    text = path.read_text()
    assert f"{USER_BEGIN}\n{mine}\n{USER_END}" in text
    assert "# renamed" in text
    assert "# reader-135m" not in text
    again = write_card(replace(full(), model_name="renamed"), tmp_path).read_text()
    assert again == text  # stable from then on
    assert mine not in write_card(full(), tmp_path, keep_user_sections=False).read_text()


def test_a_readme_that_is_not_ours_is_set_aside_where_no_push_sees_it(tmp_path: Path):
    (tmp_path / "README.md").write_text("# Written by hand\n")
    write_card(adapter(), tmp_path)
    assert (tmp_path / "_README.previous.md").read_text() == "# Written by hand\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "_README.previous.md"]


def test_a_chosen_licence_overrules_the_rule():
    text = render_card(replace(mixed(), licence="cc-by-nc-sa-4.0"))
    assert ModelCard(text).data.license == "cc-by-nc-sa-4.0"


def test_a_licence_file_beside_a_source_becomes_a_link_to_it():
    own = SourceMetadata("other", "acme", "LICENSE.md")
    sources = [CardSource("o/a", "o/a", "c" * 40, metadata=own), CardSource("o/b", "o/b", "d" * 40, metadata=own)]
    decision = licence_of(MergeCard("m", "full", sources))
    assert decision.licence_link == f"https://huggingface.co/o/a/blob/{'c' * 40}/LICENSE.md"
    assert licence_of(MergeCard("m", "full", [CardSource("a", metadata=own)] * 2)).licence_link is None


def test_figures_are_shown_where_they_belong_and_only_those_there_are():
    text = render_card(full())
    headings = [line for line in text.splitlines() if line.startswith(("##", "!["))]
    assert [line.partition("](")[2].rstrip(")") for line in headings if line.startswith("![")] == [
        f"figures/{name}.png" for name in ("recovery", "distances", "layers", "angles", "coefficients")
    ]
    place = headings.index("## What the merge did to the weights")
    assert headings[place + 1].endswith("(figures/angles.png)")
    bare = render_card(replace(full(), figures={}))
    assert "![" not in bare and "figure" not in bare


def test_what_a_source_asks_to_be_cited_by_is_in_the_card():
    text = render_card(full())
    assert "  @misc{ann2026austen,\n    title  = {A small model that writes like Jane Austen}," in text
    assert "- [ann/bible-135m](https://huggingface.co/ann/bible-135m)\n" in text


def test_the_gap_to_the_simple_method_is_weighed_against_rounding():
    def sentence(gap: float, dtype: str) -> str:
        geometry = Geometry("karcher", "weights", dtype, angle_max=1.0, gap_max=gap)
        return render_card(replace(full(), statistics=CardStatistics(geometry=geometry)))

    assert "expect the same model from both" in sentence(1e-4, "BF16")
    assert "Only an evaluation of both can tell" in sentence(1e-4, "F32")
    assert "Only an evaluation of both can tell" in sentence(0.1, "BF16")


def test_an_angle_between_deltas_is_left_to_the_inspection():
    """Which knows the weights' norms, and may say of the same experts that both methods give one model."""
    for gap in (1e-9, 0.1):
        text = gap_sentence(gap, "deltas", "BF16")
        assert "expect the same model" not in text and "Only an evaluation" not in text
        assert "frmerge inspect says whether that is more than rounding" in text


@pytest.mark.parametrize(("dtype", "bits"), [("BF16", 8), ("F16", 11), ("F32", 24)])
def test_rounding_angle_is_that_of_gaussian_tensors(dtype: str, bits: int):
    x = np.random.default_rng(0).standard_normal(400_000)
    mantissa, exponent = np.frexp(x)
    rounded = np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits)
    u, v = x / np.linalg.norm(x), rounded / np.linalg.norm(rounded)
    measured = 2 * np.arcsin(np.linalg.norm(u - v) / 2)
    assert ROUNDING_ANGLE[dtype] == pytest.approx(measured, rel=0.1)


def test_unknown_methods_and_blocks_are_named_not_explained():
    text = render_card(replace(full(), method="some_new_way", block="expert", statistics=CardStatistics()))
    assert "by some new way" in text
    assert "some-new-way" in ModelCard(text).data.tags
    assert "fisher-rao" not in ModelCard(text).data.tags


def test_pipes_and_line_breaks_do_not_break_tables():
    sources = [CardSource("a|b\nc", weight=1.0, metadata=SourceMetadata("mit|x"))]
    text = render_card(MergeCard("m", "full", sources))
    assert r"| `a\|b⏎c` (a local folder) | 1 |" in text


def test_settings_of_the_card_are_those_that_make_the_model():
    """What only says where to run, what to measure or where to push is nobody's business."""
    shown = {"method": "linear", "beta": 0.5, "dtype": "float32", "allow_license": "cc-by-nd-4.0", "from_later": 1}
    hidden = {
        "num_workers": 3, "device": "cuda:1", "report_to": "wandb", "do_eval": True, "hub_model_id": "a/b",
        "hub_token": "secret", "per_device_eval_batch_size": 2, "output_dir": "x", "overwrite": True,
    }  # fmt: skip
    assert result_arguments(replace(full(), non_default_arguments={**shown, **hidden})) == shown
