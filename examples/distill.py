"""The op is general: a small student learns a teacher's whole distribution, KL(teacher ‖ student) at each token.

    python examples/distill.py

The teacher takes the place of the reference and the student that of the policy. The two may differ in everything but the
vocabulary. Written plainly this takes the logits of both models and their log-softmaxes, tokens × vocabulary each; here a chunk
of `max_chunk_bytes` exists at a time.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fused_tdpo import LMHead, linear_token_stats
from fused_tdpo.heads import backbone


def model_of(width: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    teacher = model_of(width=128, layers=2).to(device).eval().requires_grad_(False)
    teacher.lm_head.weight.mul_(8)  # random weights make nearly uniform distributions, with nothing to learn
    student = model_of(width=48, layers=1).to(device).train()
    teacher_head, student_head = LMHead.from_model(teacher), LMHead.from_model(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)

    for step in range(1, args.steps + 1):
        ids = torch.randint(64, (8, 32), device=device)
        labels = ids.roll(-1, 1)  # aligned: labels[i] is what position i predicts; here they only say which rows count
        labels[:, -1] = -100
        with torch.no_grad():
            teacher_hidden = backbone(teacher)(ids, use_cache=False).last_hidden_state
        hidden = backbone(student)(ids, use_cache=False).last_hidden_state
        stats = linear_token_stats(hidden, student_head, teacher_hidden, teacher_head, labels, max_chunk_bytes=2**22)
        loss = stats.kl.sum() / (labels != -100).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == 1:
            print(f"step {step:>3}  KL(teacher || student) {loss.item():.3f} nats a token")


if __name__ == "__main__":
    main()
