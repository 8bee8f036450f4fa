"""The other losses on a GPU, at both levels: what they give on a CPU, and without waiting for the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_tdpo
from tolerances import assert_within_budget

S, T, V, D = 6, 24, 1031, 32
LENGTHS = (10, 20, 3, 7, 1, 12)
"""Labels of each sequence that count."""

LOSSES: dict[str, dict[str, Any]] = {  # name -> options
    "SimPOLoss": {},
    "CPOLoss": {},
    "ORPOLoss": {},
    "KTOLoss": {},
    "BCOLoss": {},
    "TIDPOLoss": {"gamma": 0.5},
}


def inputs(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(7)
    labels = torch.randint(V, (S, T), generator=gen)
    for row, length in zip(labels, LENGTHS, strict=True):
        row[: T - length] = -100
    states = {name: torch.randn(S, T, D, generator=gen) for name in ("hidden", "ref_hidden")}
    heads = {name: torch.randn(V, D, generator=gen) * D**-0.5 for name in ("weight", "ref_weight")}
    weights = torch.rand(S, T, generator=gen)
    found = {name: t.to(device, dtype) for name, t in (states | heads).items()}
    kinds = torch.tensor([True, False, False, True, True, False])
    return found | {"labels": labels.to(device), "desirable": kinds.to(device), "token_weights": weights.to(device)}


def step(name: str, options: dict[str, Any], level: str, x: dict[str, Tensor], **own: Any) -> Callable[[], list[Tensor]]:
    """A call that gives the loss and its gradients at hidden states and weight."""
    loss = getattr(fused_tdpo, f"Linear{name}" if level == "hidden" else name)(**options, **own)
    point = torch.tensor(0.1, device=x["labels"].device)
    more: dict[str, Any] = {"reference_point": point} if name in ("KTOLoss", "BCOLoss") else {}
    if name == "TIDPOLoss":
        more = {"token_weights": x["token_weights"]}
    tail = [x["labels"], x["desirable"]] if "reference_point" in more else [x["labels"]]

    def run() -> list[Tensor]:
        hidden, weight = (x[leaf].detach().requires_grad_() for leaf in ("hidden", "weight"))
        if level == "hidden":
            ref = [] if name in ("SimPOLoss", "CPOLoss", "ORPOLoss") else [x["ref_hidden"], x["ref_weight"]]
            out = loss(hidden, weight, *ref, *tail, valid_rows=list(LENGTHS), **more)
        else:
            ref = [] if name in ("SimPOLoss", "CPOLoss", "ORPOLoss") else [x["ref_hidden"] @ x["ref_weight"].T]
            logits = hidden @ weight.T
            if name == "TIDPOLoss":
                more["anchor"] = (logits[S // 2 :].flip(0), ref[0][S // 2 :].flip(0), x["labels"][S // 2 :].flip(0))
            out = loss(logits, *ref, *tail, **more)
        return [out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))]

    return run


HARDWARE = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]


@pytest.mark.parametrize("device", HARDWARE)
@pytest.mark.parametrize("level", ["logits", "hidden"])
@pytest.mark.parametrize("name", LOSSES)
def test_as_the_specification(name: str, level: str, device: str):
    """In float32 beside the specification in float64."""
    exact = step(name, LOSSES[name], level, inputs("cpu", torch.float64), backend="reference")()
    got = step(name, LOSSES[name], level, inputs(device, torch.float32))()
    for what, found, expected in zip(("loss", "hidden", "weight"), got, exact, strict=True):
        slack = torch.full_like(expected, 2e-5 * float(expected.abs().max()))
        assert_within_budget(what, found.cpu(), expected, expected, slack)
        assert expected.abs().max() > 1e-6, "the case must move something"


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["logits", "hidden"])
@pytest.mark.parametrize("name", LOSSES)
def test_no_synchronisation(name: str, level: str):
    run = step(name, LOSSES[name], level, inputs("cuda", torch.bfloat16))
    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
