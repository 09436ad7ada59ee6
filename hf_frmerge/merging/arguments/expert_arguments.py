"""Models of a merge as arguments: for a command line, and in a configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_type_hints

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.calibration import parse_calibration
from hf_frmerge.merging.arguments.help_texts import adding, described
from hf_frmerge.merging.arguments.named_weights import is_name, parse_name
from hf_frmerge.merging.arguments.values import coerce, validate_weights


@dataclass
class ExpertArguments:
    """Models of a merge: the experts, their weights, and the model they were fine-tuned from."""

    experts: list[str] = field(
        metadata=described(
            "Two or more experts: local folders, GGUF files or Hub ids (`org/name` or `org/name@revision`), full "
            "checkpoints or LoRA adapters. One adapter is folded into its base model."
        )
    )
    # Or a name, which is text: `HfArgumentParser` takes one type for a field.
    weights: list[float] | None = field(
        default=None,
        metadata=described(
            "One number per expert; they are divided by their sum. Default: all alike. With methods that add "
            f"({adding()}) a weight is what the expert's delta is multiplied with, 1 by default, and a negative one "
            "subtracts. Or a name: linear, 1-sqrt, ema:DECAY or uniform weigh the "
            "checkpoints of a training "
            "run by their steps, as such a decay of its learning rate would; nan weighs experts by the inverse norm "
            "of what they learned; continual lets a first expert that is a merge count as often as it has experts."
        ),
    )
    base_model: str | None = field(
        default=None,
        metadata=described(
            "Model the experts were fine-tuned from: local folder, GGUF file or Hub id. Needed for deltas and "
            "adapters."
        ),
    )
    calibration: list[str] | None = field(
        default=None,
        metadata=described(
            "Prompts, without labels, on which the merge is fitted to what its experts compute: EXPERT=FILE, once per "
            "expert; one FILE for all; or self, and every expert writes its own (self:chat: as a user of a chat does, "
            "behind what the chat template begins with). A file is text, .jsonl, .json, .csv or .parquet with a "
            "column text, input_ids or messages."
        ),
    )

    def __post_init__(self) -> None:
        if isinstance(self.calibration, Mapping):  # as a configuration file may have it
            self.calibration = [f"{expert}={file}" for expert, file in self.calibration.items()]
        named: object = self.weights
        for name, hint in get_type_hints(type(self)).items():
            if name != "weights" or not is_name(named):
                setattr(self, name, coerce(name, self.__dict__[name], hint))
        if not self.experts:
            raise ArgumentError("A merge needs at least two experts, but `experts` lists none.")
        if isinstance(named, str) and is_name(named):
            parse_name(named)
        else:
            validate_weights(self.weights, len(self.experts))
        _ = self.calibration_dataset

    @property
    def calibration_dataset(self) -> Mapping[str, str] | str | None:
        """`calibration` as `FisherRaoMerger` takes it: a file per expert, one for all, `"self"` or `"self:chat"`."""
        return None if not self.calibration else parse_calibration(self.calibration, self.experts)
