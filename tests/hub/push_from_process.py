"""Merge two experts and push the result: run by test_push_processes.py under torchrun, and once to be killed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

RANK = os.environ.get("RANK", "0")
os.environ["HF_HUB_USER_AGENT_ORIGIN"] = f"rank{RANK}"  # read when huggingface_hub is imported; told with each request

from hf_frmerge import FisherRaoMerger, MergingArguments  # noqa: E402


def main(root: Path, token: str) -> None:
    args = MergingArguments(output_dir=str(root / "out"), disable_tqdm=True, hub_token=token, overwrite=True)
    merger = FisherRaoMerger([str(root / "e0"), str(root / "e1")], args).merge()
    info = merger.push_to_hub("alice/from-processes")
    seen = {"n_processes": merger.processes.size, "commit": info and info.oid}
    (root / f"rank{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
