"""Tolerances of all numeric tests, by the dtype of the result.

Use as `torch.testing.assert_close(actual.double(), exact, **TOL[actual.dtype])`.
"""

from __future__ import annotations

import torch

TOL: dict[torch.dtype, dict[str, float]] = {
    # Sums of some thousand terms at 1e-16 each.
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    # Sums of some hundred terms at 6e-8 each, and exp and tanh that differ by a few units in the last place.
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    # Ops sum in float32 and round once, by half a unit in the last place at most: 2**-11 for float16, 2**-8
    # for bfloat16. A hundredth more covers a sum that lies beside a tie, and rounding twice exceeds it. The
    # absolute part is float32's, for results that cancel.
    torch.float16: {"rtol": 1.01 * 2.0**-11, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1.01 * 2.0**-8, "atol": 1e-5},
}
