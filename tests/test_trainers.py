"""The trainers from outside, next to naive ones (tests/naive_trainer.py): same models, same rows, same steps.

Both sides compute in float32 on a CPU. The naive side is float64 from the logits on, so what may differ is a few roundings of
the fused side and the order of sums in products. A handful of steps of plain gradient descent carry them along.
"""

import copy
import importlib
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from allocations import counted_allocations
from products import counted_products
from tiny_models import (
    CHAT_TEMPLATE,
    D,
    V,
    all_tokens,
    byte_tokenizer,
    chat_rows,
    completion_tokens,
    id_rows,
    lora,
    lora_config,
    nearby,
    text_rows,
    tiny_model,
)

transformers = pytest.importorskip("transformers")
from fused_tdpo.integrations.data import PreferenceCollator  # noqa: E402
from fused_tdpo.pair_losses import PAIR_LOSSES  # noqa: E402
from naive_trainer import NaiveTrainer, Objective, naive_trl_trainer, pad_pairs  # noqa: E402  (needs transformers)

MODULES = ("transformers", "trl")
ROWS = text_rows(16)
ARGUMENTS = {
    **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1},
    **{"max_steps": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "seed": 1},
    # plain gradient descent: a weight's error stays in proportion to its gradient's, unlike with Adam's division
    **{"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 1e6},
}
MODULE_ARGUMENTS = {"transformers": {}, "trl": {"bf16": False, "gradient_checkpointing": False}}
METRICS = {
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"),
    *("kl/chosen", "kl/rejected", "kl/margin", "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"),
    "num_tokens",
}
OF_KL = {"kl/chosen", "kl/rejected", "kl/margin"}
RELATIVE = 2e-5
"""Measured on 12 pairs of runs: the fused trainer is within 7e-6 of the naive one in each logged value and 1e-6 in each weight,
where the naive one is within 2.5e-5 and 1.4e-6 of itself in float64. Changing beta by one part in 10,000 is noticed."""


pytestmark = pytest.mark.usefixtures("one_thread", "few_objects_to_collect")


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture
def build(tmp_path: Path) -> "Build":
    return Build(tmp_path)


# ------------------------------------------------------------------------------------------------------------------- harness


class Build(NamedTuple):
    """Makes trainers, fused and naive, from the same arguments; each on its own copy of the model."""

    folder: Path

    def fused(
        self,
        module: str,
        model: Any,
        ref_model: Any | None = None,
        objective: Objective | None = None,
        *,
        rows: Any = None,
        eval_rows: Any = None,
        options: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> Any:
        """`options` are the trainer's, `arguments` its config's."""
        integration = importlib.import_module(f"fused_tdpo.integrations.{module}")
        if objective is not None:
            arguments = option_names(objective) | arguments
        own: dict[str, Any] = {
            "model": copy.deepcopy(model) if isinstance(model, torch.nn.Module) else model,
            "ref_model": copy.deepcopy(ref_model),
            "args": integration.TDPOConfig(**self.arguments(module, "fused") | arguments),
        }
        return integration.TDPOTrainer(**(own | self.data(module, rows, eval_rows) | (options or {})))

    def naive(
        self,
        module: str,
        model: Any,
        ref_model: Any | None = None,
        objective: Objective | None = None,
        *,
        rows: Any = None,
        eval_rows: Any = None,
        options: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> Any:
        model, ref_model = copy.deepcopy(model), copy.deepcopy(ref_model)
        arguments = self.arguments(module, "naive") | arguments
        options = self.data(module, rows, eval_rows) | (options or {})
        if module == "trl":
            import trl

            return naive_trl_trainer(model, ref_model, trl.DPOConfig(**arguments), objective or Objective(), **options)
        args = transformers.TrainingArguments(**arguments, remove_unused_columns=False)
        return NaiveTrainer(model, ref_model, args, objective or Objective(), pad_token_id=256, **options)

    def arguments(self, module: str, side: str) -> dict[str, Any]:
        return ARGUMENTS | MODULE_ARGUMENTS[module] | {"output_dir": str(self.folder / side)}

    def data(self, module: str, rows: Any, eval_rows: Any) -> dict[str, Any]:
        """Rows of text for TRL, which tokenizes; rows of ids otherwise."""
        rows = ROWS if rows is None else rows
        if module == "trl":
            import datasets

            datasets.disable_progress_bars()
            to_dataset: Callable[[Any], Any] = datasets.Dataset.from_list
        else:
            to_dataset = id_rows
        data = {"train_dataset": to_dataset(rows), "eval_dataset": None if eval_rows is None else to_dataset(eval_rows)}
        return data | ({"processing_class": byte_tokenizer()} if module == "trl" else {})


def option_names(objective: Objective) -> dict[str, Any]:
    """The fused trainers' options of an objective."""
    return {
        **{"tdpo_variant": objective.variant, "tdpo_alpha": objective.alpha, "beta": objective.beta},
        **{"loss_type": objective.loss_type, "label_smoothing": objective.label_smoothing},
        **{"divergence": objective.divergence, "divergence_alpha": objective.divergence_alpha},
    }


class Run(NamedTuple):
    trainer: Any
    logs: list[dict[str, float]]
    """Of each step."""
    weights: dict[str, Tensor]
    """At the end."""


def run(trainer: Any, **options: Any) -> Run:
    trainer.train(**options)
    return Run(trainer, step_logs(trainer), weights_of(trainer.model))


def step_logs(trainer: Any) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "loss" in log]


def eval_logs(trainer: Any) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "eval_loss" in log]


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def assert_same_logs(got: list[dict[str, float]], expected: list[dict[str, float]], names: set[str], prefix: str = "") -> None:
    """Of the same steps, each within a relative `RELATIVE` of the sizes that its computation subtracts."""
    assert [log["step"] for log in got] == [log["step"] for log in expected]
    assert got
    for log, truth in zip(got, expected, strict=True):
        # rewards and loss are small differences of log-probabilities, whose roundings they keep
        size = max(abs(truth[f"{prefix}logps/{side}"]) for side in ("chosen", "rejected"))
        for name in sorted(names):
            value, exact = log[prefix + name], truth[prefix + name]
            bound = RELATIVE * max(abs(exact), 1.0) + 2.0**-23 * 8 * size
            where = f"step {log['step']}, {prefix}{name}"
            assert abs(value - exact) <= bound, f"{where}: {value!r}, expected {exact!r} ± {bound:.1e}"


def assert_same_weights(got: dict[str, Tensor], expected: dict[str, Tensor], relative: float = RELATIVE) -> None:
    """Relative to each weight's largest element: a gradient's rounding is of the size of its largest."""
    assert got.keys() == expected.keys()
    for name, exact in expected.items():
        bound = relative * exact.abs().max().item()
        torch.testing.assert_close(got[name], exact, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


def assert_nearly(what: str, got: Tensor, expected: Tensor) -> None:
    """The same products, on weights at other addresses or of other shapes: their order of sums may differ."""
    torch.testing.assert_close(got, expected, rtol=RELATIVE, atol=RELATIVE, msg=lambda text: f"{what}: {text}")


def assert_same_run(got: Run, expected: Run, metrics: set[str] = METRICS, relative: float = RELATIVE) -> None:
    """Losses, gradient norms, metrics and final weights."""
    assert_same_logs(got.logs, expected.logs, {"loss", "grad_norm"} | metrics)
    assert_same_weights(got.weights, expected.weights, relative)


def assert_moved(run: Run, model: Any) -> None:
    """The test itself would be void if nothing had been trained."""
    start = model.state_dict()
    assert any(not torch.equal(weight, start[name]) for name, weight in run.weights.items() if name in start)


OBJECTIVES = {
    "tdpo1": Objective("tdpo1"),
    "tdpo2": Objective("tdpo2", alpha=0.7),
    "dpo": Objective("dpo"),
}
LOSSES = {
    "ipo": Objective(loss_type="ipo"),
    "hinge": Objective(loss_type="hinge"),
    "robust": Objective(loss_type="robust", label_smoothing=0.1),
    "dpo-ipo": Objective("dpo", loss_type="ipo"),
    "tdpo1-robust": Objective("tdpo1", loss_type="robust", label_smoothing=0.2),
    "cdpo": Objective("dpo", label_smoothing=0.1),
    "exo_pair": Objective(loss_type="exo_pair", label_smoothing=0.1),
    **{
        name: Objective(loss_type=name)
        for name in ("sigmoid_norm", "discopop", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
    },
}
DIVERGENCES = {
    "reverse_kl": Objective(divergence="reverse_kl"),
    "js": Objective(divergence="js"),
    "alpha": Objective("tdpo1", divergence="alpha", divergence_alpha=0.3),
}


# -------------------------------------------------------------------------------------------------------- step by step, equal


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("variant", OBJECTIVES)
def test_full_fine_tuning(module: str, build: Build, variant: str, name: str):
    model, objective = tiny_model(name), OBJECTIVES[variant]
    ref_model = nearby(model)
    fused = run(build.fused(module, model, ref_model, objective))
    assert_same_run(fused, run(build.naive(module, model, ref_model, objective)))
    assert_moved(fused, model)
    assert_same_weights(weights_of(fused.trainer.ref_model), weights_of(ref_model), 0)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("variant", OBJECTIVES)
def test_adapters(module: str, build: Build, variant: str, name: str):
    """No reference model: it is the policy without its adapters, and both share one head."""
    pytest.importorskip("peft")
    model, objective = tiny_model(name), OBJECTIVES[variant]
    if module == "trl":  # the trainer makes the adapters: those of a PEFT model it would copy
        options = {"peft_config": lora_config()}
    else:
        model, options = lora(model), {}
    fused = run(build.fused(module, model, None, objective, options=options))
    assert_same_run(fused, run(build.naive(module, model, None, objective, options=options)))
    assert fused.logs[0]["kl/chosen"] > 0.01  # adapters that are not zero at the start
    start = tiny_model(name).state_dict()
    for weight_name, weight in fused.weights.items():
        if "lora" not in weight_name:
            plain = weight_name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(weight, start[plain]), f"{weight_name} is frozen, and moved"


def test_adapters_with_a_reference_of_their_own(module: str, build: Build):
    """A `ref_model` next to a PEFT model is used, not the policy without its adapters."""
    pytest.importorskip("peft")
    model = tiny_model()
    ref_model, policy = nearby(model), lora(model)
    fused = run(build.fused(module, policy, ref_model, Objective()))
    assert_same_run(fused, run(build.naive(module, policy, ref_model, Objective())))


def test_trl_keeps_the_adapter_that_it_is_given_as_reference(build: Build):
    """TRL's rule for a PEFT model without `ref_model`: its reference is the adapter as it was."""
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    model = lora(tiny_model())
    fused = run(build.fused("trl", model, None, Objective(), learning_rate=0.5))
    assert_same_run(fused, run(build.naive("trl", model, None, Objective(), learning_rate=0.5)))
    assert abs(fused.logs[0]["kl/chosen"]) < 1e-6
    assert fused.logs[-1]["kl/chosen"] > 1e-4


def test_peft_config_makes_the_adapters(build: Build):
    """In the trainer without TRL, too: zero at the start, so that policy and reference agree; nothing else is trained."""
    pytest.importorskip("peft")
    options = {"peft_config": lora_config(init_lora_weights=True)}
    trainer = build.fused("transformers", tiny_model(), objective=Objective(), options=options, learning_rate=0.5)
    fused = run(trainer)
    assert {name.split(".")[-3] for name, weight in trainer.model.named_parameters() if weight.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    assert_policy_is_reference(fused.logs[0])
    assert fused.logs[-1]["kl/chosen"] > 1e-4


def test_peft_config_and_seed_make_the_adapters_again(module: str, build: Build):
    """Two runs with the same arguments are the same, whatever was drawn before."""
    pytest.importorskip("peft")
    model, options = tiny_model(), {"peft_config": lora_config()}
    first = weights_of(build.fused(module, model, options=options).model)
    torch.rand(7)
    second = weights_of(build.fused(module, model, options=options).model)
    assert_same_weights(second, first, 0)


@pytest.mark.parametrize(
    "more",
    [{"modules_to_save": ["embed_tokens"]}, {"bias": "all"}, {"target_modules": "all-linear", "use_dora": True}],
    ids=["embedding", "bias", "dora"],
)
def test_what_else_adapters_train(module: str, build: Build, more: dict[str, Any]):
    """A copy of the embedding, of which the tied head stays the original; biases; DoRA on every layer but the head."""
    pytest.importorskip("peft")
    model = tiny_model("llama-tied" if "modules_to_save" in more else "llama")
    options = {"peft_config": lora_config(**more)}
    if module == "transformers":
        model, options = lora(model, **more), {}
    fused = run(build.fused(module, model, None, Objective(), options=options))
    assert_same_run(fused, run(build.naive(module, model, None, Objective(), options=options)))


@pytest.mark.parametrize("more", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_adapters_on_the_head_are_refused(module: str, build: Build, more: dict[str, Any]):
    """Such a head is not one matrix: taking its weight would leave them untrained."""
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"head|output embeddings"):
        build.fused(module, tiny_model(), options={"peft_config": lora_config(**more)})


def test_prompt_tuning_is_refused(module: str, build: Build):
    """Its virtual tokens are put in front of the others by PEFT, outside of the model that makes hidden states."""
    peft = pytest.importorskip("peft")
    options = {"peft_config": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
    with pytest.raises(ValueError, match=r"prompt"):
        build.fused(module, tiny_model(), options=options)


@pytest.mark.parametrize("case", [*LOSSES, *DIVERGENCES])
def test_losses(module: str, build: Build, case: str):
    model, objective = tiny_model(), (LOSSES | DIVERGENCES)[case]
    ref_model, rate = nearby(model), learning_rate(objective.loss_type)
    fused = run(build.fused(module, model, ref_model, objective, learning_rate=rate))
    assert_same_run(fused, run(build.naive(module, model, ref_model, objective, learning_rate=rate)))


def learning_rate(loss_type: str) -> float:
    """Squares have slopes that grow with the log-ratios: a step as large as for the others makes them explode."""
    return ARGUMENTS["learning_rate"] * (1e-3 if loss_type in ("ipo", "sppo_hard") else 1)


def test_the_default_is_tdpo2_with_alpha_a_half_and_beta_a_tenth(module: str, build: Build):
    model = tiny_model()
    ref_model = nearby(model)
    fused = run(build.fused(module, model, ref_model))
    assert_same_run(fused, run(build.naive(module, model, ref_model, Objective("tdpo2", alpha=0.5, beta=0.1))))


TRL_OPTIONS: dict[str, dict[str, Any]] = {
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "two losses": {"loss_type": ["hinge", "sigmoid_norm"]},
    "half a loss": {"loss_weights": [0.5]},
    "discopop_tau": {"loss_type": ["discopop"], "discopop_tau": 0.5},
    "use_weighting": {"use_weighting": True},
    "use_weighting of two": {"use_weighting": True, "loss_type": ["ipo", "apo_zero"], "loss_weights": [1e-3, 1.0]},
    "ld_alpha": {"ld_alpha": 0.3},
    "ld_alpha of 0": {"ld_alpha": 0.0},
    "ld_alpha and ipo": {"ld_alpha": 0.5, "loss_type": ["ipo"], "learning_rate": 5e-5},
    "ld_alpha and sft": {"ld_alpha": 0.5, "loss_type": ["sigmoid", "sft"]},
    "ld_alpha and use_weighting": {"ld_alpha": 0.5, "use_weighting": True},
    "pad_to_multiple_of": {"pad_to_multiple_of": 8},
    "max_length": {"max_length": 7},
}


@pytest.mark.parametrize("case", TRL_OPTIONS)
def test_options_of_trl(build: Build, case: str):
    """Those that are honoured mean what they mean in TRL's own trainer."""
    trl = pytest.importorskip("trl")
    model, arguments = tiny_model(), TRL_OPTIONS[case]
    ref_model = nearby(model)
    fused = run(build.fused("trl", model, ref_model, tdpo_variant="dpo", **arguments))
    config = trl.DPOConfig(**build.arguments("trl", "naive") | arguments)
    other = run(trl.DPOTrainer(copy.deepcopy(model), copy.deepcopy(ref_model), config, **build.data("trl", None, None)))
    metrics = METRICS - OF_KL
    if "ld_alpha" in arguments:  # TRL logs them with their tails weighted: ours are log-probabilities
        metrics -= {"logps/chosen", "logps/rejected"}
    assert_same_run(fused, other, metrics)
    plain = run(build.fused("trl", model, ref_model, tdpo_variant="dpo"))
    assert any(abs(log["loss"] - usual["loss"]) > 1e-3 for log, usual in zip(fused.logs, plain.logs, strict=True)) or (
        case == "pad_to_multiple_of"
    )


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", sorted(PAIR_LOSSES))
def test_dpo_is_that_of_trl(build: Build, loss_type: str, adapters: bool):
    """With `tdpo_variant="dpo"`, TRL's own trainer is the other side, for every loss type there is."""
    trl = pytest.importorskip("trl")
    model, ref_model, options = tiny_model(), nearby(tiny_model()), {}
    if adapters:
        pytest.importorskip("peft")
        ref_model, options = None, {"peft_config": lora_config()}
    smoothing = 0.1 if loss_type in ("robust", "exo_pair", "aot") else 0.0
    arguments = {"loss_type": [loss_type], "label_smoothing": smoothing, "learning_rate": learning_rate(loss_type)}
    fused = run(build.fused("trl", model, ref_model, tdpo_variant="dpo", options=options, **arguments))
    other = trl.DPOTrainer(
        copy.deepcopy(model),
        copy.deepcopy(ref_model),
        trl.DPOConfig(**build.arguments("trl", "naive") | arguments),
        **build.data("trl", None, None) | options,
    )
    assert_same_run(fused, run(other), METRICS - OF_KL)


def test_trls_loss_types_are_lists(build: Build):
    pytest.importorskip("trl")
    model = tiny_model()
    ref_model = nearby(model)
    fused = run(build.fused("trl", model, ref_model, Objective(), loss_type=["hinge"]))
    assert_same_run(fused, run(build.naive("trl", model, ref_model, Objective(loss_type="hinge"))))


@pytest.mark.parametrize(
    "options",
    [
        {"engine": "one_pass"},
        {"engine": "recompute"},
        {"max_chunk_bytes": 8 * 4 * V},
        {"logits_dtype": "float32"},
        {"backend": "torch"},
        {"backend": "reference"},
    ],
    ids=lambda options: "-".join(map(str, *options.items())),
)
def test_how_it_is_computed_changes_nothing(module: str, build: Build, options: dict[str, Any]):
    model = tiny_model()
    ref_model = nearby(model)
    fused = run(build.fused(module, model, ref_model, Objective(), **options))
    assert_same_run(fused, run(build.naive(module, model, ref_model, Objective())))


def test_with_adam_and_clipped_gradients(module: str, build: Build):
    """Its default optimiser. ε keeps the division from blowing up the rounding of gradients that are nearly zero."""
    model = tiny_model()
    ref_model = nearby(model)
    options = {"optim": "adamw_torch", "adam_epsilon": 1e-3, "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5}
    fused = run(build.fused(module, model, ref_model, Objective(), **options))
    assert_same_run(fused, run(build.naive(module, model, ref_model, Objective(), **options)))


# ------------------------------------------------------------------------------------------------------------- what is refused

REFUSED_BY_BOTH = [
    {"tdpo_variant": "tdpo3"},
    {"tdpo_variant": "TDPO2"},
    {"tdpo_alpha": -1.0},
    {"divergence": "total_variation"},
    {"divergence": "alpha"},
    {"divergence_alpha": 0.5},
    {"engine": "fast"},
    {"backend": "cuda"},
    {"logits_dtype": "float8"},
    {"max_chunk_bytes": 0},
    {"beta": 0.0},
    {"loss_type": "sigmiod"},
    {"label_smoothing": 0.6},
    {"label_smoothing": 0.1, "loss_type": "ipo"},
    {"label_smoothing": 0.1, "loss_type": "hinge"},
    {"label_smoothing_factor": 0.1},
]
REFUSED_BY_TRL = [
    {"precompute_ref_log_probs": True},
    {"padding_free": True},
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"ld_alpha": 1.5},
    {"loss_type": ["sigmiod"]},
]


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        *((module, arguments) for module in MODULES for arguments in REFUSED_BY_BOTH),
        *(("trl", arguments) for arguments in REFUSED_BY_TRL),
    ],
    ids=lambda value: "-".join(f"{name}={choice}" for name, choice in value.items()) if isinstance(value, dict) else value,
)
def test_options_that_are_refused(module: str, build: Build, arguments: dict[str, Any]):
    """By the config or by the trainer's constructor, with the option's name and what came."""
    pytest.importorskip(module)
    model = tiny_model()
    with pytest.raises(ValueError) as raised:
        build.fused(module, model, nearby(model), **arguments)
    message, (name, value) = str(raised.value), next(iter(arguments.items()))
    assert name in message
    assert all(str(part) in message for part in (value if isinstance(value, list) else [value]))


def test_exo_needs_label_smoothing(module: str, build: Build):
    """The logarithm of ε is in it."""
    with pytest.raises(ValueError, match=r"(?s)exo_pair"):
        build.fused(module, tiny_model(), nearby(tiny_model()), loss_type="exo_pair")


@pytest.mark.parametrize("loss_type", ["sft", "aot"])
def test_weights_of_pairs_need_losses_of_pairs(build: Build, loss_type: str):
    """These are of the whole batch: of its tokens, or of its ranks."""
    pytest.importorskip("trl")
    with pytest.raises(ValueError, match=rf"use_weighting(?s:.)*{loss_type}"):
        build.fused("trl", tiny_model(), nearby(tiny_model()), use_weighting=True, loss_type=[loss_type])


def test_a_router_loss_is_refused(module: str, build: Build):
    """A mixture of experts asks TRL for its auxiliary loss by default, and transformers when told to return router logits."""
    asks = {} if module == "trl" else {"output_router_logits": True}
    model = tiny_model("mixtral", **asks)
    with pytest.raises(ValueError, match=r"router.*(?s:.)*(0|False)"):
        build.fused(module, model, nearby(model))


def test_experts_without_a_router_loss(module: str, build: Build):
    model = tiny_model("mixtral", router_aux_loss_coef=0.0)
    ref_model = nearby(model)
    fused = run(build.fused(module, model, ref_model, Objective(), max_steps=2))
    assert_same_run(fused, run(build.naive(module, model, ref_model, Objective(), max_steps=2)))


def test_a_reference_of_another_vocabulary(module: str, build: Build):
    model, ref_model = tiny_model(), tiny_model(vocab_size=V + 8)
    with pytest.raises(ValueError, match=rf"{V}(?s:.)*{V + 8}|{V + 8}(?s:.)*{V}"):
        run(build.fused(module, model, ref_model, max_steps=1))


def test_arguments_of_the_parent_are_not_enough(module: str, build: Build):
    """They hold no option of TDPO: taking its defaults instead would be a guess."""
    parent = importlib.import_module("trl").DPOConfig if module == "trl" else transformers.TrainingArguments
    args = parent(**build.arguments(module, "fused"))
    model = tiny_model()
    with pytest.raises((TypeError, ValueError), match="TDPOConfig"):
        build.fused(module, model, nearby(model), options={"args": args})


def test_no_arguments_are_the_defaults(build: Build, monkeypatch: pytest.MonkeyPatch):
    """Not of TRL's, which ask for bfloat16: transformers refuses that on a CPU without `use_cpu`."""
    module = "transformers"
    monkeypatch.chdir(build.folder)
    model = tiny_model()
    args = build.fused(module, model, nearby(model), options={"args": None}).args
    assert type(args) is importlib.import_module(f"fused_tdpo.integrations.{module}").TDPOConfig
    assert (args.tdpo_variant, args.tdpo_alpha, args.beta) == ("tdpo2", 0.5, 0.1)
    assert (args.learning_rate, args.logging_steps, args.max_length, args.packed) == (1e-6, 10, 1024, False)


def test_the_model_itself_is_no_reference(module: str, build: Build):
    integration = importlib.import_module(f"fused_tdpo.integrations.{module}")
    model = tiny_model()
    args = integration.TDPOConfig(**build.arguments(module, "fused"))
    with pytest.raises(ValueError, match=r"ref_model"):
        integration.TDPOTrainer(model=model, ref_model=model, args=args, **build.data(module, None, None))


# ------------------------------------------------------------------------ accumulation, checkpointing, bfloat16, evaluation


def test_accumulated_batches(module: str, build: Build):
    """8 pairs at once are 2 times 4: losses and metrics are means over pairs, or over tokens, wherever these came in."""
    model = tiny_model()
    ref_model = nearby(model)
    whole = run(build.fused(module, model, ref_model, Objective(), max_steps=2, per_device_train_batch_size=8))
    parts = run(build.fused(module, model, ref_model, Objective(), max_steps=2, gradient_accumulation_steps=2))
    assert_same_run(parts, whole)
    naive = run(build.naive(module, model, ref_model, Objective(), max_steps=2, gradient_accumulation_steps=2))
    assert_same_run(parts, naive)


def test_an_epoch_that_does_not_divide(module: str, build: Build):
    """14 pairs, 4 at a time, 2 times each: the last batch has 2 pairs, and is half of a step or the whole of one."""
    model = tiny_model()
    ref_model = nearby(model)
    for steps in ({"gradient_accumulation_steps": 2, "num_train_epochs": 2}, {"num_train_epochs": 1}):
        arguments = {"rows": text_rows(14), "max_steps": -1, **steps}
        fused = run(build.fused(module, model, ref_model, Objective(), **arguments))
        assert_same_run(fused, run(build.naive(module, model, ref_model, Objective(), **arguments)))
        assert len(fused.logs) == 4
        whole = run(build.fused(module, model, ref_model, Objective(), logging_steps=4, **arguments))
        naive = run(build.naive(module, model, ref_model, Objective(), logging_steps=4, **arguments))
        assert_same_logs(whole.logs, naive.logs, METRICS)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")
def test_gradient_checkpointing(
    module: str, build: Build, adapters: bool, use_reentrant: bool, recwarn: pytest.WarningsRecorder
):
    """Recomputes the same activations; and no gradient is lost on the way, of which torch would only warn."""
    if adapters:
        pytest.importorskip("peft")
    model = tiny_model()
    ref_model = nearby(model)
    if adapters:
        model = lora(model)
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    reference = None if adapters else ref_model
    saved = run(build.fused(module, model, reference, Objective(), max_steps=2, **checkpointing))
    kept = run(build.fused(module, model, reference, Objective(), max_steps=2))
    assert_same_run(saved, kept)
    assert not [str(warning.message) for warning in recwarn if "requires_grad=True" in str(warning.message)]


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_bfloat16(module: str, build: Build, adapters: bool):
    """Autocast. Weights stay float32; the loss is as far from float32 as naive code in bfloat16, plus three of its ulps."""
    if adapters:
        pytest.importorskip("peft")
    model = tiny_model()
    ref_model = None if adapters else nearby(model)
    if adapters:
        model = lora(model)
    exact = run(build.naive(module, model, ref_model, Objective(), max_steps=2))
    naive = run(build.naive(module, model, ref_model, Objective(), max_steps=2, bf16=True))
    fused = run(build.fused(module, model, ref_model, Objective(), max_steps=2, bf16=True))
    assert {weight.dtype for weight in fused.weights.values()} == {torch.float32}
    for log, rounded, truth in zip(fused.logs, naive.logs, exact.logs, strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "kl/chosen", "kl/rejected"):
            slack = 3 * 2**-8 * max(1.0, abs(truth[name]))
            assert abs(log[name] - truth[name]) <= abs(rounded[name] - truth[name]) + slack, name


def test_weights_in_bfloat16(module: str, build: Build):
    """Weights of both models, and so hidden states and logits: no step is lost to a dtype that does not fit."""
    model = tiny_model().bfloat16()
    ref_model = nearby(model)
    exact = run(build.naive(module, model.float(), ref_model.float(), Objective(), max_steps=2))
    model, ref_model = model.bfloat16(), ref_model.bfloat16()
    naive = run(build.naive(module, model, ref_model, Objective(), max_steps=2))
    fused = run(build.fused(module, model, ref_model, Objective(), max_steps=2))
    assert {weight.dtype for weight in fused.weights.values()} == {torch.bfloat16}
    for log, rounded, truth in zip(fused.logs, naive.logs, exact.logs, strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "kl/chosen", "kl/rejected"):
            slack = 3 * 2**-8 * max(1.0, abs(truth[name]))
            assert abs(log[name] - truth[name]) <= abs(rounded[name] - truth[name]) + slack, name


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_evaluation(module: str, build: Build, adapters: bool):
    """During training and by hand, on its own rows; no gradient is left behind, and the model is as it was."""
    if adapters:
        pytest.importorskip("peft")
    model = tiny_model()
    ref_model = None if adapters else nearby(model)
    options = {}
    if adapters and module == "trl":
        options = {"peft_config": lora_config()}
    elif adapters:
        model = lora(model)
    arguments = {"eval_rows": text_rows(8, seed=3), "options": options, "eval_strategy": "steps", "eval_steps": 2}
    fused = run(build.fused(module, model, ref_model, Objective(), **arguments))
    naive = run(build.naive(module, model, ref_model, Objective(), **arguments))
    assert_same_run(fused, naive)
    assert len(eval_logs(fused.trainer)) == 2
    assert_same_logs(eval_logs(fused.trainer), eval_logs(naive.trainer), METRICS | {"loss"}, "eval_")
    assert not any(name.startswith("eval_") for name in fused.logs[-1])

    fused.trainer.model.zero_grad()
    metrics = fused.trainer.evaluate()
    assert {f"eval_{name}" for name in METRICS} <= metrics.keys()
    assert {f"eval_{name}" for name in METRICS} <= eval_logs(fused.trainer)[-1].keys()
    assert metrics["eval_loss"] == eval_logs(fused.trainer)[-1]["eval_loss"]
    assert all(weight.grad is None for weight in fused.trainer.model.parameters())
    assert_same_weights(weights_of(fused.trainer.model), fused.weights, 0)


def test_the_best_model_by_a_metric(module: str, build: Build):
    """Any logged metric decides, and the best checkpoint's weights come back."""
    model = tiny_model()
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_kl/chosen", "greater_is_better": False}
    trainer = build.fused(module, model, nearby(model), Objective(), eval_rows=text_rows(4, seed=3), **saving, **best)
    trainer.train()
    values = {log["step"]: log["eval_kl/chosen"] for log in eval_logs(trainer)}
    assert len(set(values.values())) == 4
    assert trainer.state.best_metric == min(values.values())
    assert trainer.state.best_model_checkpoint.endswith(f"-{min(values, key=values.__getitem__)}")
    assert trainer.evaluate()["eval_kl/chosen"] == pytest.approx(min(values.values()), rel=RELATIVE)


def test_evaluation_of_a_batch_that_is_not_full(module: str, build: Build):
    """6 pairs in batches of 4: the loss weighs them by their pairs, as the trainer's own losses do."""
    model = tiny_model()
    ref_model = nearby(model)
    rows = text_rows(6, seed=3)
    fused = build.fused(module, model, ref_model, Objective(), eval_rows=rows).evaluate()
    naive = build.naive(module, model, ref_model, Objective(), eval_rows=rows).evaluate()
    assert fused["eval_loss"] == pytest.approx(naive["eval_loss"], rel=RELATIVE)


def test_evaluation_of_other_rows(module: str, build: Build):
    """`evaluate(rows)` of rows that the constructor has not seen."""
    model = tiny_model()
    ref_model = nearby(model)
    rows = text_rows(8, seed=3)
    first = build.fused(module, model, ref_model, Objective(), eval_rows=rows).evaluate()
    other = build.fused(module, model, ref_model, Objective())
    second = other.evaluate(build.data(module, rows, rows)["eval_dataset"])
    assert second["eval_loss"] == first["eval_loss"]


def test_evaluation_of_several_datasets(module: str, build: Build):
    model = tiny_model()
    ref_model = nearby(model)
    rows = {"easy": text_rows(4, seed=3), "hard": text_rows(4, seed=4)}
    data = {name: build.data(module, part, part)["eval_dataset"] for name, part in rows.items()}
    trainer = build.fused(module, model, ref_model, Objective(), options={"eval_dataset": data})
    metrics = trainer.evaluate()
    for name, part in rows.items():
        alone = build.fused(module, model, ref_model, Objective(), eval_rows=part).evaluate()
        assert metrics[f"eval_{name}_loss"] == alone["eval_loss"]


# ----------------------------------------------------------------------------------------------------------------- products


class SecondStep(transformers.TrainerCallback):
    """Counts the products of the second step: by then everything that is done once has been done."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.counter = counted_products()
            self.products = self.counter.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.counter.__exit__(None, None, None)


def units_of_the_head(flops: Callable[[int], int], rows: list[dict[str, list[int]]]) -> float:
    """Products of the head in N×V×D, from how the flops of a model grow with its vocabulary: no others do."""
    widths = (V, 2 * V)
    narrow, wide = (flops(width) for width in widths)
    return (wide - narrow) / (2 * completion_tokens(rows) * (widths[1] - widths[0]) * D)


@pytest.mark.parametrize(
    ("kind", "units"),
    [("full", 4), ("full-tied", 4), ("lora", 3), ("frozen-head", 3), ("recompute", 6)],
    ids=lambda value: str(value),
)
def test_products_of_a_step(module: str, build: Build, kind: str, units: int):
    """Two models forward, and the gradients of hidden states and head: each once, of the completions' tokens alone."""
    rows = ROWS[:4]

    def flops(width: int) -> int:
        model = tiny_model("llama-tied" if kind == "full-tied" else "llama", vocab_size=width)
        ref_model = None if kind == "lora" else nearby(model)
        options: dict[str, Any] = {"callbacks": [SecondStep()]}
        if kind == "lora":
            pytest.importorskip("peft")
            options["peft_config"] = lora_config()
        elif kind == "frozen-head":
            model.lm_head.requires_grad_(False)
        engine = {"engine": "recompute"} if kind == "recompute" else {}
        trainer = build.fused(module, model, ref_model, Objective(), rows=rows, options=options, max_steps=2, **engine)
        trainer.train()
        return sum(options["callbacks"][0].products.flops)

    assert units_of_the_head(flops, id_rows(rows)) == units


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_products_of_an_evaluation(module: str, build: Build, kind: str):
    rows = ROWS[:4]

    def flops(width: int) -> int:
        model = tiny_model(vocab_size=width)
        options = {}
        if kind == "lora":
            pytest.importorskip("peft")
            options["peft_config"] = lora_config()
        ref_model = None if kind == "lora" else nearby(model)
        trainer = build.fused(module, model, ref_model, Objective(), rows=rows, eval_rows=rows, options=options)
        trainer.evaluate()
        with counted_products() as products:
            trainer.evaluate()
        return sum(products.flops)

    assert units_of_the_head(flops, id_rows(rows)) == 2


def test_logits_never_exist(module: str, build: Build):
    """A whole step, optimiser and all, allocates nothing as large as half the logits of the tokens that count."""
    rows, width = ROWS, 4 * V
    logits = 4 * completion_tokens(id_rows(rows)) * width
    model = tiny_model(vocab_size=width)
    arguments = {"rows": rows, "per_device_train_batch_size": len(rows), "max_steps": 1, "max_chunk_bytes": logits // 8}
    fused = build.fused(module, model, nearby(model), Objective(), **arguments)
    with counted_allocations() as allocations:
        fused.train()
    assert 4 * width * D < logits // 2  # or the head's gradient would be in the way
    assert not allocations.of_at_least(logits // 2)
    arguments.pop("max_chunk_bytes")
    naive = build.naive(module, model, nearby(model), Objective(), **arguments)
    with counted_allocations() as allocations:
        naive.train()
    assert allocations.of_at_least(logits // 2)


# ---------------------------------------------------------------------------------------------------------- saving and resuming


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_resuming(module: str, build: Build, adapters: bool):
    """Three steps and three more are six: same losses, same bits."""
    if adapters:
        pytest.importorskip("peft")
    options = {"peft_config": lora_config()} if adapters else {}
    model = tiny_model()
    ref_model = None if adapters else nearby(model)
    # Adam, so that there is a state to be restored
    arguments = {"options": options, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    whole = run(build.fused(module, model, ref_model, Objective(), **arguments))
    checkpoint = build.folder / "fused" / "checkpoint-3"
    rest = build.fused(module, model, ref_model, Objective(), **arguments, learning_rate=0.05)
    resumed = run(rest, resume_from_checkpoint=str(checkpoint))
    assert [log["step"] for log in resumed.logs] == [1, 2, 3, 4, 5, 6]
    for log, expected in zip(resumed.logs, whole.logs, strict=True):
        assert log["loss"] == expected["loss"]
    assert_same_weights(resumed.weights, whole.weights, 0)


def test_a_saved_model_is_an_ordinary_one(module: str, build: Build):
    """Saved by the trainer, loaded by transformers; and the trained one in memory answers and generates like it."""
    model = tiny_model()
    trainer = build.fused(module, model, nearby(model), Objective(), max_steps=2)
    trainer.train()
    trainer.save_model()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(build.folder / "fused")
    ids = torch.tensor([id_rows(ROWS)[0]["prompt_ids"]])
    trained = trainer.model.eval()
    assert_same_weights(weights_of(loaded), weights_of(trained), 0)
    with torch.no_grad():
        expected = loaded(input_ids=ids, labels=ids)
        got = trained(input_ids=ids, labels=ids)
        assert_nearly("logits", got.logits, expected.logits)
        assert_nearly("loss", got.loss, expected.loss)
        assert_nearly("last logits", trained(ids, logits_to_keep=1).logits, expected.logits[:, -1:])
        hidden = trained(ids, output_hidden_states=True).hidden_states
        assert_nearly("hidden states", hidden[-1], loaded(ids, output_hidden_states=True).hidden_states[-1])
    tokens = trained.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(tokens, loaded.generate(ids, max_new_tokens=6, do_sample=False))
    assert tokens.shape[1] > ids.shape[1]


def test_saved_adapters_are_ordinary_ones(module: str, build: Build):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    trainer = build.fused(
        module, model, objective=Objective(), options={"peft_config": lora_config()}, max_steps=2, learning_rate=0.5
    )
    trainer.train()
    trainer.save_model()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), build.folder / "fused").eval()
    ids = torch.tensor([id_rows(ROWS)[0]["prompt_ids"]])
    trained = trainer.model.eval()
    with torch.no_grad():
        assert_nearly("logits", trained(input_ids=ids).logits, loaded(input_ids=ids).logits)
        assert not torch.equal(trained(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert torch.equal(
        trained.generate(input_ids=ids, max_new_tokens=6, do_sample=False),
        loaded.generate(input_ids=ids, max_new_tokens=6, do_sample=False),
    )
    merged = trained.merge_and_unload()
    with torch.no_grad():
        assert_nearly("merged", merged(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_a_trained_model_can_be_trained_again(module: str, build: Build):
    """By a second trainer, whose options are its own; the first one has left nothing behind."""
    model = tiny_model()
    ref_model = nearby(model)
    first = build.fused(module, model, ref_model, Objective("tdpo1"), max_steps=2)
    first.train()
    fresh = tiny_model()
    fresh.load_state_dict(first.model.state_dict())
    again = run(build.fused(module, model, ref_model, Objective("dpo"), max_steps=2, options={"model": first.model}))
    assert_same_run(again, run(build.naive(module, fresh, ref_model, Objective("dpo"), max_steps=2)))


def test_a_copy_of_a_trained_model_is_its_own(build: Build):
    """What a trainer leaves on the model does not tie a copy to the original."""
    model = tiny_model()
    trainer = build.fused("transformers", model, nearby(model), Objective(), max_steps=1)
    trainer.train()
    copied = copy.deepcopy(trainer.model).eval()
    ids = torch.tensor([id_rows(ROWS)[0]["prompt_ids"]])
    with torch.no_grad():
        before = copied(ids).logits
        for weight in trainer.model.parameters():
            weight.zero_()
        assert torch.equal(copied(ids).logits, before)
        assert before.abs().max() > 0


def test_arguments_can_be_pickled_and_printed(module: str, build: Build):
    integration = importlib.import_module(f"fused_tdpo.integrations.{module}")
    args = integration.TDPOConfig(**build.arguments(module, "fused"), tdpo_variant="tdpo1", tdpo_alpha=0.25, loss_type="ipo")
    again = pickle.loads(pickle.dumps(args))
    assert again.to_dict() == args.to_dict()
    assert (again.tdpo_variant, again.tdpo_alpha, again.divergence, again.engine) == ("tdpo1", 0.25, "forward_kl", "auto")
    assert '"tdpo_variant": "tdpo1"' in args.to_json_string()
    torch.save(args, build.folder / "training_args.bin")


def test_arguments_from_a_command_line(module: str, build: Build):
    integration = importlib.import_module(f"fused_tdpo.integrations.{module}")
    line = ["--output_dir", str(build.folder), "--use_cpu", "--report_to", "none", "--bf16", "false"]
    line += ["--tdpo_variant", "tdpo1", "--tdpo_alpha", "0.25", "--beta", "0.3", "--loss_type", "ipo"]
    line += ["--divergence", "alpha", "--divergence_alpha", "0.5", "--max_chunk_bytes", "1000000", "--logits_dtype", "float32"]
    (args,) = transformers.HfArgumentParser(integration.TDPOConfig).parse_args_into_dataclasses(line)
    assert (args.tdpo_variant, args.tdpo_alpha, args.beta) == ("tdpo1", 0.25, 0.3)
    assert args.loss_type in ("ipo", ["ipo"])
    assert (args.divergence, args.divergence_alpha) == ("alpha", 0.5)
    assert (args.max_chunk_bytes, args.logits_dtype) == (1000000, "float32")
    (args,) = transformers.HfArgumentParser(integration.TDPOConfig).parse_args_into_dataclasses(line[:7])
    assert (args.tdpo_variant, args.tdpo_alpha, args.beta) == ("tdpo2", 0.5, 0.1)


# --------------------------------------------------------------------------------------------------------------- model zoo


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "llama4", "phi", "gpt2"])
def test_heads_of_other_models(module: str, build: Build, name: str):
    """Soft-cap, divided and multiplied logits, a model that is its own base_model, a bias, dropout (which is turned off)."""
    model = tiny_model(name)
    ref_model = nearby(model)
    fused = run(build.fused(module, model, ref_model, Objective(), max_steps=2))
    if name == "gpt2":
        for submodule in (*model.modules(), *ref_model.modules()):
            if isinstance(submodule, torch.nn.Dropout):
                assert submodule.p > 0
                submodule.p = 0.0
    assert_same_run(fused, run(build.naive(module, model, ref_model, Objective(), max_steps=2)))


def test_dropout_of_attention_is_off_as_well(module: str, build: Build):
    """It is a number in Llama's attention, not a module: with it on, two equal models would seem to differ."""
    model = tiny_model(attention_dropout=0.5)
    assert_policy_is_reference(run(build.fused(module, model, model, max_steps=1)).logs[0])


def test_dropout_of_adapters_is_off_as_well(module: str, build: Build):
    pytest.importorskip("peft")
    model, logs = tiny_model(), []
    for dropout in (0.0, 0.5):
        options = {"peft_config": lora_config(lora_dropout=dropout)}
        logs.append(run(build.fused(module, model, objective=Objective(), options=options, max_steps=2)).logs)
    assert logs[0] == logs[1]


def test_dropout_is_kept_when_asked_for(module: str, build: Build):
    """In the policy only: the reference is a fixed distribution."""
    model = tiny_model("gpt2")
    ref_model = nearby(model)
    without = run(build.fused(module, model, ref_model, Objective(), max_steps=1))
    kept = build.fused(module, model, ref_model, Objective(), max_steps=1, disable_dropout=False)
    assert any(part.p > 0 for part in kept.model.modules() if isinstance(part, torch.nn.Dropout))
    dropped = run(kept)
    assert abs(dropped.logs[0]["loss"] - without.logs[0]["loss"]) > 1e-4
    assert not kept.ref_model.training


# ----------------------------------------------------------------------------------------------------------------- metrics


def assert_policy_is_reference(log: dict[str, float]) -> None:
    """Not a single bit apart: KL 0, rewards 0, loss log 2."""
    for name in ("kl/chosen", "kl/rejected", "kl/margin", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert log[name] == 0.0, f"{name} is {log[name]!r}"
    assert log["rewards/accuracies"] == 0.0
    assert log["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_every_metric_is_logged_as_a_finite_float(module: str, build: Build):
    model = tiny_model()
    evaluation = {"eval_rows": text_rows(4), "eval_strategy": "steps", "eval_steps": 2}
    trainer = build.fused(module, model, nearby(model), Objective(), **evaluation)
    trainer.train()
    logs = step_logs(trainer)
    assert len(logs) == 4
    for log in logs:
        assert METRICS | {"loss", "grad_norm", "learning_rate"} <= log.keys()
    for log in eval_logs(trainer):
        assert {f"eval_{name}" for name in METRICS | {"loss"}} <= log.keys()
    for log in trainer.state.log_history:
        for name, value in log.items():
            assert isinstance(value, float | int) and math.isfinite(value), f"{name} is {value!r}"
    trainer.save_state()  # as JSON


def test_equal_models(module: str, build: Build):
    model = tiny_model()
    assert_policy_is_reference(run(build.fused(module, model, model, max_steps=1)).logs[0])


def test_tokens_are_counted(module: str, build: Build):
    """All that went through the model, prompts twice, without padding; since the start of training."""
    model = tiny_model()
    logs = run(build.fused(module, model, nearby(model), rows=ROWS[:8], per_device_train_batch_size=8, max_steps=3)).logs
    assert [log["num_tokens"] for log in logs] == [all_tokens(id_rows(ROWS[:8])) * steps for steps in (1, 2, 3)]


def test_metrics_are_means_since_the_last_log(module: str, build: Build):
    model = tiny_model()
    ref_model = nearby(model)
    each = run(build.fused(module, model, ref_model, Objective())).logs
    pairs_of_steps = run(build.fused(module, model, ref_model, Objective(), logging_steps=2)).logs
    assert [log["step"] for log in pairs_of_steps] == [2, 4]
    per_token = {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}  # steps have different numbers of them
    for log, (first, second) in zip(pairs_of_steps, (each[:2], each[2:]), strict=True):
        for name in METRICS - per_token - {"num_tokens"} | {"loss"}:
            assert log[name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-6, abs=1e-7), name
        assert log["num_tokens"] == second["num_tokens"]
    naive = run(build.naive(module, model, ref_model, Objective(), logging_steps=2))
    assert_same_logs(pairs_of_steps, naive.logs, METRICS | {"loss"})


# ------------------------------------------------------------------------------------------------- references and callbacks


def test_without_a_reference_it_is_a_copy_of_the_start(build: Build):
    """The policy moves, its reference stays; what is trained is what would be with a copy made by hand."""
    model = tiny_model()
    fused = run(build.fused("transformers", model, None, Objective()))
    assert_policy_is_reference(fused.logs[0])
    assert_same_weights(weights_of(fused.trainer.ref_model), weights_of(model), 0)
    assert not any(weight.requires_grad for weight in fused.trainer.ref_model.parameters())
    assert_moved(fused, model)
    assert_same_run(fused, run(build.naive("transformers", model, model, Objective())))


def test_trl_loads_the_reference_of_a_path(build: Build):
    pytest.importorskip("trl")
    model = tiny_model()
    path = str(build.folder / "start")
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    fused = run(build.fused("trl", path, None, Objective(), options={"processing_class": None}))
    assert_policy_is_reference(fused.logs[0])
    assert_same_run(fused, run(build.naive("trl", model, model, Objective())))


def test_a_reference_that_is_synchronised(build: Build):
    """TR-DPO: after every second step 0.6 of the policy and 0.4 of the reference."""
    pytest.importorskip("trl")
    model = tiny_model()
    ref_model = nearby(model)
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}
    fused = run(build.fused("trl", model, ref_model, Objective(), **options, max_steps=3))
    naive = run(build.naive("trl", model, ref_model, Objective(), **options, max_steps=3))
    assert_same_run(fused, naive)
    assert_same_weights(weights_of(fused.trainer.ref_model), weights_of(naive.trainer.ref_model))
    policy = run(build.fused("trl", model, ref_model, Objective(), max_steps=2)).weights
    expected = {name: 0.6 * policy[name] + 0.4 * weight for name, weight in ref_model.state_dict().items()}
    assert_same_weights(weights_of(fused.trainer.ref_model), expected)
    unsynchronised = run(build.fused("trl", model, ref_model, Objective(), max_steps=3))
    assert abs(unsynchronised.logs[2]["kl/chosen"] - fused.logs[2]["kl/chosen"]) > 0.01


def test_callbacks_of_a_user(module: str, build: Build):
    class StopsWhenFarAway(transformers.TrainerCallback):
        seen: list[float] = []  # noqa: RUF012

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "kl/chosen" in logs:
                self.seen.append(logs["kl/chosen"])
                control.should_training_stop = len(self.seen) == 2

    model, callback = tiny_model(), StopsWhenFarAway()
    fused = run(build.fused(module, model, nearby(model), Objective(), options={"callbacks": [callback]}))
    assert len(fused.logs) == 2
    assert callback.seen == [log["kl/chosen"] for log in fused.logs]


def test_generating_while_training(module: str, build: Build):
    """As callbacks do that show samples: in eval mode and back, in the middle of it, without any trace."""

    class Shows(transformers.TrainerCallback):
        samples: list[Tensor] = []  # noqa: RUF012

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            model.eval()
            self.samples.append(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False))
            model.train()

    model, callback = tiny_model(), Shows()
    ref_model = nearby(model)
    fused = run(build.fused(module, model, ref_model, Objective(), options={"callbacks": [callback]}))
    assert len(callback.samples) == 4
    assert_same_run(fused, run(build.fused(module, model, ref_model, Objective())), relative=0)


def test_an_optimizer_of_a_user(module: str, build: Build):
    model = tiny_model()
    ref_model = nearby(model)
    integration = importlib.import_module(f"fused_tdpo.integrations.{module}")
    args = integration.TDPOConfig(**build.arguments(module, "fused") | option_names(Objective()))
    policy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(policy.model.layers.parameters(), lr=0.05)
    trainer = integration.TDPOTrainer(
        model=policy, ref_model=ref_model, args=args, optimizers=(optimizer, None), **build.data(module, None, None)
    )
    fused = run(trainer)
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, fused.weights[name])}
    assert moved and all(name.startswith("model.layers.") for name in moved)


def test_models_of_different_sizes(module: str, build: Build):
    """The reference may be another model of the same vocabulary: its hidden size need not be the policy's."""
    model = tiny_model()
    ref_model = tiny_model("phi", seed=5, hidden_size=16)
    fused = run(build.fused(module, model, ref_model, Objective(), max_steps=2))
    assert_same_run(fused, run(build.naive(module, model, ref_model, Objective(), max_steps=2)))


# -------------------------------------------------------------------------------------------------------------- kinds of rows


@pytest.mark.parametrize("kind", ["text", "chat", "dataset of ids", "dataset of text"])
def test_kinds_of_rows(build: Build, kind: str):
    """The same pairs, written in other ways."""
    options: dict[str, Any] = {"train_dataset": ROWS}
    expected_rows: Any = ROWS
    if kind == "chat":
        options = {"train_dataset": chat_rows(ROWS), "processing_class": byte_tokenizer(chat_template=CHAT_TEMPLATE)}
        expected_rows = [row | {"prompt": f"<u>{row['prompt']}<a>"} for row in ROWS]
    elif kind.startswith("dataset"):
        datasets = pytest.importorskip("datasets")
        options = {"train_dataset": datasets.Dataset.from_list(id_rows(ROWS) if kind.endswith("ids") else ROWS)}
    if kind != "dataset of ids":
        options = {"processing_class": byte_tokenizer()} | options
    model = tiny_model()
    ref_model = nearby(model)
    fused = run(build.fused("transformers", model, ref_model, Objective(), options=options))
    assert_same_run(fused, run(build.naive("transformers", model, ref_model, Objective(), rows=expected_rows)))


def test_conversations_of_trl(build: Build):
    pytest.importorskip("trl")
    import datasets

    options = {
        "train_dataset": datasets.Dataset.from_list(chat_rows(ROWS)),
        "processing_class": byte_tokenizer(chat_template=CHAT_TEMPLATE),
    }
    model = tiny_model()
    ref_model = nearby(model)
    fused = run(build.fused("trl", model, ref_model, Objective(), options=options))
    assert_same_run(fused, run(build.naive("trl", model, ref_model, Objective(), options=options)))


def test_streams_of_trl(build: Build):
    pytest.importorskip("trl")
    import datasets

    options = {"train_dataset": datasets.Dataset.from_list(ROWS).to_iterable_dataset()}
    model = tiny_model()
    ref_model = nearby(model)
    fused = run(build.fused("trl", model, ref_model, Objective(), options=options, max_steps=2))
    assert_same_run(fused, run(build.naive("trl", model, ref_model, Objective(), options=options, max_steps=2)))


def test_long_pairs_are_cut(module: str, build: Build):
    """`max_length` counts prompt and completion, and keeps their start."""
    model = tiny_model()
    ref_model = nearby(model)
    cut = run(build.fused(module, model, ref_model, Objective(), max_length=6))
    assert cut.logs[0]["num_tokens"] < run(build.fused(module, model, ref_model, Objective())).logs[0]["num_tokens"]
    if module == "trl":
        naive = build.naive(module, model, ref_model, Objective(), max_length=6)
    else:
        naive = build.naive(module, model, ref_model, Objective(), options={"train_dataset": cut_rows(id_rows(ROWS), 6)})
    assert_same_run(cut, run(naive))


def cut_rows(rows: list[dict[str, list[int]]], length: int) -> list[dict[str, list[int]]]:
    return [
        row | {field: row[field][: length - len(row["prompt_ids"])] for field in ("chosen_ids", "rejected_ids")} for row in rows
    ]


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_packed_is_padded(build: Build, adapters: bool):
    """All sequences of a batch in one row, each attending to itself alone."""
    model = tiny_model()
    ref_model = None if adapters else nearby(model)
    if adapters:
        pytest.importorskip("peft")
        model = lora(model)
    arguments = {"eval_rows": text_rows(4, seed=3), "eval_strategy": "steps", "eval_steps": 2}
    packed = run(build.fused("transformers", model, ref_model, Objective(), packed=True, **arguments))
    padded = run(build.fused("transformers", model, ref_model, Objective(), **arguments))
    assert_same_run(packed, padded)
    assert_same_logs(eval_logs(packed.trainer), eval_logs(padded.trainer), METRICS | {"loss"}, "eval_")


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_weights_of_tokens(build: Build, kind: str, packed: bool):
    """Log-ratios with weights of 2 are as good as twice β."""
    model, rows = tiny_model(), id_rows(ROWS)
    sides = ("chosen", "rejected")
    weighted: Any = [row | {f"{side}_weights": [2.0] * len(row[f"{side}_ids"]) for side in sides} for row in rows]
    if kind == "dataset":
        weighted = pytest.importorskip("datasets").Dataset.from_list(weighted)
    runs = [
        run(build.fused("transformers", model, nearby(model), Objective("dpo", beta=beta), options=options, packed=packed))
        for beta, options in ((0.1, {"train_dataset": weighted}), (0.2, {"train_dataset": rows}))
    ]
    assert_same_run(*runs)
    assert_moved(runs[0], model)


def test_prompts_that_leave_no_room_for_an_answer(module: str, build: Build):
    """Pairs without a token to learn from teach nothing: they are dropped or refused, be they rows of text or of ids."""
    length = 4
    kept = [row for row in ROWS if len(row["prompt"]) < length]
    assert 0 < len(kept) < len(ROWS)
    model = tiny_model()
    try:
        trainer = build.fused(module, model, nearby(model), max_length=length)
    except ValueError as error:
        assert "max_length" in str(error)
    else:
        assert len(trainer.train_dataset) == len(kept)


def test_a_tokenizer_without_padding(build: Build):
    """GPT-2's has none: then `<eos>` pads, which nothing attends to."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    model = tiny_model()
    ref_model = nearby(model)
    options = {"train_dataset": ROWS, "processing_class": tokenizer}
    fused = run(build.fused("transformers", model, ref_model, Objective(), options=options))
    assert_same_run(fused, run(build.naive("transformers", model, ref_model, Objective())))


def test_no_progress_bars_when_disabled(build: Build, capfd: pytest.CaptureFixture[str]):
    """`disable_tqdm` is for those of the tokenizer, too."""
    build.fused("transformers", tiny_model(), options={"train_dataset": ROWS, "processing_class": byte_tokenizer()})
    assert "it/s" not in (bars := capfd.readouterr().err) and "%|" not in bars, bars


def test_metrics_of_a_user(build: Build):
    """`compute_metrics` gets each pair's rewards: there are no logits to give it."""

    def compute_metrics(prediction: transformers.EvalPrediction) -> dict[str, float]:
        chosen, rejected = prediction.predictions
        assert chosen.shape == rejected.shape == (6,)
        return {"chosen": float(chosen.mean()), "worst": float((chosen - rejected).min())}

    model = tiny_model()
    options = {"compute_metrics": compute_metrics}
    metrics = build.fused("transformers", model, nearby(model), eval_rows=ROWS[:6], options=options).evaluate()
    assert metrics["eval_chosen"] == pytest.approx(metrics["eval_rewards/chosen"], rel=1e-5)
    assert metrics["eval_worst"] < metrics["eval_rewards/margins"]


@pytest.mark.parametrize("name", ["gemma2", "phi", "gpt2", "opt", "bloom", "mamba"])
def test_packed_is_padded_or_refused(build: Build, name: str):
    """Models that see a sequence's start in no position (recurrent, or counting by themselves) would look into another one."""
    model = tiny_model(name)
    ref_model = nearby(model)
    try:
        packed = build.fused("transformers", model, ref_model, Objective(), packed=True, max_steps=1)
    except ValueError as error:
        assert "packed" in str(error)
        assert name in ("opt", "bloom", "mamba")
    else:
        assert_same_run(run(packed), run(build.fused("transformers", model, ref_model, Objective(), max_steps=1)))


@pytest.mark.parametrize(
    "collate",
    [lambda rows: pad_pairs(rows, 256), PreferenceCollator(256, packed=True), PreferenceCollator(256, max_length=None)],
    ids=["naive", "packed", "padded"],
)
def test_a_collator_of_a_user(build: Build, collate: Callable[..., Any]):
    """One of another make, which counts nothing; or one of ours, whatever the config says."""
    model = tiny_model()
    ref_model = nearby(model)
    fused = run(build.fused("transformers", model, ref_model, Objective(), options={"data_collator": collate}))
    assert_same_run(fused, run(build.naive("transformers", model, ref_model, Objective())))


@pytest.mark.parametrize("kind", ["generator", "stream"])
def test_rows_without_a_length(build: Build, kind: str):
    """They work, or the error says what is expected of a data set."""
    rows: Any = iter(id_rows(ROWS))
    if kind == "stream":
        rows = pytest.importorskip("datasets").Dataset.from_list(id_rows(ROWS)).to_iterable_dataset()
    model = tiny_model()
    ref_model = nearby(model)
    try:
        fused = build.fused("transformers", model, ref_model, Objective(), options={"train_dataset": rows})
    except (TypeError, ValueError) as error:
        assert "train_dataset" in str(error)
    else:
        same_order = {"train_dataset": rows}  # streams are not shuffled
        assert_same_run(run(fused), run(build.naive("transformers", model, ref_model, Objective(), options=same_order)))


def test_rows_that_are_wrong_are_refused_before_training(build: Build):
    rows = id_rows(ROWS)
    rows[5] = rows[5] | {"chosen_ids": []}
    model = tiny_model()
    with pytest.raises(ValueError, match=r"(?s)5.*chosen_ids"):
        build.fused("transformers", model, nearby(model), options={"train_dataset": rows})


def test_text_needs_a_tokenizer(build: Build):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"(?s)processing_class.*tokenizer|tokenizer.*processing_class"):
        build.fused("transformers", model, nearby(model), options={"train_dataset": ROWS})


# ------------------------------------------------------------------------------------------------------------ missing packages


@pytest.mark.parametrize(("module", "missing", "extra"), [("trl", "trl", "trl"), ("transformers", "transformers", "trainer")])
def test_a_package_that_is_missing(module: str, missing: str, extra: str):
    """The error is an ImportError with the command that mends it; the package itself imports without."""
    program = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
import fused_tdpo
try:
    import fused_tdpo.integrations.{module}
except ImportError as error:
    assert "pip install" in str(error) and "fused-tdpo[{extra}]" in str(error), str(error)
else:
    raise SystemExit("imported")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_reference_runs_in_the_precision_of_the_policy(build: Build):
    """Equal models are equal under autocast, too: the KL at the first step is exactly 0."""
    model = tiny_model()
    for module in MODULES:
        pytest.importorskip(module)
        logs = step_logs(run(build.fused(module, model, tiny_model(), Objective(), bf16=True, max_steps=1)).trainer)
        assert logs[0]["kl/chosen"] == logs[0]["kl/rejected"] == 0.0


def test_a_policy_that_another_trainer_has_prepared(build: Build):
    """accelerate leaves its autocast on the model; the second training begins where a fresh one would."""
    model = tiny_model()
    run(build.fused("transformers", model, tiny_model(), Objective(), bf16=True, max_steps=1))
    again = run(build.fused("transformers", model, nearby(model), Objective(), bf16=True, max_steps=1))
    assert step_logs(again.trainer)[0]["kl/chosen"] > 0


def test_adapters_that_cannot_be_switched_off_are_refused(build: Build):
    pytest.importorskip("peft")
    model = tiny_model()
    model.peft_config = {
        "default": lora_config()
    }  # what model.add_adapter leaves, for which each transformers wants another peft
    with pytest.raises(ValueError, match="get_peft_model"):
        build.fused("transformers", model, None, Objective())


def test_vocabularies_of_different_width(module: str, build: Build):
    """Padded differently: refused before training with the option to set, and right with it."""
    model = tiny_model()
    ref_model = nearby(model)
    wide = copy.deepcopy(ref_model)
    wide.resize_token_embeddings(V + 8)
    with pytest.raises(ValueError, match=f"vocab_size={V}"):
        build.fused(module, model, wide)
    assert_same_run(
        run(build.fused(module, model, wide, Objective(), vocab_size=V)),
        run(build.naive(module, model, ref_model, Objective())),
    )


def test_predict_leaves_no_metrics_behind(build: Build):
    model = tiny_model()
    trainer = build.fused("transformers", model, nearby(model), Objective())
    first = trainer.evaluate(id_rows(ROWS))
    trainer.predict(id_rows(ROWS)[:2])
    second = trainer.evaluate(id_rows(ROWS))
    assert first["eval_rewards/chosen"] == second["eval_rewards/chosen"]


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_rows_that_are_tensors_or_arrays(build: Build, kind: str):
    datasets = pytest.importorskip("datasets")
    model = tiny_model()
    ref_model = nearby(model)
    rows = datasets.Dataset.from_list(id_rows(ROWS)).with_format(kind)
    fused = run(build.fused("transformers", model, ref_model, Objective(), options={"train_dataset": rows}))
    assert_same_run(fused, run(build.naive("transformers", model, ref_model, Objective())))


@pytest.mark.parametrize("variant", ["tdpo1", "dpo"])
def test_the_model_card_says_what_was_trained(build: Build, tmp_path: Path, variant: str):
    pytest.importorskip("trl")
    model = tiny_model()
    trainer = build.fused("trl", model, nearby(model), tdpo_variant=variant)
    trainer.create_model_card()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert ("2404.11999" in card) == (variant != "dpo") and ("2305.18290" in card) == (variant == "dpo")


@pytest.mark.parametrize("options", [{"f_divergence_type": "foo"}, {"f_alpha_divergence_coef": 2.0}], ids=["name", "order"])
def test_divergences_that_trl_lacks(build: Build, options: dict[str, Any]):
    pytest.importorskip("trl")
    options = {"f_divergence_type": "alpha_divergence", "tdpo_variant": "dpo"} | options
    with pytest.raises(ValueError, match=r"f_divergence_type.*foo|f_alpha_divergence_coef.*2\.0"):
        build.fused("trl", tiny_model(), nearby(tiny_model()), **options)
