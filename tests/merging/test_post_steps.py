"""Post-steps and layer scales after methods of every kind: what is written, recorded, verified and refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from merge_reference import SHAPES, write_family
from safetensors.numpy import load_file

from hf_frmerge import FisherRaoMerger, MergeCallback, MergingArguments
from hf_frmerge.errors import ArgumentError, MergeError
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

KINDS = ["karcher", "task_arithmetic", "ties", "tsv_m"]
MATRICES = [name for name in SHAPES if "proj" in name]


def merge(folder: Path, family: tuple[str, list[str]], method: str, callbacks=None, **options) -> Path:
    base, experts = family
    args = MergingArguments(output_dir=str(folder), method=method, **{"space": "deltas", **options})
    FisherRaoMerger(experts, args, base_model=base, callbacks=callbacks).merge(
        resume_from_checkpoint=options.get("resume_from_checkpoint")
    )
    return folder


def tensors(folder: str | Path) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float64) for name, value in load_file(Path(folder) / "model.safetensors").items()}


def svc(merged: np.ndarray, deltas: list[np.ndarray], floor: float) -> np.ndarray:
    left, values, right = np.linalg.svd(merged, full_matrices=False)
    own = [left.T @ delta for delta in deltas]
    times = [(rows * right).sum(1) * values / (rows**2).sum(1) for rows in own]
    return left @ np.diag(values / np.mean([np.maximum(t, floor) for t in times], axis=0)) @ right


@pytest.mark.parametrize("method", KINDS)
def test_svc_corrects_the_matrices_that_a_method_merged(tmp_path: Path, method: str) -> None:
    family = write_family(tmp_path)
    plain = tensors(merge(tmp_path / "plain", family, method))
    out = merge(tmp_path / "svc", family, method, post_step="svc", svc_floor=0.2)
    origin, models = tensors(family[0]), [tensors(expert) for expert in family[1]]
    for name, value in tensors(out).items():
        if name in MATRICES:
            deltas = [model[name] - origin[name] for model in models]
            expected = origin[name] + svc(plain[name] - origin[name], deltas, 0.2)
            np.testing.assert_allclose(value, expected, rtol=0, atol=3e-5)
            assert np.abs(value - plain[name]).max() > 1e-2
        else:
            np.testing.assert_array_equal(value, plain[name])
    assert verify(str(out)).ok and reproduce(str(out)).identical
    notes = json.loads((out / "merge_manifest.json").read_text())["notes"]
    assert any("matrices of layers" in note for note in notes)
    card = (out / "README.md").read_text()  # what was measured is the mean, not what svc made of it
    assert "This merge keeps" not in card and "It is at most" not in card
    assert ("Before svc corrected it, this merge kept" in card) == (method in ("karcher", "task_arithmetic"))
    assert ("Before that, it was at most" in card) == (method == "karcher")


def test_verify_finds_a_matrix_that_was_changed(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    out = merge(tmp_path / "out", write_family(tmp_path), "karcher", post_step="svc")
    changed = load_file(out / "model.safetensors")
    changed[MATRICES[0]] = changed[MATRICES[0]] + np.float32(0.01)
    save_file(changed, out / "model.safetensors", metadata={"format": "pt"})
    assert any(MATRICES[0] in problem for problem in verify(str(out)).problems)


@pytest.mark.parametrize("method", KINDS)
def test_layer_scales_multiply_the_merged_delta(tmp_path: Path, method: str) -> None:
    family = write_family(tmp_path)
    plain = tensors(merge(tmp_path / "plain", family, method))
    out = merge(tmp_path / "scaled", family, method, layer_scales="0.5:2")
    origin = tensors(family[0])
    for name, value in tensors(out).items():
        factor = 0.5 if ".0." in name else 2.0 if ".1." in name else 1.0
        expected = origin[name] + factor * (plain[name] - origin[name])
        np.testing.assert_allclose(value, expected, rtol=0, atol=3e-6)
    assert verify(str(out)).ok and reproduce(str(out)).identical


class Stop(MergeCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_merge_stop = state.global_step >= 3
        return control


def test_a_merge_with_both_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    family, both = write_family(tmp_path), {"post_step": "svc", "layer_scales": "0.5:2"}
    whole = tensors(merge(tmp_path / "whole", family, "ties", **both))
    with pytest.raises(MergeError, match="was stopped"):
        merge(tmp_path / "part", family, "ties", callbacks=[Stop], **both)
    resumed = tensors(merge(tmp_path / "part", family, "ties", resume_from_checkpoint=True, **both))
    for name, value in whole.items():
        np.testing.assert_array_equal(value, resumed[name])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    for options in ({"post_step": "svc"}, {"layer_scales": "0:1"}):
        with pytest.raises(ArgumentError, match="needs base_model"):
            FisherRaoMerger(experts, MergingArguments(**options)).plan()
        with pytest.raises(ArgumentError, match='it needs space="deltas"'):
            FisherRaoMerger(experts, MergingArguments(space="weights", **options), base_model=base).plan()
        FisherRaoMerger(experts, MergingArguments(**options), base_model=base).plan().close()
    for method in ("iso_c", "iso_cts"):
        with pytest.raises(ArgumentError, match="all equally strong"):
            MergingArguments(method=method, post_step="svc")
    for text in ("1", "a:b", "1:inf", ""):
        with pytest.raises(ArgumentError, match=r"such as 0\.5:1\.5"):
            MergingArguments(layer_scales=text)
    with pytest.raises(ArgumentError, match="block='model' decides once"):
        MergingArguments(layer_scales="0:1", block="model")
    with pytest.raises(ArgumentError, match="a table of coefficients has its own"):
        MergingArguments(layer_scales="0:1", coefficients="table.safetensors")
    with pytest.raises(ArgumentError, match=r"post_step='svc' merges .* as one matrix"):
        FisherRaoMerger(experts, MergingArguments(post_step="svc", memory_budget="1KB"), base_model=base).plan()
    notes = FisherRaoMerger(experts, MergingArguments(svc_floor=0.5)).plan().notes
    assert "`svc_floor` changes nothing with method='karcher'." in notes
