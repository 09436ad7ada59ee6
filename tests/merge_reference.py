"""Small checkpoints on disk, and a float64 reference that shares no code with the package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

SHAPES = {
    "model.embed_tokens.weight": (48, 24),
    "model.layers.0.self_attn.q_proj.weight": (24, 24),
    "model.layers.0.mlp.up_proj.weight": (40, 24),
    "model.layers.0.norm.weight": (24,),
    "model.layers.1.self_attn.q_proj.weight": (24, 24),
    "model.layers.1.mlp.up_proj.weight": (40, 24),
    "model.layers.1.norm.weight": (24,),
    "lm_head.weight": (48, 24),
}
CONFIG = {
    "model_type": "llama", "hidden_size": 24, "num_attention_heads": 3, "head_dim": 8, "vocab_size": 48,
    "tie_word_embeddings": False,
}  # fmt: skip


def write_model(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Write tensors as a checkpoint and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


def random_model(seed: int, dtype: torch.dtype = torch.float32, base: dict | None = None, spread: float = 0.8) -> dict:
    """A model with random weights, or a fine-tune of `base` with deltas of relative norm `spread`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if base is not None:
        tensors = {name: base[name].float() + spread * delta for name, delta in tensors.items()}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write_family(folder: Path, n: int = 3, dtype: torch.dtype = torch.float32) -> tuple[str, list[str]]:
    """Write a base and `n` experts at wide angles."""
    base = random_model(0)
    experts = [write_model(folder / f"e{i}", random_model(i + 1, dtype, base=base)) for i in range(n)]
    return write_model(folder / "base", {name: t.to(dtype) for name, t in base.items()}), experts


def naive_karcher(points: np.ndarray, weights: Sequence[float], n_iter: int = 200) -> np.ndarray:
    """Textbook log/exp iteration on full float64 vectors, arccos and all; rescaled to the mean norm."""
    norms = np.linalg.norm(points, axis=1)
    units = points / norms[:, None]
    mean = np.average(units, axis=0, weights=weights)
    mean /= np.linalg.norm(mean)
    for _ in range(n_iter):
        tangent = np.zeros_like(mean)
        for weight, unit in zip(weights, units, strict=True):
            cosine = np.clip(unit @ mean, -1, 1)
            angle = np.arccos(cosine)
            if angle > 1e-12:
                tangent += weight * angle / np.sin(angle) * (unit - cosine * mean)
        length = np.linalg.norm(tangent)
        if length < 1e-15:
            break
        mean = np.cos(length) * mean + np.sin(length) * tangent / length
    return mean * (norms @ np.asarray(weights)) / np.sum(weights)


def naive_mean(method: str, points: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Every span method on full float64 vectors, by its textbook formula."""
    if method == "task_arithmetic":
        return np.asarray(weights) @ points
    weights = np.asarray(weights) / np.sum(weights)
    linear = weights @ points
    if method == "linear":
        return linear
    if method == "nre":
        return linear / np.linalg.norm(linear) * (weights @ np.linalg.norm(points, axis=1))
    if method == "slerp":
        norms = np.linalg.norm(points, axis=1)
        a, b = points / norms[:, None]
        angle = np.arccos(np.clip(a @ b, -1, 1))
        direction = (np.sin(weights[0] * angle) * a + np.sin(weights[1] * angle) * b) / np.sin(angle)
        return direction * (weights @ norms)
    if method == "nuslerp":
        a, b = points / np.linalg.norm(points, axis=1)[:, None]
        angle = np.arccos(np.clip(a @ b, -1, 1))
        return (np.sin(weights[0] * angle) * points[0] + np.sin(weights[1] * angle) * points[1]) / np.sin(angle)
    if method == "multislerp":
        norms = np.linalg.norm(points, axis=1)
        mean = weights @ (points / norms[:, None])
        return mean / np.linalg.norm(mean) * (weights @ norms)
    if method == "model_stock":
        units = points / np.linalg.norm(points, axis=1)[:, None]
        pairs = [(weights[i] * weights[j], units[i] @ units[j]) for i in range(len(units)) for j in range(i)]
        cosine = max(0.0, sum(w * c for w, c in pairs) / sum(w for w, _ in pairs))
        spread = sum(weights**2)
        return cosine / (spread + (1 - spread) * cosine) * linear
    if method == "geometric_median":
        median = linear
        for _ in range(3000):
            pull = weights / np.linalg.norm(points - median, axis=1)
            median = pull @ points / pull.sum()
        return median
    return naive_karcher(points, weights)


def merged_reference(
    method: str,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    base: torch.Tensor | None,
    n_blocks: int = 1,
) -> np.ndarray:
    """Merged tensor in float64, block by block; in delta space if there is a base."""
    points = np.stack([t.double().numpy().reshape(n_blocks, -1) for t in tensors])
    origin = np.zeros_like(points[0]) if base is None else base.double().numpy().reshape(n_blocks, -1)
    blocks = [origin[b] + naive_mean(method, points[:, b] - origin[b], weights) for b in range(n_blocks)]
    return np.stack(blocks).reshape(tensors[0].shape)
