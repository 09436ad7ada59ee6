"""Limit of BLAS threads while matrices are merged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.plan import MergePlan


@contextmanager
def one_blas_thread(plan: MergePlan) -> Iterator[None]:
    """
    Give BLAS one thread for as long as matrices are merged as a whole.

    The engine merges matrices on threads of its own; BLAS threads below each of them would spin for its cores.
    """
    if not plan.args.merges_matrices:
        yield
        return
    from threadpoolctl import threadpool_limits  # costs other merges milliseconds

    with threadpool_limits(1, user_api="blas"):
        yield
