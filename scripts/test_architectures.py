"""
Merge one tiny model of every class in transformers' auto mappings, and compare it with a mean taken in memory.

    python scripts/test_architectures.py                          # all of them; half an hour on two cores
    python scripts/test_architectures.py --only LlamaForCausalLM ViTForImageClassification
    python scripts/test_architectures.py --adapters               # LoRA on every linear layer instead of whole copies
    python scripts/test_architectures.py --log walk.log           # goes on where an earlier run stopped

Of every class that can be built small from its config: a base and three copies with noise are saved by transformers,
merged (`method="linear"`, `space="deltas"`), and loaded by transformers with no missing and no unexpected key. Every
float tensor must be the float64 mean of the copies. Prints the count, and the reason for every class left out.

With `--adapters`, an adapter of the base and the base with another adapter on it (`base+adapter`) are merged, each a
LoRA of rank 2 on every linear layer that PEFT accepts, and compared with what PEFT folds in memory in float64.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from hf_frmerge.errors import MergeError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge

MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    "MODEL_FOR_CTC_MAPPING",
)
N_COPIES = 3
MOST_PARAMETERS = 10_000_000

# Key of a config -> the value in a tiny one, if that is smaller. The first pattern that fits the whole key counts.
TINY: tuple[tuple[str, int], ...] = (
    (r"num_feat_extract_layers", 100),  # as many as there are entries in the lists of its convolutions
    (r"vocab_size.*|.*_vocab_size", 120),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|n_routed_experts|num_experts_per_layer", 4),
    (r".*(per_tok|_top_?k|experts_per_token)", 2),
    (r"n_group|topk_group|n_shared_experts", 1),
    (r".*max_.*position.*|n_positions|n_ctx|max_.*length|max_seq_len|seq_length", 128),
    (r".*num_(key_value|kv)_heads|.*kv_heads|num_query_groups", 2),
    (r".*heads|n_head|.*_num_heads|num_heads", 2),
    (r"head_dim|.*head_dim|kv_channels|d_kv|d_head|attention_head_size|qk_.*dim|v_head_dim", 16),
    (r".*(intermediate|ffn|feedforward|inner|mlp).*(size|dim)|d_ff|d_inner|n_inner|.*_ff_dim", 48),
    (r"(num|n)_.*layers?|n_layers?|.*_layers|depth|num_blocks|num_.*blocks", 2),
    (
        r".*(hidden|embed|embedding|projection|proj|encoder|decoder|model|output|layer)_(size|dim)|d_model|n_embd|dim",
        32,
    ),
    (r"hidden_dim|embed_dim|hidden_channels|.*_rank|state_size|.*_lora_dim|feature_size", 32),
    (r"image_size|input_size|crop_size", 32),
    (r"num_queries|num_labels|num_.*tokens_per_.*", 10),
)
# Lists with an entry for every layer, and what names layers.
DROPPED = (
    "layer_types", "mlp_layer_types", "attention_layers", "layers_block_type", "no_rope_layers", "moe_layers",
    "intermediate_size", "num_attention_heads_per_layer", "kv_source_layers", "out_features", "out_indices",
    "stage_names", "per_layer_config",
)  # fmt: skip
# Settings of several of the types below.
HGNET = {
    "stem_channels": [3, 8, 16], "stage_in_channels": [16, 32, 32, 32], "stage_mid_channels": [8] * 4,
    "stage_out_channels": [32] * 4, "hidden_sizes": [32] * 4, "stage_num_blocks": [1] * 4,
    "stage_numb_of_layers": [2] * 4,
}  # fmt: skip
DETECTOR = {
    "backbone_config": {**HGNET, "out_features": ["stage2", "stage3", "stage4"]}, "encoder_in_channels": [32] * 3,
    "decoder_in_channels": [32] * 3,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
COMPASS = {"rope_parameters": {"full_attention": ROPE}}
GEMMA3N = {"activation_sparsity_pattern": [0.0, 0.0], "num_kv_shared_layers": 0}
TOKENIZER = {"num_filters": 2, "hidden_size": 16, "depths": [1] * 7}
VQ = {"base_channels": 32, "num_embeddings": 64, "embed_dim": 16, "latent_channels": 16, "channel_multiplier": [1, 1]}
WORDS = {"vocabulary_map": {"<image>": 1, "<|extra_200|>": 2}}
XLM = {"emb_dim": 32}
ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
# Type of model, or class -> what its tiny config says beside, where sizes depend on each other or have other names.
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": MAMBA,
    "bit": {"num_groups": 4, "embedding_size": 32},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "chameleon": {**WORDS, "vq_config": VQ},
    "cohere_compass": {"text_config": COMPASS},
    "cohere_compass_text": COMPASS,
    "cosmos3_edge": {"text_config": {"rope_parameters": {"mrope_section": [4, 2, 2]}}},
    "cvt": {"embed_dim": [8, 12, 16], "depth": [1, 2, 3]},
    "d_fine": DETECTOR,
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "deimv2": DETECTOR,
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 64},
    "emu3": {**WORDS, "vq_config": VQ},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [3, 3, 2]}}},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "flaubert": XLM,
    "florence2": {
        "vision_config": {"embed_dim": [8, 16, 32, 64], "num_heads": [2] * 4, "num_groups": [2] * 4, "depths": [1] * 4}
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3n": {"text_config": GEMMA3N},
    "gemma3n_text": GEMMA3N,
    "glm5_next": {"text_config": {"index_topk": 2, "index_kpool": 2}},
    "granitemoehybrid": MAMBA,
    "hgnet_v2": HGNET,
    "janus": {"vq_config": VQ},
    "kyutai_speech_to_text": {
        "codec_config": {
            "upsample_groups": 32, "num_filters": 4, "codebook_size": 32, "codebook_dim": 16,
            "vector_quantization_hidden_dimension": 16,
        }
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lw_detr": {
        "projector_scale_factors": [1.0],
        "backbone_config": {"num_windows": 4, "num_windows_side": 2, "image_size": 64},
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "mobilebert": {"embedding_size": 16},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "moonshine_streaming": {"num_key_value_heads": 2},
    "perceiver": {
        "num_latents": 8, "d_latents": 32, "d_model": 32, "num_self_attends_per_block": 1,
        "num_cross_attention_heads": 1,
    },
    "pp_doclayout_v2": DETECTOR,
    "pp_doclayout_v3": DETECTOR,
    "pp_doclayout_v4": DETECTOR,
    "recurrent_gemma": {"lru_width": 32},
    "reformer": {
        "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "feed_forward_size": 48,
        "attn_layers": ["local", "lsh"],
    },
    "ReformerModelWithLMHead": {"is_decoder": True},
    "textnet": {"hidden_sizes": [16] * 5, "stem_out_channels": 16},
    "vibevoice": {"audio_config": TOKENIZER, "semantic_model_config": TOKENIZER},
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config": TOKENIZER, "semantic_tokenizer_encoder_config": TOKENIZER},
    "xlm": XLM,
    "zamba": ZAMBA,
    "zamba2": {**ZAMBA, "n_mamba_heads": 2, "mamba_headdim": 32, "mamba_d_state": 8, "hybrid_layer_ids": [1, 3]},
}  # fmt: skip
NEEDED = ("head_dim", "num_key_value_heads", "vocab_size")  # some classes cannot do without, though their configs do


def tiny_dict(values: dict[str, Any]) -> dict[str, Any]:
    """Shrink the sizes in a config, and in the configs nested in it."""
    tiny = {}
    for key, value in values.items():
        if key in ("transformers_version", "dtype", "id2label", "label2id", "architectures"):
            continue
        if key in DROPPED and isinstance(value, (list, dict)):
            continue
        if isinstance(value, dict):
            tiny[key] = tiny_dict(value)
        elif key == "attention_types":
            tiny[key] = [[["global", "local"], 1]]
        elif isinstance(value, list) and key == "num_heads":
            tiny[key] = [2] * len(value)
        elif value is None and key in NEEDED:
            tiny[key] = next(size for pattern, size in TINY if re.fullmatch(pattern, key))
        elif isinstance(value, list) and key == "depths":
            tiny[key] = [1] * len(value)
        elif isinstance(value, list) and key in ("hidden_sizes", "embed_dims", "encoder_hidden_sizes"):
            tiny[key] = [32 << place for place in range(len(value))]
        elif isinstance(value, bool) or not isinstance(value, int) or not isinstance(key, str):
            tiny[key] = value
        elif key.endswith("token_id"):
            tiny[key] = min(value, 100) if value is not None else None
        else:
            limit = next((size for pattern, size in TINY if re.fullmatch(pattern, key)), value)
            tiny[key] = min(value, limit)
    return tiny


def tiny_config(config_class: Any, model_class: Any) -> Any:
    """Return a config of a tiny model: the defaults of the class, with smaller sizes and with its `SETTINGS`."""
    own = SETTINGS.get(config_class.model_type, {}) | SETTINGS.get(model_class.__name__, {})
    settings = with_settings(tiny_dict(config_class().to_dict()), own)
    config = config_class(**{key: value for key, value in settings.items() if key != "model_type"})
    # A class may be that of a part: the language model of a vision-language model.
    parts = [config, *(getattr(config, name) for name in config.sub_configs)]
    return next((part for part in parts if isinstance(part, model_class.config_class)), config)


def with_settings(tiny: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return a config with some settings replaced, in the configs nested in it, too."""
    nested = {
        key: with_settings(tiny[key], value)
        for key, value in own.items()
        if isinstance(tiny.get(key), dict) and isinstance(value, dict)
    }
    return {**tiny, **own, **nested}


def classes() -> dict[str, tuple[type, type]]:
    """Return every class in the mappings by name, with the class of its config."""
    found: dict[str, tuple[type, type]] = {}
    for mapping in MAPPINGS:
        entries = getattr(modeling_auto, mapping, {})
        for config_class in list(entries):
            with contextlib.suppress(Exception):  # classes that need a package which is not installed
                models = entries[config_class]
                for model in models if isinstance(models, (tuple, list)) else (models,):
                    found.setdefault(model.__name__, (model, config_class))
    return found


class LeftOut(Exception):
    """A class that cannot be tried, and why."""


def build(model_class: type, config_class: type) -> Any:
    """Return a tiny model of a class."""
    try:
        config = tiny_config(config_class, model_class)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size > MOST_PARAMETERS:
            raise LeftOut(f"its config gives {size:,} parameters at least")
        torch.manual_seed(0)
        return model_class(tiny_config(config_class, model_class)).float().eval()
    except LeftOut:
        raise
    except Exception as error:
        raise LeftOut(
            f"no tiny model from its config: {type(error).__name__}: {error}".splitlines()[0][:110]
        ) from error


def save_family(model: Any, folder: Path) -> list[dict[str, torch.Tensor]]:
    """Save `base` and the copies `e0`, `e1`, ...; return the tensors of the copies in memory."""
    try:
        model.save_pretrained(folder / "base")
        loaded, info = type(model).from_pretrained(folder / "base", output_loading_info=True)
    except Exception as error:
        text = f"transformers cannot save and load it: {type(error).__name__}: {error}"
        raise LeftOut(text.splitlines()[0][:110]) from error
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise LeftOut(f"transformers does not load what it saves: {sorted(info['missing_keys'])[:2]} missing")
    # Computed from the config, and not saved: sines of positions.
    computed = type(model)._keys_to_ignore_on_save or ()
    origin, copies = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}, []
    for copy in range(N_COPIES):
        generator = torch.Generator().manual_seed(copy + 1)
        loaded.load_state_dict(origin)
        with torch.no_grad():
            for name, parameter in loaded.named_parameters():
                if parameter.is_floating_point() and name not in computed:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        loaded.save_pretrained(folder / f"e{copy}")
        copies.append({name: tensor.clone() for name, tensor in loaded.state_dict().items()})
    return copies


def check(model: Any, folder: Path) -> str:
    """Merge a family and compare; return what is wrong, or an empty string."""
    copies = save_family(model, folder)
    args = MergingArguments(str(folder / "out"), method="linear", space="deltas", disable_tqdm=True)
    plan = build_plan([str(folder / f"e{copy}") for copy in range(N_COPIES)], args, None, str(folder / "base"))
    run_merge(plan, StepObserver(), Processes())
    return compare(type(model), folder / "out", copies)


def compare(model_class: Any, output: Path, copies: list[dict[str, torch.Tensor]]) -> str:
    """Load what was merged, and say what is not the mean of the copies."""
    merged, info = model_class.from_pretrained(output, output_loading_info=True)
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        return f"keys that do not load: {sorted(map(str, wrong))[:3]}"
    for name, tensor in merged.state_dict().items():
        if not tensor.is_floating_point():
            continue
        mean = torch.stack([each[name].double() for each in copies]).mean(0)
        if not torch.allclose(tensor.double(), mean, rtol=1e-6, atol=1e-7, equal_nan=True):
            return f"{name} is not the mean, by up to {(tensor.double() - mean).abs().max():.1e}"
    return ""


def save_base_and_adapters(model: Any, folder: Path) -> list[dict[str, torch.Tensor]]:
    """Save `base` and the adapters `a0` and `a1`; return the tensors that PEFT makes of them, in float64."""
    try:
        model.save_pretrained(folder / "base")
        targets = linear_layers(type(model).from_pretrained(folder / "base"))
        folded = []
        for number in range(2):
            adapted, double = (
                get_peft_model(
                    type(model).from_pretrained(folder / "base", dtype=dtype),
                    LoraConfig(r=2, lora_alpha=3, target_modules=targets),
                    autocast_adapter_dtype=False,
                )
                for dtype in (torch.float32, torch.float64)
            )
            generator = torch.Generator().manual_seed(number + 1)
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
            adapted.save_pretrained(folder / f"a{number}")
            # In memory: of some classes PEFT does not load all that it saves.
            double.load_state_dict(adapted.state_dict())
            whole = double.double().merge_and_unload()
            folded.append({name: tensor.clone() for name, tensor in whole.state_dict().items()})
    except Exception as error:
        text = f"transformers or PEFT cannot make adapters of it: {type(error).__name__}: {error}"
        raise LeftOut(text.splitlines()[0][:110]) from error
    return folded


def linear_layers(model: Any) -> list[str]:
    """Return the paths of all linear layers whose weight no other layer has."""
    names: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    layers = [
        path
        for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and names[id(module.weight)] == 1
    ]
    if not layers:
        raise LeftOut("it has no linear layers")
    return layers


def check_adapters(model: Any, folder: Path) -> str:
    """Merge an adapter with the base that another is on; return what is wrong, or an empty string."""
    folded = save_base_and_adapters(model, folder)
    args = MergingArguments(
        str(folder / "out"), method="linear", space="deltas", adapter_output="merged", disable_tqdm=True
    )
    experts = [str(folder / "a0"), f"{folder / 'base'}+{folder / 'a1'}"]
    run_merge(build_plan(experts, args, None, str(folder / "base")), StepObserver(), Processes())
    return compare(type(model), folder / "out", folded)


def try_class(name: str, model_class: type, config_class: type, *, adapters: bool) -> tuple[str, str]:
    """Return `("right" | "wrong" | "refused" | "left out", why)` for a class."""
    with tempfile.TemporaryDirectory(prefix="architecture-") as folder:
        try:
            with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                checked = check_adapters if adapters else check
                wrong = checked(build(model_class, config_class), Path(folder))
        except LeftOut as reason:
            return "left out", str(reason)
        except MergeError as error:
            return "refused", str(error).replace(folder, "").splitlines()[0][:300]
        except Exception as error:
            return "wrong", f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ("wrong", wrong) if wrong else ("right", "")


def main() -> int:
    """Try all classes, or those that are named, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CLASS", help="Classes to try.")
    parser.add_argument("--adapters", action="store_true", help="Merge adapters instead of whole copies.")
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="Append results; classes that it has are passed over."
    )
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    known = classes()
    tried = args.log.read_text().splitlines() if args.log is not None and args.log.exists() else []
    passed_over = {line.split("\t")[1] for line in tried}
    chosen = [name for name in args.only or known if name not in passed_over]
    counts: dict[str, int] = {}
    started = time.monotonic()
    for name in chosen:
        outcome, why = try_class(name, *known[name], adapters=args.adapters)
        counts[outcome] = counts.get(outcome, 0) + 1
        if outcome != "right":
            sys.stdout.write(f"{outcome}: {name}: {why}\n")
            sys.stdout.flush()
        if args.log is not None:
            with args.log.open("a") as log:
                log.write(f"{outcome}\t{name}\t{why}\n")
        gc.collect()
    parts = [
        f"{counts[outcome]} {outcome}" for outcome in ("right", "refused", "wrong", "left out") if outcome in counts
    ]
    minutes = (time.monotonic() - started) / 60
    sys.stdout.write(f"{len(chosen)} classes of transformers {transformers.__version__}: {', '.join(parts)} ")
    sys.stdout.write(f"in {minutes:.0f} min.\n")
    return 1 if counts.get("wrong") or counts.get("refused") else 0


if __name__ == "__main__":
    sys.exit(main())
