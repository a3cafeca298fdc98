"""The shape of the project: who imports whom, what is lazy, what the wheel holds, and that ARCHITECTURE.md is true."""

from __future__ import annotations

import ast
import email
import importlib.util
import logging
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = ROOT / "zimage_core"
NODES = ROOT / "nodes"
DEMO_LIMIT, CONTROLNET_LIMIT = 18 * 2**20, 4 * 2**20
BF16_LIMIT = 32 * 2**20

# Package, or module outside of one -> what it may import beside itself. Everything points down.
MAY_IMPORT = {
    "sizes": set(),
    "whole": set(),
    "metadata": {""},
    "failures": set(),
    "linear": {"sizes"},
    "models": {"failures", "linear", "sizes"},
    "trial": {"linear", "models"},
    "clock": set(),
    "tune": {"", "clock", "linear", "models", "trial"},
    "formats": {"failures", "linear", "models", "sizes", "tune"},
    "lora": {"formats", "linear", "models"},
    "sampler": {"failures", "models"},
    "tiles": {"models"},
    "variety": {"failures"},
    "pictures": {"failures", "formats", "models", "sizes"},
    "memory": {"formats", "linear", "models", "sampler", "sizes", "tiles"},
    "captions": {"lora", "models"},
    "demo": set(),
    "hub": {"failures", "formats", "models", "sizes", "whole"},
    "quantize": {"", "failures", "formats", "linear", "lora", "memory", "models", "sampler", "sizes", "whole"},
    "device": set(),
    "recorder": set(),
    "files": {"demo", "formats", "hub", "models"},
    "control": {"failures", "formats", "models", "pictures", "sizes"},
    "sources": {"files", "formats", "models"},
    "job": {
        "captions",
        "control",
        "failures",
        "linear",
        "lora",
        "memory",
        "models",
        "recorder",
        "sampler",
        "sizes",
        "tiles",
        "variety",
    },
    "residents": {"control", "device", "failures", "formats", "job", "lora", "memory", "models", "sampler", "sources"},
    "pipeline": {
        "captions",
        "control",
        "demo",
        "device",
        "failures",
        "files",
        "formats",
        "job",
        "linear",
        "lora",
        "memory",
        "models",
        "pictures",
        "recorder",
        "residents",
        "sampler",
        "sizes",
        "sources",
        "tune",
        "variety",
    },
    "notation": set(),
    "batch": {
        "",
        "control",
        "device",
        "files",
        "formats",
        "linear",
        "lora",
        "memory",
        "metadata",
        "notation",
        "pictures",
        "pipeline",
        "sizes",
        "tune",
        "whole",
    },
    "report": {"", "clock", "device", "linear", "sizes", "tune"},
    "bench": {"clock", "device", "report", "formats", "linear", "memory", "models", "sampler", "sizes", "trial"},
    "compare": set(),
    "verify": {"bench", "report", "formats", "linear", "models", "pipeline"},
    "cli": {
        "",
        "batch",
        "bench",
        "verify",
        "compare",
        "control",
        "demo",
        "device",
        "failures",
        "formats",
        "hub",
        "linear",
        "lora",
        "memory",
        "metadata",
        "models",
        "notation",
        "pictures",
        "pipeline",
        "quantize",
        "sizes",
        "tune",
        "whole",
        "variety",
    },
    "__main__": {"cli"},
    "": set(),
}


# Functions of more than 60 lines, and why.
LONG = {
    "zimage_core/pipeline.py __call__": "38 lines of arguments, diffusers' and ours, and what each means",
    "zimage_core/cli/generate.py add_parser": "a list of options, in the order in which --help shows them",
}


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def module_name(path: Path) -> str:
    """zimage_core/backends/__init__.py -> "backends"; the package itself is ""."""
    parts = path.relative_to(CORE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """The modules of zimage_core that a file imports, at the top or inside functions, but not for type hints only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hints = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = {id(n) for block in hints for n in ast.walk(block)}
    found = set()
    package = path.relative_to(CORE).parent.parts
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or id(node) in skipped:
            continue
        base = ".".join(package[: len(package) + 1 - node.level])
        target = ".".join(filter(None, (base, node.module)))
        for alias in node.names:
            inner = ".".join(filter(None, (target, alias.name)))
            is_module = (CORE / f"{inner.replace('.', '/')}.py").exists() or (CORE / inner.replace(".", "/")).is_dir()
            found.add(inner if is_module else target)
    return found


def package(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("path", sources(CORE), ids=lambda path: str(path.relative_to(CORE)))
def test_imports_point_down(path):
    own = package(module_name(path))
    assert own in MAY_IMPORT, f"{own} is new: give it a row in MAY_IMPORT and in ARCHITECTURE.md"
    upward = {name for name in map(package, imported(path)) if name not in MAY_IMPORT[own] | {own}}
    assert not upward, f"{path.relative_to(CORE)} may not import {sorted(upward)}"


def test_the_table_itself_has_no_cycle():
    """Sorting by imports must succeed, so the table cannot be loosened into a circle."""
    import graphlib

    assert list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())


@pytest.mark.parametrize("path", sources(CORE) + sources(NODES), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_pack_imports_itself_relatively(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
        tops = {name.partition(".")[0] for name in names}
        assert not tops & {"zimage_core", "nodes"}, f"line {node.lineno}: {names}"
        if NODES / "host" not in path.parents:
            assert not tops & {"comfy", "folder_paths", "server", "latent_preview", "comfy_extras"}, names


@pytest.mark.parametrize("path", sources(ROOT / "tests" / "unit") + sources(ROOT / "tests" / "oracle"), ids=str)
def test_no_test_imports_the_nodes_by_name(path):
    """ComfyUI has a module called nodes (tests/host imports that one); ours is loaded with the root, by path."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.partition(".")[0] == "nodes" for alias in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module.partition(".")[0] != "nodes"


def test_importing_the_package_and_its_command_line_leaves_torch_alone():
    code = "import sys, zimage_core, zimage_core.cli, zimage_core.formats.load; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["formats", "linear", "lora", "memory", "models", "quantize"])
def test_a_folder_says_in_a_few_lines_what_it_may_import(name):
    said = ast.get_docstring(ast.parse((CORE / name / "__init__.py").read_text(encoding="utf-8")))
    assert len(said.splitlines()) <= 5
    assert set(re.findall(r"`(\w+)`", said.partition("May import")[2])) == MAY_IMPORT[name] - {""}


@pytest.mark.parametrize("path", sources(CORE) + sources(NODES), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short_enough_to_read(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 420, "cut the file where a reader would"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
            assert f"{path.relative_to(ROOT).as_posix()} {node.name}" in LONG, f"{node.name}: cut it, or give a reason"


def load_root(root: Path):
    """Load a node pack's root as ComfyUI does: by path, under a name of its own."""
    name = f"pack_{abs(hash(root))}"
    init = root / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(root)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_root_is_lazy():
    root = load_root(ROOT)
    assert f"{root.__name__}.nodes" not in sys.modules
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        root.nothing  # noqa: B018


def test_root_turns_an_import_failure_into_an_attribute_error(tmp_path, caplog):
    shutil.copy(ROOT / "__init__.py", tmp_path)
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "__init__.py").write_text("import a_module_that_is_not_there\n")
    root = load_root(tmp_path)
    with caplog.at_level(logging.ERROR):
        assert not hasattr(root, "NODE_CLASS_MAPPINGS")
    assert "a_module_that_is_not_there" in caplog.text


def test_architecture_names_every_module_and_nothing_else():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    modules = {str(path.relative_to(ROOT)) for path in sources(CORE) + sources(NODES)}
    named = set(re.findall(r"`((?:zimage_core|nodes)/[\w/]+\.py)`", text))
    assert named == modules


def test_the_wheel_holds_the_core_and_says_what_it_needs(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(CORE, copy / "zimage_core", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "nodes", copy / "nodes")
    shutil.copytree(ROOT / "tests" / "data" / "linear", copy / "tests")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "__init__.py"):
        shutil.copy(ROOT / name, copy)
    code = "import setuptools.build_meta as b; print(b.build_wheel('..'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        info = {name.partition(".dist-info/")[2]: name for name in wheel.namelist() if ".dist-info/" in name}
        said = email.message_from_bytes(wheel.read(info["METADATA"]))
        entry_points = wheel.read(info["entry_points.txt"]).decode()
    package = copy / "zimage_core"
    files = {p for p in package.rglob("*") if p.suffix in (".py", ".typed", ".safetensors", ".json")}
    assert held == {path.relative_to(copy).as_posix() for path in files} and "zimage_core/py.typed" in held
    assert (said["Name"], said["Requires-Python"]) == ("zimage-int4", ">=3.10")
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Version"] == importlib.import_module("zimage_core").__version__
    assert {"licenses/LICENSE", "licenses/NOTICE"} <= info.keys()
    assert "zimage = zimage_core.cli:main" in entry_points
    required = {text for text in said.get_all("Requires-Dist", []) if ";" not in text}
    assert required == set(PROJECT["dependencies"])
    torch = [text for text in required if text.startswith("torch")]
    assert torch == ["torch>=2.4"], "a floor and nothing else: installing may not replace a torch that works"


def test_demo_sizes():
    shipped = [path for path in (CORE / "demo").rglob("*") if path.suffix != ".py" and path.is_file()]
    controlnet = (CORE / "demo" / "controlnet.safetensors").stat().st_size
    assert controlnet <= CONTROLNET_LIMIT
    assert sum(path.stat().st_size for path in shipped) - controlnet <= DEMO_LIMIT
    sources_of_demo = list((ROOT / "demo_training").rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in sources_of_demo) <= BF16_LIMIT


def test_versions_agree():
    import zimage_core

    assert PROJECT["version"] == zimage_core.__version__
    assert f"## {zimage_core.__version__.partition('.dev')[0]}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_requirements_are_those_of_the_project_without_torch():
    """ComfyUI's manager reads requirements.txt; it must name what pyproject.toml does, and leave torch alone."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = {line for line in lines if not line.startswith("#")}
    assert listed == set(PROJECT["dependencies"]) - {"torch>=2.4"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    """Triton comes with torch; comfy-kitchen comes with ComfyUI; nunchaku's engine is not on PyPI."""
    named = {"PIL": "pillow", "cv2": "opencv-python-headless", "websocket": "websocket-client"}
    found = set()
    for node in (node for path in sources(CORE) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
        found |= {named.get(top, top) for top in (name.partition(".")[0] for name in names)}
    extras = [PROJECT["optional-dependencies"][name] for name in ("gguf", "canny", "arrow", "ray", "comfyui-client")]
    declared = {re.split(r"[<>=;\[ ]", text)[0] for text in sum(extras, PROJECT["dependencies"])}
    assert found - set(sys.stdlib_module_names) == declared | {"triton", "comfy_kitchen", "nunchaku"}
