"""The layers of the house: imports point downwards, there are no circles, and what must stay light stays light."""

import ast
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {"textgym": ROOT / "textgym", "textgym.envs": ROOT / "envs", "textgym.agents": ROOT / "agents"}

# The first prefix that fits gives a module's layer; a module may import from lower layers, and from its own.
LAYERS = [
    ("textgym.types", 0),
    ("textgym.errors", 0),
    ("textgym.pending", 0),
    ("textgym.alignment", 0),
    ("textgym.tokenizers", 1),
    ("textgym.end_tokens", 1),
    ("textgym.rows", 1),
    ("textgym.unknown_tokens", 1),
    ("textgym.conversations", 1),
    ("textgym.encoding", 1),
    ("textgym.prompts", 1),
    ("textgym.rewards", 1),
    ("textgym.bundled", 1),
    ("textgym.cli", 4),
    ("textgym.envs", 3),
    ("textgym.agents", 3),
    ("textgym.", 2),  # wrappers, step_sequence and what they share, exact, kl
]
# `textgym/__init__.py` gathers what users call; it may load the environments, whose ids it registers, and nothing above.
ROOT_MODULE, ROOT_LAYER = "textgym", 3

# Scripts that make data which ships; nothing but each other may import them, and they may use what they like.
BUILD_SCRIPTS = {"textgym.bundled.build", "textgym.bundled.build_reward_model"}


def module_files() -> dict[str, Path]:
    files = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            files[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return files


FILES = module_files()


def imports_of(module: str, *, at_import_only: bool) -> set[str]:
    """The modules of this project that `module` imports; those under `TYPE_CHECKING` do not count.

    Args:
        module: the name of the module.
        at_import_only: leave out imports inside functions, which run later.
    """
    found = set()
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in _walk(ast.parse(FILES[module].read_text(encoding="utf-8")), at_import_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *([base] if base else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else base for name in names}
    return {name for name in found if name in FILES and name != module}


def _walk(tree: ast.AST, at_import_only: bool) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if at_import_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        nodes += [child, *_walk(child, at_import_only)]
    return nodes


def layer(module: str) -> int:
    if module == ROOT_MODULE:
        return ROOT_LAYER
    return next(number for prefix, number in LAYERS if module == prefix or module.startswith(prefix.rstrip(".") + "."))


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_downwards(module: str) -> None:
    if module in BUILD_SCRIPTS:
        pytest.skip("a script that nothing imports")
    for imported in imports_of(module, at_import_only=False) - {ROOT_MODULE}:
        assert layer(imported) <= layer(module), f"{module} imports {imported}, which stands above it"
        sides = {name.split(".")[1] for name in (module, imported) if name.startswith(("textgym.envs", "textgym.agents"))}
        assert sides != {"envs", "agents"}, f"{module} imports {imported}: environments and agents do not know each other"


def test_nothing_below_the_command_line_imports_the_root() -> None:
    """The root loads most of the house; a leaf that imports it makes a circle."""
    for module in FILES:
        if layer(module) < 4 and module not in BUILD_SCRIPTS:
            assert ROOT_MODULE not in imports_of(module, at_import_only=True), f"{module} imports textgym itself"


def test_there_are_no_circles() -> None:
    graph = {module: imports_of(module, at_import_only=True) for module in FILES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def test_build_scripts_are_not_imported() -> None:
    for module in FILES.keys() - BUILD_SCRIPTS:
        assert not imports_of(module, at_import_only=False) & BUILD_SCRIPTS


@pytest.mark.parametrize("folder", ["textgym", "envs", "agents", "tests", "examples", "benchmarks"])
def test_nobody_imports_the_top_level_folders(folder: str) -> None:
    """`import agents` works from the repository root and gives second, different classes."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] not in {"agents", "envs"}, f"{path} imports {name}; write textgym.{name}"


def test_every_package_is_listed() -> None:
    """One that is not works in an editable install and is absent from the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(name for name, path in FILES.items() if path.name == "__init__.py")
    assert settings["package-dir"] == {name: str(path.relative_to(ROOT)) for name, path in SOURCES.items()}


def test_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


# Modules below the agents that need torch as they are imported; nothing that `import textgym` loads may import them.
TORCH_MODULES = {"textgym.vec_env_adapter", "textgym.exact.certification", "textgym.exact.gradients", "textgym.exact.models"}


@pytest.mark.parametrize("module", sorted(name for name in FILES if not name.startswith("textgym.agents") and layer(name) < 4))
def test_modules_import_nothing_heavy(module: str) -> None:
    """What the environments are made of loads torch, transformers and Stable-Baselines3 only when it needs them."""
    if module in BUILD_SCRIPTS | TORCH_MODULES:
        pytest.skip("needs torch as it is imported")
    nodes = _walk(ast.parse(FILES[module].read_text(encoding="utf-8")), at_import_only=True)
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    assert not {name.split(".")[0] for name in names} & {"torch", "transformers", "stable_baselines3"}
    assert not imports_of(module, at_import_only=True) & TORCH_MODULES


def test_the_root_loads_without_torch() -> None:
    code = "import sys, textgym; assert not {'torch', 'transformers', 'stable_baselines3'} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
