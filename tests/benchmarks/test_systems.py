"""One policy, translated: each adapter allows the same; without the policy its configuration is another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from benchmarks.policy import rule_path, rule_source
from benchmarks.systems import BASELINE, System, all_systems
from benchmarks.systems.envoy import Envoy
from benchmarks.systems.haproxy import Haproxy
from benchmarks.systems.iptables import Iptables
from benchmarks.systems.isolator import Isolator
from benchmarks.systems.nftables import Nftables
from benchmarks.systems.nginx import Nginx
from benchmarks.systems.suricata import Suricata
from isolator.control.config import load

CONFIGURED = [system for system in all_systems() if system.name != BASELINE]
by_name = pytest.mark.parametrize("system", CONFIGURED, ids=lambda system: system.name)


@by_name
def test_without_the_policy_the_configuration_is_another(system: System) -> None:
    assert system.config() != system.config(policy=False)


@by_name
def test_all_know_the_same_ports(system: System) -> None:
    for port in ("80", "8081", "9091"):
        assert port in system.config()


def test_isolator(tmp_path: Path) -> None:
    """The agent takes it, with rules too."""
    (tmp_path / "policy.yaml").write_text(Isolator().config(rules=3))
    (tmp_path / "isolator.yaml").write_text("state_dir: /run/none\npolicies: [policy.yaml]\n")
    (policy,) = load(tmp_path / "isolator.yaml").policies
    read = next(rule for rule in policy.ingress if rule.name == "read")
    assert [http.path.source for http in read.http] == ["/api/v1/**"] + [
        f"{rule_path(n)}**" for n in range(3)
    ]


def test_haproxy(tmp_path: Path) -> None:
    system = Haproxy()
    system.write(tmp_path, system.config(2), 2, False)
    assert (tmp_path / "paths").read_text().split() == ["/api/v1/", "/rules/0/", "/rules/1/"]
    assert f"-f {tmp_path}/paths" in (tmp_path / "config").read_text()
    assert system.config().count("http-request deny unless") == 2
    assert "deny" not in system.config(policy=False)


def test_nginx() -> None:
    config = Nginx().config(rules=2)
    assert "location / { return 403; }" in config
    for path in ("/api/v1/", "/rules/0/", "/rules/1/"):
        assert (
            f"location {path} {{ limit_except GET HEAD {{ deny all; }} proxy_pass http://pages; }}" in config
        )
    assert "location / { proxy_pass" in Nginx().config(policy=False)


def test_envoy_ends_in_a_403() -> None:
    def routes(config: str) -> list[dict[str, object]]:
        pages = json.loads(config)["static_resources"]["listeners"][0]
        told = pages["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]["virtual_hosts"][0]
        return list(told["routes"])

    made = routes(Envoy().config(rules=2))
    assert [route["match"]["prefix"] for route in made] == ["/rules/0/", "/rules/1/", "/api/v1/", "/"]  # type: ignore[index]
    assert made[-1]["direct_response"] == {"status": 403}
    assert "direct_response" not in routes(Envoy().config(policy=False))[-1]


def test_suricata() -> None:
    said = Suricata().signatures(rules=2)
    assert all(line.startswith("drop ") and line.endswith(f"sid:{n};)") for n, line in enumerate(said, 1))
    assert any('content:!"/api/v1/"; depth:8;' in line for line in said)
    assert sum("startswith" in line for line in said) == 2
    assert Suricata().signatures(policy=False) == []
    config = Suricata().config()
    assert YAML(typ="safe").load(config.partition("---")[2])["runmode"] == "workers"


@pytest.mark.parametrize("system", [Iptables(), Nftables()], ids=lambda system: system.name)
def test_filters_let_established_connections_through_first(system: System) -> None:
    config = system.config(rules=300)
    places = [
        config.lower().index(word) for word in ("established", "10.100.0.0", "10.100.1.43", "8081", "reject")
    ]
    assert places == sorted(places)
    assert "reject" not in system.config(policy=False).lower()


def test_sources_of_rules_differ() -> None:
    assert len({rule_source(number)[0] for number in range(10_000)}) == 10_000
