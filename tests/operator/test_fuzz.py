"""Manifests at random against a real API server: refused with a sentence, or reconciled to true conditions.

`MOE_FUZZ=10000` sets how many; `make soak` runs so many. The reconcile runs in this process, without
controllers: what it makes stays as it was made.
"""

from __future__ import annotations

import os
import urllib.parse

import pytest
from hypothesis import HealthCheck, given, settings

from moe_operator.resources import names
from tests.operator import manifests_at_random
from tests.operator.by_hand import COLLECTION, Api, reconciled_to_true_conditions

EXAMPLES = int(os.environ.get("MOE_FUZZ", "100"))
pytestmark = [
    pytest.mark.filterwarnings("ignore:Unverified HTTPS request"),
    pytest.mark.timeout(120 + EXAMPLES),
]


@pytest.fixture(scope="module")
def api(api_server):
    return Api(api_server)


def refused_with_a_sentence(code, answer):
    """Whether it was refused; if so, the user is told which field and why."""
    if code in (200, 201):
        return False
    message = answer.get("message", "")
    assert code in (400, 422), message
    assert any(word in message for word in ("spec", "metadata", "name", "json", "unknown field")), message
    return True


def small(spec):
    """Few enough objects that a thousand such deployments can be tried; the rest of the spec stays."""
    many = spec.get("replicas")
    return {**spec, "replicas": 3} if isinstance(many, int) and 3 < many <= 1000 else spec


outcomes = dict.fromkeys(("refused", "reconciled", "refused later"), 0)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="MOE_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(manifests_at_random.names, manifests_at_random.specs, manifests_at_random.specs)
def test_any_manifest_is_refused_with_a_sentence_or_reconciled_to_true_conditions(api, name, spec, edited):
    body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}}
    strict = "fieldValidation=Strict"
    if refused_with_a_sentence(*api.ask("POST", f"{COLLECTION}?{strict}", {**body, "spec": small(spec)})):
        outcomes["refused"] += 1
        return
    try:
        outcomes["refused later" if reconciled_to_true_conditions(api, name) else "reconciled"] += 1
        path = f"{COLLECTION}/{urllib.parse.quote(name)}?{strict}"
        version = api.cluster.get(names.KIND, "default", name)["metadata"]["resourceVersion"]
        changed = {**body, "metadata": {"name": name, "resourceVersion": version}, "spec": small(edited)}
        if not refused_with_a_sentence(*api.ask("PUT", path, changed)):
            outcomes["refused later" if reconciled_to_true_conditions(api, name) else "reconciled"] += 1
    finally:
        api.clear(name)


def test_the_manifests_were_not_all_of_one_kind():
    """Had all been refused, or none, the test above would show little."""
    print(outcomes)
    assert min(outcomes["refused"], outcomes["reconciled"]) >= EXAMPLES / 10
    assert outcomes["refused later"] <= sum(outcomes.values()) / 20, outcomes
