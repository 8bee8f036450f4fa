"""What is measured: one row per case, the first ones worth most. Tests take the cases tagged "small".

Two levels: `CASES` begin at the logits, `HIDDEN_CASES` at the hidden states.
"""

from dataclasses import dataclass

import torch

MODELS = {
    151_936: "Qwen 3",
    128_256: "Llama 3",
    262_144: "Gemma 3",
    32_000: "Llama 2",
    50_257: "GPT-2",  # odd: no 16-byte accesses
    49_152: "SmolLM 2",
}
"""Vocabulary -> a model whose logits are that wide."""


DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """Logits of N token rows and V columns, for policy and reference each."""

    N: int
    V: int
    dtype: torch.dtype = torch.bfloat16
    masked: float = 0.0
    """Share of the rows whose label is ignored, as a prompt's are."""
    tags: frozenset[str] = frozenset({"gpu"})

    only = ()

    @property
    def name(self) -> str:
        return f"N{self.N}-V{self.V}-{DTYPES[self.dtype]}" + (f"-masked{self.masked:g}" if self.masked else "")

    @property
    def model(self) -> str:
        return MODELS.get(self.V, "")

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


CPU = frozenset({"gpu", "cpu"})
SMALL = frozenset({"gpu", "cpu", "small"})

CASES = (
    *(Case(4096, V) for V in MODELS),
    Case(4096, 151_936, masked=0.5),
    Case(4096, 151_936, dtype=torch.float32),
    *(Case(16384, V) for V in MODELS),
    Case(128, 151_936, tags=CPU),
    Case(128, 32_000, tags=SMALL),
    Case(128, 151_936, dtype=torch.float32),
    *(Case(128, V) for V in (128_256, 262_144, 50_257, 49_152)),
)
"""On a GPU 128 rows show the fixed cost and 16,384 the sustained rate. A CPU takes 128 rows only."""


@dataclass(frozen=True)
class HiddenCase:
    """Hidden states of pairs of sequences, T positions each, the first half of them a prompt."""

    T: int
    D: int
    V: int
    pairs: int = 1
    dtype: torch.dtype = torch.bfloat16
    trained: bool = True
    """The policy's head gets a gradient. Frozen, as with adapters, it is the reference's as well."""
    only: tuple[str, ...] = ()
    """The providers to measure; all of them if empty."""
    tags: frozenset[str] = frozenset({"gpu"})

    model = ""

    @property
    def name(self) -> str:
        head = "" if self.trained else "-frozen"
        return f"P{self.pairs}-T{self.T}-D{self.D}-V{self.V}-{DTYPES[self.dtype]}{head}"

    @property
    def facts(self) -> dict[str, float]:
        """What a record says about this case alone."""
        names = ("pairs", "T", "D", "N", "trained", "flops", "gradient_bytes")
        return {name: getattr(self, name) for name in names}

    @property
    def N(self) -> int:
        """The rows that count: the last position of the prompt predicts the first label, the last position none."""
        return 2 * self.pairs * (self.T - self.T // 2)

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


_LONG = {"D": 896, "V": 151_936}
_ON_CPU = {"D": 512, "V": 32_000, "dtype": torch.float32}

HIDDEN_CASES = (
    *(
        HiddenCase(2048, D, V, pairs=pairs, trained=trained)
        for pairs, D, V in ((4, 4096, 151_936), (4, 896, 151_936), (2, 4096, 131_072))
        for trained in (True, False)
    ),
    HiddenCase(131_072, **_LONG),
    *(HiddenCase(T, **_LONG, only=("ours",)) for T in (262_144, 524_288, 1_048_576, 2_097_152)),
    HiddenCase(32, 64, 1000, dtype=torch.float32, tags=frozenset({"small"})),
    *(HiddenCase(T, **_ON_CPU, tags=frozenset({"cpu"})) for T in (512, 1024, 2048, 4096)),
    HiddenCase(2048, **_ON_CPU, trained=False, tags=frozenset({"cpu"})),
    HiddenCase(8192, **_ON_CPU, only=("ours", "naive_valid", "naive_all"), tags=frozenset({"cpu"})),
)
"""On a GPU 8,192 rows that count, at the widest heads and at narrow ones; then one pair, as long as fits. On a CPU one pair of
growing length; the longest takes minutes for each further provider."""
