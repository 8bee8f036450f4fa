"""What our trainers share, over whichever `transformers.Trainer` they extend: options, the reference, the loss, metrics."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fused_tdpo.heads import LMHead, eval_mode, unwrap
from fused_tdpo.integrations._steps import accept_steps, current_head, hidden_states, through_head
from fused_tdpo.integrations.ref_hidden import precompute_ref_hidden, spread
from fused_tdpo.linear_losses import ENGINES, LinearDPOLoss, LinearPreferenceLoss, LinearTDPOLoss
from fused_tdpo.pair_losses import TOKEN_METRICS
from fused_tdpo.types import PreferenceOutput

VARIANTS = ("tdpo1", "tdpo2", "dpo")
LOSS_OPTIONS = ("beta", "loss_type", "loss_weights", "label_smoothing", "discopop_tau", "ld_alpha", "use_weighting")
"""Options of the losses that `trl.DPOConfig` has under the same names."""
LOGITS_DTYPES = {None: None, "float32": torch.float32}

SIDE = {name: side for name, (_, side) in TOKEN_METRICS.items()}
"""Metrics that are means over tokens -> whose tokens these are. All others are means over pairs."""


@dataclass
class TDPOArguments:
    """The options of the loss, beside those that the config of a trainer has anyway."""

    tdpo_variant: str = field(default="tdpo2", metadata={"help": "Token-level DPO 1 or 2, or DPO.", "choices": list(VARIANTS)})
    tdpo_alpha: float = field(default=0.5, metadata={"help": "Weight of the sequential KL in TDPO2, >= 0."})
    divergence: str = field(default="forward_kl", metadata={"help": "The per-token divergence; forward_kl is TDPO's."})
    divergence_alpha: float | None = field(default=None, metadata={"help": "Its order, where it has one."})
    engine: str = field(
        default="auto", metadata={"help": "How the loss is computed: auto, one_pass or recompute.", "choices": list(ENGINES)}
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Columns of both models' logits to use, where they are padded differently."}
    )
    max_chunk_bytes: int | None = field(
        default=None, metadata={"help": "Bound on the logits of both models that exist at once, in bytes."}
    )
    logits_dtype: str | None = field(
        default=None, metadata={"help": "float32: logits in float32 in half-precision training, for an accurate KL near 0."}
    )
    backend: str = field(default="auto", metadata={"help": "Who computes: auto, triton, torch or reference."})
    precompute_ref_hidden: bool = field(
        default=False,
        metadata={
            "help": "The reference's hidden states are computed once, on disk, and only its head is kept: for full fine-tuning "
            "of models with a small hidden size on small data. See fused_tdpo.integrations.ref_hidden."
        },
    )
    ref_hidden_dir: str | None = field(
        default=None, metadata={"help": "Where these are; by default ref_hidden in output_dir. All processes must see it."}
    )

    def make_loss(self, **dpo_options: Any) -> LinearPreferenceLoss:
        """The loss that these options and those in `LOSS_OPTIONS` describe; `dpo_options` are for `LinearDPOLoss` alone.

        Raises:
            ValueError: options that are unknown or do not fit together.
        """
        if self.tdpo_variant not in VARIANTS:
            raise ValueError(
                f"tdpo_variant must be one of {', '.join(VARIANTS)}; got {self.tdpo_variant!r}. KTO, BCO, SimPO, CPO, ORPO and "
                "TI-DPO are losses for a loop of your own"
            )
        if self.ref_hidden_dir is not None and not self.precompute_ref_hidden:
            raise ValueError(
                f"ref_hidden_dir={self.ref_hidden_dir!r} is for precompute_ref_hidden=True; set that, or leave it out"
            )
        if not self.tdpo_alpha >= 0:
            raise ValueError(f"tdpo_alpha must be a number >= 0; got {self.tdpo_alpha!r}")
        if self.logits_dtype not in LOGITS_DTYPES:
            raise ValueError(f"logits_dtype must be 'float32' or None, the dtype of training; got {self.logits_dtype!r}")
        options: dict[str, Any] = {name: getattr(self, name) for name in LOSS_OPTIONS} | {
            "divergence": self.divergence,
            "divergence_alpha": self.divergence_alpha,
            "engine": self.engine,
            "vocab_size": self.vocab_size,
            "max_chunk_bytes": self.max_chunk_bytes,
            "logits_dtype": LOGITS_DTYPES[self.logits_dtype],
            "backend": self.backend,
            "extras": ("entropy", "accuracy", "mean_logit"),
        }
        if self.tdpo_variant == "dpo":
            return LinearDPOLoss(**options, **dpo_options)
        return LinearTDPOLoss(alpha=self.tdpo_alpha, variant=self.tdpo_variant, **options)  # type: ignore[arg-type]


class PreferenceTrainerMixin:
    """Beside a `transformers.Trainer`, which calls `set_up_loss` once its model and `ref_model` are there.

    A batch holds what the model takes, and of the loss's arguments `labels`, and if there are any `token_weights`, `valid_rows`
    and `cu_seqlens`.
    """

    loss_is_scaled_for_ga: Any = False  # a mean over the pairs of a micro-batch, which the trainer divides by their number
    ref_model: Any
    """The reference; None: the policy's own base model, with its adapters off or its adapter "ref" on; or precomputed."""

    def set_up_loss(self, loss: LinearPreferenceLoss) -> None:
        """Reads the heads of both models, and teaches both to run the loss. Turns dropout off, where that is asked for.

        Raises:
            TypeError, ValueError: what cannot be trained in this way, and the next step.
        """
        trainer: Any = self
        if trainer.args.n_gpu > 1:
            raise ValueError(
                f"{trainer.args.n_gpu} GPUs are visible to one process, for which Trainer takes DataParallel; start one "
                "process for each with `accelerate launch`, or show one with CUDA_VISIBLE_DEVICES"
            )
        _refuse_parallelism(trainer.accelerator)
        if trainer.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={trainer.args.label_smoothing_factor} is for losses on labels; that of pairs is "
                "label_smoothing"
            )
        if trainer.args.accelerator_config.dispatch_batches:
            raise ValueError("dispatch_batches=True is not supported: each process must make its own batches; set it to False")
        for model in (trainer.model, self.ref_model) if trainer.args.disable_dropout else ():
            if model is not None:
                disable_dropout(model)
        self.loss = loss
        trainer.model_accepts_loss_kwargs = False  # transformers < 5.19 asks this about gradient accumulation
        policy = unwrap(trainer.model)
        config = policy.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            raise ValueError(
                f"{type(policy).__name__} asks for a load-balancing loss of its router, which this trainer does not add: set "
                "output_router_logits=False in its config"
            )
        self.policy_head = LMHead.from_model(policy)
        accept_steps(policy)
        self.ref_head = None
        if self.ref_model is not None:
            ref = unwrap(self.ref_model.eval())
            self.ref_head = LMHead.from_model(ref, check=not _is_sharded(ref))
            widths = self.policy_head.width, self.ref_head.width
            if loss.vocab_size is None and widths[0] != widths[1]:
                raise ValueError(
                    f"the vocabularies of policy and reference are padded differently, {widths[0]} and {widths[1]}: set "
                    f"vocab_size={min(widths)} in the config, or the tokenizer's size, to compare the columns that both have"
                )
            accept_steps(ref)
        elif any(t is not None and t.requires_grad for t in (self.policy_head.weight, self.policy_head.bias)):
            raise ValueError(
                "the head of the policy is trained, and serves the reference, too, since there is no ref_model: freeze it, or "
                "pass a ref_model"
            )
        self._totals: dict[str, Tensor] = {}
        self._names: list[str] = []
        self._num_tokens: Tensor | float = 0.0
        if trainer.args.precompute_ref_hidden:
            precompute_ref_hidden(trainer)

    def preference_output(self, model: nn.Module, batch: dict[str, Any]) -> PreferenceOutput:
        """The loss of a batch: one forward of the reference, and one of `model`, which may be wrapped."""
        inputs = dict(batch)
        names = ("labels", "token_weights", "valid_rows", "cu_seqlens")
        labels, token_weights, valid_rows, cu_seqlens = (inputs.pop(name, None) for name in names)
        states = inputs.pop("ref_hidden", None)
        if states is None:
            ref_hidden, ref_head = self.reference_hidden(inputs)
        else:
            ref_hidden, ref_head = spread(states, labels, cu_seqlens, self.loss.ignore_index), self.ref_head
        found: list[PreferenceOutput] = []

        def step(policy: nn.Module, inputs: dict[str, Any]) -> Tensor:
            def loss(hidden: Tensor) -> Tensor:
                head = current_head(self.policy_head, policy)
                device = head.weight.device  # not always that of the last layer, where a model is spread over several
                packed = cu_seqlens is not None
                x, z, y, weights = (
                    t if t is None else t.to(device).squeeze(0) if packed else t.to(device)
                    for t in (hidden, ref_hidden, labels, token_weights)
                )
                options = {"token_weights": weights, "valid_rows": valid_rows, "cu_seqlens": cu_seqlens}
                found.append(self.loss(x, head, z, ref_head or head, y, **options))
                return found[0].loss

            return through_head(policy, hidden_states(policy, inputs), loss)

        loss = model(**inputs, preference_step=step)
        return found.pop()._replace(loss=loss)

    def reference_hidden(self, inputs: dict[str, Any]) -> tuple[Tensor, LMHead | None]:
        """Hidden states, and the head unless it is the policy's.

        Raises:
            ValueError: only the head is left of the reference.
        """
        if self.ref_model is None and self.ref_head is not None:
            raise ValueError(
                "these rows have no precomputed hidden states, and with precompute_ref_hidden=True only the head is left of "
                "the reference: pass all datasets to the trainer's constructor, several to evaluate as a dict for eval_dataset"
            )
        found: list[tuple[Tensor, LMHead | None]] = []

        def step(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
            hidden = hidden_states(model, inputs)
            found.append((hidden, None if self.ref_head is None else current_head(self.ref_head, model)))
            return hidden.new_zeros(())  # what comes back through the wrappers may be a copy in float32

        with torch.no_grad(), self.accelerator.autocast():  # type: ignore[attr-defined]
            if self.ref_model is not None:
                self.ref_model(**inputs, preference_step=step)
            else:
                model: Any = self.model  # type: ignore[attr-defined]
                with reference_adapter(model), eval_mode(unwrap(model)):  # neither dropout nor checkpoints
                    model(**inputs, preference_step=step)
        return found.pop()

    # --------------------------------------------------------------------------------------------------------------- metrics

    def record(self, out: PreferenceOutput, batch: dict[str, Any]) -> None:
        """Adds the metrics of a batch, of all processes, to those that the next `log` reports. Does not wait for the device."""
        trainer: Any = self
        mode, device = "train" if trainer.model.training else "eval", out.loss.device
        tokens = batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()

        def number(value: Any) -> Tensor:  # filled on the device: copying a number there would wait for it
            return value.to(device).double() if isinstance(value, Tensor) else torch.full_like(out.loss, value).double()

        counts, pairs = {side: number(count) for side, count in _token_counts(batch).items()}, number(len(out.losses))
        weights = [counts[SIDE[name]] if name in SIDE else pairs for name in out.metrics]
        values = [number(value) * weight for value, weight in zip(out.metrics.values(), weights, strict=True)]
        mine = torch.stack([*values, *weights, number(tokens)]).detach()
        everyone = trainer.accelerator.gather(mine[None]).sum(0)
        self._names = list(out.metrics)
        self._totals[mode] = self._totals.get(mode, 0) + everyone[:-1]
        if mode == "train":
            self._num_tokens = self._num_tokens + everyone[-1]

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """As of the trainer, with metrics of these batches alone: `predict` collects some that it does not log."""
        self._totals.pop("eval", None)
        return super().evaluation_loop(*args, **options)  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log: over pairs, or over the tokens that a metric is about."""
        trainer: Any = self
        mode = "train" if trainer.model.training else "eval"
        if mode in self._totals:
            values, weights = self._totals.pop(mode).view(2, -1)
            means = (values / weights.clamp(min=1)).tolist()
            prefix = next((name.removesuffix("loss") for name in logs if name.endswith("_loss")), "eval_")
            prefix = "" if mode == "train" else prefix
            logs |= {prefix + name: mean for name, mean in zip(self._names, means, strict=True)}
            logs[prefix + "num_tokens"] = float(self._num_tokens)
        super().log(logs, start_time)  # type: ignore[misc]


def disable_dropout(model: nn.Module) -> None:
    """Sets every probability of dropout to 0, those that attention and others keep as numbers among them."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(module, name, 0.0)


@contextmanager
def reference_adapter(model: Any) -> Iterator[None]:
    """A PEFT model as it was before training: with its adapter "ref" where there is one, else with none."""
    peft_model = model if hasattr(model, "peft_config") else model.module
    if "ref" not in peft_model.peft_config:
        with peft_model.disable_adapter():
            yield
        return
    active, several = peft_model.active_adapter, peft_model.base_model.active_adapters
    peft_model.set_adapter("ref")
    try:
        yield
    finally:
        peft_model.set_adapter(active)
        peft_model.base_model.set_adapter(several)


def _token_counts(batch: dict[str, Any]) -> dict[str, Any]:
    """How many tokens of the chosen and of the rejected sequences count."""
    lengths = batch.get("valid_rows")
    if lengths is None and "cu_seqlens" in batch:
        raise ValueError("a packed batch must have valid_rows beside cu_seqlens; PreferenceCollator makes both")
    if lengths is None:
        lengths = (batch["labels"][:, 1:] != -100).sum(-1)
    half = len(lengths) // 2
    chosen, rejected = sum(lengths[:half]), sum(lengths[half:])
    return {"chosen": chosen, "rejected": rejected, "both": chosen + rejected}


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _refuse_parallelism(accelerator: Any) -> None:
    """What shards the head, the sequence or the batch in ways that the loss does not know."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError("ZeRO-3 shards the head between forward and backward, which is not supported: use ZeRO-2, or FSDP2")
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) == 1:
        raise ValueError("FSDP1 flattens the head, which is not supported: set fsdp_version: 2 in the accelerate config")
    config = getattr(accelerator, "parallelism_config", None)
    sizes = {name: getattr(config, name, 1) for name in ("cp_size", "sp_size", "tp_size")}
    if config is not None and any(size > 1 for size in sizes.values()):
        raise ValueError(f"context, sequence and tensor parallelism are not supported: {sizes}; use data parallelism or FSDP2")
