"""Fixed merges behind the rendered examples in `model_cards/`: one full model, one adapter, one mixed merge."""

from __future__ import annotations

from hf_frmerge.hub.card_data import CardSource, CardStatistics, MergeCard
from hf_frmerge.hub.licences import SourceMetadata
from hf_frmerge.hub.tasks import Task

VERSIONS = {"hf_frmerge": "0.1.0", "numpy": "2.4.6", "safetensors": "0.8.0", "python": "3.11.7"}
APACHE = SourceMetadata(licence="apache-2.0", language=("en",))


def commit(digit: str) -> str:
    return digit * 40


def full() -> MergeCard:
    return MergeCard(
        model_name="reader-135m",
        output_kind="full",
        hub_model_id="ann/reader-135m",
        task=Task("text-generation", "AutoModelForCausalLM"),
        sources=[
            CardSource(
                "ann/austen-135m",
                "ann/austen-135m",
                commit("a"),
                0.5,
                metadata=SourceMetadata("apache-2.0", language=("en",), datasets=("ann/austen",)),
            ),
            CardSource("ann/bible-135m", "ann/bible-135m", commit("b"), 0.3, metadata=APACHE),
            CardSource(
                "/home/ann/experts/python-135m",
                weight=0.2,
                metadata=SourceMetadata("apache-2.0", language=("en", "code"), datasets=("/home/ann/data/stdlib",)),
            ),
        ],
        non_default_arguments={"tol": 1e-10, "max_shard_size": "200MB", "hub_token": "not-to-be-shown"},
        evaluation=[
            {"model": "ann/austen-135m", "domain": "austen", "loss": 2.901, "perplexity": 18.19},
            {"model": "ann/austen-135m", "domain": "bible", "loss": 3.512, "perplexity": 33.52},
            {"model": "ann/bible-135m", "domain": "austen", "loss": 3.402, "perplexity": 30.02},
            {"model": "ann/bible-135m", "domain": "bible", "loss": 2.533, "perplexity": 12.59},
            {"model": "merged", "domain": "austen", "loss": 3.009, "perplexity": 20.27},
            {"model": "merged", "domain": "bible", "loss": 2.816, "perplexity": 16.71},
        ],
        statistics=CardStatistics(
            n_tensors_merged=272,
            n_parameters=134_515_008,
            output_dtype="BF16",
            angle_median=0.0113,
            angle_max=0.0624,
            linear_norm_ratio_min=0.99959,
            linear_norm_ratio_median=0.99998,
            merged_norm_ratio_min=1.0,
            merged_norm_ratio_median=1.0,
            karcher_nre_gap_median=3.1e-10,
            karcher_nre_gap_max=9.4e-7,
            worst_residual=6.3e-13,
            n_not_converged=0,
            n_ambiguous=0,
        ),
        notes=["The chat templates of ann/austen-135m and ann/bible-135m differ; that of ann/austen-135m is used."],
        versions=VERSIONS,
    )


def adapter() -> MergeCard:
    llama = SourceMetadata("llama3.2", language=("en",))
    return MergeCard(
        model_name="tutor-lora",
        output_kind="adapter",
        hub_model_id="ann/tutor-lora",
        task=Task("text-generation", "AutoModelForCausalLM", "peft"),
        space="deltas",
        sources=[
            CardSource("ann/maths-lora", "ann/maths-lora", commit("1"), 0.5, kind="adapter", metadata=llama),
            CardSource("ben/history-lora", "ben/history-lora", commit("2"), 0.5, kind="adapter", metadata=llama),
            CardSource("meta/small-1b", "meta/small-1b", commit("3"), role="base", metadata=llama),
        ],
        non_default_arguments={"adapter_rank": 16},
        statistics=CardStatistics(
            n_tensors_merged=112,
            n_parameters=11_272_192,
            output_dtype="F32",
            angle_median=1.52,
            angle_max=1.569,
            linear_norm_ratio_min=0.7076,
            linear_norm_ratio_median=0.7251,
            merged_norm_ratio_min=1.0,
            merged_norm_ratio_median=1.0,
            karcher_nre_gap_median=0.018,
            karcher_nre_gap_max=0.093,
            worst_residual=2.2e-13,
            n_not_converged=0,
        ),
        notes=["The merged factors of rank 32 were cut to rank 16; 4.1 % of their norm was lost in the worst module."],
        versions={**VERSIONS, "peft": "0.21.2"},
    )


def mixed() -> MergeCard:
    return MergeCard(
        model_name="polyglot-base",
        output_kind="full",
        hub_model_id=None,
        task=Task("fill-mask", "AutoModelForMaskedLM"),
        space="deltas",
        sources=[
            CardSource(
                "org/german-encoder",
                "org/german-encoder",
                commit("d"),
                0.6,
                metadata=SourceMetadata("cc-by-nc-sa-4.0", language=("de",), tags=("not-for-all-audiences",)),
            ),
            CardSource("../adapters/french-lora", weight=0.4, kind="adapter"),
            CardSource("org/encoder", "org/encoder", commit("e"), role="base", metadata=SourceMetadata("mit")),
        ],
        method="task_arithmetic",
        non_default_arguments={
            "method": "task_arithmetic",
            "scale": 0.8,
            "weight_rules": [r"embeddings\.=1,0"],
            "space": "deltas",
        },
        statistics=CardStatistics(n_tensors_merged=96, n_tensors_copied=7, n_parameters=22_700_000),
        versions=VERSIONS,
    )


EXAMPLES = {"full": full, "adapter": adapter, "mixed": mixed}


def main() -> None:
    """Write the examples anew, after a wanted change of the card."""
    from pathlib import Path

    from hf_frmerge.hub.card import render_card

    for name, example in EXAMPLES.items():
        path = Path(__file__).parents[2] / "model_cards" / f"{name}.md"
        path.write_text(render_card(example()), encoding="utf-8")


if __name__ == "__main__":
    main()
