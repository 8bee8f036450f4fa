"""The named results of the package. Letters: P pairs, S = 2P sequences, N token rows, V vocabulary (docs/math.md)."""

from typing import NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """Per-token statistics of a policy and a reference distribution.

    Every field has the shape of ``labels`` and is float32 (float64 for float64 logits), or is ``None`` where it was not
    asked for or needs an absent reference. Ignored rows hold exactly 0. ``logp`` and ``kl`` carry gradients to the policy;
    nothing else carries any.
    """

    logp: Tensor
    """log p(label): the policy's log-probability of the label, in nats."""
    ref_logp: Tensor | None = None
    """log q(label): the reference's log-probability of the label, in nats."""
    kl: Tensor | None = None
    """The chosen divergence over the whole vocabulary, in nats; KL(q || p) by default."""
    entropy: Tensor | None = None
    """H(p), the policy's entropy, in nats. In ``extras`` as ``"entropy"``."""
    ref_entropy: Tensor | None = None
    """H(q), the reference's entropy, in nats. In ``extras`` as ``"ref_entropy"``."""
    accuracy: Tensor | None = None
    """1.0 where the label is the arg-max of the policy (the first one, on a tie), else 0.0. In ``extras`` as ``"accuracy"``."""
    mean_logit: Tensor | None = None
    """Mean of the policy's logits over the vocabulary, before temperature. In ``extras`` as ``"mean_logit"``."""
    log_sum_sq_probs: Tensor | None = None
    """log of the sum of squared policy probabilities. In ``extras`` as ``"log_sum_sq_probs"``."""


EXTRAS = ("entropy", "ref_entropy", "accuracy", "mean_logit", "log_sum_sq_probs")
"""What ``extras`` may name: the fields of :class:`TokenStats` that are computed only on request."""

REF_EXTRAS = ("ref_entropy",)
"""The extras that need a reference."""


DIVERGENCES = ("forward_kl", "reverse_kl", "js", "alpha")
"""What ``kl`` may hold."""


class Divergence(NamedTuple):
    """A divergence as kernels know it: ``alpha`` is neither 0 nor 1, whose limits have names, and 0 where there is none."""

    name: str = "forward_kl"
    alpha: float = 0.0

    @property
    def saved(self) -> int:
        """Numbers of a row that backward needs: maximum and sum of exponentials of both models; for all but KL(q || p), whose
        gradient is p - q, also what log p/q is counted from, and the mean that its gradient subtracts."""
        return 4 if self.name == "forward_kl" else 6


FORWARD_KL = Divergence()
"""TDPO's."""


class Engine(NamedTuple):
    """How a loss was computed from hidden states."""

    name: str
    """`"one_pass"` or `"recompute"`."""
    reason: str
    """Why that one, in words."""


class PreferenceOutput(NamedTuple):
    """What a preference loss returns. Only ``loss`` is differentiable; everything else is detached.

    P pairs. A field is ``None`` where the quantity does not exist (no KL without reference logits).
    """

    loss: Tensor
    """() the value to call ``backward()`` on."""
    losses: Tensor
    """(P,) loss of each pair; of "aot" and "aot_unpaired", which sort, of each rank."""
    chosen_rewards: Tensor
    """(P,) implicit reward of the chosen sequence."""
    rejected_rewards: Tensor
    """(P,) implicit reward of the rejected sequence."""
    chosen_logps: Tensor
    """(P,) policy log-probability of the chosen sequence, in nats: summed over its tokens, or averaged as the loss was told."""
    rejected_logps: Tensor
    """(P,) the same of the rejected sequence."""
    chosen_kl: Tensor | None
    """(P,) sequential KL of the chosen sequence: the sum over its tokens of KL(ref || policy), in nats."""
    rejected_kl: Tensor | None
    """(P,) the same of the rejected sequence."""
    metrics: dict[str, Tensor]
    """0-dim tensors under the names that TRL and the TDPO authors log: means over pairs, and those of a loss's `extras` over
    tokens. Reading them is what synchronises, not making them."""
    engine: Engine | None = None
    """Of a loss from hidden states; None from logits."""


class UnpairedOutput(NamedTuple):
    """What a loss of single sequences returns. Only ``loss`` is differentiable; everything else is detached.

    S sequences. A field is ``None`` where the quantity does not exist (no KL without reference logits).
    """

    loss: Tensor
    """() the value to call ``backward()`` on."""
    losses: Tensor
    """(S,) loss of each sequence."""
    rewards: Tensor
    """(S,) implicit reward of each sequence."""
    logps: Tensor
    """(S,) policy log-probability of each sequence, in nats, summed over its tokens."""
    kl: Tensor | None
    """(S,) sequential KL of each sequence, as in `PreferenceOutput`."""
    metrics: dict[str, Tensor]
    """0-dim tensors under the names that TRL logs: means over the desirable sequences ("chosen") and over the others
    ("rejected"), 0 where there are none; the reference point, as "kl" or "delta"; means of a loss's `extras` over tokens."""
    engine: Engine | None = None
    """Of a loss from hidden states; None from logits."""
