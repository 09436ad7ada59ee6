"""The callbacks of every merge, around those of the user."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_frmerge.merging.callbacks.callback import DefaultFlowCallback, PrinterCallback
from hf_frmerge.merging.callbacks.progress import ProgressCallback
from hf_frmerge.merging.callbacks.reporting import reporting_callbacks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.callbacks.callback import MergeCallback


def with_default_callbacks(
    callbacks: Iterable[MergeCallback | type[MergeCallback]], args: MergingArguments
) -> list[MergeCallback | type[MergeCallback]]:
    """
    Put the flow and the reporters before the user's callbacks, and what shows the progress after them.

    Raises:
        ArgumentError: If `args.report_to` names an integration that is unknown or not installed.
    """
    display = PrinterCallback if args.disable_tqdm else ProgressCallback
    return [DefaultFlowCallback, *reporting_callbacks(args.report_to), *callbacks, display]
