"""From Python to the command line: messages of the library, in whose words a user can type what they ask for.

The library speaks of arguments in backticks: "pass `max_tokens=512` to leave out what is longer". Somebody at the command line has options
and `--set`. Each message is translated once, where it is printed (`textgym.cli.errors`): "pass --set max_tokens=512 ...".
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

_QUOTED = r"""(?<![\w`])'(?:[^'\\]|\\.)*'(?!\w)|(?<![\w`])"(?:[^"\\]|\\.)*"(?!\w)"""
_SPAN = re.compile(rf"`[^`\n]*`|{_QUOTED}")
_ARGUMENT = re.compile(r"`([A-Za-z_]\w*)(?:(=)([^`]*))?`")
_GIVEN = "path|name|source|model|reward|prompts|examples|preferences|feedback|judge|annotator|tokenizer"  # what one option gives
_AGAIN = re.compile(rf"^(--[\w-]+(?: \S+)?|FILES): `(?:{_GIVEN})`(:?) ")
# Arguments whose options have other names.
_TYPED_AS = {"n_epochs": "epochs", "examples": "preferences", "num_rows": "num_envs", "on_bad_row": "keep_good", "records": "feedback"}
_WORDS = {"policy": "the model", "env": "the environment", "envs": "the environments", "reward_model": "the reward model"}


@dataclass(frozen=True)
class Vocabulary:
    """What can be typed.

    Attributes:
        options: of the running command, by the name of their parameter: how each is typed.
        switches: those options that take no value: how each is switched off; "" where it cannot be.
        settable: names of arguments that `--set NAME=VALUE` reaches, with the option that does.
        rewards: options of the rewards that were given, with the name of the reward.
        commands: of `textgym`.
    """

    options: dict[str, str] = field(default_factory=dict)
    switches: dict[str, str] = field(default_factory=dict)
    settable: dict[str, str] = field(default_factory=dict)
    rewards: dict[str, str] = field(default_factory=dict)
    commands: frozenset[str] = frozenset()

    def typed(self, name: str, value: str | None = None, *, has_value: bool = False) -> str | None:
        """Returns how the argument `name` is typed, with a value if there is one; None if it cannot be typed."""
        if name not in self.options and _TYPED_AS.get(name) in self.options:
            name = _TYPED_AS[name]
        if name in self.switches:
            return self.options[name] if value != "False" else self.switches[name] or f"no {self.options[name]}"
        if name in self.options:
            return f"{self.options[name]} {_plain(value)}" if value else self.options[name]
        if name in self.settable:
            return f"{self.settable[name]} {name}={_plain(value) if value else '...'}"
        if name in self.rewards and has_value:
            return f"'{self.rewards[name]}?{name}={_plain(value) if value else '...'}'"
        return None


def _plain(value: str) -> str:
    """Returns a value of Python as it is typed."""
    words = {"True": "true", "False": "false", "None": "null"}
    return words.get(value, value.strip("'\""))


def _keep_good(vocabulary: Vocabulary) -> str:
    return "Mend them, or give --keep-good to leave them out." if "keep_good" in vocabulary.options else "Mend them."


def _convert(vocabulary: Vocabulary) -> str:
    return "make them so with textgym convert" if "convert" in vocabulary.commands else "turn them into that form first"


def _rename(vocabulary: Vocabulary) -> str:
    return " See --rename and --form." if "rename" in vocabulary.options else " Rename their columns."


def _rename_columns(vocabulary: Vocabulary) -> str:
    if "rename" in vocabulary.options or "convert" not in vocabulary.commands:
        return "; rename those that hold them"
    return "; textgym convert --rename OLD=NEW renames those that hold them"


def _schedules(vocabulary: Vocabulary) -> str:
    return " A schedule is taken too: linear:START:END." if "learning_rate" in vocabulary.options else ""


Phrase = str | Callable[[Vocabulary], str]
# What has no option: said in words, or left away where it is Python's affair.
_PHRASES: tuple[tuple[str, Phrase], ...] = (
    (r"; pass (?:a list of strings|the path of a|a list of dicts)[^.]*(?:\.jsonl[^.]*)*\.?$", "."),
    (r"\bMend them, or pass `on_bad_row='keep_good'` to leave them out\.", _keep_good),
    (r"(?<=None is left); see `rename=` and `form=`\.", lambda known: "." + _rename(known)),
    (r"(?:read them with `read_feedback` and )?pass `textgym\.feedback\.to_\w+\(records\)`", _convert),
    (r"; pass one \w+ as a list, `\[\.\.\.\]`", ""),
    (r"; rename those that hold them(?=\.$)", _rename_columns),
    (r" Make one with `[^`]+`\.", ""),
    (r" Make the environment with `tokenizer=policy\.tokenizer`\.", ""),
    (r", or make_reward\([^)]*\)", ""),
    (r"(?<=needs )`\w+`: ", ""),
    (r"`?ClassifierReward\(model, label=\.\.\.\)`?", "'classifier?model=...&label=...'"),
    (r"; `score_texts` takes `completion_ids=` too", ": take another reward for texts alone"),
    (r" A function of the progress remaining \(1 → 0\) is taken too\.", _schedules),
    (
        r"a schedule \(a callable of the remaining progress\) that returns one, or an `AdaptiveKLController`",
        "a schedule or adaptive:TARGET",
    ),
    (r" \(also to `load`\)", ""),
    (r" To train on those, load without and call `connect`\.", " Start a new run with those."),
    (r" A checkpoint does not hold them: pass them to `load` again\.", ""),
    (
        r"set `tokenizer\.chat_template` or give the prompt as a string",
        "take a model whose tokenizer has one, or give the prompt as a string",
    ),
    (r"; load one with \w+\.from_pretrained", ""),
    (r" \(`len\(tokenizer\) - 1`\)", ""),
    (r" Use `CachedEngine`[^.]*\.", ""),
    (r"(?<=reached from here\.) `tokenizer` must be a transformers tokenizer or the path or id of one, got [^:]*:", ""),
)


def translated(text: str, vocabulary: Vocabulary) -> str:
    """Returns a message of the library in the words of the command line; what the user wrote, in quotes, stays as it is.

    An argument becomes the option that gives it (`max_new_tokens` → --max-new-tokens, `truncate_prompts=True` → --truncate-prompts), or
    what is typed to set it (`max_tokens=512` → --set max_tokens=512), or, of a reward, a part of its name
    (`column=` → 'rouge-l?column=...').
    """
    kept: list[str] = []

    def hide(match: re.Match[str]) -> str:
        if match.group().startswith("`"):
            return match.group()
        kept.append(match.group())
        return f"\0{len(kept) - 1}\0"

    text = _SPAN.sub(hide, text)
    text = _AGAIN.sub(lambda match: f"{match[1]}{match[2]} ", text)
    for pattern, phrase in _PHRASES:
        words = phrase if isinstance(phrase, str) else phrase(vocabulary)
        text = re.sub(pattern, words.replace("\\", "\\\\"), text)
    text = re.sub(r"(\breward )?" + _ARGUMENT.pattern, lambda match: _argument(match, vocabulary), text)
    return re.sub("\0(\\d+)\0", lambda match: kept[int(match[1])], text)


def _argument(match: re.Match[str], vocabulary: Vocabulary) -> str:
    before, name, equals, value = match.groups()
    if before:  # "reward `mine` returned ...": a name that the user gave
        return match.group()
    found = vocabulary.typed(name, value or None, has_value=bool(equals))
    if found is None and not equals:
        found = _WORDS.get(name)
    return match.group() if found is None else found


def vocabulary_of(context: Any) -> Vocabulary:
    """Returns what can be typed for the command that runs in a context of typer's; nothing without one."""
    if context is None:
        return Vocabulary()
    parameters = [one for one in context.command.params if one.name and one.param_type_name == "option"]
    options = {one.name.rstrip("_"): max(one.opts, key=len) for one in parameters}
    switches = {one.name.rstrip("_"): next(iter(one.secondary_opts), "") for one in parameters if one.is_flag}
    commands = frozenset(getattr(context.find_root().command, "commands", {}))
    settable = dict(_settable(context))
    rewards = dict(_reward_options(context.params))
    return Vocabulary(options, switches, settable, rewards, commands)


def _settable(context: Any) -> Iterable[tuple[str, str]]:
    """Yields the arguments that `--set` (of a pipeline also `--set-reward-model`) reaches, with that option."""
    from textgym.cli.algorithms import ALGORITHMS, REWARD, SFT

    command = context.command.name
    algorithm = {"sft": SFT, "reward": REWARD}.get(command) or context.params.get("algorithm")
    if "set_" not in context.params or algorithm is None:
        return
    from textgym import agents
    from textgym.agents.common.options import arguments_of
    from textgym.cli.arguments import RESERVED

    trainer = "RewardModelTrainer"
    if "set_reward_model" in context.params:
        yield from ((name, "--set-reward-model") for name in arguments_of(getattr(agents, trainer)) if name not in RESERVED)
    kind = trainer if algorithm == REWARD else ALGORITHMS[str(algorithm)].class_name
    yield from ((name, "--set") for name in arguments_of(getattr(agents, kind)) if name not in RESERVED)


def _reward_options(given: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Yields the options of the ready-made rewards that were given."""
    from textgym.rewards.named import canonical_name, reward_options

    for parameter in ("annotator", "by", "true_reward", "reward"):
        specs = given.get(parameter) or ()
        for spec in (specs,) if isinstance(specs, str) else specs:
            name = canonical_name(str(spec).partition("?")[0])
            if name is not None:
                yield from ((one, name) for one in reward_options(name))
