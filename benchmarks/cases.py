"""What is measured: one row per model, case and problem. Tests take those tagged "small".

`CASES` begin at the logits, `HIDDEN_CASES` at the hidden states; `PROBLEMS` ask how exact a result is, not how fast it comes.
A run takes what is tagged "main" first, then the rest in this order. The project's README shows what is tagged "main".
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from fused_tdpo.reference import token_stats_reference

GPU, CPU, MAIN, SMALL = (frozenset({tag}) for tag in ("gpu", "cpu", "main", "small"))
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


# --------------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Model:
    """The head of a published language model."""

    name: str
    """Family and size."""
    V: int
    """Rows of the head: padding of the vocabulary counts."""
    D: int
    tied: bool = False
    """The head is the embedding's weight too."""
    softcap: float | None = None
    tags: frozenset[str] = frozenset()
    """"gpu": has a case of its own below."""


MODELS = (
    Model("Qwen 3 8B", 151_936, 4096),
    Model("Qwen 3 0.6B", 151_936, 1024, tied=True),
    Model("Qwen 3 1.7B", 151_936, 2048, tied=True),
    Model("Qwen 3 4B", 151_936, 2560, tied=True),
    Model("Qwen 3 14B, 32B", 151_936, 5120),
    Model("Qwen 2.5 0.5B", 151_936, 896, tied=True),
    Model("Qwen 2.5 1.5B", 151_936, 1536, tied=True),
    Model("Qwen 2.5 7B", 152_064, 3584),
    Model("Qwen 2.5 14B, 32B", 152_064, 5120, tags=GPU),
    Model("Llama 3 8B", 128_256, 4096, tags=GPU),
    Model("Llama 3 70B", 128_256, 8192, tags=GPU),
    Model("Llama 3.2 1B", 128_256, 2048, tied=True),
    Model("Gemma 3 270M", 262_144, 640, tied=True),
    Model("Gemma 3 1B", 262_144, 1152, tied=True, tags=GPU),
    Model("Gemma 3 4B", 262_208, 2560, tied=True),
    Model("Gemma 3 27B", 262_208, 5376, tied=True),
    Model("Gemma 2 2B", 256_000, 2304, tied=True, softcap=30.0, tags=GPU),
    Model("Gemma 2 9B", 256_000, 3584, tied=True, softcap=30.0),
    Model("Ministral 8B", 131_072, 4096),
    Model("Mistral Nemo 12B", 131_072, 5120),
    Model("Mistral 7B v0.3", 32_768, 4096, tags=GPU),
    Model("Llama 2 7B", 32_000, 4096),
    Model("SmolLM 2 135M", 49_152, 576, tied=True),
    Model("SmolLM 2 1.7B", 49_152, 2048, tied=True, tags=GPU),
    Model("GPT-2 124M", 50_257, 768, tied=True),  # odd: no 16-byte accesses
)
"""Of a width, the first one names cases that begin at the logits."""


def model_name(V: int, D: int | None = None, softcap: float | None = None) -> str:
    """The first model with such a head, or its family if D is None; "" if there is none."""
    if D is None:
        return next((model.name.rsplit(" ", 1)[0] for model in MODELS if model.V == V), "")
    return next((model.name for model in MODELS if (model.V, model.D, model.softcap) == (V, D, softcap)), "")


# ---------------------------------------------------------------------------------------------------------------- from logits


@dataclass(frozen=True)
class Case:
    """Logits of N token rows and V columns, for policy and reference each."""

    N: int
    V: int
    dtype: torch.dtype = torch.bfloat16
    masked: float = 0.0
    """Share of the rows whose label is ignored, as a prompt's are."""
    tags: frozenset[str] = GPU

    only = ()

    @property
    def name(self) -> str:
        return f"N{self.N}-V{self.V}-{DTYPES[self.dtype]}" + (f"-masked{self.masked:g}" if self.masked else "")

    @property
    def model(self) -> str:
        return model_name(self.V)

    @property
    def facts(self) -> dict[str, float]:
        """What a record says about this case alone."""
        return {"N": self.N, "masked": self.masked, "forward_bytes": self.forward_bytes, "backward_bytes": self.backward_bytes}

    @property
    def forward_bytes(self) -> int:
        """The least that a forward can move: two logits a column, of the rows that count."""
        return 2 * self._rows * self.V * self.dtype.itemsize

    @property
    def backward_bytes(self) -> int:
        """The least that a backward can move: the same again, and one gradient a column of every row (0 where ignored)."""
        return self.forward_bytes + self.N * self.V * self.dtype.itemsize

    @property
    def _rows(self) -> int:
        return self.N - int(self.ignored().sum())

    def ignored(self) -> torch.Tensor:
        """(N,) bool: the first rows of every 512, as prompts come before answers."""
        length = min(self.N, 512)
        return torch.arange(self.N) % length < self.masked * length


_WIDTHS = (151_936, 128_256, 262_144, 32_000, 50_257, 49_152)

CASES = (
    Case(4096, 151_936, tags=GPU | MAIN),
    *(Case(4096, V) for V in _WIDTHS[1:]),
    *(Case(4096, 151_936, masked=masked) for masked in (0.5, 0.9)),
    *(Case(4096, 151_936, dtype=dtype) for dtype in (torch.float32, torch.float16)),
    Case(1, 151_936),
    Case(128, 151_936, tags=GPU | CPU),
    *(Case(N, 151_936) for N in (512, 1024)),
    *(Case(16384, V) for V in _WIDTHS),
    Case(128, 32_000, tags=GPU | CPU | SMALL),
    Case(128, 151_936, dtype=torch.float32),
    *(Case(128, V) for V in _WIDTHS if V not in (151_936, 32_000)),
)
"""On a GPU few rows show the fixed cost and 16,384 the sustained rate. A CPU takes 128 rows only."""


# --------------------------------------------------------------------------------------------------------- from hidden states


@dataclass(frozen=True)
class HiddenCase:
    """Hidden states of pairs of sequences, T positions each, the first ones of them a prompt."""

    T: int
    D: int
    V: int
    pairs: int = 1
    dtype: torch.dtype = torch.bfloat16
    trained: bool = True
    """The policy's head gets a gradient. Frozen, as with adapters, it is the reference's as well..."""
    apart: bool = False
    """... or a tensor of its own, frozen all the same."""
    masked: float = 0.5
    """Share of the positions that are a prompt."""
    softcap: float | None = None
    only: tuple[str, ...] = ()
    """The providers to measure; all of them if empty."""
    tags: frozenset[str] = GPU

    @property
    def name(self) -> str:
        parts = [f"P{self.pairs}-T{self.T}-D{self.D}-V{self.V}-{DTYPES[self.dtype]}"]
        parts += ["frozen"] if not self.trained else []
        parts += ["apart"] if self.apart else []
        parts += [f"masked{self.masked:g}"] if self.masked != 0.5 else []
        parts += [f"cap{self.softcap:g}"] if self.softcap else []
        return "-".join(parts)

    @property
    def model(self) -> str:
        return model_name(self.V, self.D, self.softcap)

    @property
    def facts(self) -> dict[str, float]:
        """What a record says about this case alone."""
        names = ("pairs", "T", "D", "N", "trained", "apart", "masked", "softcap", "flops", "gradient_bytes")
        return {name: getattr(self, name) for name in names}

    @property
    def prompt(self) -> int:
        """Positions at the start of a sequence whose label is ignored."""
        return int(self.masked * self.T)

    @property
    def N(self) -> int:
        """The rows that count: the last position of the prompt predicts the first label, the last position none."""
        return 2 * self.pairs * (self.T - max(1, self.prompt))

    @property
    def flops(self) -> int:
        """Of the least products: one for each model's logits, one for the hidden states' gradient, one for the head's."""
        return (4 if self.trained else 3) * 2 * self.N * self.V * self.D

    @property
    def gradient_bytes(self) -> int:
        """What any provider returns."""
        return (2 * self.pairs * self.T + self.trained * self.V) * self.D * self.dtype.itemsize

    @property
    def beta(self) -> float:
        """Keeps the margin of random sequences near 1, at any length, where neither loss nor gradient saturates."""
        return (self.N / self.pairs) ** -0.5


_LOSSES = ("ours", "ours_recompute", "ours_dpo", "naive_valid", "naive_all", "trl", "liger")
_BEST = ("ours", "naive_valid")
_TOKEN_LEVEL = (*_LOSSES, "compiled", "cce", "ours_kl", "fla")
_OTHERS = ("ours_simpo", "liger_simpo", "ours_kto", "liger_kto")
_CAPPED = ("ours", "ours_recompute", "compiled")
_QWEN = {"D": 4096, "V": 151_936, "pairs": 4}
_LONG = {"D": 896, "V": 151_936}
_ON_CPU = {"D": 512, "V": 32_000, "dtype": torch.float32}
_TINY = {"D": 64, "V": 1000, "dtype": torch.float32, "tags": SMALL}

HIDDEN_CASES = (
    *(
        HiddenCase(2048, D, V, pairs=pairs, trained=trained, only=_TOKEN_LEVEL, tags=GPU | MAIN)
        for pairs, D, V in ((4, 4096, 151_936), (4, 896, 151_936), (2, 4096, 131_072))
        for trained in (True, False)
    ),
    *(HiddenCase(T, **_LONG, only=_LOSSES) for T in (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)),
    HiddenCase(131_072, **_LONG, only=_LOSSES, tags=GPU | MAIN),
    HiddenCase(1024, **_LONG, pairs=8, only=_OTHERS),
    *(HiddenCase(2048, **_QWEN, masked=masked, only=_LOSSES) for masked in (0.0, 0.9)),
    HiddenCase(2048, **_QWEN, trained=False, apart=True, only=_LOSSES),
    *(
        HiddenCase(2048, m.D, m.V, pairs=4, softcap=m.softcap, only=_CAPPED if m.softcap else _LOSSES)
        for m in MODELS
        if "gpu" in m.tags
    ),
    *(HiddenCase(2048, **_LONG, pairs=4, dtype=dtype, only=_LOSSES) for dtype in (torch.float16, torch.float32)),
    *(HiddenCase(T, **_LONG, only=("ours",)) for T in (262_144, 524_288, 1_048_576, 2_097_152)),
    *(HiddenCase(32, **_TINY, trained=trained) for trained in (True, False)),
    HiddenCase(32, **_TINY, trained=False, apart=True, masked=0.9),
    HiddenCase(32, **_TINY, masked=0.0, softcap=30.0, only=_CAPPED),
    *(
        HiddenCase(T, **_ON_CPU, only=only, tags=CPU | MAIN)
        for T, only in ((512, _TOKEN_LEVEL), (1024, _LOSSES), (2048, _LOSSES), (4096, _BEST), (8192, ("ours",)))
    ),
    HiddenCase(512, **_ON_CPU, pairs=2, only=_OTHERS, tags=CPU),
    HiddenCase(1024, **_ON_CPU, trained=False, only=_LOSSES, tags=CPU),
    *(HiddenCase(512, **_ON_CPU, masked=masked, only=(*_BEST, "naive_all"), tags=CPU) for masked in (0.0, 0.9)),
)
"""On a GPU 8,192 rows that count, at wide heads and at narrow ones; one pair from 1,024 positions to as long as fits; then more
or less of a prompt, the head apart, other models, dtypes. On a CPU one pair of growing length."""


# --------------------------------------------------------------------------------------------------------------- how exact


@dataclass(frozen=True)
class Problem:
    """Float32 logits z = 3·N(0, 1) and x = z + distance·N(0, 1) of some rows, and what is done to them (accuracy.py)."""

    distance: float = 1.5
    shift: float = 0.0
    """Added to all x."""
    spoilt: str = ""
    """What stands where, as in PROBLEMS."""
    V: int = 151_936
    N: int = 8
    tags: frozenset[str] = GPU | CPU | MAIN

    only, model, dtype = (), "", torch.float32

    @property
    def name(self) -> str:
        if self.spoilt:
            return self.spoilt
        return f"distance {self.distance:g}" + (f", shift {self.shift:g}" if self.shift else "")

    @cached_property
    def facts(self) -> dict[str, object]:
        """What a record says about this problem alone; `kl` is the mean of the true values, where nothing is spoilt."""
        x, z = (logits.double() for logits in self.logits())
        kl = None if self.spoilt else float(token_stats_reference(x, z, self.labels()).kl.mean())
        return {"N": self.N, "spoilt": self.spoilt, "kl": kl}

    def labels(self) -> torch.Tensor:
        """(N,): the last row is ignored if something is in an ignored row."""
        labels = torch.arange(self.N)
        return labels.masked_fill(labels == self.N - 1, -100) if "ignored" in self.spoilt else labels

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(policy, reference), each (N, V), before anything is spoilt."""
        generator = torch.Generator().manual_seed(0)
        z, noise = (torch.randn(self.N, self.V, generator=generator) for _ in range(2))
        return 3 * z + self.distance * noise + self.shift, 3 * z


PROBLEMS = (
    *(Problem(distance) for distance in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.5, 10.0, 40.0)),
    Problem(1e-4, shift=10.0),
    *(Problem(spoilt=f"NaN in {where} row") for where in ("an ignored", "a counted")),
    *(Problem(spoilt=f"-inf in {where}") for where in ("both", "reference", "policy")),
)
"""From the first steps of a training, when both models are all but equal, to distributions that hardly overlap."""
