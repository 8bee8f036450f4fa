"""Running a loss inside a model's own forward: what the model keeps, and what wrappers around it see."""

import copy
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fused_tdpo import LMHead  # noqa: E402
from fused_tdpo.integrations._steps import accept_steps, current_head, hidden_states, through_head  # noqa: E402

IDS = torch.tensor([[3, 1, 4, 1, 5]])


def tiny() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=19, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, eos_token_id=None
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_a_step_takes_the_place_of_forward():
    model, seen = tiny(), []
    plain = model(IDS).logits
    accept_steps(model)
    result = model(
        input_ids=IDS, attention_mask=None, preference_step=lambda m, inputs: seen.append((m, inputs)) or m.lm_head.weight
    )
    assert result is model.lm_head.weight
    assert seen[0][0] is model and seen[0][1].keys() == {"input_ids"}, "arguments that are None are not the model's business"
    assert torch.equal(model(IDS).logits, plain)
    assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False)[:, :5], IDS)


def test_the_signature_stays():
    """`generate` refuses arguments that it does not find there, and a Trainer drops columns."""
    model = tiny()
    before = inspect.signature(model.forward)
    accept_steps(model)
    assert inspect.signature(model.forward) == before
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(IDS, max_new_tokens=1, nonsense=1)


def test_a_copy_calls_itself():
    model = tiny()
    accept_steps(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert other(IDS).logits.abs().sum() > 0
    assert other(input_ids=IDS, preference_step=lambda m, inputs: m) is other


def test_twice_is_once():
    model = tiny()
    accept_steps(model)
    forward = model.forward
    accept_steps(model)
    assert model.forward == forward


def test_hooks_of_the_head_see_the_loss_and_its_forward_comes_back():
    model, calls = tiny(), []
    hidden = hidden_states(model, {"input_ids": IDS})
    handle = model.lm_head.register_forward_hook(lambda module, args, result: calls.append(result))
    assert through_head(model, hidden, lambda h: h.sum()) == hidden.sum()
    assert torch.equal(calls[0], hidden.sum())
    handle.remove()

    def fails(h: torch.Tensor) -> torch.Tensor:
        raise KeyError("in the loss")

    with pytest.raises(KeyError, match="in the loss"):
        through_head(model, hidden, fails)
    assert torch.equal(model.lm_head(hidden), model(IDS).logits)


def test_the_head_follows_its_module():
    model = tiny()
    head = LMHead.from_model(model)
    model.lm_head.weight = torch.nn.Parameter(torch.ones_like(head.weight))
    assert current_head(head, model).weight is model.lm_head.weight


def test_a_head_without_storage_is_refused():
    model = tiny()
    head = LMHead.from_model(model)
    model.lm_head.weight.data.untyped_storage().resize_(0)  # as FSDP and ZeRO-3 leave what they have sharded
    with pytest.raises(ValueError, match="must be whole"):
        current_head(head, model)


FSDP2 = """
import copy, torch, torch.distributed as dist
from contextlib import nullcontext
from types import SimpleNamespace
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from fused_tdpo import LinearTDPOLoss, LMHead
from fused_tdpo.integrations._steps import accept_steps
from fused_tdpo.integrations._trainer import PreferenceTrainerMixin

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))

def trainer(policy, reference):
    made = PreferenceTrainerMixin()
    made.model, made.ref_model, made.loss = policy, reference, LinearTDPOLoss(0.5)
    made.policy_head, made.ref_head = LMHead.from_model(policy), LMHead.from_model(reference)
    made.accelerator = SimpleNamespace(autocast=nullcontext)
    accept_steps(policy)
    accept_steps(reference)
    return made

def compare(tied, head_alone, both):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         tie_word_embeddings=tied)
    models = LlamaForCausalLM(config), LlamaForCausalLM(config)
    whole, sharded = trainer(*copy.deepcopy(models)), trainer(*models)
    for model in models if both else models[:1]:
        for module in (*model.model.layers, *([model.lm_head] if head_alone else []), model):
            fully_shard(module, mesh=mesh)
    ids = torch.randint(97, (4, 8))
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(8) < 3, -100)}
    losses = []
    for one in (whole, sharded):
        loss = one.preference_output(one.model, batch).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses), losses
    for (name, mine), theirs in zip(models[0].named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine.grad.full_tensor(), theirs.grad), (tied, head_alone, both, name)

for case in ((False, False, False), (False, False, True), (False, True, True), (True, False, True)):
    compare(*case)
dist.barrier()  # neither leaves while the other still talks to it
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_fsdp2_in_two_processes_gives_the_bits_of_one(tmp_path: Path):
    """Tied or not, with a shard of its own for the head or not, the reference sharded or not; one batch in both."""
    script = tmp_path / "fsdp2.py"
    script.write_text(FSDP2)
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "TRITON_INTERPRET": "0"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[:6000]
