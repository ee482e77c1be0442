"""Policy: read from its files, compiled, put in force; read again when they change.

    files ─ load ─▶ sources ─┐        ┌─ label policies ─┐
                             ├─ Known ┤                  ├─ compile ─▶ Python knows it ─▶ the kernel switches
    endpoints ─────▶ roster ─┘        └──────────────────┘                             ─▶ Python forgets the one before

Where the policies are those in force, and only endpoints, their labels or addresses differ, what is compiled stands,
and only the difference is computed and written (isolator.core.standing).
Reading, compiling and writing run in the worker. Whatever fails on the way, the policy that was in force stays: the
kernel switches by one store, and only to a generation that is written whole.
Everything that changes the roster or the sources holds the agent's lock of changes; so does a caller of this.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog

from isolator.control.config import Config, Loaded, PolicyFiles, PolicySource, load
from isolator.control.label_budget import first_come, give_way, within_budget
from isolator.control.label_policy import asks_for_policy, label_policies, own_labels
from isolator.control.problems import ConfigErrors, errors_in
from isolator.core.automaton.build import Automata
from isolator.core.automaton.states import Automaton
from isolator.core.compile import PolicyEntry, PolicyTooLarge
from isolator.core.identities import Address
from isolator.core.inspector import Inspector
from isolator.core.model import Direction, Endpoint, Outsider
from isolator.core.policy import LabelSet, Profile
from isolator.core.standing import Standing
from isolator.offload import Generation, Offload
from isolator.records import Recorder
from isolator.roster import Roster
from isolator.worker import Worker, uncollected

KEPT_MAX = 256  # labels' policies of containers that went, kept for when they come back
REFUSED_FOR = 30.0  # s until what could not be put in force is tried again as it is

log = structlog.get_logger()

Stamp = tuple[int, int, int]  # inode, modification time in ns, size


class PolicyMaps(Protocol):
    """Where policy goes (isolator.datapath.bpf.Datapath)."""

    @property
    def generation(self) -> int: ...
    def next_generation(self) -> int: ...
    def write_policy(
        self,
        generation: int,
        entries: Iterable[PolicyEntry],
        identities: Iterable[tuple[tuple[bytes, int], int]],
        automata: Mapping[int, Automaton],
        selections: Mapping[tuple[int, int], int],
    ) -> None: ...
    def change_policy(
        self,
        generation: int,
        entries: Iterable[PolicyEntry],
        identities: Mapping[tuple[bytes, int], tuple[int, int]],
        selections: Mapping[tuple[int, int], int],
        automata: Mapping[int, Automaton],
    ) -> None: ...
    def retire(self) -> dict[int, int]: ...


class Kernel(Protocol):
    """What this needs of the datapath (isolator.datapath.node.Node), once it is open."""

    @property
    def datapath(self) -> PolicyMaps: ...


@dataclass(frozen=True, slots=True)
class Known:
    """All that a policy in the kernel is made of. `sources`: the files'; the endpoints' labels carry more."""

    sources: tuple[PolicySource, ...]
    endpoints: dict[int, Endpoint]
    addresses: dict[int, tuple[Address, ...]]
    outsiders: tuple[Outsider, ...]


class Enforcement:
    """`config` and `sources`, the files' policies, are those in force. `errors`: what the last reload found wrong.
    `trouble`: why the policy in force is older than what is known, or None. `files` has read what was `loaded`."""

    def __init__(
        self,
        path: Path,
        loaded: Loaded,
        kernel: Kernel,
        roster: Roster,
        inspector: Inspector,
        recorder: Recorder,
        work: Worker,
        files: PolicyFiles | None = None,
    ) -> None:
        self.path = path
        self.config, self.sources = loaded.config, loaded.sources
        self.errors: list[str] = []
        self.trouble: str | None = None
        self._kernel, self._roster, self._work = kernel, roster, work
        self._inspector, self._recorder = inspector, recorder
        self._in_force: Known | None = None
        self._labelled: dict[LabelSet, PolicySource] = {}  # in force
        self._read: dict[LabelSet, PolicySource] = {}  # of who is there
        self._gone: dict[
            LabelSet, PolicySource
        ] = {}  # and was: nothing is parsed twice; who went last comes last
        self._refused: tuple[Known, float] | None = None  # and since when
        # what the kernel has, where that is known; and of what it was made
        self._standing: Standing | None = None
        self._made_of: tuple[tuple[PolicySource, ...], dict[LabelSet, PolicySource]] | None = None
        self._files = files or PolicyFiles()
        self._stamps = stamps(path, loaded.config)
        self.automata = Automata()
        self.offload = Offload()

    # -- putting in force -----------------------------------------------------------------------------------

    async def enforce(self) -> None:
        """Puts in force what is known now, in one step, where it is not. Raises PolicyTooLarge, DatapathError or
        what else went wrong; then what was in force still is."""
        known = self._known()
        if known != self._in_force:
            try:
                await self._put_in_force(known)
            except Exception as error:
                self.trouble, self._refused = str(error), (known, time.monotonic())
                raise
        self._in_force, self.trouble, self._refused = known, None, None

    async def catch_up(self) -> None:
        """`enforce` for those who can do no more about an error than go on: it is told, and tried again later."""
        refused, since = self._refused or (None, 0.0)
        if time.monotonic() < since + REFUSED_FOR and refused == self._known():
            return
        try:
            await self.enforce()
        except Exception as error:  # a task that runs as long as the agent must outlive whatever it is
            log.error("not in force, the policy before is", generation=self._generation, error=str(error))

    async def retire(self) -> None:
        """Takes what is no longer in force out of the kernel. It takes some 15 ms after a change, and nobody waits."""
        try:
            await self._work(self._kernel.datapath.retire)
            if self._standing is not None:
                await self._work(self._standing.prepare)
        except Exception as error:  # likewise
            log.error("policies of before are not deleted, tried again", error=str(error))

    def _known(self) -> Known:
        return Known(
            self.sources, dict(self._roster.endpoints), dict(self._roster.addresses), self._roster.outsiders
        )

    async def _put_in_force(self, known: Known) -> None:
        await self._read_labels(known)
        if self._made_of == (known.sources, self._read) and await self._changed(known):
            return
        labelled, standing = await self._compiled(known, await self._within_budget(known))
        await self._write_whole(standing)
        self._standing, self._made_of = standing, (known.sources, self._read)
        self._recorder.rules = standing.rules
        for own, source in labelled.items():
            if self._labelled.get(own) != source:
                for problem in errors_in(source.problems):
                    log.error("closed by its labels", error=str(problem))
        self._labelled = labelled

    async def _changed(self, known: Known) -> bool:
        """Puts in force how endpoints and addresses differ from those before. False: there is nothing to build on."""
        standing, self._standing = self._standing, None  # until it is known to be what the kernel has
        if standing is None:
            return False
        change = await self._work(standing.change, known.endpoints, known.addresses, known.outsiders)
        if change is None:
            return False
        new = self.offload.in_force.new(standing.profiles)
        automata = await self._work(self.automata.add, self._in_kernel(new))
        prepared = await self._work(self.offload.changed, new, automata, change.entries, change.tables)
        await self._write(
            self._kernel.datapath.change_policy,
            self._kernel.datapath.next_generation(),
            prepared,
            change.entries,
            change.identities,
            change.tables,
            automata,
        )
        self._standing = standing
        return True

    async def _write_whole(self, standing: Standing) -> None:
        generation, whole = self._kernel.datapath.next_generation(), standing.whole
        automata = await self._work(self.automata.compile, self._in_kernel(standing.profiles))
        prepared = await self._work(
            self.offload.prepared, generation, standing.profiles, automata, whole.entries, whole.tables
        )
        await self._write(
            self._kernel.datapath.write_policy,
            generation,
            prepared,
            whole.entries,
            whole.identities.items(),
            automata,
            whole.tables,
        )
        whole.entries.clear()  # there may be hundreds of thousands, and the tables have them

    def _in_kernel(self, profiles: dict[int, Profile]) -> dict[int, Profile]:
        """Those that the kernel is to have automata of."""
        return profiles if self.config.l7 == "auto" else {}

    async def _write(
        self, how: Callable[..., None], generation: int, prepared: Generation, *what: Any
    ) -> None:
        self._inspector.prepare_policy(prepared.profiles, generation)
        try:
            await self._work(how, generation, *what)
        except Exception:  # whatever it is, Python must know what the kernel goes by
            self._inspector.discard_policy(generation)
            raise
        self._inspector.policy_in_force(generation)
        self.offload.put_in_force(prepared)

    async def _compiled(
        self, known: Known, labelled: dict[LabelSet, PolicySource]
    ) -> tuple[dict[LabelSet, PolicySource], Standing]:
        """And the label policies as they are in it. Raises PolicyTooLarge where no label is to blame."""
        while True:
            try:
                return labelled, await self._work(
                    uncollected,
                    Standing,
                    [source.policy for source in (*known.sources, *labelled.values())],
                    known.endpoints,
                    known.addresses,
                    known.outsiders,
                )
            except PolicyTooLarge:
                fewer = give_way(labelled, self._labelled)
                if fewer is None:
                    raise
                labelled = fewer

    async def _read_labels(self, known: Known) -> None:
        kept = self._gone | self._read
        self._read = await self._work(label_policies, list(known.endpoints.values()), kept)
        gone = [(own, source) for own, source in kept.items() if own not in self._read]
        self._gone = dict(gone[-KEPT_MAX:])

    async def _within_budget(self, known: Known) -> dict[LabelSet, PolicySource]:
        return await self._work(
            within_budget,
            first_come(self._read, self._labelled),
            [source.policy for source in known.sources],
            known.endpoints,
            known.addresses,
            known.outsiders,
        )

    # -- what is in force -----------------------------------------------------------------------------------

    @property
    def in_force(self) -> tuple[PolicySource, ...]:
        """Of files and of labels."""
        return *self.sources, *self._labelled.values()

    def selecting(self, labels: Mapping[str, str]) -> list[PolicySource]:
        """The policies in force that select an endpoint with these labels."""
        labelled = self._labelled.get(own_labels(labels))
        return [
            *(source for source in self.sources if selects(source, labels)),
            *([labelled] if labelled is not None else []),
        ]

    # -- whom it is for -------------------------------------------------------------------------------------

    def exempts(self, labels: Mapping[str, str], inherited: Collection[str] = ()) -> str | None:
        """Why an endpoint with these labels is left alone; None: it is to be protected. `inherited`: keys of labels
        that its image gave it: those exclude nobody."""
        own = {key: value for key, value in labels.items() if key not in inherited}
        if any(each.items() <= own.items() for each in self.config.exclude):
            return "the config excludes it"
        if self.config.protect == "selected" and not self._claims(labels):
            return "no policy selects it"
        return None

    def _claims(self, labels: Mapping[str, str]) -> bool:
        return asks_for_policy(labels) or any(selects(each, labels) for each in self.sources)

    @property
    def _generation(self) -> int:
        return self._kernel.datapath.generation

    # -- reading again --------------------------------------------------------------------------------------

    async def reload(self) -> list[str]:
        """Reads config and policies again. Returns what is wrong, one line each; if anything is, nothing changed."""
        self.errors = await self._reload()
        return self.errors

    async def _reload(self) -> list[str]:
        try:
            loaded = await self._work(uncollected, load, self.path, self._files)
        except ConfigErrors as error:
            return [str(problem) for problem in error.problems]
        except Exception as error:  # files may hold anything; what their reader trips over is theirs
            return [f"{self.path}: it or a policy it names cannot be read: {error!r}"]
        if fixed := fixed_settings(self.config, loaded.config):
            return [f"{self.path}: {name} cannot change while running: restart the agent" for name in fixed]
        before, self.sources = self.sources, loaded.sources
        try:
            await self.enforce()
        except Exception as error:  # whatever it is, the sources must be those of the policy in force
            self.sources = before
            return [f"{self.path}: {error}", *await self._fall_back()]
        self.config = loaded.config
        log.info("policy in force", generation=self._generation, policies=len(self.sources))
        return []

    async def _fall_back(self) -> list[str]:
        """Nothing to do, unless the roster has changed since the policy in force was written."""
        try:
            await self.enforce()
        except Exception as error:  # told with the first error
            stays = f"generation {self._generation} stays in force"
            return [f"{self.path}: the policy before cannot be written anew either, {stays}: {error}"]
        return []

    @property
    def files(self) -> tuple[Path, ...]:
        """Those that policy depended on when they were last looked at."""
        return tuple(self._stamps)

    def files_changed(self) -> bool:
        """Whether any file that policy depends on differs from the last time this was asked."""
        before, self._stamps = self._stamps, stamps(self.path, self.config)
        return before != self._stamps


def selects(source: PolicySource, labels: Mapping[str, str]) -> bool:
    return any(source.policy.selects(labels, direction) for direction in Direction)


def fixed_settings(old: Config, new: Config) -> list[str]:
    """Settings that differ and that a running agent cannot change."""
    pairs = {
        "runtime": ((old.runtime, old.engine), (new.runtime, new.engine)),
        "state_dir": (old.state_dir, new.state_dir),
        "datapath": ((old.xdp, old.l7), (new.xdp, new.l7)),
        "new_containers": (old.new_containers, new.new_containers),
        "start_wait": (old.start_wait, new.start_wait),
    }
    return [name for name, (before, after) in pairs.items() if before != after]


def stamps(path: Path, config: Config) -> dict[Path, Stamp | None]:
    """Every file that policy depends on. None: it cannot be looked at, such as a link that leads nowhere."""
    files = [path]
    for entry in config.policies:
        files.append(entry)
        with contextlib.suppress(OSError):
            files += sorted(entry.iterdir()) if entry.is_dir() else []
    return {file: stamp(file) for file in files}


def stamp(file: Path) -> Stamp | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
