from __future__ import annotations

import numpy as np
import pytest

from hf_frmerge.kernels.blas import _openblas, one_blas_thread


def test_products_use_one_thread_inside_and_as_many_as_before_outside() -> None:
    library = _openblas()
    if library is None:
        pytest.skip("numpy was built with another BLAS")
    library.scipy_openblas_set_num_threads64_(2)
    a = np.arange(6.0).reshape(2, 3)
    with one_blas_thread():
        assert library.scipy_openblas_get_num_threads64_() == 1
        assert (a @ a.T).tolist() == [[5.0, 14.0], [14.0, 50.0]]
    assert library.scipy_openblas_get_num_threads64_() == 2
    with pytest.raises(ValueError, match="inside"), one_blas_thread():
        raise ValueError("inside")
    assert library.scipy_openblas_get_num_threads64_() == 2
