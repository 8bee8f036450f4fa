"""Bytes that the Triton kernels move, counted in the interpreter, against the floor.

The floor of forward is each logit of the rows that are not ignored, once; of backward, each of these once more and each element
of the gradient, once. Row vectors come on top, a few bytes a row and program: labels, label logits, upstream gradients, the
records of the segments, outputs. They are counted in: a real vocabulary hides them, the small ones here do not.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from byte_counter import Traffic, counted_traffic
from fused_tdpo import DPOLoss, TDPOLoss, token_stats

triton = pytest.importorskip("triton")
tl = triton.language
kernels = pytest.importorskip("fused_tdpo.kernels.token_stats")

pytestmark = pytest.mark.interpreter

fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
EXTRAS = ("entropy", "ref_entropy", "accuracy", "mean_logit", "log_sum_sq_probs")
NAN = float("nan")
ALLOWED = 1.01
"""Bytes read, in units of the floor: a partial group of 16 bytes at a row's end may be read whole."""

N = 3
IGNORED = 1


# --------------------------------------------------------------------------------------------------------------- the counter


@triton.jit
def _known_traffic_kernel(in_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(in_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, x + tl.load(in_ptr), mask=(i < n) & (i > 0))
    tl.store(out_ptr, 1.0)
    words = tl.load(in_ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, 2))
    tl.store(out_ptr + i, words.to(tl.float32).sum(), mask=i < 0)


def test_counter_counts_what_a_kernel_does():
    given = torch.ones(16, dtype=bf16)
    x, out = given[3:11], torch.zeros(9)
    with counted_traffic() as traffic:
        _known_traffic_kernel[(2,)](x, out, 5, BLOCK=8)
    # twice: a masked load of five, a scalar load of the first, and two words of two elements
    assert traffic.reads(x).tolist() == [6, 4, 4, 4, 2, 0, 0, 0]
    assert traffic.reads(given).tolist() == [0] * 3 + traffic.reads(x).tolist() + [0] * 5
    assert traffic.writes(out).tolist() == [2, 2, 2, 2, 2, 0, 0, 0, 0]
    assert traffic.bytes_read() == 2 * (5 * 2 + 2 + 2 * 4)
    assert traffic.bytes_written() == 2 * (4 * 4 + 4)
    assert not traffic.reads(out).any() and not traffic.writes(given).any()
    assert [(kernel, grid) for kernel, grid, _ in traffic.launches] == [("_known_traffic_kernel", (2,))]
    assert traffic.bytes_read("another_kernel") == 0


def test_counter_is_a_fence():
    x, out = torch.ones(8), torch.zeros(8)
    with counted_traffic(), pytest.raises(Exception, match="1 addresses outside the tensors"):
        _known_traffic_kernel[(1,)](x[4:], out, 5, BLOCK=8)
    _known_traffic_kernel[(1,)](x, out, 8, BLOCK=8)  # and is gone afterwards


# ----------------------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class Case:
    """N rows of random logits, the second of them ignored and full of NaN, in rows of `pitch` columns of which V are used."""

    V: int
    dtype: torch.dtype = bf16
    ref_dtype: torch.dtype | None = bf16
    pitch: int = 0
    """0: V."""
    padded_vocabulary: bool = False
    """Whether the columns from V on belong to the logits, which are then cut by `vocab_size`."""
    cut: int = 0
    """Columns of a segment and of a chunk, where they are made shorter than the interpreter has time for. 0: as they are."""
    extras: tuple[str, ...] = ()
    ignore_index: int = -100

    @property
    def width(self) -> int:
        return self.pitch if self.padded_vocabulary else self.V

    @property
    def segments(self) -> int:
        return -(-self.V // self.cut) if self.cut else 1

    @property
    def chunks(self) -> int:
        return -(-self.width // self.cut) if self.cut else 1

    @property
    def logit_bytes(self) -> int:
        """Bytes of one column of one row in both models."""
        return self.dtype.itemsize + (self.ref_dtype.itemsize if self.ref_dtype else 0)

    @property
    def group(self) -> int:
        """Columns in 16 bytes of the wider logits."""
        return 16 // max(self.dtype.itemsize, self.ref_dtype.itemsize if self.ref_dtype else 1)


# What a program does depends on the alignment of rows (an odd pitch takes the narrow path), and on V against a tile, which has
# 512 columns up to V = 1024, and 1024 up to 32,768.
CASES = {
    "one-column": Case(V=1),
    "below-a-tile": Case(V=256),
    "below-a-tile-narrow": Case(V=131),
    "two-whole-tiles": Case(V=1024),
    "last-tile-partial": Case(V=2504),
    "last-group-partial": Case(V=1999, pitch=2000),
    "narrow": Case(V=2503),
    "fp16": Case(V=1024, dtype=fp16, ref_dtype=fp16),
    "fp32": Case(V=1300, dtype=fp32, ref_dtype=fp32),
    "fp32-narrow": Case(V=1299, dtype=fp32, ref_dtype=fp32),
    "bf16-beside-fp32": Case(V=1199, dtype=bf16, ref_dtype=fp32, pitch=1200),
    "fp32-beside-bf16-narrow": Case(V=1031, dtype=fp32, ref_dtype=bf16),
    "no-reference": Case(V=1304, ref_dtype=None),
    "no-reference-narrow": Case(V=1031, ref_dtype=None),
    "padded-vocabulary": Case(V=1031, pitch=1040, padded_vocabulary=True),
    "padded-by-more-than-a-tile": Case(V=597, pitch=2200, padded_vocabulary=True),
    "padded-by-more-than-a-tile-narrow": Case(V=300, pitch=2201, padded_vocabulary=True),
    "cut-in-three": Case(V=5001, pitch=5008, cut=2048),
    "cut-in-three-narrow": Case(V=5001, cut=2048),
    "ignored-label-in-the-vocabulary": Case(V=256, ignore_index=7),  # whose logit must not be looked up
}
IN_PLACE = ("last-group-partial", "narrow", "padded-by-more-than-a-tile", "cut-in-three")
WITH_EXTRAS = {
    "extras": replace(CASES["last-group-partial"], extras=EXTRAS),
    "extras-narrow": replace(CASES["fp32-narrow"], extras=EXTRAS),
    "extras-cut-in-three": replace(CASES["cut-in-three"], extras=EXTRAS),
    "extras-without-reference": replace(CASES["no-reference"], extras=("entropy", *EXTRAS[2:])),
}


@pytest.fixture(autouse=True)
def shorter_cuts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    callspec = getattr(request.node, "callspec", None)
    if callspec and "case" in callspec.params and callspec.params["case"].cut:
        monkeypatch.setattr(kernels, "SEGMENT_COLUMNS", callspec.params["case"].cut)
        monkeypatch.setattr(kernels, "backward_chunk", lambda tile: callspec.params["case"].cut)


@dataclass
class Inputs:
    """Logits of a case, and the whole memory that they lie in."""

    policy: Tensor
    ref: Tensor | None
    labels: Tensor
    memory: dict[str, Tensor]  # (N, pitch)

    @property
    def active(self) -> Tensor:
        """(N,) rows that are not ignored."""
        return torch.arange(N) != IGNORED


def make(case: Case) -> Inputs:
    def logits(dtype: torch.dtype) -> Tensor:
        memory = torch.randn(N, case.pitch or case.V)
        memory[:, case.V :] = NAN
        memory[IGNORED] = NAN
        return memory.to(dtype)

    memory = {"policy": logits(case.dtype)} | ({"ref": logits(case.ref_dtype)} if case.ref_dtype else {})
    labels = torch.tensor([0, case.ignore_index, case.V - 1])
    ref = memory["ref"][:, : case.width] if case.ref_dtype else None
    return Inputs(memory["policy"][:, : case.width], ref, labels, memory)


def options(case: Case) -> dict[str, Any]:
    return {"vocab_size": case.V, "ignore_index": case.ignore_index, "backend": "triton"}


def forward(case: Case, inputs: Inputs) -> Traffic:
    with torch.no_grad(), counted_traffic() as traffic:
        token_stats(inputs.policy, inputs.ref, inputs.labels, extras=case.extras, **options(case))
    return traffic


def backward(case: Case, inputs: Inputs, g_logp: Tensor | None, g_kl: Tensor | None, in_place: bool = False) -> Traffic:
    """Upstream gradients of logp and of kl, None where that output is not used."""
    leaf = inputs.policy.requires_grad_()
    logits = leaf.view_as(leaf)  # same memory, no leaf: what is written in place is seen in `inputs.memory`
    stats = token_stats(logits, inputs.ref, inputs.labels, inplace_backward=in_place, **options(case))
    used = [(stat, g) for stat, g in ((stats.logp, g_logp), (stats.kl, g_kl)) if g is not None]
    with counted_traffic() as traffic:
        torch.autograd.grad([stat for stat, _ in used], [leaf], [g for _, g in used])
    return traffic


def assert_rows_read_once(what: str, reads: Tensor, case: Case, rows: Tensor, looked_up: Tensor | None = None) -> None:
    """Each of the V logits of `rows` (N,) was read once, those `looked_up` (N, pitch) perhaps more often; nothing else was.

    Beyond column V a row's last group of 16 bytes may be read with it.
    """
    whole_groups = -(-case.V // case.group) * case.group
    once = reads[:, : case.V] == 1
    if looked_up is not None:
        once |= looked_up[:, : case.V] & (reads[:, : case.V] > 1)
    assert once[rows].all(), f"{what}: logits {(~once & rows[:, None]).nonzero().tolist()[:5]} were not read once"
    assert (reads[rows, case.V : whole_groups] <= 1).all(), f"{what}: columns beside the vocabulary were read twice"
    assert not reads[rows, whole_groups:].any(), f"{what}: columns beyond the vocabulary were read"
    assert not reads[~rows].any(), f"{what}: rows that do not count were read"


# ------------------------------------------------------------------------------------------------------------------- forward


def record_fields(case: Case) -> int:
    """Numbers that a segment hands on: maximum and sum of the policy; with a reference the same of it, and four more."""
    return (8 if case.ref_dtype else 2) + len(case.extras)


def forward_reads_floor(case: Case, active: int) -> int:
    logits = active * case.V * case.logit_bytes
    labels = (case.segments + 1) * (N * 8 + active * case.logit_bytes)  # a label and its logits, by each program
    records = active * case.segments * record_fields(case) * 4
    return logits + labels + records


def forward_writes(case: Case, active: int) -> int:
    outputs = N * 4 * ((3 + 4 if case.ref_dtype else 1 + 2) + len(case.extras))  # with those saved for backward
    return outputs + active * case.segments * record_fields(case) * 4


@pytest.mark.parametrize("case", (CASES | WITH_EXTRAS).values(), ids=CASES | WITH_EXTRAS)
def test_forward(case):
    inputs = make(case)
    traffic = forward(case, inputs)
    active = int(inputs.active.sum())

    for name, memory in inputs.memory.items():
        group = torch.arange(memory.shape[1]) // case.group
        beside_label = group == inputs.labels[:, None] // case.group  # accuracy looks at this group again
        assert_rows_read_once(name, traffic.reads(memory), case, inputs.active, looked_up=beside_label)
        assert not traffic.writes(memory).any(), f"{name} was written"
    read, floor = traffic.bytes_read(), forward_reads_floor(case, active)
    assert floor <= read <= ALLOWED * floor

    others = ("policy_ptr", "ref_ptr", "label_ptr", "record_ptr", "saved_ptr")
    finish = traffic.launches[-1][2]
    outputs = {name: finish[name] for name in finish if name.endswith("_ptr") and name not in others}
    present = {name for name, value in outputs.items() if value is not None}
    assert present == {f"{name}_ptr" for name in ("logp", *(("ref_logp", "kl") if case.ref_dtype else ()), *case.extras)}
    for name in present:
        assert (traffic.writes(outputs[name]) == 1).all(), f"{name} was not written once"
    record = traffic.argument("record_ptr")
    assert torch.equal(traffic.reads(record), traffic.writes(record)), "records: what is read is not what was written"
    assert traffic.bytes_written() == forward_writes(case, active), "O(N), whatever V"
    programs = [(kernel, grid) for kernel, grid, _ in traffic.launches]
    assert programs == [("token_stats_fold_kernel", (N * case.segments,)), ("token_stats_finish_kernel", (1,))]


# ------------------------------------------------------------------------------------------------------------------ backward


def backward_reads_floor(case: Case, active: int, with_kl: int) -> int:
    """`with_kl` of the `active` rows have an upstream gradient of their KL."""
    logits = active * case.V * case.dtype.itemsize + (with_kl * case.V * case.ref_dtype.itemsize if with_kl else 0)
    upstream = 2 if case.ref_dtype else 1
    return logits + case.chunks * (N * 8 + active * 4 * (upstream + 2) + with_kl * 4 * 2)  # (m, s) of each model


@pytest.mark.parametrize(
    ("case", "in_place"),
    [
        *(pytest.param(case, False, id=name) for name, case in CASES.items()),
        *(pytest.param(CASES[name], True, id=f"{name}-in-place") for name in IN_PLACE),
    ],
)
def test_backward(case, in_place):
    inputs = make(case)
    g_logp, g_kl = torch.randn(2, N)
    g_kl[0] = 0.0  # as of DPO, and of the chosen rows of TDPO2
    traffic = backward(case, inputs, g_logp, g_kl if case.ref_dtype else None, in_place)
    with_kl = inputs.active & (g_kl != 0) if case.ref_dtype else torch.zeros(N, dtype=torch.bool)

    assert_rows_read_once("policy", traffic.reads(inputs.memory["policy"]), case, inputs.active)
    if case.ref_dtype:
        assert_rows_read_once("ref", traffic.reads(inputs.memory["ref"]), case, with_kl)
        assert not traffic.writes(inputs.memory["ref"]).any()
    read, floor = traffic.bytes_read(), backward_reads_floor(case, int(inputs.active.sum()), int(with_kl.sum()))
    assert floor <= read <= ALLOWED * floor

    gradient = traffic.argument("d_policy_ptr")
    assert (gradient.untyped_storage().data_ptr() == inputs.policy.untyped_storage().data_ptr()) == in_place
    assert gradient.numel() == N * case.width
    assert (traffic.writes(gradient) == 1).all(), "an element of the gradient was not written once"
    assert traffic.bytes_written() == N * case.width * case.dtype.itemsize, "something else was written"
    assert [(kernel, grid) for kernel, grid, _ in traffic.launches] == [("token_stats_bwd_kernel", (N * case.chunks,))]


def test_backward_of_logp_alone_reads_no_reference():
    case = CASES["last-group-partial"]
    inputs = make(case)
    traffic = backward(case, inputs, g_logp=torch.randn(N), g_kl=None)
    assert not traffic.reads(inputs.memory["ref"]).any()
    assert_rows_read_once("policy", traffic.reads(inputs.memory["policy"]), case, inputs.active)


def test_backward_of_kl_alone():
    case = CASES["last-group-partial"]
    inputs = make(case)
    traffic = backward(case, inputs, g_logp=None, g_kl=torch.ones(N))
    for name, memory in inputs.memory.items():
        assert_rows_read_once(name, traffic.reads(memory), case, inputs.active)


@pytest.mark.parametrize("case", [WITH_EXTRAS["extras"], CASES["narrow"]], ids=["extras", "narrow"])
def test_a_softcap_moves_no_byte(case):
    inputs = make(case)
    policy, ref = inputs.policy[None], inputs.ref[None]
    g, fixed = torch.ones(N), {"V": case.V, "ignore_index": case.ignore_index, "temperature": 1.0}

    def traffic_of(softcaps: tuple[float | None, float | None]) -> list[Tensor | int]:
        options = {**fixed, "softcaps": softcaps}
        with counted_traffic() as traffic:
            _, saved = kernels.token_stats_fwd(policy, ref, inputs.labels, extras=case.extras, **options)
            kernels.token_stats_bwd(policy, ref, inputs.labels, saved, g, g, torch.empty_like(policy), **options)
        counts = [traffic.reads(memory) + traffic.writes(memory) for memory in inputs.memory.values()]
        return [torch.stack(counts), traffic.bytes_read(), traffic.bytes_written()]

    (counts, *moved), (capped_counts, *capped_moved) = traffic_of((None, None)), traffic_of((30.0, 50.0))
    assert torch.equal(capped_counts, counts)
    assert capped_moved == moved


TWICE = (
    {"divergence": "js"},
    {"divergence": "alpha", "divergence_alpha": 0.3},
    {"divergence": "alpha", "divergence_alpha": 2.0},
)


@pytest.mark.parametrize("kind", [{"divergence": "reverse_kl"}, *TWICE], ids=lambda kind: "-".join(map(str, kind.values())))
@pytest.mark.parametrize("name", [*IN_PLACE, "fp32", "bf16-beside-fp32", "extras"])
def test_other_divergences(name, kind, monkeypatch):
    """Forward of KL(p || q) reads each logit once, of those that need both sums of exponentials twice; backward always once."""
    case = (CASES | WITH_EXTRAS)[name]
    if case.cut:
        monkeypatch.setattr(kernels, "SEGMENT_COLUMNS", case.cut)
        monkeypatch.setattr(kernels, "backward_chunk", lambda tile: case.cut)
    inputs = make(case)
    active = int(inputs.active.sum())
    passes = [f"token_stats_{step}_kernel" for step in ("fold", "compare")][: 2 if kind in TWICE else 1]
    with torch.no_grad(), counted_traffic() as traffic:
        token_stats(inputs.policy, inputs.ref, inputs.labels, extras=case.extras, **options(case), **kind)
    for what, memory in inputs.memory.items():
        group = torch.arange(memory.shape[1]) // case.group
        beside_label = group == inputs.labels[:, None] // case.group  # accuracy looks at this group again
        for kernel in passes:
            assert_rows_read_once(f"{what}, {kernel}", traffic.reads(memory, kernel), case, inputs.active, beside_label)
        only = sum(traffic.reads(memory, kernel) for kernel in [*passes, "finish"])
        assert torch.equal(traffic.reads(memory), only), f"{what}: another kernel read it"
        assert not traffic.writes(memory).any(), f"{what} was written"
    logits = len(passes) * active * case.V * case.logit_bytes
    assert logits <= traffic.bytes_read() <= ALLOWED * logits + 512 * N * case.segments, "and O(N) besides"
    assert traffic.bytes_written() <= 512 * N * case.segments, "O(N), whatever V"
    assert [kernel for kernel, _, _ in traffic.launches] == [
        "token_stats_fold_kernel",
        "token_stats_finish_kernel",
        *(["token_stats_compare_kernel", "token_stats_settle_kernel"] if kind in TWICE else []),
    ]

    for in_place in (False, True):
        leaf = inputs.policy.requires_grad_()
        logits = leaf.view_as(leaf)
        stats = token_stats(logits, inputs.ref, inputs.labels, inplace_backward=in_place, **options(case), **kind)
        with counted_traffic() as traffic:
            torch.autograd.grad(stats.kl + stats.logp, leaf, torch.tensor([0.0, 1.0, 1.0]))
        assert_rows_read_once("policy", traffic.reads(inputs.memory["policy"]), case, inputs.active)
        assert_rows_read_once("ref", traffic.reads(inputs.memory["ref"]), case, inputs.active & (torch.arange(N) != 0))
        gradient = traffic.argument("d_policy_ptr")
        assert (gradient.untyped_storage().data_ptr() == inputs.policy.untyped_storage().data_ptr()) == in_place
        assert (traffic.writes(gradient) == 1).all(), "an element of the gradient was not written once"
        assert traffic.bytes_written() == N * case.width * case.dtype.itemsize, "something else was written"


@pytest.mark.parametrize(
    ("loss", "chosen_read", "rejected_read"),
    [
        pytest.param(TDPOLoss(variant="tdpo2", backend="triton"), False, True, id="tdpo2"),  # the chosen KL is detached
        pytest.param(TDPOLoss(variant="tdpo1", backend="triton"), True, True, id="tdpo1"),
        pytest.param(DPOLoss(backend="triton"), False, False, id="dpo"),
    ],
)
def test_losses_read_the_reference_in_backward_only_where_its_kl_counts(loss, chosen_read, rejected_read):
    P, T, V = 1, 3, 131
    policy, ref = torch.randn(2 * P, T, V, requires_grad=True), torch.randn(2 * P, T, V)
    labels = torch.randint(V, (2 * P, T))
    labels[0, 1] = -100
    out = loss(policy, ref, labels)
    with counted_traffic() as traffic:
        out.loss.backward()
    active = torch.zeros(2 * P, T, dtype=torch.bool)
    active[:, :-1] = labels[:, 1:] != -100  # a position predicts the next token
    counts = torch.tensor([chosen_read] * P + [rejected_read] * P)
    assert torch.equal(traffic.reads(policy), active[..., None].long().expand(-1, -1, V))
    assert torch.equal(traffic.reads(ref), (active & counts[:, None])[..., None].long().expand(-1, -1, V))
    assert traffic.bytes_written() == policy.numel() * 4


# -------------------------------------------------------------------------------------------------------- out-of-range labels


@pytest.mark.parametrize("pitch", [136, 131], ids=["wide", "narrow"])
def test_labels_out_of_range_touch_no_other_memory(pitch):
    # The counter is a fence around all tensors; that no other row was read shows in its counts.
    case = Case(V=131, pitch=pitch, extras=EXTRAS)
    inputs = replace(make(case), labels=torch.tensor([131, -1, -(2**40) if pitch == 136 else 2**31 + 3]))
    every = torch.ones(N, dtype=torch.bool)
    traffic = forward(case, inputs)
    anywhere = torch.ones(N, pitch, dtype=torch.bool)  # in its own row, accuracy may look for the label
    assert_rows_read_once("forward", traffic.reads(inputs.memory["policy"]), case, every, looked_up=anywhere)
    assert_rows_read_once("forward", traffic.reads(inputs.memory["ref"]), case, every)
    traffic = backward(case, inputs, *torch.randn(2, N))
    assert_rows_read_once("backward", traffic.reads(inputs.memory["policy"]), case, every)
    assert traffic.bytes_written() == N * 131 * 2
