"""`explain`, asked over the control API: the core's answer in the API's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from isolator.control import agent_view as api
from isolator.core import explain as core
from isolator.core.model import Endpoint
from isolator.core.policy import Policy
from isolator.datapath.splice import Address
from isolator.records import verdict_of


def answer(
    policies: Sequence[Policy],
    endpoints: Mapping[int, Endpoint],
    addresses: Mapping[int, Sequence[Address]],
    question: api.Question,
) -> api.Explanation:
    """Raises agent_view.QuestionError."""
    asked = core.Question(
        question.source,
        question.destination,
        question.port,
        question.protocol,
        question.method,
        question.path or "/",
        question.host,
        question.headers,
    )
    try:
        found = core.explain(policies, endpoints, addresses, asked)
    except core.QuestionError as error:
        raise api.QuestionError(str(error)) from error
    decision = found.decision
    return api.Explanation(
        verdict=verdict_of(decision),
        drop_reason=decision.reason.name if decision.reason else None,
        policy=decision.rule.policy if decision.rule else None,
        rule=decision.rule.rule if decision.rule else None,
        summary=found.summary,
        considered=[
            api.ConsideredRule(
                each.ref.policy, each.ref.rule, each.direction.name.lower(), each.action, each.matched, each.why
            )
            for each in found.considered
        ],
    )
