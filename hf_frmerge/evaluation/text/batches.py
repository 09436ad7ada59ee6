"""Turn the rows of a dataset into batches for `predict`: numbered, encoded, padded, and split over processes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.text.images import encode_images
from hf_frmerge.evaluation.text.token_blocks import NO_TOKENIZER, TokenBlocks, text_of

INDEX = "index"  # entry of a batch: positions of its rows in the dataset
_LABEL_COLUMNS = ("labels", "label", "label_ids")

Row = str | Mapping[str, Any]
Collate = Callable[[list[Any]], dict[str, torch.Tensor]]


def batches_of(
    rows: Iterable[Any] | TokenBlocks,
    collate: Collate,
    *,
    batch_size: int,
    accelerator: Accelerator,
    num_workers: int = 0,
) -> DataLoader:
    """
    Return a dataloader over this process's share of the rows, on its device.

    Every process gets the same number of batches, so that all can gather after each. Accelerate repeats rows for
    that; the entry `"index"` of a batch identifies the repeats. Each process encodes only its own rows.

    Args:
        rows (`Iterable`):
            Rows with a length and `[]` are read by index, all others are streamed. `TokenBlocks` number themselves.
        collate (`Callable`):
            Makes a batch from a list of `(index, row)`.
        batch_size (`int`):
            Rows a batch, on each process.
        accelerator (`accelerate.Accelerator`):
            Gives the device, and the number of this process.
        num_workers (`int`, *optional*, defaults to `0`):
            Background processes that load data. A stream has at most one: each further worker would read it again.
    """
    dataset: Any
    if isinstance(rows, TokenBlocks):
        dataset = rows
    elif isinstance(rows, Sized) and hasattr(rows, "__getitem__"):
        dataset = _Numbered(rows)
    else:
        dataset, num_workers = _Stream(rows), min(num_workers, 1)
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate, num_workers=num_workers)
    # dispatch_batches=False: by default one process reads a stream for all, and Accelerate then fails to join batches
    # of unequal lengths.
    return prepare_data_loader(
        loader,
        device=accelerator.device,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        put_on_device=True,
        dispatch_batches=False,
    )


class ClassificationCollator:
    """
    Collator for classifiers: encodes rows with a label and `input_ids` (or `text`), which it pads, or images.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `BaseImageProcessor`, *optional*):
            Tokenizer, needed for text, which it truncates to the model's limit, and to pad rows of unequal lengths; or
            image processor, see `encode_images`.
        model (`torch.nn.Module`):
            Classifier. Its `forward` signature decides which columns are kept; `config.label2id` maps label names.
        classes (`Sequence[str]`, *optional*):
            Names of the classes in another order than that of the model, for the numbers of the labels.
    """

    def __init__(
        self,
        processing_class: Any,
        model: torch.nn.Module,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.processing_class = processing_class
        self.inputs = set(inspect.signature(model.forward).parameters) - set(_LABEL_COLUMNS)
        config: Any = model.config
        self.reads_images = model.main_input_name == "pixel_values"
        self.n_channels: int | None = getattr(config, "num_channels", None)
        self.n_labels: int = config.num_labels
        self.label_ids: dict[str, int] = (
            config.label2id if classes is None else {name: row for row, name in enumerate(classes)}
        )

    def __call__(self, items: list[tuple[int, Row]]) -> dict[str, torch.Tensor]:
        """
        Encode and pad a list of `(index, row)`.

        Raises:
            ArgumentError: If a row has no label the model knows or nothing that it reads, or a tokenizer, padding
                token or image processor is missing.
        """
        labels = [self._label(index, row) for index, row in items]
        if self.reads_images:
            encoded = encode_images(items, self.processing_class, self.n_channels)
        else:
            encoded = self._pad([self._features(index, row) for index, row in items])
        return {
            **encoded,
            "labels": torch.tensor(labels),
            INDEX: torch.tensor([index for index, _ in items]),
        }

    def _features(self, index: int, row: Row) -> dict[str, Any]:
        if isinstance(row, Mapping) and "input_ids" in row:
            return {name: value for name, value in row.items() if name in self.inputs}
        text = text_of(row, index)
        if self.processing_class is None:
            raise ArgumentError(NO_TOKENIZER)
        return dict(self.processing_class(text, truncation=True))

    def _pad(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        # Equal lengths need no padding token, and many tokenizers of decoders have none.
        if len({len(row["input_ids"]) for row in features}) == 1:
            return {name: torch.tensor([_plain(row[name]) for row in features]) for name in features[0]}
        if self.processing_class is None or self.processing_class.pad_token is None:
            raise ArgumentError(
                "The rows have different lengths, and there is no padding token to make them equal: pass a "
                "`processing_class` with a `pad_token`, or evaluate with a batch size of 1."
            )
        return dict(self.processing_class.pad(features, return_tensors="pt"))

    def _label(self, index: int, row: Row) -> int:
        labels = [row[name] for name in _LABEL_COLUMNS if name in row] if isinstance(row, Mapping) else []
        if not labels:
            columns = sorted(row) if isinstance(row, Mapping) else type(row).__name__
            raise ArgumentError(
                f"Row {index} of the evaluation data needs a column `label` or `labels`, found {columns}: a "
                "classifier is measured by its accuracy."
            )
        label = self.label_ids.get(labels[0]) if isinstance(labels[0], str) else int(labels[0])
        if label is None or not 0 <= label < self.n_labels:
            names = sorted(self.label_ids, key=lambda name: self.label_ids[name])
            raise ArgumentError(
                f"Row {index} of the evaluation data has the label {labels[0]!r}, but the classifier knows "
                f"{', '.join(map(str, names))} (numbers 0 to {self.n_labels - 1})."
            )
        return label


def _plain(values: Any) -> Any:
    """Convert a tensor or array, as datasets in torch or numpy format return, to a list."""
    return values.tolist() if hasattr(values, "tolist") else values


class _Numbered(Dataset):
    """Map-style dataset of `(index, row)`."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.rows[index]


class _Stream(IterableDataset):
    """Iterable dataset of `(index, row)`."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        yield from enumerate(self.rows)
