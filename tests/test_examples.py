"""The examples run, and what they train gets better."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]


def run(name: str, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def column(text: str, name: str) -> list[float]:
    """The numbers behind a name, one a line."""
    return [float(number) for number in re.findall(rf"{re.escape(name)} (-?[\d.]+)", text)]


def test_plain_loop():
    output = run("plain_loop.py", "--steps", "20")
    losses, accuracies = column(output, "loss"), column(output, "rewards/accuracies")
    assert losses[0] == 0.6931 and losses[-1] < 0.5
    assert accuracies[-1] == 1.0
    assert column(output, "kl/chosen")[0] == 0 < column(output, "kl/chosen")[-1]


def test_ti_dpo():
    output = run("ti_dpo.py", "--steps", "30")
    losses, triplets, margins = column(output, "loss"), column(output, "triplet"), column(output, "rewards/margins")
    assert (losses[0], triplets[0], margins[0]) == (0.6941, 0.01, 0.0)  # log 2 and a tenth of the margin of the triplet
    assert losses[-1] < 0.6 and margins[-1] > 0.2 and column(output, "rewards/accuracies")[-1] == 1.0


def test_kto():
    output = run("kto.py", "--steps", "30")
    losses, good, bad = (column(output, name) for name in ("loss", "rewards/chosen", "rewards/rejected"))
    assert (losses[0], good[0], bad[0]) == (0.6667, 0.0, 0.0)  # 5 of 15 answers weigh 2, and each loses half its weight
    assert losses[-1] < 0.6 and good[-1] > 0.2 > -0.2 > bad[-1]


def test_distill():
    kl = column(run("distill.py", "--steps", "40"), "student)")
    assert len(kl) == 3 and kl[-1] < 0.9 * kl[0]


@pytest.mark.slow
def test_trl(tmp_path: Path):
    pytest.importorskip("trl")
    from tiny_models import byte_tokenizer, tiny_model

    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        rows = [{"prompt": f"say {i} ", "chosen": "yes " * (1 + i % 3), "rejected": "no " * (1 + i % 2)} for i in range(8)]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = run(
        "trl_tdpo.py", "--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(tmp_path / "out"),
        "--bf16", "False", "--use_cpu", "True", "--max_steps", "3", "--eval_strategy", "steps", "--eval_steps", "3",
        "--learning_rate", "1e-3", "--tdpo_alpha", "0.7", "--report_to", "none", "--per_device_train_batch_size", "4",
        "--use_peft", "--lora_target_modules", "all-linear",
    )  # fmt: skip
    assert "eval_kl/margin" in output
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
