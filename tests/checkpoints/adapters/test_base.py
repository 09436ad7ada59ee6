"""Which base adapters belong to, and what an adapter made from them calls it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hf_frmerge.checkpoints.adapters.adapter import Adapter, open_adapter
from hf_frmerge.checkpoints.adapters.base import base_notes, common_base
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def named(tmp_path: Path):
    def make(name: str | None, revision: str | None = None) -> Adapter:
        config = {"peft_type": "LORA", "r": 1, "base_model_name_or_path": name, "revision": revision}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        factors = {f"base_model.model.q.lora_{side}.weight": np.ones((1, 1), np.float32) for side in "AB"}
        save_file(factors, tmp_path / "adapter_model.safetensors")
        return open_adapter(Source("spec", "adapter", str(tmp_path)))

    return make


def local(path: str) -> Source:
    return Source(path, "full", path)


def test_adapters_alone_must_name_one_base(named) -> None:
    assert common_base([named(None), named(None)]) == (None, None)
    assert common_base([named("org/base"), named(None), named("org/base", "main")]) == ("org/base", None)
    assert common_base([named("/here/base"), named("/there/base/")])[0] == "/here/base"
    assert common_base([named("/there/base"), named("org/base")])[0] == "org/base"  # what others can load
    for other, message in {
        ("other/base", None): r"different base models: 'org/base' and 'other/base'.*pass base_model",
        ("org/base", "v2"): r"different revisions of 'org/base': 'main' and 'v2'.*pass base_model",
        ("C:\\models\\another", None): r"different base models: 'org/base' and 'C:",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            common_base([named("org/base"), named(*other)])
    with pytest.raises(CheckpointError, match=r"different base models: '/here/base' and '/here/other'"):
        common_base([named("/here/base"), named("/here/other")])


def test_a_base_that_the_user_names_settles_it(named) -> None:
    foreign = [named("mirror/base-4bit", "mirror"), named("/mnt/training/base"), named("C:\\Users\\x\\base")]
    on_hub = Source("org/base@v2", "full", f"hub://org/base@{COMMIT}", "org/base", "v2", COMMIT)
    assert common_base(foreign, on_hub) == ("org/base", COMMIT)
    assert common_base(foreign, local("/data/base")) == ("/data/base", None)
    # A copy of what an adapter names on the Hub: others can load that.
    assert common_base([*foreign, named("org/base", "v2")], local("/data/base/")) == ("org/base", "v2")
    assert common_base([named("org/base"), named("org/base", "v2")], local("/data/base"))[0] == "/data/base"
    assert common_base([named("org/other")], local("/data/base"))[0] == "/data/base"
    assert base_notes(foreign, local("/data/base")) == [
        "The adapters were trained on 'mirror/base-4bit'; '/data/base' is taken for it."
    ]
    assert base_notes([named("/there/base"), named("org/base"), named(None)], local("/data/base")) == []
    assert "'mirror/base-4bit'; 'org/base@v2'" in base_notes(foreign, on_hub)[0]


@pytest.mark.parametrize("root", ["/root/.cache/huggingface/hub", "C:\\Users\\x\\.cache\\huggingface\\hub"])
def test_a_folder_of_the_hubs_cache_is_named_by_its_id(named, root: str) -> None:
    separator = "\\" if "\\" in root else "/"
    snapshot = separator.join([root, "models--org--base", "snapshots", COMMIT])
    assert common_base([named(snapshot), named(snapshot)]) == ("org/base", COMMIT)
    if separator == "/":
        assert common_base([named("mirror/base")], local(snapshot)) == ("org/base", COMMIT)
