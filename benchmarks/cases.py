"""What is measured: one row per case, the first ones worth most. Tests take the cases tagged "small"."""

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


@dataclass(frozen=True)
class Case:
    """Logits of N token rows and V columns, for policy and reference each."""

    N: int
    V: int
    dtype: torch.dtype = torch.bfloat16
    masked: float = 0.0
    """Share of the rows whose label is ignored, as a prompt's are."""
    tags: frozenset[str] = frozenset({"gpu"})

    @property
    def name(self) -> str:
        dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]
        return f"N{self.N}-V{self.V}-{dtype}" + (f"-masked{self.masked:g}" if self.masked else "")

    @property
    def model(self) -> str:
        return MODELS.get(self.V, "")

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
