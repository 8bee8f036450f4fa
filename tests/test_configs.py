"""The decisions that are pure functions: how rows are cut, tiled and viewed, and which backend runs. No kernel runs here."""

import inspect
from math import prod

import pytest
import torch
from torch import Tensor

from fused_tdpo import token_stats
from fused_tdpo._backends import BACKENDS, choose_backend
from fused_tdpo.functions.token_stats import row_views

fp64, fp32, fp16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

# Real vocabularies, and both sides of every threshold.
VOCABULARIES = [
    *(1, 2, 7, 8, 9, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049),
    *(32_000, 32_767, 32_768, 32_769, 50_257, 65_535, 65_536, 65_537, 128_256, 131_072, 131_073, 151_665, 151_936, 262_144),
    *(1_048_575, 1_048_576, 1_048_577, 3_000_000),
]


@pytest.fixture
def kernels(monkeypatch):
    """The module, deciding as for NVIDIA wherever this runs."""
    pytest.importorskip("triton")
    from fused_tdpo.kernels import token_stats

    monkeypatch.setattr(torch.version, "hip", None)
    return token_stats


def any_vocabulary(check):
    """Runs check(V) for the vocabularies above, and for what Hypothesis finds up to three million."""
    hypothesis = pytest.importorskip("hypothesis")
    for V in VOCABULARIES:
        check(V)
    runs = hypothesis.settings(max_examples=8 * hypothesis.settings().max_examples)
    runs(hypothesis.given(hypothesis.strategies.integers(1, 3_000_000))(check))()


# -------------------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize(
    ("V", "itemsize", "wide", "expected"),
    [
        pytest.param(1024, 2, True, (2, 32, 8), id="one-warp"),  # two tiles: a second warp would halve the first's work
        pytest.param(1025, 2, True, (2, 64, 8), id="two-warps"),
        pytest.param(32_768, 2, True, (2, 64, 8), id="two-warps-up-to-32k"),
        pytest.param(32_769, 2, True, (2, 128, 8), id="four-warps"),
        pytest.param(3_000_000, 2, True, (2, 128, 8), id="four-warps-at-most"),
        pytest.param(32_000, 4, True, (4, 64, 4), id="fp32"),  # 16 bytes are four columns
        pytest.param(32_000, 2, False, (16, 64, 1), id="narrow"),  # one column a thread: coalesced at any alignment
        pytest.param(32_000, 4, False, (16, 64, 1), id="narrow-fp32"),
    ],
)
def test_tiling(V, itemsize, wide, expected, kernels):
    K, T, E = expected
    assert kernels.tiling(V, itemsize, wide) == kernels.Tiling(K, T, E, wide)


def test_tiles_of_any_vocabulary(kernels):
    def check(V):
        tiles = {(size, wide): kernels.tiling(V, size, wide) for size in (2, 4) for wide in (False, True)}
        for (size, wide), tile in tiles.items():
            assert tile.K * tile.E == kernels.PAIRS_PER_THREAD == 16, "the registers of a thread"
            assert tile.E * size == 16 if wide else tile.E == 1
            assert tile.num_warps * 32 == tile.T and tile.num_warps in (1, 2, 4)
            assert tile.columns == tile.K * tile.T * tile.E
            assert all(n & (n - 1) == 0 for n in (tile.K, tile.T, tile.E)), "tl.arange takes powers of two"
        assert len({tile.columns for tile in tiles.values()}) == 1, "where a row is cut depends on V alone"

    any_vocabulary(check)


def test_tiles_of_wavefronts(kernels, monkeypatch):
    """AMD's warps have 64 threads: a tile has no half one, and is cut the same above 1,024 columns."""
    nvidia = [kernels.tiling(V, 2, True) for V in VOCABULARIES]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for V, other in zip(VOCABULARIES, nvidia, strict=True):
        tile = kernels.tiling(V, 2, True)
        assert tile.num_warps * 64 == tile.T and tile.num_warps in (1, 2)
        assert tile == other or V <= 1024


# ----------------------------------------------------------------------------------------------------------------- segments


@pytest.mark.parametrize(
    ("V", "segments", "segment"),
    [
        pytest.param(1, 1, 512, id="one-column"),  # of a whole tile
        pytest.param(32_000, 1, 32_768, id="llama-2"),
        pytest.param(65_536, 1, 65_536, id="longest-of-one"),
        pytest.param(65_537, 2, 34_816, id="shortest-of-two"),  # halves, in whole tiles of 2048: not 65,536 and 1
        pytest.param(128_256, 2, 65_536, id="llama-3"),
        pytest.param(151_936, 3, 51_200, id="qwen"),
        pytest.param(262_144, 4, 65_536, id="gemma"),
        pytest.param(1_048_576, 16, 65_536, id="longest-of-sixteen"),
        pytest.param(1_048_577, 16, 67_584, id="segments-grow"),  # `finish` merges no more than 16
    ],
)
def test_segmentation(V, segments, segment, kernels):
    assert kernels.segmentation(V, kernels.tiling(V, 2, True)) == (segments, segment)


@pytest.mark.parametrize("longest", [65_536, 2048], ids=["", "short"])  # short: as tests cut, and where rounding up tells
def test_segments_of_any_vocabulary(longest, kernels, monkeypatch):
    monkeypatch.setattr(kernels, "SEGMENT_COLUMNS", longest)

    def check(V):
        cuts = set()
        for size, wide in ((2, True), (4, True), (2, False)):
            tile = kernels.tiling(V, size, wide)
            segments, segment = kernels.segmentation(V, tile)
            cuts.add((segments, segment))
            assert segment % tile.columns == 0, "only a row's last tile is partial"
            assert (segments - 1) * segment < V <= segments * segment, "covers V, and the last one is not empty"
            assert 1 <= segments <= kernels.MAX_SEGMENTS
            assert segments <= -(-V // longest), "no more than it takes"
            assert segment <= longest or kernels.MAX_SEGMENTS * longest < V, "longer only where more would be too many"
        assert len(cuts) == 1, "the same for every dtype and alignment"

    any_vocabulary(check)


def test_records_merge_in_one_tile(kernels):
    # tl.arange takes powers of two
    for size in (kernels.MAX_SEGMENTS, kernels.FINISH_ROWS):
        assert size & (size - 1) == 0


def test_chunks_of_backward(kernels):
    def check(W):
        for size, wide in ((2, True), (4, True), (2, False)):
            tile = kernels.tiling(W, size, wide)
            assert kernels.backward_chunk(tile) == 8 * tile.columns

    any_vocabulary(check)


@pytest.mark.parametrize("V", [300, 5001, 151_936])
@pytest.mark.parametrize("dtype", [fp32, bf16], ids=["fp32", "bf16"])
def test_how_a_row_is_cut_does_not_depend_on_the_others(V, dtype, kernels, monkeypatch):
    launches = []
    monkeypatch.setattr(kernels, "_launch", lambda kernel, programs, **args: launches.append((kernel.__name__, args)))
    for outer, inner in ((1, 1), (1, 1000), (3, 7), (70_000, 1)):
        logits = torch.empty(outer, inner, V, dtype=dtype, device="meta")
        labels, g = torch.empty(outer * inner, dtype=torch.int64, device="meta"), torch.empty(outer * inner, device="meta")
        options = {"V": V, "ignore_index": -100, "temperature": 1.0}
        _, saved = kernels.token_stats_fwd(logits, logits, labels, extras=(), **options)
        kernels.token_stats_bwd(logits, logits, labels, saved, g, g, logits, **options)
    names = ("K", "T", "E", "WIDE", "segments", "segment", "chunks", "chunk", "ROWS", "SEGMENTS", "num_warps", "maxnreg")
    seen = {(kernel, *(args.get(name) for name in names)) for kernel, args in launches}
    assert len(launches) == 4 * 3 and len(seen) == 3, seen


def test_decisions_see_no_tensor(kernels):
    """Whatever they depend on is in their arguments: V, sizes of dtypes and alignment; never the number of rows."""
    arguments = {
        kernels.tiling: ["V", "itemsize", "wide"],
        kernels.segmentation: ["V", "tile"],
        kernels.backward_chunk: ["tile"],
        kernels.fold_registers: ["tile", "extras", "reverse"],
        kernels.backward_registers: ["tile", "dtype"],
    }
    assert {function: list(inspect.signature(function).parameters) for function in arguments} == arguments


# ---------------------------------------------------------------------------------------------------------------- registers


def resident_warps(registers: int) -> int:
    """Warps of an SM of sm_80 to sm_100: each quarter has 16,384 registers, given to warps of 32 threads."""
    return 4 * (16_384 // (32 * registers))


@pytest.mark.parametrize(
    ("wide", "extras", "reverse", "registers", "warps"),
    [
        pytest.param(True, False, False, 80, 24, id="wide"),  # of which bfloat16 on sm_90 takes 72, and 28 warps fit
        pytest.param(True, True, False, 112, 16, id="extras"),  # more running sums
        pytest.param(True, False, True, 80, 24, id="reverse"),
        pytest.param(False, False, False, 96, 20, id="narrow"),  # an address a column
        pytest.param(False, True, False, 112, 16, id="narrow-extras"),
        pytest.param(False, False, True, 112, 16, id="narrow-reverse"),
    ],
)
def test_registers_of_fold(wide, extras, reverse, registers, warps, kernels):
    assert kernels.fold_registers(kernels.tiling(32_000, 2, wide), extras, reverse) == registers
    assert resident_warps(registers) == warps
    if wide and reverse:
        assert kernels.fold_registers(kernels.tiling(32_000, 4, wide), extras, reverse) == 96, "of float32"


@pytest.mark.parametrize(
    ("dtype", "itemsize", "wide", "registers", "warps"),
    [
        pytest.param(bf16, 2, True, 40, 48, id="bf16"),  # packed loads
        pytest.param(fp16, 2, True, 48, 40, id="fp16"),
        pytest.param(fp32, 4, True, 48, 40, id="fp32"),
        pytest.param(bf16, 4, True, 48, 40, id="bf16-beside-fp32"),  # groups of four columns
        pytest.param(bf16, 2, False, 80, 24, id="narrow"),
        pytest.param(fp32, 4, False, 80, 24, id="narrow-fp32"),
    ],
)
def test_registers_of_backward(dtype, itemsize, wide, registers, warps, kernels):
    assert kernels.backward_registers(kernels.tiling(32_000, itemsize, wide), dtype) == registers
    assert resident_warps(registers) == warps


# ---------------------------------------------------------------------------------------------------------------- alignment


def placed(dtype: torch.dtype, V: int, outer: int, inner: int, offset: int, pitch: int, tail: int) -> Tensor:
    """(outer, inner, V) in a storage that ends `tail` elements behind its last row."""
    storage = torch.empty(offset + (outer * inner - 1) * pitch + V + tail, dtype=dtype)
    return storage.as_strided((outer, inner, V), (inner * pitch, pitch, 1), offset)


def test_is_wide_is_what_it_says(kernels):
    """... for any two tensors: every row aligned to 16 bytes, and the last group of columns inside the memory."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    seen = set()

    def true_of(tensor: Tensor, V: int, group: int) -> bool:
        rows = [tensor[o, i] for o in range(tensor.shape[0]) for i in range(tensor.shape[1])]
        end = max(row.storage_offset() for row in rows) + -(-V // group) * group
        inside = end * tensor.element_size() <= tensor.untyped_storage().nbytes()
        return inside and all(row.data_ptr() % 16 == 0 for row in rows)

    numbers = st.one_of(st.integers(0, 20), st.sampled_from([0, 8, 16]))
    tensors = st.tuples(st.sampled_from([fp32, fp16, bf16]), numbers, numbers, st.integers(0, 9))

    @hypothesis.settings(max_examples=8 * hypothesis.settings().max_examples)
    @hypothesis.given(st.sampled_from([1, 7, 8, 64, 65]), st.integers(2, 3), st.lists(tensors, min_size=1, max_size=2))
    def check(V, outer, descriptions):
        logits = [placed(dtype, V, outer, 2, offset, V + more, tail) for dtype, offset, more, tail in descriptions]
        group = 16 // max(tensor.element_size() for tensor in logits)
        expected = all(true_of(tensor, V, group) for tensor in logits)
        assert kernels.is_wide(V, *logits) == kernels.is_wide(V, logits[0], None, *logits[1:]) == expected
        seen.add(expected)

    check()
    assert seen == {False, True}


@pytest.mark.parametrize(
    ("tail", "V", "dtypes", "wide"),
    [
        pytest.param(0, 64, (bf16,), True, id="whole-groups"),
        pytest.param(0, 63, (bf16,), False, id="last-group-cut-off"),
        pytest.param(1, 63, (bf16,), True, id="last-group-there"),
        pytest.param(0, 60, (bf16,), False, id="half-a-group-of-bf16"),
        pytest.param(0, 60, (bf16, fp32), True, id="a-group-beside-fp32"),  # groups of four columns
        pytest.param(0, 0, (bf16,), True, id="a-gradient"),  # V = 0: written column by column, nothing beyond
    ],
)
def test_is_wide_of_the_last_group(tail, V, dtypes, wide, kernels):
    logits = [placed(dtype, V or 63, 1, 3, 0, 64, tail) for dtype in dtypes]
    assert kernels.is_wide(V, *logits) == wide


# ------------------------------------------------------------------------------------------------------------------- backend


@pytest.mark.parametrize(
    ("backend", "device", "dtypes", "triton", "expected"),
    [
        pytest.param("auto", "cuda", (bf16, bf16), True, ("triton", "GPU tensors"), id="auto-gpu"),
        pytest.param("auto", "cuda", (fp16,), True, ("triton", "GPU tensors"), id="auto-gpu-no-reference"),
        pytest.param("auto", "cuda", (bf16, fp64), True,
                     ("torch", "Triton kernels compute in float32, and the logits are float64"), id="auto-float64"),
        pytest.param("auto", "cuda", (bf16,), False, ("torch", "the triton package is not installed"), id="auto-no-triton"),
        # never the interpreter by itself, though Triton is there
        pytest.param("auto", "cpu", (bf16,), True, ("torch", "no Triton kernels for device type 'cpu'"), id="auto-cpu"),
        pytest.param("auto", "mps", (bf16,), True, ("torch", "no Triton kernels for device type 'mps'"), id="auto-mps"),
        # a name is that implementation, wherever the tensors are
        pytest.param("triton", "cuda", (fp32,), True, ("triton", "asked for"), id="triton-gpu"),
        pytest.param("triton", "cpu", (fp32,), True, ("triton", "asked for"), id="triton-cpu"),
        pytest.param("torch", "cuda", (bf16,), True, ("torch", "asked for"), id="torch-gpu"),
        pytest.param("torch", "cpu", (fp64,), False, ("torch", "asked for"), id="torch-cpu"),
        pytest.param("reference", "cuda", (fp64,), False, ("reference", "asked for"), id="reference"),
    ],
)  # fmt: skip
def test_choose_backend(backend, device, dtypes, triton, expected):
    assert choose_backend(backend, device, dtypes, triton=triton) == expected


@pytest.mark.parametrize(
    ("backend", "dtypes", "triton", "error", "words"),
    [
        pytest.param(
            "cuda", (fp32,), True, ValueError, ["'auto'", "'triton'", "'torch'", "'reference'", "got 'cuda'"], id="unknown"
        ),
        pytest.param("Triton", (fp32,), True, ValueError, ["got 'Triton'"], id="case-matters"),
        pytest.param("triton", (fp64,), True, TypeError, ["float64", "backend='torch'"], id="float64"),
        pytest.param("triton", (bf16, fp64), True, TypeError, ["float64", "backend='torch'"], id="float64-reference"),
        pytest.param("triton", (bf16,), False, RuntimeError, ["pip install triton", "backend='torch'"], id="no-triton"),
    ],
)
def test_choose_backend_refuses(backend, dtypes, triton, error, words):
    with pytest.raises(error) as raised:
        choose_backend(backend, "cuda", dtypes, triton=triton)
    assert not [word for word in words if word not in str(raised.value)], raised.value


def test_every_backend_is_somebodys_choice():
    chosen = {choose_backend(name, device, (bf16,), triton=True)[0] for name in BACKENDS for device in ("cpu", "cuda")}
    assert chosen == set(BACKENDS) - {"auto"}


# ----------------------------------------------------------------------------------------------------------------- row views


def numbered(*shape: int) -> Tensor:
    return torch.arange(prod(shape)).view(shape)


def assert_rows(views: list[list[Tensor | None]], *tensors: Tensor | None) -> None:
    """The views hold each tensor's rows in order, in its own memory."""
    for k, tensor in enumerate(tensors):
        of_tensor = [view[k] for view in views]
        if tensor is None:
            assert of_tensor == [None] * len(views)
            continue
        V = tensor.shape[-1]
        assert all(view.dim() == 3 and view.shape[2] == V for view in of_tensor)
        rows = torch.cat([view.reshape(-1, V) for view in of_tensor])
        assert torch.equal(rows, tensor.reshape(-1, V)), "other rows, or another order"
        assert {view.untyped_storage().data_ptr() for view in of_tensor} == {tensor.untyped_storage().data_ptr()}, "a copy"


@pytest.mark.parametrize(
    ("tensor", "views", "lead"),
    [
        pytest.param(numbered(5), 1, (1, 1), id="a-single-row"),
        pytest.param(numbered(4, 5), 1, (1, 4), id="rows"),
        pytest.param(numbered(2, 3, 5), 1, (1, 6), id="contiguous"),
        pytest.param(numbered(2, 3, 4, 2, 5), 1, (1, 48), id="four-contiguous-axes"),
        pytest.param(numbered(2, 4, 5)[:, :-1], 1, (2, 3), id="shifted"),  # logits[:, :-1]
        pytest.param(numbered(3, 2, 5).transpose(0, 1), 1, (2, 3), id="sequence-first"),
        pytest.param(numbered(2, 3, 7)[..., 1:6], 1, (1, 6), id="columns-cut"),
        pytest.param(numbered(6, 5)[::2], 1, (1, 3), id="every-other-row"),
        pytest.param(numbered(2, 1, 3, 1, 5), 1, (1, 6), id="axes-of-one"),
        pytest.param(numbered(1, 4, 5)[:, :-1].expand(3, 3, 5), 1, (3, 3), id="expanded"),
        pytest.param(numbered(2, 3, 4, 5).permute(2, 1, 0, 3), 4, (3, 2), id="three-axes-reversed"),
        pytest.param(numbered(2, 3, 4, 5)[:, :, :-1], 1, (6, 3), id="three-axes-two-of-them-merge"),
        pytest.param(numbered(2, 3, 4, 2, 5).permute(3, 2, 1, 0, 4), 8, (3, 2), id="four-axes-reversed"),
    ],
)
def test_row_views(tensor, views, lead):
    found = row_views(tensor)
    assert len(found) == views
    assert {tuple(x.shape[:2]) for (x,) in found} == {lead}
    assert_rows(found, tensor)


def test_row_views_merge_what_all_tensors_allow():
    contiguous, shifted = numbered(2, 3, 5), numbered(2, 4, 7)[:, :-1]
    assert_rows(row_views(contiguous, None, shifted), contiguous, None, shifted)
    assert [x.shape[:2] for x, _ in row_views(contiguous, shifted)] == [(2, 3)]
    assert [x.shape[:2] for x, _ in row_views(contiguous, None)] == [(1, 6)]


def test_row_views_of_anything():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    counts = set()

    @hypothesis.settings(max_examples=8 * hypothesis.settings().max_examples)
    @hypothesis.given(st.data())
    def check(data):
        lead = data.draw(st.lists(st.integers(1, 4), max_size=4), label="lead")

        def draw(V):
            order = data.draw(st.permutations(range(len(lead))), label="order")
            steps = [data.draw(st.integers(1, 2), label="step") for _ in lead]
            starts = [data.draw(st.integers(0, 1), label="start") for _ in lead]
            larger = numbered(*(starts[axis] + lead[axis] * steps[axis] for axis in order), V + 1)
            larger = larger.permute(*(order.index(axis) for axis in range(len(lead))), -1)
            cut = tuple(slice(start, start + n * step, step) for start, n, step in zip(starts, lead, steps, strict=True))
            return larger[(*cut, slice(data.draw(st.integers(0, 1), label="first column"), None))]

        tensors = [draw(3), draw(5)][: data.draw(st.integers(1, 2), label="tensors")]
        views = row_views(*tensors)
        assert_rows(views, *tensors)
        counts.add(len(views))

    check()
    assert 1 in counts and max(counts) >= 4, "all of them were easy"


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (3, 2, 1, 0, 4), (1, 3, 0, 2, 4)], ids=str)
@pytest.mark.parametrize("empty_axis", range(4))
def test_no_rows_in_any_layout(order, empty_axis):
    shape = [2, 3, 2, 3]
    shape[empty_axis] = 0
    logits = torch.empty(*shape, 7).permute(order).requires_grad_()
    stats = token_stats(logits, logits.detach(), torch.empty(logits.shape[:-1], dtype=torch.int64), backend="torch")
    assert stats.logp.shape == stats.kl.shape == logits.shape[:-1]
    (stats.logp.sum() + stats.kl.sum()).backward()
    assert logits.grad.shape == logits.shape
