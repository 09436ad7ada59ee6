"""Merge two experts and push the result: run by test_push_processes.py under torchrun, and once to be killed."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

RANK = os.environ.get("RANK", "0")
os.environ["HF_HUB_USER_AGENT_ORIGIN"] = f"rank{RANK}"  # read when huggingface_hub is imported; told with each request

from hf_frmerge import FisherRaoMerger, MergingArguments  # noqa: E402
from hf_frmerge.errors import MergeError  # noqa: E402


def main(root: Path, token: str, experts: list[str]) -> None:
    args = MergingArguments(output_dir=str(root / "out"), disable_tqdm=True, hub_token=token, overwrite=True)
    merger = FisherRaoMerger(experts, args)
    seen = {"n_processes": merger.processes.size}
    if RANK == "1" and (root / "wait").exists():
        while not (root / "go").exists():
            time.sleep(0.05)
    try:
        info = merger.merge().push_to_hub("alice/from-processes")
        seen["commit"] = info and info.oid
    except MergeError as error:
        seen["error"] = str(error)
    (root / f"rank{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
