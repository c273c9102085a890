"""The frame of tests of objects that a deployment asks for and whose kinds a cluster may lack."""

from __future__ import annotations

import copy
from typing import Any

from moe_operator.planner.drift import first_difference
from moe_operator.render.objects import key
from tests.operator.by_hand import COLLECTION, Api
from tests.operator.live import manifest
from tests.operator.worlds import World, deployment

Body = dict[str, Any]


def collection(body: Body) -> str:
    """Where the API server has objects like this one."""
    plural = body["kind"].lower() + ("es" if body["kind"].endswith("s") else "s")
    return f"/apis/{body['apiVersion']}/namespaces/default/{plural}"


def come_and_go(front: Body, bodies: list[Body], **spec: Any) -> None:
    """They are planned when spec.frontend asks for them, and they alone are deleted when it does not."""
    world, keys = World(deployment(frontend=front, **spec)), [key(body) for body in bodies]
    assert set(keys) <= {key(one) for one in world.step().apply}
    world.change(frontend={}, **spec)
    assert [deletion.key for deletion in world.step().delete] == keys
    assert not world.step().delete


def told_without_crds(api: Api, name: str, front: Body) -> str:
    """What the deployment says; the rest of it is applied."""
    assert api.ask("POST", COLLECTION, manifest(name, replicas=1, frontend=front))[0] == 201
    api.reconcile(name)
    said = api.condition(name, "Progressing")
    assert said["reason"] == "ApplyRefused"
    assert api.cluster.get("Deployment", "default", f"{name}-frontend")
    return str(said["message"])


def kept(api: Api, front: Body, bodies: list[Body], foreign: Body) -> None:
    """The API server takes them as they are, the operator comes to rest, and corrects what others change.

    foreign: what somebody else writes into the last one's spec.
    """
    assert api.ask("POST", COLLECTION, manifest("docs", replicas=1, frontend=front))[0] == 201
    api.reconcile("docs")
    paths = [f"{collection(body)}/docs-frontend" for body in bodies]
    for path, body in zip(paths, bodies, strict=True):
        code, stored = api.ask("GET", path)
        assert code == 200
        assert first_difference(body["spec"], stored["spec"]) is None
        assert stored["metadata"]["ownerReferences"][0]["kind"] == "MoEDeployment"
    api.reconcile("docs")
    assert api.reconcile("docs")[0] == 0, "it comes to rest"
    assert api.ask("PATCH", paths[-1], {"spec": foreign})[0] == 200
    api.reconcile("docs")
    assert first_difference(bodies[-1]["spec"], api.ask("GET", paths[-1])[1]["spec"]) is None
    api.ask("PATCH", f"{COLLECTION}/docs", {"spec": {"frontend": dict.fromkeys(front)}})
    api.reconcile("docs")
    assert [api.ask("GET", path)[0] for path in paths] == [404] * len(paths)
    api.clear("docs")


def strictly(api: Api, body: Body) -> tuple[int, Body]:
    """The API server's answer to this object, of which it must know every field."""
    alone = copy.deepcopy(body)
    alone["metadata"].pop("ownerReferences")
    return api.ask("POST", f"{collection(body)}?dryRun=All&fieldValidation=Strict", alone)


def refusal(api: Api, front: Body) -> str:
    """Why `kubectl apply` refuses a deployment with this spec.frontend."""
    code, said = api.ask("POST", COLLECTION, manifest("wrong", frontend=front))
    assert code == 422, said
    return str(said["message"])
