"""Data of the demo: held-out texts of three domains, and a LoRA expert for each."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from hf_frmerge.errors import MergeError

DOMAINS = ("austen", "kjv", "python")


def load_texts() -> dict[str, str]:
    """Return a held-out text of every domain, from a book or module that no expert was trained on."""
    data = files("hf_frmerge.demo") / "data"
    return {domain: (data / f"{domain}.txt").read_text(encoding="utf-8") for domain in DOMAINS}


def expert_dirs() -> dict[str, Path]:
    """
    Return the adapter folder of every domain's expert, in PEFT's layout.

    Raises:
        MergeError: If the package is imported from an archive: adapters are read as files.
    """
    experts = files("hf_frmerge.demo") / "data" / "experts"
    if not isinstance(experts, Path):
        raise MergeError(
            f"The demo's experts must be ordinary files, but hf_frmerge is imported from {experts}, an archive. "
            "Install it with pip instead."
        )
    return {domain: experts / domain for domain in DOMAINS}
