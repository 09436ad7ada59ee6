"""Code samples of a model card: the command and the Python code that repeat a merge, and code that loads the result.

Cards are public: no sample may contain a local path or a secret.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from hf_frmerge.hub.card.data import CardSource, MergeCard
from hf_frmerge.hub.card.private_paths import hide_local_paths
from hf_frmerge.merging.arguments.calibration import SELF_WRITTEN
from hf_frmerge.merging.arguments.result_options import is_about_the_result
from hf_frmerge.merging.planning.corrections import CalibrationRecord


def result_arguments(card: MergeCard) -> dict[str, object]:
    """Return the non-default arguments that affect the result, with local paths shortened; a token is never one."""
    return {
        name: _hide_paths(value, card.parts)
        for name, value in card.non_default_arguments.items()
        if is_about_the_result(name)
    }


def reproduce_command(card: MergeCard) -> str:
    """Return a shell command that repeats the merge, one option a line."""
    if card.command is not None:
        return hide_local_paths(card.command, card.parts)
    parts = [*(shlex.quote(source.pinned) for source in card.experts)]
    weights = _weights(card)
    if weights:
        parts.append(f"--weights {','.join(map(repr, weights))}")
    if card.base is not None:
        parts.append(f"--base-model {shlex.quote(card.base.pinned)}")
    if card.calibration is not None:
        parts.append(f"--calibration {_prompts(card.calibration)}")
    parts.append("--output-dir merged")
    for name, value in result_arguments(card).items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, list | tuple) else [value]
            parts.extend(f"--{option} {shlex.quote(str(item))}" for item in values)
    return " \\\n    ".join(["frmerge merge", *parts])


def again_command(card: MergeCard) -> str:
    """Return a `frmerge reproduce` command; it takes local sources from the current folder, under their own names."""
    parts = [f"frmerge reproduce {shlex.quote(str(card.hub_model_id))}"]
    parts += [f"--expert {shlex.quote(f'{s.name}={s.pinned}')}" for s in card.sources if s.is_local]
    return " \\\n    ".join(parts)


def install_command(card: MergeCard) -> str:
    """Return the command that installs this tool, in the version that made the merge."""
    version = card.versions.get("hf_frmerge")
    return f"pip install {shlex.quote(f'hf_frmerge=={version}' if version else 'hf_frmerge')}"


def verify_command(card: MergeCard, folder: str) -> str:
    """Return a `frmerge verify` command; with a local expert it lists all experts, as a reader has to supply them."""
    parts = [f"frmerge verify {shlex.quote(card.hub_model_id or folder)}"]
    if any(source.is_local for source in card.experts):
        parts += [f"--experts {shlex.quote(source.pinned)}" for source in card.experts]
    if card.base is not None and card.base.repo_id is None:
        parts.append(f"--base-model {shlex.quote(card.base.pinned)}")
    return " \\\n    ".join(parts)


def reproduce_python(card: MergeCard) -> str:
    """Return Python code that repeats the merge."""
    if card.python is not None:
        return hide_local_paths(card.python, card.parts)
    experts = "".join(f"        {_literal(source.pinned)},\n" for source in card.experts)
    arguments = {"output_dir": "merged", **result_arguments(card)}
    argument_lines = "".join(f"        {name}={_literal(value)},\n" for name, value in arguments.items())
    weights = _weights(card)
    prompts = _prompts(card.calibration) if card.calibration is not None else None
    lines = [
        "from hf_frmerge import FisherRaoMerger, MergingArguments",
        "",
        "FisherRaoMerger(",
        f"    experts=[\n{experts}    ],",
        *([f"    weights={weights},"] if weights else []),
        *([f"    base_model={_literal(card.base.pinned)},"] if card.base is not None else []),
        f"    args=MergingArguments(\n{argument_lines}    ),",
        *([f"    calibration_dataset={_literal(prompts)},"] if prompts else []),
        ").merge()",
    ]
    return "\n".join(lines)


def _prompts(calibration: CalibrationRecord) -> str:
    """Return what stands for the prompts: those from files are not in the record, only their digest."""
    return calibration.source if calibration.source in SELF_WRITTEN else "PROMPTS.jsonl"


def usage_python(card: MergeCard) -> str:
    """Return Python code that loads the merged model, and generates some text if it is a text generator."""
    model_id = card.hub_model_id or f"./{card.model_name}"
    if card.task.library_name == "sentence-transformers":
        return (
            "from sentence_transformers import SentenceTransformer\n\n"
            f"model = SentenceTransformer({_literal(model_id)})\n"
            'embeddings = model.encode(["A first sentence.", "A second one."])'
        )
    library, auto_class = "transformers", card.task.auto_class
    tokenizer_id = model_id
    if card.output_kind == "adapter":
        library, auto_class = "peft", auto_class.replace("AutoModel", "AutoPeftModel")
        tokenizer_id = card.base.pinned.partition("@")[0] if card.base is not None else model_id
    imports = (
        f"from transformers import {auto_class}, AutoTokenizer"
        if library == "transformers"
        else f"from peft import {auto_class}\nfrom transformers import AutoTokenizer"
    )
    code = f"{imports}\n\nmodel = {auto_class}.from_pretrained({_literal(model_id)})\n"
    code += f"tokenizer = AutoTokenizer.from_pretrained({_literal(tokenizer_id)})"
    if card.task.pipeline_tag == "text-generation":
        code += (
            '\ninputs = tokenizer("Once upon a time", return_tensors="pt")\n'
            "output = model.generate(**inputs, max_new_tokens=40)\n"
            "print(tokenizer.decode(output[0], skip_special_tokens=True))"
        )
    return code


def _weights(card: MergeCard) -> list[float]:
    """Return the weights of the experts in order; empty if unknown or all equal, which is the default."""
    weights = [source.weight for source in card.experts if source.weight is not None]
    return weights if len(weights) == len(card.experts) and len(set(weights)) > 1 else []


def _literal(value: object) -> str:
    """Format `value` as a Python literal, strings in double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)


def _hide_paths(value: object, sources: Sequence[CardSource]) -> object:
    """Shorten local paths in an argument's value, which may be a string or a list."""
    if isinstance(value, str):
        return hide_local_paths(value, sources)
    if isinstance(value, list | tuple):
        return [_hide_paths(item, sources) for item in value]
    return value
