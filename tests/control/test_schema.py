"""The JSON Schema says what the models say."""

from __future__ import annotations

import json
from typing import Any

from isolator.control.schema import policy_schema


def test_schema() -> None:
    schema = policy_schema()
    text = json.dumps(schema)
    assert schema["$schema"].endswith("2020-12/schema")
    assert schema["required"] == ["kind", "metadata", "spec"]
    assert '"null"' not in text  # in a file nothing may be null
    spec = schema["$defs"]["SpecModel"]["properties"]
    assert spec["mode"]["enum"] == ["protect", "monitor"]
    assert spec["select"]["additionalProperties"] == {"type": "string"}
    assert set(schema["$defs"]["IngressModel"]["properties"]) == {"name", "from", "ports", "action", "http"}
    assert set(schema["$defs"]["PeerModel"]["properties"]) == {"select", "cidr", "except", "world"}
    port = schema["$defs"]["PortModel"]["properties"]["port"]
    assert (port["type"], port["minimum"], port["maximum"]) == ("integer", 1, 65535)


def test_nothing_unknown_is_let_in() -> None:
    for name, model in models(policy_schema()):
        assert model["additionalProperties"] is False, name


def models(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [("policy", schema), *((name, each) for name, each in schema["$defs"].items())]
