"""Read texts to evaluate or to calibrate on from files, and images from folders."""

from __future__ import annotations

from pathlib import Path

from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.text.images import read_image_folder
from hf_frmerge.evaluation.text.token_blocks import Rows

# File suffix -> builder name for `datasets.load_dataset`. Any other file is read as one text.
_TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read_texts(path: str | Path) -> Rows:
    """
    Read texts from a file.

    Args:
        path (`str` or `Path`):
            A folder with a folder of images for every label; `.jsonl`, `.json`, `.csv` or `.parquet` with a column
            `text`, `input_ids` or `image`; any other file is read as one UTF-8 text.

    Returns:
        `datasets.Dataset` for a table, a list of one string for a text, and of rows for images.

    Raises:
        ArgumentError: If the file does not exist, or is not what its name says: a table, or else UTF-8 text.
    """
    file = Path(path)
    if file.is_dir():
        return read_image_folder(file)
    if not file.is_file():
        raise ArgumentError(f"The data {str(file)!r} is not a file.")
    if file.suffix in _TABLES:
        from datasets import load_dataset  # a slow import that plain text can do without

        try:
            return load_dataset(_TABLES[file.suffix], data_files=str(file), split="train")
        except Exception as error:  # each format has errors of its own
            reason = error.__cause__ or error if file.stat().st_size else "it is empty"
            raise ArgumentError(f"The data {str(file)!r} cannot be read as {file.suffix[1:]}: {reason}.") from error
    try:
        return [file.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"The data {str(file)!r} is not UTF-8 text ({error.reason} at byte {error.start}). Convert it, "
            f"or use one of {', '.join(_TABLES)} with a column `text`."
        ) from error
