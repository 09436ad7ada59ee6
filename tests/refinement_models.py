"""Tiny models of several kinds, sweeps over their merges that fit nothing, and refinements by textbook formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
from hf_frmerge.calibration.blocks.streams import in_batches
from hf_frmerge.calibration.blocks.weights import WeightReader
from hf_frmerge.calibration.fits.head_fit import find_head
from hf_frmerge.calibration.fits.sweep_state import SweepOptions
from hf_frmerge.calibration.refinement.corrected_merge import corrections_to_refine, read_start
from hf_frmerge.calibration.refinement.expert_updates import coefficients_to_refine
from hf_frmerge.calibration.refinement.refine import Refinement
from hf_frmerge.calibration.sweep import FittedBlock, Sweep
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.planning.build_plan import build_plan

VOCABULARY, N_EXPERTS = 40, 2
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_attention_heads=2)),
    "tied": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, num_attention_heads=2, tie_word_embeddings=True),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16),
    ),
    "classifier": (
        BertForSequenceClassification,
        BertConfig(**SIZES, num_attention_heads=2, num_labels=3),
    ),
    "headless": (transformers.BertModel, BertConfig(**SIZES, num_attention_heads=2)),
}


def save_models(folder: Path) -> None:
    """Save of every kind a base, and experts that differ from it at random; of the first LoRA experts, one of each."""
    for kind, (model_class, config) in MODELS.items():
        # Numbers are drawn here: what models begin with, and whether loading draws as well, depends on the version.
        draw, model = torch.Generator().manual_seed(0), model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
        model.save_pretrained(folder / kind / "base")
        for number in range(N_EXPERTS):
            model = model_class.from_pretrained(folder / kind / "base")
            draw = torch.Generator().manual_seed(number + 1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
            model.save_pretrained(folder / kind / f"full{number}")
    for number in range(N_EXPERTS):
        torch.manual_seed(number + 1)
        config = LoraConfig(r=2, lora_alpha=1, target_modules="all-linear", init_lora_weights=False)
        lora = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "llama" / "base"), config)
        lora.save_pretrained(folder / "llama" / f"lora{number}")
    for number, expert in enumerate(("full0", "lora1")):
        (folder / "llama" / f"mixed{number}").symlink_to(expert)


def prompts(expert: int, count: int = 16) -> list[list[int]]:
    """Random tokens, of many lengths."""
    rng = np.random.default_rng(expert)
    return [rng.integers(0, VOCABULARY, 4 + number % 9).tolist() for number in range(count)]


def padded(texts: list[list[int]]) -> dict[str, Tensor]:
    ids, mask = torch.zeros(2, len(texts), max(map(len, texts)), dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": mask}


def swept(models: Path, kind: str, expert: str = "full") -> Sweep:
    """A sweep over a linear merge that fits nothing, in float32, with some prompts held out."""
    experts = [str(models / kind / f"{expert}{number}") for number in range(N_EXPERTS)]
    args = MergingArguments(output_dir=str(models / "unused"), method="linear", adapter_output="merged")
    plan = build_plan(experts, args, [0.25, 0.75], str(models / kind / "base"))
    model = BlockwiseModel(*MODELS[kind], torch.device("cpu"), torch.float32)
    reader = WeightReader(plan, load_kernels("cpu"), model)
    batches = [
        batch
        for is_held_out, rows in ((False, slice(0, 12)), (True, slice(12, 16)))
        for expert in range(N_EXPERTS)
        for batch in in_batches(
            [np.array(ids) for ids in prompts(expert)[rows]],
            expert,
            4,
            0,
            is_held_out=is_held_out,
            device=model.device,
        )
    ]
    sweep = Sweep(model, reader, batches, plan.weights, SweepOptions(), is_full=False)
    sweep.begin()
    for index in range(len(model.blocks)):
        sweep.fit_block(index, FittedBlock({}, {}))
    return sweep


def some_corrections(sweep: Sweep, form: str) -> dict[str, Tensor]:
    """Random numbers in the place of what a fit would find."""
    torch.manual_seed(7)
    blocks = []
    for name in sweep.state.model.blocks:
        parameters = dict(sweep.state.model.block(name).named_parameters())
        shapes = {key: parameter.shape for key, parameter in parameters.items()}
        factors = {
            key: (0.1 * torch.randn(shape[0], 3), torch.randn(3, shape[1]))
            for key, shape in shapes.items()
            if len(shape) == 2
        }
        # A row of coefficients for every row of matrices; of vectors there is none, as where a fit left them alone.
        coefficients = {key: torch.randn(shape[0], N_EXPERTS) for key, shape in shapes.items() if len(shape) == 2}
        fitted = {key: 0.1 * torch.randn(shape) for key, shape in shapes.items()}
        blocks.append(FittedBlock(fitted, factors, coefficients))
    if (head := find_head(sweep.state.model.model)) is not None:
        shape = sweep.state.reader.start(head.parameter).shape
        fitted = {head.parameter: 0.1 * torch.randn(shape)}
        blocks.append(FittedBlock(fitted, {}, {head.parameter: torch.randn(shape[0], N_EXPERTS)}))
    start = read_start(sweep.state)
    if form == "table":
        return coefficients_to_refine(sweep.state, start, blocks)
    return corrections_to_refine(sweep.state, start, blocks, form)


def plain_losses(kind: str, merged: Any, expert: Any, inputs: dict[str, Tensor], loss: str) -> Tensor:
    """The loss of every prediction, by textbook formulas on what transformers gives."""
    mask = inputs["attention_mask"].bool()
    if kind == "headless":
        one, other = (output.last_hidden_state[mask] for output in (merged, expert))
        return torch.arccos(torch.cosine_similarity(one, other, dim=-1)).square()
    logits = [output.logits if kind == "classifier" else output.logits[mask] for output in (merged, expert)]
    q, p = (torch.softmax(values, dim=-1) for values in logits)
    if loss == "kl":
        return (p * (p / q).log()).sum(-1)
    return (2 * torch.arccos((p * q).sqrt().sum(-1))).square()


def expert_weights(models: Path, kind: str, expert: str, number: int) -> dict[str, Tensor]:
    """Parameters of an expert in float64, as transformers and PEFT give them."""
    model = load_whole(models, models / kind / f"{expert}{number}", kind)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    return {name: parameter.double() for name, parameter in model.named_parameters()}


def merger(models: Path, out: Path, kind: str = "llama", expert: str = "full", **options: Any) -> FisherRaoMerger:
    experts = [str(models / kind / f"{expert}{number}") for number in range(N_EXPERTS)]
    calibration = options.pop("calibration", {name: prompts(number, 96) for number, name in enumerate(experts)})
    defaults = {"method": "linear", "disable_tqdm": True, "calibration_rank": 4, "max_calibration_length": 12}
    args = MergingArguments(output_dir=str(out), **{**defaults, **options})
    return FisherRaoMerger(experts, args, base_model=str(models / kind / "base"), calibration_dataset=calibration)


def load_whole(models: Path, out: Path, kind: str) -> Any:
    """The merged model by transformers, or PEFT, alone."""
    model_class = AutoModel if kind == "headless" else MODELS[kind][0]
    if not (out / "adapter_config.json").exists():
        return model_class.from_pretrained(out).eval()
    return PeftModel.from_pretrained(model_class.from_pretrained(models / kind / "base"), out).eval()


def assert_loss_and_gradients(
    refinement: Refinement, value: float, n_steps: int, expected: Tensor, leaves: dict[str, Tensor]
) -> None:
    """Compare the mean loss of some steps, and the gradients they added up, with a float64 loss of leaves."""
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, leaf in leaves.items():
        found, reference = refinement.values[name].grad, leaf.grad
        assert found is not None and reference is not None
        scale = float(reference.abs().max())
        torch.testing.assert_close(found.double() / n_steps, reference, rtol=1e-3, atol=1e-3 * scale + 1e-8)
