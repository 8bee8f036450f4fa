"""The compile audit: the kernels keep their budget on every target, and the audit would notice if they did not."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # as its programs see each other

import audit  # noqa: E402

# --------------------------------------------------------------------------------------------------------- reading assembly

SASS = """
.text.toy:
	//## File "/somewhere/toy.py", line 3
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
	//## File "/somewhere/toy.py", line 5
        /*0020*/              @!P2 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.U16 R8, desc[UR4][R2.64+0x10] ;
        /*0040*/                   NOP ;
	//## File "/elsewhere/standard.py", line 263
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/                   SHFL.BFLY PT, R5, R4, 0x10, 0x1f ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/                   STS [R7], R5 ;
        /*0090*/                   LDL.LU R9, [R1] ;
        /*00a0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00b0*/                   BRA.U UP0, `(.L_x_0) ;
.L_x_1:
        /*00c0*/                   EXIT ;
.L_x_2:
        /*00d0*/                   BRA `(.L_x_2) ;
"""

AMDGCN = """
toy:                                    ; @toy
; %bb.0:
	.loc	1 3 0 prologue_end              ; toy.py:3:0
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	.loc	2 263 15 is_stmt 1              ; standard.py:263:15 @[ toy.py:5:10 ]
	global_load_dwordx4 v[4:7], v[0:1], off
	buffer_load_ushort v8, v9, s[4:7], 0 offen
	s_waitcnt vmcnt(0)
	v_exp_f32_e32 v4, v4
	v_mov_b32_dpp v5, v4 row_shr:8 row_mask:0xf bank_mask:0xf
	ds_bpermute_b32 v5, v6, v5
	s_barrier
	ds_write_b32 v7, v5
	scratch_load_dword v9, off, off
	global_store_dwordx2 v[0:1], v[4:5], off
	s_cbranch_scc1 .LBB0_1
.LBB0_2:
	s_endpgm
"""


def test_sass_is_read():
    whole, (loop, trap) = audit.parse(SASS, audit.SASS)
    assert whole.instructions == 13  # all but the NOP
    assert loop.instructions == 9
    assert loop.kinds == Counter(load=2, store=1, sfu=1, shuffle=1, barrier=1, shared=1, local=1, other=2)
    assert (loop.loads, loop.stores) == (Counter({128: 1, 16: 1}), Counter({64: 1}))
    assert loop.bytes_moved == (18, 8)
    assert loop.opcodes["LDG"] == 2
    assert loop.lines == Counter({("toy.py", 5): 2, ("standard.py", 263): 7})
    assert trap.instructions == 1


def test_amdgcn_is_read():
    whole, (loop,) = audit.parse(AMDGCN, audit.AMDGCN)
    assert whole.instructions == loop.instructions == 8  # scalar instructions issue beside them
    assert loop.kinds == Counter(load=2, store=1, sfu=1, shuffle=2, barrier=1, shared=1, local=1, other=2)
    assert (loop.loads, loop.stores) == (Counter({128: 1, 16: 1}), Counter({64: 1}))
    assert loop.lines == Counter({("standard.py", 263): 8})


# ----------------------------------------------------------------------------------------------------- choosing the main loop

CASE = audit.Case("toy", kernel=None, args={}, pairs=512, reads=4, writes=2, width=128)


def loop(instructions: int, loads: int, stores: int, **kinds: int) -> audit.Loop:
    """A loop with so many instructions, 128-bit loads and stores."""
    return audit.Loop(instructions, Counter(kinds), loads=Counter({128: loads}), stores=Counter({128: stores}))


def test_main_loop_is_the_cheapest_that_moves_each_logit_once():
    both, masked, policy_only, zeros = loop(200, 4, 2), loop(300, 4, 2), loop(120, 2, 2), loop(20, 0, 2)
    assert audit.main_loop([zeros, policy_only, masked, both], CASE, pairs=16) == (both, 16)


def test_main_loop_may_be_unrolled():
    unrolled = loop(390, 8, 4)
    assert audit.main_loop([loop(200, 4, 2), unrolled], CASE, pairs=16) == (unrolled, 32)


@pytest.mark.parametrize("loops", [[], [loop(200, 6, 2)], [loop(200, 4, 4)], [loop(200, 2, 1)]])
def test_no_main_loop(loops: list[audit.Loop]):
    """None at all; x read twice; the gradient written twice; half a tile per thread."""
    found, pairs = audit.main_loop(loops, CASE, pairs=16)
    assert pairs == 0
    report = audit.Report("toy", "sm_90", 32, 0, 0, 0, found, pairs)
    assert audit.failures(report, CASE) == ["no loop reads 4 and writes 2 bytes a pair: not once, or not in a loop"]


# -------------------------------------------------------------------------------------------------------- judging the figures

LIMITS = audit.Limits(instructions=14, sfu=2.1, registers=40)
GOOD = audit.Report("toy", "sm_90", 40, 0, 0, 0, loop(14 * 16, 4, 2, sfu=2 * 16), pairs=16)


def test_good_report_passes():
    assert audit.failures(GOOD, replace(CASE, limits=LIMITS)) == []


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        ({"spilled": 8}, "8 bytes spilled"),
        ({"registers": 41}, "41 registers, limit 40"),
        ({"loop": loop(14 * 16 + 1, 4, 2)}, "14.06 instructions a pair, limit 14"),
        ({"loop": loop(200, 4, 2, sfu=35)}, "2.188 special functions a pair, limit 2.1"),
        ({"loop": loop(200, 4, 2, shuffle=5)}, "5 shuffle instructions in the main loop"),
        ({"loop": loop(200, 4, 2, barrier=1)}, "1 barrier instructions in the main loop"),
        ({"loop": loop(200, 4, 2, shared=2)}, "2 shared instructions in the main loop"),
        ({"loop": loop(200, 4, 2, local=3)}, "3 local instructions in the main loop"),
        ({"loop": audit.Loop(200, loads=Counter({128: 4}), stores=Counter({16: 16}))}, "16-bit accesses, 128 are possible"),
    ],
)
def test_what_fails(change: dict[str, object], failure: str):
    assert audit.failures(replace(GOOD, **change), replace(CASE, limits=LIMITS)) == [failure]


def test_limits_are_those_of_sm_90_and_a_kernel_without_a_loop_has_only_to_fit():
    assert audit.failures(replace(GOOD, target="sm_80", registers=255), replace(CASE, limits=LIMITS)) == []
    assert audit.failures(replace(GOOD, loop=audit.Loop(), pairs=0), replace(CASE, pairs=0)) == []


def test_budget():
    """What DESIGN.md section 6 promises. Kernels get better or the budget is argued; it does not grow here."""
    forward, backward = audit.FORWARD, audit.BACKWARD
    assert (forward.instructions, forward.sfu, forward.registers) == (28, 2.3, 72)
    assert (backward.instructions, backward.sfu, backward.registers) == (14, 2.1, 40)


def test_budget_of_a_softcap():
    """Sixteen instructions a logit, two of them special functions; backward has the slope of x on top."""
    forward, backward = audit.CAPPED_FORWARD, audit.CAPPED_BACKWARD
    assert (forward.instructions, forward.sfu, forward.registers) == (28 + 2 * 16 + 2, 2.3 + 2 * 2, 128)
    assert (backward.instructions, backward.sfu, backward.registers) == (14 + 2 * 16 + 4, 2.1 + 2 * 2, 128)


# ------------------------------------------------------------------------------------------------------------------ compiling


def run(code: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A Python program in which Triton compiles, in a process of its own: here it may interpret."""
    path = f"{ROOT}:{ROOT / 'benchmarks'}"
    return subprocess.run([sys.executable, *code], cwd=ROOT, env=env | {"PYTHONPATH": path}, capture_output=True, text=True)


@pytest.mark.compile
@pytest.mark.parametrize(
    "options",
    [
        ["--case", "fold bf16", "--case", "bwd bf16"],
        ["--case", "fp32", "--case", "bf16-narrow", "--case", "fp32-to-bf16", "--case", "bf16-to-fp32", "--target", "sm_90"],
        ["--case", "fold bf16-capped", "--case", "bwd bf16-capped", "--case", "bwd fp32-to-bf16-capped"],
        ["--case", "bf16-extras-capped", "--case", "bf16-narrow-capped", "--target", "sm_100"],
        ["--case", "bf16-narrow-reverse-kl", "--case", "bf16-narrow-js", "--target", "sm_100"],
        ["--case", "bf16-reverse-kl", "--case", "bf16-js", "--case", "bf16-alpha-above-half"],
        [
            "--case",
            "fp32-reverse-kl",
            "--case",
            "bf16-fp32-reverse-kl",
            "--case",
            "fp32-narrow-reverse-kl",
            "--target",
            "sm_100",
        ],
        ["--case", "bf16-32k-reverse-kl", "--case", "bf16-32k-js", "--case", "bf16-alpha", "--target", "sm_90"],
        ["--case", "scaled_copy"],
    ],
    ids=[
        "bf16-everywhere",
        "others-on-sm_90",
        "capped-everywhere",
        "capped-others-on-sm_100",
        "narrow-divergences-on-sm_100",
        "divergences-everywhere",
        "others-of-reverse-kl-on-sm_100",
        "divergences-of-short-rows-on-sm_90",
        "scaled_copy-everywhere",
    ],
)
def test_kernels_keep_their_budget(options: list[str], compiler_env: dict[str, str], tmp_path: Path):
    record = tmp_path / "audit.json"
    result = run(["benchmarks/audit.py", *options, "--json", str(record)], compiler_env)
    assert result.returncode == 0, result.stdout + result.stderr
    reports = json.loads(record.read_text())["reports"]
    assert len(reports) >= 6
    without_a_loop = ("finish", "settle", "scaled_copy")
    assert all(report["pairs"] for report in reports if not any(name in report["case"] for name in without_a_loop))


TOY = """
import json

import torch
import triton
import triton.language as tl

import audit


@triton.jit
def toy_kernel(x_ptr, z_ptr, out_ptr, V, T: tl.constexpr, E: tl.constexpr, BLOCK_WIDE: tl.constexpr):
    column = tl.arange(0, T)[:, None] * E + tl.arange(0, E)[None, :]
    total, of_thread = 0.0, tl.zeros([T], tl.float32)
    for i in range(0, V // (T * E)):
        x = tl.load(x_ptr + i * (T * E) + column).to(tl.float32)
        z = tl.load(z_ptr + i * (T * E) + column).to(tl.float32)
        difference = tl.sum(tl.exp2(x) - tl.exp2(z), axis=1)
        if BLOCK_WIDE:
            total += tl.sum(difference, axis=0)
        else:
            of_thread += difference
    tl.store(out_ptr, total + tl.sum(of_thread, axis=0))


def failures(target, block_wide, instructions):
    x, z = (torch.empty(4096, dtype=torch.bfloat16) for _ in range(2))
    num_warps = 256 // audit.TARGETS[target][2]
    args = dict(x_ptr=x, z_ptr=z, out_ptr=torch.empty(1), V=4096, T=256, E=8, BLOCK_WIDE=block_wide, num_warps=num_warps)
    limits = audit.Limits(instructions=instructions)
    return audit.audit(audit.Case("toy", toy_kernel, args, pairs=256 * 8, reads=4, width=128, limits=limits), target).failures


variants = {"good": (False, 10), "tight": (False, 3), "block-wide": (True, 10)}
print(json.dumps({name: {t: failures(t, *variant) for t in ("sm_90", "gfx942")} for name, variant in variants.items()}))
"""


@pytest.mark.compile
def test_audit_notices_a_bad_kernel(compiler_env: dict[str, str], tmp_path: Path):
    """A block-wide reduction in the loop, and a limit that no kernel could keep."""
    toy = tmp_path / "toy.py"
    toy.write_text(TOY)
    result = run([str(toy)], compiler_env)
    assert result.returncode == 0, result.stderr
    failures = json.loads(result.stdout)
    assert failures["good"] == {"sm_90": [], "gfx942": []}
    assert failures["tight"]["gfx942"] == []  # limits are for sm_90
    assert [failure.split(" ", 1)[1] for failure in failures["tight"]["sm_90"]] == ["instructions a pair, limit 3"]
    for target in ("sm_90", "gfx942"):
        text = "; ".join(failures["block-wide"][target])
        assert "shuffle" in text
        assert "barrier" in text
