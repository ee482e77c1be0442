"""Policy from labels: an endpoint's own `isolator.*` labels, as a policy that selects this container alone.

    isolator.mode, isolator.failure, isolator.deny_with     a word, as in a policy's spec
    isolator.allow.ingress, isolator.deny.ingress           a YAML list of rules as under `ingress:`, without `action`
    isolator.allow.egress, isolator.deny.egress             likewise
    isolator.exclude                                        is for the runtime, and no policy

    labels → each label: a word, or a document of rules → PolicySource
                                            └─ any error → one that lets nothing in or out, with its problems

A direction with a label is selected. Any other label of ours is an error: a typo must not mean that a container is
unprotected. A container closes by a rule that denies everybody, since what policies allow adds up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import StrEnum
from typing import Any

from pydantic import RootModel

from isolator.control.config import PolicySource
from isolator.control.findings import policy_findings
from isolator.control.problems import Problem, errors_in
from isolator.control.runtime import EXCLUDE, OWN, UNTOLD, is_own
from isolator.control.schema import EgressModel, IngressModel, RuleModel
from isolator.control.validation import unknown_word, validate
from isolator.control.yaml_source import Document, parse_documents
from isolator.core.model import Direction, Endpoint
from isolator.core.policy import Action, DenyWith, Failure, LabelSet, Mode, Policy, Rule

LABEL_MAX = 8192
"""Bytes of a label's value. What is larger belongs into a file."""

LABELS_MAX = 16
"""Labels of ours that a container may have. There are 8."""

NODES_MAX = 2048
"""Values of a label after its aliases are written out."""

POINTS_MAX = 64
"""Different ports, and different networks, that a container's labels name: the kernel's entries are multiples of
them, and one container must not fill its maps."""

COMBINATIONS_MAX = 256
"""Ports times peers of each rule, of all of a container's rules."""

PROBLEMS_MAX = 10
"""Problems of one container that are told."""

CLOSED_RULE = "wrong-labels"


class IngressRules(RootModel[list[IngressModel]]):
    """The value of `isolator.allow.ingress` and `isolator.deny.ingress`."""


class EgressRules(RootModel[list[EgressModel]]):
    """Likewise, of egress."""


WORDS: dict[str, type[StrEnum]] = {"mode": Mode, "failure": Failure, "deny_with": DenyWith}
RULES = {
    f"{OWN}{action}.{direction.name.lower()}": (action, direction)
    for direction in (Direction.INGRESS, Direction.EGRESS)
    for action in (Action.ALLOW, Action.DENY)
}
KNOWN = (*(OWN + word for word in WORDS), *RULES, EXCLUDE)


# -- all endpoints -------------------------------------------------------------------------------------------


def own_labels(labels: Mapping[str, str]) -> LabelSet:
    """What a label policy is made of, and what it selects: the labels of ours, and the name. Empty: none of ours."""
    own = {key: value for key, value in labels.items() if is_own(key)}
    return frozenset({**own, "name": labels.get("name", "")}.items()) if own else frozenset()


def asks_for_policy(labels: Mapping[str, str]) -> bool:
    """Whether there is a label of ours that is not plainly for the runtime."""
    plain = (EXCLUDE, "true"), (EXCLUDE, "false")
    return any(is_own(key) and (key, value.lower()) not in plain for key, value in labels.items())


def label_policies(
    endpoints: Iterable[Endpoint], known: Mapping[LabelSet, PolicySource]
) -> dict[LabelSet, PolicySource]:
    """The label policies of all endpoints, by `own_labels`. `known`: what was read before is not read again."""
    found = {}
    for own in dict.fromkeys(own_labels(endpoint.labels) for endpoint in endpoints):
        source = known.get(own) or label_policy(dict(own))
        if source is not None:
            found[own] = source
    return found


# -- one container -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Read:
    """What the labels say so far."""

    words: dict[str, Any] = field(default_factory=dict)
    rules: dict[Direction, list[Rule]] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def label_policy(labels: Mapping[str, str]) -> PolicySource | None:
    """The policy that a container's labels carry; None: they ask for none. Never raises: with any error in them it
    is one that closes the container, and its `problems` say why."""
    if not asks_for_policy(labels):
        return None
    own, container = own_labels(labels), labels.get("name", "")
    keys = sorted(key for key, _ in own if is_own(key))
    read = Read()
    if len(keys) > LABELS_MAX:
        origin = f"container {container}, labels {OWN}*"
        problem = Problem(origin, 1, 1, f"{len(keys)} labels, of {LABELS_MAX}: known are {', '.join(KNOWN)}")
        return closed(f"label:{container}", container, own, origin, [problem])
    for key in keys:
        place = f"container {container}, label {shortened(key if key.isprintable() else repr(key))}"
        try:
            read_label(key, labels[key], place, read)
        except Exception as error:  # a label may hold anything, and closes nobody but its container
            read.problems.append(Problem(place, 1, 1, f"cannot be read: {error!r}"))
    shown = ", ".join(shortened(key) for key in keys if key.isprintable())
    origin = f"container {container}, label{'s' * (len(keys) > 1)} {shown}"
    name, ingress, egress = f"label:{container}", Direction.INGRESS, Direction.EGRESS
    policy = Policy(
        name, own, **read.words,
        ingress=tuple(read.rules[ingress]) if ingress in read.rules else None,
        egress=tuple(read.rules[egress]) if egress in read.rules else None,
    )  # fmt: skip
    if not errors_in(read.problems):
        read.problems += whole_problems(policy, origin)
    if errors_in(read.problems):
        return closed(name, container, own, origin, errors_in(read.problems)[:PROBLEMS_MAX])
    document = written(name, container, read.written)
    return PolicySource(policy, origin, document, tuple(read.problems[:PROBLEMS_MAX]))


def written(name: str, container: str, spec: dict[str, Any]) -> dict[str, Any]:
    """As it would stand in a file."""
    return {"kind": "Policy", "metadata": {"name": name}, "spec": {"select": {"name": container}, **spec}}


def closed(
    name: str, container: str, own: LabelSet, origin: str, problems: Iterable[Problem]
) -> PolicySource:
    rule = Rule(CLOSED_RULE, Action.DENY)
    rules = [{"name": rule.name, "action": rule.action.value}]
    spec = {"mode": Mode.PROTECT.value, "ingress": rules, "egress": rules}
    policy = Policy(name, own, ingress=(rule,), egress=(rule,))
    return PolicySource(policy, origin, written(name, container, spec), tuple(problems))


def whole_problems(policy: Policy, origin: str) -> Iterator[Problem]:
    """What the labels must be together."""
    rules = [*(policy.ingress or ()), *(policy.egress or ())]
    if policy.ingress is None and policy.egress is None:
        hint = f"add {OWN}allow.ingress (its value [] lets nothing in) or another of {', '.join(RULES)}"
        yield Problem(origin, 1, 1, f"without rules these labels decide nothing: {hint}")
    names = [rule.name for rule in rules]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield Problem(origin, 1, 1, f"two rules are named {name!r}: give each rule a name of its own")
    sizes: dict[str, set[Any]] = {
        "ports": {port for rule in rules for port in rule.ports},
        "networks": set(policy.networks()),
    }
    for what, each in sizes.items():
        if len(each) > POINTS_MAX:
            yield Problem(origin, 1, 1, f"{len(each)} {what}, of {POINTS_MAX}: put this policy into a file")
    made = sum(len(rule.ports) * max(1, len(rule.peers or ())) for rule in rules)
    if made > COMBINATIONS_MAX:
        text = f"{made} combinations of port and peer, of {COMBINATIONS_MAX}: put this policy into a file"
        yield Problem(origin, 1, 1, text)


# -- one label -----------------------------------------------------------------------------------------------


def read_label(key: str, value: str, place: str, read: Read) -> None:
    """Puts into `read` what the label says, or what is wrong with it, at `place`."""
    word = key.removeprefix(OWN)
    if key == UNTOLD:
        read.problems.append(Problem(place, 1, 1, value))
    elif key == EXCLUDE:
        read.problems += word_problems(key, value.lower(), ("true", "false"), place)
    elif key in RULES:
        read_rules(key, value, place, read)
    elif key in KNOWN:
        problems = word_problems(key, value, [each.value for each in WORDS[word]], place)
        read.problems += problems
        if not problems:
            read.words[word] = WORDS[word](value)
            read.written[word] = value
    else:
        near = get_close_matches(shortened(key.lower()), KNOWN, 1)
        hint = f"did you mean {near[0]}? Known" if near else "remove it; known"
        read.problems.append(Problem(place, 1, 1, f"there is no such label: {hint}: {', '.join(KNOWN)}"))


def word_problems(key: str, value: str, words: Iterable[str], place: str) -> list[Problem]:
    if value in words:
        return []
    return [Problem(place, 1, 1, unknown_word(f"'{key}'", shortened(value), ", ".join(words)))]


def shortened(value: str) -> str:
    return value if len(value) <= 40 else f"{value[:40]}…"


def read_rules(key: str, value: str, place: str, read: Read) -> None:
    action, direction = RULES[key]
    document, problems = read_document(value, place)
    read.problems += problems
    read.rules.setdefault(direction, [])
    if document is None:
        return
    found, wrong = rules_in(document, direction)
    read.problems += [*wrong, *rule_problems(document, direction)]
    if found is None or errors_in(read.problems):
        return
    for at, rule in enumerate(found):
        name = rule.name or f"{key.removeprefix(OWN)}[{at}]"
        read.rules[direction].append(replace(rule.to_core(direction, at), name=name, action=action))
    as_written = read.written.setdefault(direction.name.lower(), [])
    as_written += [{**rule, "action": action.value} for rule in document.value]


def read_document(value: str, place: str) -> tuple[Document | None, list[Problem]]:
    data = value.encode("utf-8", "surrogatepass")
    if len(data) > LABEL_MAX:
        return None, [Problem(place, 1, 1, f"larger than {LABEL_MAX} bytes: put this policy into a file")]
    if not value.strip():
        return None, [Problem(place, 1, 1, "an empty value: write a list of rules, or [] for none")]
    documents, problems = parse_documents(data, place, NODES_MAX)
    if len(documents) > 1:
        problems.append(documents[1].problem((), "a second document: remove '---' and what follows"))
    return (documents[0] if documents else None), problems


def rules_in(document: Document, direction: Direction) -> tuple[Sequence[RuleModel] | None, list[Problem]]:
    if direction is Direction.INGRESS:
        ingress, problems = validate(document, IngressRules)
        return (None if ingress is None else ingress.root), problems
    egress, problems = validate(document, EgressRules)
    return (None if egress is None else egress.root), problems


def rule_problems(document: Document, direction: Direction) -> Iterator[Problem]:
    """What `findings` has to say of the rules as a policy's, and that they have no action of their own."""
    spec = {direction.name.lower(): document.value}
    for finding in policy_findings({"spec": spec}):
        path = finding.path[2:]
        if not document.is_broken(path):
            yield document.problem(path, finding.message, finding.at_key, finding.warning)
    for at, rule in enumerate(document.value if isinstance(document.value, list) else ()):
        if isinstance(rule, dict) and "action" in rule:
            yield document.problem(
                (at, "action"), "the label's name says what becomes of it: remove 'action'", at_key=True
            )
