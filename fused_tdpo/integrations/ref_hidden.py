"""The reference's hidden states, computed once and read from disk ever after: training then holds only its head.

TDPO's KL takes the reference's whole distribution at each token, so its log-probabilities cannot be precomputed as DPO's can.
Its last hidden states can: D numbers for each label that counts, at the position that predicts it. Its head makes the same
logits of them as before, in the same product.

What it costs and saves, with D the hidden size, B the bytes of its dtype and W the number of weights:

    on disk            B·D a label that counts: 2 KiB in bfloat16 at D = 1,024, 8 KiB at D = 4,096
    in memory          the reference without its head, some B·(W − V·D) bytes
    from epoch 2 on    the reference's forward, some 2·W flops for every token, prompts included

W / D labels (some 500,000 for 0.6 billion weights at D = 1,024) take as much disk as the reference takes memory. It is
sensible for full fine-tuning of models with a small D on small data, in several epochs or where the reference does not fit.
With adapters the reference costs no memory, and only its forward is saved.

Files are `<ref_hidden_dir>/<fingerprint>/<first pair>-<last>.safetensors`, with the `hidden` (n, D) of these pairs: of each the
chosen answer's, then the rejected one's. The fingerprint is of the reference (weights and config), of the batch that the
collator makes of each pair, and of the dtype: what another model or other data left is never read, nor deleted.
"""

import json
import shutil
from bisect import bisect_right
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from itertools import accumulate
from logging import INFO, WARNING, getLogger
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple
from uuid import uuid4

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fused_tdpo.heads import unwrap

logger = getLogger(__name__)

FIELDS = ("ref_chosen_hidden", "ref_rejected_hidden")
"""What a row holds besides: (n, D) each."""
SHARD_BYTES = 2**29
"""Bound on a file, unless one batch is larger."""
PATIENCE = 60.0
"""Seconds until a file that another process has written must be seen."""


def precompute_ref_hidden(trainer: Any) -> None:
    """Gives the rows of a trainer's datasets the reference's hidden states, and releases the reference but for its head.

    States that are on disk already are read, missing ones computed, by each process its share: all must see one folder. The
    trainer's datasets and collator are replaced by ones that read them, in the workers of a data loader.

    Args:
        trainer: with `PreferenceTrainerMixin`, whose loss is set up.

    Raises:
        ValueError: they do not fit on the disk; or they cannot be precomputed in this setting, and the next step.
    """
    args, sources = trainer.args, []
    folder = Path(args.ref_hidden_dir or Path(args.output_dir) / "ref_hidden")
    _refuse(trainer, folder)
    weights = _digest_of_weights(trainer)

    def source(rows: Any, batch_size: int) -> Any:
        if isinstance(rows, dict):
            return {name: source(part, batch_size) for name, part in rows.items()}
        if rows is None:
            return None
        sources.append(_source(trainer, rows, folder, weights, batch_size))
        return sources[-1]

    trainer.train_dataset, trainer.eval_dataset = (
        source(trainer.train_dataset, args.train_batch_size),
        source(trainer.eval_dataset, args.eval_batch_size),
    )
    work = [(dataset, shard) for dataset in sources for shard in dataset.shards if not shard.is_whole()]
    _check_space(folder, sources, work, trainer.accelerator.is_main_process)
    trainer.accelerator.wait_for_everyone()  # all have seen the same before the first one writes
    _compute(trainer, work[args.process_index :: args.world_size])
    trainer.accelerator.wait_for_everyone()
    _wait_for_files([shard for _, shard in work])
    trainer.data_collator = RefHiddenCollator(trainer.data_collator, trainer.loss.ignore_index)
    _release(trainer)


def spread(states: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """Hidden states of the labels that count -> those of all positions, 0 elsewhere. Does not wait for the device.

    Args:
        states: (n, D), in the order of `labels`.
        labels: (S, T), or packed (1, total) with `cu_seqlens` (S + 1,); unshifted.

    Returns:
        (S, T, D), or (1, total, D).
    """
    counts = counting_positions(labels, cu_seqlens, ignore_index)
    rows = counts.cumsum(0) * counts  # 1, 2, ... where a label counts, else 0: a row of zeros in front
    return F.pad(states, (0, 0, 1, 0)).index_select(0, rows).view(*labels.shape, -1)


def counting_positions(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """Flat, bool: whether the *next* label of the sequence counts. Arguments are as in `spread`."""
    counts = labels != ignore_index
    if cu_seqlens is None:
        counts[:, 0] = False  # nothing predicts it; nor will the last position of the sequence before, to which it is rolled
    else:
        counts[0].index_fill_(0, cu_seqlens[:-1].long(), False)
    return counts.flatten().roll(-1)


class WithRefHidden(Dataset):
    """A dataset of pairs, each with `FIELDS` besides what it has. These are read from the disk when they are asked for.

    Args:
        rows: the pairs.
        lengths: how many labels count in the chosen and in the rejected answer of each pair.
        shards: the files, in the order of the pairs.
        batch_size: how many pairs at a time went, or are to go, through the reference.
    """

    def __init__(self, rows: Any, lengths: Sequence[tuple[int, int]], shards: Sequence["Shard"], batch_size: int) -> None:
        self.rows, self.lengths, self.shards, self.batch_size = rows, lengths, shards, batch_size
        self._starts = [shard.pairs.start for shard in shards]
        self._offsets = [0, *accumulate(map(sum, lengths))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        i = range(len(self))[index]
        shard = self.shards[bisect_right(self._starts, i) - 1]
        first = self._offsets[i] - self._offsets[shard.pairs.start]
        states = _opened(shard.path)[first : first + sum(self.lengths[i])]
        # not a dict: of these Trainer takes the columns away that it does not know
        return ChainMap(dict(zip(FIELDS, states.split(self.lengths[i]), strict=True)), self.rows[i])


@dataclass
class RefHiddenCollator:
    """Another collator, and `ref_hidden` (n, D): the states of the labels that count, in the order of the batch.

    Rows without states, of datasets that the trainer had not seen, are left to the other collator alone.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    ignore_index: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Raises:
            ValueError: not as many states as labels that count.
        """
        batch = self.collator([{name: value for name, value in row.items() if name not in FIELDS} for row in rows])
        if any(name not in row for row in rows for name in FIELDS):
            return batch
        states = torch.cat([row[name] for name in FIELDS for row in rows])  # a copy: those of a row lie in a mapped file
        expected = int(counting_positions(batch["labels"], batch.get("cu_seqlens"), self.ignore_index).sum())
        if len(states) != expected:
            raise ValueError(
                f"{expected} labels count in this batch, whose rows have {len(states)} hidden states of the reference: the "
                "collator was changed since they were computed; change it before, or make a new trainer"
            )
        return batch | {"ref_hidden": states}


class Shard(NamedTuple):
    """A file, and what is in it."""

    path: Path
    pairs: range
    shape: list[int]
    """[n, D]."""
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def is_whole(self) -> bool:
        """Whether it is there; a file that the end of a machine cut is not."""
        from safetensors import SafetensorError

        try:
            return _open(self.path).get_shape() == self.shape
        except (FileNotFoundError, SafetensorError):
            return False


def _open(path: Path) -> Any:
    """The states in a file, mapped into memory, to be sliced."""
    from safetensors import safe_open

    return safe_open(path, "pt").get_slice("hidden")


_opened = lru_cache(maxsize=128)(_open)  # each process has its own


# --- what there is to compute -----------------------------------------------------------------------------------------------


def _source(trainer: Any, rows: Any, folder: Path, weights: bytes, batch_size: int) -> WithRefHidden:
    digest, lengths = sha256(weights), []
    for i in _progress(trainer, range(len(rows)), "looking at pairs"):
        batch = trainer.data_collator([rows[i]])
        for name in sorted(batch):
            if isinstance(batch[name], Tensor):
                digest.update(_bytes(name, batch[name]))
        cu_seqlens = batch.get("cu_seqlens")
        counts = counting_positions(batch["labels"], cu_seqlens, trainer.loss.ignore_index)
        boundary = len(counts) // 2 if cu_seqlens is None else int(cu_seqlens[1])
        lengths.append((int(counts[:boundary].sum()), int(counts[boundary:].sum())))
    example = _states(trainer, trainer.data_collator([rows[0]]))
    (_, D), dtype = example.shape, example.dtype
    digest.update(f"{D} {dtype} {trainer.accelerator.mixed_precision}".encode())
    folder = folder / digest.hexdigest()[:32]
    shards = []
    for pairs in _cut([sum(both) for both in lengths], SHARD_BYTES // (D * dtype.itemsize), batch_size):
        path = folder / f"{pairs.start:08}-{pairs.stop - 1:08}.safetensors"
        shards.append(Shard(path, pairs, [sum(map(sum, lengths[pairs.start : pairs.stop])), D], dtype))
    return WithRefHidden(rows, lengths, shards, batch_size)


def _cut(labels: Sequence[int], most: int, batch_size: int) -> list[range]:
    """Consecutive pairs, in whole batches, with at most so many labels that count unless one batch has more."""
    starts, found = [0], 0
    for start in range(0, len(labels), batch_size):
        batch = sum(labels[start : start + batch_size])
        if start > starts[-1] and found + batch > most:
            starts.append(start)
            found = 0
        found += batch
    return [range(*ends) for ends in zip(starts, [*starts[1:], len(labels)], strict=True)]


def _digest_of_weights(trainer: Any) -> bytes:
    """Of the reference: weights, config, and what else its forward depends on.

    Raises:
        ValueError: the reference is the policy without its adapters, and more than these is trained.
    """
    model = trainer.model if trainer.ref_model is None else trainer.ref_model
    base = unwrap(model)
    weights = base.state_dict()
    config = base.config.to_dict() | {"attention": getattr(base.config, "_attn_implementation", None)}
    config.pop("_name_or_path", None)
    if trainer.ref_model is None:
        config["adapter"] = model.peft_config["ref"].to_dict() if "ref" in model.peft_config else None
        parts = (model.base_model.prefix, "modules_to_save.")
        weights = {
            name: weight
            for name, weight in weights.items()
            if not any(part in name for part in parts) or ".ref." in f"{name}."  # the adapter that TRL keeps as reference
        }
        moving = [name for name, weight in base.named_parameters() if weight.requires_grad and name in weights]
        if moving:
            raise ValueError(
                f"precompute_ref_hidden=True needs a reference that stays as it is, and with its adapters off this model has "
                f"{len(moving)} weights that are trained, such as {moving[0]}: freeze them, or pass a ref_model"
            )
    digest = sha256(json.dumps([type(base).__name__, config], sort_keys=True, default=_as_json).encode())
    for name, weight in weights.items():
        if isinstance(weight, Tensor):
            digest.update(_bytes(name, weight))
    return digest.digest()


def _as_json(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set) else str(value)


def _bytes(name: str, tensor: Tensor) -> bytes:
    """With its name, dtype and shape."""
    from safetensors.torch import save

    return save({name: tensor.detach().contiguous()})


# --- computing --------------------------------------------------------------------------------------------------------------


def _compute(trainer: Any, work: Sequence[tuple[WithRefHidden, Shard]]) -> None:
    """Writes files, each at once or not at all."""
    from safetensors.torch import save_file

    with _progress(trainer, None, "reference's hidden states", total=sum(len(shard.pairs) for _, shard in work)) as bar:
        for dataset, shard in work:
            states: list[Tensor] = []
            for start in shard.pairs[:: dataset.batch_size]:
                pairs = range(start, min(start + dataset.batch_size, shard.pairs.stop))
                found = _states(trainer, trainer.data_collator([dataset.rows[i] for i in pairs]))
                lengths = [dataset.lengths[i][side] for side in (0, 1) for i in pairs]
                chosen_first = found.to("cpu").split(lengths)
                states += [chosen_first[p + side] for p in range(len(pairs)) for side in (0, len(pairs))]
                bar.update(len(pairs))
            shard.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = shard.path.with_name(f"{shard.path.name}.{uuid4().hex}.tmp")
            try:
                save_file({"hidden": torch.cat(states)}, unfinished)
                unfinished.replace(shard.path)
            finally:
                unfinished.unlink(missing_ok=True)


def _wait_for_files(shards: Sequence[Shard]) -> None:
    """Of all processes: a network file system may show those of other machines late."""
    for shard in shards:
        end = monotonic() + PATIENCE
        while not shard.is_whole():
            if monotonic() > end:
                raise ValueError(
                    f"another process should have written {shard.path}: ref_hidden_dir must be a folder that all of them share"
                )
            sleep(1)


def _states(trainer: Any, batch: Mapping[str, Any]) -> Tensor:
    """(n, D): the reference's hidden states of the labels that count, in the order of a batch, as training would make them."""
    inputs = trainer._prepare_inputs(batch)
    labels, cu_seqlens = inputs.pop("labels"), inputs.pop("cu_seqlens", None)
    inputs.pop("valid_rows", None)
    counts = counting_positions(labels, cu_seqlens, trainer.loss.ignore_index)
    hidden, _ = trainer.reference_hidden(inputs)
    return hidden.flatten(0, 1)[counts.to(hidden.device)]


def _release(trainer: Any) -> None:
    """Lets go of the reference, but for a copy of its head. Memory is free when training begins, and collects garbage."""
    head = trainer.ref_head
    if head is None:
        return
    bias = None if head.bias is None else head.bias.detach().clone()
    trainer.ref_head, trainer.ref_model = replace(head, weight=head.weight.detach().clone(), bias=bias), None
    trainer.accelerator.free_memory()  # where TRL's trainer has put the reference, too


def _progress(trainer: Any, what: Any, label: str, **options: Any) -> Any:
    from tqdm.auto import tqdm

    shown = trainer.accelerator.is_main_process and not trainer.args.disable_tqdm
    return tqdm(what, label, unit=" pairs", disable=not shown, **options)


# --- refusals ---------------------------------------------------------------------------------------------------------------


def _refuse(trainer: Any, folder: Path) -> None:
    args = trainer.args
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "precompute_ref_hidden=True goes with one process or DDP, where each process can run the whole reference alone; "
            "with FSDP or DeepSpeed leave it off"
        )
    if getattr(args, "sync_ref_model", False):
        raise ValueError(
            "precompute_ref_hidden=True keeps the reference as it is at the start, and sync_ref_model=True changes it: leave "
            "one of them off"
        )
    if args.push_to_hub and folder.resolve().is_relative_to(Path(args.output_dir).resolve()):
        raise ValueError(
            f"push_to_hub=True uploads what is in output_dir, and so the hidden states in {folder}: set ref_hidden_dir to a "
            "folder elsewhere"
        )
    evaluated = trainer.eval_dataset
    for rows in (trainer.train_dataset, *(evaluated.values() if isinstance(evaluated, dict) else [evaluated])):
        if rows is not None and not (hasattr(rows, "__getitem__") and hasattr(rows, "__len__") and len(rows)):
            raise ValueError(
                f"precompute_ref_hidden=True needs rows that can be looked at by index, at least one; got "
                f"{type(rows).__name__}: load a stream whole, or leave the option off"
            )


def _check_space(
    folder: Path, sources: Sequence[WithRefHidden], work: Sequence[tuple[WithRefHidden, Shard]], is_main_process: bool
) -> None:
    total = sum(shard.num_bytes for dataset in sources for shard in dataset.shards)
    needed = sum(shard.num_bytes for _, shard in work)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the reference's hidden states need {_size(needed)} more in {folder}, where {_size(free)} are free: set "
            "ref_hidden_dir to a larger disk, delete folders there that other models or data left, train on fewer pairs, or "
            "set precompute_ref_hidden=False"
        )
    if is_main_process:
        used = ", ".join(sorted({dataset.shards[0].path.parent.name for dataset in sources}))
        logger.log(
            WARNING if needed else INFO,
            "the reference's hidden states take %s in %s (%s), of which %s are still to be computed; %s are free",
            *(_size(total), folder, used, _size(needed), _size(free)),
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes:,} bytes ({num_bytes / 2**30:.1f} GiB)"
