"""Istio's precedence and matching, on the one function that both the kernel's tables and the node proxy come from."""

import pytest

from controlplane.api import Action, Authorization, Operation, Rule, Source, authorize

CLIENT = "cluster.local/ns/default/sa/client"
OTHER = "cluster.local/ns/other/sa/client"


def policy(action: Action, *rules: Rule, name: str = "p") -> Authorization:
    return Authorization("default", name, action, rules)


def principals(*values: str) -> Rule:
    return Rule(sources=(Source(principals=values),))


@pytest.mark.parametrize(
    ("policies", "principal", "port", "allowed"),
    [
        # no policy: allowed, also without an identity
        ([], None, 80, True),
        # an ALLOW policy turns the default to refusal
        ([policy(Action.ALLOW, principals(CLIENT))], CLIENT, 80, True),
        ([policy(Action.ALLOW, principals(CLIENT))], OTHER, 80, False),
        ([policy(Action.ALLOW, principals(CLIENT))], None, 80, False),
        ([policy(Action.ALLOW, principals("*"))], None, 80, False),
        ([policy(Action.ALLOW, principals("*"))], OTHER, 80, True),
        # allow-nothing
        ([policy(Action.ALLOW)], CLIENT, 80, False),
        # a rule without a source matches everyone
        ([policy(Action.ALLOW, Rule())], None, 80, True),
        # DENY wins over ALLOW, in whatever order they come
        ([policy(Action.ALLOW, Rule()), policy(Action.DENY, principals(CLIENT))], CLIENT, 80, False),
        ([policy(Action.DENY, principals(CLIENT)), policy(Action.ALLOW, Rule())], CLIENT, 80, False),
        ([policy(Action.DENY, principals(CLIENT))], OTHER, 80, True),
        # a DENY without rules matches nothing
        ([policy(Action.DENY)], CLIENT, 80, True),
        # fields are ANDed, values ORed
        ([policy(Action.ALLOW, Rule((Source((CLIENT,), (), ("other",)),)))], CLIENT, 80, False),
        ([policy(Action.ALLOW, principals(OTHER, CLIENT))], CLIENT, 80, True),
        ([policy(Action.ALLOW, Rule((Source(namespaces=("def*",)),)))], CLIENT, 80, True),
        ([policy(Action.ALLOW, principals("*/sa/client"))], OTHER, 80, True),
        # "everyone but": DENY what is not the named one, plain text included
        ([policy(Action.DENY, Rule((Source(not_principals=(CLIENT,)),)))], CLIENT, 80, True),
        ([policy(Action.DENY, Rule((Source(not_principals=(CLIENT,)),)))], OTHER, 80, False),
        ([policy(Action.DENY, Rule((Source(not_principals=(CLIENT,)),)))], None, 80, False),
        ([policy(Action.DENY, Rule((Source(not_namespaces=("default",)),)))], None, 80, False),
        # ports
        ([policy(Action.ALLOW, Rule((), (Operation((80, 81)),)))], None, 81, True),
        ([policy(Action.ALLOW, Rule((), (Operation((80, 81)),)))], None, 82, False),
        ([policy(Action.DENY, Rule((), (Operation(not_ports=(80,)),)))], CLIENT, 80, True),
        ([policy(Action.DENY, Rule((), (Operation(not_ports=(80,)),)))], CLIENT, 81, False),
    ],
)
def test_verdicts(policies: list[Authorization], principal: str | None, port: int, allowed: bool) -> None:
    assert authorize(policies, principal, port).allowed is allowed


def test_the_verdict_names_the_policy() -> None:
    deny = policy(Action.DENY, principals(CLIENT), name="no-client")
    assert (
        authorize([policy(Action.ALLOW, Rule(), name="all"), deny], CLIENT, 80).policy == "default/no-client"
    )
    assert authorize([policy(Action.ALLOW, Rule(), name="all")], CLIENT, 80).policy == "default/all"
    assert authorize([policy(Action.ALLOW, name="none")], CLIENT, 80).policy == ""
