"""Options of a merge, under the names `transformers.TrainingArguments` uses where it has one."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from typing import Any, get_type_hints

from hf_frmerge.checkpoints.remote_output import local_folder
from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.checks import (
    check_adapter_options,
    check_choices,
    check_fisher,
    check_layer_scales,
    check_method,
    check_post_step,
    check_ranges,
    check_table,
)
from hf_frmerge.merging.arguments.help_texts import default_densities, described, methods_with
from hf_frmerge.merging.arguments.tensor_rules import check_rules
from hf_frmerge.merging.arguments.values import coerce, parse_size
from hf_frmerge.methods.entries.auto import AUTO
from hf_frmerge.methods.table import CHOICES

SPACES = ("weights", "deltas")
BLOCKS = ("tensor", "row", "head", "layer", "model")
NORMS = ("mean", "median", "max")
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
POST_STEPS = ("svc",)
FISHER_FORMS = ("diagonal", "kfac")
FISHER_LABELS = ("sampled", "exact", "empirical")
ADAPTER_OUTPUTS = ("auto", "adapter", "merged")
RANK_PATTERNS = ("auto", "uniform")
LOG_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "passive": logging.NOTSET,  # leave the level of the application alone
}

# Arguments that stand in the records of earlier versions and never had an effect. They are ignored when read.
RETIRED = ("metric_for_best_model", "greater_is_better", "hub_strategy")


@dataclass
class MergingArguments:
    """
    Options of merging, evaluating, reporting and pushing. The metadata of every field has its help text.

    Values from the command line, YAML and JSON are converted to the type of their field, so that all three give equal
    objects. Sizes are texts such as `"512MiB"`; `memory_budget_bytes` and `max_shard_bytes` are in bytes.

    Raises:
        ArgumentError: If a value has the wrong type, is out of range or unknown, or contradicts another.
    """

    output_dir: str = field(
        default="merged", metadata=described("Folder the merged model is written to, or its fsspec URL.")
    )

    # 1. The mean
    method: str = field(
        default="karcher",
        metadata=described(
            "How the experts are combined. auto: chosen by their kind, and with prompts by the distance to them.",
            CHOICES.keys(),
        ),
    )
    space: str | None = field(
        default=None,
        metadata=described(
            "Whether the points are the weights or their differences to the base model. Default: deltas if any expert "
            "is an adapter, else weights.",
            SPACES,
        ),
    )
    block: str = field(default="tensor", metadata=described("What one sphere covers.", BLOCKS))
    norm: str = field(
        default="mean",
        metadata=described("Which norm of the experts a merged block gets (weighted mean, median, max).", NORMS),
    )
    beta: float = field(
        default=0.0,
        metadata=described(
            "Exponent of the coherence factor on the norm: 0 keeps the norm, 1 is the plain mean, -1 the plain sum."
        ),
    )
    scale: float = field(
        default=1.0,
        metadata=described("Factor of the merged deltas that are added to the base, in delta space with any method."),
    )
    density: float | None = field(
        default=None,
        metadata=described(
            "Share of the elements of every delta, or of the directions of a matrix, that is kept. "
            f"Default: {default_densities()}."
        ),
    )
    gamma: float = field(
        default=0.01,
        metadata=described(f"Share of the largest elements of a delta that is dropped ({methods_with('gamma')})."),
    )
    epsilon: float = field(
        default=0.07,
        metadata=described(
            "How much likelier than density the largest element of a row is kept, and the smallest less likely "
            f"({methods_with('epsilon')})."
        ),
    )
    agreement: float = field(
        default=0.2,
        metadata=described(
            "Share of the other experts' sum that an expert's element must exceed to count "
            f"({methods_with('agreement')})."
        ),
    )
    min_change: float = field(
        default=1e-5,
        metadata=described(f"Magnitude above which an element counts as changed ({methods_with('min_change')})."),
    )
    seed: int = field(
        default=42,
        metadata=described(
            f"Seed of all that is random: elements that are dropped ({methods_with('seed')}), and the prompts of a "
            "calibration."
        ),
    )
    descent_steps: float = field(
        default=300.0,
        metadata=described(
            "Steps of gradient descent that the closed form stands for; more move further from the sum "
            f"({methods_with('descent_steps')})."
        ),
    )
    off_diagonal: float = field(
        default=0.9,
        metadata=described(
            "Factor of what two inputs of a layer have in common; less trusts the prompts less "
            f"({methods_with('off_diagonal')})."
        ),
    )
    fisher: str | None = field(
        default=None,
        metadata=described(
            "Measure lengths and angles by how much the experts' predictions depend on each weight (diagonal), or on "
            "each linear layer's weights together (kfac): their mean Fisher information on the prompts of "
            "--calibration. The merge is then not fitted to these. For methods that decide by lengths and angles.",
            FISHER_FORMS,
        ),
    )
    fisher_labels: str = field(
        default="sampled",
        metadata=described(
            "Of which labels Fisher information is about: drawn from each expert's own predictions; all that it may "
            "predict, summed exactly (at most 256); or those of the text, which makes it the empirical one "
            f"(--fisher, {methods_with('fisher_labels')}).",
            FISHER_LABELS,
        ),
    )
    merged_before: int = field(
        default=1,
        metadata=described(
            "How many experts the first one is a merge of. --weights continual and continual methods read it from the "
            "first one's record."
        ),
    )
    layer_scales: str | None = field(
        default=None,
        metadata=described(
            "Factors of the merged delta, a:b:c, interpolated from the first layer to the last; tensors that belong "
            "to no layer keep theirs. With any method, in delta space."
        ),
    )
    post_step: str | None = field(
        default=None,
        metadata=described(
            "What is done to every merged matrix of a layer, after any method. svc: directions that several experts "
            "share are weakened to what one of them has.",
            POST_STEPS,
        ),
    )
    svc_floor: float = field(
        default=0.1,
        metadata=described("Least share that svc takes an expert to have in a direction; more weakens more."),
    )
    coefficients: str | None = field(
        default=None,
        metadata=described(
            "Safetensors file, or folder of a merge, with the coefficients of every tensor, blocks down and experts "
            "across. They take the place of a method."
        ),
    )
    tol: float = field(
        default=1e-12,
        metadata=described("Stop the iteration when the norm of the gradient (karcher: in radians) is below this."),
    )
    max_iter: int = field(
        default=100,
        metadata=described(
            "Give up the iteration after this many steps; the report then says so. Of mats fewer steps stay nearer to "
            "the average, which is what keeps it from fitting chance."
        ),
    )
    on_ambiguous: str = field(
        default="raise",
        metadata=described(
            "What to do with a block whose experts cancel out, so that no mean direction is preferred.",
            ("raise", "linear"),
        ),
    )
    weight_rules: list[str] | None = field(
        default=None,
        metadata=described(
            "Weights for some tensors only: ordered 'REGEX=w1,w2,...' rules, the first that matches a tensor name "
            "wins; 'a:b:c' in place of a number is interpolated over the layers."
        ),
    )

    leave_out: list[str] | None = field(
        default=None,
        metadata=described(
            "Regular expression of tensors that the merged model does not get, such as heads of different sizes."
        ),
    )
    take: list[str] | None = field(
        default=None,
        metadata=described(
            "'REGEX=EXPERT': tensors that are taken as they are from one expert (as it was written, or its number) or "
            "from base, the base model; a head brings along its class and its labels."
        ),
    )

    # 2. Tokens and settings
    tokenizer_source: str | None = field(
        default=None,
        metadata=described(
            "Whose tokens the output has, where the models' differ: base, union (the base's, then the others'), or an "
            "expert (as in the list, or its number). Rows of embeddings and output layers are matched by token; a "
            "model that lacks one gets the weighted mean of the experts that have it, else the row of the base."
        ),
    )
    pad_to_multiple_of: int | None = field(
        default=None,
        metadata=described("Round the rows of embeddings up to a multiple of this; goes with tokenizer_source."),
    )
    settings_from: str | None = field(
        default=None,
        metadata=described(
            "Model whose chat template, special tokens and generation settings the output gets: base or an expert. "
            "Default: the model whose tokens it has."
        ),
    )

    # 3. Calibration
    num_calibration_samples: int = field(default=64, metadata=described("Prompts an expert that are used."))
    max_calibration_length: int = field(default=128, metadata=described("Tokens a prompt; longer texts are cut."))
    calibration_batch_size: int = field(default=8, metadata=described("Prompts that run together."))
    calibration_form: str = field(
        default="auto",
        metadata=described(
            "What is fitted: coefficients of the experts for every row, factors of low rank to add, a number to add "
            "to every weight, or the first of these that has nearly all of the gain on prompts held out from the fit.",
            ("auto", "table", "low_rank", "dense"),
        ),
    )
    calibration_rank: int = field(default=32, metadata=described("Rank of the factors, for each linear layer."))
    refine_steps: int = field(
        default=0,
        metadata=described(
            "Steps of a distillation of all layers together, after the fit, to each expert on its own prompts; kept "
            "if it is closer to the experts on prompts held out. 0: none."
        ),
    )
    refine_loss: str = field(
        default="kl",
        metadata=described(
            "What the refinement lowers: the Kullback–Leibler divergence of the merge's predictions from the "
            "experts', that of the experts' from the merge's, the Jensen–Shannon divergence between the two "
            "(refine_beta), or their squared Fisher–Rao distance.",
            ("kl", "reverse_kl", "jsd", "fisher_rao"),
        ),
    )
    refine_beta: float = field(
        default=0.5,
        metadata=described(
            "Share of the expert in the mixture that jsd is taken to: near 0 it is like kl, near 1 like reverse_kl, "
            "as beta in trl."
        ),
    )
    refine_teacher: str = field(
        default="expert",
        metadata=described(
            "What the merge is trained to predict on a prompt: what its own expert does, or the Fisher–Rao barycentre "
            "of what all experts do.",
            ("expert", "barycentre"),
        ),
    )
    refine_lmbda: float = field(
        default=0.0,
        metadata=described(
            "Share of the refinement's steps on text of the merge itself, which goes on from the prompts' first "
            "halves (language models only), as lmbda in trl; refine_loss=reverse_kl fits it."
        ),
    )
    refine_written_samples: int = field(
        default=0,
        metadata=described(
            "Further prompts for the refinement that every expert writes, each behind a piece of one of its own "
            "prompts (language models only)."
        ),
    )
    refine_learning_rate: float | None = field(
        default=None,
        metadata=described(
            "Highest step size of the refinement. Default: 3e-5 for a number for every weight, 3e-4 for factors, 1e-2 "
            "for coefficients."
        ),
    )
    refine_rho: float = field(
        default=0.0,
        metadata=described(
            "Radius of the refinement's sharpness-aware steps: gradients are taken that far uphill, over all numbers "
            "that are trained, which takes twice the time. 0: where the merge is."
        ),
    )

    # 4. Reading and writing
    dtype: str = field(
        default="auto",
        metadata=described(
            "Dtype of the merged tensors. auto: that of the base model, without one that of the first expert.", DTYPES
        ),
    )
    on_overflow: str = field(
        default="raise",
        metadata=described(
            "What to do with merged values that are beyond what the dtype of a full model holds: refuse the merge, or "
            "write the largest number of the dtype.",
            ("raise", "saturate"),
        ),
    )
    max_shard_size: str = field(default="50GB", metadata=described("Largest size of one output file, such as 5GB."))
    overwrite: bool = field(default=False, metadata=described("Write into an output folder that is not empty."))
    resume_from_checkpoint: bool = field(
        default=False, metadata=described("Continue a merge that was interrupted in the same output folder.")
    )
    allow_pickle: bool = field(
        default=False,
        metadata=described(
            "Take weights that are pickles (pytorch_model.bin, adapter_model.bin) where a model has no others. They "
            "are read as torch.load(weights_only=True) finds them: code that a pickle names is not run."
        ),
    )
    allow_license: str | None = field(
        default=None,
        metadata=described(
            "Comma-separated licences without derivatives, such as cc-by-nd-4.0, that you have permission to merge."
        ),
    )
    strict: bool = field(
        default=False, metadata=described("Raise where experts differ in a way that is otherwise only warned about.")
    )
    stream_from_hub: bool = field(
        default=False,
        metadata=described(
            "Read full models of the Hub by byte ranges while they are merged, without downloading them: for a disk "
            "that cannot hold them."
        ),
    )
    memory_budget: str = field(
        default="512MiB", metadata=described("Memory for the pieces of tensors in flight, such as 2GiB.")
    )
    num_workers: int | None = field(
        default=None, metadata=described("Threads that read, combine and write. Default: one per core.")
    )
    device: str = field(default="cpu", metadata=described("Device the merge is computed on, such as cpu or cuda:0."))
    adapter_output: str = field(
        default="auto",
        metadata=described(
            "Whether merged adapters are written as an adapter or added to the base model.", ADAPTER_OUTPUTS
        ),
    )
    adapter_rank: int | None = field(
        default=None,
        metadata=described(
            "Rank of all modules of the merged adapter, compressed if need be. Default: exact, ranks added up."
        ),
    )
    adapter_energy: float | None = field(
        default=None,
        metadata=described(
            "Compress the merged adapter to the lowest rank that keeps this share of the squared norm, in (0, 1]."
        ),
    )
    adapter_rank_pattern: str = field(
        default="auto",
        metadata=described(
            "Whether modules of the merged adapter have the ranks they need, or all the largest of these, filled up "
            "with zeros, for runtimes that read one rank and one alpha.",
            RANK_PATTERNS,
        ),
    )

    # 5. Running and reporting, as in `TrainingArguments`; one step is one tensor
    run_name: str | None = field(default=None, metadata=described("Name of this run in the reports."))
    report_to: str = field(
        default="none",
        metadata=described(
            "Comma-separated reporting integrations, such as tensorboard,wandb; none, or all for every installed one."
        ),
    )
    disable_tqdm: bool | None = field(
        default=None,
        metadata=described(
            "Print log lines instead of progress bars. Default: only when the log level is above warning."
        ),
    )
    log_level: str = field(
        default="passive",
        metadata=described("Level of the package's log messages; passive leaves it alone.", LOG_LEVELS),
    )
    logging_steps: int = field(default=500, metadata=described("Log every this many tensors."))
    logging_first_step: bool = field(default=False, metadata=described("Log the first tensor too."))

    # 6. Evaluation
    do_eval: bool = field(default=False, metadata=described("Evaluate the merged model after the merge."))
    eval_on_start: bool = field(default=False, metadata=described("Evaluate the experts before the merge."))
    evaluate_experts: bool = field(
        default=True,
        metadata=described("Measure the experts and the base too, and how far the merged model is from them."),
    )
    per_device_eval_batch_size: int = field(
        default=8, metadata=described("Batch size of the evaluation on each device.")
    )
    eval_packing: bool = field(
        default=True,
        metadata=described(
            "Join the rows of a text into one stream cut into blocks, rather than read each by itself."
        ),
    )
    eval_block_size: int = field(default=256, metadata=described("Tokens a block of packed text."))
    eval_device_map: str | None = field(
        default=None,
        metadata=described(
            "Spread models over devices to evaluate them: auto, balanced, a device, or a JSON object of module to "
            "device, cpu or disk."
        ),
    )
    use_cpu: bool = field(default=False, metadata=described("Evaluate on the CPU even if there is an accelerator."))
    bf16_full_eval: bool = field(default=False, metadata=described("Evaluate in bfloat16."))
    fp16_full_eval: bool = field(default=False, metadata=described("Evaluate in float16."))
    dataloader_num_workers: int = field(
        default=0, metadata=described("Processes that load evaluation data; 0 loads it in the main process.")
    )

    # 7. The Hub
    push_to_hub: bool = field(default=False, metadata=described("Push the merged model to the Hub at the end."))
    hub_model_id: str | None = field(
        default=None, metadata=described("Repository to push to. Default: the name of the output folder.")
    )
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata=described(
            "Token for the Hub. Better not on a command line, which others on the machine can read: set HF_TOKEN, or "
            "log in with `hf auth login`, and leave this out."
        ),
    )
    hub_private_repo: bool | None = field(
        default=None, metadata=described("Make the repository private. Default: what the organization says.")
    )
    hub_revision: str | None = field(default=None, metadata=described("Branch to push to."))
    hub_collection: str | None = field(
        default=None, metadata=described("Slug of a collection on the Hub to which the pushed model is added.")
    )

    def __post_init__(self) -> None:
        if self.report_to is None or isinstance(self.report_to, (list, tuple)):  # TrainingArguments takes both
            self.report_to = ",".join(map(str, self.report_to or ["none"]))
        if isinstance(self.eval_device_map, dict):  # from_pretrained takes a dict
            self.eval_device_map = json.dumps(self.eval_device_map)
        for name, hint in get_type_hints(type(self)).items():
            setattr(self, name, coerce(name, self.__dict__[name], hint))
        self.output_dir = local_folder(self.output_dir)
        # A table replaces the default method. A method that was chosen beside a table is refused by `_validate`.
        if self.coefficients is not None and self.method == type(self).method:
            self.method = "given"
        self._validate()
        if self.density is None:
            self.density = CHOICES[self.method].density
        if self.disable_tqdm is None:
            self.disable_tqdm = self._default_disable_tqdm()

    @property
    def memory_budget_bytes(self) -> int:
        """`memory_budget` in bytes."""
        return parse_size("memory_budget", self.memory_budget)

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        return parse_size("max_shard_size", self.max_shard_size)

    @property
    def eval_dtype(self) -> str:
        """Name of the dtype for evaluation; `"auto"` for the dtype a model is stored in."""
        return "bfloat16" if self.bf16_full_eval else "float16" if self.fp16_full_eval else "auto"

    @property
    def merges_matrices(self) -> bool:
        """Whether matrices of layers are merged as a whole, by LAPACK."""
        return CHOICES[self.method].kind == "spectral" or self.post_step is not None

    @property
    def device_map(self) -> str | dict[str, str | int] | None:
        """`eval_device_map` in the form that `from_pretrained` takes."""
        if self.eval_device_map is None or not self.eval_device_map.lstrip().startswith("{"):
            return self.eval_device_map
        try:
            devices: dict[str, str | int] = json.loads(self.eval_device_map)
        except ValueError as error:
            raise ArgumentError(f"`eval_device_map` is not valid JSON: {error}.") from error
        return devices

    def get_process_log_level(self) -> int:
        """Return the level for the loggers of the package; for `"passive"` the level they have already."""
        return LOG_LEVELS[self.log_level] or logging.getLogger("hf_frmerge").getEffectiveLevel()

    def to_dict(self) -> dict[str, Any]:
        """Return all options; the value of every name that ends in `_token` is masked."""
        return {name: f"<{name.upper()}>" if name.endswith("_token") else v for name, v in asdict(self).items()}

    def to_json_string(self) -> str:
        """Return all options as indented JSON, tokens masked."""
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, bool | int | float | str]:
        """Return all options as values a reporter can store: tokens masked, lists and the like as text."""
        return {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in self.to_dict().items()}

    def _default_disable_tqdm(self) -> bool:
        return self.get_process_log_level() > logging.WARNING

    def _validate(self) -> None:
        check_choices(self)
        check_ranges(self.__dict__)
        # Parse these once, so that a bad value fails now and not in the middle of a merge.
        _ = self.memory_budget_bytes, self.max_shard_bytes, self.device_map
        check_rules(self.leave_out, self.take)
        method = CHOICES[self.method]
        check_table(method, self.coefficients)
        check_post_step(method, self.post_step)
        check_fisher(method, self.fisher, self.calibration_form, self.refine_steps)
        check_layer_scales(self.layer_scales, self.block, self.coefficients)
        check_method(method, self.block, self.density, self.epsilon)
        if self.method == AUTO.name and self.beta != type(self).beta:
            raise ArgumentError(f"`method='auto'` chooses beta, too, but got {self.beta:g}. Leave out one of the two.")
        if self.bf16_full_eval and self.fp16_full_eval:
            raise ArgumentError("`bf16_full_eval` and `fp16_full_eval` exclude each other: choose one.")
        check_adapter_options(self.adapter_output, self.adapter_rank, self.adapter_energy, self.adapter_rank_pattern)
