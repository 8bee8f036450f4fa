"""What a user installs: the content of the wheel, and what importing it costs. Builds offline, in a copy of the tree."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def build(kind: str, tree: Path, out: Path) -> Path:
    """Build a `wheel` or an `sdist` of `tree` with the installed setuptools: no network, no isolated environment."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return out / run.stdout.splitlines()[-1]


def content(wheel: Path) -> set[str]:
    """Files of a wheel, without its metadata folder."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build may need, so that it leaves nothing behind and finds nothing left from elsewhere."""
    versions = [found.version for found in importlib.metadata.distributions(name="setuptools")]
    if not versions or int(versions[0].partition(".")[0]) < 77:
        pytest.skip(f"building needs setuptools >= 77, found {versions[0] if versions else 'none'}")
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("fused_tdpo", "kernels"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder holding what installing the wheel puts there: for pure Python, its content."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


# ---------------------------------------------------------------------------------------------------------- the tree


def test_kernels_is_linked_and_never_a_package_of_its_own():
    """With an `__init__.py`, transformers would import our folder in place of the package of that name."""
    link = ROOT / "fused_tdpo" / "kernels"
    assert link.is_symlink()
    assert link.readlink().as_posix() == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_packages_list_names_the_folders_on_disk():
    inner = (path.parent.relative_to(ROOT) for path in (ROOT / "fused_tdpo").rglob("*.py"))
    folders = {".".join(folder.parts) for folder in inner} | {"fused_tdpo.kernels"}
    assert sorted(SETTINGS["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_root_holds_no_conftest_and_tests_are_no_package():
    """Either would put the root on `sys.path`, where `import kernels` finds our folder."""
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


# --------------------------------------------------------------------------------------------------------- the wheel


def test_wheel_holds_the_package_and_nothing_else(wheel: Path):
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fused_tdpo").rglob("*.py")}
    kernels = {f"fused_tdpo/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").glob("*.py")}
    assert "fused_tdpo/kernels/token_stats.py" in kernels
    assert content(wheel) == package | kernels | {"fused_tdpo/py.typed"}
    assert {name.partition("/")[0] for name in content(wheel)} == {"fused_tdpo"}


def test_sdist_builds_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path):
    with tarfile.open(build("sdist", tree, tmp_path)) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("fused_tdpo-*/")
    assert content(build("wheel", unpacked, tmp_path)) == content(wheel)


def test_checkout_without_links_builds_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path):
    bare = Path(shutil.copytree(tree, tmp_path / "bare", symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info")))
    (bare / "fused_tdpo" / "kernels").unlink()
    assert content(build("wheel", bare, tmp_path)) == content(wheel)


def test_metadata(metadata: Message):
    import fused_tdpo

    assert metadata["Version"] == fused_tdpo.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {line.partition(">")[0] for line in required} == {"torch", "triton"}
    assert "platform_system" in next(line for line in required if line.startswith("triton"))


# ------------------------------------------------------------------------------------------------- what an import costs

PROBE = """
import json, sys
sys.path.insert(0, {site!r})

class Without:
    # Stands for all finders: as on a machine without these packages, looking them up finds nothing.
    finders = list(sys.meta_path)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {hidden}:
            specs = (finder.find_spec(name, path, target) for finder in self.finders)
            return next((spec for spec in specs if spec is not None), None)

sys.meta_path[:] = [Without()]
import torch
before = set(sys.modules)
{code}
print(json.dumps({{"file": fused_tdpo.__file__, "new": sorted(set(sys.modules) - before)}}))
"""

OPTIONAL = {
    re.match(r"[\w-]+", line).group().replace("-", "_")
    for line in sum(SETTINGS["project"]["optional-dependencies"].values(), ["triton"])
} - {"fused_tdpo", "setuptools"}  # torch itself requires setuptools


def probe(site: Path, code: str, hidden: set[str]) -> set[str]:
    """Run `code` with the installed wheel in a world without some packages; returns the modules it loads besides torch's."""
    program = PROBE.format(site=str(site), code=code, hidden=hidden or "()")
    run = subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert Path(report["file"]).is_relative_to(site)
    return set(report["new"])


IMPORT = "import fused_tdpo, fused_tdpo.functions, fused_tdpo.reference"

TRAIN = """
import fused_tdpo
policy, ref, labels = torch.randn(2, 3, 11, requires_grad=True), torch.randn(2, 3, 11), torch.randint(11, (2, 3))
fused_tdpo.TDPOLoss()(policy, ref, labels).loss.backward()
assert policy.grad.abs().sum() > 0
"""


def test_import_loads_little_beside_torch(site: Path):
    """Neither an optional package, nor our kernels, nor a large part of torch that `import torch` leaves alone."""
    new = probe(site, IMPORT, hidden=set())
    ours = {name for name in new if name.partition(".")[0] == "fused_tdpo"}
    assert not {name for name in ours if name.startswith("fused_tdpo.kernels.")}
    assert not {name for name in new - ours if name.partition(".")[0] not in sys.stdlib_module_names | {"torch"}}
    heavy = ("torch._dynamo", "torch._inductor", "torch.distributed", "torch.onnx", "torch.testing", "torch.utils.benchmark")
    assert not {name for name in new if name.startswith(heavy)}


@pytest.mark.parametrize("code", [IMPORT, TRAIN], ids=["import", "train on a CPU"])
def test_torch_alone_is_enough(site: Path, code: str):
    """Without Triton and every optional package the same statistics are computed, and training works."""
    assert {"triton", "numpy", "transformers"} <= OPTIONAL
    assert "fused_tdpo.kernels.token_stats" not in probe(site, code, hidden=OPTIONAL)
