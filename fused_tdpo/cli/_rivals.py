"""A preference loss from hidden states, as others compute it: what the command line and benchmarks/ compare with.

Each is called as loss(beta, policy_hidden, policy_head, ref_hidden, ref_head, labels): hidden states (S, T, D), heads (V, D),
unshifted labels (S, T); chosen sequences first. It returns the loss of TDPO2 with alpha = ALPHA; Liger's, which lacks the KL,
that of DPO.
"""

from collections.abc import Callable
from importlib import import_module

import torch.nn.functional as F
from torch import Tensor

from fused_tdpo.types import TokenStats

Loss = Callable[[float, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

ALPHA = 0.5


def official(policy: Tensor, ref: Tensor, labels: Tensor) -> TokenStats:
    """What the authors' code does between logits (..., V) and sums: both in float32, log-softmax, softmax and its log."""
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


def tdpo2(stats: TokenStats, beta: float, alpha: float = ALPHA) -> Tensor:
    """The loss of TDPO2 from logp, ref_logp and kl (S, T), chosen sequences first (arXiv 2404.11999, eq. 17)."""
    logp, ref_logp, kl = (stat for stat in stats[:3] if stat is not None)
    chosen_ratio, rejected_ratio = (logp - ref_logp).sum(-1).chunk(2)
    chosen_kl, rejected_kl = kl.sum(-1).chunk(2)
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio - alpha * (rejected_kl - chosen_kl.detach()))).mean()


def shifted(labels: Tensor) -> Tensor:
    """(S, T): the label that each position predicts; none at the last one."""
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def spread(stats: TokenStats, counted: Tensor) -> TokenStats:
    """logp, ref_logp and kl of the rows that count as (S, T), 0 elsewhere."""
    zero = stats.logp.new_zeros(counted.shape)
    return TokenStats(*(zero.masked_scatter(counted, stat) for stat in stats[:3] if stat is not None))


def naive_all(
    beta: float, policy_hidden: Tensor, policy_head: Tensor, ref_hidden: Tensor, ref_head: Tensor, labels: Tensor
) -> Tensor:
    """As the authors write it: logits of every position, prompt and padding too."""
    policy_logits, ref_logits = F.linear(policy_hidden, policy_head), F.linear(ref_hidden, ref_head)
    return tdpo2(official(policy_logits[:, :-1], ref_logits[:, :-1], labels[:, 1:]), beta)


def on_valid_rows(stats_of: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], TokenStats]) -> Loss:
    """TDPO2 from statistics of those rows alone whose label counts."""

    def loss(
        beta: float, policy_hidden: Tensor, policy_head: Tensor, ref_hidden: Tensor, ref_head: Tensor, labels: Tensor
    ) -> Tensor:
        labels = shifted(labels)
        counted = labels != -100
        stats = stats_of(policy_hidden[counted], policy_head, ref_hidden[counted], ref_head, labels[counted])
        return tdpo2(spread(stats, counted), beta)

    return loss


naive_valid = on_valid_rows(lambda x, head, z, ref_head, y: official(F.linear(x, head), F.linear(z, ref_head), y))


def trl_kl() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """TRL's KL(reference || policy) of rows: (x, head, z, ref_head), (N, D) and (V, D) of either model -> (N,).

    Raises:
        ImportError: no trl, or a version without `trl.kernels`.
    """
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return lambda x, head, z, ref_head: ChunkedDivergenceFunction.apply(x, head, None, z, ref_head.detach(), None, 0.0)[0]


def trl() -> Loss:
    """Composed of TRL's kernels: its log-prob of either model, and its divergence between both. In its DPO trainer rows that do
    not count are left out where it uses Triton, so they are left out here everywhere.

    Raises:
        ImportError: no trl, or a version without `trl.kernels`.
    """
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    kl = trl_kl()

    def stats_of(x: Tensor, head: Tensor, z: Tensor, ref_head: Tensor, y: Tensor) -> TokenStats:
        logp, ref_logp = (
            ChunkedLogProbFunction.apply(hidden, weight, None, y, 1.0, CHUNK, None, 1.0, ())[0]
            for hidden, weight in ((x, head), (z, ref_head.detach()))
        )
        return TokenStats(logp, ref_logp, kl(x, head, z, ref_head))

    return on_valid_rows(stats_of)


def liger_dpo() -> Loss:
    """Liger's fused linear DPO, which has no KL.

    Raises:
        ImportError: no liger-kernel.
    """
    module = import_module("liger_kernel.chunked_loss")  # by name: it is no dependency, not even of the tests

    def loss(
        beta: float, policy_hidden: Tensor, policy_head: Tensor, ref_hidden: Tensor, ref_head: Tensor, labels: Tensor
    ) -> Tensor:
        dpo = module.LigerFusedLinearDPOLoss(beta=beta, compiled=policy_hidden.is_cuda)
        return dpo(policy_head, policy_hidden, shifted(labels), ref_input=ref_hidden, ref_weight=ref_head.detach())[0]

    return loss
