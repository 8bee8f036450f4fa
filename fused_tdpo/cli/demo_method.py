"""The method at work: the sentiment experiment of TDPO's paper (arXiv 2404.11999, section 5.1) in miniature.

A small language model learns sentences of movie reviews. It then writes pairs of sentences, which a reward orders, and DPO,
TDPO1 and TDPO2 train it on those, by `fused_tdpo.integrations.transformers.TDPOTrainer`, from the same start.
"""

import copy
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from inspect import signature
from itertools import pairwise
from multiprocessing import get_context
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_tdpo import LinearDPOLoss, LMHead, linear_token_stats
from fused_tdpo.cli.demo_reviews import END, Corpus, Reward, make_corpus, padded, read_reviews, train_reward
from fused_tdpo.heads import backbone
from fused_tdpo.integrations.data import PreferenceCollator

METHODS = {"DPO": "dpo", "TDPO1": "tdpo1", "TDPO2": "tdpo2"}
"""Name -> `tdpo_variant`."""
BETA = 0.1
PROMPT = 3
"""Words of a prompt."""
MAX_NEW_TOKENS = 18

Say = Callable[[str, float], None]
"""Told what is going on, and the share of the part that is done."""
Pair = dict[str, list[int]]
"""`prompt_ids`, `chosen_ids`, `rejected_ids`."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment."""

    reviews: int = 20_000
    vocabulary: int = 1200
    hidden: int = 96
    lm_steps: int = 420
    lm_batch: int = 64
    prompts: int = 1100
    candidates: int = 4
    """Sentences written to each prompt, of which the best and the worst become a pair."""
    gap: float = 0.1
    """Least difference of their rewards."""
    steps: int = 80
    batch: int = 32
    """Pairs of a step."""
    learning_rate: float = 6e-4
    looks: int = 4
    """How many times a policy is looked at while it trains."""
    samples: int = 256
    """Sentences it writes for that; and prompts of held-out pairs."""
    seeds: int = 2
    threads: int = 2
    """On a CPU, until training, which takes one: products are small, and numbers the same on any number of cores."""
    processes: int = 2
    """On a CPU, that share the seeds."""


QUICK = Settings(
    reviews=1500,
    vocabulary=300,
    hidden=32,
    lm_steps=30,
    prompts=80,
    steps=4,
    batch=8,
    looks=2,
    samples=32,
    threads=1,
    processes=1,
)


@dataclass(frozen=True)
class Point:
    """One look at a policy. A KL is KL(ref ‖ policy) summed over a sentence, in nats; all numbers are means."""

    method: str
    seed: int
    step: int
    reward: float
    """Of sentences that the policy wrote."""
    kl: float
    """Of these."""
    accuracy: float
    """The share of held-out pairs whose chosen sentence gained more log-probability than the rejected one."""
    chosen_kl: float
    """Of the chosen sentences of these pairs."""
    rejected_kl: float
    """Of the rejected ones."""


@dataclass
class Result:
    """What the experiment found."""

    settings: Settings
    base_reward: float = float("nan")
    """Of sentences that the model wrote before."""
    points: list[Point] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    """What the trainer logged, with `method` and `seed`."""
    facts: str = ""
    """About data, reward and model, in words."""

    def last(self, method: str) -> list[Point]:
        """The final points, one for each seed."""
        return [point for point in self.points if point.method == method and point.step == self.settings.steps]

    def frontier(self, method: str) -> list[tuple[float, float]]:
        """(KL, reward) of the policy's own sentences, over the training; means over seeds."""
        steps = sorted({point.step for point in self.points if point.method == method})
        groups = [[point for point in self.points if point.method == method and point.step == step] for step in steps]
        means = [(fmean(point.kl for point in group), fmean(point.reward for point in group)) for group in groups]
        return [(0.0, self.base_reward), *means]

    def kl_at(self, method: str, reward: float) -> float | None:
        """The KL at which the frontier first passes a reward, between points on straight lines; None: never."""
        for (kl, low), (next_kl, high) in pairwise(self.frontier(method)):
            if low <= reward <= high and low < high:
                return kl + (next_kl - kl) * (reward - low) / (high - low)
        return None


def new_model(settings: Settings) -> Any:
    """A Llama of two layers with a tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    return LlamaForCausalLM(config)


def train_lm(model: Any, corpus: Corpus, held_out: int, settings: Settings, tell: Callable[[float], None]) -> float:
    """Trains on all sentences but the last `held_out`, whose loss in nats per word it returns.

    A batch has sentences of one length, so none of it is padding. `tell` is told the share of the steps that are done.
    """
    device = model.device
    by_length: dict[int, list[list[int]]] = {}
    for sentence in corpus.sentences[:-held_out]:
        by_length.setdefault(len(sentence.ids), []).append(sentence.ids)
    batches = [torch.tensor(ids, device=device) for ids in by_length.values()]
    shares = torch.tensor([float(len(ids)) for ids in batches])
    rate = 4e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=settings.lm_steps, pct_start=0.15)
    for step, index in enumerate(torch.multinomial(shares, settings.lm_steps, replacement=True).tolist()):
        tell(step / settings.lm_steps)
        ids = batches[index]
        loss = lm_loss(model, ids[torch.randint(len(ids), (settings.lm_batch,), device=device)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return float(lm_loss(model, padded([s.ids for s in corpus.sentences[-held_out:]]).to(device)))


def lm_loss(model: Any, ids: Tensor) -> Tensor:
    """Cross entropy of the words after each one but `END`."""
    labels = ids[:, 1:].where(ids[:, :-1] != END, -100)
    return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels.flatten())


@torch.no_grad()
def sample(model: Any, prompts: Tensor) -> Tensor:
    """Prompts (S, `PROMPT`) -> sentences (S, T) that begin with them, padded with `END`; at temperature 1."""
    from transformers import DynamicCache

    names = signature(model.forward).parameters
    cache = {"cache" if "cache" in names else "past_key_values": DynamicCache(config=model.config)}  # renamed in 5.24
    ids, new = prompts, prompts
    alive = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    for _ in range(MAX_NEW_TOKENS):
        p = model(new, **cache, use_cache=True, logits_to_keep=1).logits[:, -1].float().softmax(-1)
        new = (p / torch.empty_like(p).exponential_()).argmax(-1).where(alive, END)[:, None]  # a draw from p
        ids, alive = torch.cat([ids, new], -1), alive & (new[:, 0] != END)
        if not alive.any():
            break
    return ids


def answers(ids: Tensor) -> list[list[int]]:
    """Sentences (S, T) as `sample` returns them -> their tokens after the prompt, up to the first `END` with it."""
    lengths = (ids != END).sum(-1).add(1).clamp(max=ids.shape[-1]).tolist()
    return [row[PROMPT:length] for row, length in zip(ids.tolist(), lengths, strict=True)]


def make_pairs(model: Any, reward: Reward, prompts: Tensor, settings: Settings) -> list[Pair]:
    """The best and the worst of several sentences to each prompt, where their rewards differ by more than a gap."""
    ids = sample(model, prompts.repeat(settings.candidates, 1))
    rewards = reward(ids).view(settings.candidates, -1)
    (best, top), (worst, bottom) = rewards.max(0), rewards.min(0)
    written, pairs = answers(ids), []
    for i in (best - worst > settings.gap).nonzero()[:, 0].tolist():
        chosen, rejected = (written[int(which[i]) * len(prompts) + i] for which in (top, bottom))
        pairs.append({"prompt_ids": prompts[i].tolist(), "chosen_ids": chosen, "rejected_ids": rejected})
    return pairs


@torch.no_grad()
def look(policy: Any, ref: Any, reward: Reward, prompts: Tensor, pairs: dict[str, Any]) -> dict[str, float]:
    """The numbers of a `Point`, by samples to `prompts` and by a batch of held-out pairs."""
    head, ref_head = (LMHead.from_model(model, check=False) for model in (policy, ref))
    ids = sample(policy, prompts)
    labels = ids.where(F.pad(ids, (1, 0), value=1)[:, :-1] != END, -100)
    labels[:, :PROMPT] = -100
    hidden, ref_hidden = (backbone(model)(ids).last_hidden_state[:, :-1] for model in (policy, ref))
    kl: Any = linear_token_stats(hidden, head, ref_hidden, ref_head, labels[:, 1:]).kl
    inputs = {name: pairs[name].to(ids.device) for name in ("input_ids", "attention_mask")}
    hidden, ref_hidden = (backbone(model)(**inputs).last_hidden_state for model in (policy, ref))
    out = LinearDPOLoss()(hidden, head, ref_hidden, ref_head, pairs["labels"].to(ids.device), valid_rows=pairs["valid_rows"])
    names = {"accuracy": "rewards/accuracies", "chosen_kl": "kl/chosen", "rejected_kl": "kl/rejected"}
    found = {name: out.metrics[key] for name, key in names.items()}
    found |= {"reward": reward(ids).mean(), "kl": kl.sum(-1).mean()}
    return {name: float(value) for name, value in found.items()}


def train(
    model: Any,
    rows: list[dict[str, Any]],
    settings: Any,
    seed: int,
    after_step: Callable[[Any, int], None],
    variant: str = "tdpo2",
    log_every: int = 1,
    tokenizer: Any = None,
) -> list[dict[str, Any]]:
    """Trains the model, or its adapters, on pairs, and returns what the trainer logged.

    Args:
        rows: of ids, or of text with a tokenizer.
        settings: `steps`, `batch` pairs in each, and `learning_rate`.
        after_step: called with the model, in eval mode, and the number of steps done.
    """
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    from fused_tdpo.integrations.transformers import TDPOConfig, TDPOTrainer

    class AfterStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            model.eval()
            after_step(model, state.global_step)
            model.train()

    with tempfile.TemporaryDirectory() as folder:
        args = TDPOConfig(
            folder,
            tdpo_variant=variant,
            beta=BETA,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=settings.steps // 10,
            adam_beta2=0.95,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch,
            logging_steps=log_every,
            seed=seed,
            use_cpu=model.device.type == "cpu",
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
        )
        trainer = TDPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[AfterStep()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry for entry in trainer.state.log_history if "kl/chosen" in entry]


def run(settings: Settings, device: torch.device, seed: int, say: Say) -> Result:
    """The whole experiment.

    Raises:
        ImportError: a package is missing; the message says how to install it.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(settings.threads)
    try:
        return _run(settings, device, seed, say)
    finally:
        torch.set_num_threads(threads)


def _run(settings: Settings, device: torch.device, seed: int, say: Say) -> Result:
    result, held_out = Result(settings), 2 * settings.samples
    say("reading reviews", 0.0)
    corpus = make_corpus(read_reviews()[: settings.reviews], settings.vocabulary)
    say("learning the reward", 0.04)
    reward, accuracy = train_reward(corpus, held_out)
    reward = reward.to(device)
    torch.manual_seed(seed)
    base = new_model(settings).to(device)
    nats = train_lm(base, corpus, held_out, settings, lambda share: say("learning the language", 0.06 + 0.24 * share))

    say("writing pairs", 0.3)
    prompts = torch.tensor([sentence.ids[:PROMPT] for sentence in corpus.sentences], device=device)
    fresh, old = prompts[-settings.samples :], prompts[-held_out : -settings.samples]
    pairs = make_pairs(base, reward, prompts[: settings.prompts], settings)
    held_out_pairs = PreferenceCollator(END)(make_pairs(base, reward, old, settings))
    result.base_reward = float(reward(sample(base, prompts[-held_out:])).mean())
    parameters = sum(parameter.numel() for parameter in base.parameters())
    result.facts = (
        f"{len(corpus.sentences):,} sentences of reviews in {settings.vocabulary:,} words; the reward is a probability, "
        f"{100 * accuracy:.0f} % right on held-out sentences; a Llama of {parameters:,} parameters, {nats:.2f} nats a word; "
        f"{len(pairs):,} pairs of its own sentences; {settings.seeds} seeds"
    )

    start = Start(settings, base, reward, pairs, fresh, held_out_pairs)
    others = [seed + i for i in range(1, settings.seeds)]
    workers = min(len(others), settings.processes - 1)
    if device.type == "cpu":
        torch.set_num_threads(1)
    if device.type == "cpu" and workers > 0:
        with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            waiting = [pool.submit(train_all, start, other) for other in others]
            parts = [train_all(start, seed, say), *(future.result() for future in waiting)]
    else:
        parts = [train_all(start, own, say) for own in (seed, *others)]
    for points, history in parts:
        result.points += points
        result.history += history
    say("done", 1.0)
    return result


@dataclass(frozen=True)
class Start:
    """What every training starts from."""

    settings: Settings
    base: Any
    """The model, which is the reference, too."""
    reward: Reward
    pairs: list[Pair]
    fresh: Tensor
    """Prompts to look at a policy by, (S, `PROMPT`)."""
    held_out: dict[str, Any]
    """A batch of pairs for the same."""


def train_all(start: Start, seed: int, say: Say = lambda text, share: None) -> tuple[list[Point], list[dict[str, Any]]]:
    """Points and logs of each of the methods, by one seed."""
    settings, points, history = start.settings, [], []
    looks = {round(settings.steps * (i + 1) / settings.looks) for i in range(settings.looks)}
    for number, (method, variant) in enumerate(METHODS.items()):

        def after_step(policy: Any, step: int, number: int = number, method: str = method) -> None:
            share = (number + step / settings.steps) / len(METHODS)
            say(f"{method}, seed {seed}: step {step} of {settings.steps}", 0.5 + 0.49 * share)
            if step in looks:
                found = look(policy, start.base, start.reward, start.fresh, start.held_out)
                points.append(Point(method, seed, step, **found))

        every = max(1, settings.steps // 20)
        logged = train(copy.deepcopy(start.base), start.pairs, settings, seed, after_step, variant, every)
        history += [entry | {"method": method, "seed": seed} for entry in logged]
    return points, history
