"""The agent's figures in Prometheus' words, in a registry of their own."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from isolator.control.agent_view import AgentView, EndpointState, Metric
from isolator.control.flowlog import FlowLog

CONTENT_TYPE = CONTENT_TYPE_LATEST


class AgentCollector(Collector):
    """Reads the agent anew at each scrape, so that nothing is counted twice on the packet's path."""

    def __init__(self, agent: AgentView) -> None:
        self._agent = agent

    def collect(self) -> Iterator[Family]:
        yield decisions(self._agent.flow_log)
        yield CounterMetricFamily(
            "isolator_flow_records_skipped",
            "Allowed messages counted but, for the rate, not recorded.",
            value=self._agent.flow_log.allowed_unrecorded,
        )
        yield endpoint_states(self._agent)
        for metric in self._agent.metrics():
            yield family(metric)


def registry(agent: AgentView) -> CollectorRegistry:
    made = CollectorRegistry(auto_describe=False)
    made.register(AgentCollector(agent))
    return made


def exposition(made: CollectorRegistry) -> bytes:
    return generate_latest(made)


def decisions(log: FlowLog) -> Family:
    made = CounterMetricFamily(
        "isolator_decisions",
        "Messages and new flows decided, by rule.",
        labels=["verdict", "policy", "rule", "reason"],
    )
    for counter in log.counters():
        rule = counter.rule
        names = [rule.policy, rule.rule] if rule else ["", ""]
        reason = counter.reason.name if counter.reason else ""
        made.add_metric([counter.verdict.value, *names, reason], counter.hits)
    return made


def endpoint_states(agent: AgentView) -> Family:
    made = GaugeMetricFamily("isolator_endpoints", "Endpoints by state.", labels=["state"])
    states = [endpoint.state for endpoint in agent.status().endpoints]
    for state in EndpointState:
        made.add_metric([state.value], states.count(state))
    return made


def family(metric: Metric) -> Family:
    """One of the agent's own metrics; the samples of a family must share their label names."""
    names = list(metric.samples[0][0]) if metric.samples else []
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    made = kind(f"isolator_{metric.name}", metric.help, labels=names)
    for labels, value in metric.samples:
        made.add_metric([labels[name] for name in names], value)
    return made
