"""Methods that decide about every element of the experts' deltas."""

from __future__ import annotations

from hf_frmerge.methods.method import Method, Paper

TIES = Paper(
    "TIES-Merging: Resolving Interference When Merging Models",
    "Prateek Yadav, Derek Tam, Leshem Choshen, Colin Raffel, Mohit Bansal",
    2023,
    "2306.01708",
)

SPARSE = (
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
)
