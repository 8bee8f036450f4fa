"""Whether the losses are right on the device that is here, and how fast: the command `fused-tdpo check`.

Right is what the specification (`fused_tdpo.reference`) says one precision up, float64 for float32 logits, on the same inputs.
A result may be twice as wrong as the specification is in the dtype of the inputs, plus a little; a tiny KL, where that is wrong
altogether, by 1e-4; ignored rows and the KL of equal logits not at all.
"""

import platform
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import fused_tdpo
from fused_tdpo._backends import choose_backend
from fused_tdpo.cli._console import parse_device, refuse, show, table
from fused_tdpo.cli._measure import as_bytes, as_time, digits, peak_bytes, wall_clock
from fused_tdpo.cli._rivals import Loss, naive_valid
from fused_tdpo.cli.plan import WAYS, Workload, dtype_name, refuse_absent
from fused_tdpo.heads import LMHead, backbone, call
from fused_tdpo.linear_losses import LinearTDPOLoss
from fused_tdpo.losses import TDPOLoss
from fused_tdpo.ops import token_stats
from fused_tdpo.reference import token_stats_reference
from fused_tdpo.types import TokenStats

SLACK = 1e-5
"""Relative error beyond twice the naive one: a sum over the vocabulary in another order."""

TINY_KL_SLACK = 1e-4
"""Relative error of a KL near 1e-9, as docs/numerics.md promises."""

WIDER = {torch.float32: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}


@dataclass(frozen=True)
class Finding:
    """How far a result is from what it must be."""

    what: str
    error: float
    """Relative, of the worst row; NaN fails."""
    budget: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.budget


def row_error(got: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """The largest ‖got − truth‖ / (floor + ‖truth‖) of rows, (N, ...); NaN where either holds one."""
    got, truth = (t.detach().double().reshape(len(t), -1) for t in (got, truth))
    size = floor + truth.norm(dim=1)
    return float(((got - truth).norm(dim=1) / size.clamp(min=torch.finfo(torch.float64).tiny)).amax())


def beside_naive(what: str, got: Tensor, naive: Tensor, truth: Tensor, floor: float = 0.0, slack: float = SLACK) -> Finding:
    """With the budget that the naive result allows."""
    return Finding(what, row_error(got, truth, floor), 2 * row_error(naive, truth, floor) + slack)


# --------------------------------------------------------------------------------------------------------------- from logits


class Problem(NamedTuple):
    """Logits (N, V) of policy and reference, labels (N,), and upstream gradients (N,) of logp and kl."""

    policy: Tensor
    ref: Tensor
    labels: Tensor
    upstream: tuple[Tensor, Tensor]

    def solve(self, function: Callable[..., TokenStats], dtype: torch.dtype) -> dict[str, Tensor]:
        """logp, ref_logp, kl, and the gradient of the policy's logits, which are given to the function in `dtype`."""
        policy = self.policy.detach().to(dtype).requires_grad_()
        stats = function(policy, self.ref.to(dtype), self.labels)
        outputs = [stat for stat in (stats.logp, stats.kl) if stat is not None]
        upstream = [g.to(out.dtype) for g, out in zip(self.upstream, outputs, strict=True)]
        (gradient,) = torch.autograd.grad(outputs, policy, upstream)
        found = {"logp": stats.logp, "ref_logp": stats.ref_logp, "kl": stats.kl, "gradient": gradient}
        return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


def problem(N: int, V: int, dtype: torch.dtype, device: torch.device, size: float, distance: float) -> Problem:
    """Normal logits with a standard deviation of `size`, those of the policy `distance` away from the reference's."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    ref = (size * draw(N, V)).to(dtype)
    policy = (ref.float() + distance * draw(N, V)).to(dtype)
    labels = torch.randint(V, (N,), generator=generator, device=device)
    return Problem(policy, ref, labels, (0.5 + draw(N).abs(), -0.5 - draw(N).abs()))


def logits_findings(N: int, V: int, device: torch.device) -> Iterator[Finding]:
    """Of `token_stats`."""
    for name, dtype, size, distance in (
        ("ordinary", torch.float32, 3.0, 0.5),
        ("ordinary", torch.bfloat16, 3.0, 0.5),
        ("huge KL", torch.float32, 30.0, 30.0),
    ):
        given = problem(N, V, dtype, device, size, distance)
        got, naive = (given.solve(function, dtype) for function in (token_stats, token_stats_reference))
        truth = given.solve(token_stats_reference, torch.float64)
        for stat in truth:
            what = f"logits, {name}, {dtype_name(dtype)}: {stat}"
            yield beside_naive(what, got[stat], naive[stat], truth[stat], floor=0.0 if stat == "gradient" else 1.0)

    near = problem(N, V, torch.float32, device, 3.0, 4e-5)
    kl, true_kl = near.solve(token_stats, torch.float32)["kl"], near.solve(token_stats_reference, torch.float64)["kl"]
    yield Finding(f"logits, KL near {float(true_kl.mean()):.0e}, fp32: kl", row_error(kl, true_kl), TINY_KL_SLACK)

    equal = near._replace(policy=near.ref).solve(token_stats, torch.float32)["kl"]
    yield Finding("logits, equal models, fp32: kl", float(equal.abs().amax()), 0.0)

    ignored = near._replace(labels=torch.full_like(near.labels, -100), policy=near.policy * float("nan"))
    largest = torch.stack([found.abs().amax() for found in ignored.solve(token_stats, torch.float32).values()])
    yield Finding("logits, ignored rows that hold NaN: everything", float(largest.amax()), 0.0)


# -------------------------------------------------------------------------------------------------------- from hidden states


def hidden_findings(
    what: str, hidden: Tensor, head: LMHead, ref_hidden: Tensor, ref_head: LMHead, labels: Tensor, trained: bool
) -> Iterator[Finding]:
    """Of LinearTDPOLoss in several chunks: the loss, the gradient of hidden states (S, T, D) and, if trained, of the head."""
    dtype = head.weight.dtype
    slack = max(SLACK, torch.finfo(dtype).eps)  # half-precision products round logits, each in its own way
    chunk = 2 * head.width * head.weight.itemsize * max(1, labels.numel() // 4)

    def solve(loss: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        x, weight = hidden.detach().to(dtype).requires_grad_(), head.weight.detach().to(dtype).requires_grad_(trained)
        policy = _in(head, dtype, weight)
        ref = policy if ref_head is head else _in(ref_head, dtype, ref_head.weight.detach().to(dtype))
        value = loss(x, policy, ref_hidden.detach().to(dtype), ref)
        return [value[None], *torch.autograd.grad(value, (x, weight) if trained else (x,))]

    def fused(x: Tensor, policy: LMHead, z: Tensor, ref: LMHead) -> Tensor:
        return LinearTDPOLoss(max_chunk_bytes=chunk)(x, policy, z, ref, labels).loss

    def naive(x: Tensor, policy: LMHead, z: Tensor, ref: LMHead) -> Tensor:
        return TDPOLoss(backend="reference")(policy.logits(x), ref.logits(z), labels).loss

    names = ("loss", "gradient of hidden states", "gradient of the head")
    results = zip(names, solve(fused, dtype), solve(naive, dtype), solve(naive, WIDER[dtype]), strict=False)
    for name, *tensors in results:
        got, reached, truth = (tensor.flatten()[None] for tensor in tensors)
        yield beside_naive(f"{what}, {dtype_name(dtype)}: {name}", got, reached, truth, slack=slack)


def _in(head: LMHead, dtype: torch.dtype, weight: Tensor) -> LMHead:
    return replace(head, weight=weight, bias=None if head.bias is None else head.bias.detach().to(dtype))


def preference_labels(S: int, T: int, V: int, device: torch.device) -> Tensor:
    """(S, T) random labels, of which the first third is a prompt."""
    labels = torch.randint(V, (S, T), generator=torch.Generator(device).manual_seed(1), device=device)
    labels[:, : T // 3] = -100
    return labels


def random_findings(V: int, D: int, T: int, device: torch.device) -> Iterator[Finding]:
    """Of random hidden states and heads."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    ref_hidden, ref_weight = draw(4, T, D), 3 * D**-0.5 * draw(V, D)
    hidden, weight = ref_hidden + draw(4, T, D) / 3, ref_weight + 0.5 * D**-0.5 * draw(V, D)
    labels = preference_labels(4, T, V, device)
    for what, dtype, softcap, trained in (
        ("hidden states", torch.float32, None, True),
        ("hidden states", torch.bfloat16, None, True),
        ("hidden states, soft-cap", torch.float32, 5.0, True),
        ("hidden states, frozen head", torch.float32, None, False),
    ):
        head, ref_head = (LMHead(w.to(dtype), softcap=softcap) for w in (weight, ref_weight))
        states = hidden.to(dtype), head, ref_hidden.to(dtype), ref_head if trained else head
        yield from hidden_findings(what, *states, labels, trained)


def model_findings(source: str, device: torch.device) -> Iterator[Finding]:
    """Of a model of transformers: whether its head can be read, and one loss from its hidden states."""
    from transformers import AutoModelForCausalLM

    refuse_absent(source)
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        refuse(
            f"no model can be loaded from {source!r}: {reason} Give a causal language model's directory, or its id on the hub."
        )
    model.to(device)
    try:
        head = LMHead.from_model(model)
    except (TypeError, ValueError) as error:
        yield Finding(f"{source}: its head", float("nan"), 0.0, str(error))
        return
    labels = preference_labels(2, 12, head.width, device)
    with torch.no_grad():
        hidden = call(backbone(model), "last_hidden_state", input_ids=labels.clamp(min=0)).to(head.weight.dtype)
    noise = torch.randn(hidden.shape, generator=torch.Generator(device).manual_seed(0), device=device)
    ref_hidden = (hidden + 0.1 * hidden.std() * noise).to(hidden.dtype)
    yield from hidden_findings(source, hidden, head, ref_hidden, head, labels, trained=False)


# ---------------------------------------------------------------------------------------------------------------------- speed

ROUNDS, QUEUED = 3, 20


class Speed(NamedTuple):
    """Of one forward and backward: median milliseconds, peak bytes, and the bytes that `fused-tdpo plan` says."""

    label: str
    ms: float
    peak: int
    planned: float


def a_size_for(device: torch.device) -> Workload:
    """Large enough to tell, small enough that the naive loss fits and takes no minute."""
    if device.type != "cuda":
        return Workload(V=32_000, D=128, T=128, dtype=torch.float32, max_chunk_bytes=2**24, on_gpu=False)
    work, free = Workload(V=128_256, D=2048, T=4096), torch.cuda.mem_get_info(device)[0]
    while work.T > 64 and WAYS["naive_valid"].peak(work).total > free / 2:
        work = replace(work, T=work.T // 2)
    return work


def speeds(work: Workload, device: torch.device) -> Iterator[Speed]:
    """The naive loss on rows that count, and ours."""
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device, dtype=work.dtype)
    S, V, D = 2 * work.pairs, work.V, work.D
    hidden, ref_hidden, head = draw(S, work.T, D), draw(S, work.T, D), draw(V, D) * D**-0.5
    policy_head, hidden = head.clone().requires_grad_(), hidden.requires_grad_()
    labels = torch.randint(V, (S, work.T), device=device)
    labels[:, : work.T - work.length] = -100
    lengths = [work.length] * S

    def ours(beta: float, *inputs: Tensor) -> Tensor:
        return LinearTDPOLoss(beta, max_chunk_bytes=work.max_chunk_bytes)(*inputs, valid_rows=lengths).loss

    for name, loss in (("naive_valid", naive_valid), ("ours", ours)):

        def step(loss: Loss = loss) -> object:
            return torch.autograd.grad(loss(0.1, hidden, policy_head, ref_hidden, head, labels), (hidden, policy_head))

        step()
        (peak,) = peak_bytes(device, step)
        ms = median(wall_clock(device, step)[0] for _ in range(ROUNDS))
        yield Speed(WAYS[name].label, ms, peak, WAYS[name].peak(work).total)


def bandwidths(device: torch.device, N: int = 4096, V: int = 128_256) -> dict[str, float]:
    """Bytes a second of a copy within a GPU, of `token_stats`, and of its backward: those that each cannot but move."""
    while N > 64 and torch.cuda.mem_get_info(device)[0] < 40 * N * V:  # drawn in float32
        N //= 2
    given = problem(N, V, torch.bfloat16, device, 3.0, 0.5)
    size, policy = N * V * 2, given.policy.requires_grad_()
    target = torch.empty_like(given.ref)

    def copy() -> object:
        return target.copy_(given.ref)

    def forward() -> TokenStats:
        return token_stats(policy, given.ref, given.labels)

    stats = forward()
    outputs = [stat for stat in (stats.logp, stats.kl) if stat is not None]

    def backward() -> object:
        return torch.autograd.grad(outputs, policy, given.upstream, retain_graph=True)

    def rate(moved: int, function: Callable[[], object]) -> float:
        def queued() -> None:  # so that the host prepares the next call while the GPU works
            for _ in range(QUEUED):
                function()

        function()
        return 1e3 * QUEUED * moved / wall_clock(device, queued)[0]

    return {"copy": rate(2 * size, copy), "forward": rate(2 * size, forward), "backward": rate(3 * size, backward)}


# -------------------------------------------------------------------------------------------------------------------- command


def check(
    model: Annotated[str | None, typer.Option(help="Also check this model: a directory, or an id on the hub.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; default: the GPU if there is one.")] = "",
    speed: Annotated[bool, typer.Option(help="Also measure time and memory.")] = True,
) -> None:
    """Tell whether the losses are right on this machine (exit code 1 if not), and how fast."""
    where = parse_device(device)
    show(_environment(where))
    V, D = (50_257, 256) if where.type == "cuda" else (5003, 32)
    checks: dict[str, Callable[[], Any]] = {
        "logits": lambda: logits_findings(32, V, where),
        "hidden states": lambda: random_findings(V, D, 24, where),
    }
    if model is not None:
        checks[model] = lambda: model_findings(model, where)
    found = _run({name: partial(_all, name, make) for name, make in checks.items()})
    findings = [finding for some in found.values() for finding in some]
    show(_verdicts(findings))
    failed = [finding for finding in findings if not finding.passed]
    for finding in failed:
        show(f"wrong: {finding.what}" + (f": {finding.note}" if finding.note else ""))
    if failed:
        show(f"{len(failed)} of {len(findings)} checks failed on {where}: do not train here, and report what this shows.")
        raise typer.Exit(1)
    if speed:
        work = a_size_for(where)
        steps: dict[str, Callable[[], Any]] = {"time and memory": lambda: list(speeds(work, where))}
        if where.type == "cuda":
            steps["bandwidth"] = lambda: bandwidths(where)
        found = _run(steps)
        show(_speeds(work, found["time and memory"]))
        if where.type == "cuda":
            show(_bandwidths(found["bandwidth"]))
    show(f"All {len(findings)} checks passed on {where}.")


def _environment(device: torch.device) -> Table:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    backend, reason = choose_backend("auto", device.type, (torch.bfloat16,))
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    made = table("", ("fused-tdpo", fused_tdpo.__version__), left=2)
    made.add_row("Python", platform.python_version())
    made.add_row("torch", torch.__version__)
    made.add_row("triton", triton)
    made.add_row("device", f"{device}: {name}")
    made.add_row("backend", f"{backend}, because: {reason}")
    return made


def _all(name: str, make: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """All findings. What cannot even be computed, as where a kernel does not compile, is one, too, and the last."""
    found: list[Finding] = []
    try:
        found.extend(make())
    except typer.Exit:
        raise
    except Exception as error:
        traceback.print_exc()
        place = f"after {found[-1].what!r}" if found else "at once"
        found.append(Finding(f"{name}, {place}", float("nan"), 0.0, f"{type(error).__name__}: {error}"))
    return found


def _run(steps: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """The results by name, with a progress bar where somebody looks."""
    found = {}
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("", total=len(steps))
        for name, step in steps.items():
            progress.update(bar, description=name)
            found[name] = step()
            progress.advance(bar)
    return found


def _verdicts(findings: list[Finding]) -> Table:
    made = table("Relative error of the worst row", ("", "error", "budget", ""))
    for finding in findings:
        made.add_row(finding.what, f"{finding.error:.1e}", f"{finding.budget:.1e}", "ok" if finding.passed else "WRONG")
    return made


def _speeds(work: Workload, measured: list[Speed]) -> Table:
    made = table(
        f"A step of TDPO2 from hidden states: {work.N:,} rows, {work.words}", ("", "time", "peak memory", "as planned")
    )
    for speed in measured:
        made.add_row(speed.label, as_time(speed.ms), as_bytes(speed.peak), as_bytes(speed.planned))
    return made


def _bandwidths(rates: dict[str, float]) -> Table:
    made = table("token_stats from logits, in bytes that must move", ("", "GB/s", "of a copy"))
    for name, rate in rates.items():
        made.add_row(name, digits(rate / 1e9), f"{rate / rates['copy']:.0%}")
    return made
