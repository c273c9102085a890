"""A real API server without controllers, and the operator's reconcile, called when a test wants it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime

import urllib3

from moe_operator.controller.reconcile import Reconciler
from moe_operator.errors import RetryableError
from moe_operator.kube import peering
from moe_operator.kube.client import Cluster
from moe_operator.render import children
from moe_operator.render.objects import owner_uid
from moe_operator.resources import names
from moe_operator.resources.deployment import Name, parse
from moe_operator.settings import Settings
from tests.frontend.apiserver import ACCESS
from tests.operator.live import eventually

COLLECTION = f"/apis/{names.API_VERSION}/namespaces/default/{names.PLURAL}"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


class Killed(BaseException):
    """The operator's process ended here."""


class Api:
    """The API server, and an operator that is called when the test wants it."""

    def __init__(self, server):
        self._server = server
        self._pool = urllib3.PoolManager(cert_reqs="CERT_NONE")
        self.cluster = Cluster(server.client(), timeout_seconds=30)
        # Above any process that ran here before and is not forgotten yet.
        rank = peering.Rank(self.cluster, "moe-operator", 2**60)
        self._reconciler = Reconciler(
            self.cluster, Settings(model_roots="/"), rank, lambda: datetime.now(UTC), lambda _: {}
        )
        self.writes = 0
        self._installed = []
        self._writes_to_live: int | None = None
        self._interruption: Callable[[], None] | None = None
        for method in ("apply", "create", "delete"):
            self._count(method)

    def _count(self, method):
        work = getattr(self.cluster, method)

        def counted(*arguments, **options):
            interruption, self._interruption = self._interruption, None
            if interruption is not None:
                interruption()
            result = work(*arguments, **options)  # a gang's Secret that exists is no write
            self.writes += 1
            if self.writes == self._writes_to_live:
                raise Killed
            return result

        setattr(self.cluster, method, counted)

    def ask(self, method, path, body=None):
        content = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Authorization": f"Bearer {ACCESS}", "Content-Type": content}
        url = f"https://127.0.0.1:{self._server.port}{path}"
        answer = self._pool.request(method, url, body=json.dumps(body), headers=headers)
        known = answer.headers.get("Content-Type", "").startswith("application/json")
        return answer.status, json.loads(answer.data) if known else {"message": answer.data.decode()}

    def install(self, crd):
        """Returns when the API server serves objects of the CRD's kind, until the end of `with`."""
        assert self.ask("POST", CRDS, crd)[0] in (201, 409)
        self._installed.append(crd["metadata"]["name"])
        group, plural = crd["spec"]["group"], crd["spec"]["names"]["plural"]
        path = f"/apis/{group}/v1/namespaces/default/{plural}"
        eventually(lambda: self.ask("GET", path)[0], lambda code: code == 200, "the CRD is served")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Deletes what was installed, with all objects of these kinds."""
        for name in self._installed:
            self.ask("DELETE", f"{CRDS}/{name}")

    def reconcile_or_raise(self, name):
        """Reconciles once; returns the seconds after which it wants the next one."""
        return self._reconciler.reconcile(Name("default", name))

    def condition(self, name, kind):
        """A condition of a deployment, or {}."""
        found = self.cluster.read(names.KIND, "default", name).get("status", {}).get("conditions", ())
        return next((one for one in found if one["type"] == kind), {})

    def reconcile(self, name):
        """Writes that one reconcile made, and whether it wants to try again."""
        before, again = self.writes, False
        try:
            self._reconciler.reconcile(Name("default", name))
        except RetryableError:
            again = True
        return self.writes - before, again

    def reconcile_until(self, name, writes):
        """Reconciles again and again, and dies after so many writes, before their last answer is read."""
        self._writes_to_live = self.writes + writes
        try:
            while self.reconcile(name)[0]:
                pass
        finally:
            self._writes_to_live = None

    def before_next_write(self, interruption):
        """Somebody else does something between the operator's read and its next write."""
        self._interruption = interruption

    def collect_garbage(self, name):
        """Deletes what belongs to deployments of this name that are gone."""
        uid = self.cluster.get(names.KIND, "default", name)["metadata"]["uid"]
        for kind in children.KINDS:
            for child in self.cluster.list(kind, "default", name):
                if owner_uid(child) not in (None, uid):
                    self.cluster.delete(kind, "default", child["metadata"]["name"], child["metadata"]["uid"])

    def clear(self, name):
        """Deletes a deployment and, for want of a garbage collector, what belongs to it."""
        for kind in children.KINDS:
            for child in self.cluster.list(kind, "default", name):
                self.cluster.delete(kind, "default", child["metadata"]["name"], child["metadata"]["uid"])
        self.ask("DELETE", f"{COLLECTION}/{name}")


def reconciled_to_true_conditions(api, name):
    """What it says of itself is so, and it comes to rest. Returns whether it was refused later than
    at apply: a child by the API server, or a combination that CEL does not check at updates.
    """
    for _ in range(5):
        writes, again = api.reconcile(name)
        if (writes, again) == (0, False):
            break
    body = api.cluster.get(names.KIND, "default", name)
    conditions = {c["type"]: c for c in body["status"]["conditions"]}
    assert {c["observedGeneration"] for c in conditions.values()} == {body["metadata"]["generation"]}
    assert all(c["reason"] and c["message"] for c in conditions.values())
    ready, progressing = conditions["Ready"], conditions["Progressing"]
    if progressing["reason"] == "InvalidSpec":
        # CEL counts expert ranks only when an object is created (ADR 32).
        assert re.search("acceleratorPercentage 50|gpuLimit", progressing["message"]), progressing["message"]
        return True
    idle = ready["reason"] == "ScaledToZero"
    assert ready["status"] == ("True" if idle else "False"), "nothing runs here"
    if progressing["reason"] == "ApplyRefused":
        assert ready["reason"] == "ApplyRefused"
        assert "refused" in progressing["message"] or "forbids" in progressing["message"]
        return True
    assert (writes, again) == (0, False), "it does not come to rest"
    for child in children.expected(parse(body)):
        assert api.cluster.get(child.kind, "default", child.name) is not None, child
    return False
