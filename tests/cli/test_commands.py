"""Every command on tiny real checkpoints: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from hub_server import ALICE_TOKEN, HubServer
from hub_server.state import Collection
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_frmerge.wording import parts

Frmerge = Callable[..., Result]


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).state_dict()


def test_merge_writes_the_mean_and_says_what_it_did(frmerge: Frmerge, models, tmp_path: Path) -> None:
    result = frmerge(
        "merge", *models.experts, "--output-dir", tmp_path / "out", "--method", "linear", "--weights", "3,1"
    )
    assert result.exit_code == 0, result.stderr
    math_weights, code_weights, merged = (weights_of(x) for x in (models.math, models.code, tmp_path / "out"))
    for name, tensor in merged.items():
        expected = (0.75 * math_weights[name] + 0.25 * code_weights[name]).to(torch.bfloat16).double()
        assert torch.equal(tensor, expected), name
    assert f"{len(load_file(tmp_path / 'out' / 'merge_coefficients.safetensors'))} tensors merged" in result.stdout
    assert f"frmerge verify {tmp_path / 'out'}" in " ".join(result.stdout.split())  # a long path is wrapped
    assert "Merging" in result.stderr and "Merging" not in result.stdout
    assert (tmp_path / "out" / "README.md").is_file()


def test_merge_says_when_karcher_and_nre_are_the_same_model(frmerge: Frmerge, models, tmp_path: Path) -> None:
    apart = frmerge("merge", *models.experts, "--output-dir", tmp_path / "apart")
    assert "Only an evaluation of both can tell" in " ".join(apart.stdout.split())
    twins = frmerge("merge", models.math, models.math, "--output-dir", tmp_path / "twins")
    assert "expect the same model from both" in " ".join(twins.stdout.split())


def test_merge_json_is_the_report_and_nothing_else(frmerge: Frmerge, models, tmp_path: Path) -> None:
    result = frmerge("merge", *models.experts, "--output-dir", tmp_path / "out", "--json", "--disable-tqdm")
    report = json.loads(result.stdout)
    assert report["complete"] is True
    assert report["n_merged"] == len(load_file(tmp_path / "out" / "merge_coefficients.safetensors"))


def test_merge_of_adapters_is_an_adapter(frmerge: Frmerge, models, tmp_path: Path) -> None:
    result = frmerge(
        "merge", models.adapter, models.adapter_2, "--base-model", models.base, "--output-dir", tmp_path / "out"
    )
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert frmerge("verify", tmp_path / "out").exit_code == 0


def test_plan_reads_headers_and_writes_nothing(frmerge: Frmerge, models, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["plan", *models.experts, "--base-model", models.base, "--output-dir", output]
    plan = json.loads(frmerge(*arguments, "--json").stdout)
    sizes = [tensor.nbytes for tensor in load_bf16(models.math).values()]
    assert plan["output_bytes"] == sum(sizes) and plan["n_merge"] == len(sizes)
    assert [expert["spec"] for expert in plan["experts"]] == models.experts
    assert plan["base"]["spec"] == models.base
    assert frmerge(*arguments, "--memory-budget", "64MiB", "--num-workers", "1", "--device", "cpu").exit_code == 0
    assert not output.exists()
    for_people = frmerge(*arguments).stdout
    assert f"{len(sizes)} tensors to merge" in for_people and "model.safetensors" in for_people


def test_plan_shows_licences_and_refuses_those_without_derivatives(frmerge: Frmerge, models, tmp_path: Path) -> None:
    licensed = {"free": "apache-2.0", "closed": "cc-by-nd-4.0"}
    for name, licence in licensed.items():
        shutil.copytree(models.math, tmp_path / name)
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    free, closed = (str(tmp_path / name) for name in licensed)
    plan = json.loads(frmerge("plan", free, models.code, "--json").stdout)
    assert plan["licences"]["models"] == {free: "apache-2.0", models.code: None}
    assert plan["licences"]["output"] is None
    assert json.loads(frmerge("plan", free, free, "--json").stdout)["licences"]["output"] == "apache-2.0"
    assert "apache-2.0" in frmerge("plan", free, models.code).stdout
    refused = frmerge("plan", free, closed)
    assert refused.exit_code == 1 and "cc-by-nd-4.0" in refused.stderr
    assert frmerge("plan", free, closed, "--allow-license", "cc-by-nd-4.0").exit_code == 0


def test_plan_checks_the_prompts_that_a_merge_would_be_fitted_to(frmerge: Frmerge, models, tmp_path: Path) -> None:
    plan = ["plan", *models.experts, "--base-model", models.base, "--space", "deltas"]
    prompts = ["--calibration", models.text, "--max-calibration-length", "16"]
    checked = frmerge(*plan, *prompts)
    assert "Prompts and models were checked" in " ".join(checked.stdout.split()), checked.stderr
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused = frmerge(*plan, "--calibration", empty)
    assert refused.exit_code == 2 and "cannot be used" in refused.stderr
    refused = frmerge(*plan, "--calibration", models.text)  # one prompt of 128 tokens
    assert refused.exit_code == 2 and "four prompts" in " ".join(refused.stderr.split())
    for asking in (["--method", "regmean"], ["--refine", "5"], ["--fisher", "diagonal"]):
        without = frmerge(*plan, *asking)
        assert without.exit_code == 2 and "there are none" in " ".join(without.stderr.split()), asking
        assert frmerge(*plan, *asking, *prompts).exit_code == 0, asking
    for options, why in ((["--block", "layer"], "merged one by one"), (["--leave-out", "norm"], "it is not whole")):
        refused = frmerge(*plan, *prompts, *options)
        assert refused.exit_code == 2 and why in " ".join(refused.stderr.split()), options
    named = frmerge(*plan, "--calibration-rank", "4").stdout
    assert "`calibration_rank` changes nothing without prompts" in " ".join(named.split())


def load_bf16(folder: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file as load_torch

    return load_torch(Path(folder) / "model.safetensors")


def test_inspect_measures_angles(frmerge: Frmerge, models) -> None:
    arguments = ["inspect", *models.experts, "--base-model", models.base]
    actual = json.loads(frmerge(*arguments, "--json").stdout)
    first, second, base = (load_bf16(folder) for folder in (models.math, models.code, models.base))
    for row in actual["tensors"]:
        x, y, zero = (tensors[row["name"]].double().numpy() for tensors in (first, second, base))
        for space, (a, b) in {"weights": (x, y), "deltas": (x - zero, y - zero)}.items():
            cosine = np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
            assert row[space]["max_angle"] == pytest.approx(math.acos(cosine), abs=1e-6), (row["name"], space)
            assert row[space]["norms"] == pytest.approx([np.linalg.norm(a), np.linalg.norm(b)], rel=1e-6)
    table = frmerge(*arguments).stdout
    assert actual["verdict"] in " ".join(table.split())
    assert "12 of" in table and "12 of" not in frmerge(*arguments, "--all").stdout


def test_inspect_does_not_mind_an_output_folder(frmerge: Frmerge, models, tmp_path: Path, monkeypatch) -> None:
    """`merged` is the default output folder, and may well be one of the models to look at."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merged").symlink_to(models.math)
    assert frmerge("inspect", "merged", models.code).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_evaluate_compares_and_adds_to_the_card(frmerge: Frmerge, models, tmp_path: Path) -> None:
    output = tmp_path / "out"
    frmerge("merge", *models.experts, "--output-dir", output)
    arguments = ["evaluate", output, "--experts", models.math, "--experts", models.adapter]
    arguments += ["--base-model", models.base, "--data", models.text, "--data", f"math={models.text}"]
    result = json.loads(frmerge(*arguments, "--json", "--card").stdout)
    by_model = {score["model"]: score["metrics"] for score in result["scores"] if score["domain"] == "math"}
    assert list(by_model) == ["base", "math", "adapter", "merged"]

    tokenizer = AutoTokenizer.from_pretrained(models.base)
    tokens = torch.tensor([tokenizer(Path(models.text).read_text())["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(output)  # its own loss, over one block, is the reference
    assert by_model["merged"]["loss"] == pytest.approx(model(tokens, labels=tokens).loss.item(), abs=1e-3)

    recovered = {row["expert"]: row for row in result["recovery"]}
    assert recovered["math"]["domain"] == "math", "a text named like an expert is its own"
    kept = by_model["base"]["loss"] - by_model["merged"]["loss"]
    assert recovered["math"]["kept"] == pytest.approx(kept, abs=1e-12)

    card = (output / "README.md").read_text()
    assert f"{by_model['adapter']['perplexity']:,.2f}" in card and "adapter" in card
    table = frmerge(*arguments).stdout
    assert f"{by_model['base']['perplexity']:,.2f}" in table
    for part in (parts.RECOVERY, parts.DISTANCES, parts.OBJECTIVES, parts.LAYERS, parts.WORST_TOKENS):
        assert part.title in table
    assert frmerge("card", output).exit_code == 0
    assert (output / "README.md").read_text() == card, "writing the card again keeps the scores"


def test_evaluate_knows_what_a_merge_was_made_of(frmerge: Frmerge, models, tmp_path: Path) -> None:
    output = tmp_path / "out"
    frmerge("merge", *models.experts, "--output-dir", output, "--weights", "3,1", "--base-model", models.base)
    actual = json.loads(
        frmerge("evaluate", output, "--data", models.text, "--json", "--exact", "--no-generate").stdout
    )
    assert actual["models"] == {"base": "base", "math": "expert", "code": "expert", "merged": "merged"}
    assert actual["weights"] == {"math": 0.75, "code": 0.25}
    assert actual["settings"]["top_k"] == 0 and actual["generations"] == []
    mine = [d for d in actual["distances"] if d["model"] == "merged" and d["other"] != "base"]
    squared = {d["other"]: d["mean_squared"] for d in mine}
    [goal] = actual["objectives"]
    assert goal["value"] == pytest.approx(0.75 * squared["math"] + 0.25 * squared["code"], rel=1e-9)
    assert json.loads((output / "merge_evaluation.json").read_text())["objectives"] == [goal]

    (output / ".frmerge_sources.json").unlink()
    lost = frmerge("evaluate", output, "--data", models.text)
    assert lost.exit_code == 2 and "give --experts" in lost.stderr
    moved = ["--experts", models.math, "--experts", models.code, "--base-model", models.base]
    again = json.loads(frmerge("evaluate", output, *moved, "--data", models.text, "--json", "--no-cache").stdout)
    assert again["weights"] == actual["weights"]
    others = ["--experts", models.code, "--experts", models.math, "--base-model", models.base]
    assert json.loads(frmerge("evaluate", output, *others, "--data", models.text, "--json").stdout)["weights"] == {
        "code": 0.5, "math": 0.5,
    }  # fmt: skip


def test_evaluate_fails_on_what_is_out_of_bounds(frmerge: Frmerge, models, tmp_path: Path) -> None:
    output = tmp_path / "out"
    frmerge("merge", *models.experts, "--output-dir", output)
    arguments = ["evaluate", output, "--data", f"prose={models.text}"]
    fine = frmerge(*arguments, "--fail-on", "effective_rank<0.001", "--fail-on", "perplexity>1e9", "--json")
    assert fine.exit_code == 0 and fine.stderr.count("Failed") == 0
    record = json.loads(fine.stdout)
    bad = frmerge(
        *arguments, "--fail-on", "effective_rank<7", "--fail-on", "perplexity>1", "--fail-on", "norm_ratio<9"
    )
    assert bad.exit_code == 1
    [score] = [s for s in record["scores"] if s["model"] == "merged"]
    assert f"prose_perplexity is {score['metrics']['perplexity']:.4g} (prose), and perplexity>1 fails" in bad.stderr
    ratios = {layer: merged / sum(rest) * len(rest) for layer, merged, rest in layers(record)}
    worst = min(ratios, key=ratios.__getitem__)
    assert f"effective_rank is {ratios[worst]:.4g} (layer {worst}), and effective_rank<7 fails" in bad.stderr
    assert "norm_ratio is 1 (" in bad.stderr and "Perplexity" in bad.stdout
    unknown = frmerge(*arguments, "--fail-on", "effective_rnk<0.9")
    assert unknown.exit_code == 2 and "was not measured. There are: prose_loss, " in unknown.stderr
    malformed = frmerge(*arguments, "--fail-on", "effective_rank=0.9")
    assert malformed.exit_code == 2 and "NAME<VALUE" in malformed.stderr


def layers(record: dict) -> list[tuple[int, float, list[float]]]:
    """Effective rank of every layer: of the merged model, and of the experts."""
    by_layer: dict[int, dict[str, float]] = {}
    for row in record["layers"]:
        by_layer.setdefault(row["layer"], {})[row["model"]] = row["effective_rank"]
    return [(layer, ranks["merged"], [ranks["math"], ranks["code"]]) for layer, ranks in by_layer.items()]


def test_evaluate_reads_adapters_on_the_base_they_name(frmerge: Frmerge, models) -> None:
    actual = json.loads(frmerge("evaluate", models.adapter, "--data", models.text, "--json").stdout)
    assert list(actual["models"]) == ["merged"] and actual["scores"][0]["metrics"]["loss"] > 0


def test_evaluate_runs_tasks_of_the_harness(frmerge: Frmerge, models, tmp_path: Path) -> None:
    missing = frmerge("evaluate", models.math, "--lm-eval", tmp_path / "none.yaml")
    assert missing.exit_code == 2 and "none.yaml" in missing.stderr


def test_evaluate_refuses_what_it_cannot_do(frmerge: Frmerge, models, tmp_path: Path) -> None:
    same = frmerge("evaluate", models.math, "--data", models.text, "--data", models.text)
    assert same.exit_code == 2 and "NAME=FILE" in same.stderr
    missing = frmerge("evaluate", models.math, "--data", tmp_path / "none.txt")
    assert missing.exit_code == 2 and "none.txt" in missing.stderr
    nothing = frmerge("evaluate", models.math)
    assert nothing.exit_code == 2 and "--lm-eval" in nothing.stderr
    no_merge = frmerge("evaluate", models.math, "--data", models.text, "--card")
    assert no_merge.exit_code == 2 and "no folder that `frmerge merge` wrote" in no_merge.stderr


def test_verify_finds_a_flipped_bit(frmerge: Frmerge, models, tmp_path: Path) -> None:
    output = tmp_path / "out"
    frmerge("merge", *models.experts, "--output-dir", output)
    good = json.loads(frmerge("verify", output, "--json").stdout)
    assert good["ok"] is True and good["problems"] == []
    weights = bytearray((output / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (output / "model.safetensors").write_bytes(weights)
    bad = frmerge("verify", output)
    assert bad.exit_code == 1
    assert "1 problem" in bad.stdout and "1 elements" in bad.stdout


def test_verify_can_be_told_where_the_experts_went(frmerge: Frmerge, models, tmp_path: Path) -> None:
    output = tmp_path / "out"
    frmerge("merge", *models.experts, "--output-dir", output)
    (output / ".frmerge_sources.json").unlink()
    lost = frmerge("verify", output)
    assert lost.exit_code == 1 and "--experts" in lost.stderr
    assert frmerge("verify", output, "--experts", models.math, "--experts", models.code).exit_code == 0
    swapped = frmerge("verify", output, "--experts", models.code, "--experts", models.math, "--json")
    assert swapped.exit_code == 1 and json.loads(swapped.stdout)["ok"] is False


def test_push_says_where_it_went(frmerge: Frmerge, models, hub: HubServer, tmp_path: Path) -> None:
    output = tmp_path / "reader"
    frmerge("merge", *models.experts, "--output-dir", output)
    refused = frmerge("push", output, "alice/reader", "--token", "hf_unknown")
    assert refused.exit_code == 1 and "log" in refused.stderr and "hf_unknown" not in refused.stderr
    done = frmerge("push", output, "alice/reader", "--private", "--token", ALICE_TOKEN, "--message", "Two experts")
    assert done.exit_code == 0, done.stderr
    assert "alice/reader" in done.stdout
    repo = hub.repos["models", "alice/reader"]
    assert repo.private and [commit.title for commit in repo.commits.values()][-1] == "Two experts"


def test_merge_can_push_at_once(frmerge: Frmerge, models, hub: HubServer, tmp_path: Path) -> None:
    collection = hub.collections["alice/merges-1"] = Collection("alice/merges-1")
    options = ["--push-to-hub", "--hub-model-id", "alice/at-once", "--hub-token", ALICE_TOKEN, "--json"]
    options += ["--hub-collection", "alice/merges-1"]
    done = frmerge("merge", *models.experts, "--output-dir", tmp_path / "out", *options)
    assert done.exit_code == 0, done.stderr
    assert ALICE_TOKEN not in done.stdout + done.stderr
    assert ("models", "alice/at-once") in hub.repos
    assert collection.items == [{"id": "alice/at-once", "type": "model"}]


def test_extract_lora_gives_back_what_was_put_in(frmerge: Frmerge, models, tmp_path: Path) -> None:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(models.base, dtype=torch.float32)
    full = PeftModel.from_pretrained(base, models.adapter).merge_and_unload()
    full.save_pretrained(tmp_path / "full")
    arguments = ["extract-lora", tmp_path / "full", "--base-model", models.base, "--rank", "2"]
    result = json.loads(frmerge(*arguments, "--output-dir", tmp_path / "lora", "--json").stdout)
    assert {module["rank"] for module in result["modules"]} == {2}
    assert result["error"] < 1e-5
    again = AutoModelForCausalLM.from_pretrained(models.base, dtype=torch.float32)
    again = PeftModel.from_pretrained(again, str(tmp_path / "lora")).merge_and_unload()
    for name, tensor in full.state_dict().items():
        assert torch.allclose(again.state_dict()[name], tensor, atol=1e-5), name
    for_people = frmerge(*arguments, "--output-dir", tmp_path / "lora2").stdout
    assert "modules of rank 2 to 2" in for_people
    in_use = frmerge(*arguments, "--output-dir", tmp_path / "lora")
    assert in_use.exit_code == 2 and "--overwrite" in in_use.stderr
    assert frmerge(*arguments, "--output-dir", tmp_path / "lora", "--overwrite").exit_code == 0
    refused = frmerge("extract-lora", models.adapter, "--base-model", models.base, "--output-dir", tmp_path / "x")
    assert refused.exit_code == 2 and "adapter already" in refused.stderr
