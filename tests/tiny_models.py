"""Models of a few thousand weights, a tokenizer of single bytes and preference pairs, made in memory without a download.

Weights are drawn wide enough that logits spread over several nats, so that probabilities, soft-caps and scales all matter.
"""

import copy
import os
import random
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported: nothing here needs a network
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch

V, D = 264, 32  # 256 bytes and two special tokens, and a few columns that no token uses
LAYERS = 2

SIZES = {"vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
TOKENS = {"bos_token_id": None, "eos_token_id": 257, "pad_token_id": 256, "initializer_range": 0.25}
TEXT = SIZES | TOKENS | {"num_key_value_heads": 2, "max_position_embeddings": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


class Architecture(NamedTuple):
    model: str
    config: str
    options: dict[str, Any]


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", TEXT | {"tie_word_embeddings": False}),
    "llama-tied": Architecture("LlamaForCausalLM", "LlamaConfig", TEXT | {"tie_word_embeddings": True}),
    "gemma2": Architecture("Gemma2ForCausalLM", "Gemma2Config", TEXT | {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "granite": Architecture("GraniteForCausalLM", "GraniteConfig", TEXT | {"logits_scaling": 0.5}),
    "cohere": Architecture("CohereForCausalLM", "CohereConfig", TEXT | {"logit_scale": 2.0}),
    "llama4": Architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        TEXT | EXPERTS | {"head_dim": 8, "intermediate_size_mlp": 48, "router_aux_loss_coef": 0.0},
    ),
    "phi": Architecture("PhiForCausalLM", "PhiConfig", TEXT),
    "gpt2": Architecture(  # the one with dropout, by default
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_positions": 64} | TOKENS,
    ),
    "mixtral": Architecture("MixtralForCausalLM", "MixtralConfig", TEXT | EXPERTS),
    "mamba": Architecture(
        "MambaForCausalLM", "MambaConfig", {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 1} | TOKENS
    ),
    "opt": Architecture(
        "OPTForCausalLM", "OPTConfig", SIZES | TOKENS | {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": D}
    ),
    "bloom": Architecture(
        "BloomForCausalLM", "BloomConfig", {"vocab_size": V, "hidden_size": D, "n_layer": 1, "n_head": 4} | TOKENS
    ),
}
"""What each is for: plain head, tied head, soft-cap, divided and multiplied logits, a model that is its own base_model, a bias,
dropout, a router loss; and no position_ids: recurrent, counting by the mask, ALiBi."""


def tiny_model(name: str = "llama", seed: int = 0, **options: Any) -> Any:
    """A random model: the same for the same arguments. Biases are random, too."""
    import transformers

    architecture = ARCHITECTURES[name]
    config = getattr(transformers, architecture.config)(**copy.deepcopy(architecture.options | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, architecture.model)(config)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def nearby(model: Any, seed: int = 1, scale: float = 0.02) -> Any:
    """A copy with every weight moved a little: a reference that the policy already differs from."""
    other = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return other


def lora(model: Any, seed: int = 2, **options: Any) -> Any:
    """A copy with adapters on the attention that are not zero at the start."""
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(copy.deepcopy(model), lora_config(**options))


def lora_config(**options: Any) -> Any:
    import peft

    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return peft.LoraConfig(**(defaults | {"task_type": "CAUSAL_LM"} | options))


def byte_tokenizer(merges: tuple[tuple[str, str], ...] = (), chat_template: str | None = None) -> Any:
    """A token for each byte, 256 is `<pad>`, 257 is `<eos>`; then one for each merge of two tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<pad>", "<eos>", *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = chat_template
    return fast


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'][0] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def text_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs of random letters, of different lengths."""
    draw = random.Random(seed)

    def word(shortest: int, longest: int) -> str:
        return "".join(draw.choices("abcdefghij", k=draw.randint(shortest, longest)))

    return [{"prompt": word(2, 5), "chosen": word(2, 7), "rejected": word(2, 7)} for _ in range(count)]


def chat_rows(rows: list[dict[str, str]]) -> list[dict[str, list[dict[str, str]]]]:
    """The same as conversations."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{field: [{"role": roles[field], "content": text}] for field, text in row.items()} for row in rows]


def id_rows(rows: list[dict[str, str]]) -> list[dict[str, list[int]]]:
    """The same as token ids; a completion ends with `<eos>`."""
    tokenizer = byte_tokenizer()

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    eos = [tokenizer.eos_token_id]
    return [
        {
            "prompt_ids": ids(row["prompt"]),
            "chosen_ids": ids(row["chosen"]) + eos,
            "rejected_ids": ids(row["rejected"]) + eos,
        }
        for row in rows
    ]


def completion_tokens(rows: list[dict[str, list[int]]]) -> int:
    return sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)


def all_tokens(rows: list[dict[str, list[int]]]) -> int:
    return completion_tokens(rows) + sum(2 * len(row["prompt_ids"]) for row in rows)
