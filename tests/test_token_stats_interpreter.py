"""The contract of `token_stats`, run by the Triton kernels in Triton's interpreter: no GPU, tiny shapes."""

import pytest

from contract_token_stats import Backend, TritonContract

pytestmark = [
    pytest.mark.interpreter,
    # The interpreter computes with numpy, which warns of what kernels do in lanes that they then select away.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


class TestTritonInterpreted(TritonContract):
    backend = Backend("triton", examples=0.4, rows=14)
