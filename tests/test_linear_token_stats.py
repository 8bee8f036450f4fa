"""The contract of `linear_token_stats`, run by each backend on a CPU: the naive one, torch, and Triton in its interpreter."""

from typing import Any

import pytest
import torch

from contract_linear import (
    SUBSETS,
    Float64LinearContract,
    FusedLinearTokenStatsContract,
    LinearBackend,
    PoisonsBadLabels,
    RefusesBadLabels,
    assert_same_outcome,
    bf16,
    check,
    fp32,
    make_case,
    one_thread,  # noqa: F401 - a fixture, which pytest finds by its name
    run,
)
from contract_token_stats import EXTRAS, noise
from fused_tdpo import LMHead, TokenStats, linear_token_stats


class TestReference(Float64LinearContract, RefusesBadLabels):
    backend = LinearBackend("reference")


class TestTorch(FusedLinearTokenStatsContract, Float64LinearContract, RefusesBadLabels):
    backend = LinearBackend("torch")


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
class TestTritonInterpreted(FusedLinearTokenStatsContract, PoisonsBadLabels):
    backend = LinearBackend("triton")


@pytest.mark.parametrize("train", [("hidden",), SUBSETS[-1]], ids=["frozen", "trained"])
def test_auto_is_torch_on_a_cpu(train):
    case = make_case("cpu", (2, 4), dtype=bf16, temperature=0.7, extras=EXTRAS, head={"softcap": 4.0})
    assert_same_outcome("auto", run(linear_token_stats, case, train), run(LinearBackend("torch"), case, train))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_an_in_place_gradient_is_right_or_refused(backend):
    # Logits are never kept at this level, so the option has nothing to overwrite; but it may not be wrong.
    case = make_case("cpu")
    try:
        got = run(LinearBackend(backend), case.having(inplace_backward=True))
    except ValueError as error:
        assert "inplace_backward" in str(error), error
    else:
        assert_same_outcome("in place", got, run(LinearBackend(backend), case))


def test_a_default_chunk_holds_more_than_the_test_does():
    # None means a size that is good for speed, not one row.
    case = make_case("cpu", (5, 40), 211, extras=EXTRAS)
    check(linear_token_stats, case)
    assert_same_outcome("much", run(linear_token_stats, case), run(linear_token_stats, case.having(max_chunk_bytes=1 << 30)))


# --- errors ----------------------------------------------------------------------------------------------------------------

N, V, D = 4, 7, 3
H, W, RH, RW = noise(N, D, seed=1), noise(V, D, seed=2), noise(N, D, seed=3), noise(V, D, seed=4)
LABELS = torch.tensor([1, -100, 0, 6])
GOOD = {"policy_hidden": H, "policy_head": W, "ref_hidden": RH, "ref_head": RW, "labels": LABELS}


def call(**changes: Any) -> TokenStats:
    return linear_token_stats(**(GOOD | changes))


SWAPPED = r"(?is)(order|swap|policy_hidden, policy_head)"

REFUSED: list[Any] = [
    # id, arguments that differ, pattern in the message
    ("hidden-and-head-swapped", {"policy_hidden": W, "policy_head": H, "ref_hidden": RW, "ref_head": RH}, SWAPPED),
    ("policy-swapped", {"policy_hidden": W, "policy_head": H}, SWAPPED),
    ("models-interleaved", {"policy_head": RH, "ref_hidden": W}, r"(?is)\((4|7), 3\)"),  # (hidden, hidden, head, head)
    ("labels-and-ref-head-swapped", {"ref_head": LABELS, "labels": RW}, r"(?is)(labels|ref_head)"),
    ("head-transposed", {"policy_head": W.T}, r"(?is)(?=.*policy_head)(?=.*\(3, 7\))(?=.*(V, D|transpose|\.T|order))"),
    ("hidden-too-narrow", {"policy_hidden": H[:, :2]}, r"(?is)(?=.*policy_h)(?=.*\(4, 2\))(?=.*\(7, 3\))"),
    ("ref-hidden-too-narrow", {"ref_hidden": RH[:, :2]}, r"(?is)(?=.*ref_h)(?=.*\(4, 2\))(?=.*\(7, 3\))"),
    ("hidden-is-a-head", {"policy_hidden": LMHead(W)}, r"(?is)policy_hidden.*LMHead"),
    ("head-is-a-layer", {"policy_head": torch.nn.Linear(D, V)}, r"(?is)policy_head.*Linear"),
    ("hidden-of-integers", {"policy_hidden": H.int()}, r"(?is)policy_hidden.*int32"),
    ("head-of-integers", {"policy_head": W.int()}, r"(?is)int32"),
    ("ref-hidden-alone", {"ref_head": None}, r"(?is)(?=.*ref_hidden)(?=.*ref_head)"),
    ("ref-head-alone", {"ref_hidden": None}, r"(?is)(?=.*ref_hidden)(?=.*ref_head)"),
    ("ref-rows", {"ref_hidden": RH[:3]}, r"(?is)ref_hidden.*\(3, 3\)"),
    ("labels-shape", {"labels": LABELS[:3]}, r"(?is)labels.*\(3,\)"),
    ("labels-unshifted", {"policy_hidden": H[None, :-1], "ref_hidden": RH[None, :-1], "labels": LABELS[None]}, r"(?is)labels"),
    ("labels-float", {"labels": LABELS.float()}, r"(?is)labels.*float32"),
    ("labels-elsewhere", {"labels": LABELS.to("meta")}, r"(?is)labels.*meta|meta.*labels"),
    ("head-elsewhere", {"policy_head": W.to("meta")}, r"(?is)policy_head.*meta"),
    ("widths", {"ref_head": RW[:6]}, r"(?is)(?=.*vocab_size)(?=.*7)(?=.*6)"),
    ("vocab-size-too-large", {"vocab_size": 8}, r"(?is)vocab_size.*8"),
    ("vocab-size-zero", {"vocab_size": 0}, r"(?is)vocab_size.*0"),
    ("vocab-size-of-head-too-large", {"policy_head": lambda: LMHead(W, vocab_size=8)}, r"(?is)vocab_size.*8"),
    ("vocab-size-of-call-and-head", {"policy_head": LMHead(W, vocab_size=6), "vocab_size": 5}, r"(?is)vocab_size.*[56].*[56]"),
    ("vocab-size-of-two-heads",
     {"policy_head": LMHead(W, vocab_size=6), "ref_head": LMHead(RW, vocab_size=5)}, r"(?is)(?=.*6)(?=.*5)"),
    ("bias-shape", {"policy_head": lambda: LMHead(W, torch.zeros(D))}, r"(?is)bias.*\(3,\)"),
    ("scale-nan", {"policy_head": lambda: LMHead(W, scale=float("nan"))}, r"(?is)scale.*nan"),
    ("softcap-zero", {"policy_head": lambda: LMHead(W, softcap=0.0)}, r"(?is)softcap.*0"),
    ("weight-of-one-axis", {"policy_head": lambda: LMHead(W[0])}, r"(?is)weight.*\(3,\)"),
    ("temperature", {"temperature": 0.0}, r"(?is)temperature.*0"),
    ("divergence", {"divergence": "tv"}, r"(?is)(?=.*divergence)(?=.*forward_kl)(?=.*tv)"),
    ("divergence-alpha", {"divergence_alpha": 0.5}, r"(?is)divergence_alpha.*0\.5"),
    ("extras", {"extras": ("loss",)}, r"(?is)extras.*loss"),
    ("extras-without-reference", {"ref_hidden": None, "ref_head": None, "extras": ("ref_entropy",)}, r"(?is)ref_entropy"),
    ("backend", {"backend": "cuda"}, r"(?is)(?=.*backend)(?=.*triton)(?=.*cuda)"),
    ("chunk-of-nothing", {"max_chunk_bytes": 0}, r"(?is)max_chunk_bytes.*0"),
    ("chunk-negative", {"max_chunk_bytes": -1}, r"(?is)max_chunk_bytes.*-1"),
    ("logits-dtype", {"logits_dtype": torch.int32}, r"(?is)logits_dtype.*int32"),
    ("valid-rows-negative", {"valid_rows": -1}, r"(?is)valid_rows.*-1"),
    ("valid-rows-too-many", {"valid_rows": 5}, r"(?is)valid_rows.*5"),
    ("valid-rows-of-another-count", {"valid_rows": 2}, r"(?is)valid_rows.*2"),
    ("valid-rows-float", {"valid_rows": 3.5}, r"(?is)valid_rows.*(3\.5|float)"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED])
def test_bad_calls_are_refused(changes: dict[str, Any], message: str):
    # On the host, before any product: what was expected, what came.
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        call(**{name: value() if _makes(value) else value for name, value in changes.items()})
    assert len(str(raised.value)) >= 40, f"the message does not say what to do: {raised.value}"


def _makes(value: object) -> bool:
    """A function that makes the argument, since making it is what must be refused."""
    return callable(value) and not isinstance(value, torch.nn.Module)


@pytest.mark.interpreter
def test_triton_refuses_float64():
    with pytest.raises((TypeError, ValueError), match=r"(?is)float64"):
        call(**{name: t.double() for name, t in GOOD.items() if name != "labels"}, backend="triton")


def test_a_good_call_is_not_refused():
    # Guards the table above: nothing in `GOOD` is refused by itself.
    stats = call(check_labels=True, valid_rows=3, max_chunk_bytes=1, logits_dtype=fp32)
    assert stats.kl.shape == (N,)
    assert stats.logp[1] == 0
