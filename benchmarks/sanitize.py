"""Every route from hidden states, on shapes small enough for a tool that watches each access. Needs a GPU.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python3 benchmarks/sanitize.py

Without torch's cache an access beyond a tensor is one beyond an allocation. Rows are odd and even, wide and narrow; chunks make
pairs long, or hold them whole; heads are plain and capped; logits are in the dtype of the products and in float32.
"""

from itertools import product

import torch

from fused_tdpo import LinearTDPOLoss, LMHead

ROUTES = product((1003, 4096), (torch.bfloat16, torch.float32), ("one_pass", "recompute"), (7, 1000), (None, 20.0))


def main() -> None:
    for V, dtype, engine, rows, softcap in ROUTES:
        like = {"device": "cuda", "dtype": dtype}
        hidden, weight = torch.randn(4, 20, 64, **like).requires_grad_(), torch.randn(V, 64, **like).requires_grad_()
        bias = torch.randn(V, **like).requires_grad_()
        labels = torch.randint(V, (4, 20), device="cuda")
        labels[:, :5] = -100
        logits_dtype = torch.float32 if rows == 7 else None
        loss = LinearTDPOLoss(engine=engine, max_chunk_bytes=rows * V * 8, logits_dtype=logits_dtype)
        head, ref_head = LMHead(weight, bias, softcap=softcap), LMHead(torch.randn(V, 64, **like))
        loss(hidden, head, torch.randn(4, 20, 64, **like), ref_head, labels).loss.backward()
    torch.cuda.synchronize()
    print("all routes ran")


if __name__ == "__main__":
    main()
