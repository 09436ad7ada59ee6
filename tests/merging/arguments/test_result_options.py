from __future__ import annotations

from dataclasses import fields

from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.arguments.result_options import RESULT_OPTIONS, is_about_the_result

# Where it is computed and written, what is accepted, shown, measured and pushed.
DECIDE_NOTHING = {
    "output_dir", "overwrite", "resume_from_checkpoint", "allow_license", "allow_pickle", "strict", "stream_from_hub",
    "memory_budget", "num_workers", "device", "run_name", "report_to", "disable_tqdm", "log_level", "logging_steps",
    "logging_first_step", "do_eval", "eval_on_start", "evaluate_experts", "per_device_eval_batch_size", "eval_packing",
    "eval_block_size", "eval_device_map", "use_cpu", "bf16_full_eval", "fp16_full_eval", "dataloader_num_workers",
    "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision", "hub_collection",
}  # fmt: skip


def test_every_option_decides_the_result_or_is_known_not_to() -> None:
    names = {option.name for option in fields(MergingArguments)}
    assert names == {*RESULT_OPTIONS} | DECIDE_NOTHING
    assert not {*RESULT_OPTIONS} & DECIDE_NOTHING


def test_what_a_card_shows() -> None:
    assert is_about_the_result("beta") and is_about_the_result("strict") and is_about_the_result("of_a_later_version")
    assert not is_about_the_result("device") and not is_about_the_result("hub_token")
