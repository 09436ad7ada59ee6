"""Evaluation data from files."""

from __future__ import annotations

from pathlib import Path

from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.text.token_blocks import Rows

# Suffix -> builder of `datasets.load_dataset`. Every other file is read as one text.
_TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read_texts(path: str | Path) -> Rows:
    """
    Read evaluation data from a file.

    Args:
        path (`str` or `Path`):
            `.jsonl`, `.json`, `.csv` or `.parquet` with a column `text` or `input_ids`; every other file is one text
            in UTF-8.

    Raises:
        ArgumentError: If there is no such file, or it is not text.
    """
    file = Path(path)
    if not file.is_file():
        raise ArgumentError(f"The evaluation data {str(file)!r} is not a file.")
    if file.suffix in _TABLES:
        from datasets import load_dataset

        return load_dataset(_TABLES[file.suffix], data_files=str(file), split="train")
    try:
        return [file.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"The evaluation data {str(file)!r} is not UTF-8 text ({error.reason} at byte {error.start}). Convert it, "
            f"or use one of {', '.join(_TABLES)} with a column `text`."
        ) from error
