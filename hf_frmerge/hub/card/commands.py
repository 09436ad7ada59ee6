"""Code a reader can run: the command and the Python that repeat a merge, and the lines that load its result.

Nothing here may carry a local path or a secret into a public card.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from hf_frmerge.hub.card.data import CardSource, MergeCard
from hf_frmerge.hub.card.private_paths import hide_local_paths
from hf_frmerge.merging.arguments.result_options import is_about_the_result

# Arguments that change no bit of the result, but without which it might not be made.
_NEEDED = ("strict", "allow_license")


def result_arguments(card: MergeCard) -> dict[str, object]:
    """Non-default arguments that decide the result, with local paths hidden; never a token."""
    return {
        name: _hide(value, card.sources)
        for name, value in card.non_default_arguments.items()
        if is_about_the_result(name)
    }


def reproduce_command(card: MergeCard) -> str:
    """Shell command that repeats the merge, one option a line."""
    if card.command is not None:
        return hide_local_paths(card.command, card.sources)
    parts = [*(shlex.quote(source.pinned) for source in card.experts)]
    weights = _weights(card)
    if weights:
        parts.append(f"--weights {','.join(map(repr, weights))}")
    if card.base is not None:
        parts.append(f"--base-model {shlex.quote(card.base.pinned)}")
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
    """Shell command that makes a pushed merge again from its record; local sources are to be put beside it."""
    parts = [f"frmerge reproduce {card.hub_model_id}"]
    parts += [f"--expert {shlex.quote(f'{s.name}={s.pinned}')}" for s in card.sources if s.repo_id is None]
    return " \\\n    ".join(parts)


def verify_command(card: MergeCard, folder: str) -> str:
    """Shell command that checks a merge; it needs to be told where the experts are if one of them is local."""
    parts = [f"frmerge verify {card.hub_model_id or shlex.quote(folder)}"]
    if any(source.repo_id is None for source in card.experts):
        parts += [f"--experts {shlex.quote(source.pinned)}" for source in card.experts]
    if card.base is not None and card.base.repo_id is None:
        parts.append(f"--base-model {shlex.quote(card.base.pinned)}")
    return " \\\n    ".join(parts)


def reproduce_python(card: MergeCard) -> str:
    """Python that repeats the merge."""
    if card.python is not None:
        return hide_local_paths(card.python, card.sources)
    experts = "".join(f"        {_literal(source.pinned)},\n" for source in card.experts)
    arguments = {"output_dir": "merged", **result_arguments(card)}
    listed = "".join(f"        {name}={_literal(value)},\n" for name, value in arguments.items())
    weights = _weights(card)
    lines = [
        "from hf_frmerge import FisherRaoMerger, MergingArguments",
        "",
        "FisherRaoMerger(",
        f"    experts=[\n{experts}    ],",
        *([f"    weights={weights},"] if weights else []),
        *([f"    base_model={_literal(card.base.pinned)},"] if card.base is not None else []),
        f"    args=MergingArguments(\n{listed}    ),",
        ").merge()",
    ]
    return "\n".join(lines)


def usage_python(card: MergeCard) -> str:
    """Python that loads the merged model, and for a text generator writes a first sentence with it."""
    model_id = card.hub_model_id or f"./{card.model_name}"
    if card.task.library_name == "sentence-transformers":
        return (
            "from sentence_transformers import SentenceTransformer\n\n"
            f'model = SentenceTransformer("{model_id}")\n'
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
    code = f'{imports}\n\nmodel = {auto_class}.from_pretrained("{model_id}")\n'
    code += f'tokenizer = AutoTokenizer.from_pretrained("{tokenizer_id}")'
    if card.task.pipeline_tag == "text-generation":
        code += (
            '\ninputs = tokenizer("Once upon a time", return_tensors="pt")\n'
            "output = model.generate(**inputs, max_new_tokens=40)\n"
            "print(tokenizer.decode(output[0], skip_special_tokens=True))"
        )
    return code


def _weights(card: MergeCard) -> list[float]:
    """Weights of the experts in order; empty where they are not known or all alike, which is the default."""
    weights = [source.weight for source in card.experts if source.weight is not None]
    return weights if len(weights) == len(card.experts) and len(set(weights)) > 1 else []


def _literal(value: object) -> str:
    """Python literal of `value`, strings in double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)


def _hide(value: object, sources: Sequence[CardSource]) -> object:
    if isinstance(value, str):
        return hide_local_paths(value, sources)
    if isinstance(value, list | tuple):
        return [_hide(item, sources) for item in value]
    return value
