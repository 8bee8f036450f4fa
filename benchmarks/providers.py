"""Who computes it: name -> provider. A provider gets (policy, ref, labels), logits (N, V) and labels (N,), and returns the
`TokenStats` that it can compute, each (N,); `logp` and `kl` carry gradients to `policy`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_tdpo import TokenStats, token_stats
from fused_tdpo.reference import token_stats_reference

Function = Callable[[Tensor, Tensor, Tensor], TokenStats]


class Unavailable(Exception):
    """Why a provider cannot run on this machine. Like ImportError it is shown, and is no failure."""


@dataclass(frozen=True)
class Provider:
    """One contender."""

    load: Callable[[], Function]
    """Imports and prepares; called once per case. Raises ImportError or Unavailable where it cannot run."""
    overwrites: bool = False
    """Leaves something else where the policy's logits were: they are restored before each call, outside the time."""
    lacks: str = ""
    """What it does not compute, in words."""


def official(policy: Tensor, ref: Tensor, labels: Tensor) -> TokenStats:
    """What the authors' code does between the logits and the sums: both in float32, log-softmax, softmax and its log."""
    policy, ref = policy.float(), ref.float()
    counted = labels != -100
    y = labels.where(counted, 0)[..., None]
    log_p = policy.log_softmax(-1)
    q = ref.softmax(-1)
    log_q = q.log()
    kl = (q * (log_q - log_p)).sum(-1)
    return TokenStats(
        logp=log_p.gather(-1, y).squeeze(-1) * counted, ref_logp=log_q.gather(-1, y).squeeze(-1) * counted, kl=kl * counted
    )


def _fused_inplace() -> Function:
    return lambda policy, ref, labels: token_stats(policy, ref, labels, inplace_backward=True)


def _compiled() -> Function:
    torch._dynamo.reset()  # after eight shapes of one function dynamo would fall back to eager, silently
    return torch.compile(token_stats_reference, fullgraph=True, dynamic=False)


def _liger() -> Function:
    # Its op nearest to ours that starts from logits and gives a value per token. It computes the gradient in its forward, over
    # the logits, and its backward scales that into a new tensor.
    from liger_kernel.transformers.functional import liger_cross_entropy

    if not torch.cuda.is_available():
        raise Unavailable("needs a GPU")
    return lambda policy, ref, labels: TokenStats(logp=-liger_cross_entropy(policy, labels, reduction="none"))


PROVIDERS = {
    "fused": Provider(lambda: token_stats),
    "fused_inplace": Provider(_fused_inplace, overwrites=True),
    "compiled": Provider(_compiled),
    "eager": Provider(lambda: token_stats_reference),
    "official": Provider(lambda: official),
    "liger": Provider(_liger, overwrites=True, lacks="the reference: neither ref_logp nor kl"),
}
"""Each fused option, torch.compile of the specification, the specification, the authors' form, and rivals. `copy` is no
provider: it is the floor, measured beside them."""
