"""Made-up records of comparisons, with numbers that tests can work out."""

from __future__ import annotations

from hf_frmerge.evaluation.comparison_record import ComparisonRecord, MethodResult, Tried

SCALES = (0.5, 0.7, 1.0, 1.4, 2.0)


def make_method(name: str, score: float, *, best: float, n_places: int = 2, **changes) -> MethodResult:
    """A method whose experts keep `score` plus and minus 4 points, and whose lead has an interval of ± 2 points."""
    shares = {f"expert-{index}": score + 0.08 * (index / (n_places - 1) - 0.5) for index in range(n_places)}
    lead = best - score
    fields = {
        "label": name,
        "method": name,
        "options": {},
        "scale": 1.0,
        "weights": None,
        "is_edge": False,
        "tried": [Tried(scale, None, score - 0.2 * (scale - 1) ** 2) for scale in SCALES],
        "validation": score,
        "score": score,
        "error": 0.03,
        "interval": (score - 0.06, score + 0.06),
        "by_place": shares,
        "place_intervals": {place: (share - 0.08, share + 0.08) for place, share in shares.items()},
        "lead": lead,
        "lead_interval": (lead - 0.02, lead + 0.02) if lead else (0.0, 0.0),
        "is_tied": lead <= 0.02,
        "distance": 0.4 - score / 10,
        "effective_rank": 0.9,
        "activation_variance": 0.8,
        "seconds": 1.5,
        "memory": 200_000_000,
    }
    return MethodResult(**{**fields, **changes})


def make_comparison(n_places: int = 2, **changes) -> ComparisonRecord:
    """A fitted merge in front, two methods tied with it, and some that are not."""
    best = 0.92
    fitted = {
        "label": "karcher, fitted to 112 prompts",
        "n_prompts": 112,
        "tried": [Tried(1.0, None, 0.92)],
        "seconds": 95.0,
        "memory": None,
    }
    rows = [
        make_method("karcher", best, best=best, n_places=n_places, **fitted),
        make_method("nre", 0.91, best=best, n_places=n_places),
        make_method("linear", 0.905, best=best, n_places=n_places, scale=1.4),
        make_method("ties", 0.84, best=best, n_places=n_places, is_edge=True, scale=2.0),
        make_method("dare_ties", 0.76, best=best, n_places=n_places, seed_scores=(0.75, 0.77)),
        make_method("model_stock", 0.55, best=best, n_places=n_places),
    ]
    experts = list(rows[0].by_place)
    counts = {expert: {"texts": 20, "predictions": 1500} for expert in experts}
    fields = {
        "experts": experts,
        "base_model": "org/base",
        "unit": "share",
        "texts": {"validation": counts, "test": counts},
        "settings": {"scales": list(SCALES), "seed": 42, "n_seeds": 2, "max_tokens": 2048},
        "methods": rows,
        "command": ["frmerge", "merge", *experts, "--calibration", "self", "--output-dir", "merged"],
        "failed": {"slerp": "It takes two experts."},
        "notes": ["A note."],
    }
    return ComparisonRecord(**{**fields, **changes})
