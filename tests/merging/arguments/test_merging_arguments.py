from __future__ import annotations

import json
import logging
import math
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.config_file import read_config
from hf_frmerge.merging.arguments.expert_arguments import ExpertArguments
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.arguments.values import validate_weights
from hf_frmerge.methods.table import METHODS


@pytest.fixture(autouse=True)
def _default_level(caplog: pytest.LogCaptureFixture) -> None:
    """A merger sets the level of the package's loggers, and the level decides the default of `disable_tqdm`."""
    caplog.set_level(logging.WARNING, logger="hf_frmerge")


def test_importing_costs_no_heavy_library() -> None:
    modules = [f"arguments.{name}" for name in ("merging_arguments", "values", "weight_rules")]
    modules += [f"callbacks.{name}" for name in ("callback", "collapse_guard", "progress", "reporting", "state")]
    code = "".join(f"import hf_frmerge.merging.{m}\n" for m in modules) + "import sys; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "hf_frmerge.merging.arguments.weight_rules" in loaded
    assert not {"torch", "transformers", "tqdm", "yaml", "numpy"} & set(loaded)


def test_a_device_map_is_a_name_or_a_mapping() -> None:
    spread = {"model.embed_tokens": 0, "lm_head": "disk"}
    assert MergingArguments(eval_device_map="auto").device_map == "auto"
    assert MergingArguments().device_map is None
    assert MergingArguments(eval_device_map=spread) == MergingArguments(eval_device_map=json.dumps(spread))
    assert MergingArguments(eval_device_map=spread).device_map == spread
    with pytest.raises(ArgumentError, match=r"`eval_device_map` is not valid JSON"):
        MergingArguments(eval_device_map="{lm_head: disk}")


def test_methods_are_those_of_the_engine() -> None:
    help_text = {f.name: f.metadata for f in fields(MergingArguments)}["method"]
    assert list(help_text["choices"]) == [*METHODS, "auto"]


def test_every_field_is_documented_and_its_default_is_its_own_value() -> None:
    args = MergingArguments()
    for option in fields(MergingArguments):
        assert option.metadata["help"].strip()
        if option.name not in ("disable_tqdm",):
            assert vars(args)[option.name] == option.default
    assert args.disable_tqdm is False


# One value other than the default for every kind of field, as text on a command line.
CLI = shlex.split(r"""
--experts org/a ./b org/c@main --weights 0.5 0.3 0.2 --base_model org/base --output-dir out --method slerp
--space deltas --block row --norm median --beta -0.5 --scale 2 --tol 1e-6 --max_iter 7 --on_ambiguous linear
--weight_rules 'layers\.0=1,0,0' '.*norm.*=0:1,1:0,1' --dtype bfloat16 --max_shard_size 5GB --overwrite --strict true
--memory-budget 1GiB --num_workers 3 --adapter_rank 16 --report_to tensorboard,wandb --disable_tqdm false
--calibration ./b=b.txt org/a=a.txt --num_calibration_samples 16 --max_calibration_length 256
--calibration_batch_size 4
--log_level error --logging_steps 3 --do_eval --hub_private_repo true --hub_model_id me/x""")

# The same in a file. YAML 1.1 reads 1e-6 as text; lists may be given as lists or, where they hold one item, bare.
CONFIG = {
    "experts": ["org/a", "./b", "org/c@main"], "weights": [0.5, 0.3, 0.2], "base_model": "org/base",
    "output_dir": "out", "method": "slerp", "space": "deltas", "block": "row", "norm": "median", "beta": -0.5,
    "scale": 2, "tol": "1e-6", "max_iter": 7, "on_ambiguous": "linear",
    "weight_rules": ["layers\\.0=1,0,0", ".*norm.*=0:1,1:0,1"], "dtype": "bfloat16", "max_shard_size": "5GB",
    "overwrite": True, "strict": "yes", "memory_budget": "1GiB", "num_workers": "3", "adapter_rank": 16.0,
    "report_to": ["tensorboard", "wandb"], "disable_tqdm": False, "log_level": "error", "logging_steps": 3,
    "do_eval": True, "hub_private_repo": True, "hub_model_id": "me/x", "calibration_batch_size": 4,
    "num_calibration_samples": 16, "max_calibration_length": "256",
    "calibration": {"./b": "b.txt", "org/a": "a.txt"},
}  # fmt: skip


def test_command_line_yaml_and_json_give_equal_objects(tmp_path: Path) -> None:
    expected = (
        ExpertArguments(
            experts=["org/a", "./b", "org/c@main"], weights=[0.5, 0.3, 0.2], base_model="org/base",
            calibration=["./b=b.txt", "org/a=a.txt"],
        ),
        MergingArguments(
            output_dir="out", method="slerp", space="deltas", block="row", norm="median", beta=-0.5, scale=2.0,
            tol=1e-6, max_iter=7, on_ambiguous="linear", weight_rules=[r"layers\.0=1,0,0", ".*norm.*=0:1,1:0,1"],
            dtype="bfloat16", max_shard_size="5GB", overwrite=True, strict=True, memory_budget="1GiB", num_workers=3,
            adapter_rank=16, report_to="tensorboard,wandb", disable_tqdm=False, log_level="error",
            logging_steps=3, do_eval=True, hub_private_repo=True, hub_model_id="me/x", num_calibration_samples=16,
            max_calibration_length=256, calibration_batch_size=4,
        ),
    )  # fmt: skip
    (tmp_path / "m.yml").write_text(yaml.safe_dump(CONFIG).replace("'1e-6'", "1e-6"))
    (tmp_path / "m.json").write_text(json.dumps(CONFIG))
    assert yaml.safe_load((tmp_path / "m.yml").read_text())["tol"] == "1e-6"  # the trap is in place
    parser = HfArgumentParser((ExpertArguments, MergingArguments))
    assert parser.parse_args_into_dataclasses(CLI) == expected
    assert parser.parse_yaml_file(tmp_path / "m.yml") == expected
    assert parser.parse_json_file(tmp_path / "m.json") == expected
    assert read_config(tmp_path / "m.json") == CONFIG
    for value, option in ((vars(expected[1])[o.name], o) for o in fields(MergingArguments)):
        assert type(value) in (type(option.default), type(None)) or option.default is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "karchr"}, "unknown method 'karchr': expected one of karcher, slerp, .* Did you mean 'karcher'?"),
        ({"method": "zzz"}, "unknown method 'zzz': expected one of .*task_arithmetic, .*"),
        ({"dtype": "bf16"}, "unknown dtype 'bf16': .* Did you mean 'bfloat16'?"),
        ({"space": "tangent"}, "unknown space 'tangent': expected one of weights, deltas"),
        ({"tol": 0}, "`tol` must be above 0"),
        ({"tol": "small"}, "`tol` expects a number, but got 'small'"),
        ({"tol": True}, "`tol` expects a number, but got True"),
        ({"tol": math.nan}, "`tol` must be above 0 .* got nan"),
        ({"max_iter": 0}, "`max_iter` must be at least 1, but got 0"),
        ({"max_iter": 1.5}, "`max_iter` expects a whole number, but got 1.5"),
        ({"max_iter": None}, "`max_iter` expects a whole number, but got None"),
        ({"beta": "inf"}, "`beta` must be finite, but got inf"),
        ({"adapter_energy": 0.0}, "`adapter_energy` must be above 0 and at most 1"),
        ({"adapter_energy": 1.01}, "`adapter_energy` must be above 0 and at most 1"),
        ({"adapter_rank": 4, "adapter_energy": 0.9}, "both choose the rank"),
        ({"adapter_rank": 4, "adapter_output": "merged"}, "adapter_output='merged'"),
        ({"bf16_full_eval": True, "fp16_full_eval": True}, "exclude each other"),
        ({"overwrite": "maybe"}, "`overwrite` expects true or false, but got 'maybe'"),
        ({"method": False}, "`method` expects text, but got False"),  # YAML 1.1 reads `method: no` so
        ({"weight_rules": {"a": 1}}, "`weight_rules` expects a list"),
        ({"memory_budget": "lots"}, "`memory_budget` expects a size such as '512MiB'"),
        ({"num_calibration_samples": 0}, "`num_calibration_samples` must be at least 1, but got 0"),
        ({"max_calibration_length": 1}, "`max_calibration_length` must be at least 2"),
        ({"calibration_batch_size": 0}, "`calibration_batch_size` must be at least 1, but got 0"),
        ({"max_shard_size": "0"}, "`max_shard_size` must be at least one byte"),
    ],
)
def test_bad_values_get_a_sentence_that_names_the_field(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        MergingArguments(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 * 2**20), ("5GB", 5 * 10**9), (4096, 4096), ("1.5kb", 1500), ("2 TiB", 2**41), ("7B", 7)],
)
def test_sizes_in_bytes(text: str | int, size: int) -> None:
    args = MergingArguments(memory_budget=text, max_shard_size=text)  # type: ignore[arg-type]
    assert (args.memory_budget_bytes, args.max_shard_bytes) == (size, size)


def test_tokens_never_show() -> None:
    args = MergingArguments(hub_token="hf_secret", output_dir="~/x")
    assert args.to_dict()["hub_token"] == "<HUB_TOKEN>"
    assert json.loads(args.to_json_string()) == args.to_dict()
    for shown in (repr(args), args.to_json_string(), str(args.to_sanitized_dict())):
        assert "hf_secret" not in shown
    assert {type(v) for v in args.to_sanitized_dict().values()} <= {bool, int, float, str}
    assert args.output_dir == str(Path.home() / "x")


def test_experts_are_counted_and_their_weights_checked_at_once() -> None:
    with pytest.raises(ArgumentError, match="at least two experts, but `experts` lists none"):
        ExpertArguments(experts=[])
    assert ExpertArguments(experts="one/adapter").experts == ["one/adapter"]  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="one number per expert: got 2"):
        ExpertArguments(experts=["a", "b", "c"], weights=[1, 2])
    assert ExpertArguments(experts=["a", "b"], weights="0.5, 0.25").weights == [0.5, 0.25]  # type: ignore[arg-type]


def test_unknown_keys_and_broken_files_are_refused(tmp_path: Path) -> None:
    config = tmp_path / "merge.yml"
    for text, sentence in (
        ("max_iters: 3", "unknown key 'max_iters'.*Did you mean 'max_iter'?"),
        ("- a\n- b", "must hold options by name"),
        ("a: [", "not valid YAML"),
    ):
        config.write_text(text)
        with pytest.raises(ArgumentError, match=sentence):
            read_config(config)
    (tmp_path / "merge.json").write_text("{")
    with pytest.raises(ArgumentError, match="not valid JSON"):
        read_config(tmp_path / "merge.json")
    for name, sentence in (("none.yml", "does not exist"), ("merge.toml", "ends in .yaml, .yml or .json")):
        (tmp_path / "merge.toml").touch()
        with pytest.raises(ArgumentError, match=sentence):
            read_config(tmp_path / name)
    config.write_text("method: slerp")
    assert read_config(config) == {"method": "slerp"}


def test_a_configuration_of_mergekit_is_told_what_to_write(tmp_path: Path) -> None:
    config = tmp_path / "merge.yml"
    config.write_text(
        "merge_method: karcher\nbase_model: b\nmodels:\n  - model: e1\n    parameters: {weight: 0.6}\n"
        "  - model: e2\n    parameters:\n      weight: 0.4\nparameters: {max_iter: 10, tol: 1e-5, normalize: true}\n"
        "dtype: bfloat16\n"
    )
    with pytest.raises(ArgumentError, match=r"'merge_method' in .*: this is a configuration of mergekit") as caught:
        read_config(config)
    config.write_text("\n".join(line for line in str(caught.value).splitlines() if line.startswith("    ")))
    assert read_config(config) == {
        "method": "karcher",
        "experts": ["e1", "e2"],
        "weights": [0.6, 0.4],
        "base_model": "b",
        "dtype": "bfloat16",
        "max_iter": 10,
        "tol": "1e-5",  # as YAML reads it; MergingArguments makes a number of it
        "output_dir": "merged",
    }
    config.write_text("merge_method: ties\nslices: [{sources: []}]\nmodels:\n  - model: e1\n  - e2\n")
    with pytest.raises(ArgumentError, match=r"method: .ties"):
        read_config(config)


@pytest.mark.parametrize(
    ("weights", "n", "sentence"),
    [
        ([1.0], 2, r"got 1 \(\[1.0\]\) for 2 experts"),
        ([1.0, -0.1], 2, "the weight of expert 2 is -0.1"),
        ([math.nan, 1.0], 2, "the weight of expert 1 is nan"),
        ([math.inf, 1.0], 2, "the weight of expert 1 is inf"),
        ([0.0, 0.0], 2, "all zero"),
    ],
)
def test_bad_weights(weights: list[float], n: int, sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        validate_weights(weights, n, "karcher")


@given(st.lists(st.floats(1e-290, 1.7e308), min_size=1, max_size=12))
def test_weights_are_divided_by_their_exact_sum(weights: list[float]) -> None:
    exact = [Fraction(w) / sum(map(Fraction, weights)) for w in weights]
    for got, want in zip(validate_weights(weights, len(weights)), exact, strict=True):
        assert abs(Fraction(got) - want) <= want * Fraction(2, 2**52) + Fraction(1, 2**1022)


@settings(deadline=None)
@given(st.lists(st.floats(-1e9, 1e9).filter(lambda w: abs(w) > 1e-3), min_size=1, max_size=12))
def test_weights_that_were_divided_stay_as_they_are(weights: list[float]) -> None:
    """A recorded merge is planned again with the weights of its record: they must not lose a bit."""
    once = validate_weights(weights, len(weights))
    assert validate_weights(once, len(weights)) == once


def test_weights_of_methods_that_add_are_factors() -> None:
    assert validate_weights([1.0, -0.5], 2, "task_arithmetic") == [1.0, -0.5]
    assert validate_weights([0.0, -3.0], 2, "dare_linear") == [0.0, -3.0]
    assert validate_weights(None, 3, "breadcrumbs") == [1.0, 1.0, 1.0]
    adding = {name for name, method in METHODS.items() if method.adds}
    assert adding == {"task_arithmetic", "dare_linear", "breadcrumbs", "consensus"}
    for name in METHODS.keys() - adding:
        refused = f"method='{re.escape(name)}', but .* use method='task_arithmetic' or "
        with pytest.raises(ArgumentError, match=refused):
            validate_weights([1.0, -1.0], 2, name)


def test_weights_with_an_exact_answer() -> None:
    assert validate_weights(None, 4) == [0.25] * 4
    assert validate_weights([0.0, 3e-7, 0.0], 3) == [0.0, 1.0, 0.0]
    assert validate_weights([0.5, 0.25, 0.25], 3) == [0.5, 0.25, 0.25]
    assert validate_weights(np.float32([1, 3]), 2) == [0.25, 0.75]
