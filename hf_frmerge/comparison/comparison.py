"""`MergeComparison`: try merge methods on the same experts and texts, and say which is best, and by how much."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import Accelerator

from hf_frmerge.checkpoints.disk import make_folder, remove_folder
from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.lock import sole_writer
from hf_frmerge.checkpoints.resolve import resolve_all
from hf_frmerge.checkpoints.source import refuse_gguf
from hf_frmerge.checkpoints.tensors.small_files import read_json
from hf_frmerge.comparison.bench import Bench, Trial
from hf_frmerge.comparison.candidates import SCALES, Cell, parse_candidate
from hf_frmerge.comparison.cell_file import CellFile
from hf_frmerge.comparison.cells import CellPlanner, ready_cells
from hf_frmerge.comparison.command import merge_command
from hf_frmerge.comparison.evaluator import Evaluator
from hf_frmerge.comparison.fitter import Fitter
from hf_frmerge.comparison.merged_model import MergedModel
from hf_frmerge.comparison.reading import find_processing_class, what_models_read
from hf_frmerge.comparison.record import method_result, save_table
from hf_frmerge.comparison.texts import SPLITS, digest_of, split_texts
from hf_frmerge.comparison.yardstick import standings
from hf_frmerge.errors import ArgumentError, MergeError
from hf_frmerge.evaluation.comparison_record import ComparisonRecord, save_comparison
from hf_frmerge.evaluation.models.identity import model_identity
from hf_frmerge.evaluation.models.merged import architecture_of
from hf_frmerge.evaluation.models.names import BASE, models_of_merge
from hf_frmerge.evaluation.record import MERGED
from hf_frmerge.evaluation.suite.settings import ModelSet, RunSettings, SuiteOptions
from hf_frmerge.merging.arguments.calibration import FIT_OPTIONS, REFINE_OPTIONS
from hf_frmerge.merging.arguments.checks import check_calls_for_prompts, check_prompts
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.arguments.result_options import RESULT_OPTIONS
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.plan import MergePlan

logger = logging.getLogger(__name__)


class MergeComparison:
    """
    Compare merge methods on the same experts and texts.

    Every method is tried with the same scales (and weights). The best on the validation texts is measured on the test
    texts, with the evaluator of `FisherRaoMerger.evaluate`: base and experts are run once. Models are merged in
    memory, bit for bit as `FisherRaoMerger` writes them. Finished cells are kept in `args.output_dir`: the same call
    goes on where an interrupted one was, and a call with more methods adds to it.

    Args:
        experts (`Sequence[str]`):
            Two or more fine-tunes of one model, full or LoRA: local folders or Hub ids.
        eval_dataset (`Mapping[str, Rows]`):
            Name -> rows with `text` or `input_ids`, with a label for classifiers, or with `image` and a label. A text
            that has the name of an expert is that expert's own.
        base_model (`str`, *optional*):
            What they were fine-tuned from; by default what adapters name. Without one there are no deltas, no scales
            and no shares of a gain, and losses are compared.
        methods (`Sequence[str]`, *optional*):
            `NAME` or `NAME,option=value`; by default about ten that can run on these experts.
        scales (`Sequence[float]`, *optional*):
            Factors of the merged delta that every method is tried with.
        weights (`Sequence`, *optional*):
            Weights of the experts that every method is tried with: numbers, or a name as `FisherRaoMerger` takes it;
            all alike by default.
        args (`MergingArguments`, *optional*):
            What all merges share, where they run and how they are evaluated; `output_dir` is the folder of the
            comparison, `seed` draws texts and resamples, too.
        calibration_dataset (*optional*):
            Prompts without labels, as for `FisherRaoMerger`: a merge by `args.method` that is fitted to what its
            experts compute on them is compared with the others, and so can be methods that need prompts.
        also (`Sequence[str]`, *optional*):
            Merges that are there already, whatever made them: local folders or Hub ids. They are compared as they are.
        n_seeds (`int`, *optional*, defaults to `1`):
            How often methods that draw at random are repeated on the test texts; their score is the mean.
        max_tokens (`int`, *optional*, defaults to `2048`):
            Tokens of every text that are used, a quarter of them to choose scales; 0 for all.
        eval_dtype (`str`, *optional*, defaults to `"auto"`):
            Dtype to evaluate in; `"auto"` is the one a model is stored in.
        cache_dir (`str`, *optional*):
            Folder where the results of base and experts are kept.
        on_progress (`Callable[[str], object]`, *optional*):
            Called with the name of every model or merge before it is measured.
        on_prediction_step (`Callable`, *optional*):
            Called after every batch with its data loader.

    Example:

    ```python
    texts = {"math": ["the rooms of the house", "each room opens on another"] * 4}
    comparison = MergeComparison(
        ["org/math", "org/code"], texts, "org/base", methods=["linear", "ties,density=0.5"], scales=[1.0, 1.4]
    )
    record = comparison.run()
    print(record.best.method, record.best.scale, record.command)
    ```
    """

    def __init__(
        self,
        experts: Sequence[str],
        eval_dataset: Mapping[str, Any],
        base_model: str | None = None,
        *,
        methods: Sequence[str] | None = None,
        scales: Sequence[float] = SCALES,
        weights: Sequence[Sequence[float] | str] | None = None,
        args: MergingArguments | None = None,
        calibration_dataset: Any = None,
        also: Sequence[str] = (),
        n_seeds: int = 1,
        max_tokens: int = 2048,
        eval_dtype: str = "auto",
        cache_dir: str | None = None,
        on_progress: Callable[[str], object] | None = None,
        on_prediction_step: Callable[[Any], None] | None = None,
    ) -> None:
        if not eval_dataset:
            raise ArgumentError("There is nothing to compare merges on: give a text, best one for every expert.")
        self.scales = _checked_scales(scales)
        self.experts, self.eval_dataset = list(experts), dict(eval_dataset)
        self.methods = list(dict.fromkeys(map(parse_candidate, methods))) if methods else None
        self.weights = list(weights) if weights else [None]
        self.calibration_dataset, self.also, self.n_seeds = calibration_dataset, list(also), n_seeds
        self.args = args if args is not None else MergingArguments(output_dir="comparison")
        if self.args.fisher is not None:
            raise ArgumentError(
                f"fisher={self.args.fisher!r} is for a single merge, and a comparison tries many. Leave it out; to "
                "compare a merge that was made with it, name its folder: also (--also)."
            )
        has_prompts = calibration_dataset is not None
        if has_prompts and self.args.method not in METHODS:
            raise ArgumentError(
                f"method={self.args.method!r} leaves the method of the fit to be chosen, and a comparison has to name "
                "what it compares. Leave it out (karcher), or name one."
            )
        check_calls_for_prompts(self.args.method, None, self.args.refine_steps, has_prompts=has_prompts)
        for candidate in self.methods or ():
            check_prompts(METHODS[candidate.method], None, has_prompts=has_prompts)
        self.base_model, self.max_tokens, self.eval_dtype = base_model, max_tokens, eval_dtype
        self.cache_dir, self.on_prediction_step = cache_dir, on_prediction_step
        self.on_progress = on_progress if on_progress is not None else lambda name: None
        self.notes: list[str] = []

    def run(self) -> ComparisonRecord:
        """
        Run all cells that are not finished, and return the record, which is also in `comparison.json` and `.parquet`.

        Raises:
            ArgumentError: If options contradict each other or the models, or a text cannot be used.
            CheckpointError: If a model is missing, broken, or does not fit the others.
            ResumeError: If the folder holds a comparison of something else.
            MergeError: If a licence forbids merges, no method gives a merge, or a file cannot be written.
        """
        with self.bench() as (bench, candidates):
            record = self._record(bench, [bench.try_all(own, self.n_seeds, self.args.seed) for own in candidates])
            save_comparison(Path(self.args.output_dir), record)
            save_table(Path(self.args.output_dir), bench.cells.results)
        return record

    @contextmanager
    def bench(self) -> Iterator[tuple[Bench, list[list[Cell]]]]:
        """
        Find models and texts, measure base and experts, and yield the bench of this comparison and its cells.

        Raises:
            MergeError: As `run`.
        """
        self.notes = []
        folder = Path(self.args.output_dir)
        fitter = None
        if self.calibration_dataset is not None:
            fitter = Fitter(self.calibration_dataset, self.args, folder)
        self._find_base()
        planner = CellPlanner(self.experts, self.base_model, self.args, self.notes)
        candidates = planner.cells(self.methods, self.scales, self.weights, fitter)
        with sole_writer(folder), _scratch(folder) as scratch, _each_warning_once():
            with closing(planner.plan(candidates[0][0])) as plan:
                refuse_gguf([model.source for model in plan.models])
                for note in plan.notes:
                    logger.warning("%s", note)
                merged = MergedModel(plan, self.eval_dtype, scratch)
                token, allow_pickle = self.args.hub_token, self.args.allow_pickle
                ready = ready_cells(self.also, merged.architecture, token=token, allow_pickle=allow_pickle)
                evaluator = self._evaluator(plan, merged)
                cells = CellFile(folder, self._subject(plan, evaluator), overwrite=self.args.overwrite)
            yield (
                Bench(planner.plan, merged, evaluator, cells, fitter, self.on_progress),
                [
                    *([cell] for cell in ready),  # first: what is wrong with them should not come after all others
                    *candidates,
                ],
            )
            if fitter is not None:
                fitter.close()

    def _find_base(self) -> None:
        """
        Take the base that the first adapter names if none was given.

        Adapters are merged into full models: what some methods make of them is no adapter.
        """
        sources = resolve_all(self.experts, token=self.args.hub_token, allow_pickle=self.args.allow_pickle)
        adapters = [source for source in sources if source.kind == "adapter"]
        if adapters:
            self.args = replace(self.args, adapter_output="merged")
        if adapters and self.base_model is None:
            config = read_json(open_folder(adapters[0].path), "adapter_config.json", adapters[0].spec)
            self.base_model = config.get("base_model_name_or_path")
        if self.base_model is None:
            self.notes.append(
                "No base model was given, so there are no deltas: methods that need them are left out, nothing is "
                "scaled, and losses are compared. Give the model that the experts were fine-tuned from (base_model, "
                "--base-model) for the rest."
            )

    def _evaluator(self, plan: MergePlan, merged: MergedModel) -> Evaluator:
        """Draw the texts, and name base and experts for the evaluator."""
        architecture = merged.architecture
        reads = what_models_read(architecture, merged.folder)
        specs, roles = models_of_merge(self.experts, self.base_model)
        if self.base_model is not None and architecture_of(plan.donor.source.path) != architecture:
            del specs[BASE], roles[BASE]
            self.notes.append(
                f"The base model is no {architecture}, so it cannot be measured, nor what its experts gained: losses "
                "are compared."
            )
        sources = [plan.donor.source, *(model.source for model in plan.models)]
        processing_class = find_processing_class(reads, sources, self.base_model, self.args)
        drawn = {
            name: split_texts(
                name,
                rows,
                processing_class,
                max_tokens=self.max_tokens,
                seed=self.args.seed,
                reads=reads,
            )
            for name, rows in self.eval_dataset.items()
        }
        args = self.args
        return Evaluator(
            ModelSet(specs, roles, None, self.base_model, processing_class, args.hub_token, args.allow_pickle),
            {split: {name: splits[split] for name, splits in drawn.items()} for split in SPLITS},
            SuiteOptions(
                batch_size=args.per_device_eval_batch_size,
                block_size=args.eval_block_size,
                dtype=self.eval_dtype,
                n_worst=0,
                n_prompts=0,
            ),
            RunSettings(
                accelerator=Accelerator(cpu=args.use_cpu),
                cache_dir=self.cache_dir,
                num_workers=args.dataloader_num_workers,
                on_model=self._on_model,
                on_prediction_step=self.on_prediction_step,
            ),
        )

    def _on_model(self, name: str) -> None:
        """Pass on the names of base and experts; a merge is told by its method."""
        if name != MERGED:
            self.on_progress(name)

    def _subject(self, plan: MergePlan, evaluator: Evaluator) -> dict[str, Any]:
        """Return everything the result of a cell depends on beside the cell."""
        options = self.args.to_dict()
        of_cells = ("method", "space", "scale")
        return {
            "experts": [model_identity(expert.source) for expert in plan.experts],
            "base model": model_identity(plan.base.source) if plan.base is not None else None,
            "texts": {split: digest_of(evaluator.texts[split]) for split in SPLITS},
            "evaluation": {"dtype": self.eval_dtype, "block_size": self.args.eval_block_size},
            "options": {
                name: options[name]
                for name in RESULT_OPTIONS
                if name not in (*of_cells, *FIT_OPTIONS, *REFINE_OPTIONS)
            },
            "versions": [torch.__version__, transformers.__version__],
        }

    def _record(self, bench: Bench, trials: Sequence[Trial]) -> ComparisonRecord:
        """Rank the methods."""
        places = bench.places["test"]
        failed = {trial.label: trial.failure for trial in trials if trial.failure is not None}
        merged = {trial.label: trial for trial in trials if trial.failure is None}
        if not any(trial.cell.model is None for trial in merged.values()):
            failure = next(trial for trial in trials if trial.cell.model is None)
            raise MergeError(f"No method gave a merge. {failure.label}: {failure.failure}")
        losses = {
            label: [result.measured.losses for result in trial.tests if result.measured is not None]
            for label, trial in merged.items()
        }
        ranked = standings(losses, bench.base["test"], places, self.args.seed)
        results = sorted(
            (method_result(trial, ranked[label]) for label, trial in merged.items()),
            key=lambda row: row.score,
            reverse=True,
        )
        made = [merged[row.label].cell for row in results if row.model is None]
        if bench.without_gain:
            self.notes.append(
                f"Not counted: {', '.join(bench.without_gain)}, no better than the base on the texts here."
            )
        return ComparisonRecord(
            experts=self.experts,
            base_model=self.base_model,
            unit="loss" if places[0].gain is None else "share",
            texts=bench.evaluator.sizes(),
            settings={
                "scales": list(self.scales),
                "seed": self.args.seed,
                "n_seeds": self.n_seeds,
                "max_tokens": self.max_tokens,
            },
            methods=results,
            command=merge_command(
                made[0], self.experts, self.base_model, self.args, "merged", calibration=self.calibration_dataset
            ),
            failed=failed,
            notes=self.notes,
        )


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Yield an empty folder for temporary files, on the disk of the output; a kill may have left an older one."""
    scratch = folder / ".scratch"
    remove_folder(scratch)
    make_folder(scratch)
    try:
        yield scratch
    finally:
        remove_folder(scratch)


@contextmanager
def _each_warning_once() -> Iterator[None]:
    """Let evaluations say once what is true of all merges on the same texts."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message, before = record.getMessage(), len(said)
        said.add(message)
        return len(said) > before

    evaluation = logging.getLogger("hf_frmerge.evaluation.suite.build_record")
    evaluation.addFilter(is_new)
    try:
        yield
    finally:
        evaluation.removeFilter(is_new)


def _checked_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """Return the scales in ascending order, each once."""
    checked = tuple(sorted({float(scale) for scale in scales}))
    if not checked or not all(math.isfinite(scale) for scale in checked):
        raise ArgumentError(f"Scales are finite numbers, one or more, but got {list(scales)}.")
    return checked
