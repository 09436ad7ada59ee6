"""Read evaluation data from files."""

from __future__ import annotations

from pathlib import Path

from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.text.token_blocks import Rows

# File suffix -> builder name for `datasets.load_dataset`. Any other file is read as one text.
_TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read_texts(path: str | Path) -> Rows:
    """
    Read evaluation data from a file.

    Args:
        path (`str` or `Path`):
            `.jsonl`, `.json`, `.csv` or `.parquet` with a column `text` or `input_ids`; any other file is read as one
            UTF-8 text.

    Returns:
        `datasets.Dataset` for a table, a list of one string for a text.

    Raises:
        ArgumentError: If the file does not exist, or is neither a table nor UTF-8 text.
    """
    file = Path(path)
    if not file.is_file():
        raise ArgumentError(f"The evaluation data {str(file)!r} is not a file.")
    if file.suffix in _TABLES:
        from datasets import load_dataset  # a slow import that plain text can do without

        return load_dataset(_TABLES[file.suffix], data_files=str(file), split="train")
    try:
        return [file.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"The evaluation data {str(file)!r} is not UTF-8 text ({error.reason} at byte {error.start}). Convert it, "
            f"or use one of {', '.join(_TABLES)} with a column `text`."
        ) from error
