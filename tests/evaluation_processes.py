"""Started by torchrun from test_two_processes.py: evaluates merges on two processes and writes what every rank got."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import load_dataset

from hf_frmerge import FisherRaoMerger, MergingArguments


def evaluate(folder: Path, output: Path) -> dict[str, Any]:
    """Merge and evaluate a family of language models and one of classifiers; return all numbers."""
    actual: dict[str, Any] = {}
    predictions: dict[str, Any] = {}
    for kind in ("models", "classifiers"):

        def keep(prediction: Any, kind: str = kind) -> dict[str, float]:
            values, labels = prediction
            if kind == "models":  # what is predicted of padding depends on how much there is, as with Trainer
                values = np.where(labels == -100, -100, values)
            predictions[kind] = [values.tolist(), labels.tolist()]
            return {"n": len(prediction.label_ids)}

        streamed = load_dataset("json", data_files=str(folder / f"{kind}.jsonl"), split="train", streaming=True)
        merger = FisherRaoMerger(
            [str(folder / kind / name) for name in ("math", "code")],
            MergingArguments(
                output_dir=str(output / kind),
                disable_tqdm=True,
                use_cpu=True,
                per_device_eval_batch_size=2,
                eval_packing=False,
            ),
            base_model=str(folder / kind / "base"),
            eval_dataset=streamed,
            compute_metrics=keep,
            preprocess_logits_for_metrics=(lambda logits, labels: logits.argmax(-1)) if kind == "models" else None,
        ).merge()
        metrics = merger.evaluate()
        speed = ("runtime", "per_second")
        actual[kind] = {
            "metrics": {name: value for name, value in metrics.items() if not name.endswith(speed)},
            "record": merger.evaluation.to_dict(),
            "predictions": predictions[kind],
        }
        actual[kind]["record"]["settings"].pop("n_processes", None)
    return actual


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    assert state.num_processes == 2, "a test of two processes that runs on one proves nothing"
    actual = evaluate(folder, folder / "two")
    (folder / f"rank{state.process_index}.json").write_text(json.dumps(actual))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
