"""The journal gives back what was written, whole or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolator.datapath.device import Link
from isolator.datapath.journal import Entry, Journal, Phase
from isolator.datapath.netns import SpliceError
from isolator.datapath.snapshot import Snapshot

LINK = Link(
    index=2, name="eth0", mac="02:00:00:00:00:01", mtu=1500, qlen=1000, flags=0x1043, group=0, alias="", kind="veth",
    peer=9, peer_netns=0, master=0, queues=(2, 2), sizes={40: 65535, 41: 65536}, altnames=("outer",),
)  # fmt: skip
SNAPSHOT = Snapshot(
    link=LINK, features=(1, 2), channels=(1, 1, 0, 0), sysctls={"ipv4/conf/rp_filter": "1"}, default_sysctls={},
    addresses=(b"\x02\x18",), nexthops=(), routes=(b"\x00\xff", b""), neighbours=(b"n",),
)  # fmt: skip
ENTRY = Entry(
    name="web", netns="/run/netns/web", cookie=77, boot="b", interface="eth0", container_port_name="c-1",
    network_port_name="n-1", container_port=0, network_port=0, phase=Phase.SPLICING, snapshot=SNAPSHOT,
)  # fmt: skip


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "deep" / "journal")


def test_a_file_that_another_process_changed_is_read_anew(journal: Journal) -> None:
    journal.write(ENTRY)
    assert journal.read("web") == ENTRY
    other = Journal(journal.folder)
    other.write(replace(ENTRY, phase=Phase.SPLICED))
    assert journal.read("web") == replace(ENTRY, phase=Phase.SPLICED)
    other.remove("web")
    assert journal.read("web") is None
    assert list(journal.entries()) == []


def test_an_entry_comes_back_equal_until_it_is_removed(journal: Journal) -> None:
    assert journal.read("web") is None
    journal.write(ENTRY)
    assert journal.read("web") == ENTRY
    spliced = replace(ENTRY, phase=Phase.SPLICED, container_port=5, network_port=6)
    journal.write(spliced)
    assert list(journal.entries()) == [spliced]
    journal.remove("web")
    journal.remove("web")
    assert list(journal.entries()) == []


@given(st.text(min_size=1, max_size=30).filter(lambda name: name.isprintable()))
def test_any_name_is_one_file_in_the_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    journal = Journal(tmp_path_factory.mktemp("journal"))
    journal.write(replace(ENTRY, name=name))
    assert [entry.name for entry in journal.entries()] == [name]
    assert len(list(journal.folder.iterdir())) == 1


def test_a_write_that_fails_leaves_the_old_entry(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.write(ENTRY)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        journal.write(replace(ENTRY, phase=Phase.SPLICED))
    assert journal.read("web") == ENTRY


@pytest.mark.parametrize(
    "content", ["", "{}", '{"format": 99}', '{"format": 1}', "[]", '{"format": 1, "name": 3']
)
def test_what_is_no_entry_is_named_in_one_line(journal: Journal, content: str) -> None:
    journal.write(ENTRY)
    (journal.folder / "web.json").write_text(content)
    with pytest.raises(SpliceError, match=r"web\.json: no journal entry of this version \(") as caught:
        journal.read("web")
    assert "\n" not in str(caught.value)


def test_one_that_cannot_be_read_does_not_hide_the_others(journal: Journal) -> None:
    journal.write(ENTRY)
    journal.write(replace(ENTRY, name="api"))
    (journal.folder / "web.json").write_text("{")
    assert [entry.name for entry in journal.entries()] == ["api"]
    (error,) = journal.unreadable()
    assert str(journal.folder / "web.json") in str(error)


def test_a_journal_that_nothing_was_written_to_leaves_no_folder(journal: Journal) -> None:
    assert list(journal.entries()) == [] and journal.read("web") is None
    journal.remove("web")
    assert not journal.folder.exists()
