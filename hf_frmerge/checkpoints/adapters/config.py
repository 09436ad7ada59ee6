"""Read `adapter_config.json` of a PEFT LoRA adapter: ranks and scales. What is not a plain LoRA is refused."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from types import NoneType
from typing import Any

from hf_frmerge.checkpoints.adapters.patterns import check_pattern
from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.remote_folder import RemoteFolder
from hf_frmerge.checkpoints.tensors.small_files import read_json
from hf_frmerge.checkpoints.tensors.wrappers import unwrapped_pattern
from hf_frmerge.errors import CheckpointError, some
from hf_frmerge.kernels.interface import OVERFLOWS_AT

CONFIG_NAME = "adapter_config.json"

# Kinds of adapters that PEFT itself folds into their base, layer by layer, with the right result: the tests try each.
FOLDED_BY_PEFT = frozenset(
    {"ADALORA", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING"}
    | {"LOHA", "LOKR", "MISS", "OFT", "PEANUT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING"}
    | {"TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT"}
)

# Fields of a LoRA that change more of the layers than factors can; PEFT folds these, too.
_BESIDE_FACTORS = ("bias", "lora_bias", "target_parameters", "trainable_token_indices")

FOLD_BY_HAND = (
    "If PEFT can fold it into its base as a whole, do that once:\n"
    "    from peft import PeftModel\n"
    "    from transformers import AutoModelForCausalLM  # or the class you use\n"
    '    base = AutoModelForCausalLM.from_pretrained("ITS BASE MODEL")\n'
    '    model = PeftModel.from_pretrained(base, "THIS ADAPTER").merge_and_unload()\n'
    '    model.save_pretrained("folded")\n'
    "and pass 'folded', a full model."
)

# PEFT methods that do not change the weights, but add inputs or layers of their own.
_WITHOUT_WEIGHTS = frozenset(
    {"ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"}
)

# Field of the config -> why the factors mean something else if it is set. DoRA is not in the list: it is supported,
# and recognised by the magnitude vectors of the modules.
_REFUSED = {
    "lora_bias": "its factors also carry a bias, which is no part of a low-rank delta",
    "trainable_token_indices": "it replaces single embedding rows beside the factors",
    "layer_replication": "its layers are not the layers of the base checkpoint",
    "target_parameters": "its factors belong to stacked parameters (mixture-of-experts tensors), not to modules",
    "use_qalora": "its inputs are pooled before the factors",
    "use_bdlora": "its factors are block diagonal",
    "kasa_config": "it changed the base weights when it was initialised",
    "velora_config": "it changes how inputs enter the factors",
    "monteclora_config": "its factors are samples of a distribution",
}

# The same of adapters that no weights equal, whoever folds them.
_NO_WEIGHTS_EQUAL = {
    "alora_invocation_tokens": "it is active for part of the sequence only",
    "arrow_config": "it routes between adapters at run time",
}

# Initialisations that change the base weights (or, for MiCA, take a factor from them): such factors are no delta to
# the published base.
_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "mica", "lora_ga")

# Fields that look like switches of a variant (`use_*`, `*_config`) and are known to be harmless. Any other one is
# refused: a future PEFT version may change the meaning of the factors with it.
_KNOWN_SWITCHES = frozenset(
    {"use_rslora", "use_dora", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config"}
)


_RANK_LIMIT = 2**31


@dataclass(frozen=True)
class AdapterConfig:
    """Fields of `adapter_config.json` that decide what the factors mean; `raw` is the whole file."""

    raw: dict[str, Any]
    base_model: str | None
    revision: str | None
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool

    def rank(self, module: str) -> int:
        """Return the rank of `module` (path in the base model): from `rank_pattern`, else `r`."""
        return int(self._pattern("rank_pattern", module, self.raw.get("r", 8)))

    def alpha(self, module: str) -> float:
        """Return the numerator of the scale of `module`: from `alpha_pattern`, else `lora_alpha`."""
        return float(self._pattern("alpha_pattern", module, self.raw.get("lora_alpha", 8)))

    def scale(self, module: str) -> float:
        """
        Return the effective scale `s` of `module`: its delta is `s * up @ down`.

        `alpha / r`, or `alpha / sqrt(r)` for a rank-stabilised adapter (rsLoRA, arXiv 2312.03732).
        """
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def _pattern(self, field: str, module: str, default: Any) -> Any:
        # PEFT's rule: keys are regular expressions for the end of the module path, the first match wins.
        for key, value in (self.raw.get(field) or {}).items():
            if re.match(rf"(.*\.)?({unwrapped_pattern(key)})$", module):
                return value
        return default


def kind_folded_by_peft(folder: LocalFolder | RemoteFolder, spec: str) -> str | None:
    """Return what to call an adapter that is no plain LoRA and that PEFT folds layer by layer; None of others."""
    raw = read_json(folder, CONFIG_NAME, spec)
    kind = raw.get("peft_type")
    if kind != "LORA":
        return kind if isinstance(kind, str) and kind in FOLDED_BY_PEFT else None
    beside = [field for field in _BESIDE_FACTORS if raw.get(field) not in (None, False, [], {}, "none")]
    return f"LORA with {some(beside)}" if beside else None


def read_adapter_config(folder: LocalFolder | RemoteFolder, spec: str) -> AdapterConfig:
    """
    Read and check the configuration of a LoRA adapter.

    Args:
        folder (`LocalFolder` or `RemoteFolder`):
            Folder with `adapter_config.json`.
        spec (`str`):
            Name of the adapter as the user wrote it, for errors.

    Returns:
        `AdapterConfig`: The fields that decide what the factors mean.

    Raises:
        CheckpointError: If the file is missing or broken, or the adapter is of a kind that is not a plain LoRA.
    """
    raw = read_json(folder, CONFIG_NAME, spec)
    if not raw:
        raise CheckpointError(
            f"Adapter {spec!r}: no {CONFIG_NAME} in {folder.path}. Point to a folder PEFT's `save_pretrained` wrote."
        )
    _check_names(raw, spec)
    _refuse_unsupported(raw, spec)
    _check_numbers(raw, spec)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in raw.get(field) or {}:
            check_pattern(unwrapped_pattern(pattern), field, spec)
    return AdapterConfig(
        raw=raw,
        base_model=raw.get("base_model_name_or_path") or None,
        revision=raw.get("revision") or None,
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
    )


def _check_names(raw: dict[str, Any], spec: str) -> None:
    for key in ("peft_type", "task_type", "bias", "base_model_name_or_path", "revision"):
        if not isinstance(raw.get(key), (str, NoneType)):
            raise CheckpointError(_expected(spec, key, raw[key], "a name"))


def _check_numbers(raw: dict[str, Any], spec: str) -> None:
    """Check that ranks and alphas are numbers, and that alphas fit into float32, in which an adapter is applied."""
    ranks = {"r": raw.get("r", 8), **_entries(raw, "rank_pattern", spec)}
    alphas = {"lora_alpha": raw.get("lora_alpha", 8), **_entries(raw, "alpha_pattern", spec)}
    for key, value in ranks.items():
        if type(value) is not int or not 1 <= value < _RANK_LIMIT:
            raise CheckpointError(_expected(spec, key, value, f"a whole number from 1 to {_RANK_LIMIT - 1}"))
    for key, value in alphas.items():
        # type() rather than isinstance(): JSON's true would pass as the number 1.
        if type(value) not in (int, float) or not abs(value) < OVERFLOWS_AT["F32"]:
            raise CheckpointError(_expected(spec, key, value, "a finite number within the range of float32"))


def _entries(raw: dict[str, Any], field: str, spec: str) -> dict[str, Any]:
    patterns = raw.get(field) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(_expected(spec, field, patterns, "an object"))
    return {f"{field}[{key!r}]": value for key, value in patterns.items()}


def _expected(spec: str, key: str, value: Any, expected: str) -> str:
    shown = repr(value) if len(repr(value)) <= 100 else f"{value!r:.100}..."
    return (
        f"Adapter {spec!r}: {key} in {CONFIG_NAME} is {shown}, expected {expected}. Correct it, or save the adapter "
        "again with PEFT."
    )


def _refuse_unsupported(raw: dict[str, Any], spec: str) -> None:
    peft_type = raw.get("peft_type")
    if peft_type != "LORA":
        if peft_type in _WITHOUT_WEIGHTS:
            hint = "It changes no weights of its base, so there is nothing to merge."
        else:
            hint = FOLD_BY_HAND
        raise CheckpointError(f"Adapter {spec!r}: peft_type is {peft_type!r}, expected 'LORA'. {hint}")
    bias = raw.get("bias", "none")
    if bias != "none":
        raise CheckpointError(
            f"Adapter {spec!r}: bias={bias!r} trained biases of the base beside the factors, expected 'none'. "
            "Merge it into its base (`merge_and_unload`) and merge the full checkpoints."
        )
    for field, reason in _REFUSED.items():
        if raw.get(field):
            raise CheckpointError(
                f"Adapter {spec!r}: {field} is set, and {reason}. It cannot be merged as low-rank factors; if PEFT "
                "can fold it into its base (`merge_and_unload`), merge the full checkpoints instead."
            )
    for field, reason in _NO_WEIGHTS_EQUAL.items():
        if raw.get(field):
            raise CheckpointError(
                f"Adapter {spec!r}: {field} is set, and {reason}, so no weights equal it, and PEFT does not fold it, "
                "either. It cannot be merged: leave it out."
            )
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
        raise CheckpointError(
            f"Adapter {spec!r}: init_lora_weights={init!r} takes part of the base weights into the factors, so they "
            "are not a delta to the published base. Save it again with "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`, which converts it to a plain LoRA."
        )
    for field, value in raw.items():
        is_switch = field.startswith("use_") or field.endswith("_config")
        if value and is_switch and field not in _KNOWN_SWITCHES:
            raise CheckpointError(
                f"Adapter {spec!r}: {field}={value!r} is an option this version does not know; it may change what the "
                "factors mean. Merge the adapter into its base with the PEFT version that wrote it."
            )
