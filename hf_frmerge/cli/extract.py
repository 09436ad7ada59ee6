"""`frmerge extract-lora`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from hf_frmerge.cli.command import FrmergeCommand, pickle_option, results_only
from hf_frmerge.errors import ArgumentError


@click.command("extract-lora", cls=FrmergeCommand)
@click.argument("model")
@click.option("--base-model", required=True, metavar="MODEL", help="Model the adapter will be loaded on.")
@click.option("--output-dir", required=True, metavar="DIR", help="Folder the adapter is written to.")
@click.option("--rank", type=int, default=16, show_default=True, help="Largest rank of a module.")
@click.option(
    "--energy",
    type=float,
    help="Choose for every module the lowest rank, up to --rank, that keeps this share of the squared norm.",
)
@click.option(
    "--correction",
    is_flag=True,
    help="Take the factors that a fit added to MODEL (merge --calibration, --calibration-form low_rank). The base "
    "model is then the same merge without calibration.",
)
@click.option(
    "--target-modules",
    multiple=True,
    metavar="NAME",
    help="Last name of a module to adapt, such as q_proj; give it once per module. Default: all linear layers but the "
    "output layer.",
)
@pickle_option
@click.option("--overwrite", is_flag=True, help="Write into an output folder that is not empty.")
@click.option("--json", "as_json", is_flag=True, help="Print ranks and errors as JSON.")
def extract_lora(
    model: str,
    base_model: str,
    output_dir: str,
    rank: int,
    energy: float | None,
    correction: bool,
    target_modules: tuple[str, ...],
    allow_pickle: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """
    Turn a fine-tuned or merged MODEL into a LoRA adapter of its base.

    Prints how much of the difference to the base the adapter does not hold.
    """
    with results_only():
        from hf_frmerge.checkpoints.resolve import resolve_all
        from hf_frmerge.checkpoints.tensors.reader import open_checkpoint
        from hf_frmerge.extraction.extract_lora import ExtractOptions
        from hf_frmerge.extraction.extract_lora import extract_lora as extract

        sources = resolve_all([model, base_model], allow_pickle=allow_pickle)
        # Both are checked before a checkpoint is opened: an adapter has no dense weights to subtract.
        for source in sources:
            if source.kind != "full":
                raise ArgumentError(f"{source.spec!r} is an adapter already; a full checkpoint is needed.")
        with open_checkpoint(sources[0]) as merged, open_checkpoint(sources[1]) as base:
            options = ExtractOptions(
                rank=rank, energy=energy, correction=correction, target_modules=list(target_modules) or None
            )
            extracted = extract(merged, base, output_dir, options, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps({**asdict(extracted), "output_dir": output_dir, "error": extracted.error}, indent=2))
        return
    from hf_frmerge.cli.render.merges import print_extracted

    print_extracted(extracted)


COMMANDS = {"extract-lora": extract_lora}
