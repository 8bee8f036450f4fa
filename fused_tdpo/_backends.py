"""Which implementation runs: one pure decision, with its reason; and the module that holds it."""

import importlib
from importlib.util import find_spec
from types import ModuleType

import torch

BACKENDS = ("auto", "triton", "torch", "reference")

TRITON_INSTALLED = find_spec("triton") is not None
"""Looked up, not imported: `import fused_tdpo` needs torch alone."""


def choose_backend(
    backend: str, device_type: str, dtypes: tuple[torch.dtype, ...], *, triton: bool = TRITON_INSTALLED
) -> tuple[str, str]:
    """The implementation that `backend` means for tensors of these dtypes on this device, and why.

    `"auto"` takes Triton on a GPU and falls back to torch. A name is that implementation or an error, never another one.

    Raises:
        ValueError: an unknown name. TypeError: a dtype that the named backend does not compute. RuntimeError: no Triton.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")
    if backend == "triton":
        if torch.float64 in dtypes:
            raise TypeError(
                "backend='triton' computes in float32 and refuses float64 logits; use backend='torch' or 'reference'"
            )
        if not triton:
            raise RuntimeError("backend='triton' needs the triton package: pip install triton, or use backend='torch'")
        return "triton", "asked for"
    if backend != "auto":
        return backend, "asked for"
    if device_type != "cuda":
        return "torch", f"no Triton kernels for device type {device_type!r}"
    if torch.float64 in dtypes:
        return "torch", "Triton kernels compute in float32, and the logits are float64"
    if not triton:
        return "torch", "the triton package is not installed"
    return "triton", "GPU tensors"


def load_backend(name: str, device: torch.device, op: str = "token_stats") -> ModuleType:
    """The module in which a chosen backend has an op, imported on first use: one for each op's kernels, one for torch."""
    module = importlib.import_module(f"fused_tdpo.kernels.{op}" if name == "triton" else "fused_tdpo._torch_backend")
    if name == "triton" and device.type == "cpu":
        from triton import knobs

        if not knobs.runtime.interpret:
            raise ValueError(
                "backend='triton' needs GPU tensors, or Triton's interpreter for CPU tensors (set TRITON_INTERPRET=1 before "
                "triton is first imported); got CPU tensors. Use backend='torch', or 'auto'."
            )
    return module
