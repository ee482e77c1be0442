"""Who is the host, and what of a gateway is."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface

import pytest

from isolator.core.model import Outsider
from isolator.roster import with_host


def told(outsiders: tuple[Outsider, ...]) -> list[tuple[str, dict[str, str], list[str]]]:
    return [(each.name, each.labels, [str(address) for address in each.addresses]) for each in outsiders]


def test_a_gateway_is_the_host_where_its_address_is_the_hosts() -> None:
    """One with an IPv6 router of its own."""
    labels = {"entity": "gateway", "network": "back"}
    gateway = Outsider("gateway of back", labels, (ip_address("10.2.0.1"), ip_address("fd00::1")))
    web = Outsider("web", {"app": "web"}, (ip_address("10.2.0.9"),))
    mine = [ip_interface("10.2.0.1"), ip_interface("10.2.0.9")]
    assert told(with_host([gateway, web], mine)) == [
        ("gateway of back", {"entity": "host", "network": "back"}, ["10.2.0.1"]),
        ("gateway of back", {"entity": "gateway", "network": "back"}, ["fd00::1"]),
        ("web", {"app": "web"}, ["10.2.0.9"]),
        ("host", {"entity": "host"}, ["255.255.255.255"]),
    ]


@pytest.mark.parametrize(("interface", "heard"), [
    ("172.17.0.1/16", ["172.17.0.1", "255.255.255.255", "172.17.0.0", "172.17.255.255"]),
    ("10.0.0.1/30", ["10.0.0.1", "255.255.255.255", "10.0.0.0", "10.0.0.3"]),
    ("10.0.0.1/31", ["10.0.0.1", "255.255.255.255"]),
    ("10.0.0.1/32", ["10.0.0.1", "255.255.255.255"]),
    ("127.0.0.1/8", ["255.255.255.255"]),
    ("fd00::1/64", ["fd00::1", "255.255.255.255", "fd00::"]),
    ("fd00::1/127", ["fd00::1", "255.255.255.255"]),
    ("::1/128", ["255.255.255.255"]),
])  # fmt: skip
def test_the_host_hears_broadcasts_and_anycast(interface: str, heard: list[str]) -> None:
    assert told(with_host([], [ip_interface(interface)])) == [("host", {"entity": "host"}, heard)]


def test_without_a_host_that_is_known_a_broadcast_is_the_hosts_all_the_same() -> None:
    assert told(with_host([], [])) == [("host", {"entity": "host"}, ["255.255.255.255"])]
