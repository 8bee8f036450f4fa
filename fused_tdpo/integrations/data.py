"""Preference data for the trainer without TRL: rows of text or of ids, and batches of P pairs.

A row is a mapping with `prompt`, `chosen` and `rejected`, strings or lists of chat messages; or, tokenised, with `prompt_ids`,
`chosen_ids` and `rejected_ids`, lists of integers. Rows of ids may have `chosen_weights` and `rejected_weights`, a number for
each id of an answer: the `token_weights` of the losses, as for TIS-DPO (docs/recipes.md).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from logging import getLogger
from math import isfinite
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

logger = getLogger(__name__)

TEXT = ("prompt", "chosen", "rejected")
IDS = tuple(f"{name}_ids" for name in TEXT)
WEIGHTS = tuple(f"{name}_weights" for name in TEXT[1:])
SHOWN = 10
"""Rows that an error lists."""


def check_pairs(rows: Iterable[Mapping[str, Any]], strict: bool = True) -> None:
    """Looks at every row.

    Args:
        rows: of text or of ids.
        strict: False: as TRL takes rows of text, whose prompt may be the common start of both answers, and these empty.

    Raises:
        ValueError: some are no pairs; the message is a table of row number, field and what is wrong, of the first ones.
    """
    kinds: set[bool] = set()
    wrong = ((number, *problem) for number, row in enumerate(rows) for problem in _problems(row, strict, kinds))
    found = list(islice(wrong, SHOWN + 1))
    if found:
        lines = [f"  {number:>7}  {name:<16}  {problem}" for number, name, problem in found[:SHOWN]]
        more = ["  ... and more"] if len(found) > SHOWN else []
        table = "\n".join(["      row  field             problem", *lines, *more])
        raise ValueError(
            f"these rows are no preference pairs:\n{table}\nA row has {', '.join(TEXT)} (text or chat messages), or "
            f"{', '.join(IDS)} (lists of token ids). Mend or drop them."
        )


def is_tokenized(row: Any) -> bool:
    """Whether a row holds ids rather than text."""
    return isinstance(row, Mapping) and any(name in row for name in IDS)


def _problems(row: Any, strict: bool, kinds: set[bool]) -> Iterable[tuple[str, str]]:
    """(field, what is wrong) of one row; `kinds` holds whether the first one has ids."""
    if not isinstance(row, Mapping):
        yield "", f"expected a mapping, got {type(row).__name__}"
        return
    tokenized = is_tokenized(row)
    kinds |= set() if kinds else {tokenized}
    if tokenized not in kinds:
        yield "", f"{'ids' if tokenized else 'no ids'}, unlike the first row"
        return
    for name in IDS if tokenized else TEXT:
        value: Any = row.get(name)
        if name not in row:
            if strict or name != "prompt":
                yield name, f"missing; there are {', '.join(map(repr, row)) or 'no fields'}"
        elif tokenized:
            ids = _as_list(value)
            if isinstance(ids, str) or not isinstance(ids, Sequence):
                yield name, f"expected a list of token ids, got {type(value).__name__}"
            elif not _are_ids(ids):
                yield name, "expected integers >= 0 only"
            elif not ids and name != "prompt_ids":
                yield name, "empty"
        elif isinstance(value, str):
            if not value and strict and name != "prompt":
                yield name, "empty"
        elif not isinstance(value, Sequence) or not value:
            yield name, f"expected text or a list of chat messages, got {'none' if value is None else repr(value)[:40]}"
        elif not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value):
            yield name, "expected chat messages, mappings with role and content"
    for name in row:
        if "weight" in str(name) and name not in WEIGHTS:
            yield str(name), f"unknown; weights of tokens are {' and '.join(WEIGHTS)}"
    for name in WEIGHTS:
        if row.get(name) is None:  # so a dataset says that this row has none
            continue
        if not tokenized:
            yield name, "weights are of token ids, and this row has none"
        else:
            weights, ids = _as_list(row[name]), _as_list(row.get(name.replace("weights", "ids"), ()))
            if isinstance(weights, str) or not isinstance(weights, Sequence) or len(weights) != len(ids):
                yield name, f"expected a list of {len(ids)} numbers, one for each id"
            elif not all(isinstance(weight, Real) and isfinite(weight) for weight in weights):
                yield name, "expected finite numbers only"
    if not tokenized and len({isinstance(row.get(name), str) for name in TEXT if name in row}) > 1:
        yield "", "text in one field and chat messages in another"


def _as_list(values: Any) -> Any:
    """Tensors and arrays as lists."""
    return values.tolist() if hasattr(values, "tolist") else values


def _are_ids(values: Sequence[Any]) -> bool:
    whole = all(issubclass(kind, Integral) and kind is not bool for kind in set(map(type, values)))
    return whole and min(values, default=0) >= 0


def tokenize_pairs(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int | None = None, progress: bool = True
) -> list[dict[str, list[int]]]:
    """Rows of text -> rows of ids.

    Text gets the tokenizer's end-of-sequence token, if it has one, at the end of both answers; chat messages go through its
    chat template. Answers begin where the ids of prompt and answer leave those of the prompt alone, in either: tokens may merge
    across the boundary, and the prompt's last ones count as part of the answers then.

    Args:
        rows: with `prompt`, `chosen`, `rejected`.
        tokenizer: a tokenizer of transformers.
        max_length: rows whose prompt leaves no room for an answer are dropped, and their number is logged as a warning.
        progress: whether to show it.

    Raises:
        ValueError: rows that are no pairs, as `check_pairs` says, or have ids already; or none left.
    """
    from tqdm.auto import tqdm

    check_pairs(rows)
    if not len(rows) or is_tokenized(rows[0]):
        raise ValueError(f"tokenize_pairs takes rows of text; got {'rows of token ids' if len(rows) else 'no rows'}")
    result = []
    for row in tqdm(rows, "tokenizing", unit=" pairs", disable=not progress):
        prompt = _encode(row, ("prompt",), tokenizer)
        chosen, rejected = (_encode(row, ("prompt", name), tokenizer) for name in ("chosen", "rejected"))
        n = min(_common(prompt, chosen), _common(prompt, rejected))
        result.append({"prompt_ids": prompt[:n], "chosen_ids": chosen[n:], "rejected_ids": rejected[n:]})
    return drop_long_prompts(result, max_length)


def drop_long_prompts(rows: Any, max_length: int | None) -> Any:
    """Rows of ids less those whose prompt leaves no room for an answer; their number is logged as a warning.

    Raises:
        ValueError: none are left.
    """
    kept = [i for i, row in enumerate(rows) if max_length is None or len(row["prompt_ids"]) < max_length]
    if len(kept) == len(rows):
        return rows
    logger.warning("dropped %d of %d pairs, whose prompt fills max_length=%d", len(rows) - len(kept), len(rows), max_length)
    if not kept:
        raise ValueError(f"no pairs are left of {len(rows)}: raise max_length={max_length}, or shorten the prompts")
    return rows.select(kept) if hasattr(rows, "select") else [rows[i] for i in kept]


def _encode(row: Mapping[str, Any], names: tuple[str, ...], tokenizer: Any) -> list[int]:
    """Ids of some fields of a row, one after the other."""
    answered, end = len(names) > 1, tokenizer.eos_token or ""
    if isinstance(row["prompt"], str):
        text = "".join(row[name] for name in names)
        return tokenizer(text + end if answered and not text.endswith(end) else text)["input_ids"]
    messages = [message for name in names for message in row[name]]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=not answered, return_dict=True)["input_ids"]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@dataclass
class PreferenceCollator:
    """P rows of ids -> a batch of S = 2P sequences, the chosen ones first.

    Padded: `input_ids`, `attention_mask` and `labels` (S, T), on the right. Packed, without padding: `input_ids`,
    `position_ids` and `labels` (1, total), and `cu_seqlens` (S + 1,); models of transformers see the boundaries in the
    positions, which begin anew. Labels are `ignore_index` on prompt and padding. `valid_rows` has the number of labels that
    count in each sequence, which saves the loss its synchronisation. If any row has weights there are `token_weights`, float32
    and of labels' shape; answers without them weigh 1.
    """

    pad_token_id: int = 0
    """The id in padding; whichever, since it is masked."""
    max_length: int | None = None
    """Longer sequences lose their end."""
    packed: bool = False
    """One row without padding in place of one for each sequence."""
    ignore_index: int = -100
    """The label of tokens that do not count."""

    def __post_init__(self) -> None:
        if not isinstance(self.pad_token_id, int) or self.pad_token_id < 0:
            raise ValueError(
                f"pad_token_id must be an integer >= 0; got {self.pad_token_id!r}. Any id will do, since padding is masked: "
                "the tokenizer's eos_token_id, or 0."
            )
        if self.max_length is not None and (not isinstance(self.max_length, int) or self.max_length < 1):
            raise ValueError(f"max_length must be an integer >= 1, or None; got {self.max_length!r}")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Raises:
            ValueError: rows that are not tokenised pairs, numbered as in the batch.
        """
        if not rows or not any(is_tokenized(row) for row in rows):
            raise ValueError(
                f"the collator takes rows of token ids, at least one; got {len(rows)} without ids. Make them with "
                "fused_tdpo.integrations.data.tokenize_pairs."
            )
        check_pairs(rows)
        ids, labels, weights = [], [], []
        for name, weight in zip(IDS[1:], WEIGHTS, strict=True):
            for row in rows:
                prompt, answer = (torch.tensor(_as_list(row[part]), dtype=torch.long) for part in ("prompt_ids", name))
                ids.append(torch.cat([prompt, answer])[: self.max_length])
                labels.append(torch.cat([prompt.new_full(prompt.shape, self.ignore_index), answer])[: self.max_length])
                own = row.get(weight)
                own = torch.ones(len(answer)) if own is None else torch.tensor(_as_list(own), dtype=torch.float32)
                weights.append(torch.cat([torch.zeros(len(prompt)), own])[: self.max_length])
        batch: dict[str, Any] = {"valid_rows": [int((label[1:] != self.ignore_index).sum()) for label in labels]}
        lengths = torch.tensor([len(sequence) for sequence in ids])
        weighted = any(row.get(name) is not None for row in rows for name in WEIGHTS)
        if self.packed:
            boundaries = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
            batch |= {"position_ids": positions[None], "cu_seqlens": boundaries}
            batch |= {"token_weights": torch.cat(weights)[None]} if weighted else {}
            return batch | {"input_ids": torch.cat(ids)[None], "labels": torch.cat(labels)[None]}
        batch |= {"token_weights": _pad(weights, 0)} if weighted else {}
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return batch | {"input_ids": _pad(ids, self.pad_token_id), "labels": _pad(labels, self.ignore_index)}


def _pad(sequences: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)
