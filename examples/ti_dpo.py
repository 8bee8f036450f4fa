"""TI-DPO in a plain PyTorch loop: TDPO whose tokens have weights, and a triplet loss with the policy's own answers.

    python examples/ti_dpo.py      a tiny model made here, seconds on a CPU

Each step weighs the tokens of both answers by their importance, and samples an anchor for each pair from its prompt. The loss
draws the anchor towards the chosen answer, away from the rejected one.
"""

import argparse
import copy
from itertools import chain, repeat

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fused_tdpo import LinearTIDPOLoss, LMHead, token_importance
from fused_tdpo.heads import backbone
from fused_tdpo.integrations.data import PreferenceCollator

VOCABULARY, PROMPT = 500, 4


def pairs_to_learn(number: int = 64) -> list[dict[str, list[int]]]:
    """Prompts of one length, so that `generate` needs no padding; the chosen answer counts up, the rejected one down."""
    starts = torch.randint(20, VOCABULARY - 20, (number,), generator=torch.Generator().manual_seed(0)).tolist()
    steps = range(1, 9)
    return [
        {"prompt_ids": [n] * PROMPT, "chosen_ids": [n + k for k in steps], "rejected_ids": [n - k for k in steps]}
        for n in starts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, eos_token_id=None, **size)  # answers of one length, without an end
    policy = LlamaForCausalLM(config).to(device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    head, ref_head = LMHead.from_model(policy), LMHead.from_model(reference)

    loss_of = LinearTIDPOLoss(beta=0.1, alpha=0.5, gamma=0.1, margin=0.01)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    batches = torch.utils.data.DataLoader(pairs_to_learn(), batch_size=8, shuffle=True, collate_fn=PreferenceCollator())
    for step, batch in zip(range(1, steps + 1), chain.from_iterable(repeat(batches)), strict=False):
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        labels = batch["labels"].to(device)
        weights = token_importance(policy, **inputs, labels=labels, head=head)

        prompts = inputs["input_ids"][: len(labels) // 2, :PROMPT]
        sampled = policy.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_new_tokens=8)
        anchor_labels = sampled.masked_fill(torch.arange(sampled.shape[1], device=device) < PROMPT, -100)

        with torch.no_grad():
            ref_hidden = backbone(reference)(**inputs, use_cache=False).last_hidden_state
            anchor_ref_hidden = backbone(reference)(sampled, use_cache=False).last_hidden_state
        hidden = backbone(policy)(**inputs, use_cache=False).last_hidden_state
        anchor = (backbone(policy)(sampled, use_cache=False).last_hidden_state, anchor_ref_hidden, anchor_labels)
        out = loss_of(hidden, head, ref_hidden, ref_head, labels, token_weights=weights, anchor=anchor)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == 1:
            names = ("triplet", "rewards/margins", "rewards/accuracies")
            shown = "  ".join(f"{name} {out.metrics[name].item():.3f}" for name in names)
            print(f"step {step:>3}  loss {out.loss.item():.4f}  {shown}")


if __name__ == "__main__":
    main()
