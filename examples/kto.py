"""KTO in a plain PyTorch loop: single answers, each good or bad, and a reference point from mismatched ones.

    python examples/kto.py      a tiny model made here, seconds on a CPU

The reference point estimates how far the policy is from the reference: the mean log-ratio of each prompt with the answer to
another one, without a gradient. It costs a forward of both models on as many sequences as there are in the batch.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fused_tdpo import LinearKTOLoss, LMHead, kto_reference_point, linear_token_stats
from fused_tdpo.heads import backbone

VOCABULARY, PROMPT = 500, 4


def answers_to_learn(number: int) -> list[tuple[list[int], list[int], bool]]:
    """(prompt, answer, whether it is good): good ones count up, bad ones down; two of three are bad, without a partner."""
    starts = torch.randint(20, VOCABULARY - 20, (number,)).tolist()
    return [([n] * PROMPT, [n + k if i % 3 == 0 else n - k for k in range(1, 9)], i % 3 == 0) for i, n in enumerate(starts)]


def batch_of(prompts: list[list[int]], answers: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and labels (S, T), -100 on prompts. All are of one length here; with others, pad and pass an attention mask."""
    ids = torch.tensor([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    return ids, ids.masked_fill(torch.arange(ids.shape[1]) < PROMPT, -100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **size)).to(device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    head, ref_head = LMHead.from_model(policy), LMHead.from_model(reference)

    loss_of = LinearKTOLoss(beta=0.1, desirable_weight=2.0)  # as many of the others
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        prompts, answers, good = map(list, zip(*answers_to_learn(15), strict=True))
        ids, labels = (t.to(device) for t in batch_of(prompts, answers))
        other_ids, other_labels = (t.to(device) for t in batch_of(prompts, answers[1:] + answers[:1]))
        with torch.no_grad():
            others, ref_others = (backbone(model)(other_ids).last_hidden_state for model in (policy, reference))
            targets = F.pad(other_labels[:, 1:], (0, 1), value=-100)
            stats = linear_token_stats(others, head, ref_others, ref_head, targets)
            kappa = kto_reference_point((stats.logp - stats.ref_logp).sum(-1))
            ref_hidden = backbone(reference)(ids).last_hidden_state
        hidden = backbone(policy)(ids).last_hidden_state
        desirable = torch.tensor(good, device=device)
        out = loss_of(hidden, head, ref_hidden, ref_head, labels, desirable, reference_point=kappa)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == 1:
            names = ("rewards/chosen", "rewards/rejected", "kl")
            shown = "  ".join(f"{name} {out.metrics[name].item():.3f}" for name in names)
            print(f"step {step:>3}  loss {out.loss.item():.4f}  {shown}")


if __name__ == "__main__":
    main()
