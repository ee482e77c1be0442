"""pydantic's errors in people's words, each at its place in the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from isolator.control.problems import Problem
from isolator.control.yaml_source import Document, Path_


class Strict(BaseModel):
    """What all models of files share: no unknown key, no silent conversion, no change afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=False)


MEANT = {
    "to": "from",
    "from": "to",
    "method": "methods",
    "host": "hosts",
    "header": "headers",
    "rules": "ingress",
}
"""What people mean by a key that is right elsewhere."""

Model = TypeVar("Model", bound=BaseModel)


def validate(document: Document, model: type[Model]) -> tuple[Model | None, list[Problem]]:
    """The document as a model, or None and what is wrong with it (what its reading told is not repeated)."""
    try:
        return model.model_validate(document.value), []
    except ValidationError as error:
        return None, list(problems_of(error, document, model))


def problems_of(error: ValidationError, document: Document, model: type[BaseModel]) -> Iterator[Problem]:
    for detail in error.errors(include_url=False):
        path, in_key = path_of(detail["loc"])
        if not document.is_broken(path):
            at_key = in_key or detail["type"] == "extra_forbidden"
            yield document.problem(path, message_of(detail, path, model), at_key)


def path_of(location: tuple[int | str, ...]) -> tuple[Path_, bool]:
    """pydantic's location without its marker for an error in a mapping's key."""
    return (location[:-1], True) if location and location[-1] == "[key]" else (location, False)


def message_of(detail: ErrorDetails, path: Path_, model: type[BaseModel]) -> str:
    name = named(path)
    given, context = detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            return unknown_key(path, model)
        case "missing":
            return f"'{path[-1]}' is missing in {named(path[:-1])}: add it"
        case "string_type":
            return f"{name} is text, not {kind_of(given)}{quoting(given)}"
        case "int_type" | "int_from_float":
            return f"{name} is a whole number, not {kind_of(given)}: write one without quotes"
        case "bool_type":
            return f"{name} is true or false, not {kind_of(given)}"
        case "list_type":
            return f"{name} is a list, not {kind_of(given)}: write [...] or lines that begin with '- '"
        case "dict_type" | "model_type" | "model_attributes_type":
            return f"{name} is a mapping, not {kind_of(given)}: write {{key: value}} or lines of 'key: value'"
        case "literal_error":
            return unknown_word(name, given, str(context.get("expected", "")))
    return f"{name}: {detail['msg']}"


def named(path: Path_) -> str:
    """`ports[0].port`; the last three steps say enough beside the line."""
    steps = list(path[-4:])
    while steps and isinstance(steps[0], int):
        steps.pop(0)
    text = ""
    for step in steps:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return f"'{text.lstrip('.')}'" if text else "the document"


def kind_of(value: Any) -> str:
    match value:
        case bool():
            return f"the truth value {str(value).lower()}"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {value!r}"
        case Mapping():
            return "a mapping"
        case list():
            return "a list"
    return "nothing"


def quoting(given: Any) -> str:
    if isinstance(given, bool | int | float):
        return f': put it in quotes, "{str(given).lower() if isinstance(given, bool) else given}"'
    return ": write a single value"


def unknown_word(name: str, given: Any, expected: str) -> str:
    words = expected.replace(" or ", ", ").replace("'", "").replace("True", "true").split(", ")
    if len(words) == 1:
        return f"{name} cannot be {given!r}: write {words[0]}"
    near = get_close_matches(str(given).lower(), words, 1)
    hint = f"did you mean {near[0]}? It is one of" if near else "write one of"
    return f"{name} cannot be {given!r}: {hint} {', '.join(words)}"


def unknown_key(path: Path_, model: type[BaseModel]) -> str:
    known = known_keys(model, path[:-1])
    meant = MEANT.get(str(path[-1]))
    near = [meant] if meant in known else get_close_matches(str(path[-1]).lower(), known, 1)
    hint = f"did you mean '{near[0]}'? Known here" if near else "remove it; known here"
    return f"unknown key '{path[-1]}' in {named(path[:-1])}: {hint}: {', '.join(sorted(known))}"


def known_keys(model: type[BaseModel], path: Path_) -> list[str]:
    """The keys that the model has at a path, out of its JSON Schema."""
    schema = schema_of(model)
    places = resolved([schema], schema)
    for step in path:
        inner = [place.get("items", {}) if isinstance(step, int) else entry(place, step) for place in places]
        places = resolved(inner, schema)
    return [key for place in places for key in place.get("properties", {})]


def entry(place: dict[str, Any], key: str) -> dict[str, Any]:
    found = place.get("properties", {}).get(key) or place.get("additionalProperties")
    return found if isinstance(found, dict) else {}


@cache
def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema()


def resolved(places: Iterable[dict[str, Any]], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """References followed, alternatives laid side by side."""
    found = []
    for place in places:
        if reference := place.get("$ref"):
            found += resolved([schema["$defs"][reference.rsplit("/", 1)[-1]]], schema)
        elif alternatives := place.get("anyOf"):
            found += resolved(alternatives, schema)
        else:
            found.append(place)
    return found
