"""What makes the interpreter quicker, against what it does by itself."""

import numpy as np
import pytest
import torch
from tolerance import assert_bit_identical

# Before a test asks for the interpreter, which then reduces in the other way.
ReduceOps = pytest.importorskip("triton.runtime.interpreter").ReduceOps
ONE_BY_ONE = ReduceOps.generic_reduce


@pytest.mark.parametrize("implementation", ["interpreter"], indirect=True)
@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("keep_dims", [False, True])
def test_a_block_reduced_by_halves_is_that_reduced_number_by_number(axis: int, keep_dims: bool) -> None:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    from kvlock_kernels._triton.packing import larger_or_nan

    values = np.random.default_rng(0).standard_normal((4, 2, 8)).astype(np.float32)
    values[0, 0, 5] = values[1, 1, 0] = np.nan
    block = tl.tensor(TensorHandle(values, tl.float32), tl.block_type(tl.float32, list(values.shape)))
    reduction = ReduceOps(axis, larger_or_nan, keep_dims)
    assert reduction.generic_reduce.__func__ is not ONE_BY_ONE
    (quicker,), (slower,) = reduction.generic_reduce((block,)), ONE_BY_ONE(reduction, (block,))
    assert quicker.type == slower.type
    found, expected = (torch.from_numpy(one.handle.data) for one in (quicker, slower))
    assert found.isnan().any() and not found.isnan().all()
    assert_bit_identical(found, expected)
