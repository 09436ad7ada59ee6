"""Read images with their labels, and turn them into what a classifier of images reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_frmerge.errors import ArgumentError


def read_image_folder(folder: Path) -> list[dict[str, str]]:
    """
    Return the images in a folder that has a folder of images for every label: rows of `image`, a path, and `label`.

    The label is the name of the folder, not a number, so that it does not matter how a classifier numbers its labels.

    Raises:
        ArgumentError: If there are no such folders, or they are empty.
    """
    labels = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    rows = [
        {"image": str(file), "label": label.name}
        for label in labels
        for file in sorted(label.iterdir())
        if file.is_file() and not file.name.startswith(".")
    ]
    if not rows:
        raise ArgumentError(
            f"The data {str(folder)!r} is a folder without images. It needs a folder of images for every label, with "
            "the name that the classifier has for it in id2label."
        )
    return rows


def encode_images(rows: Sequence[tuple[int, Any]], processor: Any, n_channels: int | None) -> dict[str, torch.Tensor]:
    """
    Return the pixels of a batch, `(B, C, H, W)`, as `pixel_values`.

    Args:
        rows: Number and row of each image, which is `pixel_values`, or `image`: a picture of PIL, an array, a path, or
            bytes as `datasets.Image` stores them.
        processor: Image processor of the model; needed for `image`.
        n_channels: Channels that the model reads; with 3, pictures with others are converted to RGB.

    Raises:
        ArgumentError: If a row has no image, one cannot be read, or there is no processor.
    """
    if all(isinstance(row, Mapping) and "pixel_values" in row for _, row in rows):
        return {"pixel_values": torch.stack([torch.as_tensor(row["pixel_values"]) for _, row in rows])}
    images = [_image(number, row, n_channels) for number, row in rows]
    if processor is None:
        raise ArgumentError(
            "The data holds images, and there is no preprocessor_config.json beside the model. Copy that of an expert "
            "there, pass its image processor as `processing_class`, or give a column pixel_values."
        )
    return {"pixel_values": processor(images=images, return_tensors="pt")["pixel_values"]}


def content_of_image(row: Any, number: int) -> bytes:
    """
    Return what a row is known by: its pixels, not the path they are at, and its label.

    Raises:
        ArgumentError: If it has no image, or one that cannot be read; `number` is that of the row, for the message.
    """
    if isinstance(row, Mapping) and "pixel_values" in row:
        pixels = np.asarray(row["pixel_values"])
    else:
        pixels = np.asarray(_image(number, row, n_channels=3))
    label = {name: value for name, value in row.items() if name not in ("image", "pixel_values")}
    return f"{label} {pixels.dtype} {pixels.shape} ".encode() + pixels.tobytes()


def _image(number: int, row: Any, n_channels: int | None) -> Any:
    """Return the picture in a row, or an array."""
    image = row.get("image") if isinstance(row, Mapping) else None
    if image is None:
        columns = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ArgumentError(
            f"Row {number} of the evaluation data needs a column `image` or `pixel_values`, found {columns}: the "
            "model classifies images."
        )
    try:
        from PIL import Image
    except ImportError as error:
        raise ArgumentError("Images are read with a package that is not installed: pip install pillow.") from error
    if isinstance(image, (str, Path, Mapping)):
        image = _open(number, image)
    if isinstance(image, Image.Image) and n_channels == 3 and image.mode != "RGB":
        return image.convert("RGB")
    return image


def _open(number: int, image: Any) -> Any:
    """Return the picture at a path, or in bytes."""
    import datasets

    stored = dict(image) if isinstance(image, Mapping) else {"path": str(image), "bytes": None}
    try:
        return datasets.Image().decode_example(stored)
    except (KeyError, OSError, TypeError, ValueError) as error:
        where = stored.get("path") or "its bytes"
        raise ArgumentError(f"Row {number} of the evaluation data has no image in {where} ({error}).") from error
