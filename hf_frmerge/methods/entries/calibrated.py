"""Methods that ask what the experts do on prompts, and add what follows from it to a plain average."""

from __future__ import annotations

from hf_frmerge.methods.method import Method, Paper

REGMEAN = Paper(
    "Dataless Knowledge Fusion by Merging Weights of Language Models",
    "Xisen Jin, Xiang Ren, Daniel Preotiuc-Pietro, Pengxiang Cheng",
    2022,
    "2212.09849",
)
REGMEAN_PLUS_PLUS = Paper(
    "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging",
    "The-Hai Nguyen, Dang Huu-Tien, Takeshi Suzuki, Le-Minh Nguyen",
    2025,
    "2508.03121",
)
FISHER = Paper("Merging Models with Fisher-Weighted Averaging", "Michael Matena, Colin Raffel", 2021, "2111.09832")
MATS = Paper(
    "Merging by Matching Models in Task Parameter Subspaces",
    "Derek Tam, Mohit Bansal, Colin Raffel",
    2023,
    "2312.04339",
)

CALIBRATED = (
    Method(
        "regmean",
        "calibrated",
        "RegMean",
        "every linear layer gets the weights whose outputs are nearest to the experts' outputs, each expert's on the "
        "inputs that the layer has in that expert. Everything else is averaged.",
        "What a layer computes matters only for inputs that occur. A few prompts show which do, and then the best "
        "weights of a layer follow in one step.",
        options=("off_diagonal", "scale"),
        fits_adapter=True,
        blocks=("tensor",),
        paper=REGMEAN,
        tags=("regmean",),
    ),
    Method(
        "regmean++",
        "calibrated",
        "RegMean++",
        "every linear layer gets the weights whose outputs are nearest to the experts' outputs, on the inputs that "
        "the layer has in each expert behind the merged layers below it. Everything else is averaged.",
        "In RegMean each layer is made for inputs from the experts, but in the merged model it gets those of merged "
        "layers. Merged from the bottom up, it can be made for these.",
        options=("off_diagonal", "scale"),
        fits_adapter=True,
        blocks=("tensor",),
        paper=REGMEAN_PLUS_PLUS,
        tags=("regmean", "regmean-plus-plus"),
    ),
    Method(
        "fisher",
        "calibrated",
        "an average by Fisher information",
        "the merged values are an average in which, value by value, that expert counts most whose predictions depend "
        "on the value most. Embeddings, heads and all else outside of the layers is averaged by weight alone.",
        "A plain average lets an expert that does not use a value decide about it as much as one that does. A few "
        "prompts show which values an expert uses.",
        options=("fisher_labels", "scale"),
        blocks=("tensor",),
        paper=FISHER,
        tags=("fisher-weighted-averaging",),
    ),
    Method(
        "mats",
        "calibrated",
        "MaTS",
        "every linear layer gets the weights that change the experts' predictions least, as far as the curvature of "
        "each expert's predictions around its weights tells. Everything else is averaged.",
        "An average by Fisher information decides value by value. The values of a layer work together, and two small "
        "matrices a layer say how.",
        options=("fisher_labels", "max_iter", "scale"),
        blocks=("tensor",),
        paper=MATS,
        tags=("mats",),
    ),
)
