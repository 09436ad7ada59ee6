"""
Fit the layers behind the blocks of a classifier or an encoder: a last norm, a pooler, the head.

They get what the fitted blocks give, one after the other, and are solved for by the equations of a block's layers that
do not write to the residual stream. A pooler has one row for a prompt where a layer of a block has one for a token, so
these layers are pulled to their start more strongly, and each is kept only if on held-out prompts it gives what is
nearer to what it gives in the experts.

Language models whose head is fitted have nothing fitted here. Their head is made for what the norms of the experts
give; a last norm that was fitted as well changed nothing for three real fine-tunes.
"""

# Shape suffixes: B = prompts of a batch, T = tokens, H = hidden size, R = rows (tokens, or prompts), I = inputs.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel, Taps, Weights
from hf_frmerge.calibration.blocks.layers import is_norm
from hf_frmerge.calibration.blocks.matrices import is_linear, layer_matrix, n_in
from hf_frmerge.calibration.fits.layers_fit import LayersFit, with_one
from hf_frmerge.calibration.fits.least_squares import Moments
from hf_frmerge.calibration.fits.norms import norm_sums
from hf_frmerge.calibration.fits.sweep_state import SweepState

_RIDGE = 0.3
"""
Pull to the start, relative to the mean square of an input. For the pooler of five encoders (16, 64, 256 prompts) it
keeps 0.2, 0.6 and 0.1 points more of the mean than 0.03, the pull in blocks, and 0.6 to 1.7 of the worst.
"""


@dataclass(frozen=True)
class LastLayer:
    """
    A layer behind the blocks.

    Attributes:
        name: path of the linear layer or norm.
        is_by_token: whether what enters it has a row for every token, or one for a prompt.
    """

    name: str
    is_by_token: bool


def find_last_layers(
    model: BlockwiseModel, outer: Weights, hidden_BTH: Tensor, inputs: Mapping[str, Tensor]
) -> list[LastLayer]:
    """
    Return the linear layers and norms behind the blocks, in the order in which they run; of those that run once.

    Args:
        model: The modules.
        outer: Weights outside the blocks.
        hidden_BTH: Hidden states of one prompt behind the last block.
        inputs: The prompt.
    """
    n_rows: list[tuple[str, int]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            n_rows.extend((name, entering.shape[:-1].numel()) for entering in args[:1])  # by keyword there is none

        return hook

    modules = [(name, module) for name, module in model.model.named_modules() if is_linear(module) or is_norm(module)]
    handles = [module.register_forward_pre_hook(note(name)) for name, module in modules]
    # What has run by then lies before the blocks or inside.
    handles.append(model.block(model.blocks[-1]).register_forward_pre_hook(lambda *_: n_rows.clear()))
    try:
        model.finish(outer, hidden_BTH, inputs)
    finally:
        for handle in handles:
            handle.remove()
    names, n_tokens = [name for name, _ in n_rows], inputs["input_ids"].numel()
    return [LastLayer(name, n == n_tokens) for name, n in n_rows if names.count(name) == 1 and n in (1, n_tokens)]


class LastLayersFit(LayersFit):
    """
    Fit of the layers behind the blocks.

    Args:
        sweep: After its last block.
        layers: What `find_last_layers` found.
        start: Weights outside the blocks, of the data-free merge.
        experts: Those of every expert, read anew by every access.
    """

    def __init__(
        self, sweep: SweepState, layers: Sequence[LastLayer], start: dict[str, Tensor], experts: Sequence[Weights]
    ) -> None:
        options = replace(sweep.options.fit, ridge=_RIDGE)
        super().__init__(sweep, "", sweep.model.model, start, experts, options, rank=None)
        self._layers = [layer for layer in layers if self._is_fitted(layer.name)]
        self._n_prompts = torch.zeros(sweep.n_experts, dtype=torch.int64)
        for b in sweep.fitted:
            self._n_prompts[sweep.batches[b].expert] += len(sweep.merged[b])
        sweep.processes.add_up([self._n_prompts])

    def fit(self) -> None:
        """Fit all layers, one after the other."""
        for layer in self._layers:
            start = self._own(layer, self.weights)
            held_out = self._fit_linear(layer) if self._is_linear(layer.name) else self._fit_norm(layer)
            self._keep_if_nearer(layer, start, held_out)

    def _keep_if_nearer(self, layer: LastLayer, start: Weights, held_out: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take a fitted layer back if with its start it gives what is nearer to what it gives in the experts."""
        fitted, errors = self._own(layer, self.weights), torch.zeros(2, dtype=torch.float64)
        for entering_RI, target_RO in held_out:
            for place, weights in enumerate((start, fitted)):
                errors[place] += float((self._give(layer, weights, entering_RI) - target_RO).square().sum())
        self._sweep.processes.add_up([errors])
        if errors[1] >= errors[0]:
            for key, values in start.items():
                self.weights[f"{layer.name}.{key}"] = values
                self.coefficients.pop(f"{layer.name}.{key}", None)

    def _is_fitted(self, name: str) -> bool:
        """Whether a layer is merged, all of it under its own name, and changed by the experts."""
        is_whole = self._own_names(name) <= self._start.keys()
        return is_whole and self._is_merged(f"{name}.weight") and (self._is_linear(name) or self._is_changed(name))

    def _is_linear(self, name: str) -> bool:
        return is_linear(self._module.get_submodule(name))

    def _fit_linear(self, layer: LastLayer) -> list[tuple[Tensor, Tensor]]:
        """Fit a linear layer; return what enters it on held-out prompts, and what it gives in their experts."""
        merged, held_out = self._merged([layer_matrix(self._module, layer.name)]), []
        has_bias = any(merged.values())

        def moments_of(expert: int) -> Moments:
            moments = Moments.zeros(n_in(self._module.get_submodule(layer.name)) + has_bias, self._model.device)
            for is_held_out, merged_RI, expert_RI in self._rows(layer, expert):
                if is_held_out:
                    held_out.append((merged_RI, self._given_by(layer, expert, expert_RI)))
                else:
                    both = (with_one(merged_RI), with_one(expert_RI)) if has_bias else (merged_RI, expert_RI)
                    moments.add(*both)
            moments.n_tokens = self._n_rows(layer)[expert]
            return moments

        self._solve(merged, self._sweep.own, moments_of)
        return held_out

    def _fit_norm(self, layer: LastLayer) -> list[tuple[Tensor, Tensor]]:
        """Fit a norm; return what `_fit_linear` returns."""
        start, sweep, held_out = self._norm_start(layer.name), self._sweep, []
        sums = torch.zeros(sweep.n_experts, 4, len(start[0]), dtype=torch.float64, device=start[0].device)
        for expert in sweep.own:
            for is_held_out, merged_RH, expert_RH in self._rows(layer, expert):
                target_RH = self._given_by(layer, expert, expert_RH)
                if is_held_out:
                    held_out.append((merged_RH, target_RH))
                else:
                    x_RH, offset_H = self._normalised(layer.name, merged_RH)
                    sums[expert] += norm_sums(x_RH, target_RH, start, offset_H)
        sweep.processes.add_up([sums])
        self._solve_norm(layer.name, sums, self._n_rows(layer))
        return held_out

    def _n_rows(self, layer: LastLayer) -> list[int]:
        """Return how many rows of every expert take part in the fit of a layer, in all processes."""
        return self._sweep.n_tokens if layer.is_by_token else self._n_prompts.tolist()

    def _rows(self, layer: LastLayer, expert: int) -> Iterator[tuple[bool, Tensor, Tensor]]:
        """Yield by batch of an expert whether it is held out, and what enters a layer in the merge and the expert."""
        sweep = self._sweep
        of_merge, of_expert = (sweep.computed(weights) for weights in (self.weights, self._experts[expert]))
        for b, batch in enumerate(sweep.batches):
            if batch.expert == expert:
                of_both = (of_merge, sweep.merged[b]), (of_expert, sweep.expert[b])
                merged_RI, expert_RI = (self._entering(layer, outer, hidden, b) for outer, hidden in of_both)
                yield batch.is_held_out, merged_RI, expert_RI

    def _entering(self, layer: LastLayer, outer: Weights, hidden_BTH: Tensor, b: int) -> Tensor:
        """Return what enters a layer, `(R, I)`, float32; prompt by prompt, as not all classifiers take a batch."""
        rows = []
        for row in range(len(hidden_BTH)):
            inputs = self._sweep.batches[b].prompt(row)
            with Taps(self._module, [layer.name], last=layer.name) as taps:
                self._model.finish(outer, hidden_BTH[row : row + 1], inputs)
            entering_RI = taps.inputs[layer.name].float().flatten(0, -2)
            mask = inputs.get("attention_mask")
            rows.append(entering_RI if mask is None or not layer.is_by_token else entering_RI[mask[0].bool()])
        return torch.cat(rows)

    def _own(self, layer: LastLayer, weights: Weights) -> dict[str, Tensor]:
        """Return a layer's own weights by the names that it has for them."""
        return {name.removeprefix(f"{layer.name}."): weights[name] for name in self._own_names(layer.name)}

    def _own_names(self, name: str) -> set[str]:
        """Return the parameters of a layer; those that are tied to others have no name of their own elsewhere."""
        return {f"{name}.{own}" for own, _ in self._module.get_submodule(name).named_parameters()}

    def _given_by(self, layer: LastLayer, expert: int, entering_RI: Tensor) -> Tensor:
        """Return what a layer gives in an expert, `(R, O)`."""
        return self._give(layer, self._own(layer, self._experts[expert]), entering_RI)

    def _give(self, layer: LastLayer, weights: Weights, entering_RI: Tensor) -> Tensor:
        """Return what a layer gives with weights of its own, float32."""
        with torch.no_grad():
            module = self._module.get_submodule(layer.name)
            given: Tensor = torch.func.functional_call(module, dict(weights), (entering_RI,))
            return given.float()
