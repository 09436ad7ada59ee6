from __future__ import annotations

import threading

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

from hf_frmerge.merging.engine.ordered_pool import ordered_pool


def blas_threads() -> list[int]:
    """How many threads every BLAS in the process may use, as the libraries themselves say."""
    return [library["num_threads"] for library in ThreadpoolController().select(user_api="blas").info()]


def test_products_use_one_thread_inside_and_as_many_as_before_outside() -> None:
    a = np.arange(6.0).reshape(2, 3)
    with threadpool_limits(2, user_api="blas"):
        if 2 not in blas_threads():
            pytest.skip("the BLAS of numpy has one thread, or is not known to threadpoolctl")
        with ordered_pool(2) as workers:
            assert set(workers.map(lambda _: max(blas_threads()), range(4))) == {1}
            assert next(iter(workers.map(lambda x: (x @ x.T).tolist(), [a]))) == [[5.0, 14.0], [14.0, 50.0]]
        assert 2 in blas_threads()
        with pytest.raises(ValueError, match="inside"), ordered_pool(2):
            raise ValueError("inside")
        assert 2 in blas_threads()


def test_results_come_in_order_and_only_a_few_items_are_taken_ahead() -> None:
    taken: list[int] = []
    last_may_end = threading.Event()

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    def work(number: int) -> int:
        if number == 0:  # ends after those behind it
            assert last_may_end.wait(60)
        elif number == 1:
            last_may_end.set()
        return number * number

    with ordered_pool(2) as workers:
        results = workers.map(work, items())
        assert next(results) == 0
        assert len(taken) <= 2 * 2 + 1
        assert list(results) == [number * number for number in range(1, 100)]
