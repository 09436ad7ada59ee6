"""Name options that change nothing beside the others."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from hf_frmerge.merging.arguments.calibration import FIT_OPTIONS, REFINE_OPTIONS
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments


def unused_options(args: MergingArguments, *, has_prompts: bool, makes_adapter: bool = False) -> list[str]:
    """
    Return a sentence for each option that was changed and that nothing reads: of another method, of no fit or adapter.

    They are named and not refused, so that one set of options can serve several methods.

    Args:
        args: Options.
        has_prompts: Whether there are prompts of the experts.
        makes_adapter: Whether the output is an adapter.
    """
    changed = [option.name for option in fields(args) if getattr(args, option.name) != option.default]
    of_methods = {name for method in METHODS.values() for name in method.options if name != "seed"} | {"svc_floor"}
    used = {*METHODS[args.method].options}
    if args.post_step is not None:
        used.add("svc_floor")
    if args.fisher is not None:
        used.add("fisher_labels")
    why = dict.fromkeys(of_methods - used, f"with method={args.method!r}")
    if not args.refine_steps:
        why |= dict.fromkeys(REFINE_OPTIONS, "without refine_steps (--refine)")
    elif args.refine_loss != "jsd":
        why["refine_beta"] = f"with refine_loss={args.refine_loss!r}"
    if not has_prompts:
        why |= dict.fromkeys(FIT_OPTIONS, "without prompts (--calibration)")
    elif args.fisher is not None:
        why["calibration_rank"] = f"with fisher={args.fisher!r}"
    elif METHODS[args.method].needs_prompts and not METHODS[args.method].fits_adapter:  # nothing of low rank
        why["calibration_rank"] = f"with method={args.method!r}"
    if not makes_adapter:
        why |= dict.fromkeys(
            ("adapter_rank", "adapter_energy", "adapter_rank_pattern"), "where a full model is written"
        )
    return [f"`{name}` changes nothing {why[name]}." for name in changed if name in why]
