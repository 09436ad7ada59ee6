"""Greedy soup (Wortsman et al., arXiv 2203.05482): models that are averaged as long as the score does not fall."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def greedy_soup(n_experts: int, score: Callable[[Sequence[float]], float]) -> list[float]:
    """
    Return weights of a greedy soup: those in it are all alike, the others 0.

    Experts are taken in the order of their own scores, the best first (of equals the first). Each stays in if the
    mean of it and those in before scores no less than these did (recipe 1 of the paper). So the soup is never worse,
    on the texts it was made with, than the best expert.

    Args:
        n_experts: Number of experts.
        score: Weights that sum to 1 -> score of the merge on held-out texts, higher is better.
    """

    def weights_of(members: Sequence[int]) -> list[float]:
        return [1.0 / len(members) if number in members else 0.0 for number in range(n_experts)]

    alone = [score(weights_of([number])) for number in range(n_experts)]
    order = sorted(range(n_experts), key=lambda number: -alone[number])
    soup, best = [order[0]], alone[order[0]]
    for number in order[1:]:
        joined = score(weights_of([*soup, number]))
        if joined >= best:
            soup, best = [*soup, number], joined
    return weights_of(soup)
