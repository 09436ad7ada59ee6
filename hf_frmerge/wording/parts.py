"""Titles and explanations of the parts of an evaluation and of the figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Heading of a part, and the explanation below it for readers new to it."""

    title: str
    meaning: str = ""


RECOVERY = Part(
    "What it keeps of each expert",
    "What an expert learned is how much better than the base model it predicts its own text (in nats a token: 0.7 "
    "halves the perplexity). Kept is the share of that which the merged model still has.",
)
DISTANCES = Part(
    "How closely it predicts like the experts",
    "Mean Fisher–Rao distance between two models' predictions of the next token, in radians: 0 if they predict the "
    "same, 3.14 if each rules out what the other expects.",
)
OBJECTIVES = Part(
    "The objective of the merge",
    "The quantity such a merge is meant to make small is the mean squared distance to the experts, weighted (in rad²; "
    "arXiv 2603.04972, Eq. 3). No model can be below the lowest value, which a perfect compromise of the experts' "
    "predictions would have.",
)
LAYERS = Part(
    "Whether its layers still do their work",
    "A bad merge collapses: some layer gives nearly the same answer whatever the text. This is the spread of each "
    "layer's activations (their variance), and the number of directions they use (their effective rank), over the "
    "experts' mean; 100% means that nothing was lost.",
)
GENERATIONS = Part(
    "In its own words",
    "The likeliest continuation according to each model, and the share of it that repeats itself (of 4-grams of "
    "tokens, those that occurred before).",
)
WORST_TOKENS = Part(
    "Tokens on which it is farthest from an expert",
    "Beside its first guess, how likely a model finds the token that the text really has.",
)
BLOCKS = Part("What the merge did to the weights")

FIGURES = {
    "recovery": Part(
        "How much of each expert's gain over the base is kept",
        "On that expert's own text. 0% is as good as the base, 100% as good as the expert.",
    ),
    "distances": Part(
        "How far its predictions are from each expert's, token by token",
        "Filled, those of the merged model; the line, those of the other experts. Dashes mark the means. 0 is the "
        "same prediction, π nothing in common.",
    ),
    "layers": Part(
        "Activation variance and effective rank, layer by layer, of the merged model and the experts",
        "Above, the variance of the activations and the number of directions they spread over; below, both over the "
        "experts' mean. A merged model that falls far below 1 has collapsed there.",
    ),
    "angles": Part(
        "Angles between the experts, tensor by tensor",
        "Each pair, and each tensor by its layer. At 0 rad they agree; at 1.57 (a right angle) they have nothing in "
        "common.",
    ),
    "coefficients": Part(
        "Coefficient of each expert over its weight, tensor by tensor",
        "1 everywhere is a plain average; above 1 lengths are made up for. Tensors outside the layers run along their "
        "whole row.",
    ),
}
"""Name of a figure in a report -> its title and explanation."""
