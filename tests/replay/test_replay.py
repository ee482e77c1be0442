"""Captures in, records out: as the agent would have decided, and the same each time."""

from __future__ import annotations

import json
from ipaddress import IPv4Address
from pathlib import Path
from random import Random

import pytest
from click import unstyle
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet
from typer.testing import CliRunner, Result

from isolator.cli import app
from isolator.control import render
from isolator.control.flowlog import FlowRecord
from isolator.core.compile import compile_policies
from isolator.core.model import DropReason, Endpoint
from isolator.core.pattern import PathPattern
from isolator.core.policy import HttpRule, Mode, Policy, PortMatch, Rule, Selected, labels_of
from isolator.datapath.abi import HALF_FIN
from isolator.replay.capture import Captured
from isolator.replay.engine import Replay
from parsers.packet import ACK, FIN, PSH, RST, SYN
from tests.replay.captures import OK, START, STRANGER, Said, asked, conversation, get, pcap, pcapng, written

ENDPOINTS = {1: Endpoint("api", {"role": "api"}), 2: Endpoint("web", {"role": "web"})}
ADDRESSES = {1: (IPv4Address("10.9.0.3"),), 2: (IPv4Address("10.9.0.2"),)}
LINES = (HttpRule(frozenset({"GET", "POST"}), PathPattern("/api/**")),)
WEB = (Selected(labels_of({"role": "web"})),)


def policy(mode: Mode = Mode.PROTECT, egress: bool = False) -> Policy:
    read = Rule("read", peers=WEB, ports=(PortMatch(6, 80),), http=LINES)
    if egress:
        return Policy("out", labels_of({"role": "web"}), mode, egress=(Rule("read", http=LINES),))
    return Policy("in", labels_of({"role": "api"}), mode, ingress=(read,))


class Seen:
    """A replay, and its records as lines without their time."""

    def __init__(self, *policies: Policy) -> None:
        self.records: list[FlowRecord] = []
        compiled = compile_policies(policies, ENDPOINTS, ADDRESSES, 1)
        self.replay = Replay(compiled, ENDPOINTS, ADDRESSES, self.records.append)

    def feed(self, *frames: Captured) -> list[str]:
        before = len(self.records)
        for frame in frames:
            self.replay.feed(frame)
        return [unstyle(render.flow_line(each.as_json()))[13:] for each in self.records[before:]]


def captured(packet: Packet, at: int = START) -> Captured:
    data = bytes(packet)
    return Captured(at, data, len(data))


OPENED = "FORWARDED egress  web:40000 -> api:80 tcp"


def allowed(path: str, direction: str = "ingress", policy: str = "in") -> str:
    return f"FORWARDED {direction:<7} web:40000 -> api:80 tcp GET {path} · {policy}/read"


# -- requests ----------------------------------------------------------------------------------------------


def test_each_request_is_decided_until_one_is_denied() -> None:
    seen = Seen(policy())
    said = [("c", get("/api/a")), ("s", OK), ("c", get("/admin")), ("s", OK), ("c", get("/api/b")), ("s", OK)]
    assert seen.feed(*conversation(said)) == [
        OPENED,
        allowed("/api/a"),
        "DROPPED   ingress web:40000 -> api:80 tcp GET /admin · HTTP_NO_RULE · in/read",
    ]
    assert seen.replay.finish().drops[DropReason.FLOW_CLOSED] == 2  # what the server said behind it


def test_monitor_mode_decides_every_request() -> None:
    seen = Seen(policy(Mode.MONITOR))
    assert seen.feed(*conversation(asked("/admin", "/api/b")))[1:] == [
        "AUDIT     ingress web:40000 -> api:80 tcp GET /admin · HTTP_NO_RULE · in/read",
        allowed("/api/b"),
    ]


def test_none_of_many_allowed_requests_goes_unreported() -> None:
    seen = Seen(policy())
    assert len(seen.feed(*conversation(asked(*["/api/a"] * 400)))) == 401


def test_a_head_in_parts_is_one_message_for_both_ends() -> None:
    """What the first end sends on as one, the second reads."""
    seen = Seen(policy(), policy(egress=True))
    head = get("/api/a")
    told = seen.feed(*conversation([("c", head[:9]), ("c", head[9:30]), ("c", head[30:]), ("s", OK)]))
    assert told == [allowed("/api/a", "egress", "out"), allowed("/api/a")]


def test_what_the_first_end_denies_the_second_never_sees() -> None:
    seen = Seen(policy(), policy(egress=True))
    assert seen.feed(*conversation(asked("/admin"))) == [
        "DROPPED   egress  web:40000 -> api:80 tcp GET /admin · HTTP_NO_RULE · out/read"
    ]


def test_a_body_passes_and_the_next_request_is_found_behind_it() -> None:
    seen = Seen(policy())
    post = b"POST /api/up HTTP/1.1\r\nHost: api\r\nContent-Length: 3000\r\n\r\n"
    said = [("c", post + b"x" * 1000), ("c", b"x" * 1000), ("c", b"x" * 1000), ("s", OK), *asked("/api/a")]
    assert seen.feed(*conversation(said))[1:] == [
        "FORWARDED ingress web:40000 -> api:80 tcp POST /api/up · in/read",
        allowed("/api/a"),
    ]


def test_a_retransmission_is_no_second_message() -> None:
    seen = Seen(policy())
    frames = conversation(asked("/api/a"))
    assert seen.feed(*frames[:4], frames[3], *frames[4:], frames[3]) == [OPENED, allowed("/api/a")]


def test_a_retransmission_that_differs_ends_the_connection() -> None:
    seen = Seen(policy())
    frames = conversation([("c", get("/api/a"))])
    other = conversation([("c", get("/api/b"))])
    assert seen.feed(*frames, other[3])[1:] == [
        allowed("/api/a"),
        "DROPPED   ingress web:40000 -> api:80 tcp ?  · RECORD_MISMATCH",
    ]


def test_a_hole_is_waited_for_and_told() -> None:
    seen = Seen(policy())
    frames = conversation([("c", get("/api/a")[:9]), ("c", get("/api/a")[9:])])
    assert seen.feed(*frames[:3], frames[4]) == [OPENED]
    assert seen.replay.finish().waiting == 1


def test_time_alone_ends_a_head_that_never_comes() -> None:
    """60 s later, by the frames' own clock; the frame that tells the time is another connection's."""
    seen = Seen(policy())
    seen.feed(*conversation([("c", get("/api/a")[:9])]))
    late = conversation([], ports=(40001, 80), at=START + 120 * 10**9)
    assert "DROPPED   ingress web:40000 -> api:80 tcp ?  · HTTP_TOO_LONG" in seen.feed(*late)


def test_the_same_ports_again_are_another_connection() -> None:
    seen = Seen(policy())
    closing = [("c", b"", FIN | ACK), ("s", b"", FIN | ACK), ("c", b"", ACK)]
    seen.feed(*conversation([*asked("/api/a"), *closing]))
    again = conversation(asked("/api/b"), at=START + 10**9)
    assert seen.feed(*again) == [allowed("/api/b")]


def test_a_handshake_that_comes_again_begins_nothing() -> None:
    """While the server may not have seen the request (bpf/isolator_flow7.h, is_repeated)."""
    seen = Seen(policy())
    frames = conversation([("c", get("/api/a"))])
    assert seen.feed(*frames, *frames[:2], frames[3]) == [OPENED, allowed("/api/a")]


def test_a_connection_open_before_the_capture_is_lost_where_requests_are_read() -> None:
    seen = Seen(policy())
    assert seen.feed(*conversation(asked("/api/a", "/api/b"), opened=False)) == [
        OPENED,
        "DROPPED   ingress web:40000 -> api:80 tcp · STATE_LOST",
    ]


def test_data_behind_a_fin_goes_nowhere() -> None:
    seen = Seen(policy())
    said = [*asked("/api/a"), ("c", b"", FIN | ACK), ("c", get("/api/b"))]
    assert seen.feed(*conversation(said))[2:] == ["DROPPED   ingress web:40000 -> api:80 tcp · TCP_STATE"]


def test_a_wrong_checksum_is_no_request() -> None:
    seen = Seen(policy())
    frames = conversation(asked("/api/a"))
    broken = bytearray(frames[3].data)
    broken[50:52] = b"\x12\x34"
    assert seen.feed(*frames[:3], frames[3]._replace(data=bytes(broken))) == [OPENED]
    assert seen.replay.finish().drops == {DropReason.BAD_CHECKSUM: 1}


# -- layer 4 -----------------------------------------------------------------------------------------------


def test_layer_4_is_decided_once() -> None:
    seen = Seen(policy())
    frames = conversation([], ports=(40000, 22))
    assert seen.feed(frames[0], frames[0], captured(Ether() / ARP())) == [
        "FORWARDED egress  web:40000 -> api:22 tcp",
        "DROPPED   ingress web:40000 -> api:22 tcp · POLICY_DEFAULT",
    ]
    assert seen.replay.finish().drops == {DropReason.POLICY_DEFAULT: 2}


def test_a_stranger_is_the_world() -> None:
    seen = Seen(policy())
    assert seen.feed(*conversation(asked("/api/a"), client=STRANGER)) == [
        "DROPPED   ingress 192.0.2.1:40000 -> api:80 tcp · POLICY_DEFAULT"
    ]


def test_udp_and_its_answer_are_one_flow_until_it_is_idle() -> None:
    seen = Seen(Policy("dns", labels_of({"role": "web"}), egress=(Rule("dns", ports=(PortMatch(17, 53),)),)))
    query = Ether() / IP(src="10.9.0.2", dst="192.0.2.1") / UDP(sport=4000, dport=53) / b"q"
    answer = Ether() / IP(src="192.0.2.1", dst="10.9.0.2") / UDP(sport=53, dport=4000) / b"a"
    told = "FORWARDED egress  web:4000 -> 192.0.2.1:53 udp · dns/dns"
    assert seen.feed(captured(query), captured(answer), captured(query)) == [told]
    assert seen.feed(captured(query, START + 200 * 10**9)) == [told]


def test_an_icmp_error_passes_where_its_flow_does() -> None:
    seen = Seen(Policy("none", labels_of({"role": "web"}), ingress=()))
    query = IP(src="10.9.0.2", dst="192.0.2.1") / UDP(sport=4000, dport=53) / b"q"
    error = captured(Ether() / IP(src="192.0.2.9", dst="10.9.0.2") / ICMP(type=3, code=3) / query)
    assert seen.feed(error) == ["DROPPED   ingress 192.0.2.9 -> web icmp · ICMP_UNRELATED"]
    seen.feed(captured(Ether() / query))
    assert seen.feed(error) == []
    assert seen.replay.finish().drops == {DropReason.ICMP_UNRELATED: 1}


def test_an_icmp_error_speaks_to_its_end_alone() -> None:
    seen = Seen()
    query = IP(src="10.9.0.2", dst="192.0.2.1") / UDP(sport=4000, dport=53) / b"q"
    seen.feed(captured(Ether() / query))
    error = captured(Ether() / IP(src="192.0.2.9", dst="10.9.0.3") / ICMP(type=3, code=3) / query)
    assert seen.feed(error) == ["DROPPED   ingress 192.0.2.9 -> api icmp · ICMP_UNRELATED"]


def test_what_is_not_judged_is_counted() -> None:
    seen = Seen(policy())
    nobody = conversation([], client=STRANGER, server=b"\xc0\x00\x02\x02")
    whole = conversation([])[0]
    fragment = captured(Ether() / IP(src="10.9.0.2", dst="10.9.0.3", flags="MF") / UDP() / b"x")
    seen.feed(*nobody, captured(Ether() / ARP()), whole._replace(length=2000), fragment)
    tally = seen.replay.finish()
    assert (tally.unrelated, tally.unread, tally.cut) == (3, 1, 1)
    assert tally.drops == {DropReason.FRAGMENT: 1}


# -- always ------------------------------------------------------------------------------------------------

payloads = st.sampled_from([b"", b"G", get("/api/a"), get("/api/a")[:20], get("/admin"), OK, b"\x16\x03\x01"])
flags = st.sampled_from([ACK, PSH | ACK, FIN | ACK, RST, RST | ACK, SYN, SYN | ACK, 0])
orders = st.randoms(use_true_random=False)
talks = st.lists(st.tuples(st.sampled_from("cs"), payloads, flags), max_size=12)


@settings(max_examples=200, deadline=None)
@given(talks, st.booleans(), orders)
def test_whatever_comes_a_capture_replays_exactly(talk: list[Said], opened: bool, order: Random) -> None:
    frames = conversation(talk, opened=opened)
    mixed = [*frames, *order.sample(frames, len(frames) // 2)]
    first, second = Seen(policy(), policy(egress=True)), Seen(policy(), policy(egress=True))
    assert first.feed(*mixed) == second.feed(*mixed)
    tally = first.replay.finish()
    assert tally == second.replay.finish()
    assert not tally.drops[DropReason.INTERNAL]


def test_connections_that_ended_are_forgotten() -> None:
    seen = Seen(policy())
    closing = [("c", b"", FIN | ACK), ("s", b"", FIN | ACK), ("c", b"", ACK)]
    seen.feed(*conversation([*asked("/api/a"), *closing]))
    (flow,) = seen.replay._kernel.pinned.flows.values()
    assert all(half.flags & HALF_FIN for half in flow.half)
    seen.feed(*conversation([], ports=(40001, 80), at=START + 60 * 10**9))
    assert flow not in seen.replay._kernel.pinned.flows.values()
    assert len(seen.replay._inspector.flows) == 0


def test_what_the_server_has_acknowledged_is_not_kept() -> None:
    seen = Seen(policy())
    seen.feed(*conversation(asked("/api/a")))
    (flow,) = seen.replay._inspector.flows
    assert len(flow.record)
    seen.feed(*conversation([], ports=(40001, 80), at=START + 60 * 10**9))
    assert not len(flow.record)


# -- the command -------------------------------------------------------------------------------------------

CONFIG = """\
state_dir: /run/isolator
policies: [policy.yaml]
endpoints:
  - {name: api, netns: a, labels: {role: api}}
  - {name: web, netns: b, labels: {role: web, isolator.allow.egress: "[{ports: [{port: 22}]}]"}}
"""
POLICY = """\
kind: Policy
metadata: {name: in}
spec:
  select: {role: api}
  ingress: [{name: read, from: [{select: {role: web}}], http: [{methods: [GET], path: /api/**}]}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "isolator.yaml").write_text(CONFIG)
    (tmp_path / "policy.yaml").write_text(POLICY)
    written(tmp_path / "x.pcap", pcap(conversation(asked("/api/a"))))
    return tmp_path


BOTH = ("--endpoint", "api=10.9.0.3", "--endpoint", "web=10.9.0.2")


def replayed(folder: Path, *arguments: str, file: str = "x.pcap") -> Result:
    config = ("-c", str(folder / "isolator.yaml"))
    return CliRunner().invoke(app, ["replay", str(folder / file), *config, *arguments])


def test_the_command(folder: Path) -> None:
    result = replayed(folder, *BOTH)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "22:13:20.000 DROPPED   egress  web:40000 -> api:80 tcp · POLICY_DEFAULT"
    ]
    assert "5 frames, 0 messages, 1 layer-4 flows of 0.0 s in " in result.stderr


def test_the_command_as_json(folder: Path) -> None:
    written(folder / "x.pcapng", pcapng(conversation(asked("/api/a", "/b"))))
    result = replayed(folder, "--json", "--endpoint", "api=10.9.0.3", file="x.pcapng")
    (record,) = map(json.loads, result.stdout.splitlines())
    assert (record["drop_reason"], record["destination"]["endpoint"]) == ("POLICY_DEFAULT", "api")
    told = json.loads(result.stderr)
    assert (told["frames"], told["flows"], told["dropped"]) == (7, 1, {"POLICY_DEFAULT": 7})


def test_a_broken_file_is_told_behind_its_records(folder: Path) -> None:
    written(folder / "x.pcap", pcap(conversation(asked("/api/a")))[:-1])
    result = replayed(folder, *BOTH)
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 1)
    assert result.stderr.splitlines()[-1] == f"isolator: {folder}/x.pcap: ends in the middle of frame 5"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ((), 1, "nobody's addresses are known: give --endpoint NAME=ADDRESS"),
        (("--endpoint", "db=10.9.0.9"), 1, "is named db: there are api, web"),
        (("--endpoint", "api=ten"), 1, "--endpoint api=ten: that is no address"),
        (
            ("--endpoint", "api=10.9.0.3", "--endpoint", "web=::ffff:10.9.0.3"),
            1,
            "10.9.0.3 is given to api and to web",
        ),
        (("--endpoint", "api"), 2, "api: it is NAME=ADDRESS"),
    ],
)
def test_wrong_endpoints_are_told(folder: Path, arguments: tuple[str, ...], code: int, told: str) -> None:
    result = replayed(folder, *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert told in " ".join(result.stderr.split())


def test_wrong_policies_are_told(folder: Path) -> None:
    (folder / "policy.yaml").write_text(POLICY.replace("select", "selekt", 1))
    result = replayed(folder, *BOTH)
    assert result.exit_code == 1
    assert "policy.yaml:4:3: " in result.stderr
