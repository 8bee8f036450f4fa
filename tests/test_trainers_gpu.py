"""The plain trainer on a GPU: the losses that it has on a CPU, and metrics that do not wait for the device."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fused_tdpo.integrations.transformers import TDPOConfig, TDPOTrainer
from tiny_models import id_rows, lora_config, text_rows, tiny_model

pytestmark = pytest.mark.gpu

ROWS = id_rows(text_rows(16))


def trained(folder: Path, adapters: bool = False, **options: Any) -> TDPOTrainer:
    args = TDPOConfig(
        str(folder), max_steps=4, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-3, report_to="none",
        save_strategy="no", disable_tqdm=True, eval_strategy="steps", eval_steps=4, **options,
    )  # fmt: skip
    trainer = TDPOTrainer(
        tiny_model(), args=args, train_dataset=ROWS, eval_dataset=ROWS[:8], peft_config=lora_config() if adapters else None
    )
    trainer.train()
    return trainer


def logged(trainer: TDPOTrainer, name: str) -> torch.Tensor:
    return torch.tensor([entry[name] for entry in trainer.state.log_history if name in entry])


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_losses_are_those_of_a_cpu(tmp_path: Path, bf16: bool, packed: bool, adapters: bool):
    if adapters:
        pytest.importorskip("peft")
    gpu = trained(tmp_path, adapters, bf16=bf16, packed=packed)
    cpu = trained(tmp_path, adapters, use_cpu=True)
    assert next(gpu.model.parameters()).is_cuda
    limit = 3e-2 if bf16 else 1e-3
    for name in ("loss", "kl/rejected", "logps/chosen", "entropy", "eval_loss", "eval_kl/chosen"):
        got, expected = logged(gpu, name), logged(cpu, name)
        assert len(got) == len(expected) > 0
        assert ((got - expected).abs() <= limit * (1 + expected.abs())).all(), (name, got, expected)


def test_metrics_do_not_wait_for_the_gpu(tmp_path: Path):
    trainer = trained(tmp_path)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    out = trainer.preference_output(trainer.model, batch)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.record(out, batch)
    finally:
        torch.cuda.set_sync_debug_mode(before)
