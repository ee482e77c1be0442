"""The kernel reads heads as the model does (isolator.core.automaton.states.run), and counts them for the same rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isolator.core.automaton.build import build
from isolator.core.automaton.states import Automaton, run
from isolator.core.model import Owner, RuleRef
from isolator.core.pattern import PathPattern
from isolator.core.policy import HttpRule, Profile
from tests.bpf.bench import PROFILE, Bench
from tests.bpf.conversation import SERVER_ISN, Conversation
from tests.core.automaton.world import automaton_of, heads, profiles, rule

pytestmark = pytest.mark.root
LONGEST = 1456  # bytes that the kernel reads: it looks at eight at a time
ANY = automaton_of(rule("any", HttpRule(None, None)))
GET = b"GET / HTTP/1.1\r\nHost: a\r\n"


class Reading:
    """Heads one after the other on one connection, each where the kernel may accept it."""

    def __init__(self, b: Bench, automaton: Automaton) -> None:
        b.reset()
        b.policy(automata={PROFILE: automaton})
        b.datapath.automata.take_counts()
        self.talk = Conversation(b, isn=0xFFFFF000).handshake()
        self.asked, self.told = 0, SERVER_ISN + 1

    def accepts(self, head: bytes) -> bool:
        c = self.talk
        outcome = c.client("PA", c.at(self.asked), self.told, head)
        if outcome.where == "punt":  # as if it had never come
            assert c.half.next == c.at(self.asked)
            c.own(Owner.KERNEL)
            return False
        assert outcome.where == "container" and bytes(outcome.packet["TCP"].payload) == head
        self.asked += len(head)
        c.server("PA", self.told, c.at(self.asked), b"!")
        self.told += 1
        return True

    def counts(self) -> Counter[RuleRef]:
        found: Counter[RuleRef] = Counter()
        for _, profile, named, count in self.talk.b.datapath.automata.take_counts():
            assert profile == PROFILE
            found[named] += count
        return found


def same(b: Bench, automaton: Automaton, tried: Iterable[bytes]) -> None:
    """The kernel accepts what the model does, and counts it for the same rules."""
    reading, expected = Reading(b, automaton), Counter[RuleRef]()
    for head in tried:
        found = run(automaton, head).rule
        assert reading.accepts(head) == (found != 0), head
        if found:
            expected[automaton.rules[found - 1]] += 1
    assert reading.counts() == expected


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(profiles(), st.lists(heads().filter(bool), min_size=5, max_size=20))
def test_any_head_by_any_profile(splice: Bench, decides: Profile, tried: list[bytes]) -> None:
    automaton = build(decides)
    if automaton.start:
        same(splice, automaton, tried)


_values = st.text("az ~\t\x1f\x7f\xe9", max_size=60) | st.sampled_from(
    ["\t" * 90, "v" * 8, "v" * 7 + "\t", ""]
)
_names = st.sampled_from(["X", "x-a", "Accept", "Cookie", "User-Agent", "n" * 40])
_lines = st.builds("{}:{}\r\n".format, _names, _values)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(_lines, max_size=25), min_size=5, max_size=20))
def test_lines_of_any_length(splice: Bench, tried: list[list[str]]) -> None:
    made = [GET + "".join(lines).encode("latin-1") + b"\r\n" for lines in tried]
    same(splice, ANY, [head for head in made if len(head) <= LONGEST])


def padded(line: bytes, length: int) -> bytes:
    """A head of so many bytes, in lines like this one."""
    room = length - len(GET) - 2
    lines = room // len(line)
    return GET + line * (lines - 1) + line[:-2] + b"x" * (room - lines * len(line)) + b"\r\n\r\n"


@pytest.mark.parametrize("line", [b"a:b\r\n", b"a: " + b"\t" * 50 + b"\r\n", b"a: " + b"v" * 17 + b"\r\n",
                                  b"a: " + b"v" * 9 + b"\r\n", b"a: " + b"v" * 1300 + b"\r\n",
                                  b"a: " + b"\t" * 1300 + b"\r\n", b"a: " + b"v\t" * 600 + b"\r\n"])  # fmt: skip
def test_as_many_steps_and_lines(splice: Bench, line: bytes) -> None:
    """What a packet may cost is counted alike."""
    same(splice, ANY, [padded(line, length) for length in range(len(GET) + len(line) + 2, LONGEST + 1, 7)])


def test_every_length_up_to_the_longest(splice: Bench) -> None:
    line = b"a: " + b"v" * 100 + b"\r\n"
    tried = [padded(line, length) for length in (*range(140, 180), *range(LONGEST - 40, LONGEST + 1))]
    assert all(run(ANY, head).rule for head in tried)
    same(splice, ANY, tried)


def test_what_is_left_of_a_longer_head_is_not_read(splice: Bench) -> None:
    """The record still has it behind the bytes of a shorter one."""
    whole = GET + b"Accept: aaaaaaaa\r\n\r\n"
    same(splice, ANY, [piece for cut in range(1, len(whole)) for piece in (whole, whole[:cut])])


def test_odd_bytes_in_every_place(splice: Bench) -> None:
    head = b"GET /a?b HTTP/1.1\r\nHost: a\r\nX: y\r\n\r\n"
    automaton = automaton_of(rule("one", HttpRule(frozenset({"GET"}), PathPattern("/{id}"))))
    odd = b"\0\x01\t\n\v\r\x1f !#%+,./09:;?@A_a~\x7f\x80\x8d\xa0\xff"
    same(splice, automaton, [head[:at] + bytes([b]) + head[at + 1 :] for b in odd for at in range(len(head))])
