"""Changes of real files come as events, whichever way they are made; without inotify the clock is left."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isolator.control import watch
from isolator.control.watch import FileWatch, folders_of


@pytest.fixture
def watched() -> Iterator[FileWatch]:
    made = FileWatch()
    yield made
    made.close()


def told(watched: FileWatch, change: Callable[[], object], seconds: float = 2.0) -> bool:
    """Whether a change is told of."""

    async def run() -> bool:
        waiting = asyncio.create_task(watched.burst(seconds))
        await asyncio.sleep(0.01)
        change()
        return await waiting

    return asyncio.run(run())


def replace(file: Path, text: str) -> None:
    draft = file.with_name(".draft")
    draft.write_text(text)
    os.replace(draft, file)


def test_a_file_is_written_replaced_removed_and_made(tmp_path: Path, watched: FileWatch) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("a")
    watched.aim([file])
    assert told(watched, lambda: file.write_text("b"))
    assert told(watched, lambda: replace(file, "c"))
    assert told(watched, lambda: file.chmod(0o600))
    assert told(watched, file.unlink)
    assert told(watched, lambda: file.write_text("d"))
    assert not told(watched, lambda: None, 0.05)


def test_a_file_comes_into_a_folder(tmp_path: Path, watched: FileWatch) -> None:
    folder = tmp_path / "policies"
    folder.mkdir()
    watched.aim([folder])
    assert told(watched, lambda: (folder / "new.yaml").write_text("a"))
    assert told(watched, lambda: os.rename(folder, tmp_path / "other"))


def test_a_folder_that_was_not_there(tmp_path: Path, watched: FileWatch) -> None:
    folder = tmp_path / "policies"
    watched.aim([folder, folder / "p.yaml"])
    assert told(watched, folder.mkdir)
    watched.aim([folder, folder / "p.yaml"])
    assert told(watched, lambda: (folder / "p.yaml").write_text("a"))


def test_a_config_map_is_swapped(tmp_path: Path, watched: FileWatch) -> None:
    """As the kubelet does: the files link over `..data`, which is replaced by rename(2)."""
    for name in ("..1", "..2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.yaml").write_text(name)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "p.yaml").symlink_to("..data/p.yaml")
    watched.aim([tmp_path / "p.yaml"])

    def swap() -> None:
        (tmp_path / "..tmp").symlink_to("..2")
        os.replace(tmp_path / "..tmp", tmp_path / "..data")

    assert told(watched, swap)
    watched.aim([tmp_path / "p.yaml"])
    assert told(watched, lambda: (tmp_path / "..2" / "p.yaml").write_text("new"))


def test_a_link_to_a_folder_on_the_way_is_swapped(tmp_path: Path, watched: FileWatch) -> None:
    links, files = tmp_path / "links", tmp_path / "files"
    for folder in (links, files / "1", files / "2"):
        folder.mkdir(parents=True)
    (links / "current").symlink_to("../files/1")
    watched.aim([links / "current" / "p.yaml"])
    assert folders_of([links / "current" / "p.yaml"]) == {links, files / "1"}

    def swap() -> None:
        (links / "next").symlink_to(files / "2")
        os.replace(links / "next", links / "current")

    assert told(watched, swap)


def test_links_in_a_circle_end(tmp_path: Path, watched: FileWatch) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    watched.aim([tmp_path / "a", tmp_path / "a" / "p.yaml"])
    assert told(watched, (tmp_path / "a").unlink)


def test_many_changes_at_once_are_one_burst(tmp_path: Path, watched: FileWatch) -> None:
    watched.aim([tmp_path])
    assert told(watched, lambda: [(tmp_path / f"{at}.yaml").write_text("a") for at in range(200)])
    assert not told(watched, lambda: None, 0.05)


def test_who_never_stops_writing_holds_nothing_up(tmp_path: Path, watched: FileWatch) -> None:
    watched.aim([tmp_path])

    async def run() -> float:
        async def write() -> None:
            while True:
                (tmp_path / "log").write_text("a")
                await asyncio.sleep(0.005)

        writing, began = asyncio.create_task(write()), time.monotonic()
        await watched.burst(5)
        writing.cancel()
        return time.monotonic() - began

    assert asyncio.run(run()) < 1


def test_what_is_no_longer_asked_for_is_not_told(tmp_path: Path, watched: FileWatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    watched.aim([tmp_path / "a" / "p.yaml"])
    watched.aim([tmp_path / "b" / "p.yaml"])
    asyncio.run(watched.burst(0.05))  # that the first watch has ended is an event too
    assert not told(watched, lambda: (tmp_path / "a" / "p.yaml").write_text("a"), 0.05)


def test_without_inotify_the_clock_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(**_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(watch, "INotify", none)
    blind = FileWatch()
    blind.aim([tmp_path])
    assert not told(blind, lambda: (tmp_path / "p.yaml").write_text("a"), 0.05)
    blind.close()
    assert "every few seconds" in capsys.readouterr().out
