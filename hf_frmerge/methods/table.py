"""Table of all methods. Choices, help, planning, card and report derive from it; no other module names a method."""

from __future__ import annotations

from hf_frmerge.methods.method import Method, Paper

FISHER_RAO = Paper(
    "Functionality-Oriented LLM Merging on the Fisher–Rao Manifold",
    "Jiayu Wang, Zuojun Ye, Wenpeng Yin",
    2026,
    "2603.04972",
)
TIES = Paper(
    "TIES-Merging: Resolving Interference When Merging Models",
    "Prateek Yadav, Derek Tam, Leshem Choshen, Colin Raffel, Mohit Bansal",
    2023,
    "2306.01708",
)
TASK_ARITHMETIC = Paper(
    "Editing Models with Task Arithmetic",
    "Gabriel Ilharco, Marco Tulio Ribeiro, Mitchell Wortsman, Suchin Gururangan, Ludwig Schmidt, Hannaneh Hajishirzi, "
    "Ali Farhadi",
    2023,
    "2212.04089",
)

_NORM = ("norm", "beta", "on_ambiguous")

_ALL = (
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
        tags=("norm-rescaled-mean",),
    ),
    Method(
        "task_arithmetic",
        "span",
        "task arithmetic",
        "what each expert learned on top of the base model is added up, scaled by the weights.",
        "Adding instead of averaging keeps each expert's change at its full size; the scale decides how loudly the "
        "experts speak together.",
        options=("scale",),
        needs_deltas=True,
        paper=TASK_ARITHMETIC,
        tags=("task-arithmetic",),
    ),
    Method(
        "ties",
        "sparse",
        "TIES",
        "of what each expert changed in the base model, the smallest changes are dropped. For every single value the "
        "experts then vote, up or down, and those on the winning side are averaged.",
        "Most small changes of a fine-tune do not matter, but in an average they water down the large ones; and two "
        "experts that pull a value in opposite directions cancel out. Trimming and voting avoid both.",
        options=("density", "scale"),
        needs_deltas=True,
        blocks=("tensor", "layer", "model"),
        paper=TIES,
        tags=("ties",),
    ),
    Method(
        "given",
        "given",
        "coefficients from a table",
        "the merged values are a sum of the experts' values, each times a coefficient that was given for it.",
        "The coefficients were found elsewhere: by another merge, by an optimisation, or by hand.",
        options=("coefficients",),
        tags=("coefficient-table",),
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
