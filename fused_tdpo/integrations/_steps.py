"""Running a loss inside a model's own forward, where whatever wraps the model has everything in place.

DDP counts on its forward, FSDP gathers shards in it, accelerate casts around it, PEFT switches adapters in it. So a model is
taught one more keyword, `model(..., preference_step=step)`, which calls `step(model, inputs)` in place of the rest.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fused_tdpo.heads import LMHead, backbone, call, unwrap

Step = Callable[[nn.Module, dict[str, Any]], Tensor]
"""(the model inside all wrappers, the inputs of this call) -> a tensor, which passes through the wrappers."""


def accept_steps(model: nn.Module) -> None:
    """Teaches a model, the one inside all wrappers, the keyword `preference_step`. Everything else stays as it was."""
    if "_forward_without_steps" in vars(model):
        return
    inner = model.forward
    function = getattr(inner, "__func__", inner)

    def forward(self: Any, *args: Any, preference_step: Step | None = None, **inputs: Any) -> Any:
        if preference_step is None:
            return self._forward_without_steps(*args, **inputs)
        return preference_step(self, {name: value for name, value in inputs.items() if value is not None})

    # generate() looks at it; functools.wraps would leave `__wrapped__`, down which accelerate unwraps too far. Nothing here
    # holds the model itself, so that a deep copy of it calls the copy.
    forward.__signature__ = signature(function)  # type: ignore[attr-defined]
    forward.__doc__ = function.__doc__
    model._forward_without_steps = inner  # type: ignore[assignment]
    model.forward = MethodType(forward, model)


def hidden_states(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """(S, T, D): what the head of `model` is applied to."""
    return call(backbone(model), "last_hidden_state", **inputs)


@torch.compiler.disable
def current_head(head: LMHead, model: nn.Module) -> LMHead:
    """`head`, read from this model before, with the parameters that its module holds now: FSDP replaces them.

    Raises:
        ValueError: they are not whole at the moment.
    """
    module: Any = unwrap(model).get_output_embeddings()
    weight, bias = (_whole(tensor) for tensor in (module.weight, getattr(module, "bias", None)))
    return replace(head, weight=weight, bias=bias)


def _whole(tensor: Any) -> Any:
    if hasattr(tensor, "full_tensor"):  # FSDP2: through it gradients return to the shards
        tensor = tensor.full_tensor()
    elif tensor is not None and (hasattr(tensor, "ds_id") or tensor.untyped_storage().nbytes() == 0):
        raise ValueError(
            "the head must be whole while the loss is computed; it is sharded, and gathered at other times. Use FSDP2 without "
            "a shard of its own for the head, or ZeRO-2."
        )
    return tensor


def through_head(model: nn.Module, hidden: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """`loss(hidden)`, called by the module of the head in place of its product: hooks on it run, those of shards among them."""
    head: Any = unwrap(model).get_output_embeddings()
    with _replaced_forward(head, torch.compiler.disable(loss)):
        return head(hidden)


@contextmanager
def _replaced_forward(module: nn.Module, function: Callable[..., Any]) -> Any:
    had, before = "forward" in vars(module), module.forward
    module.forward = function
    try:
        yield
    finally:
        if had:
            module.forward = before
        else:
            del module.forward
