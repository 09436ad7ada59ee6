"""Started by torchrun from test_loop.py: evaluates on two processes and writes what every rank got."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from accelerate import Accelerator
from transformers import LlamaForCausalLM

from hf_frmerge.evaluation.loop import evaluate_causal_lm


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2, "a test of two processes that runs on one proves nothing"
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    streams = json.loads((folder / "streams.json").read_text())
    results = [
        dataclasses.asdict(
            evaluate_causal_lm(
                model, None, [{"input_ids": stream}], batch_size=4, block_size=8, accelerator=accelerator
            )
        )
        for stream in streams
    ]
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(results))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
