"""Cards of real merges: made from the folder alone, pushed, pulled, checked, and merged again from the Hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from evaluation_records import make_record
from hub_server import ALICE_TOKEN, HubServer
from huggingface_hub import ModelCard, snapshot_download
from merge_reference import write_family
from safetensors.numpy import load_file

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.errors import CheckpointError, HubError, MergeError
from hf_frmerge.evaluation.record import EvaluationRecord, Score, save_record
from hf_frmerge.hub.card.card import render_card, write_card
from hf_frmerge.hub.card.describe import card_of_folder, describe_merge
from hf_frmerge.hub.push import push_folder
from hf_frmerge.merging.record.manifest import REPORT_FILE
from hf_frmerge.provenance.verify import verify
from hf_frmerge.report.figures import save_figures


def upload(hub: HubServer, repo_id: str, folder: str, front_matter: str) -> None:
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    hub.add_repo(repo_id, {**files, "README.md": f"---\n{front_matter}\n---\n# {repo_id}\n".encode()})


@pytest.fixture
def merged(hub: HubServer, tmp_path: Path) -> Path:
    """Merge of two experts from the Hub and a local one, in delta space."""
    base, experts = write_family(tmp_path / "family", n=3)
    upload(hub, "lab/base", base, "license: mit\nlanguage: en")
    upload(hub, "lab/maths", experts[0], "license: mit\nlanguage: en\ndatasets: lab/sums")
    upload(hub, "lab/code", experts[1], "license: mit\nlanguage: [en, code]")
    Path(experts[2], "README.md").write_text("---\nlicense: mit\n---\n")
    output = tmp_path / "merged"
    FisherRaoMerger(
        ["lab/maths", "lab/code@main", experts[2]],
        MergingArguments(output_dir=str(output), space="deltas", disable_tqdm=True),
        weights=[0.5, 0.3, 0.2],
        base_model="lab/base",
    ).merge()
    return output


def test_card_says_what_the_manifest_knows(hub: HubServer, merged: Path, tmp_path: Path):
    card = card_of_folder(merged, hub_model_id="alice/three")
    heads = {name: repo.branches["main"] for (_, name), repo in hub.repos.items()}
    assert [(s.name, s.commit, s.weight, s.role) for s in card.sources] == [
        ("lab/maths", heads["lab/maths"], 0.5, "expert"),
        ("lab/code", heads["lab/code"], 0.3, "expert"),
        ("e2", None, 0.2, "expert"),
        ("lab/base", heads["lab/base"], None, "base"),
    ]
    text = render_card(card)
    data = ModelCard(text).data
    assert data.base_model == ["lab/maths", "lab/code", "lab/base"]
    assert (data.license, data.language, data.datasets) == ("mit", ["en", "code"], ["lab/sums"])
    assert str(tmp_path) not in text
    assert "`space` | `deltas`" in text
    assert "`output_dir`" not in text


def test_statistics_are_those_of_the_files(merged: Path, tmp_path: Path):
    """Angles and norms of the card against plain float64 numpy on the experts' own files."""
    family = tmp_path / "family"
    base = load_file(family / "base" / "model.safetensors")
    experts = [load_file(family / f"e{i}" / "model.safetensors") for i in range(3)]
    largest, kept = [], []
    for name, origin in base.items():
        deltas = [expert[name].astype(np.float64).ravel() - origin.astype(np.float64).ravel() for expert in experts]
        norms = [np.linalg.norm(delta) for delta in deltas]
        angles = [np.arccos(deltas[i] @ deltas[j] / norms[i] / norms[j]) for i in range(3) for j in range(i + 1, 3)]
        largest.append(max(angles))
        weights = [0.5, 0.3, 0.2]
        average = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
        kept.append(np.linalg.norm(average) / np.average(norms, weights=weights))
    statistics = card_of_folder(merged).statistics
    geometry = statistics.geometry
    assert geometry is not None
    assert geometry.angle_median == pytest.approx(np.median(largest), rel=1e-6)
    assert geometry.angle_max == pytest.approx(max(largest), rel=1e-6)
    assert geometry.linear_norm_ratio_min == pytest.approx(min(kept), rel=1e-6)
    assert geometry.linear_norm_ratio_median == pytest.approx(np.median(kept), rel=1e-6)
    assert geometry.norm_ratio_min == pytest.approx(1.0, rel=1e-6)
    assert statistics.n_tensors_merged == len(base)
    assert statistics.n_parameters == sum(tensor.size for tensor in base.values())
    assert geometry.dtype == "F32"


def test_from_the_hub_to_the_hub_and_back(hub: HubServer, merged: Path, tmp_path: Path):
    write_card(card_of_folder(merged, hub_model_id="alice/three"), merged)
    info = push_folder(merged, repo_id="alice/three", token=ALICE_TOKEN, revision="v1")
    assert all(str(tmp_path).encode() not in request.body for request in hub.requests)
    source = resolve("alice/three@v1")
    assert (source.kind, source.commit) == ("full", info.oid)
    family = [str(tmp_path / "family" / f"e{i}") for i in range(3)]
    copy = snapshot_download("alice/three", revision="v1", local_dir=tmp_path / "copy", token=False)
    report = verify(copy, experts=family, base_model=str(tmp_path / "family" / "base"))
    assert report.problems == []
    assert report.checked_tensors == 8


def test_merger_pushes_with_one_call(hub: HubServer, tmp_path: Path):
    _, experts = write_family(tmp_path / "family", n=2)
    args = MergingArguments(output_dir=str(tmp_path / "out"), disable_tqdm=True, hub_token=ALICE_TOKEN)
    merger = FisherRaoMerger(experts, args).merge()
    info = merger.push_to_hub("alice/one-call")
    assert info is not None
    assert hub.repos["models", "alice/one-call"].branches["main"] == info.oid
    bodies = b"".join(request.body for request in hub.requests)
    assert ALICE_TOKEN.encode() not in bodies
    assert str(tmp_path).encode() not in bodies


def test_writing_the_card_again_keeps_the_evaluation_of_this_merge_only(merged: Path):
    score = Score("merged", "sums", {"perplexity": 4.25}, 100)
    save_record(merged, EvaluationRecord(scores=[score]))
    first = write_card(card_of_folder(merged), merged).read_text()
    assert "4.25" in first and "Not measured" not in first
    assert write_card(card_of_folder(merged), merged).read_text() == first
    assert card_of_folder(merged).evaluation == EvaluationRecord(scores=[score])
    table = merged / "merge_coefficients.safetensors"
    table.write_bytes(table.read_bytes() + b" ")  # another merge took its place
    assert card_of_folder(merged).evaluation is None


def test_a_local_path_in_the_evaluation_is_not_pushed(hub: HubServer, merged: Path, tmp_path: Path):
    save_record(merged, EvaluationRecord(scores=[Score(str(tmp_path / "family" / "e2"), "x", {"loss": 1.0})]))
    with pytest.raises(HubError, match="merge_evaluation"):
        push_folder(merged, repo_id="alice/x", token=ALICE_TOKEN)


def test_without_the_local_sources_nothing_is_claimed(merged: Path):
    (merged / ".frmerge_sources.json").unlink()
    card = card_of_folder(merged)
    assert "license" not in ModelCard(render_card(card)).data.to_dict()


def test_folder_without_a_merge(tmp_path: Path):
    with pytest.raises(CheckpointError, match="merge_manifest"):
        card_of_folder(tmp_path)


def test_settings_of_the_card_are_those_that_differ(merged: Path):
    manifest = json.loads((merged / "merge_manifest.json").read_text())
    assert manifest["arguments"]["tol"] == 1e-12
    settings = re.findall(r"^\| `(\w+)` \|", render_card(card_of_folder(merged)), re.MULTILINE)
    assert settings == ["space"]


def test_two_adapters_become_an_adapter_that_is_pushed_and_loaded(hub: HubServer, tmp_path: Path):
    import torch
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    upload(hub, "lab/base", str(tmp_path / "base"), "license: mit")
    adapters = []
    for name in ("one", "two"):
        lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(LlamaForCausalLM.from_pretrained("lab/base", token=False), lora)
        model.save_pretrained(tmp_path / name)
        upload(hub, f"lab/{name}", str(tmp_path / name), "license: mit")
        adapters.append(f"lab/{name}")
    output = tmp_path / "out"
    args = MergingArguments(output_dir=str(output), disable_tqdm=True, adapter_output="adapter")
    FisherRaoMerger(adapters, args, base_model="lab/base").merge()
    card = card_of_folder(output, hub_model_id="alice/both")
    text = write_card(card, output).read_text()
    push_folder(output, repo_id="alice/both", token=ALICE_TOKEN)
    data = ModelCard.load("alice/both", token=False).data
    assert (data.base_model, data.base_model_relation, data.library_name) == (["lab/base"], "adapter", "peft")
    assert (data.pipeline_tag, data.license) == ("text-generation", "mit")
    assert "one LoRA adapter made out of 2" in text
    loaded = AutoPeftModelForCausalLM.from_pretrained("alice/both", token=False)
    assert any("lora_A" in name for name, _ in loaded.named_parameters())


def test_figures_are_drawn_beside_the_card_and_pushed_with_it(hub: HubServer, merged: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    save_record(merged, make_record())
    described = describe_merge(merged, draw=save_figures, hub_model_id="alice/three").read_text()
    drawn = sorted(path.name for path in (merged / "figures").iterdir())
    assert drawn == ["angles.png", "coefficients.png", "distances.png", "layers.png", "recovery.png"]
    shown = re.findall(r"!\[[^]]+\]\((.*?)\)", described)
    assert sorted(shown) == [f"figures/{name}" for name in drawn]
    push_folder(merged, repo_id="alice/three", token=ALICE_TOKEN)
    copy = Path(snapshot_download("alice/three", local_dir=tmp_path / "copy", token=False))
    assert all((copy / path).read_bytes() == (merged / path).read_bytes() for path in shown)
    # The same again is the same to the byte, or every push would be another commit.
    before = {path: (merged / path).read_bytes() for path in shown}
    assert describe_merge(merged, draw=save_figures, hub_model_id="alice/three").read_text() == described
    assert {path: (merged / path).read_bytes() for path in shown} == before
    # Of what is no longer measured no figure is left behind.
    (merged / "merge_evaluation.json").unlink()
    describe_merge(merged, draw=save_figures)
    assert sorted(path.name for path in (merged / "figures").iterdir()) == ["angles.png", "coefficients.png"]
    (merged / "figures" / "mine.png").write_bytes(b"png")
    assert "![" not in describe_merge(merged).read_text()
    assert [path.name for path in (merged / "figures").iterdir()] == ["mine.png"]


def test_licences_without_derivatives_need_permission_by_name(tmp_path: Path):
    _, experts = write_family(tmp_path / "family", n=2)
    for expert in experts:
        Path(expert, "README.md").write_text("---\nlicense: cc-by-nd-4.0\n---\n")
    args = MergingArguments(output_dir=str(tmp_path / "out"), disable_tqdm=True)
    with pytest.raises(MergeError, match=r"--allow-license cc-by-nd-4\.0"):
        FisherRaoMerger(experts, args).merge()
    assert not (tmp_path / "out").exists()
    args.allow_license = "cc-by-nd-4.0"
    FisherRaoMerger(experts, args).merge()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "cc-by-nd-4.0"
    assert "`cc-by-nd-4.0` (e0 and e1) does not allow derived works such as this merge" in card.text
    assert "states to have permission" in card.text


def test_a_page_with_everything_is_linked_while_it_is_current(merged: Path):
    assert card_of_folder(merged).report_file is None
    page = merged / REPORT_FILE  # where `frmerge report` writes it
    page.write_text("<!doctype html>")
    assert "[merge_report.html](merge_report.html)" in render_card(card_of_folder(merged))
    save_record(merged, make_record())
    os.utime(page, ns=(1, 1))
    assert card_of_folder(merged).report_file is None
