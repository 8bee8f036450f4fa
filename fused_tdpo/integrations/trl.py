"""TDPO in TRL's `DPOTrainer`: the loss straight from hidden states, logits never whole.

    trainer = TDPOTrainer("Qwen/Qwen3-0.6B", args=TDPOConfig("out"), train_dataset=dataset)  # not DPOTrainer, DPOConfig
    trainer.train()

Datasets, collator, PEFT, reference, checkpoints, logging and callbacks are TRL's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

try:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
except ImportError as error:
    raise ImportError("this trainer needs TRL: pip install 'fused-tdpo[trl]'") from error

from fused_tdpo.integrations._trainer import PreferenceTrainerMixin, TDPOArguments
from fused_tdpo.integrations.data import check_pairs, is_tokenized
from fused_tdpo.linear_losses import LinearPreferenceLoss


@dataclass
class TDPOConfig(TDPOArguments, DPOConfig):
    """`trl.DPOConfig`, and the options of the loss in `TDPOArguments`. What the loss does not honour, the trainer refuses."""


F_DIVERGENCES = {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}
"""TRL's name -> ours."""
MAX_EXPONENT = 80.0
"""TRL's bound on the exponent of the alpha divergence."""


def _loss(args: TDPOConfig) -> LinearPreferenceLoss:
    """
    Raises:
        ValueError: options of TRL that are not honoured.
    """
    if args.precompute_ref_log_probs:
        raise ValueError(
            "precompute_ref_log_probs=True is not honoured: TDPO's KL takes the reference's whole distribution at each token, "
            "of which log-probabilities keep one entry. Use precompute_ref_hidden=True, or train adapters, which need no "
            "second model."
        )
    if args.padding_free:
        raise ValueError(
            "padding_free=True is not honoured, since TRL pads in any case: leave it off, or pack with packed=True in "
            "fused_tdpo.integrations.transformers"
        )
    name = getattr(args.f_divergence_type, "value", args.f_divergence_type)
    if name not in F_DIVERGENCES:
        raise ValueError(f"f_divergence_type must be one of {', '.join(F_DIVERGENCES)}; got {name!r}")
    divergence, coefficient = F_DIVERGENCES[name], args.f_alpha_divergence_coef
    if divergence == "alpha" and coefficient == 1:
        divergence = "reverse_kl"  # its limit
    if divergence == "alpha" and not 0 < coefficient < 1:
        raise ValueError(f"f_alpha_divergence_coef must be in (0, 1], 1 minus the paper's α; got {coefficient}")
    if args.tdpo_variant != "dpo" and divergence != "reverse_kl":
        raise ValueError(
            f"f_divergence_type={args.f_divergence_type!r} is about whole sequences, and goes with tdpo_variant='dpo' only; "
            "the divergence of each token, TDPO's own, is the option `divergence`"
        )
    alpha = {"f_alpha": 1 - coefficient, "f_max_exponent": MAX_EXPONENT} if divergence == "alpha" else {}
    return args.make_loss(f_divergence=divergence, **alpha)


PAPER = {
    "title": "Token-level Direct Preference Optimization",
    "id": "2404.11999",
    "citation": """\
@inproceedings{zeng2024tokenlevel,
    title        = {{Token-level Direct Preference Optimization}},
    author       = {Yongcheng Zeng and Guoqing Liu and Weiyu Ma and Ning Yang and Haifeng Zhang and Jun Wang},
    year         = 2024,
    booktitle    = {Forty-first International Conference on Machine Learning, ICML 2024},
}""",
}
"""For the model card that TRL writes."""


class TDPOTrainer(PreferenceTrainerMixin, DPOTrainer):
    """`trl.DPOTrainer` whose loss is TDPO's, or DPO's, from hidden states. Same constructor, with a `TDPOConfig` as `args`.

    Metrics are TRL's and kl/chosen, kl/rejected, kl/margin. Rewards are the authors' β (ρ + K); of `tdpo_variant="dpo"`, β ρ.
    One option differs from TRL's: `label_smoothing` counts for loss_type "sigmoid" too (conservative DPO), where TRL ignores
    it, and is refused, not ignored, for types that have none.

    Raises:
        TypeError, ValueError: as `trl.DPOTrainer`; for options that are not honoured; for rows that are no pairs.
    """

    _name = "TDPO"
    _tag_names = ["trl", "tdpo"]  # noqa: RUF012  (as TRL's)
    _paper = PAPER

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: TDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **options: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            args = TDPOConfig(f"{name.split('/')[-1] or 'model'}-TDPO")
        if not isinstance(args, TDPOConfig):
            raise TypeError(f"args must be a TDPOConfig of {__name__}, which extends trl.DPOConfig; got {type(args).__name__}")
        loss = _loss(args)
        if args.tdpo_variant == "dpo":
            self._name, self._tag_names, self._paper = DPOTrainer._name, DPOTrainer._tag_names, DPOTrainer._paper
        for dataset in (train_dataset, eval_dataset):
            for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
                if isinstance(part, Dataset) and not {"image", "images"} & set(part.column_names):
                    if len(part) and is_tokenized(part[0]):
                        raise ValueError(
                            "TRL tokenises by itself: pass rows of text, or train rows of ids, and weights of tokens, with "
                            "fused_tdpo.integrations.transformers.TDPOTrainer"
                        )
                    check_pairs(part, strict=False)
        super().__init__(model, ref_model, args, data_collator, train_dataset, eval_dataset, **options)
        self.data_collator = _Counting(self.data_collator)
        if getattr(self, "aux_loss_enabled", False):
            raise ValueError(
                "the load-balancing loss of a router is not added by TDPOTrainer: set router_aux_loss_coef=0.0, or train with "
                "the router frozen"
            )
        self.set_up_loss(loss)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        batch = {name: value for name, value in inputs.items() if name != "completion_mask"}
        out = self.preference_output(model, batch)
        self.record(out, batch)
        if not return_outputs:
            return out.loss
        with torch.no_grad():  # for compute_metrics, whose logits TRL makes in this way, too
            inputs = {name: batch[name] for name in batch.keys() - {"labels", "valid_rows", "ref_hidden"}}
            return out.loss, model(**inputs, use_cache=False)


@dataclass
class _Counting:
    """TRL's collator, the labels, and how many count in each sequence: they are on the host here, where that costs nothing."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        if "completion_mask" not in batch:
            raise ValueError(f"a data_collator must make completion_mask, as TRL's does; got {', '.join(batch)}")
        mask: Tensor = batch["completion_mask"]
        return batch | {
            "labels": batch["input_ids"].masked_fill(mask == 0, -100),
            "valid_rows": mask[:, 1:].sum(-1).tolist(),
        }
