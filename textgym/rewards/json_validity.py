"""Whether a completion is valid JSON, with the keys or of the schema that are asked for."""

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from textgym.rewards.calling import NamedReward
from textgym.rewards.episodes import Prompt, completion_text
from textgym.rewards.references import require_package

_WHITE_SPACE = " \t\r\n"  # RFC 8259 knows no other


class JsonReward(NamedReward):
    """Rewards completions that are valid JSON (RFC 8259): `NaN` and `Infinity`, which Python would read, are not.

    Args:
        required: keys that the completion, an object then, must have.
        schema: a JSON schema that it must fulfil, as a mapping or as the path of a file; needs the package jsonschema.
        valid: the reward where it does.
        invalid: the reward where it does not.
        fenced: also take a completion that is one fenced block of Markdown (three backticks, or three and `json`).

    Raises:
        ValueError: the schema is none, or has a `$ref` to what is not in it; nothing is downloaded.
        ImportError: a schema is given and jsonschema is not installed.
    """

    def __init__(
        self,
        required: Sequence[str] = (),
        *,
        schema: Mapping[str, Any] | str | PathLike[str] | None = None,
        valid: float = 1.0,
        invalid: float = 0.0,
        fenced: bool = False,
    ) -> None:
        if isinstance(required, str):
            raise ValueError(f"`required` must be a list of keys, got the string {required!r}; did you mean [{required!r}]?")
        self.required, self.valid, self.invalid, self.fenced = tuple(required), float(valid), float(invalid), fenced
        self._validator = None if schema is None else _validator(schema)

    def __call__(self, completions: Sequence[Prompt], **columns: Any) -> list[float]:
        """Returns `valid` or `invalid` for each completion."""
        return [self.valid if self._holds(completion_text(completion).strip(_WHITE_SPACE)) else self.invalid for completion in completions]

    def _holds(self, text: str) -> bool:
        if self.fenced and text.startswith("```") and text.endswith("```") and "\n" in text:
            opening, _, text = text[:-3].partition("\n")
            if opening.rstrip(_WHITE_SPACE).lower() not in ("```", "```json"):
                return False
        try:
            value = json.loads(text, parse_constant=_refuse, parse_int=_integer)
            if self.required and not (isinstance(value, dict) and all(key in value for key in self.required)):
                return False
            return self._validator is None or bool(self._validator.is_valid(value))
        except (ValueError, RecursionError, OverflowError):  # a long run of "[" is deeper than Python's stack
            return False


def _integer(digits: str) -> int:
    return int(Decimal(digits))  # `int` refuses more than 4,300 digits of a text


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _validator(schema: Mapping[str, Any] | str | PathLike[str]) -> Any:
    """Returns jsonschema's validator of a schema, after checking that it is one."""
    require_package("jsonschema", "jsonschema", "json", extra=None)
    import jsonschema

    document: Any = schema
    if not isinstance(schema, Mapping):
        try:
            document = json.loads(Path(schema).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"`schema` must be a JSON schema or a file with one, and {schema} cannot be read: {error}.") from error
    cls = jsonschema.validators.validator_for(document)
    try:
        cls.check_schema(document)
    except jsonschema.SchemaError as error:
        raise ValueError(f"`schema` must be a JSON schema: {error.message}.") from error
    return cls(document, registry=_checked_registry(document, cls.META_SCHEMA))


def _checked_registry(schema: Any, meta_schema: Mapping[str, Any]) -> Any:
    """Returns a registry that downloads nothing, after following every reference of `schema`."""
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import specification_with

    specification = specification_with(str(meta_schema.get("$schema", meta_schema.get("$id", ""))))
    resource = specification.create_resource(schema)
    places, seen = [(REGISTRY.resolver_with_root(resource), resource)], set()
    while places:
        resolver, resource = places.pop()
        if id(resource.contents) in seen:
            continue
        seen.add(id(resource.contents))
        places += [(resolver.in_subresource(part), part) for part in resource.subresources()]
        reference = resource.contents.get("$ref") if isinstance(resource.contents, Mapping) else None
        if isinstance(reference, str):
            try:
                found = resolver.lookup(reference)
            except Unresolvable as error:
                raise ValueError(
                    f"`schema` must hold everything that it refers to; nothing is there for the `$ref` {reference!r}."
                ) from error
            places.append((found.resolver, specification.create_resource(found.contents)))
    return REGISTRY
