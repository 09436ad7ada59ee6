"""
What people really bring that is wrong: the sentence they read, word for word, before anything is written.

Each row is one mistake: what is wrong in a folder of small models (`world`), the command, and the message. After the
command the folder is as it was before: nothing staged, no output, no journal. The file is long since it is a table.
"""

from __future__ import annotations

import json
import shlex
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from click_runner import click_runner
from safetensors.numpy import load_file, save_file

from hf_frmerge.cli.main import main

FAILURE, USAGE = 1, 2

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "lm_head.weight": (16, 8),
    "model.norm.weight": (8,),
    f"{LAYER}input_layernorm.weight": (8,),
    f"{LAYER}post_attention_layernorm.weight": (8,),
    **{f"{LAYER}self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"},
    **{f"{LAYER}mlp.{name}_proj.weight": (12, 8) for name in ("gate", "up")},
    f"{LAYER}mlp.down_proj.weight": (8, 12),
}
Q = f"{LAYER}self_attn.q_proj"
LORA_A, LORA_B = (f"base_model.model.{Q}.lora_{which}.weight" for which in "AB")
ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "org/base",
    "task_type": "CAUSAL_LM",
}


def write_model(folder: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    base = np.random.default_rng(0)
    tensors = {
        name: (base.standard_normal(shape) + 0.1 * seed * generator.standard_normal(shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))


def write_adapter(folder: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    factors = {
        name: generator.standard_normal(shape).astype(np.float32)
        for name, shape in {LORA_A: (2, 8), LORA_B: (8, 2)}.items()
    }
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))


# What is wrong: functions that change the folder of a test


Change = Callable[[], object]


def edit_json(path: Path, changes: dict[str, object]) -> None:
    entries = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))


def config(folder: str, **changes: object) -> Change:
    """Set entries of a configuration; `None` takes one out."""
    return lambda: edit_json(next(Path(folder).glob("*config.json")), changes)


def manifest(**changes: object) -> Change:
    """Set entries of the manifest of `merged`; `None` takes one out."""
    return lambda: edit_json(Path("merged/merge_manifest.json"), changes)


def tensors(folder: str, changes: dict[str, np.ndarray | None]) -> Change:
    """Set tensors of a folder's weight file; `None` takes one out."""

    def change() -> None:
        path = next(Path(folder).glob("*.safetensors"))
        held = {**load_file(path), **changes}
        save_file({name: value for name, value in held.items() if value is not None}, path)

    return change


def header(folder: str, edit: Callable[[dict], object]) -> Change:
    """Change the header of a folder's weight file, and leave the data as they are."""

    def change() -> None:
        path = next(Path(folder).glob("*.safetensors"))
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8 : 8 + size])
        edit(entries)
        text = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return change


def write(path: str, content: str | bytes | dict | list) -> Change:
    """Write a file; dictionaries and lists as JSON."""

    def change() -> None:
        data = content if isinstance(content, bytes | str) else json.dumps(content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data if isinstance(data, bytes) else data.encode())

    return change


def append(path: str, content: bytes) -> Change:
    return lambda: Path(path).write_bytes(Path(path).read_bytes() + content)


def remove(path: str) -> Change:
    return lambda: Path(path).unlink()


def cut(path: str, size: int) -> Change:
    """Keep the first `size` bytes of a file, as an interrupted download does; negative: leave out so many."""
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:size])


def rename(old: str, new: str) -> Change:
    return lambda: Path(old).rename(new)


@dataclass(frozen=True)
class Row:
    """One mistake: what is wrong, the command, and all that the user reads."""

    command: str
    sentence: str
    wrong: tuple[Change, ...]
    code: int


def row(command: str, *wrong: Change, says: str, code: int = FAILURE) -> Row:
    return Row(command, says, wrong, code)


MERGE = "merge math code --output-dir out"
ADAPTERS = "merge x y --base-model base --output-dir out"

# fmt: off
ROWS: dict[str, Row] = {
    # The command line
    "no experts": row("merge", code=USAGE,
        says="No experts were named. Give two or more folders or Hub ids, or a configuration file that lists "
        "`experts`."),
    "one expert": row("merge math", code=USAGE,
        says="A merge needs at least two experts, got 1: 'math', a full model, of which a merge would be a copy. Name "
        "two or more models."),
    "one expert and a base": row("merge math --base-model base --output-dir out", code=USAGE,
        says="A merge needs at least two experts, got 1: 'math', a full model, of which a merge would be a copy. Name "
        "two or more models."),
    "two weights for three experts": row("merge math code base --weights 1,2 --output-dir out", code=USAGE,
        says="`weights` needs one number per expert: got 2 ([1.0, 2.0]) for 3 experts. Leave it out to weigh all "
        "experts alike."),
    "a weight that is no number": row("merge math code --weights 1,x", code=USAGE,
        says="`weights[1]` expects a number, but got 'x'."),
    "a negative weight": row("merge math code --weights 1,-1", code=USAGE,
        says="`weights` must not be negative with method='karcher', but the weight of expert 2 is -1.0: here a "
        "weight is a share. To subtract what an expert learned, use method='task_arithmetic' or 'dare_linear' or "
        "'breadcrumbs' or 'consensus'."),
    "a weight that is NaN": row("merge math code --weights 1,nan", code=USAGE,
        says="`weights` must be finite, but the weight of expert 2 is nan."),
    "weights that are all zero": row("merge math code --weights 0,0", code=USAGE,
        says="`weights` are all zero: at least one expert must count."),
    "a scale that is not finite": row(f"{MERGE} --scale inf", code=USAGE,
        says="`scale` must be finite, but got inf."),
    "a beta that is not finite": row(f"{MERGE} --beta nan", code=USAGE,
        says="`beta` must be finite, but got nan."),
    "a density above one": row(
        "merge math code --base-model base --output-dir out --method ties --density 1.5",
        code=USAGE,
        says="`density` must be above 0 and at most 1 (share of the elements that stay), but got 1.5."),
    "a density of zero": row(
        "merge math code --base-model base --output-dir out --method ties --density 0",
        code=USAGE,
        says="`density` must be above 0 and at most 1 (share of the elements that stay), but got 0.0."),
    "a negative seed": row(
        "merge math code --base-model base --output-dir out --method dare_linear --seed -1",
        code=USAGE,
        says="`seed` must be at least 0, but got -1."),
    "no workers": row(f"{MERGE} --num-workers 0", code=USAGE,
        says="`num_workers` must be from 1 to 1024, but got 0."),
    "a size without sense": row(f"{MERGE} --max-shard-size big", code=USAGE,
        says="`max_shard_size` expects a size such as '512MiB', '5GB' or a number of bytes, but got 'big'."),
    "a size of nothing": row(f"{MERGE} --memory-budget 0", code=USAGE,
        says="`memory_budget` must be at least one byte, but got '0'."),
    "a budget too small for one piece": row(f"{MERGE} --memory-budget 1KB", code=USAGE,
        says="memory_budget is 1KB, but one worker needs 12 MiB for 2 experts. Set memory_budget=12MiB or more."),
    "a rule without weights": row(f"{MERGE} --weight-rules attn", code=USAGE,
        says="Weight rule 'attn' must read REGEX=w1,w2,..., such as 'layers\\.0\\.=0.7,0.3' ('.*' fits all tensors)."),
    "a rule that is no regular expression": row(f"{MERGE} --weight-rules '(attn=1,0'", code=USAGE,
        says="Weight rule '(attn=1,0': '(attn' is not a regular expression: missing ), unterminated subpattern at "
        "position 0."),
    "a rule with words for weights": row(f"{MERGE} --weight-rules 'attn=a,b'", code=USAGE,
        says="Weight rule 'attn=a,b': weights are numbers, or gradients such as 0:0.5:1, separated by commas; but "
        "got 'a,b'."),
    "a rule with too many weights": row(f"{MERGE} --weight-rules 'attn=1,2,3'", code=USAGE,
        says="Weight rule 'attn=1,2,3': `weights` needs one number per expert: got 3 ([1.0, 2.0, 3.0]) for 2 "
        "experts. Leave it out to weigh all experts alike."),
    "a rule that divides a layer": row(f"{MERGE} --block layer --weight-rules 'q_proj=1,2'", code=USAGE,
        says="weight_rules give 'model.layers.0.input_layernorm.weight' and "
        "'model.layers.0.self_attn.q_proj.weight' different weights, but both lie on one sphere (group "
        "'model.layers.0'). Use block='tensor', or rules that do not divide a group."),
    "slerp of three": row("merge math code base --method slerp --output-dir out", code=USAGE,
        says="slerp joins exactly 2 experts, got 3. Use method='karcher', its extension."),
    "task arithmetic without a base": row("merge math code --method task_arithmetic --output-dir out", code=USAGE,
        says='space="deltas" needs base_model: deltas are the differences to it.'),
    "deltas without a base": row("merge math code --space deltas --output-dir out", code=USAGE,
        says='space="deltas" needs base_model: deltas are the differences to it.'),
    "a block the method cannot take": row(
        "merge math code --base-model base --method ties --block row --output-dir out",
        code=USAGE,
        says="`method='ties'` takes block=tensor or layer or model, but got 'row'."),
    "leaving out what is not there": row(f"{MERGE} --leave-out nothing", code=USAGE,
        says="`leave_out`: 'nothing' matches none of the tensors of the models, such as "
        "model.layers.0.self_attn.q_proj.weight, model.layers.0.self_attn.v_proj.weight, model.norm.weight. "
        "Correct it, or leave it out."),
    "leaving out by what is no pattern": row(f"{MERGE} --leave-out '(a'", code=USAGE,
        says="`leave_out`: '(a' is not a regular expression: missing ), unterminated subpattern at position 0."),
    "taking from what is no expert": row(f"{MERGE} --take lm_head=nowhere", code=USAGE,
        says="`take` has 'lm_head=nowhere', but 'nowhere' is none of the experts. Write an expert exactly as in the "
        "list of experts ('math', 'code'), or its number, from 1 to 2, or 'base' for the base model."),
    "one adapter without its base": row("merge x --output-dir out", code=USAGE,
        says="A merge needs at least two experts, got 1: 'x'. Name two or more, or pass base_model (--base-model), "
        "the model that this adapter is to be folded into."),
    "a table and a method": row(f"{MERGE} --method linear --coefficients merged", code=USAGE,
        says="`method='linear'` and `coefficients='merged'` do not go together: a table of coefficients takes the "
        "place of a method. Give the table alone, or a method without it."),
    "two ways to choose a rank": row(f"{ADAPTERS} --adapter-rank 2 --adapter-energy 0.9", code=USAGE,
        says="`adapter_rank=2` and `adapter_energy=0.9` both choose the rank of the merged adapter: give one of "
        "them."),
    "a rank for a full model": row(f"{ADAPTERS} --adapter-output merged --adapter-rank 2", code=USAGE,
        says="`adapter_rank` and `adapter_energy` shape a merged adapter, but `adapter_output='merged'` adds it to "
        "the base model: leave them out, or choose `adapter_output='adapter'`."),
    "an adapter of full models": row(f"{MERGE} --adapter-output adapter", code=USAGE,
        says="adapter_output='adapter' needs adapters only, but 'math' is a full checkpoint."),
    "a matrix method with little memory": row(
        "merge math code --base-model base --method iso_c --memory-budget 1MiB --num-workers 1 --output-dir out",
        code=USAGE,
        says="memory_budget is 1MiB, but one worker needs 16 MiB for 2 experts. Set memory_budget=16MiB or more."),
    # The configuration file
    "a configuration that is not there": row("merge missing.yaml", code=USAGE,
        says="The configuration file 'missing.yaml' does not exist."),
    "a configuration that is broken YAML": row(
        "merge m.yaml",
        write("m.yaml", "experts: [math, code]\nmethod: [karcher\n"),
        code=USAGE,
        says="The configuration file 'm.yaml' is not valid YAML at line 3, column 1: expected ',' or ']', but got "
        "'<stream end>'."),
    "a configuration that is broken JSON": row("merge m.json", write("m.json", '{"experts": ['), code=USAGE,
        says="The configuration file 'm.json' is not valid JSON: Expecting value: line 1 column 14 (char 13)."),
    "a configuration that is a list": row("merge m.yaml", write("m.yaml", "- math\n- code\n"), code=USAGE,
        says="The configuration file 'm.yaml' must hold options by name, such as `method: karcher`."),
    "a configuration with a misspelt key": row(
        "merge m.yaml",
        write("m.yaml", "experts: [math, code]\noutput_dri: out\n"),
        code=USAGE,
        says="unknown key 'output_dri' in 'm.yaml'. Did you mean 'output_dir'?"),
    "a configuration of mergekit": row(
        "merge m.yaml",
        write("m.yaml", "merge_method: linear\nmodels:\n  - model: math\n    parameters: {weight: 1}\n"
              "  - model: code\n    parameters: {weight: 2}\ndtype: bfloat16\n"),
        code=USAGE,
        says="unknown key 'merge_method' in 'm.yaml': this is a configuration of mergekit. Here it reads\n    "
        'method: "linear"\n    experts: ["math", "code"]\n    weights: [1, 2]\n    dtype: "bfloat16"\n    '
        'output_dir: "merged"\n'
        "What of it is not listed has no counterpart of the same name."),
    "a configuration with text for a number": row(
        "merge m.yaml",
        write("m.yaml", "experts: [math, code]\nbeta: much\n"),
        code=USAGE,
        says="`beta` expects a number, but got 'much'."),
    "a configuration without experts": row("merge m.yaml", write("m.yaml", "method: karcher\n"), code=USAGE,
        says="No experts were named. Give two or more folders or Hub ids, or a configuration file that lists "
        "`experts`."),
    "a configuration of another kind": row("merge math code --config m.toml", write("m.toml", "x = 1\n"), code=USAGE,
        says="A configuration file ends in .yaml, .yml or .json, but got 'm.toml'."),
    # Where it goes
    "an output folder in use": row("merge math code --output-dir base", code=USAGE,
        says="The output folder 'base' is not empty. Choose another, or pass --overwrite (overwrite=True) to "
        "replace the model in it."),
    "an output folder that is an expert": row("merge math code --output-dir math", code=USAGE,
        says="The output folder 'math' is also an input. Choose another output_dir."),
    "an output folder that is the base": row(
        "merge math code --base-model base --output-dir base --overwrite",
        code=USAGE,
        says="The output folder 'base' is also an input. Choose another output_dir."),
    "an output that is a file": row("merge math code --output-dir text.txt", code=USAGE,
        says="The output folder 'text.txt' is a file. Choose another output_dir."),
    "an interrupted merge": row(
        "merge math code --output-dir torn",
        write("torn/.frmerge/journal.jsonl", ""),
        code=USAGE,
        says="'torn' holds an interrupted merge. Pass --resume (resume_from_checkpoint=True) to go on with it, or "
        "--overwrite to start anew."),
    "a resume of a finished merge": row("merge math code --output-dir merged --resume",
        says="The merge in 'merged' is complete; there is nothing to resume."),
    # Experts that are not there or not models
    "a folder that is not there": row("merge math ./nowhere --output-dir out",
        says="There is no folder './nowhere' (looked for {folder}/nowhere)."),
    "a file for a folder": row("merge math text.txt --output-dir out",
        says="'text.txt' is a file. Pass the folder that holds it, with its config.json."),
    "a weight file for a folder": row("merge math code/model.safetensors --output-dir out",
        says="'code/model.safetensors' is a file. Pass the folder that holds it, with its config.json."),
    "an empty folder": row("merge math empty --output-dir out", lambda: Path("empty").mkdir(),
        says="'empty' is empty: expected model.safetensors or model.safetensors.index.json and a config.json."),
    "a model with an adapter as the base": row("merge math code --base-model base+x --output-dir out",
        says="'base+x' is a model with an adapter on it, which a merge takes as one expert, but nothing else does. "
        "Fold the adapter in first (`frmerge merge x --base-model base --output-dir folded`), and pass 'folded'."),
    "a model with a model on it": row("merge math base+code --output-dir out",
        says="'base+code': expected a full model and an adapter on it, but 'base' is a full model and 'code' is a "
        "full model. Name models to be merged one by one, with a space between."),
    "a folder of pickles": row(MERGE, rename("code/model.safetensors", "code/pytorch_model.bin"),
        says="'code' has pickle weights only (pytorch_model.bin). A pickle can run code when it is opened, so it is "
        "left alone unless you ask: with --allow-pickle (allow_pickle) its tensors are read as "
        "`torch.load(weights_only=True)` finds them, which runs none of the code it may name."),
    "weights without a config": row(MERGE, remove("code/config.json"),
        says="'code' has weights but no config.json. Add the one of its model class."),
    "a file that is called GGUF": row(MERGE, rename("code/model.safetensors", "code/model-q4.gguf"),
        says="'code': model-q4.gguf is not a GGUF file: it does not begin with GGUF. Download it again."),
    "several GGUF files": row(MERGE, rename("code/model.safetensors", "code/q4.gguf"), write("code/q8.gguf", "GGUF"),
        says="'code' holds 2 GGUF files that may each be a model. Pass the one you mean: 'code/q4.gguf' or "
        "'code/q8.gguf'."),
    "a folder of checkpoints": row(
        "merge math runs --output-dir out",
        lambda: shutil.copytree("code", "runs/checkpoint-10"),
        says="'runs' holds no model itself, but there is one in folders below it. Pass 'runs/checkpoint-10'."),
    "a Hub id without a network": row("merge math org/model --output-dir out",
        says="'org/model' is neither a local folder nor in the local cache, and offline mode is on. Go online "
        "(unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE), or download it beforehand with `hf download "
        "org/model`."),
    "a Hub id that can be none": row("merge math org/sub/model --output-dir out",
        says="There is no folder 'org/sub/model' (looked for {folder}/org/sub/model)."),
    "a configuration that is no JSON": row(MERGE, write("code/config.json", "{"),
        says="'code': config.json is not valid JSON: Expecting property name enclosed in double quotes: line 1 "
        "column 2 (char 1)."),
    "a configuration that is a list of things": row(MERGE, write("code/config.json", []),
        says="'code': config.json must hold a JSON object, found a list."),
    # Weight files
    "an empty weight file": row(MERGE, write("code/model.safetensors", b""),
        says="'code': model.safetensors has 0 bytes, too few for a safetensors file. Download it again."),
    "a pointer of Git LFS": row(
        MERGE,
        write("code/model.safetensors",
              "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123\n"),
        says="'code': model.safetensors is not a safetensors file: it announces a header of 2336927755350992246 "
        "bytes, 100000000 is the most allowed. It looks like a Git LFS pointer; run `git lfs pull`."),
    "a truncated weight file": row(MERGE, cut("code/model.safetensors", -10),
        says="'code': model.safetensors is truncated: its header announces 4448 bytes, the file has 4438. Download "
        "it again."),
    "a header that is cut off": row(MERGE, cut("code/model.safetensors", 100),
        says="'code': model.safetensors is truncated: its header alone needs 1152 bytes, the file has 100. Download "
        "it again."),
    "bytes after the last tensor": row(MERGE, append("code/model.safetensors", b"123"),
        says="'code': model.safetensors has 3 bytes after the last tensor: its header announces 4448 bytes, the "
        "file has 4451. The file is damaged; download it again."),
    "a header that is no JSON": row(MERGE, write("code/model.safetensors", struct.pack("<Q", 4) + b"{{{{"),
        says="'code': model.safetensors has a header that is not JSON: Expecting property name enclosed in double "
        "quotes: line 1 column 2 (char 1). Download it again."),
    "a shape that does not fit": row(MERGE, header("code", lambda h: h["model.norm.weight"].update(shape=[9])),
        says="'code': model.safetensors: tensor 'model.norm.weight' of shape (9,) and dtype F32 needs 36 bytes, its "
        "header gives it 32. The file is damaged; download it again."),
    "a dtype that is none": row(MERGE, header("code", lambda h: h["model.norm.weight"].update(dtype="F33")),
        says="'code': model.safetensors: tensor 'model.norm.weight' has dtype 'F33', which is not one of BOOL, F4, "
        "F6_E2M3, F6_E3M2, U8, I8, F8_E5M2, F8_E4M3, F8_E8M0, F8_E4M3FNUZ, F8_E5M2FNUZ, I16, U16, F16, BF16, "
        "I32, U32, F32, C64, F64, I64, U64. Convert the checkpoint to one of them."),
    "tensors that overlap": row(MERGE, header("code", lambda h: h["model.norm.weight"].update(data_offsets=[0, 32])),
        says="'code': model.safetensors: tensor 'lm_head.weight' starts at byte 1250 and overlaps tensor "
        "'model.norm.weight', which ends at byte 1282. The file is damaged; download it again."),
    "no tensors at all": row(MERGE, write("code/model.safetensors", struct.pack("<Q", 2) + b"{}"),
        says="'code' holds no tensors (model.safetensors)."),
    "a tensor missing": row(MERGE, tensors("code", {"model.norm.weight": None}),
        says="'code' and 'math' do not have the same tensors: it lacks 1 tensors (model.norm.weight). Only models "
        "of one architecture and size can be merged."),
    "a tensor more": row(MERGE, tensors("code", {"extra.weight": np.ones(3, np.float32)}),
        says="'code' and 'math' do not have the same tensors: it has 1 others (extra.weight). Only models of one "
        "architecture and size can be merged."),
    "another vocabulary": row(
        MERGE,
        tensors("code", dict.fromkeys(("lm_head.weight", "model.embed_tokens.weight"), np.ones((18, 8), np.float32))),
        says="2 tensors differ in shape: lm_head.weight is [18, 8] in 'code' and [16, 8] in 'math', "
        "model.embed_tokens.weight is [18, 8] in 'code' and [16, 8] in 'math'. The vocabularies have different "
        "sizes (18 and 16). Choose whose tokens the output gets, and rows are matched by token: --tokenizer-source "
        "base, union or an expert (tokenizer_source)."),
    "another width": row(MERGE, tensors("code", {"model.norm.weight": np.ones(9, np.float32)}),
        says="1 tensors differ in shape: model.norm.weight is [9] in 'code' and [8] in 'math'. Only models of one "
        "architecture and size can be merged."),
    "tensors of shape [0]": row(MERGE, tensors("code", {"model.norm.weight": np.ones(0, np.float32)}),
        says="'code' holds tensors of shape [0]: model.norm.weight. It was saved by a sharded run (DeepSpeed "
        "ZeRO-3, FSDP) that did not gather its weights first. Make whole weights of the run's own checkpoint "
        "with the `zero_to_fp32.py` that lies in it, or save again with "
        '`"stage3_gather_16bit_weights_on_model_save": true` in the DeepSpeed config (of FSDP: with '
        "`FULL_STATE_DICT`)."),
    "weights that are whole numbers": row(MERGE, tensors("code", {"model.norm.weight": np.ones(8, np.int64)}),
        says="'code' stores numbers of another kind: model.norm.weight is F32 in 'math' and I64 here. If it is "
        "quantised, dequantise it first."),
    "quantised by bitsandbytes": row(
        MERGE,
        tensors("code", {f"{Q}.weight": np.ones((32, 1), np.uint8), f"{Q}.weight.absmax": np.ones(1, np.float32)}),
        config("code", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        says="'code' is quantised (bitsandbytes): its numbers are codes, which cannot be averaged. Merge the "
        "unquantised checkpoints it was made from, or load it with `from_pretrained`, call "
        "`model.dequantize()` and `model.save_pretrained(..., save_original_format=False)`, and merge that."),
    "an empty configuration": row(MERGE, write("math/config.json", {}),
        says="'math' has an empty config.json ({}), so what is made from it could not be loaded. Put the one of its "
        "model class there."),
    "what is no pickle": row(
        f"{MERGE} --allow-pickle", rename("code/model.safetensors", "code/pytorch_model.bin"),
        says="'code': pytorch_model.bin is no zip file, as torch writes it since 1.6, and cannot be read in place. "
        "Save it anew:\n    import torch\n    file = \"FOLDER/pytorch_model.bin\"\n    torch.save(torch.load(file, "
        "weights_only=True), file)"),
    "a pickle under another name": row(
        f"{MERGE} --allow-pickle", rename("code/model.safetensors", "code/model.pt"),
        says="'code' has pickle weights only (model.pt), under names that transformers does not load. If one holds "
        "all tensors of the model by name, call it pytorch_model.bin and pass --allow-pickle."),
    "quantised by GPTQ": row(
        MERGE,
        tensors("code", {f"{Q}.weight": None, f"{Q}.qweight": np.ones((1, 8), np.int32)}),
        config("code", quantization_config={"quant_method": "gptq", "bits": 4}),
        says="'code' is quantised (gptq): its numbers are codes, which cannot be averaged. Merge the unquantised "
        "checkpoints it was made from."),
    "an index without its shard": row(
        MERGE,
        remove("code/model.safetensors"),
        write("code/model.safetensors.index.json", {"weight_map": {"a": "model-00001-of-00002.safetensors"}}),
        says="'code': model.safetensors.index.json names the shard 'model-00001-of-00002.safetensors', which is not "
        "in the folder (1 shards named). Copy or download the missing shard."),
    "an index that leads outside": row(
        MERGE,
        remove("code/model.safetensors"),
        write("code/model.safetensors.index.json", {"weight_map": {"a": "../math/model.safetensors"}}),
        says="'code': model.safetensors.index.json names '../math/model.safetensors', which is not a file of the "
        "folder itself. Shards must lie beside the index; nothing outside is read."),
    "an index that is no JSON": row(
        MERGE,
        remove("code/model.safetensors"),
        write("code/model.safetensors.index.json", "{"),
        says="'code': model.safetensors.index.json is not valid JSON: Expecting property name enclosed in double "
        "quotes: line 1 column 2 (char 1)."),
    "an index without a weight map": row(
        MERGE,
        remove("code/model.safetensors"),
        write("code/model.safetensors.index.json", {}),
        says="'code': model.safetensors.index.json has no `weight_map` from tensor names to shards."),
    "an index of other shards": row(
        MERGE,
        rename("code/model.safetensors", "code/model-00001-of-00001.safetensors"),
        write("code/model.safetensors.index.json", {"weight_map": {"a": "model-00001-of-00001.safetensors"}}),
        says="'code': model.safetensors.index.json lists 1 tensors that are not in the shard it names: 'a' "
        "(model-00001-of-00001.safetensors). The index belongs to other shards; download the folder again."),
    # Adapters
    "adapters of which the base is missing": row("merge x math --output-dir out", code=USAGE,
        says="'x' is an adapter: pass the model it was trained from as base_model (its config names 'org/base')."),
    "adapters merged into a model without a base": row(
        "merge x y --adapter-output merged --output-dir out",
        code=USAGE,
        says="'x' is an adapter: pass the model it was trained from as base_model (its config names 'org/base')."),
    "an adapter as base": row("merge x y --base-model x --output-dir out", code=USAGE,
        says="The base model 'x' is an adapter; a full checkpoint is needed."),
    "an adapter without its weights": row(ADAPTERS, remove("y/adapter_model.safetensors"),
        says="'y' is an adapter without adapter_model.safetensors. Copy or download it again, or save it anew with "
        "PEFT's `save_pretrained`."),
    "an adapter of another kind": row(ADAPTERS, config("y", peft_type="OSF"),
        says="Adapter 'y': peft_type is 'OSF', expected 'LORA'. If PEFT can fold it into its base as a whole, do that "
        "once:\n    from peft import PeftModel\n    from transformers import AutoModelForCausalLM  # or the class you "
        'use\n    base = AutoModelForCausalLM.from_pretrained("ITS BASE MODEL")\n    model = '
        'PeftModel.from_pretrained(base, "THIS ADAPTER").merge_and_unload()\n    '
        'model.save_pretrained("folded")\nand pass \'folded\', a full model.'),
    "an adapter of another kind without its base": row("merge x y --output-dir out", config("y", peft_type="LOHA"),
        code=USAGE, says="'y' is an adapter of kind LOHA, which is more than low-rank factors and is folded into its "
        "base: pass the model it was trained from as base_model (--base-model; its config names 'org/base')."),
    "an adapter with an unknown option": row(ADAPTERS, config("y", use_new_thing=True),
        says="Adapter 'y': use_new_thing=True is an option this version does not know; it may change what the "
        "factors mean. Merge the adapter into its base with the PEFT version that wrote it."),
    "an adapter initialised by PiSSA": row(ADAPTERS, config("y", init_lora_weights="pissa"),
        says="Adapter 'y': init_lora_weights='pissa' takes part of the base weights into the factors, so they are "
        "not a delta to the published base. Save it again with `save_pretrained(..., "
        "path_initial_model_for_weight_conversion=...)`, which converts it to a plain LoRA."),
    "an adapter with a scale that is none": row(ADAPTERS, config("y", lora_alpha="a lot"),
        says="Adapter 'y': lora_alpha in adapter_config.json is 'a lot', expected a finite number within the range "
        "of float32. Correct it, or save the adapter again with PEFT."),
    "an adapter of rank 0": row(ADAPTERS, config("y", r=0),
        says="Adapter 'y': r in adapter_config.json is 0, expected a whole number from 1 to 2147483647. Correct "
        "it, or save the adapter again with PEFT."),
    "an adapter whose factor is missing": row(ADAPTERS, tensors("y", {LORA_B: None}),
        says="Adapter 'y', module 'model.layers.0.self_attn.q_proj': lora_B is missing from its weights. A factor "
        "alone means nothing; save the adapter again."),
    "an adapter with factors that do not fit": row(ADAPTERS, tensors("y", {LORA_B: np.ones((8, 3), np.float32)}),
        says="Adapter 'y', module 'model.layers.0.self_attn.q_proj': its configuration says rank 2, its factors "
        "have shapes (2, 8) and (8, 3). The configuration belongs to other weights."),
    "an adapter of a wider base": row(ADAPTERS, tensors("y", {LORA_A: np.ones((2, 9), np.float32)}),
        says="Adapter 'y': 'model.layers.0.self_attn.q_proj.weight' changes a weight of shape (9, 8), but "
        "'model.layers.0.self_attn.q_proj.weight' of the base has shape (8, 8). It belongs to another base, or "
        "its vocabulary was resized."),
    "an adapter of another base": row("merge x y --output-dir out", config("y", base_model_name_or_path="org/other"),
        says="Adapters 'x' and 'y' were trained on different base models: 'org/base' and 'org/other'. Deltas of "
        "different bases cannot be merged; if both names mean the same weights, say which they are: pass "
        "base_model (--base-model)."),
    "an adapter of another revision": row("merge x y --output-dir out", config("y", revision="v2"),
        says="Adapters 'x' and 'y' were trained on different revisions of 'org/base': 'main' and 'v2'. If the "
        "weights are the same, say which they are: pass base_model (--base-model)."),
    "an adapter with keys of another library": row(
        ADAPTERS,
        tensors("y", {LORA_A: None, LORA_B: None, "lora_unet_q.lora_down.weight": np.ones((2, 8), np.float32)}),
        says="Adapter 'y': tensor 'lora_unet_q.lora_down.weight' is not a factor of a plain LoRA adapter "
        "(lora_A.weight, lora_B.weight, lora_embedding_A, lora_embedding_B). Save it again with PEFT's "
        "`save_pretrained`."),
    "an adapter on modules the base lacks": row(
        ADAPTERS,
        tensors("y", {LORA_A: None, LORA_B: None, LORA_A.replace("q_proj", "query"): np.ones((2, 8), np.float32),
                      LORA_B.replace("q_proj", "query"): np.ones((8, 2), np.float32)}),
        says="Adapter 'y' changes model.layers.0.self_attn.query.weight, which the base model does not have. Pass "
        "the base it was trained on."),
    "a model and an adapter in one folder": row(
        ADAPTERS,
        lambda: shutil.copy("base/model.safetensors", "y/model.safetensors"),
        says="'y' holds a full model (model.safetensors) and an adapter (adapter_config.json), and transformers "
        "would load the model with the adapter on it. Move adapter_config.json and adapter_model.safetensors "
        "to a folder of their own (of a Hub repository, download one without the other: `hf download ORG/NAME "
        "--exclude 'adapter_*' --local-dir FOLDER`) and pass the folder you mean. To merge both as one model, "
        "fold the adapter in with PEFT's `merge_and_unload`, and pass what you save then."),
    "an adapter config that is no JSON": row(ADAPTERS, write("y/adapter_config.json", "{"),
        says="'y': adapter_config.json is not valid JSON: Expecting property name enclosed in double quotes: line 1 "
        "column 2 (char 1)."),
    "rows of one adapter apart": row(f"{ADAPTERS} --block row --adapter-output adapter", code=USAGE,
        says="block='row' gives rows of one module different coefficients, which factors cannot express. Use "
        '"tensor", "layer" or "model", or adapter_output="merged".'),
    "weight space for adapters": row(
        "merge x y --base-model base --space weights --adapter-output adapter --output-dir out",
        code=USAGE,
        says="A mean in weight space rescales the base model itself, which no adapter can express. Use "
        "space='deltas', or adapter_output='merged'."),
    # Licences
    "a licence that forbids it": row(MERGE, write("code/README.md", "---\nlicense: cc-by-nd-4.0\n---\n"),
        says="A merge is a derived work, and the licence of code (cc-by-nd-4.0) does not allow derived works. Leave "
        "it out, or, if you have the right to, allow it by name: `--allow-license cc-by-nd-4.0`."),
    # Coefficients
    "a table that is not there": row("merge math code --coefficients nowhere.safetensors --output-dir out",
        says="There is no table of coefficients nowhere.safetensors. Pass a safetensors file, or the folder of a "
        "finished merge."),
    "a table for fewer tensors": row(
        "merge math code --coefficients t.safetensors --output-dir out",
        lambda: save_file({"lm_head.weight": np.ones((1, 2))}, "t.safetensors"),
        code=USAGE,
        says="t.safetensors has no coefficients for model.embed_tokens.weight, "
        "model.layers.0.input_layernorm.weight, model.layers.0.mlp.down_proj.weight and 8 more, which would be "
        "merged. Add a row of them for every such tensor."),
    "a table with a coefficient that is none": row(
        "merge math code --coefficients t.safetensors --output-dir out",
        lambda: save_file({"lm_head.weight": np.full((1, 2), np.nan)}, "t.safetensors"),
        says="t.safetensors: a coefficient of 'lm_head.weight' is not a finite number. Correct it."),
    "a table of whole numbers": row(
        "merge math code --coefficients t.safetensors --output-dir out",
        lambda: save_file({"lm_head.weight": np.ones((1, 2), np.int64)}, "t.safetensors"),
        says="t.safetensors: 'lm_head.weight' is I64 of shape [1, 2], expected floating-point numbers, blocks "
        "down and experts across."),
    "a table for three experts": row(
        "merge math code --coefficients t.safetensors --output-dir out",
        lambda: save_file({n:np.ones((1, 3)) for n in SHAPES}, "t.safetensors"),
        code=USAGE,
        says="t.safetensors: 'lm_head.weight' has coefficients for 3 experts, but 2 are given."),
    # Calibration
    "prompts for an expert that is none": row(
        "merge math code --calibration maths=text.txt --output-dir out",
        code=USAGE,
        says="`calibration` names 'maths', which is none of the experts 'math', 'code'. Write an expert exactly as "
        "in the list of experts. Did you mean 'math'?"),
    "prompts in a file that is not there": row(
        "merge math code --calibration nowhere.txt --output-dir out",
        code=USAGE,
        says="The prompts of the expert 'math' cannot be used. The data 'nowhere.txt' is not a file."),
    "prompts for all and for one": row(
        "merge math code --calibration text.txt --calibration math=text.txt --output-dir out",
        code=USAGE,
        says="`calibration` has 'text.txt', which is for all experts, beside 1 more. Give one for all experts, or "
        "write EXPERT=FILE for each."),
    "two files of prompts for one expert": row(
        "merge math code --calibration math=text.txt --calibration math=text.txt --output-dir out",
        code=USAGE,
        says="`calibration` has two files for 'math', 'text.txt' and 'text.txt'. Put the prompts of an expert into "
        "one file."),
    "prompts as text and no tokenizer": row("merge math code --calibration text.txt --output-dir out", code=USAGE,
        says="The prompts of the expert 'math' cannot be used. They are text, and there is no tokenizer: give one, "
        "or token ids."),
    "prompts of its own and no tokenizer": row("merge math code --calibration self --output-dir out", code=USAGE,
        says="None of the models has a tokenizer beside it, which says how a text begins, so the experts cannot "
        "write prompts of their own. Put one beside the base, or pass prompts as token ids (a column "
        "input_ids)."),
    "one token is no prompt": row(
        "merge math code --calibration text.txt --max-calibration-length 1 --output-dir out",
        code=USAGE,
        says="`max_calibration_length` must be at least 2 (one token predicts the next), but got 1."),
    "token ids that are out of the vocabulary": row(
        "merge math code --calibration p.jsonl --output-dir out",
        write("p.jsonl", "".join(json.dumps({"input_ids": [1, 2, 99]}) + "\n" for _ in range(5))),
        code=USAGE,
        says="The prompts of the expert 'math' cannot be used. The data holds token id 99, but the model's "
        "vocabulary has 16 entries: the tokenizer belongs to another model."),
    "three prompts": row(
        "merge math code --calibration p.jsonl --output-dir out",
        write("p.jsonl", "".join(json.dumps({"input_ids": [1, 2, 3]}) + "\n" for _ in range(3))),
        code=USAGE,
        says="No expert has four prompts or more, so none can be held out to judge the fit. Pass more prompts: 16 "
        "an expert help already, 64 are better. Short texts for a language model are joined; shorter prompts "
        "(max_calibration_length) are more."),
    # After a merge
    "verify of what is no merge": row("verify math",
        says="math has no merge_manifest.json. Expected a folder that `frmerge merge` wrote, complete."),
    "verify of a folder that is not there": row("verify ./nowhere",
        says="There is no folder './nowhere' (looked for {folder}/nowhere)."),
    "verify with one expert of two": row("verify merged --experts math",
        says="The merge had 2 experts, but 1 were given. Give all, in their order."),
    "verify with an expert that is not there": row("verify merged --experts math --experts ./nowhere",
        says="There is no folder './nowhere' (looked for {folder}/nowhere)."),
    "a manifest that is no JSON": row("verify merged", write("merged/merge_manifest.json", "{"),
        says="merged/merge_manifest.json is not valid JSON: Expecting property name enclosed in double quotes: line "
        "1 column 2 (char 1). Merge again."),
    "a manifest of a later version": row("card merged", manifest(format_version=99),
        says="merged/merge_manifest.json has format 99, this version reads 2 and 3. Update hf_frmerge."),
    "a manifest without an entry": row("card merged", manifest(experts=None),
        says="'base_model'). Restore the file, or merge again."),
    "a card for what is no merge": row("card math",
        says="math has no merge_manifest.json. Expected a folder that `frmerge merge` wrote, complete."),
    "a push of what is no merge": row("push math me/model",
        says="math has no merge_manifest.json: it is not the output of a finished merge."),
    "a push of half a merge": row("push merged me/model", remove("merged/model.safetensors"),
        says="merged lacks 1 of 1 weight files, model.safetensors among them. Merge again."),
    "a push of a folder that is not there": row("push nowhere me/model",
        says="There is no folder nowhere to push."),
    "a push to a name that is none": row("push merged me/my/model", code=USAGE,
        says="'me/my/model' is not a valid Hub id: expected `namespace/name`, of letters, digits, `-`, `_` and `.`."),
    "a push to a branch and a pull request": row("push merged me/model --create-pr --revision dev", code=USAGE,
        says="A pull request is opened against `main`, but `revision='dev'` was given. Leave one of them out."),
    "a diff with what is no merge": row("diff merged math",
        says="math has no merge_manifest.json. Expected a folder that `frmerge merge` wrote, complete."),
    "a report of what is no merge": row("report math",
        says="math has no merge_manifest.json. Expected a folder that `frmerge merge` wrote, complete."),
    "a reproduction with a wrong --expert": row("reproduce merged --expert math", code=USAGE,
        says="--expert takes NAME=PATH, such as --expert math=./math, but got 'math'."),
    "a reproduction with an unknown expert": row("reproduce merged --expert maths=math", code=USAGE,
        says="The merge had no expert 'maths': expected one of math, code."),
    "an evaluation without texts": row("evaluate merged", code=USAGE,
        says="There is nothing to evaluate on: give --data FILE, --lm-eval TASK, or both."),
    "an evaluation on a file that is not there": row("evaluate merged --data nowhere.txt", code=USAGE,
        says="The data 'nowhere.txt' is not a file."),
    "an evaluation with two texts of one name": row(
        "evaluate merged --data text.txt --data other/text.txt",
        write("other/text.txt", "x"),
        code=USAGE,
        says="Two texts are named 'text': 'text.txt' and 'other/text.txt'. Name them apart with --data NAME=FILE."),
    "an evaluation with a threshold that is none": row(
        "evaluate merged --data text.txt --fail-on perplexity",
        code=USAGE,
        says="A threshold reads NAME<VALUE or NAME>VALUE, such as 'effective_rank<0.9', but got 'perplexity'."),
    "an evaluation without a tokenizer": row("evaluate merged --data text.txt", code=USAGE,
        says="The data is text, and there is no tokenizer beside the model. Copy the tokenizer of an expert there, "
        "pass it as `processing_class`, or give token ids (a column input_ids)."),
    "an adapter out of an adapter": row("extract-lora x --base-model base --output-dir out", code=USAGE,
        says="'x' is an adapter already; a full checkpoint is needed."),
    "an inspection of one model": row("inspect math", code=USAGE,
        says="A merge needs at least two experts, got 1: 'math', a full model, of which a merge would be a copy. Name "
        "two or more models."),
    "an inspection of an adapter without its base": row("inspect x math", code=USAGE,
        says="'x' is an adapter: pass the model it was trained from as base_model (its config names 'org/base')."),
    "a model of another width than its base": row(
        "extract-lora math --base-model base --output-dir out",
        tensors("math", {f"{Q}.weight": np.ones((8, 9), np.float32)}),
        says="Tensor 'model.layers.0.self_attn.q_proj.weight' is F32 (8, 8) in 'base' but F32 (8, 9) in 'math'. An "
        "adapter needs float tensors of one shape in both."),
    "an adapter rank of nothing": row("extract-lora math --base-model base --output-dir out --rank 0", code=USAGE,
        says="`rank` must be at least 1, but got 0."),
    "prompts without text": row(
        "merge math code --calibration p.jsonl --output-dir out",
        write("p.jsonl", '{"prompt": "a"}\n'),
        code=USAGE,
        says="The prompts of the expert 'math' cannot be used. They are text, and there is no tokenizer: give one, "
        "or token ids."),
    "texts without text": row("evaluate merged --data p.jsonl", write("p.jsonl", '{"prompt": "a"}\n'), code=USAGE,
        says="Row 0 of the data needs a column `text` (a string) or `input_ids`, found ['prompt']. Rename the "
        "column, or tokenize the data first."),
    "an empty file of texts": row("evaluate merged --data e.jsonl", write("e.jsonl", ""), code=USAGE,
        says="The data 'e.jsonl' cannot be read as jsonl: it is empty."),
    "texts that are not UTF-8": row("evaluate merged --data l.txt", write("l.txt", b"caf\xe9"), code=USAGE,
        says="The data 'l.txt' is not UTF-8 text (unexpected end of data at byte 3). Convert it, or use one of "
        ".jsonl, .json, .csv, .parquet with a column `text`."),
    "an expert for an evaluation that is not there": row("evaluate merged --data text.txt --experts ./nowhere",
        says="There is no folder './nowhere' (looked for {folder}/nowhere)."),
    "a card for a model that is not merged": row("evaluate math --data text.txt --card --experts code", code=USAGE,
        says="--card writes the card of a merge, but math is no folder that `frmerge merge` wrote."),
}
# fmt: on


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a base, two experts, two adapters, a text, and a finished merge; no test writes to it."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed, name in enumerate(("base", "math", "code")):
            write_model(Path(name), seed)
        for seed, name in enumerate(("x", "y")):
            write_adapter(Path(name), seed)
        Path("text.txt").write_text("some words of a text\n")
        assert click_runner().invoke(main, ["merge", "math", "code", "--output-dir", "merged"]).exit_code == 0
    return folder


@pytest.fixture
def place(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the world to make a mistake in, as the working folder."""
    folder = tmp_path / "place"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    yield folder


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ROWS)
def test_a_mistake_is_told_in_a_sentence_before_anything_is_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    row = ROWS[name]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for change in row.wrong:
        change()
    before = contents(place)
    result = click_runner().invoke(main, shlex.split(row.command))
    said = result.stderr[result.stderr.rindex("Error: ") :].removeprefix("Error: ").rstrip("\n")
    assert said.replace(str(place), "{folder}") == row.sentence
    assert result.exit_code == row.code
    assert contents(place) == before


def test_there_are_many_rows_and_no_two_alike() -> None:
    assert len(ROWS) >= 80
    assert len({(row.command, row.wrong) for row in ROWS.values()}) == len(ROWS)


# Row -> what its sentence advises: commands, and changes to files.
ADVICE: dict[str, tuple[str | Change, ...]] = {
    "a budget too small for one piece": (f"{MERGE} --memory-budget 12MiB",),
    "a matrix method with little memory": (f"{MERGE} --base-model base --method iso_c --memory-budget 16MiB",),
    "two weights for three experts": ("merge math code base --output-dir out",),
    "slerp of three": ("merge math code base --method karcher --output-dir out",),
    "deltas without a base": (f"{MERGE} --space deltas --base-model base",),
    "a rule that divides a layer": (f"{MERGE} --block tensor --weight-rules 'q_proj=1,2'",),
    "a rank for a full model": (f"{ADAPTERS} --adapter-output adapter --adapter-rank 2",),
    "rows of one adapter apart": (f"{ADAPTERS} --block row --adapter-output merged",),
    "weight space for adapters": (f"{ADAPTERS} --space deltas --adapter-output adapter",),
    "one adapter without its base": ("merge x --base-model base --output-dir out",),
    "taking from what is no expert": (f"{MERGE} --take lm_head=2",),
    "an output folder in use": ("merge math code --output-dir base --overwrite",),
    "an interrupted merge": ("merge math code --output-dir torn --overwrite",),
    "a folder of checkpoints": ("merge math runs/checkpoint-10 --output-dir out",),
    "a model with an adapter as the base": (
        "merge x --base-model base --output-dir folded", "merge math code --base-model folded --output-dir out",
    ),
    "a model with a model on it": ("merge math base code --output-dir out",),
    "an index that leads outside": (
        lambda: shutil.copy("math/model.safetensors", "code/mine.safetensors"),
        write("code/model.safetensors.index.json", {"weight_map": dict.fromkeys(SHAPES, "mine.safetensors")}),
        MERGE,
    ),
    "an adapter of another base": (ADAPTERS,),
    "an adapter of another revision": (ADAPTERS,),
    "an adapter with a scale that is none": (config("y", lora_alpha=4), ADAPTERS),
    "a model and an adapter in one folder": (remove("y/model.safetensors"), ADAPTERS),
    "a licence that forbids it": (f"{MERGE} --allow-license cc-by-nd-4.0",),
    "a configuration with a misspelt key": (
        write("m.yaml", "experts: [math, code]\noutput_dir: out\n"), "merge m.yaml",
    ),
    "verify with one expert of two": ("verify merged --experts math --experts code",),
    "a reproduction with an unknown expert": ("reproduce merged --expert math=math",),
}  # fmt: skip


@pytest.mark.parametrize("name", ADVICE)
def test_the_advice_of_a_sentence_works(place: Path, name: str) -> None:
    for change in ROWS[name].wrong:
        change()
    for step in ADVICE[name]:
        if callable(step):
            step()
        else:
            result = click_runner().invoke(main, shlex.split(step))
            assert result.exit_code == 0, result.stderr


def test_the_configuration_that_is_given_for_one_of_mergekit_works(place: Path) -> None:
    row = ROWS["a configuration of mergekit"]
    lines = [line.strip() for line in row.sentence.split("\n") if line.startswith("    ")]
    Path("ours.yaml").write_text("\n".join(lines).replace('"merged"', '"out"'))
    assert click_runner().invoke(main, ["merge", "ours.yaml"]).exit_code == 0
