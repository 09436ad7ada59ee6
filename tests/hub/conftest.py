from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for card_examples

from card_examples import full
from merge_reference import random_model, write_family, write_model

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.hub.card.card import write_card


@pytest.fixture(scope="session")
def merged_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experts")
    _, experts = write_family(root, n=2, dtype=torch.bfloat16)
    args = MergingArguments(output_dir=str(root / "out"), disable_tqdm=True)
    FisherRaoMerger(experts, args).merge()
    return root / "out"


@pytest.fixture
def output_dir(merged_once: Path, tmp_path: Path) -> Path:
    """Folder as a finished merge leaves it, with a card that has everything."""
    folder = tmp_path / "reader-135m"
    shutil.copytree(merged_once, folder)
    write_card(full(), folder)
    return folder


@pytest.fixture
def sharded_dir(tmp_path: Path) -> Path:
    """Merge in several files whose SHA-256 the manifest lacks, as it does of large ones."""
    experts = [write_model(tmp_path / f"s{seed}", random_model(seed)) for seed in range(2)]
    args = MergingArguments(output_dir=str(tmp_path / "sharded"), max_shard_size="6KB", disable_tqdm=True)
    FisherRaoMerger(experts, args).merge()
    manifest = json.loads((tmp_path / "sharded" / "merge_manifest.json").read_text())
    for name, entry in manifest["files"].items():
        if name.startswith("model-"):
            entry["sha256"] = None
    (tmp_path / "sharded" / "merge_manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return tmp_path / "sharded"
