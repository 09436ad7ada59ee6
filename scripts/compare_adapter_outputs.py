"""
Merge the demo's adapters into every kind of output and compare what the models compute, in float32.

    python scripts/compare_adapter_outputs.py

An adapter of the summed ranks, the same recompressed to full rank, and a full model are one function up to rounding;
an adapter cut to rank 4 is not, and the merge says by how much. Needs the demo's base model (scripts/quickstart.sh).
Measured: largest difference of a logit 6.5e-5 for the first three (logits lie between -32 and 40), 2.3 at rank 4.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_frmerge import FisherRaoMerger, MergingArguments, ProgressCallback
from hf_frmerge.demo.base import base_model_dir
from hf_frmerge.demo.texts import expert_dirs, load_texts

OUTPUTS: dict[str, dict[str, Any]] = {
    "full model": {"adapter_output": "merged"},
    "adapter, exact (rank 12)": {"adapter_output": "adapter"},
    "adapter, recompressed to rank 12": {"adapter_output": "adapter", "adapter_rank": 12},
    "adapter, recompressed to rank 4": {"adapter_output": "adapter", "adapter_rank": 4},
}


def main() -> None:
    base, experts = str(base_model_dir()), [str(folder) for folder in expert_dirs().values()]
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(load_texts()["austen"][:1500], return_tensors="pt").input_ids
    reference = None
    print("| output | truncation error, of the deltas' norm | largest difference of a logit | same top token |")
    print("|---|---:|---:|---:|")
    for name, options in OUTPUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            args = MergingArguments(output_dir=str(Path(folder) / "out"), dtype="float32", **options)
            merger = FisherRaoMerger(experts, args, base_model=base)
            merger.remove_callback(ProgressCallback)
            merger.merge()
            if options["adapter_output"] == "merged":
                model = AutoModelForCausalLM.from_pretrained(args.output_dir, dtype=torch.float32)
            else:
                model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
                model = PeftModel.from_pretrained(model, args.output_dir)
            with torch.inference_mode():
                logits = model.eval()(ids).logits
        reference = logits if reference is None else reference
        difference = (logits - reference).abs().max().item()
        agreement = (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()
        error = merger.report.get("truncation_error", 0.0)
        print(f"| {name} | {error:.3g} | {difference:.2g} | {agreement:.1%} |", flush=True)
    print(f"\n{ids.shape[1]} tokens; logits lie between {reference.min():.0f} and {reference.max():.0f}.")


if __name__ == "__main__":
    main()
