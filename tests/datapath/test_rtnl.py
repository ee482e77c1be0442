"""Netlink attributes survive packing and parsing; a refusal carries the kernel's own words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolator.datapath.device import find_link, set_link
from isolator.datapath.rtnl import NetlinkError, Rtnl, attribute, attributes, text, u32


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=40))), st.integers(0, 16))
def test_attributes_are_parsed_as_packed(wanted: list[tuple[int, bytes]], header: int) -> None:
    body = bytes(header) + b"".join(attribute(kind, value) for kind, value in wanted)
    assert list(attributes(body, header)) == wanted


@given(st.binary(max_size=60))
def test_any_bytes_end(body: bytes) -> None:
    assert sum(4 for _ in attributes(body, 0)) <= len(body)


def test_numbers_and_texts() -> None:
    assert u32(5, 1) == bytes.fromhex("0800050001000000")
    assert text(3, "lo") == bytes.fromhex("070003006c6f0000")


@pytest.mark.root
def test_a_refusal_says_why() -> None:
    with Rtnl() as rtnl:
        loopback = find_link(rtnl, "lo")
        assert loopback is not None and loopback.index == 1
        assert find_link(rtnl, "spt-nothing") is None
        with pytest.raises(NetlinkError, match=r"File exists|Invalid argument|not"):
            set_link(rtnl, loopback.index, u32(4, 0xFFFFFFFF))  # IFLA_MTU
        with pytest.raises(NetlinkError, match="No such device"):
            set_link(rtnl, 0x7FFFFFF0)


def test_numbers_are_those_of_pyroute2() -> None:
    from pyroute2 import netlink
    from pyroute2.netlink import rtnl as library

    from isolator.datapath import rtnl

    ours = {name: number for name, number in vars(rtnl).items() if name.startswith(("NLM_F_", "RTM_"))}
    theirs = {name: vars(library).get(name, vars(netlink).get(name)) for name in ours}
    assert len(ours) == 20 and ours == theirs
