"""Files that transformers makes of the settings in a GGUF file. Imports transformers, which takes seconds."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hf_frmerge.checkpoints.gguf.header import EXTRA, GgufHeader, plain_dtype, read_gguf_header
from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.source import gguf_parts
from hf_frmerge.errors import CheckpointError, some

CONFIG = "config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Files of a tokenizer that may be made."""

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_DEFAULT = "BF16"  # of weights that are dequantised
_KEPT = 16  # models


@dataclass(frozen=True)
class MadeFiles:
    """Files by name, and what whoever uses them should know."""

    files: dict[str, bytes]
    notes: list[str]


@functools.lru_cache(_KEPT)
def made_config(path: str, identity: str) -> MadeFiles:
    """
    Make the `config.json` of a GGUF file.

    Args:
        path: The file, of a split model the first one.
        identity: Mark of its contents.

    Raises:
        CheckpointError: If transformers has no tables for its architecture, or cannot make a config of its settings.
    """
    headers = _headers(path)
    first = headers[0]
    values = _values(path, first.architecture)
    names = {tensor.name for header in headers for tensor in header.tensors}
    if "output.weight" in names:  # transformers looks for it in the first file only
        values["tie_word_embeddings"] = False
    dtype = plain_dtype(tensor.type for header in headers for tensor in header.tensors) or _DEFAULT
    import transformers
    from transformers.models.auto import modeling_auto

    try:
        classes = (
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            | modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        )
        model_type = values.pop("model_type")
        values = {"architectures": [classes[model_type]], **values, "dtype": _DTYPES[dtype]}
        config = transformers.AutoConfig.for_model(model_type, **values).to_diff_dict()
    except Exception as error:  # what a stranger's settings lead to in the class is for the class to choose
        raise CheckpointError(_no_config(path, error)) from error
    config.pop("transformers_version", None)
    stated = [key for key in first.settings if ".rope.scaling." in key and first.settings[key] not in ("", "none")]
    stated += sorted(name for name in names if is_rotation(name))
    notes = [
        f"{path!r} is read with the config.json that transformers makes of the settings in it. Not in there is how "
        f"positions are scaled ({some(stated)}): put the config.json of the model it was made from beside it."
    ]
    text = json.dumps({"model_type": model_type, **config}, indent=2, sort_keys=True) + "\n"
    return MadeFiles({CONFIG: text.encode()}, notes if stated else [])


@functools.lru_cache(_KEPT)
def made_tokenizer(path: str, identity: str) -> MadeFiles:
    """Make the tokenizer of a GGUF file, and its chat template; if that cannot be done, a note says so."""
    [first, *_] = _headers(path)
    other = "Put the tokenizer's files beside it, or name a model that has them (--settings-from)."
    if "tokenizer.ggml.model" not in first.settings:
        return MadeFiles({}, [f"{path!r} holds no tokenizer, and there is none beside it. {other}"])
    import transformers

    with TemporaryDirectory(prefix="frmerge-") as alone, TemporaryDirectory(prefix="frmerge-") as made:
        # By itself: what else lies beside the file must have no part in it.
        Path(alone, "model.gguf").symlink_to(Path(path).absolute())
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
            tokenizer.save_pretrained(made)
        except Exception as error:  # as above
            return MadeFiles({}, [f"transformers could make no tokenizer of {path!r} ({_reason(error)}). {other}"])
        return MadeFiles({each.name: each.read_bytes() for each in Path(made).iterdir() if each.name in TOKENIZER}, [])


def is_rotation(name: str) -> bool:
    """Whether a tensor holds factors by which positions are scaled; transformers computes them from its config."""
    return name.removesuffix(".weight") in ("rope_freqs", "rope_factors_long", "rope_factors_short")


def _headers(path: str) -> list[GgufHeader]:
    """Check all files of a model before transformers reads one, and return what they say."""
    folder = LocalFolder(str(Path(path).parent))
    return [read_gguf_header(folder, name, path) for name in gguf_parts(Path(path).name)]


def _values(path: str, architecture: str) -> dict[str, Any]:
    """Return what transformers makes of the settings."""
    try:
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        return dict(load_gguf_checkpoint(path, return_tensors=False)["config"])
    except ImportError as error:
        raise CheckpointError(f"{path!r}: the installed transformers cannot read GGUF files: {EXTRA}.") from error
    except Exception as error:  # as above
        if "is not supported yet" not in str(error):
            raise CheckpointError(_no_config(path, error)) from error
        raise CheckpointError(
            f"{path!r} is a GGUF file of the architecture {architecture!r}, and the installed transformers has no "
            "tables of how that is stored. Merge the checkpoints that it was made from."
        ) from error


def _no_config(path: str, error: Exception) -> str:
    return (
        f"transformers could make no config of the settings in {path!r} ({_reason(error)}). The file is damaged, or "
        "newer than the installed transformers."
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
