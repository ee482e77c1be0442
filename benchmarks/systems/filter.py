"""What the layer-4 filters share: a lane of their own, rules in the namespace of its bridge, no process."""

from __future__ import annotations

import subprocess

from benchmarks.place import Place, Route, wait_answer
from benchmarks.systems.base import Kind, absent, told_version
from isolator.lab import PREFIX

TIME_WAIT = 5  # s that conntrack remembers a closed connection, or its table fills up in the connect suite


class Filter:
    """Subclasses say `name`, `commands`, `loads`, `set_up` and `config`."""

    name: str
    kind = Kind.KERNEL
    layer7, refusal = False, "000"
    set_up: str
    commands: tuple[str, ...]
    loads: tuple[str, ...]

    def missing(self) -> str:
        return absent(*self.commands)

    def version(self) -> str:
        return told_version(self.commands[0], "--version")

    def config(self, rules: int = 0, policy: bool = True, extra: bool = False) -> str:
        raise NotImplementedError

    def start(self, place: Place, policy: bool = True) -> Route:
        route = place.lane(self.name)
        self._load(self.config(policy=policy))
        settings = (f"nf_conntrack_tcp_timeout_time_wait={TIME_WAIT}", "bridge-nf-call-iptables=1")
        for where, setting in zip(("net.netfilter", "net.bridge"), settings, strict=True):
            place.lab.inside(f"{self.name}-host", "sysctl", "-qw", f"{where}.{setting}")
        wait_answer(place, route)
        return route

    def apply(self, place: Place, rules: int) -> None:
        self._load(self.config(rules))

    def edit(self, place: Place, rules: int, extra: bool) -> None:
        self._load(self.config(rules, extra=extra))

    def _load(self, config: str) -> None:
        """All or nothing; raises with what it said."""
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{PREFIX}-{self.name}-host", *self.loads],
            input=config, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{self.name}: {done.stderr.strip()}")

    def stop(self, place: Place) -> None: ...

    def processes(self) -> list[int]:
        return []
