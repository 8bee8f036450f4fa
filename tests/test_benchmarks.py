"""The benchmark refuses what is wrong, counts what it says it counts, and its documents say what its records say."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # as its programs see each other

import demo
import measure
import providers
import report
import run
from cases import CASES, Case
from fused_tdpo import TokenStats, token_stats
from fused_tdpo.reference import token_stats_reference

CPU = torch.device("cpu")
TINY = Case(6, 200, dtype=torch.float32, masked=0.5, tags=frozenset({"gpu", "cpu"}))


# ----------------------------------------------------------------------------------------------------------------------- gate


def found(function: providers.Function, case: Case = TINY, **options: object) -> measure.Measurement:
    """What measuring one provider says."""
    provider = providers.Provider(lambda: function, **options)
    return measure.measure(case, [("tested", provider)], CPU, rounds=1)[1]


class _WrongGradient(torch.autograd.Function):
    """Right values; a gradient that forgets the KL of one row."""

    @staticmethod
    def forward(ctx, policy, ref, labels):
        ctx.save_for_backward(policy, ref, labels)
        return token_stats_reference(policy, ref, labels)[:3]

    @staticmethod
    def backward(ctx, g_logp, _, g_kl):
        policy, ref, labels = ctx.saved_tensors
        with torch.enable_grad():
            policy = policy.detach().requires_grad_()
            stats = token_stats_reference(policy, ref, labels)
            g_kl = g_kl.clone()
            g_kl[-1] = 0
            return *torch.autograd.grad((stats.logp, stats.kl), policy, (g_logp, g_kl)), None, None


def without_mask(policy, ref, labels):
    return token_stats_reference(policy, ref, labels.clamp(min=0))


def reverse_kl(policy, ref, labels):
    log_p, log_q = policy.log_softmax(-1), ref.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) * (labels != -100)
    return token_stats_reference(policy, ref, labels)._replace(kl=kl)


def hollow(policy, ref, labels):
    stats = token_stats_reference(policy, ref, labels)
    return stats._replace(kl=stats.kl * float("nan"))


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (lambda x, z, y: token_stats_reference(x * 1.001, z, y), "logp"),
        (reverse_kl, "kl"),
        (lambda x, z, y: TokenStats(*_WrongGradient.apply(x, z, y)), "of gradient"),
        (without_mask, "logp"),
        (hollow, "nan of kl"),
    ],
    ids=["temperature", "other KL", "gradient", "mask", "NaN"],
)
def test_a_wrong_provider_gets_no_time(function, complaint):
    result = found(function)
    assert result.failed and result.refused.startswith("wrong: ") and complaint in result.refused
    assert not result.ms


@pytest.mark.parametrize("name", ["fused", "fused_inplace", "eager", "official"])
def test_our_providers_pass(name):
    case, provider = replace(TINY, dtype=torch.bfloat16), providers.PROVIDERS[name]
    result = measure.admit(name, provider, inputs := measure.Inputs(case, CPU), measure.Truth(inputs))[0]
    assert not result.refused
    assert set(result.errors) == {"logp", "ref_logp", "kl", "gradient", "gradient at the label"}


def test_a_provider_may_compute_less():
    result = found(lambda x, z, y: TokenStats(logp=token_stats_reference(x, None, y).logp))
    assert not result.refused
    assert set(result.errors) == {"logp", "gradient", "gradient at the label"}


def test_overwritten_logits_are_restored_for_the_next():
    both = [(name, providers.PROVIDERS[name]) for name in ("fused_inplace", "eager")]
    assert not any(result.refused for result in measure.measure(TINY, both, CPU, rounds=2))


def test_a_failure_ends_only_its_own_measurement():
    def fail(x, z, y):
        raise RuntimeError("no\nsuch thing")

    def refuse():
        raise providers.Unavailable("needs a GPU")

    both = [
        ("broken", providers.Provider(lambda: fail)),
        ("absent", providers.Provider(refuse)),
        ("eager", providers.PROVIDERS["eager"]),
    ]
    _, broken, absent, eager = measure.measure(TINY, both, CPU, rounds=1)
    assert broken.failed and broken.refused == "RuntimeError: no"
    assert not absent.failed and absent.refused == "not available: needs a GPU"
    assert eager.ms and eager.rounds == 1


def test_faster_than_the_bytes_is_a_mistake(monkeypatch):
    class Instant(measure.Clock):
        def __call__(self, function):
            _, result = super().__call__(function)
            return (1.0 if getattr(function, "__name__", "") == "<lambda>" else 0.5), result  # the copy is the lambda

    monkeypatch.setattr(measure, "Clock", Instant)
    result = found(token_stats)
    assert result.failed and "faster than the bytes allow" in result.refused


# ------------------------------------------------------------------------------------------------------------ what is counted


def test_bytes():
    case = Case(1024, 1000, dtype=torch.bfloat16, masked=0.25)
    assert case.forward_bytes == 2 * 768 * 1000 * 2
    assert case.backward_bytes == 2 * 768 * 1000 * 2 + 1024 * 1000 * 2
    assert Case(8, 100, dtype=torch.float32).backward_bytes == 3 * 8 * 100 * 4


def test_cases():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all("gpu" in case.tags and case.model for case in CASES)
    assert all(any(tag in case.tags for case in CASES) for tag in ("cpu", "small"))


def test_peak_memory_sees_inside_operators():
    def allocate():
        a = torch.empty(250_000)  # 1 MB
        b = torch.empty(500_000)
        del a
        torch.empty(100_000)
        return b

    assert measure.peak_bytes(CPU, allocate) == [3_000_000]
    kept = []
    assert measure.peak_bytes(CPU, lambda: kept.append(allocate()), lambda: torch.empty(1000)) == [3_000_000, 2_004_000]
    inputs = measure.Inputs(Case(8, 5000, dtype=torch.float32), CPU)
    size = inputs.policy.nbytes
    (fused,) = measure.peak_bytes(CPU, lambda: token_stats(inputs.policy, inputs.ref, inputs.labels))
    assert fused > size, "the op works in chunks of float32, which are allocated inside it"


# -------------------------------------------------------------------------------------------------------------------- records

FIELDS = {
    *("date", "commit", "changed", "device", "driver", "threads", "torch", "triton", "python"),
    *("case", "model", "N", "V", "dtype", "masked", "forward_bytes", "backward_bytes"),
    *("provider", "refused", "failed", "errors", "peak_bytes", "rounds", "ms", "floor_ms"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Records of a run on the tiny case."""
    for module in (run, report):
        monkeypatch.setattr(module, "CASES", (TINY,))
    arguments = ["--provider", "fused", "--provider", "eager", "--rounds", "2", "--results", str(tmp_path / "results")]
    assert run.main([*arguments, "--out", str(tmp_path / "out"), "--commit", "0123456789abcdef"]) == 0
    return tmp_path / "results"


def test_a_run_writes_complete_records(folder):
    (path,) = folder.glob("*.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["provider"] for record in records] == ["copy", "fused", "eager"]
    for record in records:
        assert set(record) == FIELDS
        assert record["commit"] == "0123456789abcdef" and record["rounds"] == 2 and not record["refused"]
        assert set(record["ms"]) == set(record["floor_ms"]) == set(measure.PHASES)
        assert all(low <= middle <= high for low, middle, high in record["ms"].values())
    assert (folder.parent / "out" / path.name).read_text() == path.read_text()


@pytest.mark.parametrize("arguments", [["--case", "N1"], ["--provider", "fuse"], ["--case", "N4096"]], ids=" ".join)
def test_unknown_names_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert "invalid choice" in capsys.readouterr().err


def test_documents_follow_the_records(folder, tmp_path):
    document = tmp_path / "README.md"
    document.write_text(
        "before\n<!-- generated: headline -->\nold\n<!-- end -->\n<!-- generated: time -->\n<!-- end -->\nafter\n"
    )

    def main(*arguments):
        return report.main(list(arguments), documents=(document,), folder=folder)

    assert main("--check") == 1
    assert main() == 0
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    for part in ("0123456789", torch.__version__, "`fused`", "`eager`", TINY.name, "medians of 2 rounds"):
        assert part in text
    assert main("--check") == 0

    (path,) = folder.glob("*.jsonl")
    newer = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(path.read_text() + json.dumps(newer[1] | {"date": "2999-01-01", "peak_bytes": 7 * 2**30}) + "\n")
    assert main("--check") == 1 and main() == 0
    assert "7.00 GiB" in document.read_text() and "to 2999-01-01" in document.read_text()


def test_refusals_are_shown_in_a_word(folder):
    records = report.load(folder)
    records[1] = records[1] | {"refused": "wrong: relative error 1 of kl", "failed": True, "ms": {}}
    records[2] = records[2] | {"refused": "not available: no such package", "ms": {}}
    text = report.generated("headline", records)
    assert "| `fused` | wrong |" in text and "eager" not in text


def test_an_unknown_table_is_refused():
    with pytest.raises(KeyError, match="tim"):
        report.updated("<!-- generated: tim -->\n<!-- end -->", [])


def test_no_records_yet():
    assert all("No records yet" in report.generated(view, []) for view in report.VIEWS)


def test_the_repository_is_up_to_date():
    assert report.main(["--check"]) == 0, "run: python benchmarks/report.py"


def test_a_picture(folder, monkeypatch):
    pytest.importorskip("matplotlib")
    cases = [Case(128, V) for V in (1000, 2000, 4000)]
    monkeypatch.setattr(report, "CASES", cases)
    records = [record | run.describe(case) for case in cases for record in report.load(folder)]
    (path,) = folder.glob("*.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert report.main(["--plot"], documents=(), folder=folder) == 0
    assert path.with_suffix(".png").stat().st_size > 10_000


# ----------------------------------------------------------------------------------------------------------- demo and tuning


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_demo(rich, capsys, monkeypatch):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)  # the import fails
    assert demo.main(["--tokens", "32", "--vocab", "1001", "--repetitions", "1"]) == 0
    text = capsys.readouterr().out
    for part in ("naive", "fused, in place", "Same loss and gradient", "peak memory", "log-softmax", "lse identity"):
        assert part in text


def test_demo_does_not_hide_a_difference(monkeypatch):
    wrong = demo.official
    monkeypatch.setattr(demo, "official", lambda x, z, y: wrong(x * 1.1, z, y))
    with pytest.raises(ValueError, match="fused differs from naive"):
        demo.main(["--tokens", "32", "--vocab", "1001", "--repetitions", "1"])


@pytest.mark.interpreter
def test_tuning_launches_what_it_says(monkeypatch):
    import tune

    launched = []
    real = tune.kernels._launch
    monkeypatch.setattr(
        tune.kernels, "_launch", lambda kernel, n, **args: launched.append((kernel, args)) or real(kernel, n, **args)
    )
    case = Case(2, 1500, dtype=torch.float32)
    sweeps = {
        "forward": {"warps": (2,), "pairs": (8,), "registers": (96,), "segment": (512,)},
        "backward": {"warps": (2,), "pairs": (8,), "registers": (64,), "tiles": (2,)},
    }
    for phase, kernel in (("forward", tune.kernels.token_stats_fold_kernel), ("backward", tune.kernels.token_stats_bwd_kernel)):
        launched.clear()
        found, floor = tune.tune(case, phase, CPU, rounds=1, say=lambda text: None, sweep=sweeps[phase])
        assert len(found) == 3 and found[0]["config"] == found[-1]["config"] != found[1]["config"]
        assert not any(choice["refused"] for choice in found) and floor > 0
        default, choice, again = (args for launch, args in launched[: 3 * len(launched) // 6] if launch is kernel)
        assert (choice["T"], choice["K"] * choice["E"], choice["maxnreg"]) == (64, 8, sweeps[phase]["registers"][0])
        assert choice["segment" if phase == "forward" else "chunk"] == (512 if phase == "forward" else 2 * 64 * 8)
        assert default["T"] == again["T"] and tune.kernels.SEGMENT_COLUMNS > 512, "the sweep must leave nothing behind"
        assert "default again" in tune.best(found, floor).markdown()
