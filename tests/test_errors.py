"""Errors are part of the product: refused on the host before any launch, saying what was expected, what came, and what to do.

Patterns look for these three parts, not for sentences. `refused` also asks that a message is readable: it names the offender,
and is no traceback of somebody else's assertion.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_tdpo
from contract_token_stats import kl_from_delta, noise
from fused_tdpo import TokenStats, token_stats

N, V = 4, 13
POLICY, REF = noise(N, V, seed=1), noise(N, V, seed=2)
LABELS = torch.tensor([1, -100, 0, 12])

BACKENDS = ["reference", "torch", "auto", pytest.param("triton", marks=pytest.mark.interpreter)]
everywhere = pytest.mark.parametrize("backend", BACKENDS)


@contextmanager
def refused(*parts: str, kind: type[Exception] | tuple[type[Exception], ...] = ValueError) -> Iterator[None]:
    """Expect an error whose message matches every part, whatever their order and their case."""
    with pytest.raises(kind) as raised:
        yield
    message = str(raised.value)
    missing = [part for part in parts if not re.search(part, message, re.IGNORECASE | re.DOTALL)]
    assert not missing, f"the message lacks {missing}: {message}"
    assert len(message) >= 40, f"the message does not say what to do: {message}"


def call(*args: Any, backend: str = "auto", **options: Any) -> TokenStats:
    return token_stats(*args, backend=backend, **options)


# --- shapes ----------------------------------------------------------------------------------------------------------------


@everywhere
def test_labels_with_a_trailing_axis(backend):
    # (N, 1) would broadcast against (N,) into (N, N) anywhere that does not check.
    with refused("labels", r"\(4,\)", r"\(4, 1\)", "squeeze"):
        call(POLICY, REF, LABELS[:, None], backend=backend)


@everywhere
@pytest.mark.parametrize(
    ("labels", "came"),
    [(LABELS[:3], r"\(3,\)"), (LABELS[0], r"\(\)"), (LABELS.view(2, 2), r"\(2, 2\)")],
    ids=["short", "scalar", "square"],
)
def test_labels_of_another_shape(backend, labels, came):
    with refused("labels", r"\(4,\)", came):
        call(POLICY, REF, labels, backend=backend)


@everywhere
def test_unshifted_labels(backend):
    # The ops never shift: labels of T + 1 positions for logits of T are told where to shift.
    with refused("labels", r"\(2, 5\)", r"\(2, 4\)"):
        call(noise(2, 4, V, seed=1), noise(2, 4, V, seed=2), torch.zeros(2, 5, dtype=torch.int64), backend=backend)


@everywhere
@pytest.mark.parametrize(
    ("shape", "came"), [((3, V), r"\(3, 13\)"), ((2, 2, V), r"\(2, 2, 13\)"), ((V,), r"\(13,\)")], ids=["rows", "axes", "one"]
)
def test_a_reference_of_another_shape(backend, shape, came):
    with refused("ref_logits", r"\(4, 13\)|\(4,", came):
        call(POLICY, noise(*shape, seed=2), LABELS, backend=backend)


@everywhere
def test_widths_that_differ(backend):
    # Padded vocabularies; the way out is an option.
    with refused("13", "16", "vocab_size"):
        call(POLICY, noise(N, 16, seed=2), LABELS, backend=backend)


@everywhere
@pytest.mark.parametrize("ref_width", [13, 11, 16])
def test_vocab_size_beyond_the_logits(backend, ref_width):
    # Wider than the narrower of the two.
    with refused("vocab_size", "14", str(min(13, ref_width))):
        call(POLICY, noise(N, ref_width, seed=2), LABELS, vocab_size=14, backend=backend)


@everywhere
@pytest.mark.parametrize("vocab_size", [0, -1])
def test_vocab_size_below_one(backend, vocab_size):
    with refused("vocab_size", str(vocab_size)):
        call(POLICY, REF, LABELS, vocab_size=vocab_size, backend=backend)


@everywhere
def test_logits_without_an_axis(backend):
    with refused("policy_logits", r"\(\)|0-dim"):
        call(torch.tensor(1.0), None, torch.tensor(0), backend=backend)


@everywhere
@pytest.mark.parametrize("which", ["policy_logits", "ref_logits"])
@pytest.mark.parametrize("how", ["transposed", "strided"])
def test_a_last_axis_that_is_not_contiguous(backend, which, how):
    # It would need a copy of N*V that nobody asked for: say so, and let the caller decide.
    bad = noise(V, N, seed=3).T if how == "transposed" else noise(N, 2 * V, seed=3)[:, ::2]
    tensors = (bad, REF) if which == "policy_logits" else (POLICY, bad)
    with refused(which, "contiguous", r"\.contiguous\(\)|copy"):
        call(*tensors, LABELS, backend=backend)


# --- dtypes ----------------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int16], ids=str)
def test_labels_that_are_no_labels(backend, dtype):
    with refused("labels", "int64", str(dtype).removeprefix("torch."), kind=(TypeError, ValueError)):
        call(POLICY, REF, LABELS.to(dtype), backend=backend)


@everywhere
@pytest.mark.parametrize("which", ["policy_logits", "ref_logits"])
def test_logits_that_are_integers(backend, which):
    bad = torch.zeros(N, V, dtype=torch.int64)
    tensors = (bad, REF) if which == "policy_logits" else (POLICY, bad)
    with refused(which, "float", "int64", kind=(TypeError, ValueError)):
        call(*tensors, LABELS, backend=backend)


@everywhere
@pytest.mark.parametrize(
    ("args", "name"),
    [
        ((POLICY.tolist(), REF, LABELS), "policy_logits"),
        ((POLICY, REF.tolist(), LABELS), "ref_logits"),
        ((POLICY, REF, [1, 2, 3, 4]), "labels"),
    ],
    ids=["policy", "reference", "labels"],
)
def test_no_tensors(backend, args, name):
    with refused(name, "list", "tensor", kind=(TypeError, ValueError)):
        call(*args, backend=backend)


@everywhere
def test_labels_before_the_reference(backend):
    # The likeliest slip of all: token_stats(logits, labels, ref_logits).
    with refused("label", "swap|order|position|argument", kind=(TypeError, ValueError)):
        call(POLICY, LABELS, REF, backend=backend)


@everywhere
def test_labels_first(backend):
    with refused("label|policy_logits", "int64", kind=(TypeError, ValueError)):
        call(LABELS, POLICY, REF, backend=backend)


# --- devices ---------------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("which", ["policy", "reference", "labels"])
def test_devices_that_differ(backend, which):
    args = [t.to("meta") if name == which else t for name, t in (("policy", POLICY), ("reference", REF), ("labels", LABELS))]
    with refused("device", "cpu", "meta", kind=(ValueError, RuntimeError)):
        call(*args, backend=backend)


# --- options ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda", "Triton", "", None])
def test_an_unknown_backend(name):
    with refused("backend", "auto", "triton", "torch", "reference", kind=(TypeError, ValueError)):
        call(POLICY, REF, LABELS, backend=name)


@everywhere
@pytest.mark.parametrize("extras", [("entropies",), ("entropy", "kl"), ("logp",)], ids="-".join)
def test_unknown_extras(backend, extras):
    # Fields that are always there are not extras.
    with refused(extras[-1], "entropy", "ref_entropy", "accuracy", "mean_logit", "log_sum_sq_probs"):
        call(POLICY, REF, LABELS, extras=extras, backend=backend)


@everywhere
def test_extras_that_need_a_reference(backend):
    with refused("ref_entropy", "ref_logits|reference"):
        call(POLICY, None, LABELS, extras=("ref_entropy",), backend=backend)


@everywhere
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none(backend, temperature):
    # NaN compares false to everything: a check written the wrong way round lets it in.
    with refused("temperature", "positive|> 0|greater", re.escape(str(temperature))):
        call(POLICY, REF, LABELS, temperature=temperature, backend=backend)


@everywhere
@pytest.mark.parametrize("divergence", ["forward", "kl", "Forward_KL", ""])
def test_an_unknown_divergence(backend, divergence):
    with refused("divergence", "forward_kl", kind=(ValueError, NotImplementedError)):
        call(POLICY, REF, LABELS, divergence=divergence, backend=backend)


@everywhere
@pytest.mark.parametrize("alpha", [None, float("nan"), float("inf"), "half"])
def test_an_alpha_that_is_none(backend, alpha):
    with refused("divergence_alpha", str(alpha)):
        call(POLICY, REF, LABELS, divergence="alpha", divergence_alpha=alpha, backend=backend)


@everywhere
@pytest.mark.parametrize(("divergence", "alpha"), [("reverse_kl", None), ("js", None), ("alpha", 0.5)])
def test_another_divergence_is_right_or_refused_by_name(backend, divergence, alpha):
    # Never silently the forward KL.
    labels = torch.zeros(N, dtype=torch.int64)
    try:
        kl = call(POLICY, REF, labels, divergence=divergence, divergence_alpha=alpha, backend=backend).kl
    except (ValueError, NotImplementedError) as error:
        message = str(error)
        assert divergence in message, f"which divergence? {message}"
        assert "forward_kl" in message, f"and which instead? {message}"
        return
    x, z = POLICY.double(), REF.double()
    p, q, m = x.softmax(-1), z.softmax(-1), (x.softmax(-1) + z.softmax(-1)) / 2
    expected = {
        "reverse_kl": kl_from_delta(z, x),
        "js": (kl_from_delta(m.log(), z) + kl_from_delta(m.log(), x)) / 2,
        "alpha": ((p**0.5 * q**0.5).sum(-1) - 1) / (0.5 * (0.5 - 1)),
    }[divergence]
    assert kl.tolist() == pytest.approx(expected.tolist(), rel=1e-4)


@everywhere
def test_alpha_divergence_without_its_alpha(backend):
    with refused("alpha", kind=(ValueError, NotImplementedError)):
        call(POLICY, REF, LABELS, divergence="alpha", backend=backend)


@everywhere
def test_an_alpha_that_nothing_uses(backend):
    # No option is silently ignored.
    with refused("divergence_alpha", "forward_kl", kind=(ValueError, NotImplementedError)):
        call(POLICY, REF, LABELS, divergence_alpha=0.5, backend=backend)


def test_in_place_gradients_of_the_naive_code():
    with refused("inplace_backward", "reference", "torch|triton|auto", kind=(ValueError, NotImplementedError)):
        call(POLICY, REF, LABELS, inplace_backward=True, backend="reference")


@everywhere
def test_options_are_keywords(backend):
    with pytest.raises(TypeError, match="positional"):
        call(POLICY, REF, LABELS, -100, backend=backend)


@everywhere
def test_options_that_do_not_exist(backend):
    with pytest.raises(TypeError, match="unexpected keyword"):
        call(POLICY, REF, LABELS, beta=0.1, backend=backend)


# --- labels ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("bad", [13, -1, -101, 1 << 40])
def test_a_label_out_of_range(backend, bad):
    # Which one, what range, and the likely cause: another ignore_index.
    labels = LABELS.clone()
    labels[2] = bad
    with refused("label", str(bad), "13", "ignore_index"):
        call(POLICY, REF, labels, backend=backend)


@everywhere
def test_a_label_out_of_range_that_is_to_be_checked(backend):
    labels = LABELS.clone()
    labels[2] = 13
    with refused("label", "13", "ignore_index"):
        call(POLICY, REF, labels, check_labels=True, backend=backend)


# --- a named backend never falls back --------------------------------------------------------------------------------------

TRITON_ON_CPU = """
import torch, fused_tdpo
fused_tdpo.token_stats(torch.zeros(2, 3), None, torch.zeros(2).long(), backend="triton")
"""


@pytest.mark.parametrize(
    ("before", "says"),
    [
        pytest.param("", "cuda|gpu", id="cpu-tensors-and-no-interpreter"),
        pytest.param("import sys; sys.modules['triton'] = None", "install", id="no-triton"),
    ],
)
def test_triton_by_name_where_it_cannot_run(before, says, compiler_env):
    # In a fresh process: whether Triton interprets is decided when it is first imported.
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), root])
    command, env = [sys.executable, "-P", "-c", before + TRITON_ON_CPU], {**compiler_env, "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode != 0, "it ran, so it ran on something else"
    error = done.stderr.strip().splitlines()[-1]
    assert re.search("triton", error, re.IGNORECASE), error
    assert re.search(says, error, re.IGNORECASE), error
    assert re.search("torch|reference|auto|TRITON_INTERPRET|install", error), f"no next step: {error}"


# -------------------------------------------------------------------------------------------------------------- the next step


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda x, y: fused_tdpo.token_stats(x, x, y[:, 1:]), r"Pad rather than slice: F\.pad\(labels"),
        (lambda x, y: fused_tdpo.token_stats(x, x, y.float()), r"\.long\(\)"),
        (lambda x, y: fused_tdpo.token_stats(x, torch.zeros(4), y), "ref_logps=.*None"),
        (
            lambda x, y: fused_tdpo.linear_token_stats(x, torch.zeros(9, 20), None, None, y),
            r"transposed\? It is \(V, D\).*\.t\(\)",
        ),
        (lambda x, y: fused_tdpo.DPOLoss()(x[0], x[0], y[0], cu_seqlens=torch.tensor([2, 3])), r"From lengths \(S,\)"),
        (lambda x, y: fused_tdpo.DPOLoss(loss_type="simpo"), "SimPOLoss"),
        (lambda x, y: fused_tdpo.TDPOLoss(loss_type="tdpo1"), r"TDPOLoss\(variant='tdpo1'\)"),
        (lambda x, y: fused_tdpo.DPOLoss(loss_type="dpo"), "'sigmoid'"),
        (lambda x, y: fused_tdpo.KTOLoss(reduction="none"), r"out\.losses"),
    ],
)
def test_hints(call, hint):
    x, y = torch.zeros(4, 5, 9), torch.zeros(4, 5, dtype=torch.int64)
    with pytest.raises((TypeError, ValueError), match=f"(?s){hint}"):
        call(x, y)
