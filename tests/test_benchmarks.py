"""The benchmark refuses what is wrong, counts what it says it counts, and its documents say what its records say."""

import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # as its programs see each other

import accuracy
import linear
import measure
import providers
import report
import run
from cases import CASES, HIDDEN_CASES, MODELS, PROBLEMS, Case, HiddenCase, model_name
from fused_tdpo import TokenStats, linear_token_stats, token_stats
from fused_tdpo.reference import token_stats_reference

ROOT = Path(__file__).resolve().parents[1]
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


def test_overwritten_logits_are_restored_for_the_next(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "TOO_FAST", float("inf"))  # of microseconds, on a machine that does other things as well
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


def test_models():
    names = [model.name for model in MODELS]
    assert len(set(names)) == len(names)
    assert model_name(151_936) == "Qwen 3" and model_name(151_936, 896) == "Qwen 2.5 0.5B" and model_name(1, 1) == ""
    assert model_name(256_000, 2304, 30.0) == "Gemma 2 2B" and model_name(256_000, 2304) == ""
    measured = {model.name for model in MODELS if "gpu" in model.tags}
    assert measured <= {case.model for case in HIDDEN_CASES}, "a model that is tagged has a case"


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
    *("date", "commit", "changed", "device", "driver", "threads", "torch", "triton", "peers", "python"),
    *("case", "model", "N", "V", "dtype", "masked", "forward_bytes", "backward_bytes"),
    *("provider", "refused", "failed", "errors", "peak_bytes", "rounds", "ms", "floor_ms"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Records of a run on the tiny case alone."""
    monkeypatch.setattr(measure, "TOO_FAST", float("inf"))
    for module in (run, report):
        for name, cases in {"CASES": (TINY,), "HIDDEN_CASES": (), "PROBLEMS": ()}.items():
            monkeypatch.setattr(module, name, cases)
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


def test_what_is_worth_most_comes_first_and_the_rest_is_named(tmp_path, monkeypatch, capsys):
    cases = [replace(TINY, N=N, tags=frozenset({"cpu", *tags})) for N, tags in ((6, ()), (4, ("main",)), (2, ()))]
    for name, own in {"CASES": cases, "HIDDEN_CASES": (), "PROBLEMS": ()}.items():
        monkeypatch.setattr(run, name, own)
    arguments = ["--provider", "fused", "--rounds", "1", "--results", str(tmp_path)]
    assert run.main([*arguments, "--minutes", "0"]) == 0, "at least one case is measured"
    assert {record["N"] for record in report.load(tmp_path)} == {4}
    assert f"not measured: {cases[0].name}, {cases[2].name}" in capsys.readouterr().out
    run.main(arguments)
    assert [record["N"] for record in report.load(tmp_path)][2::2] == [4, 6, 2], "records of one second stay in their order"


def test_the_run_for_a_gpu_needs_one(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        run.main(["--gpu"])
    assert "need a GPU" in capsys.readouterr().err


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
    newer = [json.loads(line) | {"date": "2999-01-01"} for line in path.read_text().splitlines()]
    newer[1]["peak_bytes"] = 7 * 2**30
    path.write_text(path.read_text() + "".join(json.dumps(record) + "\n" for record in newer))
    assert main("--check") == 1 and main() == 0
    assert "7.00 GiB" in document.read_text() and "; 2999-01-01;" in document.read_text()


def test_refusals_are_shown_in_a_word(folder):
    records = report.load(folder)
    records[1] = records[1] | {"refused": "wrong: relative error 1 of kl", "failed": True, "ms": {}}
    records[2] = records[2] | {"refused": "not available: no such package", "ms": {}}
    text = report.generated("headline", records)
    assert "| `fused` | wrong |" in text and "eager" not in text


def test_what_is_compared_was_measured_together(folder):
    """A later run of one provider alone, or of one whose rivals could not run, stands beside nobody."""
    records = report.load(folder)
    later = [record | {"date": "2999-01-01", "peak_bytes": 7 * 2**30} for record in records]
    for alone in (later[:2], [*later[:2], later[2] | {"refused": "out of memory: 1 GiB", "ms": {}}]):
        assert report.generated("headline", [*records, *alone]) == report.generated("headline", records)
        assert "7.00 GiB" in report.generated("headline", alone)
    assert report.generated("headline", [*records, *later]) == report.generated("headline", later)


def test_an_unknown_table_is_refused():
    with pytest.raises(KeyError, match="tim"):
        report.updated("<!-- generated: tim -->\n<!-- end -->", [])


def test_no_records_yet():
    assert all("No records yet" in report.generated(view, []) for view in report.VIEWS)


UNDATED = re.compile(r"fastest|quickest|state of the art|best known|no other|nobody else|\bthe only\b", re.IGNORECASE)


def undated(text: str) -> list[str]:
    """Paragraphs that claim to be ahead of everybody, and do not say when."""
    return [part for part in text.split("\n\n") if UNDATED.search(part) and not re.search(r"20\d\d-\d\d-\d\d", part)]


@pytest.mark.parametrize("path", ["README.md", "benchmarks/README.md"])
def test_superlatives_carry_a_date(path):
    assert undated("The fastest of all.\n\nThe fastest on 2026-11-26.") == ["The fastest of all."]
    prose = re.sub(r"^\|.*\n", "", (ROOT / path).read_text(), flags=re.MULTILINE)  # the caption of a table has its date
    assert not undated(prose)


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


# -------------------------------------------------------------------------------------------------------------------- tuning


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


# --------------------------------------------------------------------------------------------------------------- hidden level

HIDDEN = HiddenCase(16, 8, 50, pairs=2, dtype=torch.float32)
FROZEN = replace(HIDDEN, trained=False)


def examined(provider: providers.Provider, case: HiddenCase = HIDDEN) -> measure.Measurement:
    """What the gate says of one provider."""
    inputs = linear.Inputs(case, CPU)
    return measure.admit("tested", provider, inputs, linear.Truth(inputs), linear.HIDDEN)[0]


def naive(beta, x, head, z, ref_head, labels):
    return providers.naive_all(beta, x, head, z, ref_head, labels)


def without_kl(beta, x, head, z, ref_head, labels):
    stats = providers.official(F.linear(x, head), F.linear(z, ref_head), providers.shifted(labels))
    return providers.tdpo2(stats, beta, alpha=0.0)


def kl_of_chosen_attached(beta, x, head, z, ref_head, labels):
    stats = providers.official(F.linear(x, head), F.linear(z, ref_head), providers.shifted(labels))
    (ratio_w, ratio_l), (kl_w, kl_l) = ((s.sum(-1).chunk(2)) for s in (stats.logp - stats.ref_logp, stats.kl))
    return -F.logsigmoid(beta * (ratio_w - ratio_l - providers.ALPHA * (kl_l - kl_w))).mean()


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        (lambda b, x, w, z, v, y: naive(b, x * 1.01, w, z, v, y), "loss"),
        (lambda b, x, w, z, v, y: naive(b, x, w, x.detach(), v, y), "loss"),
        (lambda b, x, w, z, v, y: naive(b, x, v, z, w, y), "loss"),
        (lambda b, x, w, z, v, y: naive(b, x, w, z, v, y.clamp(min=0)), "loss"),
        (lambda b, x, w, z, v, y: naive(b, x, w, z, v, F.pad(y, (1, 0), value=-100)[:, :-1]), "loss"),
        (without_kl, "loss"),
        (lambda b, x, w, z, v, y: naive(b, x, w, z, v, y) * float("nan"), "nan of loss"),
        (kl_of_chosen_attached, "gradient of the hidden states"),
        (lambda b, x, w, z, v, y: naive(b, x, w, z, v, y) + (x - x.detach())[0, 0, 0], "gradient of the hidden states"),
        (lambda b, x, w, z, v, y: naive(b, x, w.detach() + (w - w.detach()) * 1.01, z, v, y), "gradient of the head"),
        (lambda b, x, w, z, v, y: naive(b, x, torch.cat((w[:40], w[40:].detach())), z, v, y), "gradient of the head"),
    ],
    ids=[
        *("temperature", "reference exchanged", "heads exchanged", "mask", "shift", "no KL", "NaN"),
        *("gradient to the chosen KL", "gradient to a prompt", "scaled head", "part of the head"),
    ],
)
def test_a_wrong_loss_gets_no_time(loss, complaint):
    result = examined(providers.Provider(lambda: loss))
    assert result.failed and result.refused.startswith("wrong: ") and complaint in result.refused


SMALL = [case for case in HIDDEN_CASES if "small" in case.tags]


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in SMALL for name in case.only or providers.HIDDEN_PROVIDERS],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_hidden_providers_pass(name, case, monkeypatch):
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="eager")
    )  # traced, but nothing is left to a C++ compiler
    result = examined(providers.HIDDEN_PROVIDERS[name], case)
    if result.refused.startswith("not available"):
        pytest.skip(result.refused)
    assert not result.refused
    assert set(result.errors) == {"loss", "gradient of the hidden states", *(["gradient of the head"] if case.trained else [])}
    assert result.peak_bytes >= case.gradient_bytes


def test_a_forgotten_cap_gets_no_time():
    capped = replace(HIDDEN, softcap=5.0)

    def loss(beta, x, head, z, ref_head, labels):
        return naive(beta, x, head.weight, z, ref_head.weight, labels)

    assert "loss" in examined(providers.Provider(lambda: loss), capped).refused
    assert not examined(providers.HIDDEN_PROVIDERS["ours"], capped).refused


def kl_alone(beta, x, head, z, ref_head, labels):
    labels = providers.shifted(labels)
    return providers.official(F.linear(x, head), F.linear(z, ref_head), labels).kl.sum() / (labels != -100).sum()


def log_probs(hidden, head, labels):
    """(S, T) of labels, 0 where they do not count; and how many count."""
    y = providers.shifted(labels)
    found = F.linear(hidden, head).log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
    return found.where(y != -100, 0.0).sum(-1), (y != -100).sum(-1)


def simpo_alone(beta, x, head, z, ref_head, labels):
    logp, count = log_probs(x, head, labels)
    chosen, rejected = (logp / count).chunk(2)
    return -F.logsigmoid(2.0 * (chosen - rejected) - 0.5).mean()


def kto_alone(beta, x, head, z, ref_head, labels):
    ratio = log_probs(x, head, labels)[0] - log_probs(z, ref_head, labels)[0]
    chosen, rejected = ratio.chunk(2)
    return (2 - torch.sigmoid(beta * (chosen - 0.1)) - torch.sigmoid(beta * (0.1 - rejected))).mean() / 2


@pytest.mark.parametrize("computes", ["tdpo2", "dpo", "kl", "simpo", "kto"])
def test_the_gate_knows_what_is_computed(computes):
    right = {"tdpo2": naive, "dpo": without_kl, "kl": kl_alone, "simpo": simpo_alone, "kto": kto_alone}
    for name, loss in right.items():
        assert examined(providers.Provider(lambda loss=loss: loss, computes=computes)).failed == (name != computes)


def test_what_would_not_fit_is_not_begun(monkeypatch):
    monkeypatch.setattr(linear, "available_bytes", lambda: 1e4)
    result = examined(providers.HIDDEN_PROVIDERS["naive_all"])
    assert not result.failed and result.refused.startswith("too large: about 87.5 KiB of 9.77 KiB")  # 64 rows, 50 columns


@pytest.mark.parametrize("masked", [0.0, 0.1, 0.5, 0.9])
def test_rows_that_count(masked):
    case = replace(HIDDEN, masked=masked)
    labels = providers.shifted(linear.Inputs(case, CPU).labels)
    assert case.N == int((labels != -100).sum()) == 4 * {0.0: 15, 0.1: 15, 0.5: 8, 0.9: 2}[masked]


@pytest.mark.parametrize("case", [HIDDEN, FROZEN], ids=["trained", "frozen"])
@pytest.mark.parametrize("rows", [5, 1000])
def test_bare_makes_the_least_products(case, rows, monkeypatch):
    monkeypatch.setattr(linear, "CPU_CHUNK_BYTES", rows * 2 * case.V * 4)
    inputs = linear.Inputs(case, CPU)
    bare = linear.Bare(inputs)
    with FlopCounterMode(display=False) as counter:
        bare.run()
    assert counter.get_total_flops() == case.flops == (4 if case.trained else 3) * 2 * 32 * 50 * 8
    assert case.N == int((providers.shifted(inputs.labels) != -100).sum()) == 32
    assert case.gradient_bytes == sum(leaf.nbytes for leaf in inputs.leaves)
    x, logits = bare.hidden, bare.hidden @ bare.head.T
    assert measure.relative_error(bare.d_hidden, logits @ bare.head) <= 1e-5
    if case.trained:  # once when it was made, once here
        assert measure.relative_error(bare.d_head, 2 * logits.T @ x) <= 1e-5


def test_hidden_cases():
    names = [case.name for case in (*CASES, *HIDDEN_CASES, *PROBLEMS)]
    assert len(set(names)) == len(names)
    assert {tag for case in HIDDEN_CASES for tag in case.tags} == {"gpu", "cpu", "main", "small"}
    assert all(case.tags & {"gpu", "cpu"} for case in HIDDEN_CASES if "small" not in case.tags)
    assert all(name in providers.HIDDEN_PROVIDERS for case in HIDDEN_CASES for name in case.only)


@pytest.fixture
def hidden_folder(tmp_path, monkeypatch):
    """Records of a run on hidden states."""
    for module in (run, report):
        monkeypatch.setattr(module, "HIDDEN_CASES", (replace(HIDDEN, tags=frozenset({"main"})), FROZEN))
    monkeypatch.setattr(measure, "TOO_FAST", float("inf"))  # these products take microseconds, and who knows what else runs
    arguments = ["--case", HIDDEN.name, "--case", FROZEN.name, "--provider", "naive_all", "--rounds", "2"]
    assert run.main([*arguments, "--results", str(tmp_path), "--commit", "0123456789abcdef"]) == 0
    return tmp_path


def test_hidden_records_and_tables(hidden_folder, monkeypatch):
    records = report.load(hidden_folder)
    facts = {"pairs", "T", "D", "trained", "apart", "softcap", "flops", "gradient_bytes"}
    assert [record["provider"] for record in records] == ["bare", "naive_all"] * 2
    assert all(set(record) == FIELDS - {"forward_bytes", "backward_bytes"} | facts for record in records)
    assert set(records[0]["ms"]) == {"both"} and set(records[1]["ms"]) == set(measure.PHASES)

    by_hand = {"bare": [900, 1000, 1100], "ours": [1100, 1250, 1300], "naive_all": [5e3, 6e3, 7e3]}
    made = [
        records[1] | {"provider": name, "ms": dict.fromkeys(measure.PHASES, ms), "floor_ms": {"both": 1000}, "flops": 2e12}
        | {"peak_bytes": 3 * 2**20, "gradient_bytes": 2**20}
        for name, ms in by_hand.items()
    ]  # fmt: skip
    made[1] |= {"refused": "too large: about 3 GiB of 2 GiB that are available"}
    made.append(made[2] | {"provider": "trl", "refused": "not available: No module named 'trl'"})
    made.append(made[2] | {"provider": "liger"})
    text = report.generated("hidden-all", made)
    assert "|  | `bare` | `naive_all` |\n" in text
    assert f"| `{HIDDEN.name}` | 1.00 s | 6.00 s (6.00×), 3.00 MiB |" in text
    text = report.generated("hidden-phases", made)
    assert "`naive_all` | 6.00 s | 6.00 s | 6.00 s | 5.00 s to 7.00 s | 6.00× | 0.333 | 3.00 MiB | 1.00 MiB |" in text
    assert f"| `{HIDDEN.name}` `ours` | too large |" in text and "`trl`" not in text
    text = report.generated("hidden-others", made)
    assert "|  | `bare` | `liger` |\n" in text and "6.00 s (6.00×), 3.00 MiB" in text
    assert "No records yet" in report.generated("time", made), "the levels do not mix"

    made[1] |= {"refused": ""}
    made.append(made[2] | {"provider": "trl", "ms": {"both": [4e3, 5e3, 6e3]}, "peak_bytes": 5 * 2**20})
    text = report.generated("summary", [*made, *(record | {"case": FROZEN.name} for record in made)])
    assert FROZEN.name not in text, "it is not a main case"
    assert f"| `{HIDDEN.name}` | 1.25 s | 1.25× | `trl` | 4.00× | 3.00 MiB | 5.00 MiB |" in text
    assert f"as of {records[0]['date'][:10]}" in text


def test_a_picture_of_the_lengths(hidden_folder, monkeypatch):
    pytest.importorskip("matplotlib")
    cases = [replace(HIDDEN, T=T, pairs=1) for T in (64, 128, 256)]
    monkeypatch.setattr(report, "HIDDEN_CASES", cases)
    records = [record | run.describe(case) for case in cases for record in report.load(hidden_folder)]
    (path,) = hidden_folder.glob("*.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert report.main(["--plot"], documents=(), folder=hidden_folder) == 0
    (picture,) = hidden_folder.glob("*-hidden.png")
    assert picture.stat().st_size > 10_000


# ------------------------------------------------------------------------------------------------------------------ exactness

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("got", "truth", "error"),
    [
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([0.5], [0.0], 0.5),
        ([INF, NAN, 1.0], [INF, NAN, 1.0], 0.0),
        ([1.0], [NAN], INF),
        ([1.0], [INF], INF),
        ([INF], [1.0], INF),
        ([-INF], [INF], INF),
        ([NAN, 1.0], [1.0, 1.0], NAN),
        ([NAN], [INF], NAN),
        ([INF, NAN], [1.0, 1.0], NAN),
    ],
)
def test_worst_error(got, truth, error):
    found = accuracy.worst(torch.tensor(got), torch.tensor(truth, dtype=torch.float64))
    assert found == error or (found != found and error != error)


def asked(problem, name, function=None):
    """What a provider's answer to a small version of a problem is worth."""
    provider = providers.ROW_PROVIDERS[name] if function is None else providers.Provider(lambda: function)
    inputs = accuracy.Inputs(replace(problem, V=1501), CPU)
    found = measure.admit(name, provider, inputs, accuracy.Truth(inputs), accuracy.ACCURACY)[0]
    assert not found.refused
    return found.errors


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize("name", ["ours", "fused"])
def test_ours_are_exact(problem, name):
    errors = asked(problem, name)
    assert set(errors) == {"logp", "kl", "kl below 0"} | (
        set() if problem.name in ("-inf in both", "-inf in policy") else {"gradient"}
    )
    assert errors["kl below 0"] == 0 and errors["logp"] <= 1e-6
    assert errors["kl"] <= (1e-2 if problem.shift else 1e-5)
    assert errors.get("gradient", 0.0) <= (1.0 if problem.distance < 1e-2 else 1e-3), "p - q of nearly equal p and q"


def test_inexact_providers_are_found_out():
    by_name = {problem.name: problem for problem in PROBLEMS}
    assert asked(by_name["distance 1e-05"], "official")["kl"] > 1
    ignored = asked(by_name["NaN in an ignored row"], "official")
    assert all(ignored[name] != ignored[name] for name in ("logp", "kl", "gradient"))
    assert asked(by_name["-inf in both"], "official")["kl"] != 0

    def hides_nan(*inputs):
        stats = linear_token_stats(*inputs)
        return stats._replace(kl=stats.kl.nan_to_num())

    assert asked(by_name["NaN in a counted row"], "hides_nan", hides_nan)["kl"] == INF


def test_accuracy_records_table_and_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    problems = [replace(problem, V=1501) for problem in PROBLEMS if problem.name in ("distance 1e-05", "NaN in an ignored row")]
    for module in (run, report):
        monkeypatch.setattr(module, "PROBLEMS", problems)
    arguments = ["--level", "accuracy", "--provider", "ours", "--provider", "official", "--provider", "fla"]
    assert run.main([*arguments, "--results", str(tmp_path), "--commit", "0123456789abcdef"]) == 0
    records = report.load(tmp_path)
    assert all(set(record) == FIELDS - {"masked", "forward_bytes", "backward_bytes"} | {"spoilt", "kl"} for record in records)
    text = report.generated("accuracy", records)
    assert re.search(r"^\| distance 1e-05 \| \d\.\de-11 \| \de-0\d \| \de\+0\d( \(\d\))? \|$", text, re.MULTILINE)
    assert "| NaN in an ignored row |  | right | logp NaN, kl NaN, gradient NaN |" in text
    assert "medians" not in text and "0123456789" in text
    assert report.main(["--plot"], documents=(), folder=tmp_path) == 0
    (picture,) = tmp_path.glob("*-accuracy.png")
    assert picture.stat().st_size > 10_000
