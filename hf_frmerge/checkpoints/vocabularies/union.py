"""Add the tokens of several tokenizers to one of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.checkpoints.vocabularies.tokenizer_file import TokenizerFile
from hf_frmerge.errors import CheckpointError


def union_ids(first: TokenizerFile, others: Sequence[TokenizerFile]) -> dict[str, int]:
    """Return the tokens of all: those of the first with its ids, then the others' in their order, after its last."""
    ids = dict(first.ids)
    following = max(ids.values(), default=-1) + 1
    for other in others:
        for token in sorted(other.ids, key=other.ids.__getitem__):
            if token not in ids:
                ids[token] = following
                following += 1
    return ids


def union_json(first: TokenizerFile, others: Sequence[TokenizerFile], ids: Mapping[str, int]) -> str:
    """
    Return the `tokenizer.json` of the first with the tokens of the others, under the ids of `union_ids`.

    Added tokens are added with their settings. Tokens that a model builds from smaller ones come with the merges that
    build them, after those of the first: so they apply only where those of the first have nothing left to join.

    Raises:
        CheckpointError: If the tokenizers library reads something else from it.
    """
    content: dict[str, Any] = copy.deepcopy(dict(first.content))
    model, added = content["model"], content.setdefault("added_tokens", [])
    for other in others:
        theirs = other.content["model"]
        for token in other.content.get("added_tokens", ()):
            if token["content"] not in first.ids and all(token["content"] != each["content"] for each in added):
                added.append({**token, "id": ids[token["content"]]})
        if "merges" in model:
            known = {_pair(merge) for merge in model["merges"]}
            as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
            for merge in theirs.get("merges", ()):
                pair = _pair(merge)
                if pair not in known and "".join(pair) not in first.ids:
                    known.add(pair)
                    model["merges"].append(" ".join(pair) if as_text else list(pair))
    # The library numbers added tokens after those of the model. With all of them among these, ids stay as they are.
    in_order = sorted(ids, key=ids.__getitem__)
    if isinstance(model["vocab"], list):
        scores = {
            entry[0]: entry[1] for other in (*reversed(others), first) for entry in other.content["model"]["vocab"]
        }
        lowest = min(scores.values(), default=0.0)
        model["vocab"] = [[token, scores.get(token, lowest)] for token in in_order]
    else:
        model["vocab"] = {token: ids[token] for token in in_order}
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    _check(text, ids, first, others)
    return text


def _check(text: str, ids: Mapping[str, int], first: TokenizerFile, others: Sequence[TokenizerFile]) -> None:
    from tokenizers import Tokenizer

    try:
        reason = "" if Tokenizer.from_str(text).get_vocab() == ids else "some tokens would get other ids"
    except Exception as error:  # the library raises this class itself
        reason = str(error)
    if reason:
        named = some(repr(each.source.spec) for each in (first, *others))
        raise CheckpointError(
            f"The tokenizers of {named} cannot be joined into one: {reason}. Take the tokens of one of the models: "
            "--tokenizer-source base, or an expert (tokenizer_source)."
        )


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Return the two parts of a merge, which old files write as one text."""
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first, second
