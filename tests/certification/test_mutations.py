"""Every deliberate mistake in `mutations.py` is caught by the test it names."""

import importlib
import importlib.util
import inspect
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TESTS = Path(__file__).parent.parent


@cache
def load(path: str) -> ModuleType:
    """Imports a file of the suite; it has no name to import it by."""
    name = "mutation_checks." + path.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, TESTS / path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutations = load("certification/mutations.py")


def run_check(check: str, device: str) -> None:
    """Calls the test that a mutation names, with the values that pytest would give its parameters."""
    file, test, ids = re.fullmatch(r"(.*?)::(\w+)(?:\[(.*)\])?", check).groups()  # type: ignore[union-attr]
    module = load(file)
    function = getattr(module, test)
    arguments = chosen_parameters(module, function, ids)
    if "device" in inspect.signature(function).parameters:
        arguments["device"] = device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # wrong code may warn before it fails
        function(**arguments)


def chosen_parameters(module: ModuleType, function: Callable[..., Any], ids: str | None) -> dict[str, Any]:
    """The parameters whose ids, joined by dashes, are `ids`: those of a fixture first, then those of the marks."""
    choices: dict[str, dict[str, Any]] = {}
    for name in inspect.signature(function).parameters:
        marker = getattr(getattr(module, name, None), "_fixture_function_marker", None)
        if marker is not None:
            choices[name] = dict(zip(marker.ids or map(str, marker.params), marker.params, strict=True))
    for mark in (mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"):
        choices[mark.args[0]] = {str(value): value for value in mark.args[1]}
    wanted, arguments = ids or "", {}
    for name, values in choices.items():
        found = [key for key in values if wanted == key or wanted.startswith(f"{key}-")]
        assert found, f"{ids} names no value of {name}, which has {list(values)}"
        key = max(found, key=len)
        arguments[name], wanted = values[key], wanted[len(key) + 1 :]
    assert not wanted, f"{wanted} is left over"
    return arguments


@contextmanager
def applied(mutation: Any) -> Iterator[None]:
    """Puts the mutated function in the place of the right one, wherever it is held."""
    module_name, path = mutation.target.split(":")
    module = importlib.import_module(module_name)
    *owners, name = path.split(".")
    if owners:
        holders = [(getattr(module, owners[0]), name)]
        original = vars(holders[0][0])[name]
    else:
        original = getattr(module, name)
        named = [m for key, m in list(sys.modules.items()) if key.startswith(("textgym", "mutation_checks"))]
        holders = [(m, key) for m in named for key, value in list(vars(m).items()) if value is original]
    mutant = recompiled(mutation, module, original, getattr(module, owners[0]) if owners else None)
    try:
        for holder, key in holders:
            setattr(holder, key, mutant)
        yield
    finally:
        for holder, key in holders:
            setattr(holder, key, original)


def recompiled(mutation: Any, module: ModuleType, original: Any, owner: type | None) -> Any:
    function = original.fget if isinstance(original, property) else original
    source = textwrap.dedent(inspect.getsource(function))
    found = source.count(mutation.find)
    assert found == 1, f"{mutation.find!r} must be in {mutation.target} exactly once, it is there {found} times: rewrite the mutation"
    source = source.replace(mutation.find, mutation.replace)
    name = mutation.target.rpartition(":")[2].rpartition(".")[2]
    # Inside a function with a variable `__class__`, so that `super()` works in methods.
    factory = f"def make(__class__):\n{textwrap.indent(source, '    ')}\n    return {name}\n"
    scope: dict[str, Any] = {}
    exec(compile(factory, f"<{mutation.name}>", "exec"), vars(module), scope)
    return scope["make"](owner)


def test_there_are_enough_and_no_name_twice() -> None:
    names = [mutation.name for mutation in mutations.MUTATIONS]
    assert len(names) >= 40
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("check", sorted({mutation.check for mutation in mutations.MUTATIONS}), ids=str)
def test_checks_pass_on_the_right_code(check: str, device: str) -> None:
    run_check(check, device)


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_mistake_is_caught(mutation: Any, device: str) -> None:
    load(mutation.check.partition("::")[0])  # before the mutation, which replaces what the test imported too
    with applied(mutation):
        try:
            run_check(mutation.check, device)
        except mutation.raises:
            return
    pytest.fail(f"{mutation.check} passes although: {mutation.name}")
