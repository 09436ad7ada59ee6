"""Methods that decide about every element of the experts' deltas."""

from __future__ import annotations

from hf_frmerge.methods.method import Method, Paper

TIES = Paper(
    "TIES-Merging: Resolving Interference When Merging Models",
    "Prateek Yadav, Derek Tam, Leshem Choshen, Colin Raffel, Mohit Bansal",
    2023,
    "2306.01708",
)
DARE = Paper(
    "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    "Le Yu, Bowen Yu, Haiyang Yu, Fei Huang, Yongbin Li",
    2023,
    "2311.03099",
)
DELLA = Paper(
    "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
    "Pala Tej Deep, Rishabh Bhardwaj, Soujanya Poria",
    2024,
    "2406.11617",
)
BREADCRUMBS = Paper(
    "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
    "MohammadReza Davari, Eugene Belilovsky",
    2023,
    "2312.06795",
)
FUSECHAT = Paper(
    "FuseChat: Knowledge Fusion of Chat Models",
    "Fanqi Wan, Longguang Zhong, Ziyi Yang, Ruijun Chen, Xiaojun Quan",
    2024,
    "2408.07990",
)
CONSENSUS = Paper(
    "Localizing Task Information for Improved Model Merging and Compression",
    "Ke Wang, Nikolaos Dimitriadis, Guillermo Ortiz-Jimenez, François Fleuret, Pascal Frossard",
    2024,
    "2405.07813",
)
LOCALIZE_AND_STITCH = Paper(
    "Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic",
    "Yifei He, Yuzheng Hu, Yong Lin, Tong Zhang, Han Zhao",
    2024,
    "2408.13656",
)
RAM = Paper(
    "Behavior Knowledge Merge in Reinforced Agentic Models",
    "Xiangchi Yuan, Dachuan Shi, Chunhui Zhang, Zheyuan Liu, Shenglong Yao, Soroush Vosoughi, Wenke Lee",
    2026,
    "2601.13572",
)

BLOCKS = ("tensor", "layer", "model")

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
        density=0.2,
        needs_deltas=True,
        is_compared=True,
        blocks=BLOCKS,
        paper=TIES,
        tags=("ties",),
    ),
    Method(
        "dare_linear",
        "sparse",
        "DARE",
        "of what each expert changed in the base model, values are dropped at random, and those that are left are "
        "enlarged to make up for it. Then all changes are added up, scaled by the weights.",
        "Most changes of a fine-tune can be dropped without harm. The fewer are left of each expert, the fewer of two "
        "experts fall on one value, where they would get in each other's way.",
        options=("density", "scale", "seed"),
        density=0.8,
        needs_deltas=True,
        adds=True,
        blocks=BLOCKS,
        paper=DARE,
        tags=("dare",),
    ),
    Method(
        "dare_ties",
        "sparse",
        "DARE with the vote of TIES",
        "of what each expert changed in the base model, values are dropped at random, and those that are left are "
        "enlarged to make up for it. For every single value the experts then vote, up or down, and those on the "
        "winning side are averaged.",
        "Dropping at random leaves the size of the changes as it was on average, and the vote settles what still "
        "falls on one value.",
        options=("density", "scale", "seed"),
        density=0.8,
        needs_deltas=True,
        is_compared=True,
        blocks=BLOCKS,
        paper=DARE,
        tags=("dare", "ties"),
    ),
    Method(
        "della",
        "sparse",
        "DELLA",
        "of what each expert changed in the base model, values are dropped at random, small ones more often than "
        "large ones of the same row, and those that are left are enlarged to make up for it. For every single value "
        "the experts then vote, up or down, and those on the winning side are averaged.",
        "It joins the two ways to thin out what an expert changed: large changes matter more, and chance keeps the "
        "average of all of them right.",
        options=("density", "epsilon", "scale", "seed"),
        density=0.7,
        needs_deltas=True,
        blocks=BLOCKS,
        paper=DELLA,
        tags=("della",),
    ),
    Method(
        "breadcrumbs",
        "sparse",
        "Model Breadcrumbs",
        "of what each expert changed in the base model, the few largest and the many small changes are dropped. The "
        "rest is added up, scaled by the weights.",
        "The largest changes of a fine-tune are often outliers that upset a merge, and the small ones are noise; what "
        "lies between carries what was learned.",
        options=("density", "gamma", "scale"),
        density=0.1,
        needs_deltas=True,
        adds=True,
        blocks=BLOCKS,
        paper=BREADCRUMBS,
        tags=("breadcrumbs",),
    ),
    Method(
        "sce",
        "sparse",
        "SCE",
        "only values about which the experts differ most are changed in the base model. There the experts vote, up or "
        "down, with weights that grow with how much they changed, and those on the winning side are averaged.",
        "What all experts changed alike, or hardly at all, tells them apart least; what remains is merged in "
        "proportion to how much each expert learned.",
        options=("density", "scale"),
        density=0.1,
        needs_deltas=True,
        blocks=BLOCKS,
        paper=FUSECHAT,
        tags=("sce",),
    ),
    Method(
        "consensus",
        "sparse",
        "consensus task arithmetic",
        "what each expert learned on top of the base model is added up, scaled by the weights, but only for values on "
        "which at least two experts have a say.",
        "A value that matters to one expert alone, or to none, mostly disturbs the others; leaving it as it is in the "
        "base model costs little.",
        options=("agreement", "scale"),
        needs_deltas=True,
        adds=True,
        blocks=BLOCKS,
        paper=CONSENSUS,
        tags=("consensus-task-arithmetic",),
    ),
    Method(
        "localize_and_stitch",
        "sparse",
        "Localize-and-Stitch",
        "of what each expert changed in the base model, only the largest changes are kept. They are put side by side, "
        "and averaged where several experts changed the same value.",
        "A skill mostly sits in few values. Few of them overlap, so each expert keeps its own at their full size.",
        options=("density", "scale"),
        density=0.1,
        needs_deltas=True,
        blocks=BLOCKS,
        paper=LOCALIZE_AND_STITCH,
        tags=("localize-and-stitch",),
    ),
    Method(
        "ram",
        "sparse",
        "reinforced agent merging (RAM)",
        "values that several experts changed are averaged over these experts, and values that only one expert changed "
        "are taken from it as they are.",
        "Training by reinforcement changes few values. An average over all experts would shrink those that one expert "
        "changed alone.",
        options=("min_change", "scale"),
        needs_deltas=True,
        blocks=BLOCKS,
        paper=RAM,
        tags=("ram",),
    ),
)
