"""Two processes with half of each batch are one process with all of it: losses, gradients, metrics and weights.

The processes talk over gloo, on a CPU. They run all cases in one start, as `tests/test_trainers_distributed.py FILE` under
torchrun; the tests compare what FILE then holds with runs of their own.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("transformers")

from naive_trainer import Objective
from test_trainers import METRICS, Build, Run, assert_same_logs, assert_same_run, eval_logs, run
from tiny_models import lora, lora_config, nearby, text_rows, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
HERE = Path(__file__).parent
PAIRS = 8


class Case(NamedTuple):
    module: str
    adapters: bool = False
    accumulate: int = 1
    variant: str = "tdpo2"
    arguments: dict[str, Any] = {}  # noqa: RUF012  (read only)


def reentrant(yes: bool) -> dict[str, Any]:
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": yes}}


CASES = {
    f"{module}-{name}": case
    for module in ("transformers", "trl")
    for name, case in {
        "full": Case(module),
        "full-tdpo1": Case(module, variant="tdpo1"),
        "lora": Case(module, adapters=True),
        "accumulated": Case(module, accumulate=2),
        "recompute": Case(module, arguments={"engine": "recompute"}),
        "checkpointed": Case(module, arguments=reentrant(False)),
        "checkpointed-lora": Case(module, adapters=True, arguments=reentrant(False)),
    }.items()
} | {"transformers-packed": Case("transformers", arguments={"packed": True})}


def train(case: Case, processes: int, folder: Path) -> Run:
    """With batches of `PAIRS` pairs over all processes and accumulated steps."""
    model = tiny_model("llama-tied" if case.variant == "tdpo1" else "llama")
    ref_model, options = nearby(model), {}
    if case.adapters:
        ref_model = None
        if case.module == "trl":
            options = {"peft_config": lora_config()}
        else:
            model = lora(model)
    trainer = Build(folder).fused(
        case.module,
        model,
        ref_model,
        Objective(case.variant),
        eval_rows=text_rows(PAIRS, seed=3),
        options=options,
        max_steps=3,
        per_device_train_batch_size=PAIRS // processes // (case.accumulate if processes > 1 else 1),
        per_device_eval_batch_size=PAIRS // processes,
        gradient_accumulation_steps=case.accumulate if processes > 1 else 1,
        eval_strategy="steps",
        eval_steps=3,
        ddp_backend="gloo" if processes > 1 else None,
        rows=text_rows(2 * PAIRS),
        **case.arguments,
    )
    return run(trainer)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Case -> what its processes found: logs, evaluation's logs and weights, or the error."""
    file = tmp_path_factory.mktemp("two") / "runs.pt"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, __file__, str(file)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")
def test_two_processes_are_one(name: str, two_processes: dict[str, Any], tmp_path: Path):
    case = CASES[name]
    pytest.importorskip(case.module)
    if case.adapters:
        pytest.importorskip("peft")
    found = two_processes[name]
    assert not isinstance(found, str), found
    logs, evaluations, weights, world_size = found
    assert world_size == 2
    alone = train(case, 1, tmp_path)
    assert_same_run(Run(None, logs, weights), alone)
    assert_same_logs(evaluations, eval_logs(alone.trainer), METRICS | {"loss"}, "eval_")
    assert alone.logs[-1]["kl/chosen"] > 1e-4  # else nothing has moved


def worker(file: str) -> None:
    """Runs all cases in this process of several."""
    import importlib.util
    import tempfile
    import traceback

    torch.set_num_threads(1)
    gc.freeze()  # a trainer collects garbage when training begins
    runs: dict[str, Any] = {}
    for name, case in CASES.items():
        if importlib.util.find_spec(case.module) is None or (case.adapters and importlib.util.find_spec("peft") is None):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                two = train(case, 2, Path(folder))
                weights = {weight_name.removeprefix("module."): weight for weight_name, weight in two.weights.items()}
                runs[name] = two.logs, eval_logs(two.trainer), weights, two.trainer.args.world_size
            except Exception:  # both processes see it, or the launcher ends them: the test reports it
                runs[name] = traceback.format_exc()
    if int(os.environ["RANK"]) == 0:
        torch.save(runs, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    worker(sys.argv[1])
