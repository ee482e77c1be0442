"""Suricata 7 inline: AF_PACKET in copy mode between the server's wire and the bridge."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.place import HTTP, UPLOAD, Place, Route
from benchmarks.policy import DENIED, METHODS, PREFIX_ALLOWED, UPLOAD_PATH, allowed_ports, rule_path
from benchmarks.systems.base import Kind, absent, told_version
from isolator.lab import wait_for

MODE = """\
  - interface: {one}
    copy-iface: {other}
    copy-mode: ips
    threads: 1
    cluster-id: {number}
    cluster-type: cluster_flow
    defrag: no
    use-mmap: yes
    tpacket-v3: no
    ring-size: 20000
    buffer-size: 1048576
"""
CONFIG = f"""\
%YAML 1.1
---
vars: {{address-groups: {{HOME_NET: any, EXTERNAL_NET: any}}, port-groups: {{}}}}
default-log-dir: FOLDER
outputs: []
stats: {{enabled: no}}
logging: {{default-log-level: error, outputs: [{{console: {{enabled: no}}}}]}}
app-layer: {{protocols: {{http: {{enabled: yes, libhtp: {{default-config: {{personality: IDS, request-body-limit: 4kb,
  response-body-limit: 4kb}}}}}}}}}}
stream: {{memcap: 512mb, inline: yes, midstream: no, checksum-validation: no,
  reassembly: {{memcap: 512mb, depth: 1mb}}}}
flow: {{memcap: 512mb, hash-size: 65536, prealloc: 10000}}
runmode: workers
unix-command: {{enabled: no}}
default-rule-path: FOLDER
rule-files: [race.rules]
classification-file: FOLDER/classification
reference-config-file: FOLDER/reference
af-packet:
{MODE.format(one="vserver", other="wire", number=98)}{MODE.format(one="wire", other="vserver", number=99)}"""


class Suricata:
    name, kind, layer7, refusal = "suricata", Kind.INLINE, True, "000"
    set_up = (
        "AF_PACKET copy-mode ips, workers, one thread a direction, TPACKET_V2; no outputs, no statistics. It needs "
        "whole packets as they are on a wire: TSO, GSO, GRO and checksum offload are off at both ends, which its "
        "figures pay for. It drops a forbidden connection silently. With more rules, so many more paths are denied: an "
        "allow list of many paths is not what a signature can say."
    )

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._route: Route | None = None

    def missing(self) -> str:
        return absent("suricata", "ethtool")

    def version(self) -> str:
        return told_version("suricata", "-V")

    def config(self, rules: int = 0, policy: bool = True) -> str:
        return CONFIG + "\n# race.rules\n" + "".join(f"# {line}\n" for line in self.signatures(rules, policy))

    def signatures(self, rules: int = 0, policy: bool = True) -> list[str]:
        if not policy:
            return []
        ports = f"[{','.join(map(str, allowed_ports(extra=False)))}]"
        said = [
            f'drop tcp any any -> any !{ports} (flags:S; msg:"port";',
            f'drop http any any -> any {HTTP} (http.uri; content:!"{PREFIX_ALLOWED}"; depth:{len(PREFIX_ALLOWED)};',
            f"drop http any any -> any {HTTP} (http.method; "
            + " ".join(f'content:!"{method}";' for method in METHODS),
            f'drop http any any -> any {UPLOAD} (http.uri; content:!"{UPLOAD_PATH}"; depth:{len(UPLOAD_PATH)};',
            f'drop http any any -> any {UPLOAD} (http.method; content:!"POST";',
        ]
        said += [
            f'drop http any any -> any {HTTP} (http.uri; content:"{rule_path(number)}"; startswith;'
            for number in range(rules)
        ]
        return [f"{line} sid:{number};)" for number, line in enumerate(said, 1)]

    def start(self, place: Place, policy: bool = True) -> Route:
        self._route = place.lane(self.name, bridged=False)
        host = f"{self.name}-host"
        place.ip(host, "link add wire type veth peer name vwire")
        place.ip(host, "link set vwire master br0 up")
        place.ip(host, "link set wire up")
        off = ("tso", "off", "gso", "off", "gro", "off", "tx", "off", "rx", "off")
        ends = ((host, ("vclient", "vserver", "wire", "vwire")),
                (f"{self.name}-client", ("eth0",)), (f"{self.name}-server", ("eth0",)))  # fmt: skip
        for name, devices in ends:
            for device in devices:
                place.lab.inside(name, "ethtool", "-K", device, *off)
        self._run(place, 0, policy)
        return self._route

    def apply(self, place: Place, rules: int) -> None:
        self.stop(place)
        self._run(place, rules, True)

    def _run(self, place: Place, rules: int, policy: bool) -> None:
        folder = place.lab.root / self.name
        folder.mkdir(exist_ok=True)
        (folder / "suricata.yaml").write_text(CONFIG.replace("FOLDER", str(folder)))
        (folder / "race.rules").write_text("\n".join([*self.signatures(rules, policy), ""]))
        for empty in ("classification", "reference"):
            (folder / empty).write_text("")
        command = ("suricata", "-c", str(folder / "suricata.yaml"), "--af-packet", "-l", str(folder))
        self._process = place.start(f"{self.name}-host", *command)
        wait_for(lambda: self._ready(place, folder), "suricata does not forward", 60)

    def _ready(self, place: Place, folder: Path) -> bool:
        assert self._route is not None and self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"suricata ended: see {folder}")
        return (
            place.lab.curl(self._route.client, self._route.url(PREFIX_ALLOWED + "books"), *QUICKLY) == "200"
        )

    def stop(self, place: Place) -> None:
        if self._process is not None:
            place.end(self._process)
            self._process = None

    def processes(self) -> list[int]:
        return [self._process.pid] if self._process is not None else []


QUICKLY = ("-m", "1", "-o", "/dev/null", "-w", "%{http_code}")
assert not DENIED.startswith(PREFIX_ALLOWED)
