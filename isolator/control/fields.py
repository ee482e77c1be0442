"""The single values of config and policy files: what each may be, and what to say if it is not.

Each type here checks one value by itself; what several values must be together stands in `findings.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv6Network, ip_address, ip_network
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from isolator.core.pattern import HostPattern, PathPattern, PatternError
from isolator.core.policy import Network

NAME_MAX = 63
LABEL_KEY_MAX = 317  # a DNS name, a slash and a name of 63, as Kubernetes has it
LABEL_VALUE_MAX = 253
HEADER_MAX = 1024
INTERFACE_MAX = 15  # IFNAMSIZ, less the closing zero

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
LABEL_KEY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?")
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2
MAPPED = IPv6Network("::ffff:0:0/96")


def wrong(text: str) -> PydanticCustomError:
    """A problem in words of our own."""
    return PydanticCustomError("wrong", "{text}", {"text": text})


def checked(check: Callable[[str], None]) -> AfterValidator:
    """A validator that leaves the text as it is."""

    def validated(value: str) -> str:
        check(value)
        return value

    return AfterValidator(validated)


def check_name(value: str) -> None:
    if len(value) > NAME_MAX or not NAME.fullmatch(value):
        raise wrong(
            f"a name has letters, digits, '.', '_' and '-' inside, {NAME_MAX} at the most: not {value!r}"
        )


def check_label_key(value: str) -> None:
    if len(value) > LABEL_KEY_MAX or not LABEL_KEY.fullmatch(value):
        raise wrong(f"a label's key has letters, digits and inside also '.', '_', '-', '/': not {value!r}")


def check_label_value(value: str) -> None:
    if len(value) > LABEL_VALUE_MAX or not value.isprintable():
        raise wrong(f"a label's value has at most {LABEL_VALUE_MAX} printable characters")


def check_cidr(value: str) -> None:
    parse_network(value)


@lru_cache(131072)  # checked, it is made; and an edit leaves most as they are
def parse_network(value: str) -> Network:
    """Raises `wrong` for what is no network, has host bits, or hides IPv4 in IPv6."""
    try:
        network = ip_network(value, strict=False)
    except ValueError:
        raise wrong(f"{value!r} is no network: write one like 10.9.0.0/16 or fd00::/8") from None
    if int(network.network_address) != int(ip_address(value.partition("/")[0])):
        raise wrong(f"{value} names an address inside a network: write {network}, or {value.split('/')[0]}")
    if isinstance(network, IPv6Network) and network.subnet_of(MAPPED):
        raise wrong(f"{value} is IPv4 written as IPv6: write it as IPv4, like 10.0.0.0/8")
    return network


def check_method(value: str) -> None:
    if value == "*":
        raise wrong("every method is what a line without 'methods' stands for: remove 'methods'")
    if not TOKEN.fullmatch(value):
        raise wrong(f"{value!r} is no HTTP method: write one like GET")
    if value != value.upper():
        raise wrong(f"methods are case-sensitive (RFC 9110 section 9.1): write {value.upper()}")


path_pattern = lru_cache(32768)(PathPattern)  # likewise


def check_path(value: str) -> None:
    try:
        path_pattern(value)
    except PatternError as error:
        raise wrong(str(error)) from error


def check_host(value: str) -> None:
    try:
        HostPattern(value)
    except PatternError as error:
        raise wrong(str(error)) from error


def check_header_name(value: str) -> None:
    if not TOKEN.fullmatch(value):
        raise wrong(f"{value!r} is no header's name: write one like x-tenant")
    if value.lower() == "host":
        raise wrong("the Host header is matched by 'hosts': name it there")


def header_value(value: Any) -> str | bool:
    """Exact text, or that the header is there: `true` or '*'."""
    if value is True or value == "*":
        return True
    if not isinstance(value, str):
        raise wrong(
            f'a header is compared with text: put it in quotes, "{value}", or write true for any value'
        )
    if len(value) > HEADER_MAX or not value.isprintable() or value != value.strip():
        raise wrong(f"a header's value is at most {HEADER_MAX} printable characters without spaces around")
    return value


def check_interface(value: str) -> None:
    if not 0 < len(value) <= INTERFACE_MAX or any(each in "/:" or each.isspace() for each in value):
        raise wrong(
            f"an interface's name has 1 to {INTERFACE_MAX} characters, no '/', ':' or space: not {value!r}"
        )
    if value in (".", "..", "lo"):
        raise wrong(f"{value!r} cannot be spliced: name the interface that leads to the network, like eth0")


def check_netns(value: str) -> None:
    if not value or "/" in value or value in (".", "..") or not value.isprintable():
        raise wrong(f"a network namespace's name as in 'ip netns list', not {value!r}")


def check_port(value: int) -> int:
    if not 1 <= value <= 65535:
        raise wrong(f"a port is 1 to 65535, not {value}; without 'port' it is every port")
    return value


Name = Annotated[str, checked(check_name), Field(examples=["api-allow"])]
LabelKey = Annotated[str, checked(check_label_key)]
LabelValue = Annotated[str, checked(check_label_value)]
Labels = dict[LabelKey, LabelValue]
Cidr = Annotated[str, checked(check_cidr), Field(examples=["10.9.0.0/16"])]
Method = Annotated[str, checked(check_method), Field(examples=["GET"])]
PathText = Annotated[str, checked(check_path), Field(examples=["/api/v1/**", "/orders/{id}"])]
HostText = Annotated[str, checked(check_host), Field(examples=["api.local", "*.example.com"])]
HeaderName = Annotated[str, checked(check_header_name)]
HeaderValue = Annotated[
    Any, PlainValidator(header_value), WithJsonSchema({"anyOf": [{"type": "string"}, {"const": True}]})
]
Interface = Annotated[str, checked(check_interface), Field(examples=["eth0"])]
Netns = Annotated[str, checked(check_netns), Field(examples=["demo-api"])]
Port = Annotated[int, AfterValidator(check_port), Field(json_schema_extra={"minimum": 1, "maximum": 65535})]
