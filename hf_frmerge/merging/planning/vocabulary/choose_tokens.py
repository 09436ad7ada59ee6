"""Decide whose tokens and settings the output gets, and say what that does to the rows of embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from xxhash import xxh3_128

from hf_frmerge.checkpoints.alignment.token_rows import TokenRows, TokenTable
from hf_frmerge.checkpoints.beside.disagreements import VOCABULARIES
from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.checkpoints.tensors.small_files import read_file
from hf_frmerge.checkpoints.vocabularies.choice import TokenChoice
from hf_frmerge.checkpoints.vocabularies.tokenizer_file import (
    TokenizerFile,
    check_ids,
    check_same_spelling,
    read_tokenizer,
)
from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.merging.planning.vocabulary.record import ModelTokens, VocabularyRecord

if TYPE_CHECKING:
    from hf_frmerge.checkpoints.alignment.align import AlignedTensor
    from hf_frmerge.checkpoints.resolve import Source
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.planning.plan import Expert

BASE, UNION = "base", "union"

FILLED = "they get the weighted mean of the rows of the experts that have them, else the row of the base"

_ADAPTER = (
    "Rows are matched by token between full models, and {adapter!r} is an adapter that changes them, or that has "
    "other tokens than its base. Add it to its base first, with the tokens it was trained with:\n"
    "    from peft import PeftModel\n"
    "    from transformers import AutoModelForCausalLM, AutoTokenizer  # or the class you use\n"
    '    tokenizer = AutoTokenizer.from_pretrained("{adapter}")  # or that of its base\n'
    '    model = AutoModelForCausalLM.from_pretrained("ITS BASE MODEL")\n'
    "    if len(tokenizer) > model.get_input_embeddings().num_embeddings:\n"
    "        model.resize_token_embeddings(len(tokenizer))\n"
    '    PeftModel.from_pretrained(model, "{adapter}").merge_and_unload().save_pretrained("with-adapter")\n'
    '    tokenizer.save_pretrained("with-adapter")'
)


def with_model_numbers(args: MergingArguments, experts: Sequence[Source], base: Source | None) -> MergingArguments:
    """
    Return the arguments with experts that options name called by their number, which holds wherever they lie.

    Raises:
        ArgumentError: If an option names no model of the merge, or there is no base model.
    """
    source, settings = args.tokenizer_source, args.settings_from
    if args.pad_to_multiple_of is not None and source is None:
        raise ArgumentError(
            "`pad_to_multiple_of` is about the rows of the tokens that `tokenizer_source` chooses: set that, too "
            "(--tokenizer-source base, union or an expert)."
        )
    if source not in (None, UNION):
        source = _number("tokenizer_source", source, experts, base)
    if settings is not None:
        settings = _number("settings_from", settings, experts, base)
    if (source, settings) == (args.tokenizer_source, args.settings_from):
        return args
    return replace(args, tokenizer_source=source, settings_from=settings)


def choose_tokens(args: MergingArguments, experts: Sequence[Expert], base: Expert | None) -> TokenChoice | None:
    """
    Read the tokenizers of the models, and choose the tokens and the settings of the output.

    Args:
        args: Options, from `with_model_numbers`.
        experts: Experts of the merge.
        base: Base model.

    Returns:
        `TokenChoice`, *optional*: None if neither was asked for.

    Raises:
        CheckpointError: If an adapter has other tokens than its base, a model has no tokenizer, or tokenizers cannot
            be compared or joined.
    """
    source = args.tokenizer_source
    settings = _model(args.settings_from, experts, base) if args.settings_from is not None else None
    full = full_models(experts, base)
    if source is None:
        donor = _full_source(full[0]) if full else None
        return _same_tokens(donor, settings) if settings is not None else None
    tokenizers = {_full_source(model): _tokenizer_of(model, base) for model in full}
    for expert in experts:
        if expert.adapter is not None:
            _refuse_other_tokens(expert, base)
    first, *others = tokenizers.values()
    holder = first if source in (BASE, UNION) else tokenizers.get(_model(source, experts, base), first)
    for tokenizer in tokenizers.values():
        check_ids(tokenizer)
        check_same_spelling(holder, tokenizer)
    output, joined = dict(holder.ids), None
    if source == UNION:
        from hf_frmerge.checkpoints.vocabularies.union import union_ids, union_json  # on use: few merges join tokens

        output = union_ids(first, others)
        joined = union_json(first, others, output) if len(output) > len(first.ids) else None
    return TokenChoice(holder.source, settings or holder.source, tokenizers, output, joined, is_aligned=True)


def full_models(experts: Sequence[Expert], base: Expert | None) -> list[Expert]:
    """Return the full models of a merge as they are aligned: the base first if there is one."""
    return [model for model in (base, *experts) if model is not None and model.checkpoint is not None]


def token_table(choice: TokenChoice | None, models: Sequence[Expert], args: MergingArguments) -> TokenTable | None:
    """Return the ids by which the rows of full models are matched, the base first; None if they are not."""
    if choice is None or not choice.is_aligned:
        return None
    sources = [_full_source(model) for model in models]
    ids = tuple(choice.tokenizers[source].ids for source in sources)
    return TokenTable(choice.output, ids, sources.index(choice.holder), args.pad_to_multiple_of or 1)


def refuse_taken_rows(taken: Iterable[AlignedTensor], rows: TokenRows | None) -> None:
    """Raise `ArgumentError` if a tensor that is taken from one model has rows for the tokens of that model."""
    for tensor in taken:
        if rows is not None and tensor.shape and tensor.shape[0] in (*rows.stored, rows.n_rows):
            raise ArgumentError(
                f"`take` has {tensor.name}, {list(tensor.shape)}, whose rows are for the tokens of one model, and the "
                f"output has {rows.n_rows} rows by `tokenizer_source`. Rows that are taken are not matched: leave it "
                "out of `take`, and it is merged by token."
            )


def record_vocabulary(
    choice: TokenChoice, rows: TokenRows, models: Sequence[Expert], args: MergingArguments
) -> VocabularyRecord:
    """Return what was made of the vocabularies of full models, the base first if there is one."""
    tokens = []
    for model, n_stored, n_filled in zip(models, rows.stored, rows.filled):
        own = choice.tokenizers[_full_source(model)].ids
        dropped = [token for token in own if token not in choice.output]
        tokens.append(ModelTokens(model.spec, len(own), n_stored, n_filled, len(dropped), tuple(dropped[:3])))
    source, n_tokens = str(args.tokenizer_source), len(choice.output)
    return VocabularyRecord(source, n_tokens, rows.n_rows, rows.unfilled, rows.tensors, tuple(tokens))


def vocabulary_notes(record: VocabularyRecord, choice: TokenChoice) -> list[str]:
    """Say which rows were matched, filled, added and left out."""
    notes = [
        f"{some(record.tensors)} are merged token by token: {record.n_tokens} tokens in {record.n_rows} rows "
        f"(tokenizer_source={record.source})."
    ]
    for model in record.models:
        if model.n_filled:
            notes.append(
                f"{model.spec!r} lacks {model.n_filled} of these tokens ({model.n_tokens} tokens, {model.n_rows} "
                f"rows): {FILLED}."
            )
        if model.n_dropped:
            more = model.n_dropped - len(model.dropped)
            named = ", ".join(map(repr, model.dropped)) + (f" and {more} more" if more else "")
            notes.append(f"{model.n_dropped} tokens of {model.spec!r} are left out, with their rows: {named}.")
        elif model.n_rows > record.n_rows:
            notes.append(f"{model.spec!r} has {model.n_rows} rows; those beyond {record.n_rows} have no token.")
    if record.n_padding:
        notes.append(f"{record.n_padding} rows that no model has hold the mean of all rows of {record.donor!r}.")
    if choice.tokenizer_json is not None:
        notes.append(
            f"The tokenizer is that of {choice.holder.spec!r} with the tokens that others have and it has not. Where "
            "these apply, texts are cut as by none of the models alone."
        )
    return notes


def refuse_comparison(args: MergingArguments) -> None:
    """Raise `ArgumentError` if the merged model is to be compared with experts that have other tokens."""
    if args.evaluate_experts and (args.do_eval or args.eval_on_start):
        raise ArgumentError(
            "`evaluate_experts` compares outputs over one vocabulary, and the models have different ones. Set "
            "evaluate_experts=False, or evaluate each model by itself."
        )


def row_maps_digest(models: Sequence[Expert]) -> str:
    """Return a digest of how the rows of all models are mapped."""
    digest = xxh3_128()
    for model in models:
        for name, rows in sorted(model.weights.row_maps.items()):
            digest.update(name.encode() + b"\0" + rows.astype("<i8").tobytes())
    return digest.hexdigest()


def _same_tokens(donor: Source | None, settings: Source) -> TokenChoice:
    """Return the choice of a model's settings where all have the same tokens: its tokenizer comes with them."""
    ours, theirs = (read_tokenizer(source) if source is not None else None for source in (donor, settings))
    if donor is None or settings == donor:
        own = {settings: theirs} if theirs is not None else {}
        return TokenChoice(settings, settings, own, theirs.ids if theirs is not None else {})
    if ours is not None and theirs is not None:
        if ours.ids != theirs.ids:
            raise CheckpointError(
                f"{settings.spec!r} and {donor.spec!r}, whose config the output gets, have different tokens "
                f"({len(theirs.ids)} and {len(ours.ids)}), so the settings of one do not fit the rows of the other. "
                "Choose whose tokens the output gets, too: --tokenizer-source base, union or an expert "
                "(tokenizer_source)."
            )
        return TokenChoice(settings, settings, {donor: ours, settings: theirs}, theirs.ids)
    held = [name for name in VOCABULARIES if any(open_folder(each.path).exists(name) for each in (donor, settings))]
    of_donor, of_settings = ([_content(each, name) for name in held] for each in (donor, settings))
    if not any(of_settings):
        return TokenChoice(donor, settings, {donor: ours} if ours else {}, ours.ids if ours else {})
    if any(of_donor) and of_donor != of_settings:
        raise CheckpointError(
            f"The tokenizers of {settings.spec!r} and {donor.spec!r} are stored in formats that cannot be compared "
            f"({some(held)}). Load each with `AutoTokenizer.from_pretrained` and `save_pretrained` it into its folder."
        )
    return TokenChoice(settings, settings, {settings: theirs} if theirs else {}, theirs.ids if theirs else {})


def _content(source: Source, name: str) -> bytes:
    folder = open_folder(source.path)
    return read_file(folder, name, source.spec) if folder.exists(name) else b""


def _number(option: str, name: str, experts: Sequence[Source], base: Source | None) -> str:
    specs = [expert.spec for expert in experts]
    if name == BASE or (base is not None and name == base.spec and name not in specs):
        if base is None:
            raise ArgumentError(f"`{option}=base` needs a base model (--base-model). Or name an expert.")
        return BASE
    short = [expert.repo_id or Path(expert.path).name for expert in experts]
    numbers = [str(index + 1) for index in range(len(experts))]
    for names in (specs, numbers, short):
        if name in names:
            return numbers[names.index(name)]
    choices = [*(["base"] if base else []), *(["union"] if option == "tokenizer_source" else []), *specs]
    raise ArgumentError(
        f"`{option}={name}` names no model of this merge: expected one of {', '.join(choices)}, or the number of an "
        "expert in the list."
    )


def _model(number: str, experts: Sequence[Expert], base: Expert | None) -> Source:
    if number == BASE:
        assert base is not None
        return _full_source(base)
    return _full_source(experts[int(number) - 1])


def _full_source(model: Expert) -> Source:
    """Return the folder that has the tokenizer: of a model with an adapter on it, that of the model."""
    return model.source.parts[0]


def refuse_changed_rows(experts: Sequence[Expert], rows: TokenRows | None) -> None:
    """Raise if an adapter changes rows that are matched by token: its own are those of the base."""
    matched = set(rows.tensors) if rows is not None else set()
    for expert in experts:
        adapter = expert.adapter
        if adapter is not None and not matched.isdisjoint([*adapter.deltas, *adapter.dense]):
            raise CheckpointError(_ADAPTER.format(adapter=expert.spec))


def _tokenizer_of(model: Expert, base: Expert | None) -> TokenizerFile:
    """Return the tokenizer beside a model; an adapter that has none has that of its base."""
    own = read_tokenizer(_full_source(model))
    if own is None and model.source.kind == "adapter" and base is not None:
        return _tokenizer(base.source)
    return own if own is not None else _tokenizer(_full_source(model))


def _refuse_other_tokens(adapter: Expert, base: Expert | None) -> None:
    """Raise if an adapter was trained with other tokens than its base has."""
    own = read_tokenizer(adapter.source)
    if base is None or (own is not None and own.ids != _tokenizer(base.source).ids):
        raise CheckpointError(_ADAPTER.format(adapter=adapter.spec))


def _tokenizer(source: Source) -> TokenizerFile:
    tokenizer = read_tokenizer(source)
    if tokenizer is None:
        raise CheckpointError(
            f"{source.spec!r} has no tokenizer.json, so its rows cannot be matched by token. If it has a tokenizer in "
            "another format, load it with `AutoTokenizer.from_pretrained` and `save_pretrained` it there; else save "
            "the one it was trained with beside it."
        )
    return tokenizer
