"""From whatever a user gives as a reward to a name and a function in TRL's calling form."""

import difflib
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from textgym.rewards.calling import RewardFunction, function_name
from textgym.rewards.classifier import HUB_ID, ClassifierReward, is_classifier
from textgym.rewards.episodes import excerpt
from textgym.rewards.named import canonical_name, make_reward, reward_names

_MODULE_FUNCTION = re.compile(r"[^:]+:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def listed_rewards(reward: Any) -> list[Any]:
    """Returns the rewards of a list, of a list that `"module:name"` names, or the one reward that was given."""
    reward = loaded_reward(reward)
    return list(reward) if isinstance(reward, list | tuple) else [reward]


def loaded_reward(reward: Any) -> Any:
    """Returns what `"module:name"` names, anything else as it is."""
    return load_reward(reward) if isinstance(reward, str) and _names_function(reward) else reward


def _names_function(reward: str) -> bool:
    named = canonical_name(reward.partition("?")[0]) is not None  # an option may hold a colon
    return not named and bool(_MODULE_FUNCTION.fullmatch(reward)) and not Path(reward).exists()


def resolve_reward(reward: Any) -> tuple[str, RewardFunction]:
    """Returns the name and the function of one reward, given in any form that `RewardSet.build` lists."""
    if isinstance(reward, str):
        return _resolve_string(reward)
    if isinstance(reward, os.PathLike):
        reward = ClassifierReward(reward)
    if isinstance(reward, type):
        raise ValueError(f"`reward` must be a function or an object, got the class {reward.__name__}; did you mean {reward.__name__}()?")
    if is_classifier(reward):
        reward = ClassifierReward(reward)
    score = getattr(reward, "score", None)
    if callable(score) and not hasattr(score, "forward"):  # a model's head may be called `score` too
        return function_name(reward), score
    if not callable(reward) or hasattr(reward, "forward"):  # a torch module is called with tensors, not with texts
        what = f"the torch module {type(reward).__name__}" if callable(reward) else f"{type(reward).__name__} {excerpt(reward)}"
        raise ValueError(
            "`reward` must be a function, a list of functions, the name of a reward, 'module:function', a sequence classifier "
            f"or an object with a method `score`, got {what}."
        )
    return function_name(reward), reward


def _resolve_string(reward: str) -> tuple[str, RewardFunction]:
    path = Path(reward)
    if _names_function(reward):
        return resolve_reward(load_reward(reward))
    name = canonical_name(reward.partition("?")[0])
    # A folder is shadowed by a name only if that is exactly its own: './length' is the folder.
    if name is not None and (name == reward or not path.is_dir()):
        return name, make_reward(reward)
    if path.is_dir() or HUB_ID.fullmatch(reward):
        return resolve_reward(ClassifierReward(reward))
    raise ValueError(
        f"`reward` must be the name of a reward ({', '.join(reward_names())}), 'module:function', 'file.py:function', or the folder "
        f"(or hub id) of a sequence classifier, got {reward!r}.{_hint(reward, path)}"
    )


def _hint(reward: str, path: Path) -> str:
    if path.suffix == ".py" and path.is_file():
        return f" To use a function of this file: '{reward}:name_of_the_function'."
    close = difflib.get_close_matches(reward.partition("?")[0].lower(), reward_names(), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def load_reward(spec: str) -> Any:
    """Loads the object that `"module:function"` (or `"path/to/file.py:function"`) names.

    A module is looked for on Python's path and in the current folder.

    Args:
        spec: module and object with a colon between them; the object may be an attribute of another (`"module:rewards.first"`).
    """
    if not isinstance(spec, str) or not _MODULE_FUNCTION.fullmatch(spec):
        raise ValueError(f"a reward must be given as 'module:function' or 'file.py:function', got {spec!r}.")
    module_name, _, path = spec.rpartition(":")
    found: Any = _load_file(module_name) if module_name.endswith(".py") else _load_module(module_name)
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            close = difflib.get_close_matches(attribute, dir(found), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"reward {spec!r}: {module_name!r} has no {attribute!r}.{hint}")
        found = getattr(found, attribute)
    return found


def _load_module(name: str) -> ModuleType:
    # the `textgym` command, unlike `python -m`, does not have the current folder on its path
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        raise ValueError(f"reward: there is no module {name!r} on Python's path or in {os.getcwd()}.") from None


def _load_file(path: str) -> ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        raise ValueError(f"reward: there is no file {path!r}.")
    loaded = sys.modules.get(file.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(file):
        return loaded
    if loaded is not None:
        raise ValueError(f"reward: a module named {file.stem!r} is loaded already, from another file; rename {path!r}.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"reward: {path!r} cannot be loaded as a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # so that what it defines can be pickled
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.stem]
        raise
    return module
