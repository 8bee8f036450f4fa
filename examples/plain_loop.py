"""TDPO in a plain PyTorch loop: a policy, a frozen reference, pairs of token ids, an optimizer.

    python examples/plain_loop.py                                  a tiny model made here, seconds on a CPU
    python examples/plain_loop.py --model HuggingFaceTB/SmolLM2-135M

The loss starts from hidden states, so that the logits of the batch, here of both models, never exist.
"""

import argparse
import copy

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fused_tdpo import LinearTDPOLoss, LMHead
from fused_tdpo.heads import backbone
from fused_tdpo.integrations.data import PreferenceCollator


def pairs_to_learn(vocab_size: int, number: int = 64) -> list[dict[str, list[int]]]:
    """Prompts of random tokens; the chosen answer counts up, the rejected one down."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for start in torch.randint(20, vocab_size - 20, (number,), generator=generator).tolist():
        up, down = list(range(start + 1, start + 9)), list(range(start - 1, start - 9, -1))
        rows.append({"prompt_ids": [start] * 4, "chosen_ids": up, "rejected_ids": down})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model; default: a tiny one with random weights")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    if args.model:
        policy = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        policy = LlamaForCausalLM(
            LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        )
    policy = policy.to(device).train()
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    policy_head, ref_head = LMHead.from_model(policy), LMHead.from_model(reference)  # checked against the models' own logits

    loss_of = LinearTDPOLoss(beta=0.1, alpha=0.5)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3 if args.model is None else 1e-6)
    batches = torch.utils.data.DataLoader(
        pairs_to_learn(policy.config.vocab_size), batch_size=8, shuffle=True, collate_fn=PreferenceCollator()
    )
    step = 0
    while step < args.steps:
        for batch in batches:
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                ref_hidden = backbone(reference)(**inputs, use_cache=False).last_hidden_state
            hidden = backbone(policy)(**inputs, use_cache=False).last_hidden_state
            labels = batch["labels"].to(device)
            out = loss_of(hidden, policy_head, ref_hidden, ref_head, labels, valid_rows=batch["valid_rows"])
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0 or step == 1:
                names = ("rewards/margins", "rewards/accuracies", "kl/chosen", "kl/rejected")
                shown = "  ".join(f"{name} {out.metrics[name].item():.3f}" for name in names)
                print(f"step {step:>3}  loss {out.loss.item():.4f}  {shown}")
            if step == args.steps:
                break


if __name__ == "__main__":
    main()
