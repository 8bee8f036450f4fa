"""How many rows a chunk of logits has, and in which order pairs go through: pure functions on the host.

A chunk's logits are all that ever exists of them. Rows are those that count: ignored ones have been dropped.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

TRAINED_ROWS = 2048
"""Rows of a chunk by default where the head is trained, or D if that is more: adding a chunk's product to a float32 d_weight
moves 8·V·D bytes, which is 163 / rows percent of the four products of a loss, and 2·rows bfloat16 logits weigh no more than
d_weight does from D rows on."""

FROZEN_ROWS = 1024
"""The same where it is not: nothing is added up, and 1,024 rows keep a matrix product busy."""


def rows_per_chunk(row_bytes: int, D: int, trained: bool, max_chunk_bytes: int | None) -> int:
    """Rows whose logits, of `row_bytes` a row for both models together, may live at once; at least one."""
    if max_chunk_bytes is None:
        return max(TRAINED_ROWS, D) if trained else FROZEN_ROWS
    return max(1, max_chunk_bytes // row_bytes)


def split(start: int, stop: int, rows: int) -> list[slice]:
    """[start, stop) in as few pieces of at most `rows` as it takes, of equal length but for one row."""
    pieces = -(-(stop - start) // rows)
    edges = [start + (stop - start) * i // max(pieces, 1) for i in range(pieces + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


class Group(NamedTuple):
    """Whole pairs that go through together. Everything counts in the plan's own order."""

    pairs: slice
    rows: slice
    is_long: bool
    """One pair of more rows than a chunk has: it takes several chunks."""


class Plan(NamedTuple):
    """An order of pairs, and its groups. Rows are ordered pair by pair, the chosen sequence's before the rejected one's."""

    pairs: list[int]
    groups: list[Group]


def plan_pairs(lengths: list[tuple[int, int]], rows: int) -> Plan:
    """Long pairs first, one group each; then the others, packed by size into groups of at most `rows` rows.

    Args:
        lengths: rows of the chosen and of the rejected sequence, of each pair. rows: rows of a chunk.
    """
    size = [sum(pair) for pair in lengths]
    bins: list[list[int]] = []
    room: list[int] = []
    for pair in sorted(range(len(lengths)), key=lambda pair: -size[pair]):  # first fit, decreasing; a long pair fits nowhere
        fits = next((i for i, free in enumerate(room) if size[pair] <= free), None)
        if fits is None:
            bins.append([pair])
            room.append(rows - size[pair])
        else:
            bins[fits].append(pair)
            room[fits] -= size[pair]

    groups, pairs, row = [], 0, 0
    for members in bins:
        more = sum(size[pair] for pair in members)
        groups.append(Group(slice(pairs, pairs + len(members)), slice(row, row + more), is_long=more > rows))
        pairs, row = pairs + len(members), row + more
    return Plan([pair for members in bins for pair in members], groups)


def host_counts(counts: Tensor) -> list[int]:
    """The number of rows, of each sequence or of all: a chunk's size must be known on the host. The one synchronisation of the
    hidden level, which `valid_rows` avoids."""
    return counts.tolist()


def as_counts(valid_rows: object, sequences: int, rows: int) -> list[int]:
    """`valid_rows` as the caller gave it: (S,) numbers of rows, on the host.

    Raises:
        ValueError: not that many numbers >= 0, or more than there are rows.
    """
    given = host_counts(valid_rows) if isinstance(valid_rows, Tensor) else valid_rows
    numbers = list(given) if isinstance(given, (list, tuple, torch.Size)) else None
    if numbers is None or len(numbers) != sequences or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(
            f"valid_rows must be {sequences} integers >= 0, one for each sequence: the number of its labels, the first one "
            f"left out, that are not ignore_index; got {valid_rows!r}. Leave it out to have them counted, which synchronises."
        )
    if sum(numbers) > rows:
        raise ValueError(f"valid_rows says that {sum(numbers)} labels count, of {rows}; got {numbers}")
    return numbers
