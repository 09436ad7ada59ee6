"""`verify` finds every kind of damage to a merge, and says which file, tensor or model it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_reference import SHAPES, random_model, write_family, write_model
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning import blocks
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE
from hf_frmerge.merging.record.find_models import find_models
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance.plan_again import plan_again
from hf_frmerge.provenance.verify import verify

HEAD = "lm_head.weight"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 300)  # several pieces a tensor, the last one shorter


def merge(folder: Path, experts: list[str], base: str | None = None, **options: Any) -> Path:
    args = MergingArguments(output_dir=str(folder / "out"), **options)
    run_merge(build_plan(experts, args, None, base), StepObserver(), Processes())
    return folder / "out"


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A merge of `e0`, `e1` and `e2`, bfloat16, in one file."""
    _, experts = write_family(tmp_path, dtype=torch.bfloat16)
    return merge(tmp_path, experts)


def flip_bit(file: Path, tensor: str, element: int) -> None:
    """Flip the lowest bit of one element."""
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])[tensor]
    data[8 + length + entry["data_offsets"][0] + element * {"BF16": 2, "F32": 4}[entry["dtype"]]] ^= 1
    file.write_bytes(data)


def problems(folder: Path, **where: Any) -> list[str]:
    report = verify(str(folder), **where)
    assert report.ok is (not report.problems)
    return report.problems


def test_a_record_with_arguments_that_are_gone_is_still_checked(merged: Path) -> None:
    path = merged / "merge_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["arguments"] |= {"seed": 42, "hub_strategy": "end", "metric_for_best_model": None}
    path.write_text(json.dumps(manifest))
    assert problems(merged) == []
    manifest["arguments"]["heat"] = 1.0  # of a later version: it may have changed the result
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"arguments that this version does not know: heat\."):
        verify(str(merged))


@pytest.mark.parametrize("block", ["tensor", "row", "head", "layer", "model"])
@pytest.mark.parametrize("space", ["weights", "deltas"])
def test_every_block_size_and_space_is_derived_again(tmp_path: Path, block: str, space: str) -> None:
    base, experts = write_family(tmp_path, dtype=torch.bfloat16)
    report = verify(str(merge(tmp_path, experts, base, block=block, space=space)))
    assert report.problems == []
    assert report.checked_tensors == len(SHAPES)
    assert report.checked_files == 3  # weights, config, coefficients


def test_mixed_dtypes_shards_integers_and_another_output_dtype(tmp_path: Path) -> None:
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    extra = {"position_ids": torch.arange(7), "empty": torch.zeros(0, 4), "flags": torch.tensor([True, False])}
    experts = [write_model(tmp_path / f"e{i}", random_model(i, dtype) | extra) for i, dtype in enumerate(dtypes)]
    out = merge(tmp_path, experts, dtype="float16", max_shard_size="4KB")
    shards = sorted(path.name for path in out.glob("model-*.safetensors"))
    assert len(shards) > 2
    report = verify(str(out))
    assert report.problems == []
    assert report.checked_tensors == len(SHAPES) + 3
    (out / shards[1]).unlink()
    actual = problems(out)
    assert f"File {shards[1]} is missing." in actual
    assert any(repr(shards[1]) in problem and "not in the folder" in problem for problem in actual[1:])


@pytest.mark.parametrize("element", [0, 299, 300, 48 * 24 - 1])
def test_one_flipped_bit(merged: Path, element: int) -> None:
    flip_bit(merged / "model.safetensors", HEAD, element)
    (problem,) = problems(merged)
    assert problem == f"Tensor {HEAD!r} differs from what its experts and coefficients give in 1 elements."


def test_a_changed_expert_is_named(merged: Path) -> None:
    expert = merged.parent / "e1"
    tensors = load_file(expert / "model.safetensors")
    tensors[HEAD][3, :] += 1
    write_model(expert, tensors)
    (problem,) = problems(merged)
    assert f"Tensor {HEAD!r} differs" in problem
    assert problem.endswith(f"it was changed in expert {str(expert)!r} after the merge.")


def test_a_changed_base_is_named(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    out = merge(tmp_path, experts, base, space="deltas")
    tensors = load_file(Path(base) / "model.safetensors")
    tensors[HEAD] *= 1.5
    # At wide angles coefficients on deltas do not sum to 1, so some of the base is in the merge.
    write_model(Path(base), tensors)
    (problem,) = problems(out)
    assert f"changed in base model {base!r} after the merge" in problem


def edit_config(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 49}))
    return "File config.json was changed after the merge."


def lengthen_config(folder: Path) -> str:
    path = folder / "config.json"
    size = path.stat().st_size
    path.write_text(path.read_text() + "  ")
    return f"File config.json has {size + 2} bytes, {size} were written."


def remove_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "File config.json is missing."


def edit_coefficients(folder: Path) -> str:
    table = {name: array.copy() for name, array in load_numpy(folder / COEFFICIENTS_FILE).items()}
    table[HEAD][0, 0] *= 1.1
    save_numpy(table, folder / COEFFICIENTS_FILE, metadata={"space": "weights"})
    return f"File {COEFFICIENTS_FILE} was changed after the merge."


def edit_header(folder: Path) -> str:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"format":"pt"', b'"format":"tf"', 1))
    assert path.read_bytes() != data
    return "The header of model.safetensors was changed after the merge."


def remove_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "File model.safetensors is missing."


def truncate_weights(folder: Path) -> str:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    return f"File model.safetensors has {size - 10} bytes, {size} were written."


def remove_coefficients(folder: Path) -> str:
    (folder / COEFFICIENTS_FILE).unlink()
    return f"File {COEFFICIENTS_FILE} is missing."


def tear_coefficients(folder: Path) -> str:
    path = folder / COEFFICIENTS_FILE
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-8])
    return f"File {COEFFICIENTS_FILE} has {size - 8} bytes, {size} were written."


DAMAGE = [
    edit_config,
    lengthen_config,
    remove_config,
    edit_coefficients,
    edit_header,
    remove_weights,
    truncate_weights,
    remove_coefficients,
    tear_coefficients,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=[d.__name__ for d in DAMAGE])
def test_damaged_files_are_named(merged: Path, damage: Callable[[Path], str]) -> None:
    sentence = damage(merged)
    assert sentence in problems(merged)


def test_edited_coefficients_are_seen_in_the_tensor_too(merged: Path) -> None:
    edit_coefficients(merged)
    tensor = [problem for problem in problems(merged) if HEAD in problem]
    assert len(tensor) == 1 and "differs" in tensor[0] and "changed in" not in tensor[0]


@pytest.mark.parametrize("change", ["removed", "too many"])
def test_coefficients_that_do_not_fit(merged: Path, change: str) -> None:
    table = dict(load_numpy(merged / COEFFICIENTS_FILE))
    if change == "removed":
        del table[HEAD]
    else:
        table[HEAD] = np.ones((1, 4))
    save_numpy(table, merged / COEFFICIENTS_FILE)
    assert any(
        f"Tensor {HEAD!r} was merged, but the record has no coefficients that fit it" in problem
        for problem in problems(merged)
    )


def test_tensors_added_or_taken_away(merged: Path) -> None:
    tensors = load_file(merged / "model.safetensors")
    config = (merged / "config.json").read_bytes()
    write_model(merged, {name: t for name, t in tensors.items() if name != HEAD} | {"new": torch.zeros(2)})
    (merged / "config.json").write_bytes(config)
    actual = problems(merged)
    assert f"Tensor {HEAD!r} is missing in the merged model." in actual
    assert "Tensor 'new' is in the merged model, but its experts have none." in actual
    write_model(merged, tensors | {HEAD: tensors[HEAD].float()})
    (merged / "config.json").write_bytes(config)
    assert f"Tensor {HEAD!r} is F32 [48, 24], expected BF16 [48, 24]." in problems(merged)


def test_experts_that_moved_are_found_where_they_are_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    base, experts = write_family(tmp_path / "old")
    out = merge(tmp_path, experts, base, space="deltas")
    shutil.move(tmp_path / "old", tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"old"):
        verify(str(out))
    moved = [str(tmp_path / "new" / Path(expert).name) for expert in experts]
    new_base = str(tmp_path / "new" / "base")
    assert problems(out, experts=moved, base_model=new_base) == []
    swapped = problems(out, experts=[moved[1], moved[0], moved[2]], base_model=new_base)
    assert len(swapped) == len(SHAPES)
    assert all("changed in" in p and "e0" in p and "e1" in p and "e2" not in p for p in swapped)
    with pytest.raises(CheckpointError, match=r"had 3 experts, but 2 were given"):
        verify(str(out), experts=moved[:2])

    (out / ".frmerge_sources.json").unlink()  # as in a copy on another machine
    with pytest.raises(CheckpointError, match=r"not known on this machine: e0, e1, e2, base.*--experts"):
        verify(str(out))
    assert problems(out, experts=moved, base_model=new_base) == []


def test_a_folder_without_a_merge_and_one_of_a_later_format(merged: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no merge_manifest.json"):
        verify(str(merged.parent / "e0"))
    with pytest.raises(CheckpointError, match=r"no folder"):
        verify(str(merged.parent / "nowhere"))
    manifest = json.loads((merged / "merge_manifest.json").read_text())
    (merged / "merge_manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(CheckpointError, match=r"has format 99, this version reads 2"):
        verify(str(merged))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    LlamaForCausalLM(config).save_pretrained(root / "base")
    for seed in range(2):
        torch.manual_seed(seed)
        lora = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(LlamaForCausalLM.from_pretrained(root / "base"), lora).save_pretrained(root / f"a{seed}")
    return root


@pytest.mark.parametrize("options", [{}, {"adapter_rank": 2}], ids=["exact", "recompressed"])
def test_an_adapter_is_merged_again_and_compared(adapters: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    experts = [str(adapters / "a0"), str(adapters / "a1")]
    out = merge(tmp_path, experts, **options)
    report = verify(str(out))
    assert report.problems == []
    assert report.checked_tensors == 2 * 2 * 2  # factors, modules, layers
    file = out / "adapter_model.safetensors"
    name = next(iter(load_file(file)))
    whole = file.read_bytes()
    flip_bit(file, name, 5)
    assert problems(out) == [
        "File adapter_model.safetensors was changed after the merge.",
        f"Tensor {name!r} differs from what its experts and options give.",
    ]
    file.write_bytes(whole)
    (out / "adapter_config.json").unlink()
    assert problems(out) == ["File adapter_config.json is missing."]
    file.unlink()
    assert "File adapter_model.safetensors is missing." in problems(out)


@pytest.mark.parametrize("where", ["files", "experts"])
@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", ""])
def test_a_record_that_names_files_outside_of_its_folders_is_refused(merged: Path, where: str, name: str) -> None:
    (merged.parent / "secret").write_text("secret")
    file = merged / "merge_manifest.json"
    values = json.loads(file.read_text())
    holder = values if where == "files" else values["experts"][0]
    holder["files"][name] = {"size": 6, "sha256": None}
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="is not the name of a file in its folder"):
        verify(str(merged), sha256=True)
    assert json.loads(file.read_text()) == values  # and no hash of the file was recorded


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("tensors", HEAD, "shape"), ["48", 24], "shape of a RecordedTensor"),
        (("tensors", HEAD, "geometry", "norms"), [1.0], "geometry of 'lm_head.weight' is not of 3 experts"),
        (("files",), [], "AttributeError"),
        (("experts",), [], "0 experts"),
        (("experts", 0, "weight"), "heavy", "weight of a RecordedModel"),
        (("arguments", "block"), ["tensor"], "argument block"),
        (("report", "seconds"), 10**400, "seconds of a MergeReport"),
        (("method",), {"a": 1}, "method of a Manifest"),
    ],
)
def test_a_record_with_values_of_other_types_is_refused(merged: Path, path: tuple, value: Any, named: str) -> None:
    file = merged / "merge_manifest.json"
    values = at = json.loads(file.read_text())
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"merge_manifest.json is not what a merge writes .*{named}"):
        verify(str(merged))


def test_how_much_of_the_machine_is_taken_is_not_for_a_record_to_say(merged: Path) -> None:
    manifest = read_manifest(merged)
    manifest.arguments.update(num_workers=1000, memory_budget="1000TB")
    models = find_models(merged, manifest, option="--experts")
    with closing(plan_again(manifest, models, str(merged))) as plan:
        assert plan.args.num_workers is None
        assert plan.args.memory_budget_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    manifest.arguments.update(num_workers=1, tol="never")
    with pytest.raises(CheckpointError, match="has arguments that cannot be"):
        plan_again(manifest, models, str(merged))


@pytest.mark.parametrize(
    "content", ["[]", '{"models": ["a"], "marks": [{}]}', '{"models": [1, 2, 3], "marks": [{}, {}, {}]}', "{"]
)
def test_damaged_sources_are_refused_and_the_advice_works(merged: Path, content: str) -> None:
    (merged / ".frmerge_sources.json").write_text(content)
    with pytest.raises(CheckpointError, match="Remove it, and say where the models are"):
        verify(str(merged))
    (merged / ".frmerge_sources.json").unlink()
    assert verify(str(merged), experts=[str(merged.parent / f"e{i}") for i in range(3)]).ok
