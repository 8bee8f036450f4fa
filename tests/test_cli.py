"""The command line: what its tables say, its exit codes, and that `check` finds a kernel that is wrong."""

import json
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

import typer
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import fused_tdpo
from fused_tdpo import _torch_backend
from fused_tdpo._projection import HeadSums, Projection
from fused_tdpo.cli import check, plan
from fused_tdpo.cli._app import app
from fused_tdpo.cli._console import parse_size
from fused_tdpo.cli._measure import as_bytes

NUMBERS = ("--vocab", "151936", "--hidden", "4096", "--layers", "36", "--memory", "141GiB")
TINY = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


def run(*arguments: object, code: int = 0) -> str:
    """stdout and stderr of a command that must end with this exit code, and without a traceback."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    output = result.output
    assert result.exit_code == code, output + repr(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return " ".join(output.replace("│", " ").split())


def in_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The directory of a tiny model, with weights."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------------------------------- the program


def test_help_names_the_commands_and_loads_nothing_heavy():
    code = (
        "import sys, fused_tdpo.cli; assert 'typer' not in sys.modules; sys.argv = ['fused-tdpo', '--help']\n"
        "try: fused_tdpo.cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'transformers', 'trl', 'matplotlib', 'peft', 'datasets', 'triton', 'fused_tdpo.cli.demo'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    result = in_python(code)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in ("plan", "check", "demo"))


def test_version():
    assert run("--version") == fused_tdpo.__version__
    result = subprocess.run([sys.executable, "-m", "fused_tdpo", "--version"], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == fused_tdpo.__version__ and not result.returncode


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        ("typer", "cli", ("--help",)),
        ("rich", "cli", ("--help",)),
        ("transformers", "cli", ("plan", ".")),
        ("matplotlib", "demo", ("demo",)),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(package, extra, arguments):
    code = (
        "import sys, types; sys.modules[sys.argv.pop(1)] = None\n"
        "demo = sys.modules['fused_tdpo.cli.demo'] = types.ModuleType('demo')\n"
        "def run(): import matplotlib\n"
        "demo.demo = run\n"
        "from fused_tdpo.cli import main; main()"
    )
    result = in_python(code, package, *arguments)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"{package} is not installed" in result.stderr and f"pip install 'fused-tdpo[{extra}]'" in result.stderr


def test_what_we_did_not_foresee_is_not_hidden():
    result = in_python("import sys; sys.modules['torch'] = None; from fused_tdpo.cli import main; main()")
    assert result.returncode == 1 and "ModuleNotFoundError" in result.stderr


def test_demo_is_loaded_when_it_runs(monkeypatch):
    module = types.ModuleType("demo")

    def demo(steps: int = 1) -> None:
        """A demonstration."""
        typer.echo(f"{steps} steps")

    module.demo = demo
    monkeypatch.setitem(sys.modules, "fused_tdpo.cli.demo", module)
    assert run("demo", "--steps", 3) == "3 steps"
    assert "A demonstration." in (text := run("demo", "--help")) and "--steps" in text
    assert "Error" in run("demo", "--step", "x", code=2)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GiB", 80 * 2**30),
        ("80g", 80 * 2**30),
        ("1.5 MiB", 1.5 * 2**20),
        ("80GB", 80e9),
        ("512", 512),
        ("1e9", 1e9),
        ("3KB", 3e3),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "80GiBB", "80 apples", "nan", "1e9e9", "1e400"])
def test_what_is_no_size(text):
    with pytest.raises(typer.BadParameter, match="80GiB"):
        parse_size(text)


# ------------------------------------------------------------------------------------------------------------------------ plan


def test_plan_shows_every_way():
    text = run("plan", *NUMBERS, "-T", 8192)
    work = plan.Workload(V=151_936, D=4096, T=8192)
    for way in plan.WAYS.values():
        assert f"{way.label} " in text and as_bytes(way.peak(work).total) in text
    for part in ("1 pair of 2 × 8,192 positions", "8,192 in all count", "V 151,936, D 4,096, bf16, head trained", "29.3 GiB"):
        assert part in text
    assert "T = 8,192 fits with max_chunk_bytes left alone" in text


def test_plan_in_json():
    options = ("-T", 512, "-P", 3, "--dtype", "fp32", "--share", 0.25, "--max-chunk-bytes", "256MiB", "--other-bytes", "100GiB")
    found = json.loads(CliRunner().invoke(app, ["plan", *NUMBERS, *map(str, options), "--json"]).stdout)
    work = plan.Workload(151_936, 4096, 512, 3, torch.float32, True, 0.25, 2**28)
    assert found["workload"] == vars(work) | {"dtype": "fp32", "N": work.N} and found["memory_bytes"] == 141 * 2**30
    assert found["ways"].keys() == plan.WAYS.keys()
    others = plan.Others({"": 100 * 2.0**30}, {})
    for name, way in plan.WAYS.items():
        peak = way.peak(work)
        assert found["ways"][name] == peak._asdict() | {
            "total": peak.total, "longest": plan.longest(way.peak, work, others, 141 * 2**30),
        }  # fmt: skip
    assert found["other_bytes"]["total"] == 100 * 2**30
    assert found["advice"]["max_chunk_bytes"] == 2**28 and found["advice"]["longest"] == found["ways"]["ours"]["longest"]


def test_plan_advises_a_smaller_chunk_where_that_helps():
    options = ("plan", "--vocab", 151_936, "--hidden", 896, "--memory", "12GiB", "--frozen-head", "--other-bytes")
    text = run(*options, "11.3GiB")
    assert "T = 4,096 fits with max_chunk_bytes left alone" in text and "Smaller chunks reach farther" in text
    text = run(*options, "11.5GiB")
    assert "T = 4,096 fits with max_chunk_bytes=311164928 (297 MiB)" in text  # 512 rows of 2 models of 151,936 bf16 numbers


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("what", ["directory", "config.json"])
def test_plan_reads_a_model(what, frozen, llama):
    source = llama if what == "directory" else llama / "config.json"
    output = CliRunner().invoke(app, ["plan", str(source), "--memory", "1GiB", "--json", *["--frozen-head"] * frozen]).stdout
    found = json.loads(output)
    assert (found["workload"]["V"], found["workload"]["D"], found["workload"]["trained"]) == (500, 32, not frozen)
    parameters = sum(parameter.numel() for parameter in LlamaForCausalLM(LlamaConfig(**TINY)).parameters())
    fixed, per_position = found["other_bytes"]["fixed"], found["other_bytes"]["per_position"]
    weights = next(size for words, size in fixed.items() if "weights" in words)
    assert weights == (1 if frozen else 2) * 2 * parameters and len(fixed) == (2 if frozen else 4)
    assert per_position["inputs of 3 checkpointed layers"] == 3 * 2 * 32


def test_plan_for_this_cpu(monkeypatch):
    monkeypatch.setattr(plan, "available_bytes", lambda: 3 * 2.0**30)
    found = json.loads(CliRunner().invoke(app, ["plan", *NUMBERS[:6], "--cpu", "--other-bytes", "0", "--json"]).stdout)
    assert found["memory_bytes"] == 3 * 2**30 and not found["workload"]["on_gpu"]
    monkeypatch.setattr(plan, "available_bytes", lambda: float("inf"))
    assert "pass --memory" in run("plan", *NUMBERS[:6], "--cpu", code=2)


@pytest.mark.parametrize(
    ("arguments", "next_step"),
    [
        ((), "--vocab 151936 --hidden 4096"),
        (("--vocab", "100"), "both --vocab and --hidden"),
        (("model", "--vocab", "100", "--hidden", "8"), "leave out --vocab"),
        (("model", "--layers", "3"), "leave out --vocab"),
        (("--vocab", "100", "--hidden", "8"), "--other-bytes 40GiB"),
        (("--vocab", "0", "--hidden", "8"), "--vocab"),
        ((*NUMBERS, "--dtype", "int8"), "bf16, fp16, fp32"),
        ((*NUMBERS, "--share", "1.5"), "--share"),
        ((*NUMBERS, "--share", "0"), "--share"),
        ((*NUMBERS, "-T", "1"), "-T"),
        ((*NUMBERS, "-P", "0"), "-P"),
        ((*NUMBERS, "--memory", "much"), "80GiB"),
        ((*NUMBERS, "--max-chunk-bytes", "-3"), "--max-chunk-bytes"),
        (("./nowhere", "--memory", "8GiB"), "its config.json, or its id on the hub"),
        (("a/b/c", "--memory", "8GiB"), "no such file or directory: 'a/b/c'"),
    ],
    ids=str,
)
def test_plan_refuses(arguments, next_step):
    assert next_step in run("plan", *arguments, code=2)


def test_plan_refuses_what_is_no_model(tmp_path):
    for config in ("{}", '{"model_type": "llama", "hidden_size": "large"}', '{"model_type": "clip"}', "no JSON"):
        (tmp_path / "config.json").write_text(config)
        assert "Give --vocab, --hidden and --layers instead" in run("plan", tmp_path, "--memory", "8GiB", code=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_plan_without_a_gpu_asks_for_memory():
    text = run("plan", *NUMBERS[:6], code=2)
    assert "--memory 80GiB" in text and "--cpu" in text


# ----------------------------------------------------------------------------------------------------------------------- check

CHECK = ("check", "--device", "cpu", "--no-speed")


def test_check_passes():
    text = run(*CHECK)
    assert "All 26 checks passed on cpu." in text and "WRONG" not in text
    for part in (
        f"torch {torch.__version__}", "torch, because: no Triton kernels for device type 'cpu'", "huge KL, fp32: gradient",
        "logits, KL near", "equal models", "ignored rows that hold NaN", "hidden states, soft-cap, fp32: gradient of the head",
        "hidden states, bf16: loss", "frozen head",
    ):  # fmt: skip
        assert part in text, part


def test_check_measures(monkeypatch):
    work = plan.Workload(V=2000, D=64, T=64, dtype=torch.float32, max_chunk_bytes=2**20, on_gpu=False)
    monkeypatch.setattr(check, "a_size_for", lambda device: work)
    for speed in check.speeds(work, torch.device("cpu")):
        assert speed.ms > 0 and 0.95 < speed.planned / speed.peak < 1.1
    text = run("check", "--device", "cpu")
    assert "64 rows, V 2,000, D 64, fp32, head trained" in text and "as planned" in text
    assert plan.WAYS["naive_valid"].label in text and plan.WAYS["ours"].label in text


@pytest.mark.parametrize("bytes_free", [8e9, 4e10])
def test_the_size_on_a_gpu_fits(bytes_free, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (bytes_free, bytes_free))
    work = check.a_size_for(torch.device("cuda"))
    assert plan.naive_valid(work).total <= bytes_free / 2 < plan.naive_valid(replace(work, T=2 * work.T)).total


def test_bandwidths_count_bytes(monkeypatch):
    """On a CPU, which can say nothing of a GPU, with a clock that takes a second for anything."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1e9, 1e9))
    monkeypatch.setattr(check, "wall_clock", lambda device, function: (1e3, function()))
    size = 4 * 1000 * 2 * check.QUEUED
    assert check.bandwidths(torch.device("cpu"), N=4, V=1000) == {"copy": 2 * size, "forward": 2 * size, "backward": 3 * size}


def with_values(change):
    real = _torch_backend.token_stats_fwd

    def forward(policy, ref, labels, **options):
        stats, saved = real(policy, ref, labels, **options)
        return change(stats), saved

    return {"token_stats_fwd": forward}


def with_gradient(change):
    real = _torch_backend.token_stats_bwd

    def backward(policy, ref, labels, saved, g_logp, g_kl, d_policy, **options):
        real(policy, ref, labels, saved, g_logp, g_kl, d_policy, **options)
        change(d_policy)

    return {"token_stats_bwd": backward}


def nan_in_a_row(stat):
    return torch.cat([stat[:1] * float("nan"), stat[1:]])


BROKEN = {
    "the KL is too large": (with_values(lambda s: s | {"kl": s["kl"] * 1.001}), "logits, ordinary, fp32: kl"),
    "a tiny KL is noise": (with_values(lambda s: s | {"kl": s["kl"] + 1e-12}), "logits, equal models, fp32: kl"),
    "one row is NaN": (with_values(lambda s: s | {"logp": nan_in_a_row(s["logp"])}), "logits, ordinary, fp32: logp"),
    "the policy for the reference": (with_values(lambda s: s | {"ref_logp": s["logp"].clone()}), "hidden states, fp32: loss"),
    "a row's gradient is twice itself": (with_gradient(lambda d: d[0, 0].mul_(2)), "logits, ordinary, fp32: gradient"),
    "a part has no gradient": (with_gradient(lambda d: d[..., ::100].zero_()), "hidden states, fp32: gradient of the head"),
    "ignored rows have a gradient": (with_gradient(lambda d: d.add_(1e-30)), "logits, ignored rows that hold NaN: everything"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_check_finds_a_broken_kernel(fault, monkeypatch):
    functions, expected = BROKEN[fault]
    for name, function in functions.items():
        monkeypatch.setattr(_torch_backend, name, function)
    text = run(*CHECK, code=1)
    assert f"wrong: {expected}" in text and "do not train here" in text and "checks passed" not in text


def test_check_reports_a_kernel_that_does_not_run(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no [such] instruction")

    monkeypatch.setattr(_torch_backend, "token_stats_bwd", fail)
    text = run(*CHECK, code=1)
    assert "wrong: logits, at once: RuntimeError: no [such] instruction" in text and "Traceback" in text
    monkeypatch.setattr(_torch_backend, "token_stats_fwd", fail)
    text = run("check", "--device", "cpu", code=1)
    assert "2 of 2 checks failed on cpu" in text and "as planned" not in text, "no time for what is wrong"


def test_check_finds_a_chunk_that_is_lost(monkeypatch):
    add = Projection.add_d_weight
    monkeypatch.setattr(Projection, "add_d_weight", lambda self, total, d, h, first: add(self, total, d, h, True))
    text = run(*CHECK, code=1)
    assert "wrong: hidden states, fp32: gradient of the head" in text and "wrong: logits" not in text
    monkeypatch.setattr(HeadSums, "add", lambda self, d, h: None)
    assert "gradient of the head" in run(*CHECK, code=1)


def test_check_of_a_model(llama):
    text = run(*CHECK, "--model", llama)
    assert f"{llama}, fp32: gradient of hidden states" in text and "All 28 checks passed" in text


def test_check_of_a_model_whose_head_is_none(tmp_path):
    config = BertConfig(**TINY, is_decoder=True)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    text = run(*CHECK, "--model", tmp_path, code=1)
    assert f"wrong: {tmp_path}: its head" in text and "has a dense layer and a norm inside its head" in text


@pytest.mark.parametrize(
    ("arguments", "next_step"),
    [
        (("--model", "./nowhere"), "its id on the hub"),
        (("--device", "tpu"), "cpu, cuda or cuda:N"),
        (("--device", "meta"), "cpu, cuda or cuda:N"),
        (("--device", "cuda:99"), "Take another, or cpu"),
    ],
    ids=str,
)
def test_check_refuses(arguments, next_step):
    assert next_step in run("check", "--no-speed", *arguments, code=2)


@pytest.mark.gpu
def test_check_on_a_gpu():
    text = run("check", "--device", "cuda")
    assert "triton, because: GPU tensors" in text and "All 26 checks passed on cuda" in text
    assert "of a copy" in text and "as planned" in text
