"""Fit a merge of a comparison to its experts on prompts, as `frmerge merge --calibration` does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128, xxh3_128_hexdigest

from hf_frmerge.calibration.calibrate import prepare
from hf_frmerge.checkpoints.disk import remove_folder
from hf_frmerge.errors import MergeError
from hf_frmerge.evaluation.text.datasets import read_texts
from hf_frmerge.merging.arguments.calibration import FIT_OPTIONS, REFINE_OPTIONS, SELF_WRITTEN
from hf_frmerge.merging.engine.processes import Processes

if TYPE_CHECKING:
    from hf_frmerge.comparison.candidates import Cell
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.planning.plan import MergePlan


class WithoutGainError(MergeError):
    """A fit brought the merge no closer to its experts, so that it would be the merge without a fit."""


class Fitter:
    """
    Fits planned merges to their experts.

    What a fit found is kept in the folder of the comparison until the comparison is finished: an interrupted fit goes
    on, and the merge that is made again for the test texts is not fitted again.

    Args:
        calibration: Prompts, as for `FisherRaoMerger`: files, datasets, lists of texts, or `"self"`, `"self:chat"`.
        args: Arguments of the comparison.
        folder: Folder of the comparison.

    Attributes:
        digest: of the prompts, and of how merges are fitted to them.

    Raises:
        ArgumentError: If a file cannot be read.
    """

    def __init__(self, calibration: Any, args: MergingArguments, folder: Path) -> None:
        self._calibration, self._folder = calibration, folder / ".fits"
        options = args.to_dict()
        state = xxh3_128(json.dumps({name: options[name] for name in (*FIT_OPTIONS, *REFINE_OPTIONS)}).encode())
        by_expert = calibration.items() if isinstance(calibration, Mapping) else [("", calibration)]
        for expert, data in by_expert:
            is_named = isinstance(data, (str, Path))
            is_own = is_named and data in SELF_WRITTEN
            for row in (expert, *([data] if is_own else read_texts(str(data)) if is_named else data)):
                state.update(f"{len(str(row))} {row}".encode())
        self.digest = state.hexdigest()

    def check(self, plan: MergePlan) -> None:
        """
        Check that a merge can be fitted, before anything is run.

        Raises:
            ArgumentError: As `frmerge merge --calibration` does.
        """
        prepare(plan, self._calibration)

    def fit(self, plan: MergePlan, cell: Cell) -> int:
        """
        Fit a planned merge, and add what was found to the plan; return the number of prompts.

        Raises:
            WithoutGainError: If nothing brings it closer to the experts.
            MergeError: Whatever stopped the fit.
        """
        folder = self._folder / xxh3_128_hexdigest(cell.key.encode())
        fit = prepare(plan, self._calibration, measures_base_text=False)  # no table shows it
        plan.calibration = fit(folder, Processes(alone=True))
        assert plan.calibration is not None  # it is the main process that has it
        if not plan.calibration.is_corrected:
            raise WithoutGainError(
                "Fitted to its experts, it came no closer to them on prompts held out from the fit: it would be the "
                "merge without a fit. More prompts, closer to what the experts were trained on, may help."
            )
        plan.take_fit(folder)
        return sum(plan.calibration.prompts)

    def close(self) -> None:
        """Remove what fits found."""
        remove_folder(self._folder)
