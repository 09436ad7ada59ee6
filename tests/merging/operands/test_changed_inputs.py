"""Inputs that are rewritten, cut short, replaced or removed while a merge reads them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_reference import CONFIG, random_model, write_family, write_model

from hf_frmerge.checkpoints.adapters.writer import AdapterWriter
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.reader import open_checkpoint
from hf_frmerge.checkpoints.tensors.writer import CheckpointWriter
from hf_frmerge.errors import CheckpointError, ResumeError
from hf_frmerge.extraction.difference import DenseDelta
from hf_frmerge.extraction.extract_lora import ExtractOptions, extract_lora
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import Engine
from hf_frmerge.merging.engine.journal import Journal
from hf_frmerge.merging.engine.outcomes import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning import blocks
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance import verify

NATIVE = find_spec("hf_frmerge.kernels._native") is not None
CHANGED = r"'.*{}': .*/{}/{} changed while it was in use: "


def merge(models: list[str], out: Path, **options: Any) -> None:
    args = MergingArguments(output_dir=str(out), num_workers=1, **options)
    run_merge(build_plan(models[1:], args, None, models[0]), StepObserver(), Processes())


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A base and two experts, and beside them, to be taken for one of these, another of the same size."""
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 200)
    base, experts = write_family(tmp_path, 2, torch.bfloat16)
    write_model(tmp_path / "other", random_model(9, torch.bfloat16))
    return [base, *experts]


def later(path: Path, data: bytes) -> None:
    """Write in place; the clock of a file system may stand still for some milliseconds."""
    time = path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=(time, time + 1))


def other_of(path: Path) -> bytes:
    return (path.parents[1] / "other" / "model.safetensors").read_bytes()


def rewrite(path: Path) -> None:
    later(path, other_of(path))


def replace(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(other_of(path))
    os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    new.replace(path)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@contextmanager
def changing(place: tuple[Any, str], change: Callable[[Path], None], path: Path, *, at: int) -> Iterator[None]:
    """Change a file just before something is done in the merge for the n-th time."""
    original, calls = getattr(*place), iter(range(10_000))

    def after_the_change(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            change(path)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*place, after_the_change)
        yield
    assert next(calls) > at  # it was changed


PLACES = [
    (Engine, "_measure_piece"),
    (Engine, "_decide"),
    (Journal, "record_decided"),
    (Engine, "_merge_piece"),
    (CheckpointWriter, "write"),
    (Journal, "record_written"),
    (CheckpointWriter, "sync"),
]


@pytest.mark.parametrize("change", [rewrite, replace, cut_short, Path.unlink])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
def test_a_changed_model_stops_the_merge_and_nothing_of_it_is_kept(
    models: list[str], tmp_path: Path, place: tuple[type, str], change: Callable[[Path], None]
) -> None:
    merge(models, tmp_path / "whole", space="deltas")
    path, out = Path(models[2]) / "model.safetensors", tmp_path / "out"
    for at in (0,) if place[1] == "sync" else (0, 1):
        shutil.copy2(path, tmp_path / "kept")
        with (
            pytest.raises(CheckpointError, match=CHANGED.format("e1", "e1", path.name)),
            changing(place, change, path, at=at),
        ):
            merge(models, out, space="deltas")
        assert not (out / "config.json").exists() and not list(out.glob("model*"))
        # The advice: bring it back (at another time, and in another place of the disk) and resume.
        path.unlink(missing_ok=True)
        path.write_bytes((tmp_path / "kept").read_bytes())
        merge(models, out, space="deltas", resume_from_checkpoint=True)
        for name in ("model.safetensors", "merge_coefficients.safetensors"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        shutil.rmtree(out)


def test_the_other_advice_is_to_start_anew(models: list[str], tmp_path: Path) -> None:
    path, out = Path(models[1]) / "model.safetensors", tmp_path / "out"
    with (
        pytest.raises(CheckpointError, match=r"rewritten or replaced\. .* \(--overwrite\)"),
        changing((Journal, "record_written"), rewrite, path, at=3),
    ):
        merge(models, out)
    with pytest.raises(ResumeError, match=r"Tensor .* of expert .*e0.* is not what it was"):
        merge(models, out, resume_from_checkpoint=True)
    merge(models, out, overwrite=True)
    merge(models, tmp_path / "afresh")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "afresh" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_files_beside_the_weights_are_watched_too(models: list[str], tmp_path: Path, name: str) -> None:
    """The donor's are copied at the end; what they said at the start decided what was merged."""
    path = Path(models[0]) / name
    if not path.exists():
        path.write_text('{"weight_map": {}}')  # an index beside a single file is not read, but it is there
    with (
        pytest.raises(CheckpointError, match=CHANGED.format("base", "base", name)),
        changing((CheckpointWriter, "sync"), lambda path: later(path, b'{"a": 1}'), path, at=0),
    ):
        merge(models, tmp_path / "out", space="deltas")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_run_that_goes_on_in_the_folder_disturbs_nothing(models: list[str], tmp_path: Path) -> None:
    log = Path(models[0]) / "training.log"
    log.write_text("step 1")
    with changing((Journal, "record_written"), lambda path: later(path, b"step 2"), log, at=0):
        merge(models, tmp_path / "out", space="deltas")


def test_a_file_cut_short_while_its_pages_are_held_does_not_end_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the passes pages stay mapped; without the guard of the mapping, the combine pass meets SIGBUS."""
    large = {f"layers.{i}.weight": torch.randn(300, 300) for i in range(4)}
    models = [write_model(tmp_path / f"large{k}", {n: t + k for n, t in large.items()}) for k in range(3)]
    path = Path(models[2]) / "model.safetensors"
    with (
        pytest.raises(CheckpointError, match=r"large2/model\.safetensors changed .* it had \d+ bytes and now has \d+"),
        changing((Engine, "_merge_piece"), cut_short, path, at=0),
    ):
        merge(models, tmp_path / "out")


def test_a_failing_disk_is_named(models: list[str], tmp_path: Path) -> None:
    """The file is as it was, but a page of it could not be read: as good as this can be had without such a disk."""
    if sys.platform != "linux" or not NATIVE:
        pytest.skip("files are read, not mapped")
    path = Path(models[2]) / "model.safetensors"

    def fail(path: Path) -> None:
        data, time = path.read_bytes(), path.stat().st_mtime_ns
        os.truncate(path, 0)
        merge_reads_on.append(lambda: (path.write_bytes(data), os.utime(path, ns=(time, time))))

    merge_reads_on: list[Callable[[], Any]] = []
    check = Engine._check_files

    def check_after_the_disk_is_back(engine: Engine, batch: Any) -> None:
        while merge_reads_on:
            merge_reads_on.pop()()
        check(engine, batch)

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(
            CheckpointError, match=r"changed while it was in use: a part of it could not be read from the disk"
        ),
        changing((Engine, "_merge_piece"), fail, path, at=0),
    ):
        patch.setattr(Engine, "_check_files", check_after_the_disk_is_back)
        merge(models, tmp_path / "out")


def test_verify_says_that_a_file_changed_and_not_that_the_merge_is_wrong(models: list[str], tmp_path: Path) -> None:
    merge(models, tmp_path / "out")
    path = Path(models[1]) / "model.safetensors"
    with (
        pytest.raises(CheckpointError, match=CHANGED.format("e0", "e0", path.name)),
        changing((verify, "_check_tensor"), rewrite, path, at=2),
    ):
        verify.verify(str(tmp_path / "out"))


@pytest.mark.parametrize("change", [lambda path: later(path, path.read_bytes()[::-1]), cut_short, Path.unlink])
def test_a_changed_adapter_leaves_no_merged_adapter(
    models: list[str], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    for model, name in zip(models[1:], "ab"):
        extract(models[0], model, tmp_path / name)
    path, out = tmp_path / "b" / "adapter_model.safetensors", tmp_path / "out"
    args = MergingArguments(output_dir=str(out), num_workers=1)
    with (
        pytest.raises(CheckpointError, match=CHANGED.format("b", "b", path.name)),
        changing((AdapterWriter, "write"), change, path, at=1),
    ):
        run_merge(build_plan([str(tmp_path / name) for name in "ab"], args), StepObserver(), Processes())
    assert [path.name for path in out.iterdir()] == [".frmerge"]


def extract(base: str, model: str, out: Path) -> None:
    config = CONFIG | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "intermediate_size": 40}
    for folder in (base, model):
        (Path(folder) / "config.json").write_text(json.dumps(config))
    opened = (open_checkpoint(Source(folder, "full", folder)) for folder in (model, base))
    extract_lora(*opened, out, ExtractOptions(4, target_modules=["q_proj", "up_proj"], num_workers=1))


def test_a_model_that_changes_while_an_adapter_is_extracted_leaves_none(models: list[str], tmp_path: Path) -> None:
    path = Path(models[1]) / "model.safetensors"
    with (
        pytest.raises(CheckpointError, match=CHANGED.format("e0", "e0", path.name)),
        changing((DenseDelta, "times"), rewrite, path, at=1),
    ):
        extract(models[0], models[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_are_followed(models: list[str], tmp_path: Path) -> None:
    """As in the cache of the Hub: the folder holds links, and another commit is another target."""
    link, one, two = Path(models[2]) / "model.safetensors", tmp_path / "one", tmp_path / "two"
    two.write_bytes(other_of(link))
    link.rename(one)
    link.symlink_to(one)

    def point_elsewhere(path: Path) -> None:
        path.unlink()
        path.symlink_to(two)

    with (
        pytest.raises(CheckpointError, match=CHANGED.format("e1", "e1", link.name)),
        changing((Journal, "record_written"), point_elsewhere, link, at=2),
    ):
        merge(models, tmp_path / "out")
