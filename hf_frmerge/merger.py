"""`FisherRaoMerger`: plan, merge, evaluate, describe and push, in the shape of `transformers.Trainer`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.disk import copy_folder
from hf_frmerge.checkpoints.lock import refuse_while_merging
from hf_frmerge.checkpoints.remote_output import upload
from hf_frmerge.checkpoints.source import refuse_gguf
from hf_frmerge.errors import ArgumentError, MergeError
from hf_frmerge.hub.card.data import NAME, TAG_NAMES, TEMPLATE_FILE
from hf_frmerge.hub.check_plan import check_plan
from hf_frmerge.merging.arguments.checks import check_calls_for_prompts
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.callbacks.callback_host import CallbackHost
from hf_frmerge.merging.callbacks.callback_observer import CallbackObserver
from hf_frmerge.merging.engine.processes import check_same_commits
from hf_frmerge.merging.planning.plan import MergePlan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.methods.entries.span import FISHER_RAO
from hf_frmerge.methods.method import Paper
from hf_frmerge.weighting.plan_merge import plan_merge

# What evaluates is imported where it is used: its dataclasses take a fifth of the time that a merge spends on imports.
if TYPE_CHECKING:
    from concurrent.futures import Future

    from huggingface_hub import CommitInfo
    from transformers import EvalPrediction
    from typing_extensions import Self

    from hf_frmerge.evaluation.record import EvaluationRecord
    from hf_frmerge.merging.callbacks.callback import MergeCallback
    from hf_frmerge.merging.record.manifest import Manifest

logger = logging.getLogger(__name__)


class FisherRaoMerger(CallbackHost):
    """
    Merge fine-tunes of one model into one: the weighted Karcher mean (arXiv 2603.04972), or a baseline.

    Args:
        experts (`Sequence[str]`):
            Fine-tunes of one model, full or LoRA: local folders or Hub ids (`org/name@revision`). Two or more, or one
            adapter, which is folded into its base.
        args (`MergingArguments`, *optional*): Options; by default the Karcher mean of whole tensors, into `merged`.
        weights (*optional*): One number per expert, all alike by default; or a name: `linear` for checkpoints, `nan`.
        base_model (`str`, *optional*): What they were fine-tuned from; needed for adapters and `space="deltas"`.
        processing_class (*optional*): Tokenizer used by `evaluate`; by default the merged model's.
        eval_dataset (*optional*):
            Dataset, or dict of datasets, for `evaluate`: a `text` column, `input_ids`, or a list of strings.
        compute_metrics (`Callable`, *optional*):
            Called with the `EvalPrediction` of the merged model on each evaluated dataset, returns metrics.
        callbacks (`list`, *optional*): Callbacks besides the default ones; classes or instances.
        calibration_dataset (*optional*):
            Prompts without labels, on which the merge is fitted to what its experts compute: a file, a `Dataset` or a
            list of texts for all experts, a mapping from experts to such, or `"self"`: every expert writes its own
            (`"self:chat"`: behind what the chat template puts before a user's first message).
        preprocess_logits_for_metrics (`Callable`, *optional*):
            Called with the logits and labels of each batch; what it returns is kept for `compute_metrics` instead.

    Example:

    ```python
    merger = FisherRaoMerger(experts=["org/math", "org/code"], args=MergingArguments(output_dir="merged"))
    merger.merge().push_to_hub("me/merged")
    ```
    """

    # What the model card says of the tool, as trl's trainers have it; a subclass may say otherwise.
    _tag_names: tuple[str, ...] = TAG_NAMES
    _name: str = NAME
    _paper: Paper | None = FISHER_RAO
    _template_file: str = TEMPLATE_FILE

    def __init__(
        self,
        experts: Sequence[str],
        args: MergingArguments | None = None,
        weights: Sequence[float] | str | None = None,
        base_model: str | None = None,
        processing_class: Any = None,
        eval_dataset: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[MergeCallback | type[MergeCallback]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        calibration_dataset: Any = None,
    ) -> None:
        if isinstance(experts, str):
            raise ArgumentError(f"experts must be a list of two or more models, but got the one name {experts!r}.")
        super().__init__(args if args is not None else MergingArguments(), callbacks or (), processing_class)
        self.experts, self.weights, self.base_model = list(experts), weights, base_model
        self.processing_class = processing_class
        self.eval_dataset, self.calibration_dataset = eval_dataset, calibration_dataset
        self.compute_metrics, self.preprocess_logits_for_metrics = compute_metrics, preprocess_logits_for_metrics
        self.report: dict[str, Any] = {}  # totals of the merge
        self.manifest: Manifest | None = None  # its record, in the main process

    @property
    def is_merged(self) -> bool:
        """Whether `merge` has completed."""
        return bool(self.report.get("complete"))

    def plan(self, resume_from_checkpoint: bool | None = None) -> MergePlan:
        """
        Decide what will happen to every tensor, from headers alone; then download what is on the Hub.

        Args:
            resume_from_checkpoint (`bool`, *optional*): Overrides the argument of that name, in the plan alone.

        Raises:
            ArgumentError: If options contradict each other or the models.
            CheckpointError: If a model is missing, broken, or does not fit the others.
            MergeError: If a licence forbids the merge, or a disk is too small.
        """
        args = self.args
        if resume_from_checkpoint is not None:
            args = replace(args, resume_from_checkpoint=resume_from_checkpoint)
        has_prompts = self.calibration_dataset is not None
        return plan_merge(self.experts, args, self.weights, self.base_model, check=check_plan, has_prompts=has_prompts)

    def merge(self, resume_from_checkpoint: bool | None = None) -> Self:
        """
        Merge the experts into `args.output_dir`; then evaluate (`args.do_eval`) and push (`args.push_to_hub`).

        Args:
            resume_from_checkpoint (`bool`, *optional*): Overrides the argument of the same name.

        Returns:
            `FisherRaoMerger`: Itself, so that `.merge().push_to_hub()` reads as it runs.

        Raises:
            MergeError: With what went wrong and what to do; finished work is kept for a resume.
        """
        if self.eval_dataset is None and (self.args.do_eval or self.args.eval_on_start):
            raise ArgumentError("do_eval and eval_on_start need eval_dataset: pass one to FisherRaoMerger.")
        args, has_prompts = self.args, self.calibration_dataset is not None
        check_calls_for_prompts(args.method, args.fisher, args.refine_steps, has_prompts=has_prompts)
        with self.processes.sharing_errors():
            if self.processes.is_main:
                refuse_while_merging(self.args.output_dir)
            plan = self.plan(resume_from_checkpoint)
            check_same_commits(plan, self.processes)
        with closing(plan):
            if self.eval_dataset is not None and (self.args.evaluate_experts or self.args.eval_on_start):
                refuse_gguf(
                    [model.source for model in plan.models], "The experts would be evaluated, too (evaluate_experts)"
                )
            for note in plan.notes:
                logger.warning("%s", note)
            self._begin(plan)
            if self.args.eval_on_start:
                self.evaluate_experts()
            calibrate = None
            if self.calibration_dataset is not None:
                from hf_frmerge.calibration.calibrate import prepare

                calibrate = prepare(plan, self.calibration_dataset, self.processing_class)
            observer = CallbackObserver(self.callback_handler, self.args, self.state, self.control, self.log)
            outcome = run_merge(plan, observer, self.processes, self._complete_folder, calibrate)
        for note in outcome.report.notes:
            if note not in plan.notes:  # known only now
                logger.warning("%s", note)
        self.control = observer.control
        self.report = {**outcome.report.to_dict(), "complete": outcome.complete}
        self._end(self.report)
        # Only the main process has callbacks, but all take part in an evaluation.
        if any(self.processes.gather([self.control.should_evaluate])):
            self.evaluate()
            if self.processes.is_main:
                self._describe(manifest=self.manifest)  # now with what was measured
        if self.args.push_to_hub:
            self.push_to_hub()
        return self

    def add_expert(
        self, expert: str, output_dir: str, method: str | None = None, calibration_dataset: Any = None
    ) -> Self:
        """Merge one more expert into the merged model, which counts as all it has; return the new model's merger."""
        from hf_frmerge.weighting.continual import WITHOUT_PROMPTS, say_left_out

        self._require_merge("add_expert")
        args = replace(self.args, output_dir=output_dir, method=method or self.args.method)
        if self.calibration_dataset is not None and calibration_dataset is None:
            say_left_out(self.args.output_dir, self.args.to_dict())
            args = replace(args, **WITHOUT_PROMPTS)
        experts = [self.args.output_dir, expert]
        new = type(self)(experts, args, "continual", self.base_model, calibration_dataset=calibration_dataset)
        return new.merge()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Measure the merged model on text or labelled samples; with `args.evaluate_experts` against its experts.

        Args:
            eval_dataset (*optional*):
                As at construction; a dict of datasets is told one by one under `<prefix>_<name>`, at last over all.
            ignore_keys (`list[str]`, *optional*): Outputs of the model that are no predictions for `compute_metrics`.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): Prefix of the metrics' names.

        Returns:
            `dict[str, float]`: The metrics, as they were logged; all that was found is in `evaluation`.

        Raises:
            RuntimeError: If `merge` has not been called.
            ArgumentError: If there is no dataset, or it does not fit the models.
        """
        self._require_merge("evaluate")
        from hf_frmerge.evaluation.headlines import headlines, metric_events
        from hf_frmerge.evaluation.models.names import datasets_by_name

        domains, is_named = datasets_by_name(eval_dataset, self.eval_dataset, metric_key_prefix)
        # Loaded once for all evaluations; beside experts it would take room.
        merged = self.__dict__.get("model", self.args.output_dir) if self.args.evaluate_experts else self.model
        record, speed = self._measure(domains, merged, ignore_keys)
        measured = headlines(record, self.args.output_dir)
        events = metric_events(measured, metric_key_prefix, domains if is_named else (), speed)
        for event in events:
            self.log(event.metrics)
            self._fire("on_evaluate", **vars(event))
        return {name: value for event in events for name, value in event.metrics.items()}

    def evaluate_experts(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Measure every expert, and the base model if there is one, on the same data as `evaluate`, one at a time.

        The metrics are called `<prefix>_<model>_<dataset>_loss` and so on, with models named as in `evaluation`.
        """
        from hf_frmerge.evaluation.headlines import metrics_of_models
        from hf_frmerge.evaluation.models.names import datasets_by_name

        domains, _ = datasets_by_name(eval_dataset, self.eval_dataset, metric_key_prefix)
        metrics = metrics_of_models(self._measure(domains, merged=None)[0], metric_key_prefix)
        self.log(metrics)
        return metrics

    def save_model(self, output_dir: str | None = None) -> None:
        """Copy the merged model to another folder; `merge` has saved it in `args.output_dir` already."""
        self._require_merge("save_model")
        source, target = Path(self.args.output_dir), Path(output_dir or self.args.output_dir)
        if self.processes.is_main and source.resolve() != target.resolve():
            copy_folder(source, target)
        self.processes.wait()

    def create_model_card(self, **card_fields: Any) -> Path:
        """
        Write the model card, `README.md`, into `args.output_dir`, with figures if matplotlib is installed.

        Args:
            card_fields: Fields of `hf_frmerge.hub.card.data.MergeCard` to set, such as `model_name` or `licence`.
        """
        self._require_merge("create_model_card")
        from hf_frmerge.report.figures import figure_drawer

        return self._describe(draw=figure_drawer(), **card_fields)

    def push_to_hub(
        self,
        repo_id: str | None = None,
        commit_message: str = "Upload merged model",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        **card_fields: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Push the merged model, its record and its card to the Hub in one commit.

        Args:
            repo_id (`str`, *optional*): By default `args.hub_model_id`, else the name of the output folder.
            commit_message (`str`, *optional*, defaults to `"Upload merged model"`): Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Wait for the upload.
            token, revision, private (*optional*): By default `hub_token`, `hub_revision`, `hub_private_repo`.
            create_pr (`bool`, *optional*, defaults to `False`): Open a pull request and do not commit to the branch.
            card_fields: As for `create_model_card`.

        Returns:
            `CommitInfo` if `blocking`, else a `Future` of it; `None` on processes other than the main one.

        Raises:
            RuntimeError: If `merge` has not been called.
            HubError: If the Hub refuses.
        """
        self._require_merge("push_to_hub")
        if self.control.should_merge_stop:
            raise MergeError(f"Not pushed: {self.control.stop_reason or 'a callback asked to stop'}.")
        self._fire("on_push_begin")
        if not self.processes.is_main:
            return None
        from hf_frmerge.hub.push import full_repo_id, push_folder

        args, token = self.args, token or self.args.hub_token
        target = full_repo_id(repo_id or args.hub_model_id or Path(args.output_dir).resolve().name, token)
        self.create_model_card(hub_model_id=target, **card_fields)
        return push_folder(
            args.output_dir, repo_id=target, token=token, revision=revision or args.hub_revision, create_pr=create_pr,
            private=args.hub_private_repo if private is None else private, commit_message=commit_message,
            collection=args.hub_collection, blocking=blocking,
        )  # fmt: skip

    @cached_property
    def evaluation(self) -> EvaluationRecord:
        """Everything that was measured, also saved beside the weights."""
        from hf_frmerge.evaluation.record import EvaluationRecord

        return EvaluationRecord()

    @cached_property
    def model(self) -> Any:
        """The merged model, loaded from `args.output_dir` when first asked for."""
        self._require_merge("model")
        from hf_frmerge.evaluation.models.merged import load_merged

        args = self.args
        self.callback_handler.model = load_merged(
            args.output_dir,
            self.base_model,
            args.hub_token,
            dtype=args.eval_dtype,
            device_map=args.device_map,
            allow_pickle=args.allow_pickle,
        )
        return self.callback_handler.model

    def _measure(
        self, domains: Mapping[str, Any], merged: Any, ignore_keys: list[str] | None = None
    ) -> tuple[EvaluationRecord, dict[str, float]]:
        """Measure the experts, and the merged model if there is one; save the record, and return it with the speed."""
        from hf_frmerge.evaluation.record import save_record
        from hf_frmerge.evaluation.suite.merge_evaluation import UserMetrics, measure_merge
        from hf_frmerge.merging.record.find_models import MergeModels

        models = MergeModels(self.experts, None if isinstance(self.weights, str) else self.weights, self.base_model)
        user = UserMetrics(lambda: self.model, self.compute_metrics, self.preprocess_logits_for_metrics, ignore_keys)
        record, speed = measure_merge(
            self.args, models, merged, domains, self.processing_class, user,
            on_prediction_step=lambda loader: self._fire("on_prediction_step", eval_dataloader=loader),
        )  # fmt: skip
        self.evaluation.update(record)
        if self.is_merged and self.processes.is_main:
            save_record(self.args.output_dir, self.evaluation)
        return record, speed

    def _begin(self, plan: MergePlan) -> None:
        """Reset what an earlier merge left, and fire `on_merge_begin`."""
        self.manifest = None
        self.report, self.weights = {}, plan.weights if isinstance(self.weights, str) else self.weights
        self.__dict__.pop("model", None)
        self.__dict__.pop("evaluation", None)
        self.callback_handler.model = None
        self.state.start(plan)
        self._fire("on_merge_begin")

    def _complete_folder(self, manifest: Manifest) -> None:
        """Write what comes beside model and record, and upload it all where the output is behind a URL."""
        self.manifest = manifest
        if "evaluation" in self.__dict__ and self.evaluation.models:
            from hf_frmerge.evaluation.record import save_record

            save_record(self.args.output_dir, self.evaluation)
        self._describe(manifest=manifest)
        upload(self.args.output_dir)

    def _describe(self, **card_fields: Any) -> Path:
        """Write the card; without `draw` it has no figures, which take longer than a small merge."""
        from hf_frmerge.hub.card.describe import describe_merge

        tool: dict[str, Any] = {"tag_names": self._tag_names, "tool_name": self._name, "tool_paper": self._paper}
        return describe_merge(self.args.output_dir, template_file=self._template_file, **tool, **card_fields)

    def _require_merge(self, call: str) -> None:
        if not self.is_merged:
            raise RuntimeError(f"`{call}` needs a merged model: call `merge()` first.")
