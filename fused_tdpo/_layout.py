"""How token rows make up sequences: padded rows (S, T), or packed rows (total,) cut at `cu_seqlens`. Never synchronises."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_tdpo._checks import describe


class SequenceLayout:
    """Shifts per-token values and sums them per sequence, in a layout that it checks on the host.

    The contents of `cu_seqlens` are checked where that is free, on a CPU outside `torch.compile`. Elsewhere, whatever they are,
    no memory outside the rows is touched, and wrong contents make every sum NaN.

    Args:
        labels: (S, T), or (total,) with `cu_seqlens`; only shape and device are used.
        cu_seqlens: (S + 1,) int32 or int64; sequence s is the rows cu_seqlens[s] to cu_seqlens[s + 1] - 1.

    Raises:
        ValueError: shapes, dtypes, devices or contents that do not fit together.
    """

    def __init__(self, labels: Tensor, cu_seqlens: Tensor | None) -> None:
        self.offsets = None
        if cu_seqlens is None:
            if labels.dim() != 2:
                raise ValueError(
                    f"labels must have shape (S, T); got {describe(labels)}. Packed rows (total,) need cu_seqlens (S + 1,)."
                )
            self.num_sequences = labels.shape[0]
            return

        if labels.dim() != 1:
            raise ValueError(
                f"with cu_seqlens, labels must have shape (total,) and logits (total, V); got labels {describe(labels)}. "
                "Call squeeze(0) or flatten(0, 1) on both, or leave cu_seqlens out."
            )
        total = labels.shape[0]
        expected = f"cu_seqlens must be (S + 1,) int32 or int64 on {labels.device}, rising from 0 to total = {total}"
        fits = isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype in (torch.int32, torch.int64)
        if not (fits and cu_seqlens.dim() == 1 and len(cu_seqlens) > 0 and cu_seqlens.device == labels.device):
            raise ValueError(f"{expected}; got {describe(cu_seqlens)}. From lengths (S,): F.pad(lengths.cumsum(0), (1, 0)).")
        rising = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & (cu_seqlens.diff() >= 0).all()
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling() and not rising:
            raise ValueError(
                f"{expected}; got {cu_seqlens}. From lengths (S,): F.pad(lengths.cumsum(0), (1, 0)). Rows that only pad the "
                "batch belong to the last sequence, with ignored labels."
            )
        self.num_sequences = len(cu_seqlens) - 1
        self.offsets = torch.where(rising, cu_seqlens, 0).long()
        self.is_start = torch.zeros(total + 1, dtype=torch.bool, device=labels.device).index_fill(0, self.offsets, True)
        self.one = torch.where(rising, 1.0, float("nan"))

    def shift(self, values: Tensor, fill: float) -> Tensor:
        """Moves values one position towards the start of their sequence, whose last position gets `fill`. Differentiable."""
        shifted = F.pad(values, (0, 1), value=fill)[..., 1:]
        return shifted if self.offsets is None else shifted.masked_fill(self.is_start[1:], fill)

    def sum(self, values: Tensor) -> Tensor:
        """(S,) sums over each sequence; an empty one gives 0. Differentiable, and repeatable to the bit."""
        if self.offsets is None:
            return values.sum(-1)
        # float64, because a CPU adds one after the other; index_add_ and differences of cumsum do not repeat on a GPU
        sums = torch.segment_reduce(values.double(), "sum", offsets=self.offsets, unsafe=True, initial=0)
        return (sums * self.one).to(values.dtype)

    def sequence_ids(self, labels: Tensor) -> Tensor:
        """The sequence of each row: int64, of labels' shape."""
        if self.offsets is None:
            ids = torch.arange(self.num_sequences, device=labels.device)
            return ids[:, None].expand(labels.shape)
        ids = torch.bucketize(torch.arange(len(labels), device=labels.device), self.offsets[1:], right=True)
        return ids.clamp(max=max(self.num_sequences - 1, 0))  # whatever cu_seqlens holds
