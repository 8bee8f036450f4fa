"""What launchers promise to kernels, checked on the arguments of launches that are recorded instead of run.

The interpreter takes any address, but a compiled kernel that was promised alignment (WIDE) faults on a GPU where the promise is
broken. So it is checked here, for shapes, offsets and pitches that nobody thought of.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
kernels = pytest.importorskip("fused_tdpo.kernels.token_stats")

fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
OPTIONS = {"ignore_index": -100, "temperature": 1.0}
Launch = tuple[str, int, dict[str, Any]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """(kernel, number of programs, arguments) of everything that would have run."""
    recorded: list[Launch] = []
    monkeypatch.setattr(kernels, "_launch", lambda kernel, programs, **args: recorded.append((kernel.__name__, programs, args)))
    return recorded


@dataclass(frozen=True)
class Placement:
    """Where the logits of one model lie: rows (outer, inner) apart in a storage that ends right behind the last one."""

    dtype: torch.dtype
    offset: int = 0
    pitch_padding: int = 0
    pitch_multiple: int = 1
    """The pitch is rounded up to one."""
    outer_padding: int = 0
    width_padding: int = 0
    """Columns that belong to the tensor, beyond V."""
    tail: int = 0
    """Elements of the storage behind the last row."""

    def make(self, outer: int, inner: int, V: int) -> Tensor:
        width = V + self.width_padding
        pitch = -(-(width + self.pitch_padding) // self.pitch_multiple) * self.pitch_multiple
        outer_pitch = inner * pitch + self.outer_padding
        last_row = self.offset + (outer - 1) * outer_pitch + (inner - 1) * pitch
        storage = torch.empty(last_row + width + self.tail, dtype=self.dtype)
        return storage.as_strided((outer, inner, width), (outer_pitch, pitch, 1), self.offset)


def launch_both(
    policy: Tensor, ref: Tensor | None, V: int, d_policy: Tensor | None = None, with_kl: bool = True, **options: Any
) -> None:
    N = policy.shape[0] * policy.shape[1]
    labels, g = torch.zeros(N, dtype=torch.int64), torch.zeros(N)
    options = {"V": V, **OPTIONS, **options}
    _, saved = kernels.token_stats_fwd(policy, ref, labels, extras=(), **options)
    g_kl = g if with_kl and ref is not None else None
    kernels.token_stats_bwd(policy, ref, labels, saved, g, g_kl, policy if d_policy is None else d_policy, **options)


def check_promises(launch: Launch) -> bool | None:
    """Hold the arguments of a launch against what its kernel takes for granted. Returns WIDE, or None for `finish`."""
    kernel, programs, args = launch
    finish, backward = "finish" in kernel, "bwd" in kernel
    logits = {"policy": args["policy_ptr"], "ref": args["ref_ptr"]} | ({"d": args["d_policy_ptr"]} if backward else {})
    logits = {name: tensor for name, tensor in logits.items() if tensor is not None}
    outer, inner = args["policy_ptr"].shape[:2]
    E = 1 if finish else args["E"]
    assert args["inner"] == inner
    for name, tensor in logits.items():
        assert tensor.stride(2) == 1 or tensor.shape[2] == 1
        pitches = tuple(args[f"{name}_{axis}"] * E for axis in ("outer", "inner"))
        assert pitches == tensor.stride()[:2], f"{name}: rows are elsewhere, {pitches} apart"
    if finish:
        assert args["segments"] <= args["SEGMENTS"] and outer * inner <= programs * args["ROWS"]
        return None

    # Pieces of whole tiles cover a row once; T threads hold whole 16-byte groups, and never another number of elements.
    V, K, T = (args[name] for name in ("V", "K", "T"))
    piece, pieces = (args["chunk"], args["chunks"]) if backward else (args["segment"], args["segments"])
    columns = args["W"] if backward else V
    assert (pieces - 1) * piece < columns <= pieces * piece
    assert piece % (K * T * E) == 0
    assert programs == outer * inner * pieces
    assert args["num_warps"] * 32 == T and K * E == 16
    assert all(n & (n - 1) == 0 for n in (K, T, E)), "tl.arange takes powers of two"

    if not args["WIDE"]:
        assert E == 1, "elements of a group are addressed at once, though nothing is aligned"
        return False
    assert max(tensor.element_size() for tensor in logits.values()) * E == 16
    for name, tensor in logits.items():
        size = tensor.element_size()
        for o in range(outer):
            for i in range(inner):
                row = tensor[o, i]
                assert row.data_ptr() % 16 == 0, f"{name}: row ({o}, {i}) is not aligned"
                if name != "d":  # stores are masked column by column
                    end = row.storage_offset() + -(-V // E) * E
                    assert end * size <= tensor.untyped_storage().nbytes(), f"{name}: row ({o}, {i}) is read beyond its memory"
    return True


# ------------------------------------------------------------------------------------------------------------ any placement


@pytest.mark.parametrize("aligned", [False, True], ids=["any", "mostly-aligned"])
def test_promises_hold(aligned, launches):
    """... and launches of both kinds occur, so that neither is checked in vain."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    any_number = st.one_of(st.just(0), st.integers(0, 40), st.sampled_from([4, 8, 16, 24, 32]))
    groups = st.sampled_from([0, 0, 8, 64])
    dtypes = st.sampled_from([fp32, fp16, bf16])
    placements = st.builds(
        Placement,
        dtype=dtypes,
        offset=groups if aligned else any_number,
        pitch_padding=st.just(0) if aligned else any_number,
        pitch_multiple=st.just(8 if aligned else 1),
        outer_padding=groups if aligned else any_number,
        width_padding=any_number,
        tail=st.sampled_from([0, 0, 1, 7, 8]),
    )
    widths = st.one_of(st.integers(1, 100), st.integers(1, 2400), st.sampled_from([1024, 32_768, 65_544]))
    kinds = set()

    @hypothesis.settings(max_examples=8 * hypothesis.settings().max_examples)
    @hypothesis.given(st.data())
    def check(data):
        outer, inner, V = (data.draw(values, label="shape") for values in (st.integers(1, 3), st.integers(1, 3), widths))
        policy = data.draw(placements, label="policy").make(outer, inner, V)
        ref = data.draw(st.one_of(st.none(), placements), label="ref")
        ref = None if ref is None else ref.make(outer, inner, V)
        in_place, with_kl = data.draw(st.booleans(), label="in place"), data.draw(st.booleans(), label="with kl")
        d_policy = policy if in_place else torch.empty(policy.shape, dtype=data.draw(dtypes, label="gradient"))
        launches.clear()
        launch_both(policy, ref, V, d_policy, with_kl)
        kinds.update((launch[0], check_promises(launch)) for launch in launches)

    check()
    steps = {f"token_stats_{step}_kernel" for step in ("fold", "bwd")}
    assert kinds == {(step, wide) for step in steps for wide in (False, True)} | {("token_stats_finish_kernel", None)}


def test_promises_hold_for_views_of_the_op(launches, monkeypatch):
    """Slices and permutations of up to four leading axes, as the op hands them on."""
    hypothesis = pytest.importorskip("hypothesis")
    from fused_tdpo.functions import token_stats as functions

    st = hypothesis.strategies
    monkeypatch.setattr(functions, "load_backend", lambda name, device: kernels)  # CPU tensors are not refused: nothing runs
    wide = Counter()

    @hypothesis.given(st.data())
    def check(data):
        shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4), label="leading axes")
        order = data.draw(st.permutations(range(len(shape))), label="order")
        V, first, padding = (data.draw(st.sampled_from(n), label="columns") for n in ([8, 64, 67], [0, 0, 8, 3], [0, 0, 8, 1]))
        logits = torch.empty(*shape, first + V + padding, dtype=bf16).permute(*order, -1)[..., first : first + V]
        logits = logits[1:] if len(logits) > 1 else logits
        labels, g = torch.zeros(logits.shape[:-1], dtype=torch.int64), torch.zeros(logits.shape[:-1])
        launches.clear()
        *_, saved = torch.ops.fused_tdpo.token_stats_fwd(logits, logits, labels, V, -100, 1.0, "", False, "triton")
        torch.ops.fused_tdpo.token_stats_bwd_(logits, logits, labels, saved, g, g, V, -100, 1.0, "triton")
        wide.update(check_promises(launch) for launch in launches)
        rows = Counter()
        for kernel, _, args in launches:
            rows[kernel] += args["policy_ptr"].shape[:2].numel()
        assert rows == {f"token_stats_{step}_kernel": labels.numel() for step in ("fold", "finish", "bwd")}

    check()
    assert wide[True] and wide[False]


# ---------------------------------------------------------------------------------------------------- each promise by itself


@pytest.mark.parametrize(
    ("policy", "V", "wide"),
    [
        pytest.param(Placement(bf16), 64, True, id="contiguous"),
        pytest.param(Placement(bf16), 67, False, id="odd-pitch"),
        pytest.param(Placement(bf16), 68, False, id="pitch-of-half-a-group"),
        pytest.param(Placement(fp32), 68, True, id="pitch-of-a-group-of-fp32"),
        pytest.param(Placement(bf16, offset=8), 64, True, id="offset-of-a-group"),
        pytest.param(Placement(bf16, offset=1), 64, False, id="odd-offset"),
        pytest.param(Placement(fp32, offset=2), 64, False, id="offset-of-half-a-group"),
        pytest.param(Placement(bf16, outer_padding=1), 64, False, id="odd-outer-pitch"),
        pytest.param(Placement(bf16, pitch_padding=1, tail=1), 63, True, id="overhang-inside-storage"),
        pytest.param(Placement(bf16, pitch_padding=1), 63, False, id="overhang-outside-storage"),
        pytest.param(Placement(bf16, width_padding=5), 67, True, id="overhang-inside-rows"),
    ],
)
def test_which_placements_are_wide(policy, V, wide, launches):
    launch_both(policy.make(2, 2, V), None, V)
    assert [check_promises(launch) for launch in launches] == [wide, None, wide]


@pytest.mark.parametrize(
    ("change", "forward", "backward"),
    [
        pytest.param(lambda x: {"ref": x[..., 1:]}, False, False, id="reference"),
        pytest.param(lambda x: {"ref": x[..., 1:], "with_kl": False}, False, True, id="reference-unused-in-backward"),
        pytest.param(lambda x: {"ref": x[..., :-1], "d_policy": x[..., 1:]}, True, False, id="gradient"),
    ],
)
def test_one_narrow_tensor_makes_the_launch_narrow(change, forward, backward, launches):
    memory = torch.empty(2, 2, 64, dtype=bf16)
    launch_both(memory[..., :-1], V=63, **change(torch.empty(2, 2, 64, dtype=bf16)))
    assert [check_promises(launch) for launch in launches] == [forward, None, backward]


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=["fp32", "bf16"])
def test_a_broken_promise_stops_the_launch(dtype, launches, monkeypatch):
    policy = Placement(dtype, pitch_padding=1, tail=8).make(1, 2, 64)
    saved, labels, g = torch.zeros(4, 2), torch.zeros(2, dtype=torch.int64), torch.zeros(2)

    def forward() -> None:
        kernels.token_stats_fwd(policy, None, labels, V=64, extras=(), **OPTIONS)

    def backward() -> None:
        kernels.token_stats_bwd(policy, None, labels, saved, g, None, policy, V=64, **OPTIONS)

    forward()
    backward()
    monkeypatch.setattr(kernels, "is_wide", lambda *args: True)
    for launch in (forward, backward):
        launches.clear()
        with pytest.raises(AssertionError, match="promised"):
            launch()
        assert not launches


@pytest.mark.parametrize(
    ("dtype", "d_dtype", "V", "E", "registers"),
    [
        pytest.param(fp32, bf16, 64, 4, 48, id="narrower"),
        pytest.param(bf16, fp32, 64, 4, 128, id="wider"),
        pytest.param(bf16, fp16, 64, 8, 40, id="as-wide"),
        pytest.param(fp32, bf16, 68, 1, 80, id="pitch-of-half-a-group"),  # of the gradient; a whole one of the logits
    ],
)
def test_gradient_of_another_dtype(dtype, d_dtype, V, E, registers, launches):
    """The widest dtype decides how many columns a thread has side by side: 16 bytes of it."""
    policy, d_policy = (torch.empty(2, 2, V, dtype=t) for t in (dtype, d_dtype))
    launch_both(policy, None, V, d_policy)
    backward = launches[-1]
    assert check_promises(backward) is (E > 1)
    assert (backward[2]["E"], backward[2]["maxnreg"]) == (E, registers)


# ------------------------------------------------------------------------------------------------------------------ softcaps


@pytest.mark.parametrize("with_kl", [True, False], ids=["kl", "logp-alone"])
@pytest.mark.parametrize("ref", [True, False], ids=["reference", "no-reference"])
def test_softcaps_of_the_logits_that_are_read(ref, with_kl, launches):
    policy = torch.empty(1, 2, 64, dtype=bf16)
    launch_both(policy, policy if ref else None, 64, with_kl=with_kl, softcaps=(30.0, 50.0))
    caps = {kernel: (args["policy_cap"], args["ref_cap"]) for kernel, _, args in launches}
    forward = (30.0, 50.0 if ref else None)
    backward = (30.0, 50.0 if ref and with_kl else None)
    assert caps == dict(zip(caps, (forward, forward, backward), strict=True))


@pytest.mark.parametrize("softcaps", [(None, None), (30.0, None), (None, 30.0), (30.0, 30.0)], ids=str)
def test_registers_grow_only_for_a_softcap(softcaps, launches):
    policy = torch.empty(1, 2, 64, dtype=bf16)
    launch_both(policy, policy, 64, softcaps=softcaps)
    fold, _, backward = (args["maxnreg"] for _, _, args in launches)
    assert (fold, backward) == ((128, 128) if any(softcaps) else (80, 40))

    launches.clear()
    launch_both(policy, None, 64, softcaps=softcaps)
    fold, _, backward = (args["maxnreg"] for _, _, args in launches)
    assert (fold, backward) == ((128, 128) if softcaps[0] else (80, 40)), "the cap of no reference took registers"


# ---------------------------------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize("V", [3, 131_073])
def test_rows_are_one_grid_axis(V, monkeypatch):
    """65,535 is the limit of the second and third axis of a CUDA grid; the first goes to 2^31 - 1."""
    grids = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.__name__ = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable:
            return lambda **args: grids.append((self.__name__, grid))

    for step in ("fold", "finish", "bwd"):
        monkeypatch.setattr(kernels, f"token_stats_{step}_kernel", Kernel(step))
    N = 70_001
    logits = torch.empty(1, dtype=bf16).expand(1, N, V)  # no memory: nothing reads it
    launch_both(logits, None, V)
    segments, chunks = (1, 1) if V == 3 else (3, 9)  # of at most 65,536 columns, of 16,384
    assert grids == [("fold", (N * segments,)), ("finish", (-(-N // 32),)), ("bwd", (N * chunks,))]

    grids.clear()
    launch_both(logits[:, :0], None, V)
    assert not grids, "an empty grid is an error to CUDA"
