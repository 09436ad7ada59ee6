"""Started by torchrun: evaluates on two processes and writes what every rank got."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import LlamaForCausalLM

from hf_frmerge.evaluation.suite.settings import ModelSet, RunSettings, SuiteOptions
from hf_frmerge.evaluation.suite.suite import evaluate_suite
from hf_frmerge.evaluation.text.forward import evaluate_causal_lm


def evaluate_streams(folder: Path, accelerator: Accelerator) -> list[dict[str, Any]]:
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    streams = json.loads((folder / "streams.json").read_text())
    options = {"batch_size": 4, "block_size": 8, "accelerator": accelerator}
    return [
        dataclasses.asdict(evaluate_causal_lm(model, None, [{"input_ids": stream}], **options)) for stream in streams
    ]


def evaluate_suites(folder: Path, accelerator: Accelerator) -> list[dict[str, Any]]:
    arguments = json.loads((folder / "suite.json").read_text())
    models, run = ModelSet(**arguments["models"]), RunSettings(accelerator, folder / "cache")
    return [
        evaluate_suite(models, arguments["domains"], SuiteOptions(**options), run).to_dict()
        for options in arguments["options"]
    ]


def main(what: str, folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2, "a test of two processes that runs on one proves nothing"
    results = {"streams": evaluate_streams, "suites": evaluate_suites}[what](folder, accelerator)
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(results))
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
