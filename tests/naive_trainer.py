"""The trainers that one would write without this package: whole logits of both models, and the formulas in plain torch.

Nothing of fused_tdpo is used here. From the models' float32 logits on, everything is float64: where other trainers of the same
dtype differ, it is by their own rounding, and by that of the models' products.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor


class Mean(NamedTuple):
    """Of pairs, or of tokens."""

    total: float
    count: float


class Meter:
    """Means over all that was added since the last reading, of how many batches it may be; and the tokens ever trained on."""

    def __init__(self) -> None:
        self.added: dict[str, list[Mean]] = defaultdict(list)
        self.num_tokens = 0

    def add(self, metrics: dict[str, Mean]) -> None:
        for name, mean in metrics.items():
            self.added[name].append(mean)

    def read(self, prefix: str) -> dict[str, float]:
        values = {
            f"{prefix}{name}": sum(m.total for m in means) / sum(m.count for m in means) for name, means in self.added.items()
        }
        self.added.clear()
        return values | {f"{prefix}num_tokens": self.num_tokens}


@dataclass(frozen=True)
class Objective:
    """The preference loss of a batch of logits, all chosen sequences first, and what is logged of it."""

    variant: str = "tdpo2"
    alpha: float = 0.5
    beta: float = 0.5
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    divergence: str = "forward_kl"
    divergence_alpha: float | None = None

    def __call__(self, policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Mean]]:
        """From (S, T, V), (S, T, V) and the models' ordinary, unshifted labels (S, T)."""
        x, z, labels = policy_logits[:, :-1].double(), ref_logits[:, :-1].double(), labels[:, 1:]
        mask = labels != -100
        log_p, log_q = x.log_softmax(-1), z.log_softmax(-1)
        label = labels.where(mask, 0).unsqueeze(-1)
        logp = log_p.gather(-1, label).squeeze(-1)
        ref_logp = log_q.gather(-1, label).squeeze(-1)
        divergence = self.token_divergence(log_p, log_q)

        def total(per_token: Tensor) -> Tensor:  # (S, T-1) -> (P,), (P,)
            return torch.where(mask, per_token, 0.0).sum(-1).chunk(2)

        (rho_w, rho_l), (K_w, K_l), (n_w, n_l) = total(logp - ref_logp), total(divergence), total(mask.double())
        if self.variant == "tdpo1":
            r_w, r_l = rho_w + K_w, rho_l + K_l
        elif self.variant == "tdpo2":
            r_w, r_l = rho_w + self.alpha * K_w.detach(), rho_l + self.alpha * K_l
        else:
            r_w, r_l = rho_w, rho_l
        losses = self.pair_losses(r_w, r_l, n_w, n_l)

        reward_w, reward_l = rho_w, rho_l
        if self.variant != "dpo":  # as the authors of TDPO log it: without alpha
            reward_w, reward_l = rho_w + K_w, rho_l + K_l
        logps_w, logps_l = total(logp)
        mean_w, mean_l = total(x.mean(-1))
        correct, _ = total((x.argmax(-1) == labels).double())
        entropy = torch.cat(total(-(log_p.exp() * log_p).sum(-1)))
        per_pair = {
            "rewards/chosen": self.beta * reward_w,
            "rewards/rejected": self.beta * reward_l,
            "rewards/accuracies": reward_w > reward_l,
            "rewards/margins": self.beta * (reward_w - reward_l),
            "logps/chosen": logps_w,
            "logps/rejected": logps_l,
            "kl/chosen": K_w,
            "kl/rejected": K_l,
            "kl/margin": K_w - K_l,
        }
        per_token = {
            "entropy": (entropy, mask),
            "mean_token_accuracy": (correct, n_w),
            "logits/chosen": (mean_w, n_w),
            "logits/rejected": (mean_l, n_l),
        }
        metrics = {name: Mean(values.sum().item(), len(losses)) for name, values in per_pair.items()}
        metrics |= {name: Mean(values.sum().item(), counts.sum().item()) for name, (values, counts) in per_token.items()}
        return losses.mean(), metrics

    def token_divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        def kl(a: Tensor, b: Tensor) -> Tensor:
            return (a.exp() * (a - b)).sum(-1)

        if self.divergence == "forward_kl":
            return kl(log_q, log_p)
        if self.divergence == "reverse_kl":
            return kl(log_p, log_q)
        if self.divergence == "js":
            log_m = ((log_p.exp() + log_q.exp()) / 2).log()
            return (kl(log_q, log_m) + kl(log_p, log_m)) / 2
        a = self.divergence_alpha
        return ((a * log_p + (1 - a) * log_q).exp().sum(-1) - 1) / (a * (a - 1))

    def pair_losses(self, r_w: Tensor, r_l: Tensor, n_w: Tensor, n_l: Tensor) -> Tensor:
        z, smoothing = self.beta * (r_w - r_l), self.label_smoothing
        if self.loss_type == "sigmoid":
            return -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)
        if self.loss_type == "robust":
            return (-(1 - smoothing) * F.logsigmoid(z) + smoothing * F.logsigmoid(-z)) / (1 - 2 * smoothing)
        if self.loss_type == "hinge":
            return torch.relu(1 - z)
        if self.loss_type == "ipo":
            return (r_w / n_w - r_l / n_l - 1 / (2 * self.beta)) ** 2
        if self.loss_type == "sigmoid_norm":
            return -F.logsigmoid(self.beta * (r_w / n_w - r_l / n_l))
        if self.loss_type == "exo_pair":
            shares = torch.tensor([1 - smoothing, smoothing], dtype=z.dtype)
            model = torch.stack([z.sigmoid(), (-z).sigmoid()], dim=-1)
            return (model * (model.log() - shares.log())).sum(-1)
        if self.loss_type == "discopop":
            modulation = (z / 0.05).sigmoid()
            return (1 - modulation) * -F.logsigmoid(z) + modulation * (-z).exp()
        z_w, z_l = self.beta * r_w, self.beta * r_l
        if self.loss_type == "nca_pair":
            return -F.logsigmoid(z_w) - F.logsigmoid(-z_w) / 2 - F.logsigmoid(-z_l) / 2
        if self.loss_type == "bco_pair":
            return -F.logsigmoid(z_w) - F.logsigmoid(-z_l)
        if self.loss_type == "sppo_hard":
            return (r_w - 1 / (2 * self.beta)) ** 2 + (r_l + 1 / (2 * self.beta)) ** 2
        if self.loss_type == "apo_zero":
            return 1 - z_w.sigmoid() + z_l.sigmoid()
        assert self.loss_type == "apo_down"
        return z_w.sigmoid() + 1 - z.sigmoid()


@contextlib.contextmanager
def reference_adapters(model: Any) -> Iterator[None]:
    """The PEFT model as it was before training: with its adapter "ref" if it has one, else with none."""
    if "ref" not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    active = model.active_adapter
    model.set_adapter("ref", inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(active)


def both_logits(model: Any, ref_model: Any | None, inputs: dict[str, Tensor], autocast: Any) -> tuple[Tensor, Tensor]:
    """Of the policy and of the reference, in one precision; without a `ref_model`, that is the policy's base model."""
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}
    with torch.no_grad(), autocast:
        if ref_model is None:
            with reference_adapters(model):
                ref_logits = model(**inputs).logits
        else:
            ref_logits = ref_model(**inputs).logits
    return model(**inputs).logits, ref_logits


def pad_pairs(rows: list[dict[str, list[int]]], pad_token_id: int) -> dict[str, Tensor]:
    sequences = [(row["prompt_ids"], row[field]) for field in ("chosen_ids", "rejected_ids") for row in rows]
    T = max(len(prompt) + len(completion) for prompt, completion in sequences)
    input_ids = torch.full((len(sequences), T), pad_token_id)
    attention_mask, labels = torch.zeros(len(sequences), T, dtype=torch.int64), torch.full((len(sequences), T), -100)
    for number, (prompt, completion) in enumerate(sequences):
        length = len(prompt) + len(completion)
        input_ids[number, :length] = torch.tensor(prompt + completion)
        attention_mask[number, :length] = 1
        labels[number, len(prompt) : length] = torch.tensor(completion)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class Metered:
    """What both trainers below share, before a class of transformers' or TRL's: the loss and its log."""

    objective: Objective
    ref_model: Any
    model: Any
    meter: Meter

    def metered_loss(self, model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        logits = both_logits(model, self.ref_model, inputs, self.accelerator.autocast())  # type: ignore[attr-defined]
        loss, metrics = self.objective(*logits, labels)
        self.meter.add(metrics)
        if self.model.training:
            self.meter.num_tokens += int(inputs["attention_mask"].sum())
        return loss.float()

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        prefix = "" if self.model.training else "eval_"
        super().log(logs | self.meter.read(prefix), *rest)  # type: ignore[misc]


class NaiveTrainer(Metered, transformers.Trainer):
    """For rows of `prompt_ids`, `chosen_ids`, `rejected_ids`."""

    loss_is_scaled_for_ga = False  # a mean over pairs: nothing to divide by a number of tokens

    def __init__(self, model: Any, ref_model: Any | None, args: Any, objective: Objective, pad_token_id: int, **options: Any):
        super().__init__(model, args, data_collator=lambda rows: pad_pairs(rows, pad_token_id), **options)
        self.model_accepts_loss_kwargs = False
        self.objective, self.meter = objective, Meter()
        self.ref_model = None if ref_model is None else ref_model.eval()

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Tensor:
        return self.metered_loss(model, inputs, inputs["labels"])

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None


def naive_trl_trainer(model: Any, ref_model: Any | None, args: Any, objective: Objective, **options: Any) -> Any:
    """TRL's trainer, its data, reference and checkpoints, with this file's objective on whole logits."""
    import trl

    class NaiveDPOTrainer(Metered, trl.DPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Tensor:
            return self.metered_loss(model, inputs, inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100))

    trainer = NaiveDPOTrainer(model, ref_model, args, **options)
    trainer.objective, trainer.meter = objective, Meter()
    return trainer
