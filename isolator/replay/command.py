"""`isolator replay`: the config's policies and endpoints, and what is told at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from isolator.control.config import load
from isolator.control.flowlog import FlowRecord
from isolator.control.label_policy import label_policies
from isolator.control.netns_runtime import labels_of
from isolator.core.compile import compile_policies
from isolator.core.identities import Address, unmapped
from isolator.core.model import Endpoint
from isolator.replay.capture import read_capture as read_capture
from isolator.replay.engine import Replay, Tally

GENERATION = 1


class UnknownEndpointError(Exception):
    """`--endpoint` names what cannot be: an endpoint the config lacks, no address, one of two endpoints."""


def owners(given: Iterable[tuple[str, str]]) -> dict[Address, str]:
    """Names by address. Raises UnknownEndpointError."""
    found: dict[Address, str] = {}
    for name, text in given:
        try:
            address = unmapped(ip_address(text))
        except ValueError:
            raise UnknownEndpointError(f"--endpoint {name}={text}: that is no address") from None
        if found.setdefault(address, name) != name:
            raise UnknownEndpointError(f"{address} is given to {found[address]} and to {name}")
    if not found:
        raise UnknownEndpointError(
            "nobody's addresses are known: give --endpoint NAME=ADDRESS for each endpoint"
        )
    return found


def prepare(config: Path, given: dict[Address, str], sink: Callable[[FlowRecord], None]) -> Replay:
    """Raises ConfigErrors, UnknownEndpointError, PolicyTooLarge."""
    loaded = load(config)
    endpoints = {
        number: Endpoint(each.name, labels_of(each))
        for number, each in enumerate(loaded.config.endpoints, start=1)
    }
    numbers = {endpoint.name: number for number, endpoint in endpoints.items()}
    for name in given.values():
        if name not in numbers:
            known = (
                ", ".join(sorted(numbers))
                or "none; list them under `endpoints:` with `runtime: {kind: netns}`"
            )
            raise UnknownEndpointError(f"no endpoint of {config} is named {name}: there are {known}")
    addresses: dict[int, tuple[Address, ...]] = {
        number: tuple(address for address, name in given.items() if name == endpoint.name)
        for number, endpoint in endpoints.items()
    }
    labelled = label_policies(endpoints.values(), {})
    policies = [*loaded.policies, *(source.policy for source in labelled.values())]
    return Replay(compile_policies(policies, endpoints, addresses, GENERATION), endpoints, addresses, sink)


def told(tally: Tally, seconds: float) -> dict[str, Any]:
    """As JSON. `captured_seconds`: from the first frame to the last; `seconds`: what replaying them took."""
    span = (tally.last - tally.first) / 1e9 if tally.first is not None else 0.0
    rate = 1 / seconds if seconds else 0.0
    return {
        "frames": tally.frames,
        "bytes": tally.octets,
        "messages": tally.messages,
        "flows": tally.flows,
        "captured_seconds": round(span, 6),
        "seconds": round(seconds, 6),
        "frames_per_second": round(tally.frames * rate),
        "messages_per_second": round(tally.messages * rate),
        "megabytes_per_second": round(tally.octets * rate / 1e6, 1),
        "unrelated": tally.unrelated,
        "not_ip": tally.unread,
        "cut_short": tally.cut,
        "answers_to_dropped": tally.answers,
        "incomplete": tally.waiting,
        "dropped": {reason.name: count for reason, count in sorted(tally.drops.items())},
    }


def lines(told: dict[str, Any]) -> Sequence[str]:
    """The same for people; what is not zero of what was not judged, and why."""
    dropped = ", ".join(f"{name} {count}" for name, count in told["dropped"].items())
    notes = [
        (told["unrelated"], "frames between addresses that no --endpoint has"),
        (told["not_ip"], "frames that are not IP"),
        (
            told["cut_short"],
            "frames that the capture cut short, not judged: capture whole frames (tcpdump -s 0)",
        ),
        (told["answers_to_dropped"], "frames that answer dropped ones, and would not have been"),
        (told["incomplete"], "connections that wait for bytes the capture does not have"),
    ]
    return [
        f"{told['frames']} frames, {told['messages']} messages, {told['flows']} layer-4 flows "
        f"of {told['captured_seconds']:.1f} s in {told['seconds']:.2f} s: "
        f"{told['frames_per_second']} frames/s, {told['messages_per_second']} messages/s, "
        f"{told['megabytes_per_second']} MB/s",
        *([f"frames dropped: {dropped}"] if dropped else []),
        *(f"{count} {what}" for count, what in notes if count),
    ]
