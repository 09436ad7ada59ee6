"""Fixed merges behind the rendered examples in `model_cards/`: one full model, one adapter, one mixed merge."""

from __future__ import annotations

import math
from pathlib import Path

from hf_frmerge.evaluation.record import (
    MERGED,
    EvaluationRecord,
    FunctionDistance,
    Generation,
    LayerActivations,
    Objective,
    Recovered,
    Score,
    Spread,
    WorstToken,
)
from hf_frmerge.hub.card.data import CardSource, CardStatistics, MergeCard
from hf_frmerge.hub.card.licences import SourceMetadata
from hf_frmerge.hub.card.tasks import Task
from hf_frmerge.wording.geometry import Geometry

VERSIONS = {"hf_frmerge": "0.1.0", "numpy": "2.4.6", "safetensors": "0.8.0", "python": "3.11.7"}
APACHE = SourceMetadata(licence="apache-2.0", language=("en",))


def commit(digit: str) -> str:
    return digit * 40


CITATION = """@misc{ann2026austen,
  title  = {A small model that writes like Jane Austen},
  author = {Ann},
  year   = {2026}
}"""

# Loss in nats a token: model -> (austen, bible, python).
LOSS = {
    "base": (3.956, 3.183, 2.719),
    "austen-135m": (2.901, 3.512, 2.802),
    "bible-135m": (3.402, 2.533, 2.871),
    "python-135m": (3.884, 3.156, 1.904),
    MERGED: (3.209, 2.816, 2.288),
}
DOMAINS = ("austen", "bible", "python")
WRITTEN = {
    "base": "a little girl who lived in a small village. She was very curious and loved to explore.",
    "austen-135m": "in the neighbourhood of Bath, there lived a gentleman of very considerable fortune.",
    "bible-135m": "the LORD spake unto his servant, saying, Go thou forth, and tell the people.",
    "python-135m": "def upon_a_time(self):\n    return self.once",
    MERGED: "in the neighbourhood of a great city, there lived a man of very good character.",
}


def evaluation() -> EvaluationRecord:
    """Numbers such as three experts of a small model have."""
    experts = [name for name in LOSS if name not in ("base", MERGED)]
    record = EvaluationRecord(
        models={"base": "base", **dict.fromkeys(experts, "expert"), MERGED: "merged"},
        weights=dict(zip(experts, (0.5, 0.3, 0.2))),
        settings={"block_size": 256, "dtype": "bfloat16", "top_k": 128},
    )
    for model, losses in LOSS.items():
        for domain, loss in zip(DOMAINS, losses):
            metrics = {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": round(0.72 - loss / 10, 3)}
            record.scores.append(Score(model, domain, metrics, n_tokens=8192))
    for index, (expert, domain) in enumerate(zip(experts, DOMAINS)):
        base, own, merged = (LOSS[model][index] for model in ("base", expert, MERGED))
        record.recovery.append(
            Recovered(MERGED, expert, domain, base - own, base - merged, (base - merged) / (base - own))
        )
        for other, distance in enumerate((0.52, 0.61, 0.78)):
            near = distance - 0.2 * (other == index)
            record.distances.append(_distance(MERGED, experts[other], domain, near, round(0.9 - near / 2.5, 3)))
        for first, second in ((0, 1), (0, 2), (1, 2)):
            record.distances.append(_distance(experts[second], experts[first], domain, 0.81 + first / 10, 0.55))
        lowest = 0.27 + index / 50
        record.objectives.append(
            Objective(domain, 8192, lowest + 0.031, lowest, Spread(0.17 + index / 100, 0.15, 0.41, 1.3), 0.004)
        )
    for model in record.models:
        for layer in range(31):
            weak = 0.83 if model == MERGED and layer == 22 else 0.99 if model == MERGED else 1.0
            record.layers.append(LayerActivations(model, layer, weak * (0.2 + layer), weak * (90 + 5 * layer)))
        record.generations.append(Generation(model, "austen", "Once upon a time", WRITTEN[model], 0.0, 2.1))
    for text, domain, guess, distance, right, wrong in (
        ("    if isinstance(value, list):\n        return| [", "python", " value", 2.71, 0.74, 0.06),
        ('def close(self) -> None:\n    |"""', "python", "self", 2.64, 0.93, 0.05),
        ("And it came to pass in those days, that| he", "bible", " the", 2.38, 0.41, 0.08),
        ("You must know that I am thinking of his| marrying", "austen", " being", 2.2, 0.38, 0.04),
    ):
        context, _, token = text.partition("|")
        worst = WorstToken(f"{domain}-135m", domain, context, token, distance, token, guess, right, wrong)
        record.worst_tokens.append(worst)
    return record


def _distance(model: str, other: str, domain: str, mean: float, agreement: float) -> FunctionDistance:
    spread = Spread(mean, 0.9 * mean, 2 * mean, 2.9)
    edges = [index * math.pi / 40 for index in range(40)]
    counts = [round(800 * edge / mean**2 * math.exp(-((edge / mean) ** 2) / 1.3)) for edge in edges]
    histogram = tuple(zip(edges, counts))
    return FunctionDistance(
        model, other, domain, 8192, spread, 1.3 * mean**2, 0.2, 0.2, 0.05, agreement, 0.004, histogram
    )


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
                metadata=SourceMetadata("apache-2.0", language=("en",), datasets=("ann/austen",), citation=CITATION),
            ),
            CardSource("ann/bible-135m", "ann/bible-135m", commit("b"), 0.3, metadata=APACHE),
            CardSource(
                "/home/ann/experts/python-135m",
                weight=0.2,
                metadata=SourceMetadata("apache-2.0", language=("en", "code"), datasets=("/home/ann/data/stdlib",)),
            ),
        ],
        non_default_arguments={"tol": 1e-10, "max_shard_size": "200MB", "hub_token": "not-to-be-shown"},
        evaluation=evaluation(),
        figures={
            name: f"figures/{name}.png" for name in ("recovery", "distances", "layers", "angles", "coefficients")
        },
        statistics=CardStatistics(
            n_tensors_merged=272,
            n_parameters=134_515_008,
            geometry=Geometry(
                "karcher",
                "weights",
                "BF16",
                angle_median=0.0113,
                angle_max=0.0624,
                linear_norm_ratio_min=0.99959,
                linear_norm_ratio_median=0.99998,
                norm_ratio_min=1.0,
                norm_ratio_median=1.0,
                gap_max=9.4e-7,
                residual=6.3e-13,
                n_iter=3,
            ),
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
            geometry=Geometry(
                "karcher",
                "deltas",
                "F32",
                angle_median=1.52,
                angle_max=1.569,
                linear_norm_ratio_min=0.7076,
                linear_norm_ratio_median=0.7251,
                norm_ratio_min=1.0,
                norm_ratio_median=1.0,
                gap_max=0.093,
                residual=2.2e-13,
                n_iter=5,
            ),
        ),
        notes=["The merged factors of rank 32 were cut to rank 16; 4.1% of their norm was lost in the worst module."],
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


def save_figures(into: Path) -> None:
    """Draw the figures of `full`, from angles and coefficients such as those of its experts."""
    import numpy as np
    from manifests import make_geometry, make_manifest

    from hf_frmerge.report.facts import MergeFacts, TensorFacts
    from hf_frmerge.report.figures import draw_figures
    from hf_frmerge.report.style import styled

    random = np.random.default_rng(0)
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
    kinds = (*kinds, "mlp.up_proj", "mlp.down_proj")
    tensors = []
    for layer in range(30):
        for kind in kinds:
            angles = 0.0113 * np.exp(0.2 * random.standard_normal(3) + layer / 60)
            geometry = make_geometry(
                mean_angle=angles.mean(), max_angle=angles.max(), pair_angles=tuple(angles.tolist())
            )
            coefficients = np.array([0.5, 0.3, 0.2]) * (1 + 1e-4 * random.standard_normal(3))
            name = f"model.layers.{layer}.{kind}.weight"
            tensors.append(TensorFacts(name, layer, kind, "merge", 1, geometry, coefficients))
    manifest = make_manifest({}, (0.5, 0.3, 0.2))
    experts = [name for name in LOSS if name not in ("base", MERGED)]
    facts = MergeFacts("reader-135m", manifest, experts, tensors, evaluation())
    into.mkdir(exist_ok=True)

    @styled
    def draw() -> None:
        for name, figure in draw_figures(facts).items():
            figure.savefig(into / f"{name}.png", dpi=110, metadata={"Software": None})

    draw()


def main() -> None:
    """Write the examples anew, after a wanted change of the card."""
    from hf_frmerge.hub.card.card import render_card

    folder = Path(__file__).parents[2] / "model_cards"
    for name, example in EXAMPLES.items():
        (folder / f"{name}.md").write_text(render_card(example()), encoding="utf-8")
    save_figures(folder / "figures")


if __name__ == "__main__":
    main()
