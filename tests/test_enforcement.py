"""Policy on its way into force: what fails leaves the one before, and nobody waits for a compilation."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from isolator import enforcement
from isolator.control.config import load
from isolator.control.flowlog import FlowLog
from isolator.control.label_policy import label_policies
from isolator.core.automaton.states import Automaton
from isolator.core.compile import PolicyEntry, PolicyTooLarge
from isolator.core.inspector import Inspector
from isolator.core.model import Endpoint, Outsider
from isolator.core.standing import Standing
from isolator.datapath.libbpf import BpfError
from isolator.enforcement import Enforcement, stamps
from isolator.records import Recorder
from isolator.roster import Roster
from isolator.worker import Worker

CONFIG = "state_dir: {folder}/state\npolicies: [policies/]\nendpoints: []\n"
POLICY = """\
kind: Policy
metadata: {{name: {name}}}
spec:
  select: {{app: shop}}
  mode: protect
  ingress:
    - name: web
      from: [{{cidr: 10.0.0.0/8}}]
      ports: [{{port: {port}, protocol: tcp}}]
      http: [{{methods: [GET], path: /ok}}]
"""


class FakeMaps:
    """Implements enforcement.PolicyMaps. `full`: what a write raises; `late`: what retiring the one before raises."""

    def __init__(self) -> None:
        self.generation = 0
        self.last = 0
        self.ports: set[int] = set()
        self.entries: list[PolicyEntry] = []
        self.wholes = 0
        self.automata: set[int] = set()
        self.full: Exception | None = None
        self.late: Exception | None = None

    def next_generation(self) -> int:
        self.last += 1
        return self.last

    def write_policy(
        self,
        generation: int,
        entries: Iterable[PolicyEntry],
        identities: Iterable[tuple[tuple[bytes, int], int]],
        automata: Mapping[int, Automaton],
        selections: Mapping[tuple[int, int], int],
    ) -> None:
        if self.full is not None:
            raise self.full
        self.entries, self.automata, self.wholes = [], set(), self.wholes + 1
        self.change_policy(generation, entries, {}, selections, automata)

    def change_policy(
        self,
        generation: int,
        entries: Iterable[PolicyEntry],
        identities: Mapping[tuple[bytes, int], tuple[int, int]],
        selections: Mapping[tuple[int, int], int],
        automata: Mapping[int, Automaton],
    ) -> None:
        if self.full is not None:
            raise self.full
        self.generation = generation
        self.entries += entries
        self.automata |= automata.keys()
        used = set(selections.values())
        self.ports = {entry.port for entry in self.entries if entry.endpoint in used} - {0}

    def retire(self) -> dict[int, int]:
        if self.late is not None:
            raise self.late
        return {}


class Setting:
    """A config with one policy for port 80, one endpoint, and an Enforcement. Implements enforcement.Kernel."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.datapath = FakeMaps()
        (folder / "policies").mkdir()
        (folder / "isolator.yaml").write_text(CONFIG.format(folder=folder))
        self.put(80)
        self.roster, self.inspector, self.worker = Roster(), Inspector({}, 0), Worker()
        self.roster.put(1, Endpoint("shop", {"app": "shop"}), (ip_address("10.0.0.1"),))
        path = folder / "isolator.yaml"
        recorder = Recorder(FlowLog(), self.roster.endpoints, self.roster.owners)
        self.policy = Enforcement(path, load(path), self, self.roster, self.inspector, recorder, self.worker)

    def put(self, port: int, name: str = "p") -> None:
        (self.folder / "policies" / f"{name}.yaml").write_text(POLICY.format(name=name, port=port))

    def more(self) -> None:
        self.roster.put(2, Endpoint("other", {"app": "shop"}), (ip_address("10.0.0.2"),))

    def play(self, *steps: Callable[[], Coroutine[Any, Any, object]]) -> list[Any]:
        async def run() -> list[Any]:
            results = [await step() for step in (self.policy.enforce, *steps)]
            await self.worker.close()
            return results[1:]

        return asyncio.run(run())

    def agree(self, generation: int) -> None:
        """Kernel and Python go by the same generation."""
        assert self.datapath.generation == self.inspector.generation == generation


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def test_what_is_in_force_is_not_written_again(setting: Setting) -> None:
    setting.play(setting.policy.enforce, setting.policy.reload, setting.policy.catch_up)
    setting.agree(1)


def test_a_reload(setting: Setting) -> None:
    async def reload() -> list[str]:
        setting.put(81)
        return await setting.policy.reload()

    assert setting.play(reload) == [[]]
    assert setting.datapath.ports == {81}
    setting.agree(2)


@pytest.mark.parametrize(
    "error", [BpfError("map policy: full", 7), PolicyTooLarge("too much"), RuntimeError("a bug")]
)
def test_a_reload_that_cannot_be_written_leaves_the_policy_before(setting: Setting, error: Exception) -> None:
    async def reload() -> list[str]:
        setting.put(81)
        setting.datapath.full = error
        return await setting.policy.reload()

    ((told,),) = setting.play(reload)
    assert told == f"{setting.folder}/isolator.yaml: {error}"
    assert setting.datapath.ports == {80} and setting.policy.trouble is None
    setting.agree(1)


def test_where_the_policy_before_cannot_be_written_either_it_is_said_so(setting: Setting) -> None:
    async def reload() -> list[str]:
        setting.more()
        setting.put(81)
        setting.datapath.full = BpfError("map policy: full", 7)
        return await setting.policy.reload()

    async def again() -> list[str]:
        setting.datapath.full = None
        return await setting.policy.reload()

    failed, told = setting.play(reload, again)
    assert len(failed) == 2 and "generation 1 stays in force" in failed[1]
    assert told == [] and setting.datapath.ports == {81} and setting.policy.trouble is None
    setting.agree(4)


def test_what_fails_behind_the_switch_changes_nothing_about_it(setting: Setting) -> None:
    async def reload() -> list[str]:
        setting.put(81)
        setting.datapath.late = BpfError("membarrier failed", 1)
        return await setting.policy.reload()

    assert setting.play(reload, setting.policy.retire) == [[], None]
    setting.agree(2)


def test_what_was_refused_is_not_tried_each_second(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused() -> None:
        setting.more()
        setting.datapath.full = BpfError("map policy: full", 7)
        for _ in range(5):
            await setting.policy.catch_up()

    async def later() -> None:
        setting.datapath.full = None
        monkeypatch.setattr(enforcement, "REFUSED_FOR", 0.0)
        assert setting.policy.trouble is not None
        await setting.policy.catch_up()

    setting.play(refused, later)
    assert setting.policy.trouble is None
    setting.agree(3)


def test_the_loop_goes_on_while_policy_is_compiled(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: Any) -> Any:
        time.sleep(0.3)
        return Standing(*arguments)

    async def beats() -> int:
        count, enforcing = 0, asyncio.create_task(setting.policy.reload())
        while not enforcing.done():
            await asyncio.sleep(0.01)
            count += 1
        return count

    setting.put(81)
    monkeypatch.setattr(enforcement, "Standing", slow)
    assert setting.play(beats)[0] > 10


def test_who_comes_moves_and_goes_needs_no_compilation(setting: Setting) -> None:
    async def change() -> None:
        setting.more()
        await setting.policy.catch_up()
        setting.roster.put(2, Endpoint("other", {"app": "else"}), (ip_address("10.0.0.3"),))
        await setting.policy.catch_up()
        setting.roster.remove(2)
        await setting.policy.catch_up()

    setting.play(change, setting.policy.retire)
    assert setting.datapath.wholes == 1 and setting.datapath.ports == {80}
    setting.agree(4)


def test_a_profile_that_a_change_brings_has_its_automaton(setting: Setting) -> None:
    async def refused() -> None:
        setting.put(81, "q")
        setting.datapath.full = BpfError("map policy: full", 7)
        await setting.policy.reload()
        setting.datapath.full = None

    async def change() -> None:
        setting.roster.put(2, Endpoint("other", {"app": "till"}), (ip_address("10.0.0.2"),))
        await setting.policy.catch_up()

    (setting.folder / "policies" / "till.yaml").write_text(
        POLICY.format(name="till", port=82).replace("app: shop", "app: till").replace("/ok", "/till")
    )
    setting.policy.sources = load(setting.folder / "isolator.yaml").sources
    setting.play(refused, change)
    offload = setting.policy.offload.in_force
    assert setting.datapath.wholes == 1 and setting.datapath.automata == {1, 2} == offload.automata.keys()
    assert [sorted({use[3] for use in offload.uses[number]}) for number in (1, 2)] == [[80], [82]]


def test_a_change_that_cannot_be_written_is_followed_by_a_whole_compilation(setting: Setting) -> None:
    async def change() -> None:
        setting.more()
        setting.datapath.full = BpfError("map policy: full", 7)
        await setting.policy.catch_up()
        setting.agree(1)
        setting.datapath.full = None
        setting.roster.put(3, Endpoint("third", {"app": "shop"}), (ip_address("10.0.0.3"),))
        await setting.policy.catch_up()

    setting.play(change)
    assert setting.datapath.wholes == 2 and setting.policy.trouble is None
    setting.agree(3)


def test_labels_that_were_refused_are_not_taken_for_those_in_force(setting: Setting) -> None:
    async def change() -> None:
        setting.roster.put(2, Endpoint("api", labelled(8080)), (ip_address("10.0.0.2"),))
        setting.datapath.full = BpfError("map policy: full", 7)
        await setting.policy.catch_up()
        setting.datapath.full = None
        setting.roster.put(3, Endpoint("third", {}), ())
        await setting.policy.catch_up()

    setting.play(change)
    assert setting.datapath.ports == {80, 8080}


def test_files_that_no_reader_expects(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr(enforcement, "load", broken)
    ((told,),) = setting.play(setting.policy.reload)
    assert told.startswith(f"{setting.folder}/isolator.yaml: ") and "too deep" in told
    setting.agree(1)


def test_settings_that_need_a_restart(setting: Setting) -> None:
    async def reload() -> list[str]:
        setting.put(81)
        config = setting.folder / "isolator.yaml"
        config.write_text(config.read_text() + "datapath: {xdp: generic}\n")
        return await setting.policy.reload()

    ((told,),) = setting.play(reload)
    assert told.endswith("datapath cannot change while running: restart the agent")
    assert setting.datapath.ports == {80}


# -- policy from labels --------------------------------------------------------------------------------------

LABEL = "isolator.allow.ingress"


def labelled(port: int) -> dict[str, str]:
    return {"name": "api", LABEL: f"[{{ports: [{{port: {port}}}]}}]"}


def names(setting: Setting) -> list[str]:
    return [source.policy.name for source in setting.policy.in_force]


def told_errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if "closed by its labels" in line]


def test_labels_come_into_force_with_their_endpoint_and_go_with_it(setting: Setting) -> None:
    async def appear() -> None:
        setting.roster.put(2, Endpoint("api", labelled(8080)), (ip_address("10.0.0.2"),))
        await setting.policy.catch_up()
        assert setting.datapath.ports == {80, 8080} and names(setting) == ["p", "label:api"]
        assert [source.policy.name for source in setting.policy.selecting(labelled(8080))] == ["label:api"]

    async def change() -> None:
        setting.roster.put(2, Endpoint("api", labelled(8081)), (ip_address("10.0.0.2"),))
        await setting.policy.catch_up()
        assert setting.datapath.ports == {80, 8081} and names(setting) == ["p", "label:api"]

    async def go() -> None:
        setting.roster.remove(2)
        await setting.policy.catch_up()
        assert setting.datapath.ports == {80} and names(setting) == ["p"]

    setting.play(appear, change, go)
    setting.agree(4)


def test_wrong_labels_close_their_container_alone_and_are_told_once(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    async def appear() -> None:
        setting.roster.put(2, Endpoint("api", {"name": "api", "app": "shop", LABEL: "x"}), ())
        await setting.policy.catch_up()

    async def reload() -> list[str]:
        setting.put(81)
        return await setting.policy.reload()

    assert setting.play(appear, reload) == [None, []]
    assert setting.datapath.ports == {81} and setting.policy.trouble is None
    assert names(setting) == ["p", "label:api"]
    (told,) = told_errors(capsys.readouterr().out)
    assert "container api, label isolator.allow.ingress:1:1: " in told


def test_labels_are_read_when_something_changes_and_in_the_worker(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def reading(*arguments: Any) -> Any:
        read.append(threading.current_thread().name)
        return label_policies(*arguments)

    async def appear() -> None:
        setting.roster.put(2, Endpoint("api", labelled(8080)), ())
        for _ in range(5):
            await setting.policy.catch_up()

    monkeypatch.setattr(enforcement, "label_policies", reading)
    setting.play(appear)
    assert len(read) == 2 and threading.main_thread().name not in read


def test_what_was_read_of_labels_that_went_for_a_while_is_not_read_again(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last ones that went; but whoever comes back closed is told again."""
    monkeypatch.setattr(enforcement, "KEPT_MAX", 2)
    known: list[set[str]] = []

    def reading(endpoints: Any, before: Any) -> Any:
        known.append({source.policy.name for source in before.values()})
        return label_policies(endpoints, before)

    async def come_and_go() -> None:
        for name in ("a", "b", "c", "a"):
            setting.roster.put(2, Endpoint(name, {"name": name, LABEL: "x"}), ())
            await setting.policy.catch_up()
            setting.roster.remove(2)
            await setting.policy.catch_up()

    monkeypatch.setattr(enforcement, "label_policies", reading)
    setting.play(come_and_go)
    a, b, c = "label:a", "label:b", "label:c"
    assert known[-8:] == [set(), {a}, {a}, {a, b}, {a, b}, {a, b, c}, {b, c}, {b, c, a}]
    assert len(told_errors(capsys.readouterr().out)) == 4


def test_where_all_do_not_fit_the_newcomers_labels_close_it_and_the_others_stay(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small_kernel(policies: Any, *others: Any) -> Any:
        rules = [rule for policy in policies for rule in policy.ingress or ()]
        if sum(bool(match.port) for rule in rules for match in rule.ports) > 3:
            raise PolicyTooLarge("too much")
        return Standing(policies, *others)

    async def appear() -> None:
        for number, port in (2, 8080), (3, 8081), (4, 8082):
            name = f"api{number}"
            setting.roster.put(number, Endpoint(name, {**labelled(port), "name": name}), ())
            await setting.policy.catch_up()

    async def reload() -> list[str]:
        setting.put(81, "q")
        return await setting.policy.reload()

    monkeypatch.setattr(enforcement, "Standing", small_kernel)
    _, (told,) = setting.play(appear, reload)
    assert told.endswith("isolator.yaml: too much"), "no newcomer is to blame"
    assert setting.datapath.ports == {80, 8080, 8081} and setting.policy.trouble is None
    assert names(setting) == ["p", "label:api2", "label:api3", "label:api4"]
    (line,) = told_errors(capsys.readouterr().out)
    assert "container api4, label isolator.allow.ingress:1:1: no room in the kernel" in line


def test_what_cannot_be_written_leaves_the_labels_policies_before(setting: Setting) -> None:
    async def appear() -> None:
        setting.roster.put(2, Endpoint("api", labelled(8080)), ())
        setting.datapath.full = PolicyTooLarge("too much")
        await setting.policy.catch_up()

    setting.play(appear)
    assert names(setting) == ["p"] and setting.policy.selecting(labelled(8080)) == []
    setting.agree(1)


def test_every_change_of_the_files_is_seen_once(setting: Setting) -> None:
    folder = setting.folder / "policies"
    changes: list[Callable[[], object]] = [
        lambda: (folder / "dangling.yaml").symlink_to("nowhere"),
        lambda: (folder / "dangling.yaml").unlink(),
        lambda: setting.put(8080),
        lambda: (folder / "q.yaml").write_text(""),
        lambda: (folder / "q.yaml").replace(folder / "p.yaml"),
        lambda: (setting.folder / "isolator.yaml").unlink(),
        lambda: (folder / "p.yaml").unlink(),
        lambda: folder.rmdir(),
    ]
    assert not setting.policy.files_changed()
    for change in changes:
        change()
        assert setting.policy.files_changed()
        assert not setting.policy.files_changed()


def test_a_stamp_of_what_cannot_be_looked_at(setting: Setting) -> None:
    link = setting.folder / "policies" / "dangling.yaml"
    link.symlink_to("nowhere")
    assert stamps(setting.policy.path, setting.policy.config)[link] is None


EXEMPT = [
    ("", {"app": "shop"}, None),
    ("", {"app": "other"}, None),
    ("protect: selected\n", {"app": "shop"}, None),
    ("protect: selected\n", {"app": "other"}, "no policy selects it"),
    ("protect: selected\n", {"isolator.allow.ingress": "[]"}, None),
    ("protect: selected\n", {"isolator.mod": "protect"}, None),
    ("protect: selected\n", {"isolator.exclude": "false"}, "no policy selects it"),
    ("exclude: [{app: shop, role: db}]\n", {"app": "shop"}, None),
    (
        "exclude: [{role: x}, {app: shop, role: db}]\n",
        {"app": "shop", "role": "db"},
        "the config excludes it",
    ),
]


@pytest.mark.parametrize(("config", "labels", "reason"), EXEMPT)
def test_who_is_left_alone(setting: Setting, config: str, labels: dict[str, str], reason: str | None) -> None:
    async def reload() -> list[str]:
        (setting.folder / "isolator.yaml").write_text(CONFIG.format(folder=setting.folder) + config)
        return await setting.policy.reload()

    assert setting.play(reload) == [[]]
    assert setting.policy.exempts(labels) == reason


def test_the_gate_cannot_change_while_running(setting: Setting) -> None:
    async def reload() -> list[str]:
        (setting.folder / "isolator.yaml").write_text(
            CONFIG.format(folder=setting.folder) + "new_containers: open\n"
        )
        return await setting.policy.reload()

    ((told,),) = setting.play(reload)
    assert "new_containers cannot change while running" in told


def test_outsiders_make_a_policy_of_their_own(setting: Setting) -> None:
    async def meet() -> None:
        setting.roster.put_outsiders((Outsider("host", {"entity": "host"}, (ip_address("10.0.0.9"),)),))
        await setting.policy.catch_up()

    setting.play(meet)
    setting.agree(2)
