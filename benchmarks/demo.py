"""TDPO at a real vocabulary size: the usual way against the fused op, on the same logits.

    make demo                                        on the GPU if there is one, else on the CPU in pure PyTorch
    make demo ARGS="--tokens 2048 --vocab 128256"

The logits are products of hidden states and a head, as a model's are; part of each sequence is a prompt, whose labels are
masked. Times are the best of a few repetitions. Memory is the peak over the logits of both models: see measure.py.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_tdpo import TDPOLoss, token_stats
from measure import Clock, peak_bytes
from providers import ALPHA, official, shifted, tdpo2
from report import Table, as_bytes, digits, status

BETA = 0.1
HIDDEN = 16


def naive_tdpo2(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    """TDPO2 as its authors write it: shift, `official`, sum over each sequence (arXiv 2404.11999, eq. 17)."""
    return tdpo2(official(policy_logits[:, :-1], ref_logits[:, :-1], labels[:, 1:]), BETA)


class Batch:
    """Two pairs of sequences, the first third of each a prompt, and what makes their logits."""

    def __init__(self, tokens: int, vocab: int, device: torch.device) -> None:
        S, T = 4, max(2, tokens // 4)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        head = normal(vocab, HIDDEN) * 3 / HIDDEN**0.5
        hidden = normal(S, T, HIDDEN)
        self.head = head.bfloat16()
        self.hidden = (hidden + 0.1 * normal(S, T, HIDDEN)).bfloat16().requires_grad_()
        self.ref_logits = F.linear(hidden.bfloat16(), self.head)
        self.labels = torch.randint(vocab, (S, T), generator=generator, device=device)
        self.labels[:, : T // 3] = -100

    def policy_logits(self) -> Tensor:
        """The same numbers at every call, in a tensor that is no leaf: its gradient may be written over it."""
        return F.linear(self.hidden, self.head)


class Result:
    """What one way of computing the loss gives: numbers, the best times, memory."""

    def __init__(self, loss_of: Callable[..., Tensor], batch: Batch, repetitions: int) -> None:
        clock, best = Clock(batch.ref_logits.device), [float("inf")] * 2
        for _ in range(repetitions + 1):  # the first one warms up
            logits = batch.policy_logits()
            forward, loss = clock(lambda logits=logits: loss_of(logits, batch.ref_logits, batch.labels))
            backward, (gradient,) = clock(lambda logits=logits, loss=loss: torch.autograd.grad(loss, logits))
            best = [min(pair) for pair in zip(best, (forward, backward), strict=True)]
        self.loss, self.gradient = loss.item(), gradient.clone()
        self.forward_ms, self.backward_ms = best
        del loss, gradient

        again, losses = batch.policy_logits(), []
        self.forward_peak, self.backward_peak = peak_bytes(
            again.device,
            lambda: losses.append(loss_of(again, batch.ref_logits, batch.labels)),
            lambda: torch.autograd.grad(losses.pop(), again),
        )

    @property
    def peak(self) -> int:
        return max(self.forward_peak, self.backward_peak)


def relative(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖."""
    return float((got - expected).norm() / expected.norm())


def difference(got: Tensor, expected: Tensor) -> str:
    """The largest absolute difference and the relative one."""
    got, expected = got.float(), expected.float()
    return f"{float((got - expected).abs().max()):.0e} ({relative(got, expected):.0e})"


def compare(batch: Batch, repetitions: int) -> tuple[Table, str]:
    """The table of the three ways, and one sentence about it. ValueError: they do not agree."""
    losses = {
        "naive": naive_tdpo2,
        "fused": lambda *inputs: TDPOLoss(beta=BETA, alpha=ALPHA)(*inputs).loss,
        "fused, in place": lambda *inputs: TDPOLoss(beta=BETA, alpha=ALPHA, inplace_backward=True)(*inputs).loss,
    }
    results = {}
    with status("per-token statistics") as say:
        with torch.no_grad():
            logits, labels = batch.policy_logits(), shifted(batch.labels)
            expected, got = official(logits, batch.ref_logits, labels), token_stats(logits, batch.ref_logits, labels)
            per_token = [difference(getattr(got, name), getattr(expected, name)) for name in ("logp", "kl")]
            del logits, expected, got
        for name, loss_of in losses.items():
            say(f"{name}: forward and backward, {repetitions + 1} times")
            results[name] = Result(loss_of, batch, repetitions)

    naive, fused, in_place = results.values()
    for name, result in results.items():
        if not (abs(result.loss - naive.loss) < 1e-4 and relative(result.gradient.float(), naive.gradient.float()) < 1e-2):
            raise ValueError(f"{name} differs from naive: loss {result.loss} and {naive.loss}, or the gradient")
    same = [difference(torch.tensor(r.loss), torch.tensor(naive.loss)) for r in (fused, in_place)]
    gradients = [difference(r.gradient, naive.gradient) for r in (fused, in_place)]
    rows = [
        ("loss", *(f"{r.loss:.7f}" for r in results.values())),
        ("  difference from naive", "", *same),
        ("  of log p(label), per token", "", *[per_token[0]] * 2),
        ("  of KL, per token", "", *[per_token[1]] * 2),
        ("  of the logits' gradient", "", *gradients),
        ("forward, ms", *(digits(r.forward_ms) for r in results.values())),
        ("backward, ms", *(digits(r.backward_ms) for r in results.values())),
        ("forward, peak memory", *(as_bytes(r.forward_peak) for r in results.values())),
        ("backward, peak memory", *(as_bytes(r.backward_peak) for r in results.values())),
    ]
    times = [r.forward_ms + r.backward_ms for r in (naive, fused)]
    verdict = (
        f"Same loss and gradient: fused needs {naive.peak / fused.peak:.1f} times less memory than naive "
        f"({naive.peak / in_place.peak:.1f} times less in place), at {times[0] / times[1]:.1f} times its speed"
        + ("." if batch.labels.is_cuda else "; the kernels, which are about speed, need a GPU.")
    )
    return Table(("", *results), rows), verdict


def accuracy(vocab: int, device: torch.device) -> Table:
    """The KL of nearly equal models: Σ q (log q − log p) by log-softmaxes; lse(x) − lse(z) − E_q[x − z]; `token_stats`."""
    generator = torch.Generator(device).manual_seed(0)
    table = Table(("true KL", "log-softmax", "lse identity", "fused"))
    for distance in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.4):
        z = 3 * torch.randn(1, vocab, generator=generator, device=device)
        x = z + distance * torch.randn(1, vocab, generator=generator, device=device)
        label = torch.zeros(1, dtype=torch.long, device=device)
        q = z.softmax(-1)
        ways = (
            (q * (z.log_softmax(-1) - x.log_softmax(-1))).sum(-1),
            x.logsumexp(-1) - z.logsumexp(-1) - (q * (x - z)).sum(-1),
            token_stats(x, z, label).kl,
        )
        r = x.double().log_softmax(-1) - z.double().log_softmax(-1)
        truth = (z.double().softmax(-1) * (r.expm1() - r)).sum().item()  # Σ q (e^r − 1 − r): nothing cancels
        table.rows.append((f"{truth:.2e}", *(f"{kl.item():.2e} ({abs(kl.item() / truth - 1):.0e})" for kl in ways)))
    return table


def main(arguments: list[str] | None = None) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="default: 192 on a CPU; 8,192 on a GPU, or what fits")
    parser.add_argument("--vocab", type=int, default=151_936, help="default: %(default)s, that of Qwen 3")
    parser.add_argument("--repetitions", type=int, default=2)
    args = parser.parse_args(arguments)
    tokens = args.tokens or 192
    if device.type == "cuda" and not args.tokens:
        naive_bytes_per_token = 12 * 4 * args.vocab
        tokens = min(8192, torch.cuda.mem_get_info()[0] // naive_bytes_per_token)

    started = time.monotonic()
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}, backend 'torch'"
    )
    print(f"TDPO2 on {tokens:,} tokens (a third of them a prompt), V = {args.vocab:,}, bf16 logits; {name}")
    table, verdict = compare(Batch(tokens, args.vocab, device), args.repetitions)
    table.show("Differences: the largest (relative ‖·‖). Memory: over the logits of both models")
    print(verdict)
    accuracy(args.vocab, device).show("KL of nearly equal models from float32 logits (relative error)")
    print(f"{time.monotonic() - started:.0f} seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
