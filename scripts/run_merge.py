#!/usr/bin/env python
"""
Merge fine-tuned language models, evaluate the result and push it, in the style of the transformers examples.

    python scripts/run_merge.py \
        --experts org/math org/code ./lora-chat \
        --weights 0.5 0.3 0.2 \
        --base_model org/base \
        --method karcher \
        --output_dir merged \
        --do_eval --eval_files heldout/math.txt heldout/code.txt \
        --push_to_hub --hub_model_id me/merged

Every option may stand in a YAML or JSON file instead, given as the only argument:

    python scripts/run_merge.py merge.yml

The options are the fields of `ExpertArguments`, `MergingArguments` and `DataArguments`; `--help` lists them. Paths are
relative to the working directory.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from hf_frmerge import ExpertArguments, FisherRaoMerger, MergingArguments


@dataclass
class DataArguments:
    """What to evaluate on."""

    eval_files: list[str] | None = field(
        default=None,
        metadata={"help": "Text files to evaluate on; each is reported under its name without the ending."},
    )


def main() -> None:
    parser = HfArgumentParser((ExpertArguments, MergingArguments, DataArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        expert_args, merging_args, data_args = parser.parse_yaml_file(sys.argv[1])
    elif len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        expert_args, merging_args, data_args = parser.parse_json_file(sys.argv[1])
    else:
        expert_args, merging_args, data_args = parser.parse_args_into_dataclasses()
    if merging_args.do_eval and not data_args.eval_files:
        parser.error("--do_eval needs --eval_files: the texts to evaluate on")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")

    texts = {Path(file).stem: [Path(file).read_text(encoding="utf-8")] for file in data_args.eval_files or []}
    merger = FisherRaoMerger(
        experts=expert_args.experts,
        args=merging_args,
        weights=expert_args.weights,
        base_model=expert_args.base_model,
        eval_dataset=texts or None,
    ).merge()
    if merging_args.push_to_hub:
        merger.push_to_hub()


if __name__ == "__main__":
    main()
