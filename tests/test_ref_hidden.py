"""Training with the reference's hidden states from disk, next to training with the reference itself.

In batches of the same pairs, in the same order, every bit agrees. In others the reference's products have other shapes, and
their last bits may differ: that is what a shuffled run is allowed.
"""

import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
import safetensors.torch as safetensors_torch  # noqa: E402

from fused_tdpo.integrations import ref_hidden  # noqa: E402  (needs transformers, as those below)
from fused_tdpo.integrations.data import PreferenceCollator  # noqa: E402
from naive_trainer import Objective  # noqa: E402
from test_trainers import (  # noqa: E402
    ARGUMENTS,
    METRICS,
    MODULES,
    ROWS,
    Build,
    assert_same_logs,
    assert_same_run,
    eval_logs,
    run,
    weights_of,
)
from tiny_models import D, completion_tokens, id_rows, lora, lora_config, nearby, text_rows, tiny_model  # noqa: E402

EVAL_ROWS = text_rows(6, seed=3)
IN_ORDER = {"train_sampling_strategy": "sequential"}
SMALL = 4 * D * 80
"""Bytes of some six pairs: a batch of four, but not two, or three of two."""


pytestmark = pytest.mark.usefixtures("one_thread", "few_objects_to_collect")


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return Build(tmp_path)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ref_hidden, "SHARD_BYTES", SMALL)


def arguments_of(module: str, adapters: bool) -> dict[str, Any]:
    """Models and options for `Build.fused`."""
    model, options = tiny_model(), {}
    if adapters:
        pytest.importorskip("peft")
        if module == "trl":
            options = {"peft_config": lora_config()}
        else:
            model = lora(model)
    return {"model": model, "ref_model": None if adapters else nearby(tiny_model()), "options": options}


def fused(build: Build, module: str, adapters: bool = False, precompute: bool = True, **arguments: Any) -> Any:
    defaults = arguments_of(module, adapters) | {"objective": Objective(), "precompute_ref_hidden": precompute}
    return build.fused(module, **defaults | arguments)


def files(build: Build) -> list[Path]:
    return sorted(path for path in (build.folder / "fused" / "ref_hidden").rglob("*") if path.is_file())


def folders(build: Build) -> set[str]:
    return {path.parent.name for path in files(build)}


def states_of(dataset: ref_hidden.WithRefHidden) -> list[torch.Tensor]:
    return [torch.cat([row[name] for name in ref_hidden.FIELDS]) for row in (dataset[i] for i in range(len(dataset)))]


def assert_same_bits(build: Build, module: str, **arguments: Any) -> Any:
    """Of every loss, metric and weight, with the option and without; the trainer with it."""
    without = run(fused(build, module, precompute=False, **arguments))
    trainer = fused(build, module, **arguments)
    assert files(build)
    start = weights_of(trainer.model)
    found = run(trainer)
    assert [untimed(log) for log in trainer.state.log_history] == [untimed(log) for log in without.trainer.state.log_history]
    assert found.weights.keys() == without.weights.keys()
    assert all(torch.equal(found.weights[name], weight) for name, weight in without.weights.items())
    assert any(not torch.equal(found.weights[name], weight) for name, weight in start.items())
    return trainer


def untimed(log: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in log.items() if not name.endswith(("time", "per_second"))}


# ---------------------------------------------------------------------------------------------------------------- same losses


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["transformers", "transformers-packed", "trl"])
def test_same_bits_as_with_the_reference(build: Build, small_shards: None, kind: str, adapters: bool):
    """Step by step, with evaluations in between, of which the last batch is not full."""
    module, _, packed = kind.partition("-")
    pytest.importorskip(module)
    evaluation = {"eval_rows": EVAL_ROWS, "eval_strategy": "steps", "eval_steps": 2}
    more = {"packed": True} if packed else {}
    trainer = assert_same_bits(build, module, adapters=adapters, **evaluation, **more, **IN_ORDER)
    assert len(eval_logs(trainer)) == 2
    assert len(trainer.train_dataset.shards) > 2


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_shuffled(build: Build, small_shards: None, adapters: bool, packed: bool):
    """Two epochs, read in two workers: pairs meet other pairs than when the states were computed.

    Measured: logs within 1e-5 of those with the reference, weights within 1.3e-6 of their largest.
    """
    arguments = {"adapters": adapters, "packed": packed, "max_steps": 8}
    without = run(fused(build, "transformers", precompute=False, **arguments))
    found = run(fused(build, "transformers", dataloader_num_workers=2, **arguments))
    assert_same_run(found, without)


def test_workers_of_trl(build: Build, small_shards: None):
    pytest.importorskip("trl")
    arguments = {"eval_rows": EVAL_ROWS, "eval_strategy": "steps", "eval_steps": 4}
    alone, workers = (run(fused(build, "trl", dataloader_num_workers=n, **arguments)) for n in (0, 2))
    assert workers.logs == alone.logs
    assert all(torch.equal(workers.weights[name], weight) for name, weight in alone.weights.items())


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_bfloat16(module: str, build: Build, adapters: bool):
    """Autocast, which accelerate puts around a policy when training begins, but which its states were computed with before."""
    assert_same_bits(build, module, adapters=adapters, bf16=True, max_steps=2, **IN_ORDER)


def test_without_a_reference_it_is_the_start(build: Build):
    """Of which no copy is made, but of the head: tied here, and so trained."""
    trainer = assert_same_bits(build, "transformers", model=tiny_model("llama-tied"), ref_model=None, **IN_ORDER)
    assert abs(trainer.state.log_history[0]["kl/chosen"]) == 0.0
    assert trainer.ref_model is None
    assert all(weight.requires_grad for weight in trainer.model.parameters())
    assert not torch.equal(trainer.ref_head.weight, trainer.model.lm_head.weight)
    assert torch.equal(trainer.ref_head.weight, tiny_model("llama-tied").lm_head.weight)


def test_dropout_is_the_policys(build: Build):
    """It draws the same numbers: computing the states draws none, and has no dropout."""
    arguments = {"model": tiny_model("gpt2"), "ref_model": None, "disable_dropout": False, "max_steps": 2}
    assert_same_bits(build, "transformers", **arguments, **IN_ORDER)


def test_a_reference_of_another_size(build: Build):
    model = tiny_model("phi", seed=5, hidden_size=16)
    trainer = assert_same_bits(build, "transformers", ref_model=model, max_steps=2, **IN_ORDER)
    assert states_of(trainer.train_dataset)[0].shape[1] == 16


def test_resuming_training(module: str, build: Build):
    """From a checkpoint, by a new trainer, which finds the states of the first."""
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = run(fused(build, module, **arguments))
    before = {path: path.stat().st_mtime_ns for path in files(build)}
    resumed = run(fused(build, module, **arguments), resume_from_checkpoint=str(build.folder / "fused" / "checkpoint-2"))
    assert [log["loss"] for log in resumed.logs] == [log["loss"] for log in whole.logs]
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())
    assert {path: path.stat().st_mtime_ns for path in files(build)} == before


# ------------------------------------------------------------------------------------------------------ what is kept in memory


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_the_body_is_gone(module: str, build: Build, tied: bool):
    """Nothing of the reference is alive when training begins, but a copy of its head."""
    model = nearby(tiny_model("llama-tied" if tied else "llama"))
    expected = model.lm_head.weight.detach().clone()
    alive = [weakref.ref(model), *map(weakref.ref, model.parameters())]

    class Looks(transformers.TrainerCallback):
        found: list[int] = []  # noqa: RUF012

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.found.append(sum(reference() is not None for reference in alive))

    trainer = fused(build, module, ref_model=None, options={"ref_model": model, "callbacks": [Looks()]}, max_steps=2)
    del model
    assert trainer.ref_model is None
    assert torch.equal(trainer.ref_head.weight, expected)
    trainer.train()
    assert Looks.found == [0, 0]


def test_adapters_share_the_head_and_save_the_second_forward(module: str, build: Build):
    trainer = fused(build, module, adapters=True)
    calls: list[int] = []
    trainer.model.get_base_model().model.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert trainer.ref_head is None and trainer.ref_model is None
    assert len(calls) == ARGUMENTS["max_steps"]


# ------------------------------------------------------------------------------------------------------------------- the files


def test_what_is_written(module: str, build: Build, small_shards: None, caplog: pytest.LogCaptureFixture):
    """The states of the labels that count and nothing else, said before; each pair finds its own."""
    model = nearby(tiny_model())
    trainer = fused(build, module, ref_model=model, eval_rows=EVAL_ROWS)
    expected = 4 * D * completion_tokens(id_rows(ROWS + EVAL_ROWS))
    assert f"{expected:,} bytes" in caplog.text
    written = [safetensors_torch.load_file(path)["hidden"] for path in files(build)]
    assert sum(states.nbytes for states in written) == expected
    assert all(states.nbytes <= SMALL for states in written)
    for dataset, rows in ((trainer.train_dataset, ROWS), (trainer.eval_dataset, EVAL_ROWS)):
        assert len(dataset) == len(rows)
        for i, pair in enumerate(id_rows(rows)):
            row = dataset[i - len(rows) if i % 2 else i]
            for field, name in zip(("chosen_ids", "rejected_ids"), ref_hidden.FIELDS, strict=True):
                assert row[field] == pair[field]
                ids, n = torch.tensor([pair["prompt_ids"] + pair[field]]), len(pair[field])
                with torch.no_grad():
                    states = model.model(ids).last_hidden_state[0, -n - 1 : -1]
                assert row[name].shape == (n, D)
                assert (row[name] - states).abs().max() <= 1e-5 * states.abs().max()
    with pytest.raises(IndexError):
        trainer.train_dataset[len(ROWS)]


def test_finished_files_are_used_again(build: Build, monkeypatch: pytest.MonkeyPatch):
    """Without a forward, but the one that tells width and dtype."""
    first = states_of(fused(build, "transformers").train_dataset)
    model, calls = nearby(tiny_model()), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(safetensors_torch, "save_file", None)
    trainer = fused(build, "transformers", ref_model=None, options={"ref_model": model})
    assert all(map(torch.equal, states_of(trainer.train_dataset), first))
    assert len(calls) == 1 + 2  # the latter of LMHead.from_model


def test_an_interrupted_pass_goes_on(build: Build, small_shards: None, monkeypatch: pytest.MonkeyPatch):
    """Files are whole or absent; those that are there stay, and one that the end of a machine cut is made again."""
    save, saved = safetensors_torch.save_file, []

    def interrupted(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save(tensors, path)
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_torch, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fused(build, "transformers")
    there = files(build)
    assert len(there) == 3 and all(path.suffix == ".safetensors" for path in there)
    kept = {path: path.read_bytes() for path in there}
    times = {path: path.stat().st_mtime_ns for path in there[:2]}
    there[2].write_bytes(kept[there[2]][:-5])
    first = states_of(fused(build, "transformers").train_dataset)
    assert {path: path.stat().st_mtime_ns for path in there[:2]} == times
    assert all(path.read_bytes() == content for path, content in kept.items())
    shutil.rmtree(build.folder / "fused" / "ref_hidden")
    assert all(map(torch.equal, states_of(fused(build, "transformers").train_dataset), first))
    assert len(files(build)) > len(there)


@pytest.mark.parametrize("needed_is_free", [False, True])
def test_disk_space(build: Build, monkeypatch: pytest.MonkeyPatch, needed_is_free: bool):
    needed = 4 * D * completion_tokens(id_rows(ROWS + EVAL_ROWS))
    free = needed if needed_is_free else needed - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    if needed_is_free:
        fused(build, "transformers", eval_rows=EVAL_ROWS)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        fused(build, "transformers", eval_rows=EVAL_ROWS)  # all is there
        return
    with pytest.raises(ValueError, match=rf"(?s){needed:,} bytes.*{free:,} bytes.*ref_hidden_dir"):
        fused(build, "transformers", eval_rows=EVAL_ROWS)
    assert not files(build)


@pytest.mark.parametrize("disable", [False, True])
def test_progress(build: Build, capfd: pytest.CaptureFixture[str], disable: bool):
    fused(build, "transformers", disable_tqdm=disable)
    bars = capfd.readouterr().err
    assert ("reference's hidden states: 100%" in bars, "%|" in bars) == (not disable, not disable)


def test_another_folder(build: Build):
    fused(build, "transformers", ref_hidden_dir=str(build.folder / "elsewhere"))
    assert not files(build)
    assert [path.name for path in (build.folder / "elsewhere").rglob("*.safetensors")] == ["00000000-00000015.safetensors"]


def moved_bias() -> Any:
    model = nearby(tiny_model())
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    return model


def other_config() -> Any:
    model = nearby(tiny_model())
    model.config.rms_norm_eps *= 2
    return model


CHANGES: dict[str, Any] = {
    "weight": lambda: {"ref_model": moved_bias()},
    "config": lambda: {"ref_model": other_config()},
    "dtype": lambda: {"model": tiny_model().bfloat16(), "ref_model": nearby(tiny_model()).bfloat16()},
    "autocast": lambda: {"bf16": True},
    "order": lambda: {"rows": ROWS[::-1]},
    "token": lambda: {"rows": [ROWS[0] | {"chosen": ROWS[0]["chosen"][:-1] + "z"}, *ROWS[1:]]},
    "prompt": lambda: {"rows": [ROWS[0] | {"prompt": "z" + ROWS[0]["prompt"][1:]}, *ROWS[1:]]},
    "max_length": lambda: {"max_length": 12},
    "fewer": lambda: {"rows": ROWS[:-1]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_models_and_data_have_folders_of_their_own(build: Build, change: str):
    fused(build, "transformers")
    first = folders(build)
    fused(build, "transformers", **CHANGES[change]())
    assert len(folders(build) - first) == 1


def test_a_trained_adapter_has_the_same_reference(build: Build):
    """Its base model is what it was; with another base it is not."""
    pytest.importorskip("peft")
    trainer = fused(build, "transformers", adapters=True)
    first = folders(build)
    trainer.train()
    fused(build, "transformers", model=trainer.model, ref_model=None)
    assert folders(build) == first
    fused(build, "transformers", model=lora(nearby(tiny_model())), ref_model=None)
    assert len(folders(build)) == 2


def test_the_adapter_that_trl_keeps_as_reference(build: Build):
    """Of a PEFT model that TRL is given: its adapters are the reference's, and count."""
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    arguments = {"ref_model": None, "max_steps": 2, **IN_ORDER}
    assert_same_bits(build, "trl", model=lora(tiny_model()), **arguments)
    first = folders(build)
    fused(build, "trl", model=lora(tiny_model()), **arguments)
    assert folders(build) == first
    for number, other in enumerate((lora(tiny_model(), seed=9), lora(tiny_model(), lora_alpha=9)), 1):
        fused(build, "trl", model=other, **arguments)
        assert len(folders(build) - first) == number


# -------------------------------------------------------------------------------------------------------- evaluation, refusals


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_evaluation_of_several_datasets(module: str, build: Build, adapters: bool):
    data = {name: build.data(module, None, rows)["eval_dataset"] for name, rows in (("a", EVAL_ROWS), ("b", EVAL_ROWS[:3]))}
    options = arguments_of(module, adapters)["options"] | {"eval_dataset": data}
    with_option, without = (
        fused(build, module, adapters=adapters, options=dict(options), precompute=precompute).evaluate()
        for precompute in (True, False)
    )
    assert {"eval_a_loss", "eval_b_loss", "eval_b_kl/chosen"} <= with_option.keys()
    assert untimed(with_option) == untimed(without)


def test_evaluation_of_other_rows(module: str, build: Build):
    """The body is gone that they would need; with adapters it is there."""
    rows = build.data(module, None, EVAL_ROWS)["eval_dataset"]
    trainer = fused(build, module)
    with pytest.raises(ValueError, match=r"precompute_ref_hidden(?s:.)*eval_dataset"):
        trainer.evaluate(rows)
    pytest.importorskip("peft")
    losses = [fused(build, module, adapters=True, precompute=on).evaluate(rows)["eval_loss"] for on in (True, False)]
    assert losses[0] == losses[1]


def test_a_collator_that_is_changed_later(build: Build):
    trainer = fused(build, "transformers")
    trainer.data_collator.collator.max_length = 8
    with pytest.raises(ValueError, match=r"labels count(?s:.)*hidden states(?s:.)*collator"):
        trainer.train()


def test_a_reference_that_changes_is_refused(build: Build):
    pytest.importorskip("trl")
    with pytest.raises(ValueError, match=r"precompute_ref_hidden(?s:.)*sync_ref_model"):
        fused(build, "trl", sync_ref_model=True)


@pytest.mark.parametrize("more", [{"bias": "all"}, {"bias": "lora_only"}], ids=str)
def test_adapters_that_leave_another_base_are_refused(build: Build, more: dict[str, Any]):
    """Trained biases stay on when adapters are off: that reference moves."""
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"precompute_ref_hidden(?s:.)*bias(?s:.)*ref_model"):
        fused(build, "transformers", model=lora(tiny_model(attention_bias=True), **more), ref_model=None)


@pytest.mark.parametrize("more", [{"modules_to_save": ["embed_tokens"]}, {"use_dora": True}], ids=["embedding", "dora"])
def test_what_else_adapters_train(build: Build, more: dict[str, Any]):
    pytest.importorskip("peft")
    assert_same_bits(build, "transformers", model=lora(tiny_model(), **more), ref_model=None, max_steps=2, **IN_ORDER)


def test_streams_are_refused(build: Build):
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list(id_rows(ROWS)).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"precompute_ref_hidden(?s:.)*IterableDataset"):
        fused(build, "transformers", options={"train_dataset": stream})


def test_states_are_not_pushed_to_a_hub(build: Build):
    trainer = SimpleNamespace(args=fused(build, "transformers", precompute=False).args, is_fsdp_enabled=False)
    trainer.is_deepspeed_enabled, trainer.args.push_to_hub = False, True
    trainer.train_dataset = trainer.eval_dataset = None
    with pytest.raises(ValueError, match=r"push_to_hub(?s:.)*ref_hidden_dir"):
        ref_hidden.precompute_ref_hidden(trainer)


@pytest.mark.parametrize("sharded", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_models_are_refused(build: Build, sharded: str):
    trainer = SimpleNamespace(
        **{"is_fsdp_enabled": False, "is_deepspeed_enabled": False, "eval_dataset": None} | {sharded: True},
        args=fused(build, "transformers", precompute=False).args,
    )
    with pytest.raises(ValueError, match=r"precompute_ref_hidden(?s:.)*DDP"):
        ref_hidden.precompute_ref_hidden(trainer)


# ------------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_states_return_to_their_places(packed: bool):
    """Also of an empty prompt, whose first token nothing predicts, and of an answer that leaves nothing to predict."""
    rows = [
        {"prompt_ids": [], "chosen_ids": [1], "rejected_ids": [2, 3, 4]},
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [9]},
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
    ]
    batch = PreferenceCollator(packed=packed)(rows)
    n = sum(batch["valid_rows"])
    states = torch.arange(1.0, n + 1)[:, None].expand(n, 2)
    got = ref_hidden.spread(states, batch["labels"], batch.get("cu_seqlens"), -100)
    expected, number = torch.zeros(*batch["labels"].shape, 2), 0
    for row, labels in enumerate(batch["labels"]):
        starts = batch["cu_seqlens"] if packed else [0]
        for t in range(1, len(labels)):
            if labels[t] != -100 and t not in starts:
                number += 1
                expected[row, t - 1] = number
    assert number == n
    assert torch.equal(got, expected)


def test_no_label_counts():
    got = ref_hidden.spread(torch.zeros(0, 3), torch.full((2, 4), -100), None, -100)
    assert torch.equal(got, torch.zeros(2, 4, 3))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_spreading_does_not_wait_for_the_device(packed: bool):
    """Tensors without values serve: nothing depends on them on the host."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        labels, cu_seqlens = torch.empty(1 if packed else 4, 9, dtype=torch.long), torch.empty(5, dtype=torch.long)
        got = ref_hidden.spread(torch.empty(7, 3), labels, cu_seqlens if packed else None, -100)
    assert got.shape == (*labels.shape, 3)


# ------------------------------------------------------------------------------------------------------------ two processes


@pytest.mark.slow
def test_two_processes_share_the_work(build: Build, small_shards: None, tmp_path: Path):
    """Each computes its share, and both read all; a folder that they do not share is told. Run as a program below."""
    here = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    alone = fused(build, "transformers", eval_rows=EVAL_ROWS, per_device_train_batch_size=2)
    names = {(path.parent.name, path.name) for path in files(build)}
    assert first["wrote"] | second["wrote"] == names
    assert not first["wrote"] & second["wrote"]
    assert len(first["wrote"]) >= len(second["wrote"]) >= len(names) // 2 > 1
    for found in (first, second):
        assert all(map(torch.equal, found["states"], states_of(alone.train_dataset)))
        assert "all of them share" in found["error"]
    alone = run(fused(build, "transformers"))
    assert_same_logs(first["logs"], alone.logs, METRICS | {"loss"})


def worker(folder: Path) -> None:
    torch.set_num_threads(1)
    ref_hidden.SHARD_BYTES, ref_hidden.PATIENCE = SMALL, 1.0
    rank, save, wrote = int(os.environ["RANK"]), safetensors_torch.save_file, set()

    def recorded(tensors: dict[str, torch.Tensor], path: Path) -> None:
        wrote.add((path.parent.name, path.name.partition(".safetensors")[0] + ".safetensors"))
        save(tensors, path)

    safetensors_torch.save_file = recorded
    build = Build(folder)
    arguments = {"ddp_backend": "gloo", "per_device_train_batch_size": 2, "eval_rows": EVAL_ROWS}
    trainer = fused(build, "transformers", **arguments)
    found: dict[str, Any] = {"wrote": set(wrote), "states": states_of(trainer.train_dataset), "logs": run(trainer).logs}
    try:
        fused(build, "transformers", ref_hidden_dir=str(folder / f"own {rank}"), **arguments)
    except ValueError as error:
        found["error"] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
