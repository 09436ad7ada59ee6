"""Methods whose result is a sum of the experts; their functions are in `methods.span`."""

from __future__ import annotations

from hf_frmerge.methods.method import Method, Paper

FISHER_RAO = Paper(
    "Functionality-Oriented LLM Merging on the Fisher–Rao Manifold",
    "Jiayu Wang, Zuojun Ye, Wenpeng Yin",
    2026,
    "2603.04972",
)
TASK_ARITHMETIC = Paper(
    "Editing Models with Task Arithmetic",
    "Gabriel Ilharco, Marco Tulio Ribeiro, Mitchell Wortsman, Suchin Gururangan, Ludwig Schmidt, Hannaneh Hajishirzi, "
    "Ali Farhadi",
    2023,
    "2212.04089",
)
MODEL_STOCK = Paper(
    "Model Stock: All We Need Is Just a Few Fine-Tuned Models",
    "Dong-Hwan Jang, Sangdoo Yun, Dongyoon Han",
    2024,
    "2403.19522",
)

_NORM = ("norm", "beta", "scale", "on_ambiguous")

SPAN = (
    Method(
        "karcher",
        "span",
        "the weighted Karcher mean",
        "every expert's values are seen as one arrow. The direction of the merged arrow is the point of the sphere "
        "whose squared angles to all experts' directions, weighted, are smallest in sum (their Karcher mean); its "
        "length follows from the experts' lengths.",
        "Averaging arrows that point in different directions gives a shorter arrow, the more so the more the experts "
        "disagree, and a model whose weights have shrunk answers less well. A mean taken on the sphere does not "
        "shrink, and it works for any number of experts. On the sphere this stands in for a mean on the Fisher–Rao "
        "manifold, where distance measures how differently two models predict.",
        options=(*_NORM, "tol", "max_iter"),
        is_directional=True,
        is_spherical=True,
        is_iterative=True,
        is_compared=True,
        paper=FISHER_RAO,
        tags=("karcher-mean", "fisher-rao"),
    ),
    Method(
        "slerp",
        "span",
        "spherical interpolation (SLERP)",
        "the two experts' values are seen as two arrows, and the merged arrow lies on the arc between their "
        "directions, at the place the weights say.",
        "Unlike a plain average, a point on the arc is not shorter than the two arrows it lies between. For two "
        "experts this is the same as the Karcher mean.",
        options=_NORM,
        n_experts=2,
        extension="karcher",
        is_directional=True,
        is_spherical=True,
        tags=("slerp",),
    ),
    Method(
        "linear",
        "span",
        "a plain weighted average",
        "the merged values are the weighted average of the experts' values.",
        "It is the simplest merge there is, and works well when the experts are close to each other; where they "
        "point in different directions, the average is shorter than the experts.",
        options=("scale",),
        has_fixed_coefficients=True,
        is_compared=True,
        tags=("linear-merge",),
    ),
    Method(
        "nre",
        "span",
        "a norm-rescaled average",
        "the merged values are the weighted average of the experts' values, stretched back to the experts' length.",
        "The stretching undoes the shrinking that averaging brings, at no cost; it is the simple baseline that "
        "spherical methods have to beat.",
        options=_NORM,
        is_directional=True,
        is_compared=True,
        tags=("norm-rescaled-mean",),
    ),
    Method(
        "multislerp",
        "span",
        "an average of directions (multi-SLERP)",
        "every expert's values are seen as one arrow. The arrows' directions are averaged by the weights, whatever "
        "their lengths, and the merged arrow has that direction and the experts' length.",
        "It is the first guess from which the Karcher mean is computed, and differs little from it where the experts "
        "are near each other; unlike the norm-rescaled average it does not lean towards the longer experts.",
        options=_NORM,
        is_directional=True,
        is_spherical=True,
        tags=("multi-slerp",),
    ),
    Method(
        "nuslerp",
        "span",
        "spherical interpolation of the experts as they are (NuSLERP)",
        "the two experts' values are seen as two arrows, which are added with the weights of an arc between them; the "
        "length of the merged arrow follows from theirs.",
        "It is SLERP without a rule for the length, and the same where the two experts are equally long. Row by row, "
        "it lets every neuron turn by an angle of its own.",
        options=("scale", "on_ambiguous"),
        n_experts=2,
        extension="karcher",
        is_spherical=True,
        is_compared=True,
        tags=("nuslerp",),
    ),
    Method(
        "geometric_median",
        "span",
        "the geometric median",
        "the merged values are the point with the smallest distance to the experts on average. Unlike in an average, "
        "distances are not squared.",
        "An expert that is far from all others pulls an average towards itself, the more the farther it is. It pulls "
        "the median no more than any other expert does.",
        options=("scale", "tol", "max_iter"),
        is_iterative=True,
        is_compared=True,
        tags=("geometric-median",),
    ),
    Method(
        "model_stock",
        "span",
        "Model Stock",
        "what the experts learned on top of the base model is averaged, and the average is shortened, the more so the "
        "more the experts disagree.",
        "Of what several fine-tunes of one task changed, a part is common to them and the rest is chance. The angles "
        "between their changes tell how large the common part is. Experts with nothing in common give the base model.",
        options=("scale",),
        needs_deltas=True,
        is_compared=True,
        paper=MODEL_STOCK,
        tags=("model-stock",),
    ),
    Method(
        "task_arithmetic",
        "span",
        "task arithmetic",
        "what each expert learned on top of the base model is added up, scaled by the weights.",
        "Adding instead of averaging keeps each expert's change at its full size; the scale decides how loudly the "
        "experts speak together. A negative weight subtracts what an expert learned, as to make a model unlearn it.",
        options=("scale",),
        has_fixed_coefficients=True,
        needs_deltas=True,
        adds=True,
        is_compared=True,
        paper=TASK_ARITHMETIC,
        tags=("task-arithmetic",),
    ),
)
