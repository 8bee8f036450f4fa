"""How often the Triton kernels compile: which arguments of a launch make another kernel of it, and which must not.

Triton specialises a kernel for types, for integers that are 1 or divisible by 16, and for aligned pointers, unless told not
to. A model whose batches differ in length would compile again and again in the midst of training. No GPU is needed to see this:
the launches are recorded, and Triton's own binder says which compiled kernel each would use.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
EXTRAS = ("entropy", "ref_entropy", "accuracy", "mean_logit", "log_sum_sq_probs")
PAIRS = {
    "bf16": (bf16, bf16),
    "fp16": (fp16, fp16),
    "fp32": (fp32, fp32),
    "bf16-fp32": (bf16, fp32),
    "no-reference": (bf16, None),
}

WIDTHS = {  # warps -> vocabularies, with and without whole 16-byte groups: that decides between the wide and the narrow variant
    1: (1, 3, 8, 16, 512, 1000, 1023, 1024),
    2: (1025, 1032, 16_384, 32_000, 32_003, 32_768),
    4: (32_769, 50_257, 65_536, 128_256, 151_936, 262_144, 1_048_576, 1_048_577, 3_000_000),
}
ROWS = (1, 2, 3, 16, 17, 4096, 70_001)


# ------------------------------------------------------------------------------------ in a process that does not interpret


def calls() -> Iterator[tuple[str, dict]]:
    """(group, arguments of `launch`). One group is what must not compile twice."""
    for name, (dtype, ref_dtype) in PAIRS.items():
        for V in (V for group in WIDTHS.values() for V in group):
            yield name, {"N": 3, "V": V, "dtype": dtype, "ref_dtype": ref_dtype}
    for warps, widths in WIDTHS.items():
        for V in widths:
            yield f"V, {warps} warps, wide" if V % 8 == 0 else f"V, {warps} warps, narrow", {"V": V}
    for N in ROWS:
        yield "N", {"N": N}
        yield "N, two axes", {"N": N, "outer": 3}
    for temperature in (1.0, 0.7, 2.0, 16.0):
        yield "temperature", {"temperature": temperature}
    for ignore_index in (-100, 0, 1, 16, 2**40):
        yield "ignore_index", {"ignore_index": ignore_index}
    for pitch in (1024, 1032, 1040, 2048, 2**31, 2**31 + 8, 2**33):
        yield "wide pitch", {"V": 1024, "pitch": pitch}
        yield "wide pitch, two axes", {"V": 1024, "pitch": pitch, "outer": 2}
    for pitch in (1025, 1026, 1039, 2**31 + 1):
        yield "narrow pitch", {"V": 1024, "pitch": pitch}
    for offset in (0, 8, 16, 40):
        yield "wide offset", {"N": 2, "offset": offset, "device": "cpu"}
    for offset in (1, 2, 3, 4, 9):
        yield "narrow offset", {"N": 2, "offset": offset, "device": "cpu"}
    for vector_offset in (0, 1, 2, 4):  # of labels, outputs, upstream gradients: a part of a larger vector, say
        yield "offset of row vectors", {"N": 5, "vector_offset": vector_offset, "device": "cpu"}
    for cap in (1.0, 16.0, 30.0, 50.0):
        yield "softcap", {"softcaps": (cap, 30.0)}
        yield "softcap without reference", {"softcaps": (30.0, cap), "ref_dtype": None}
    yield "softcap without reference", {"softcaps": (30.0, None), "ref_dtype": None}
    for alpha in (-1.0, 0.0625, 0.3, 0.5):
        yield "alpha", {"divergence": ("alpha", alpha)}
    for alpha in (0.7, 1.5, 2.0, 16.0):
        yield "alpha above a half", {"divergence": ("alpha", alpha)}
    for N, V in ((1, 1024), (16, 1024), (3, 512), (6, 16)):
        yield "js", {"divergence": ("js", 0.0), "N": N, "V": V}
        yield "reverse KL", {"divergence": ("reverse_kl", 0.0), "N": N, "V": V}
    yield "extras", {"extras": EXTRAS}
    yield "logp alone", {"with_kl": False}


def observe() -> dict[str, dict[str, list]]:
    """Group -> kernel -> its distinct keys: what Triton looks a compiled kernel up by."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from fused_tdpo.kernels import token_stats as kernels

    backend = make_backend(GPUTarget("cuda", 90, 32))
    seen: dict[str, dict[str, list]] = {}

    def launch(
        group, N=6, V=1024, dtype=bf16, ref_dtype=bf16, pitch=0, outer=1, offset=0, vector_offset=0, device="meta", extras=(),
        with_kl=True, temperature=1.0, ignore_index=-100, softcaps=(None, None),
        divergence=("forward_kl", 0.0),
    ):  # fmt: skip
        def record(kernel, programs, **args):
            bind = create_function_from_signature(kernel.signature, kernel.params, backend)
            bound, specialization, options = bind(**args, debug=False)
            arguments = dict(zip(bound, map(list, specialization), strict=True))
            step = kernel.__name__.removeprefix("token_stats_").removesuffix("_kernel")
            keys = seen.setdefault(group, {}).setdefault(step, [])
            if (key := {**arguments, "options": options}) not in keys:
                keys.append(key)

        def logits(dtype):  # meta: no memory
            memory = torch.empty(offset + outer * N * (pitch or V), dtype=dtype, device=device)[offset:]
            return memory.view(outer, N, pitch or V)[..., :V]

        def vector(*shape, dtype=torch.float32, device=device):
            shape = torch.Size(*shape) if isinstance(shape[0], tuple) else torch.Size(shape)
            return torch.empty(shape.numel() + vector_offset, dtype=dtype, device=device)[vector_offset:].view(shape)

        kernels._launch, kernels.empty = record, vector
        policy, ref, labels = logits(dtype), logits(ref_dtype) if ref_dtype else None, vector(outer * N, dtype=torch.int64)
        common = {"V": V, "ignore_index": ignore_index, "temperature": temperature, "softcaps": softcaps}
        common["divergence"] = divergence
        _, saved = kernels.token_stats_fwd(policy, ref, labels, extras=extras, **common)
        g_logp, g_kl = vector(outer * N), vector(outer * N) if with_kl and ref_dtype else None
        kernels.token_stats_bwd(policy, ref, labels, saved, g_logp, g_kl, policy, **common)

    for group, arguments in calls():
        launch(group, **arguments)
    return seen


if __name__ == "__main__":
    json.dump(observe(), sys.stdout)
    sys.exit()


# ---------------------------------------------------------------------------------------------------------------- the tests

pytestmark = pytest.mark.compile


@cache
def observed_under(env: tuple[tuple[str, str], ...]) -> dict[str, dict[str, list]]:
    import fused_tdpo

    path = os.pathsep.join([str(Path(fused_tdpo.__file__).parents[1]), *filter(None, [dict(env).get("PYTHONPATH")])])
    run = subprocess.run([sys.executable, __file__], env=dict(env) | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture
def observed(compiler_env: dict[str, str]) -> dict[str, dict[str, list]]:
    return observed_under(tuple(sorted((name, value) for name, value in compiler_env.items() if name != "PYTEST_CURRENT_TEST")))


def differences(keys: list[dict]) -> dict[str, list]:
    """What tells keys apart: argument -> its specialisations."""
    every = {name: [key[name] for key in keys] for name in keys[0]}
    return {name: values for name, values in every.items() if any(value != values[0] for value in values)}


@pytest.mark.parametrize("group", dict.fromkeys(group for group, _ in calls() if group not in PAIRS))
def test_compiles_once(group, observed):
    """... for any values of what the group is named after."""
    for step, keys in observed[group].items():
        assert len(keys) == 1, f"{step} compiles {len(keys)} times: {differences(keys)}"
    second_pass = {"compare", "settle"} if group in ("js", "alpha", "alpha above a half") else set()
    assert set(observed[group]) == {"fold", "finish", "bwd"} | second_pass


def test_what_divergences_share(observed):
    """The first pass of "js" and "alpha" is KL(q || p)'s own, kernel for kernel; KL(p || q) exchanges roles in all three."""
    for group in ("js", "alpha", "alpha above a half"):
        assert observed[group]["fold"][0] in observed["bf16"]["fold"] + observed["N"]["fold"], group
    for step in ("fold", "finish", "bwd"):
        assert observed["reverse KL"][step][0] not in observed["bf16"][step] + observed["js"][step], step


@pytest.mark.parametrize("pair", PAIRS)
def test_variants_of_a_dtype_pair(pair, observed):
    """Rows are aligned or not, and V decides between 1, 2 and 4 warps: six variants. Merging records depends on neither."""
    assert {step: len(keys) for step, keys in observed[pair].items()} == {"fold": 6, "finish": 1, "bwd": 6}
    for step in ("fold", "bwd"):
        keys = observed[pair][step]
        variants = {(key["WIDE"][1], key["options"]["num_warps"]) for key in keys}
        assert variants == {(wide, warps) for wide in (False, True) for warps in WIDTHS}
        assert set(differences(keys)) == {"K", "T", "E", "WIDE", "options"}, "something else makes a variant"


def test_other_dtypes_and_options_do_compile_again(observed):
    # Else the counter counts nothing.
    for step, others in (
        ("fold", ("extras", "softcap")),
        ("finish", ("extras", "softcap")),
        ("bwd", ("logp alone", "softcap")),
    ):
        for other in (*others, *(pair for pair in PAIRS if pair != "bf16")):
            assert not [key for key in observed[other][step] if key in observed["bf16"][step]], (step, other)


@pytest.mark.parametrize("group", ["wide pitch", "narrow pitch", "N"])
def test_offsets_are_64_bit(group, observed):
    """Whatever their values: an offset that outgrows 32 bits would else be another type, and another compilation, or wrong."""
    for step, keys in observed[group].items():
        offsets = [name for name in keys[0] if name.endswith(("_outer", "_inner", "field_stride"))]
        assert len(offsets) == {"fold": 5, "finish": 5, "bwd": 6}[step]
        assert {tuple(key[name]) for key in keys for name in offsets} == {("i64", None)}
