"""When files may have changed: inotify(7) on the folders that lead to them, and a clock for what it cannot see.

    aim(files) → folders: a file's own, and those of every link on the way → inotify
    burst(seconds) ← the first event, then a moment of quiet; or the time is over

Folders are watched, not files: most editors and all that replace atomically put another file in the old one's place
(rename(2)), and Kubernetes swaps a link to a folder (`..data`). What changes without an event in these folders, through
a hard link, a network file system or another mount, the clock finds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import structlog
from inotify_simple import INotify, flags  # type: ignore[import-not-found,import-untyped,unused-ignore]

QUIET = 0.02  # s without an event: then whoever writes several files, or one in parts, has done so
QUIET_MAX = 0.2  # s after the first event: nobody holds a change up
LINKS_MAX = 40  # the kernel's own bound (MAXSYMLINKS)
MASK = (
    flags.CLOSE_WRITE | flags.CREATE | flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE | flags.ATTRIB
    | flags.DELETE_SELF | flags.MOVE_SELF | flags.ONLYDIR
)  # fmt: skip

log = structlog.get_logger()


class FileWatch:
    """One inotify instance. Without one (a user has 128, and a bounded number of watches) the clock does it all."""

    def __init__(self) -> None:
        self._watched: set[int] = set()
        self._told = False
        self._inotify: INotify | None = None
        try:
            self._inotify = INotify(nonblocking=True)
        except OSError as error:
            self._tell(error)

    def close(self) -> None:
        if self._inotify is not None:
            self._inotify.close()

    def aim(self, files: Iterable[Path]) -> None:
        """From here on these files. What changed before may come as an event or not: look at them afterwards."""
        if self._inotify is None:
            return
        wanted = set()
        for folder in folders_of(files):
            try:
                wanted.add(self._inotify.add_watch(folder, MASK))
            except (FileNotFoundError, NotADirectoryError):  # its parent is watched
                continue
            except OSError as error:
                self._tell(error)
        for number in self._watched - wanted:
            with contextlib.suppress(OSError):  # the folder is gone, and the kernel's watch with it
                self._inotify.rm_watch(number)
        self._watched = wanted

    async def burst(self, seconds: float) -> bool:
        """True: there were events, and there have been none for a moment. False: the time is over."""
        loop = asyncio.get_running_loop()
        if self._inotify is None or not await self._event(seconds):
            if self._inotify is None:
                await asyncio.sleep(seconds)
            return False
        until = loop.time() + QUIET_MAX
        while loop.time() < until and await self._event(QUIET):
            pass
        return True

    async def _event(self, seconds: float) -> bool:
        assert self._inotify is not None
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._inotify.fileno(), ready.set)
        try:
            await asyncio.wait_for(ready.wait(), seconds)
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self._inotify.fileno())
        self._inotify.read(timeout=0)
        return True

    def _tell(self, error: OSError) -> None:
        if not self._told:
            log.warning("files are looked at every few seconds only", error=str(error))
        self._told = True


def folders_of(files: Iterable[Path]) -> set[Path]:
    """Where an entry could change that a file's name leads over, or the file itself."""
    found: set[Path] = set()
    seen: dict[Path, Path] = {}
    for file in files:
        path = real_folder(file.absolute().parent, found, seen) / file.name
        found.update(each for each in chain(path, found, seen))
    return found


def chain(path: Path, found: set[Path], seen: dict[Path, Path]) -> Iterator[Path]:
    """The folders of a file that stands in a real folder, and of what it links to; and itself, if it is one."""
    for _ in range(LINKS_MAX):
        yield path.parent
        try:
            target = path.parent / path.readlink()
        except OSError:  # no link
            break
        path = real_folder(target.parent, found, seen) / target.name
    with contextlib.suppress(OSError):
        if path.is_dir():
            yield path


def real_folder(folder: Path, found: set[Path], seen: dict[Path, Path]) -> Path:
    """The folder without links; the folders that hold the links go into `found`."""
    if folder not in seen:
        real = Path(folder.anchor)
        rest, links = list(reversed(folder.parts[1:])), 0
        while rest:
            part = rest.pop()
            if part == "..":
                real = real.parent
                continue
            try:
                target = (real / part).readlink()
            except OSError:
                real = real / part
                continue
            found.add(real)
            links += 1
            if links > LINKS_MAX:
                break
            real = Path(target.anchor) if target.is_absolute() else real
            rest += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        seen[folder] = real
    return seen[folder]
