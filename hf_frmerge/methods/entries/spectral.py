"""Methods that merge every matrix as a whole; their functions are in `methods.spectral`."""

from __future__ import annotations

from hf_frmerge.methods.method import Method, Paper

TSV = Paper(
    "Task Singular Vectors: Reducing Task Interference in Model Merging",
    "Antonio Andrea Gargiulo, Donato Crisostomi, Maria Sofia Bucarelli, Simone Scardapane, Fabrizio Silvestri, "
    "Emanuele Rodolà",
    2024,
    "2412.00081",
)
ISO = Paper(
    "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    "Daniel Marczak, Simone Magistri, Sebastian Cygert, Bartłomiej Twardowski, Andrew D. Bagdanov, "
    "Joost van de Weijer",
    2025,
    "2502.04959",
)

KNOTS = Paper(
    "Model Merging with SVD to Tie the Knots",
    "George Stoica, Pratik Ramesh, Boglarka Ecsedi, Leshem Choshen, Judy Hoffman",
    2024,
    "2410.19735",
)
CORE_SPACE = Paper(
    "Accurate and Efficient Low-Rank Model Merging in Core Space",
    "Aniello Panariello, Daniel Marczak, Simone Magistri, Angelo Porrello, Bartłomiej Twardowski, "
    "Andrew D. Bagdanov, Simone Calderara, Joost van de Weijer",
    2025,
    "2509.17786",
)
DC_MERGE = Paper(
    "DC-Merge: Improving Model Merging with Directional Consistency",
    "Han-Chen Zhang, Zi-Hao Zhou, Mao-Lin Luo, Shimin Di, Min-Ling Zhang, Tong Wei",
    2026,
    "2603.06242",
)
ACE = Paper(
    "ACE-Merging: Data-Free Model Merging with Adaptive Covariance Estimation",
    "Bo Xu, Haotian Wu, Hehai Lin, Weiquan Huang, Beier Zhu, Yao Shu, Chengwei Qin",
    2026,
    "2603.02945",
)
ORTHO_MERGE = Paper(
    "Orthogonal Model Merging",
    "Sihan Yang, Kexuan Shi, Weiyang Liu",
    2026,
    "2602.05943",
)
OPCM = Paper(
    "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging",
    "Anke Tang, Enneng Yang, Li Shen, Yong Luo, Han Hu, Lefei Zhang, Bo Du, Dacheng Tao",
    2025,
    "2501.09522",
)

SPECTRAL = (
    Method(
        "tsv_m",
        "spectral",
        "TSV-Merge",
        "what each expert changed in a matrix of the base model is taken apart into directions. The most important "
        "ones of all experts are turned until they stand at right angles to each other, and put together.",
        "Experts disturb each other where they change the same directions; at right angles they cannot.",
        options=("scale",),
        needs_deltas=True,
        cores="both",
        is_compared=True,
        blocks=("tensor",),
        paper=TSV,
        tags=("tsv-merge",),
    ),
    Method(
        "iso_c",
        "spectral",
        "Iso-C",
        "what the experts changed in a matrix of the base model is added up and taken apart into directions, which "
        "are then made equally strong.",
        "In a sum of changes the directions that several experts share drown out all others, and with them the skills "
        "that depend on the others.",
        options=("scale",),
        needs_deltas=True,
        cores="both",
        is_isotropic=True,
        is_compared=True,
        blocks=("tensor",),
        paper=ISO,
        tags=("iso-c",),
    ),
    Method(
        "iso_cts",
        "spectral",
        "Iso-CTS",
        "most directions are those of the experts' added changes; the others are each expert's own. All are turned "
        "until they stand at right angles to each other, and made equally strong.",
        "It is Iso-C with room kept for what only one expert has.",
        options=("density", "scale"),
        density=0.8,
        needs_deltas=True,
        cores="both",
        is_isotropic=True,
        blocks=("tensor",),
        paper=ISO,
        tags=("iso-cts",),
    ),
    Method(
        "swudi",
        "spectral",
        "SWUDI",
        "starting from the sum of what the experts changed in a matrix of the base model, the result is moved towards "
        "one that answers each expert's typical inputs as that expert would; how far is bounded.",
        "What an expert changed tells which inputs it was trained on, so the merge needs no data to know where it "
        "should agree with whom.",
        options=("density", "descent_steps", "scale"),
        density=0.85,
        needs_deltas=True,
        cores="both",
        blocks=("tensor",),
        tags=("swudi",),
    ),
    Method(
        "res_merge",
        "spectral",
        "ResMerge",
        "the strongest direction of what each expert changed in a matrix is set aside. The rest is averaged without "
        "shrinking it where the experts agree, and the strongest directions come back as far as they agree.",
        "A few strong directions would otherwise decide the average, although what an expert learned is mostly in the "
        "rest.",
        options=("scale",),
        needs_deltas=True,
        cores="both",
        blocks=("tensor",),
        tags=("resmerge",),
    ),
    Method(
        "knots",
        "spectral",
        "KnOTS",
        "what the experts changed in a matrix of the base model is written in directions that all of them share. "
        "There the smallest parts are dropped, the experts vote on every part, up or down, and those on the winning "
        "side are averaged.",
        "Adapters that were trained apart use directions of their own, so that value by value they have little to do "
        "with each other. In directions they share, dropping and voting find what belongs together.",
        options=("density", "scale"),
        density=0.2,
        needs_deltas=True,
        cores="left",
        blocks=("tensor",),
        paper=KNOTS,
        tags=("knots", "ties"),
    ),
    Method(
        "core_ties",
        "spectral",
        "TIES in Core Space",
        "what the adapters changed in a matrix of the base model is written in directions that their factors share, "
        "on the side of the inputs and on that of the outputs. In this small matrix the smallest parts are dropped, "
        "the experts vote on every part, up or down, and those on the winning side are averaged.",
        "It is KnOTS with shared directions on both sides: what is dropped and voted on is as small as the adapters "
        "themselves, and the merge is an adapter.",
        options=("density", "scale"),
        density=0.2,
        needs_deltas=True,
        cores="both",
        needs_factors=True,
        blocks=("tensor",),
        paper=CORE_SPACE,
        tags=("core-space", "ties"),
    ),
    Method(
        "dc_merge",
        "spectral",
        "DC-Merge",
        "what each expert changed in a matrix of the base model is taken apart into directions. Those of all experts "
        "are turned until they stand at right angles to each other; every change is written in them, its smallest "
        "parts are dropped, the experts vote on each part, up or down, and what would tie a direction of one expert "
        "to one of another is dropped. Of adapters, all directions are made equally strong first.",
        "The merge keeps the directions of every expert, the weak ones of an adapter as well as the strong.",
        options=("density", "scale"),
        density=0.001,
        needs_deltas=True,
        is_isotropic=True,
        cores="both",
        blocks=("tensor",),
        paper=DC_MERGE,
        tags=("dc-merge", "ties"),
    ),
    Method(
        "ace",
        "spectral",
        "ACE-Merging",
        "what each expert changed in a matrix of the base model tells which inputs it was trained on. The merged "
        "matrix is the one that, on these inputs, comes closest to answering as that expert would; its strongest "
        "directions are evened out if the experts changed by very different amounts.",
        "It asks of the merge what methods with data ask, and needs none.",
        options=("density", "scale"),
        density=0.3,
        needs_deltas=True,
        blocks=("tensor",),
        paper=ACE,
        tags=("ace-merging",),
    ),
    Method(
        "ortho_merge",
        "spectral",
        "OrthoMerge",
        "each expert's matrix is taken as that of the base model, turned, and a rest. The turns are merged as turns, "
        "as far as they go on average; of the rests, a fifth of their sum is added.",
        "A turn changes no length and no angle of what the base model has learned, and an average of turns, unlike an "
        "average of matrices, is one.",
        options=("scale",),
        needs_deltas=True,
        blocks=("tensor",),
        paper=ORTHO_MERGE,
        tags=("orthomerge",),
    ),
    Method(
        "opcm",
        "spectral",
        "continual merging (OPCM)",
        "the first of two experts is a merge, to which the second is added. Of what the second changed in a matrix, "
        "the part that falls on the strongest directions of the merge is left out, and the sum is brought back to the "
        "mean size of all experts' changes so far.",
        "Experts can be added one after the other, whenever they are ready, without keeping those before. What each "
        "brings does not undo what the merge has learned; the order matters.",
        options=("density", "scale"),
        n_experts=2,
        extension="task_arithmetic",
        density=0.5,
        needs_deltas=True,
        cores="both",
        is_continual=True,
        blocks=("tensor",),
        paper=OPCM,
        tags=("opcm", "continual-merging"),
    ),
)
