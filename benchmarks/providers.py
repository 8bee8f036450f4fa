"""Who computes it: name -> provider.

At the logits level it gets (policy, ref, labels), logits (N, V) and labels (N,), and returns the `TokenStats` that it can
compute, each (N,); `logp` and `kl` carry gradients to `policy`. At the hidden level it gets (beta, policy_hidden, policy_head,
ref_hidden, ref_head, labels), hidden states (S, T, D), heads (V, D) and unshifted labels (S, T), chosen sequences first. It
returns the loss of TDPO2; or of DPO, which is TDPO2 with alpha = 0, where it lacks the KL.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_tdpo import TokenStats, token_stats
from fused_tdpo.reference import token_stats_reference

Function = Callable[[Tensor, Tensor, Tensor], TokenStats]
Loss = Callable[[float, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

ALPHA = 0.5


class Unavailable(Exception):
    """Why a provider cannot run on this machine. Like ImportError it is shown, and is no failure."""


@dataclass(frozen=True)
class Provider:
    """One contender."""

    load: Callable[[], Function | Loss]
    """Imports and prepares; called once per case. Raises ImportError or Unavailable where it cannot run."""
    overwrites: bool = False
    """Leaves something else where the policy's logits were: they are restored before each call, outside the time."""
    lacks: str = ""
    """What it does not compute, in words."""
    holds: Literal["", "valid", "all"] = ""
    """The rows whose logits it holds all at once, at the hidden level."""


# --------------------------------------------------------------------------------------------------------------- from logits


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


# -------------------------------------------------------------------------------------------------------- from hidden states


def tdpo2(stats: TokenStats, beta: float, alpha: float = ALPHA) -> Tensor:
    """The loss of TDPO2 from statistics (S, T), chosen sequences first (arXiv 2404.11999, eq. 17)."""
    chosen_ratio, rejected_ratio = (stats.logp - stats.ref_logp).sum(-1).chunk(2)
    chosen_kl, rejected_kl = stats.kl.sum(-1).chunk(2)
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio - alpha * (rejected_kl - chosen_kl.detach()))).mean()


def shifted(labels: Tensor) -> Tensor:
    """(S, T): the label that each position predicts; none at the last one."""
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def spread(stats: TokenStats, counted: Tensor) -> TokenStats:
    """Statistics of the rows that count as (S, T), 0 elsewhere."""
    zero = stats.logp.new_zeros(counted.shape)
    return TokenStats(*(zero.masked_scatter(counted, stat) for stat in (stats.logp, stats.ref_logp, stats.kl)))


def naive_all(
    beta: float, policy_hidden: Tensor, policy_head: Tensor, ref_hidden: Tensor, ref_head: Tensor, labels: Tensor
) -> Tensor:
    """As the authors write it: logits of every position, prompt and padding too."""
    policy_logits, ref_logits = F.linear(policy_hidden, policy_head), F.linear(ref_hidden, ref_head)
    return tdpo2(official(policy_logits[:, :-1], ref_logits[:, :-1], labels[:, 1:]), beta)


def _on_valid_rows(stats_of: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], TokenStats]) -> Loss:
    """TDPO2 from statistics of those rows alone whose label counts."""

    def loss(
        beta: float, policy_hidden: Tensor, policy_head: Tensor, ref_hidden: Tensor, ref_head: Tensor, labels: Tensor
    ) -> Tensor:
        labels = shifted(labels)
        counted = labels != -100
        stats = stats_of(policy_hidden[counted], policy_head, ref_hidden[counted], ref_head, labels[counted])
        return tdpo2(spread(stats, counted), beta)

    return loss


def _naive_valid() -> Loss:
    return _on_valid_rows(lambda x, head, z, ref_head, y: official(F.linear(x, head), F.linear(z, ref_head), y))


def _trl() -> Loss:
    # Its log-prob of either model, and its divergence between both: three calls. In its DPO trainer rows that do not count are
    # left out where it uses Triton, so they are left out here everywhere.
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    def stats_of(x: Tensor, head: Tensor, z: Tensor, ref_head: Tensor, y: Tensor) -> TokenStats:
        logp, ref_logp = (
            ChunkedLogProbFunction.apply(hidden, weight, None, y, 1.0, CHUNK, None, 1.0, ())[0]
            for hidden, weight in ((x, head), (z, ref_head.detach()))
        )
        kl = ChunkedDivergenceFunction.apply(x, head, None, z, ref_head.detach(), None, 0.0)[0]
        return TokenStats(logp, ref_logp, kl)

    return _on_valid_rows(stats_of)


def _liger_dpo() -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    def loss(
        beta: float, policy_hidden: Tensor, policy_head: Tensor, ref_hidden: Tensor, ref_head: Tensor, labels: Tensor
    ) -> Tensor:
        module = LigerFusedLinearDPOLoss(beta=beta, compiled=policy_hidden.is_cuda)
        return module(policy_head, policy_hidden, shifted(labels), ref_input=ref_hidden, ref_weight=ref_head.detach())[0]

    return loss


CPU_CHUNK_BYTES = 64 * 2**20
"""What ours may spend on logits on a CPU; on a GPU it is left to them."""


def _ours(name: str, **options: object) -> Callable[[], Loss]:
    def load() -> Loss:
        import fused_tdpo

        if not hasattr(fused_tdpo, name):
            raise Unavailable(f"this version has no {name}")

        lengths: list[int] = []  # known to a collator, from which a trainer has them

        def loss(beta: float, policy_hidden: Tensor, *others: Tensor) -> Tensor:
            budget = None if policy_hidden.is_cuda else CPU_CHUNK_BYTES
            if not lengths:
                lengths.extend((shifted(others[-1]) != -100).sum(-1).tolist())
            loss = getattr(fused_tdpo, name)(beta=beta, max_chunk_bytes=budget, **options)
            return loss(policy_hidden, *others, valid_rows=lengths).loss

        return loss

    return load


HIDDEN_PROVIDERS = {
    "ours": Provider(_ours("LinearTDPOLoss", alpha=ALPHA, engine="one_pass")),
    "ours_recompute": Provider(_ours("LinearTDPOLoss", alpha=ALPHA, engine="recompute")),
    "ours_dpo": Provider(_ours("LinearDPOLoss", engine="one_pass"), lacks="the KL"),
    "naive_valid": Provider(_naive_valid, holds="valid"),
    "naive_all": Provider(lambda: naive_all, holds="all"),
    "trl": Provider(_trl),
    "liger": Provider(_liger_dpo, lacks="the KL", holds="all"),
}
"""Ours: one pass, recomputing, and DPO; PyTorch on the rows that count, and on all; rivals. Here `bare` is the floor."""
