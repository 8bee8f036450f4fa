"""TDPO and DPO on the plain `transformers.Trainer`: the loss straight from hidden states, logits never whole.

    trainer = TDPOTrainer(model, args=TDPOConfig("out"), train_dataset=pairs, processing_class=tokenizer)
    trainer.train()

Pairs are rows with `prompt`, `chosen` and `rejected`: see data.py beside this. With TRL, use `fused_tdpo.integrations.trl`.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import Trainer, TrainingArguments, set_seed
except ImportError as error:
    raise ImportError("this trainer needs transformers and accelerate: pip install 'fused-tdpo[trainer]'") from error

from fused_tdpo.heads import backbone, call, eval_mode, unwrap
from fused_tdpo.integrations._trainer import PreferenceTrainerMixin, TDPOArguments
from fused_tdpo.integrations.data import (
    IDS,
    WEIGHTS,
    PreferenceCollator,
    check_pairs,
    drop_long_prompts,
    is_tokenized,
    tokenize_pairs,
)


@dataclass
class TDPOConfig(TDPOArguments, TrainingArguments):
    """`transformers.TrainingArguments`, the options of the loss in `TDPOArguments`, and those below.

    Defaults that differ: learning_rate 1e-6, logging_steps 10.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every that many steps."})
    beta: float = field(default=0.1, metadata={"help": "Inverse temperature of the implicit reward, > 0."})
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "The pair loss, a key of fused_tdpo.pair_losses.PAIR_LOSSES, or several, to be added."},
    )
    loss_weights: list[float] | None = field(default=None, metadata={"help": "Weights of the pair losses; None for 1."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Assumed share of swapped pairs, in [0, 0.5)."})
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of the pair loss discopop, > 0."})
    ld_alpha: float | None = field(
        default=None, metadata={"help": "LD-DPO: weight of tokens beyond the pair's shorter answer."}
    )
    use_weighting: bool = field(default=False, metadata={"help": "WPO: weigh pairs by how probable the policy finds them."})
    max_length: int | None = field(default=1024, metadata={"help": "Longer sequences lose their end; None: never."})
    packed: bool = field(default=False, metadata={"help": "Batches are one row without padding; see PreferenceCollator."})
    disable_dropout: bool = field(default=True, metadata={"help": "Dropout off in both models, so that they are comparable."})


class TDPOTrainer(PreferenceTrainerMixin, Trainer):
    """`transformers.Trainer` whose loss is TDPO's or DPO's.

    Args:
        model: a causal language model of transformers, or a PEFT model of one.
        ref_model: the reference. None: of a PEFT model its base model, adapters off, which costs no memory; of another one a
            deep copy as it is now. It is put on the device whole, also with FSDP.
        args: a `TDPOConfig`.
        data_collator: of rows of ids; by default a `PreferenceCollator`.
        train_dataset, eval_dataset: sequences of rows (or a dict of several, to evaluate). Rows of text are tokenised at once.
        processing_class: the tokenizer, needed for rows of text.
        peft_config: makes `model` a PEFT model.
        **others: as of `transformers.Trainer`. `compute_metrics` gets (chosen, rejected) rewards as predictions, and ones.

    Raises:
        TypeError, ValueError: what cannot be trained in this way, and the next step.
    """

    args: TDPOConfig
    _signature_columns: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: TDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        args = TDPOConfig() if args is None else args
        if not isinstance(args, TDPOConfig):
            raise TypeError(f"args must be a TDPOConfig of {__name__}; got {type(args).__name__}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a model, as AutoModelForCausalLM.from_pretrained gives it; got {model!r}")
        if ref_model is model:
            raise ValueError("model and ref_model must be two models; leave ref_model out for a copy of the model")
        loss = args.make_loss()
        if peft_config is not None:
            from peft import get_peft_model

            set_seed(args.seed)
            model = get_peft_model(model, peft_config)
        if others.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func is not used by TDPOTrainer, whose loss it would replace; leave it out")
        if hasattr(model, "peft_config") and not hasattr(model, "disable_adapter"):
            raise ValueError(
                "adapters made by model.add_adapter cannot be switched off for the reference: make them with "
                "peft.get_peft_model, or pass the adapter's config as peft_config"
            )
        is_peft = hasattr(model, "peft_config")
        if ref_model is None and not is_peft:
            ref_model = model if args.precompute_ref_hidden else copy.deepcopy(model)  # as it is before training
        if is_peft and args.gradient_checkpointing:
            model.enable_input_require_grads()
        batching: Any = args.accelerator_config
        if batching.dispatch_batches is None:  # accelerate would cut batches of iterable datasets apart, which ours cannot be
            batching.dispatch_batches = False
        if data_collator is None:
            pad = getattr(processing_class, "pad_token_id", None)
            data_collator = PreferenceCollator(pad or 0, args.max_length, args.packed)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=_prepared(train_dataset, processing_class, args),
            eval_dataset=_prepared(eval_dataset, processing_class, args),
            processing_class=processing_class,
            **others,
        )
        self.ref_model = ref_model
        if ref_model is not None and not hasattr(ref_model, "hf_device_map"):  # that of accelerate places it itself
            ref_model.to(args.device)
        if ref_model is not None and ref_model is not model:
            ref_model.requires_grad_(False)
        if args.packed:
            for either in (model, *([] if ref_model is None else [ref_model])):
                _check_packing(unwrap(either))
        self.set_up_loss(loss)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the pairs of a batch; with `return_outputs` also their `PreferenceOutput`."""
        out = self.preference_output(model, inputs)
        self.record(out, inputs)
        return (out.loss, out) if return_outputs else out.loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """(loss, rewards (P,) of chosen and of rejected, ones (P,)); the latter two None where only the loss is asked for."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, out = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        return loss.detach(), (out.chosen_rewards, out.rejected_rewards), torch.ones_like(out.losses)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **options: Any) -> dict[str, float]:
        """As of `transformers.Trainer`; takes rows of text, too."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = _prepared(eval_dataset, self.processing_class, self.args)
        return super().evaluate(eval_dataset, *args, **options)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*IDS, *WEIGHTS]  # the columns of a dataset that are kept for the collator


def _check_packing(model: nn.Module) -> None:
    """Raise unless the model keeps sequences apart that lie in one row, told by positions that begin anew.

    Raises:
        ValueError: it takes no positions, or mixes the sequences: recurrent models do, and attention without a mask for this.
    """
    name, body = type(model).__name__, backbone(model)
    device = next(model.parameters()).device
    parts = [torch.arange(3, 3 + length, device=device)[None] for length in (7, 5)]
    positions = [torch.arange(part.shape[1], device=device)[None] for part in parts]
    try:
        with eval_mode(model):
            apart = torch.cat([call(body, "last_hidden_state", input_ids=part) for part in parts], 1)
            packed = {"input_ids": torch.cat(parts, 1), "position_ids": torch.cat(positions, 1)}
            together = call(body, "last_hidden_state", **packed)
    except TypeError as error:
        raise ValueError(f"packed=True needs a model that takes position_ids, and {name} does not: {error}") from error
    tolerance = 1e-3 if apart.dtype == torch.float32 else 5e-2
    if not (apart - together).abs().max() <= tolerance * apart.abs().max():
        raise ValueError(
            f"packed=True needs a model that keeps packed sequences apart, and {name} mixes them: use packed=False, or another "
            f"attn_implementation than {getattr(model.config, '_attn_implementation', None)!r}"
        )


def _prepared(dataset: Any, tokenizer: Any, args: TDPOConfig) -> Any:
    """Rows of ids, checked. What cannot be looked at by index, or has no length, is left to the collator's checks."""
    if isinstance(dataset, dict):
        return {name: _prepared(part, tokenizer, args) for name, part in dataset.items()}
    if hasattr(dataset, "__next__"):
        raise ValueError(
            "train_dataset and eval_dataset are gone through more than once; got an iterator. Pass list(...) of it."
        )
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or not len(dataset):
        return dataset
    if tokenizer is not None and not is_tokenized(dataset[0]):
        return tokenize_pairs(dataset, tokenizer, args.max_length, progress=not args.disable_tqdm)
    check_pairs(dataset)
    if not is_tokenized(dataset[0]):
        raise ValueError("rows of text need a tokenizer: pass processing_class=AutoTokenizer.from_pretrained(...)")
    return drop_long_prompts(dataset, args.max_length)
