"""One sentence on what became of the tokens of a merge whose models do not have the same."""

from __future__ import annotations

from hf_frmerge.merging.planning.vocabulary.record import VocabularyRecord


def vocabulary_sentence(record: VocabularyRecord) -> str:
    """Say how many tokens the output has, and how many of them were filled in for a model, or left out of it."""
    parts = [f"by token in {len(record.tensors)} tensors"]
    filled = [f"{model.n_filled} for {model.spec}" for model in record.models if model.n_filled]
    dropped = [f"{model.n_dropped} of {model.spec}" for model in record.models if model.n_dropped]
    details = [f"filled in {', '.join(filled)}"] if filled else []
    details += [f"left out {', '.join(dropped)}"] if dropped else []
    details += [f"{record.n_padding} rows of padding added"] if record.n_padding else []
    whose = f"expert {record.source}" if record.source.isdigit() else record.source
    counts = f"{record.n_tokens} in {record.n_rows} rows ({whose})"
    return f"Tokens: {', '.join([counts, *parts])}{'; ' if details else ''}{'; '.join(details)}."
