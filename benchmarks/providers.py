"""Who computes it: name -> provider.

At the logits level it gets (policy, ref, labels), logits (N, V) and labels (N,), and returns the `TokenStats` that it can
compute, each (N,); `logp` and `kl` carry gradients to `policy`. At the hidden level it is a `Loss` of fused_tdpo.cli._rivals,
of what `Provider.computes` says. Where accuracy is measured it gets (x, head, z, ref_head, labels), hidden states (N, D) and
heads (V, D), and returns `TokenStats`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_tdpo import LMHead, TokenStats, linear_token_stats, token_stats
from fused_tdpo.cli._rivals import ALPHA, Loss, liger_dpo, naive_all, naive_valid, official, on_valid_rows, shifted, trl, trl_kl
from fused_tdpo.cli._rivals import tdpo2 as tdpo2
from fused_tdpo.reference import token_stats_reference

Function = Callable[[Tensor, Tensor, Tensor], TokenStats]
RowFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], TokenStats]


class Unavailable(Exception):
    """Why a provider cannot run on this machine. Like ImportError it is shown, and is no failure."""


@dataclass(frozen=True)
class Provider:
    """One contender."""

    load: Callable[[], Function | Loss | RowFunction]
    """Imports and prepares; called once per case. Raises ImportError or Unavailable where it cannot run."""
    overwrites: bool = False
    """Leaves something else where the policy's logits were: they are restored before each call, outside the time."""
    computes: Literal["tdpo2", "dpo", "kl", "simpo", "kto"] = "tdpo2"
    """Its loss, at the hidden level: TDPO2, DPO (which is TDPO2 with alpha = 0), the mean KL of the rows that count, SimPO, or
    KTO with the chosen sequences desirable; numbers are in `SIMPO` and `KAPPA`."""
    products: float = 1.0
    """The share of the products of `bare` that its loss needs, with a trained head."""
    holds: Literal["", "valid", "all"] = ""
    """The rows whose logits it holds all at once, at the hidden level."""


# --------------------------------------------------------------------------------------------------------------- from logits


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
    "liger": Provider(_liger, overwrites=True),
}
"""Each fused option, torch.compile of the specification, the specification, the authors' form, and rivals. `copy` is no
provider: it is the floor, measured beside them."""


# -------------------------------------------------------------------------------------------------------- from hidden states


CPU_CHUNK_BYTES = 64 * 2**20
"""What ours may spend on logits on a CPU; on a GPU it is left to them."""


def _ours(name: str, arguments: Callable[..., tuple] = lambda *inputs: inputs, **options: object) -> Callable[[], Loss]:
    """`arguments`: of the five inputs of a `Loss`, what the loss is called with."""

    def load() -> Loss:
        import fused_tdpo

        if not hasattr(fused_tdpo, name):
            raise Unavailable(f"this version has no {name}")

        lengths: list[int] = []  # known to a collator, from which a trainer has them

        def loss(beta: float, policy_hidden: Tensor, *others: Tensor) -> Tensor:
            budget = None if policy_hidden.is_cuda else CPU_CHUNK_BYTES
            if not lengths:
                lengths.extend((shifted(others[-1]) != -100).sum(-1).tolist())
            loss = getattr(fused_tdpo, name)(**{"beta": beta} | options, max_chunk_bytes=budget)
            point = {"reference_point": KAPPA} if "KTO" in name else {}
            return loss(*arguments(policy_hidden, *others), valid_rows=lengths, **point).loss

        return loss

    return load


def _ours_kl() -> Loss:
    def loss(beta: float, x: Tensor, head: Tensor, z: Tensor, ref_head: Tensor, labels: Tensor) -> Tensor:
        budget, labels = None if x.is_cuda else CPU_CHUNK_BYTES, shifted(labels)
        return linear_token_stats(x, head, z, ref_head, labels, max_chunk_bytes=budget).kl.sum() / (labels != -100).sum()

    return loss


def project(head: Tensor | LMHead, hidden: Tensor) -> Tensor:
    """Logits, soft-capped where the head says so."""
    return head.logits(hidden) if isinstance(head, LMHead) else F.linear(hidden, head)


def _compiled_hidden() -> Loss:
    function = _compiled()
    return on_valid_rows(lambda x, head, z, ref_head, y: function(project(head, x), project(ref_head, z), y))


def _cce_rows() -> RowFunction:
    from cut_cross_entropy import linear_cross_entropy

    def stats_of(x: Tensor, head: Tensor, z: Tensor, ref_head: Tensor, y: Tensor) -> TokenStats:
        options = {"reduction": "none", "impl": "cce" if x.is_cuda else "torch_compile"}
        logp, ref_logp = (-linear_cross_entropy(h, w, y, **options).float() for h, w in ((x, head), (z, ref_head.detach())))
        return TokenStats(logp, ref_logp)

    return stats_of


def _cce() -> Loss:
    stats_of = _cce_rows()

    def with_no_kl(*inputs: Tensor) -> TokenStats:  # TDPO2 of which is DPO
        stats = stats_of(*inputs)
        return stats._replace(kl=torch.zeros_like(stats.logp))

    return on_valid_rows(with_no_kl)


def _fla() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    from fla.modules.fused_kl_div import fused_kl_div_loss  # of any rows: it knows no labels

    if not torch.cuda.is_available():
        raise Unavailable("needs a GPU")
    return lambda x, head, z, ref_head: fused_kl_div_loss(x, z, head, ref_head.detach())


def _fla_kl() -> Loss:
    function = _fla()

    def loss(beta: float, x: Tensor, head: Tensor, z: Tensor, ref_head: Tensor, labels: Tensor) -> Tensor:
        counted = shifted(labels) != -100
        return function(x[counted], head, z[counted], ref_head)

    return loss


SIMPO = {"beta": 2.0, "gamma": 0.5}
KAPPA = 0.1


def desirable(labels: Tensor) -> Tensor:
    """(S,): the chosen sequences."""
    return torch.arange(len(labels), device=labels.device) < len(labels) // 2


def _liger_simpo() -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    def loss(beta: float, x: Tensor, head: Tensor, z: Tensor, ref_head: Tensor, labels: Tensor) -> Tensor:
        simpo = LigerFusedLinearSimPOLoss(**SIMPO, compute_nll_loss=False, compiled=x.is_cuda)
        return simpo(head, x, shifted(labels))[0]

    return loss


def _liger_kto() -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    def loss(beta: float, x: Tensor, head: Tensor, z: Tensor, ref_head: Tensor, labels: Tensor) -> Tensor:
        kto = LigerFusedLinearKTOLoss(beta=beta, compiled=x.is_cuda, use_ref_model=True)
        ref = {"ref_input": z, "ref_weight": ref_head.detach()}
        kappa = torch.full((), KAPPA, device=x.device)
        return kto(x, head, shifted(labels), preference_labels=desirable(labels), kl=kappa, **ref)[0]

    return loss


HIDDEN_PROVIDERS = {
    "ours": Provider(_ours("LinearTDPOLoss", alpha=ALPHA, engine="one_pass")),
    "ours_recompute": Provider(_ours("LinearTDPOLoss", alpha=ALPHA, engine="recompute")),
    "compiled": Provider(_compiled_hidden),
    "naive_valid": Provider(lambda: naive_valid, holds="valid"),
    "naive_all": Provider(lambda: naive_all, holds="all"),
    "trl": Provider(trl),
    "ours_dpo": Provider(_ours("LinearDPOLoss", engine="one_pass"), computes="dpo"),
    "liger": Provider(liger_dpo, computes="dpo", holds="all"),
    "cce": Provider(_cce, computes="dpo"),
    "ours_kl": Provider(_ours_kl, computes="kl"),
    "fla": Provider(_fla_kl, computes="kl"),
    "ours_simpo": Provider(
        _ours("LinearSimPOLoss", lambda x, head, z, ref_head, y: (x, head, y), **SIMPO), computes="simpo", products=0.75
    ),
    "liger_simpo": Provider(_liger_simpo, computes="simpo", products=0.75, holds="all"),
    "ours_kto": Provider(_ours("LinearKTOLoss", lambda *inputs: (*inputs, desirable(inputs[-1]))), computes="kto"),
    "liger_kto": Provider(_liger_kto, computes="kto", holds="all"),
}
"""TDPO2 by ours, in one pass and recomputing; by PyTorch on the rows that count, compiled or not, and on all; by a rival. Then
DPO, the KL alone, SimPO and KTO. Here `bare` is the floor, but for SimPO, which makes three of its four products."""


# ------------------------------------------------------------------------------------------------------------ how exact


def _from_logits(name: str) -> Provider:
    def load() -> RowFunction:
        function = PROVIDERS[name].load()
        return lambda x, head, z, ref_head, y: function(F.linear(x, head), F.linear(z, ref_head), y)

    return Provider(cache(load))  # compiles once, not for every problem


def _fla_rows() -> RowFunction:
    function = _fla()

    def kl(x: Tensor, head: Tensor, z: Tensor, ref_head: Tensor) -> Tensor:  # its mean over one row is that row's
        return torch.stack([function(a[None], head, b[None], ref_head) for a, b in zip(x, z, strict=True)])

    return _counted_kl(kl)


def _counted_kl(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> RowFunction:
    """The KL of those rows alone whose label counts, as its trainer calls it."""

    def stats_of(x: Tensor, head: Tensor, z: Tensor, ref_head: Tensor, y: Tensor) -> TokenStats:
        counted = y != -100
        kl = x.new_zeros(len(x)).masked_scatter(counted, function(x[counted], head, z[counted], ref_head))
        return TokenStats(logp=None, kl=kl)

    return stats_of


ROW_PROVIDERS = {
    "ours": Provider(lambda: linear_token_stats),
    **{name: _from_logits(name) for name in ("fused", "compiled", "eager", "official", "liger")},
    "trl": Provider(lambda: _counted_kl(trl_kl())),
    "cce": Provider(_cce_rows),
    "fla": Provider(_fla_rows),
}
"""Who is asked how exact it is; `ours` from hidden states, `fused` from logits."""
