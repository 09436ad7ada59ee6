"""The sentences a model card uses for methods, spaces and blocks, written for someone who never merged a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodWording:
    """How a card speaks of one method."""

    title: str  # fits "combined by ..."
    how: str  # what it does to one block, in plain words
    why: str  # what it is good for, and against what
    tags: tuple[str, ...]


METHODS: dict[str, MethodWording] = {
    "karcher": MethodWording(
        "the weighted Karcher mean",
        "every expert's values are seen as one arrow. The direction of the merged arrow is the point of the sphere "
        "whose squared angles to all experts' directions, weighted, are smallest in sum (their Karcher mean); its "
        "length follows from the experts' lengths.",
        "Averaging arrows that point in different directions gives a shorter arrow, the more so the more the experts "
        "disagree, and a model whose weights have shrunk answers less well. A mean taken on the sphere does not "
        "shrink, and it works for any number of experts. On the sphere this stands in for a mean on the Fisher–Rao "
        "manifold, where distance measures how differently two models predict.",
        ("karcher-mean", "fisher-rao"),
    ),
    "slerp": MethodWording(
        "spherical interpolation (SLERP)",
        "the two experts' values are seen as two arrows, and the merged arrow lies on the arc between their "
        "directions, at the place the weights say.",
        "Unlike a plain average, a point on the arc is not shorter than the two arrows it lies between. For two "
        "experts this is the same as the Karcher mean.",
        ("slerp",),
    ),
    "linear": MethodWording(
        "a plain weighted average",
        "the merged values are the weighted average of the experts' values.",
        "It is the simplest merge there is, and works well when the experts are close to each other; where they "
        "point in different directions, the average is shorter than the experts.",
        ("linear-merge",),
    ),
    "nre": MethodWording(
        "a norm-rescaled average",
        "the merged values are the weighted average of the experts' values, stretched back to the experts' length.",
        "The stretching undoes the shrinking that averaging brings, at no cost; it is the simple baseline that "
        "spherical methods have to beat.",
        ("norm-rescaled-mean",),
    ),
    "task_arithmetic": MethodWording(
        "task arithmetic",
        "what each expert learned on top of the base model is added up, scaled by the weights.",
        "Adding instead of averaging keeps each expert's change at its full size; the scale decides how loudly the "
        "experts speak together.",
        ("task-arithmetic",),
    ),
}

SPACES: dict[str, str] = {
    "weights": "What is merged are the experts' weights themselves.",
    "deltas": "What is merged are the experts' changes against the base model (their deltas), not their weights.",
}

BLOCKS: dict[str, str] = {
    "tensor": "one weight tensor",
    "row": "one row of a weight tensor",
    "head": "one attention head",
    "layer": "all tensors of one layer",
    "model": "the whole model",
}

NORMS: dict[str, str] = {
    "mean": "the weighted mean of the experts' lengths",
    "median": "the weighted median of the experts' lengths",
    "max": "the greatest of the experts' lengths",
}

# What the figures of `report.figures` show, for who cannot see them.
FIGURES: dict[str, str] = {
    "recovery": "How much of each expert's gain over the base this model keeps",
    "distances": "How far its predictions are from each expert's, token by token",
    "layers": "Activation variance and effective rank, layer by layer, of this model and the experts",
    "angles": "Angles between the experts, tensor by tensor",
    "coefficients": "Coefficient of each expert over its weight, tensor by tensor; 1 is what a plain average gives",
}

PAPER_URL = "https://arxiv.org/abs/2603.04972"
PAPER_BIBTEX = """\
@article{wang2026functionality,
  title         = {Functionality-Oriented {LLM} Merging on the {Fisher--Rao} Manifold},
  author        = {Wang, Jiayu and Ye, Zuojun and Yin, Wenpeng},
  year          = {2026},
  eprint        = {2603.04972},
  archivePrefix = {arXiv}
}"""


def method_wording(method: str) -> MethodWording:
    """Wording of a method; one without an entry is called by its name and not explained."""
    title = method.replace("_", " ").replace("-", " ")
    return METHODS.get(method, MethodWording(title, "", "", (method.replace("_", "-"),)))
