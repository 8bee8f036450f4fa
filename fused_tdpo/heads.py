"""The last step of a language model, from hidden states to logits, as one record; and how to read it off a transformers model.

    logits = softcap(scale · (h Wᵀ + b))[..., :vocab_size]        softcap(y) = cap · tanh(y / cap)

covers the decoders of transformers 5.23 whose head is one linear layer. transformers itself is never imported: its models are
asked for what all of them have. Letters: D hidden size, V rows of the weight.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_tdpo._checks import LOGIT_DTYPES, describe


@dataclass(frozen=True, eq=False, repr=False)
class LMHead:
    """logits = softcap(scale · (h Wᵀ + b))[..., :vocab_size]; a temperature comes later and is not the head's.

    Tensors are kept, not copied: gradients reach the parameters that they are. `LMHead.from_model` reads one off a model.

    Raises:
        TypeError: `weight` or `bias` is not a float tensor.
        ValueError: fields that do not fit together, or a number out of its range.
    """

    weight: Tensor
    """W (V, D): float16, bfloat16, float32 or float64."""
    bias: Tensor | None = None
    """b (V,), float, on the device of the weight."""
    scale: float = 1.0
    """Finite and not 0. What a model does to the hidden states before a head without bias is the same number."""
    softcap: float | None = None
    """cap > 0, or None."""
    vocab_size: int | None = None
    """Number of columns that the model has logits for, the first ones of V; None for all."""

    def __post_init__(self) -> None:
        weight, bias = self.weight, self.bias
        for name, tensor in (("weight", weight), ("bias", bias)):
            absent = name == "bias" and tensor is None
            if not absent and (not isinstance(tensor, Tensor) or tensor.dtype not in LOGIT_DTYPES):
                raise TypeError(
                    f"{name} must be a float16, bfloat16, float32 or float64 tensor; got {describe(tensor)}. A quantised head "
                    "must be dequantised first."
                )
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(
                f"weight must have shape (V, D), as nn.Linear(D, V) keeps it; got {describe(weight)}. If it is sharded, gather "
                "it first."
            )
        if bias is not None and (bias.shape != weight.shape[:1] or bias.device != weight.device):
            raise ValueError(
                f"bias must have shape {tuple(weight.shape[:1])} on {weight.device}, one number for each row of weight "
                f"{describe(weight)}; got {describe(bias)}"
            )
        if not (_is_number(self.scale) and self.scale != 0):
            raise ValueError(f"scale must be a finite number and not 0; got {self.scale!r}. Without one, leave it at 1.0.")
        if self.softcap is not None and not (_is_number(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap must be a finite number > 0; got {self.softcap!r}. Without a cap, pass None.")
        vocab_size = self.vocab_size
        if vocab_size is not None and (type(vocab_size) is not int or not 1 <= vocab_size <= len(weight)):
            raise ValueError(
                f"vocab_size must be an integer between 1 and the rows of weight, {len(weight)}; got {vocab_size!r}. To use "
                "all of them, pass None."
            )

    def __repr__(self) -> str:
        bias = None if self.bias is None else describe(self.bias)
        numbers = f"scale={self.scale}, softcap={self.softcap}, vocab_size={self.vocab_size}"
        return f"LMHead(weight={describe(self.weight)}, bias={bias}, {numbers})"

    @property
    def width(self) -> int:
        """Number of columns of the logits."""
        return len(self.weight) if self.vocab_size is None else self.vocab_size

    def logits(self, hidden: Tensor) -> Tensor:
        """The naive product, differentiable, with all logits in memory: for specifications and checks.

        Args:
            hidden: (..., D) float tensor on the device of the weight.

        Returns:
            (..., width), in the wider of the dtypes of `hidden` and `weight`.
        """
        V, D = self.weight.shape
        if hidden.dim() == 0 or hidden.shape[-1] != D:
            raise ValueError(
                f"hidden must have shape (..., {D}) for weight {describe(self.weight)}; got {describe(hidden)}."
                + (" These look like logits." if hidden.dim() and hidden.shape[-1] == V else "")
            )
        dtype = torch.promote_types(hidden.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias[: self.width].to(dtype)
        y = self.scale * F.linear(hidden.to(dtype), self.weight[: self.width].to(dtype), bias)
        return y if self.softcap is None else self.softcap * torch.tanh(y / self.softcap)

    @classmethod
    def from_model(cls, model: Any, *, check: bool = True, input_ids: Tensor | None = None) -> "LMHead":
        """The head of a causal language model of transformers, also inside PEFT, DDP or `torch.compile`.

        Weight and bias are those of `model.get_output_embeddings()`; scale, softcap and vocab_size come from the fields of its
        config by the table `TRANSFORMS`. A table can miss a model, or another version of one, so the result is checked, on a
        few tokens: the backbone runs alone, as a training step calls it, and gives h; then the whole model runs, with what its
        head module is given multiplied, token by token, such that logits reach sizes of 1, 10, 100 and 1000. Its logits must
        be `head.logits` of h times the same factors. One comparison thus tests both that the head sees `last_hidden_state` and
        nothing else, up to a scale, and all that follows; and a cap shows however small the logits are that the weights make.
        The factors enter at the head, since some models go past their own `base_model` (OPT); all that were run call the head.

        Args:
            model: has `get_output_embeddings()` and `config`, as every model of transformers.
            check: run that check, in eval mode without gradients; modes are restored. False for weights on the meta device or
                sharded ones: then a config field which may be a transform but is not in the table is refused.
            input_ids: (1, tokens) for the check, of which up to 8 tokens are used; by default some spread over the vocabulary.

        Returns:
            An `LMHead` that holds the model's own parameters.

        Raises:
            TypeError: `model` is no such model, or its weights are quantised.
            ValueError: its logits are no such product (a head with layers inside, an encoder-decoder), an adapter sits on the
                head, or the check found a difference.
        """
        model = unwrap(model)
        if not callable(getattr(model, "get_output_embeddings", None)) or not hasattr(model, "config"):
            raise TypeError(
                f"model must be a causal language model of transformers, with get_output_embeddings() and config; got "
                f"{type(model).__name__}. For another model construct LMHead(weight, bias, ...) by hand."
            )
        if input_ids is not None and not check:
            raise ValueError("input_ids are for the check; pass them with check=True, or leave them out")
        name = f"{type(model).__name__} (model_type {model.config.model_type!r})"
        _refuse_by_name(name, model.config)
        module = _output_embeddings(name, model)
        transforms, unknown = _read_transforms(model.config, len(module.weight))
        head = cls(module.weight, getattr(module, "bias", None), **transforms)
        if check:
            _check(head, model, module, input_ids, name, unknown)
        elif unknown:
            raise ValueError(
                f"the config of {name} has {unknown}, which may or may not act on its logits: no rule is known. Pass "
                "check=True, which finds out, or construct LMHead by hand as the model's forward does."
            )
        return head


def backbone(model: Any) -> nn.Module:
    """The module whose output's `last_hidden_state` is what the head of `model` is applied to.

    Args:
        model: a causal language model of transformers, also inside PEFT, DDP or `torch.compile`.

    Raises:
        ValueError: no such module is found.
    """
    model = unwrap(model)
    # not get_decoder(): of a vision-language model that is the text part, which never sees the images
    for name in ("base_model", "model"):  # base_model may be the model itself (Llama4)
        module = getattr(model, name, None)
        if isinstance(module, nn.Module) and module is not model:
            return module
    raise ValueError(
        f"{type(model).__name__} has neither a base_model nor a model beside itself; call the module that makes its hidden "
        "states by its own name"
    )


# --- the table --------------------------------------------------------------------------------------------------------------


class Transform(NamedTuple):
    """What a config field does to the logits of some models."""

    field: str
    """Of `config.get_text_config()`. None as its value means no transform."""
    use: Literal["multiply", "divide", "softcap", "vocab_size", "unused"]
    """`unused`: the field is there, and the model's forward does not read it."""
    model_types: tuple[str, ...]
    """Of `config`, the outer one: it tells whose forward runs. Wrappers around a text model often leave its transforms out."""


TRANSFORMS = (
    Transform("lm_head_multiplier", "multiply", ("falcon_h1",)),
    Transform("logit_scale", "multiply", ("cohere", "cohere2", "cohere2_moe", "cohere_compass", "cohere_compass_text")),
    Transform("logit_scale", "unused", ("aya_vision", "cohere2_vision", "mpt")),
    Transform("logits_scaling", "multiply", ("hyperclovax", "hyperclovax_vision_v2")),
    Transform(
        "logits_scaling",
        "divide",
        (
            *("granite", "granite_swa", "granite4_vision", "granite_docling"),
            *("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"),
            "minicpm3",  # divides the hidden states, before a head without bias
        ),
    ),
    Transform("logits_mup_width_multiplier", "divide", ("inkling_mm_model", "inkling_text")),  # the hidden states, too
    Transform("output_multiplier", "multiply", ("muse_glimmer", "muse_spark")),
    Transform(
        "final_logit_softcapping",
        "softcap",
        (
            *("gemma2", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
            *("gemma4_unified", "gemma4_unified_text", "paligemma", "vaultgemma"),
            *("beam", "inkling2", "inkling2_text", "mistral_large4", "muse_glimmer", "muse_spark", "nanochat"),
        ),
    ),
    Transform("final_logit_softcapping", "unused", ("gemma3",)),
    Transform("logits_soft_cap", "softcap", ("recurrent_gemma",)),
    Transform("output_logit_soft_cap", "softcap", ("xlstm",)),
    Transform("unpadded_vocab_size", "vocab_size", ("inkling2", "inkling2_text", "inkling_mm_model", "inkling_text")),
)
"""The transforms of logits in transformers 5.23, read from its forwards; tests/test_heads.py runs those that can be built."""

_LAYERS = "has a dense layer and a norm inside its head"
REFUSED = {
    **dict.fromkeys(
        (
            *("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "modernbert-decoder"),
            *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        ),
        _LAYERS,
    ),
    "chameleon": "overwrites the logits of its image tokens",
}
"""model_type -> why its logits are no such product."""


def _read_transforms(config: Any, V: int) -> tuple[dict[str, Any], str]:
    """Fields of an `LMHead` of V rows, by the table; and the config's fields that the table knows of other models only."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found: dict[str, Any] = {}
    known = {row.field for row in TRANSFORMS if config.model_type in row.model_types}
    for row in TRANSFORMS:
        value = getattr(text, row.field, None)
        if config.model_type not in row.model_types or value is None or row.use == "unused":
            continue
        if row.use in ("multiply", "divide"):
            found["scale"] = float(value) if row.use == "multiply" else 1 / float(value)
        elif row.use == "softcap":
            found["softcap"] = float(value)
        elif value < V:
            found["vocab_size"] = int(value)
    others = sorted({row.field for row in TRANSFORMS} - known)
    unknown = [f"{field}={getattr(text, field)}" for field in others if getattr(text, field, None) not in (None, 1)]
    return found, ", ".join(unknown)


# --- finding and refusing ---------------------------------------------------------------------------------------------------

_ON_LOGITS = "Use the losses on logits, TDPOLoss or DPOLoss, with model(...).logits."


def unwrap(model: Any) -> Any:
    """The model inside PEFT, DDP, FSDP, DeepSpeed and `torch.compile`, in any nesting."""
    while True:
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                f"{type(model).__name__} learns a prompt, which lives outside its base model, so hidden states would lack it. "
                + _ON_LOGITS
            )
        if callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()
            continue
        inner = (getattr(model, name, None) for name in ("_orig_mod", "module"))
        found = next((module for module in inner if isinstance(module, nn.Module)), None)
        if found is None:
            return model
        model = found


def _refuse_by_name(name: str, config: Any) -> None:
    if config.model_type in REFUSED:
        reason = REFUSED[config.model_type]
        raise ValueError(f"{name} {reason}, so its logits are not a product of hidden states with one weight. {_ON_LOGITS}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder; heads of these add a bias or a factor that no config field tells. {_ON_LOGITS} "
            "Or construct LMHead by hand, as the model's forward does."
        )


def _output_embeddings(name: str, model: Any) -> Any:
    """The module of the head, with a weight of its own and nothing inside."""
    try:
        module = model.get_output_embeddings()
    except NotImplementedError:
        module = None
    if module is None:
        raise ValueError(
            f"{name} has no output embeddings: it makes hidden states, not logits. Load it as a causal language model, for "
            "example with AutoModelForCausalLM."
        )
    inside = [child for child, _ in module.named_children()]
    if inside or not isinstance(getattr(module, "weight", None), Tensor):
        raise ValueError(
            f"the output embeddings of {name} must be one linear layer; got {type(module).__name__} with "
            f"{', '.join(inside) or 'no weight'} inside. Adapters on the head, LoRA and modules_to_save among them, are left "
            f"out of `weight`: merge them, or train without. {_ON_LOGITS}"
        )
    return module


# --- the check --------------------------------------------------------------------------------------------------------------

_SIZES = (1.0, 10.0, 100.0, 1000.0)  # of the logits: below and above any cap that is in use
_LARGEST = 1e4  # of anything that the check makes larger: float16 ends at 65504
_TOKENS = 8


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Sets the flags themselves: a call of train() may do more, and would not restore a mixture of modes."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _without_autocast(model: Any) -> Iterator[None]:
    """accelerate leaves its autocast around the forward of a model that it has prepared, and the original beside it."""
    prepared = model.forward
    if "_original_forward" in vars(model):
        model.forward = model._original_forward
    try:
        yield
    finally:
        if "_original_forward" in vars(model):
            model.forward = prepared


def call(module: Any, field: str, **inputs: Any) -> Tensor:
    """One field, the first, of what a module of transformers returns; without a cache, which some would keep in themselves."""
    if "use_cache" in inspect.signature(module.forward).parameters:
        inputs["use_cache"] = False
    output = module(**inputs)
    return output[0] if isinstance(output, tuple) else getattr(output, field)


def _factors(head: LMHead, hidden: Tensor) -> Tensor:
    """(tokens, 1) numbers that make the largest of |scale · h Wᵀ| of each token the next of `_SIZES`."""
    product = F.linear(hidden.to(head.weight), head.weight[: head.width]).float().abs().amax(-1)
    largest = torch.maximum(product, hidden.to(product).abs().amax(-1))
    sizes = torch.tensor(_SIZES, device=product.device).repeat(product.shape[-1])[: product.shape[-1]]
    return torch.minimum(sizes / (abs(head.scale) * product), _LARGEST / largest).nan_to_num(1.0, posinf=1.0)[0, :, None]


def _check(head: LMHead, model: nn.Module, module: nn.Module, input_ids: Tensor | None, name: str, unknown: str) -> None:
    """Raise unless the model's logits are `head.logits` of its backbone's hidden states, at all sizes of logits."""
    if head.weight.is_meta or hasattr(head.weight, "full_tensor"):
        raise ValueError(
            f"the check computes with the head's weight, which is {'on meta' if head.weight.is_meta else 'sharded'}; pass "
            "check=False, and run it once on a small model of this type"
        )
    if input_ids is None:
        input_ids = torch.linspace(0, head.width - 1, _TOKENS + 2).long()[None, 1:-1].to(next(model.parameters()).device)
    input_ids, calls = input_ids[:1, :_TOKENS], []

    def enlarge(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        calls.append(module)
        return (args[0] * factors[-args[0].shape[-2] :].to(args[0]), *args[1:])

    handle = module.register_forward_pre_hook(enlarge)
    try:
        with eval_mode(model):
            hidden = call(backbone(model), "last_hidden_state", input_ids=input_ids)
            factors = _factors(head, hidden)
            with _without_autocast(model):
                theirs = call(model, "logits", input_ids=input_ids).to(head.weight.device)
            ours = head.logits((hidden * factors.to(hidden))[..., -theirs.shape[-2] :, :].to(head.weight.device))
    finally:
        handle.remove()

    if not calls:
        problem = "its forward does not call the module of its output embeddings, so that the check cannot reach the logits"
    elif theirs.shape != ours.shape:
        problem = f"they have shape {tuple(theirs.shape)}, where its head gives {tuple(ours.shape)}"
    else:
        error = (ours.double() - theirs.double()).abs().amax(-1).flatten()
        size = ours.double().abs().amax(-1).flatten()
        if (error <= max(4 * torch.finfo(head.weight.dtype).eps, 1e-4) * size).all():  # NaN fails
            return
        worst = int((error / size).nan_to_num(torch.inf).argmax())
        problem = f"largest difference {float(error[worst]):.3g}, beside logits up to {float(size[worst]):.3g}"
    raise ValueError(
        f"the logits of {name} are not what LMHead makes of its backbone's last_hidden_state: {problem}. Read: {head}. "
        + (f"Its config has {unknown}, for which no rule is known. " if unknown else "")
        + f"Construct LMHead by hand, as the end of {type(model).__name__}.forward says. If a layer or a norm is there, no "
        f"LMHead can say it: {_ON_LOGITS[0].lower()}{_ON_LOGITS[1:]}"
    )


def _is_number(value: Any) -> bool:
    return type(value) is not bool and isinstance(value, Real) and isfinite(value)
