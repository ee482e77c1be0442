"""Who is the host, and what of a gateway is."""

from __future__ import annotations

from ipaddress import ip_address

from isolator.core.model import Outsider
from isolator.roster import with_host


def told(outsiders: tuple[Outsider, ...]) -> list[tuple[str, dict[str, str], list[str]]]:
    return [(each.name, each.labels, [str(address) for address in each.addresses]) for each in outsiders]


def test_a_gateway_is_the_host_where_its_address_is_the_hosts() -> None:
    """One with an IPv6 router of its own."""
    labels = {"entity": "gateway", "network": "back"}
    gateway = Outsider("gateway of back", labels, (ip_address("10.2.0.1"), ip_address("fd00::1")))
    web = Outsider("web", {"app": "web"}, (ip_address("10.2.0.9"),))
    assert told(with_host([gateway, web], [ip_address("10.2.0.1"), ip_address("10.2.0.9")])) == [
        ("gateway of back", {"entity": "host", "network": "back"}, ["10.2.0.1"]),
        ("gateway of back", {"entity": "gateway", "network": "back"}, ["fd00::1"]),
        ("web", {"app": "web"}, ["10.2.0.9"]),
    ]
