"""`spec.transport` reaches pods, ports and policies; existing pods stay as they are until an edit."""

import json
from dataclasses import replace

import pytest

from moe_frontend import main
from moe_operator.controller.reconcile import Reconciler
from moe_operator.errors import (
    ApplyForbiddenError,
    ApplyRefusedError,
    ChangedMeanwhileError,
    ClusterUnavailableError,
    ReadForbiddenError,
)
from moe_operator.observed import children
from moe_operator.observed.observation import Observed
from moe_operator.observed.pods import read
from moe_operator.render import frontend, network, worker
from moe_operator.render.objects import Key, key
from moe_operator.resources import names
from moe_operator.resources.digest import canonical
from moe_operator.settings import Settings
from moe_worker.service import command
from tests.operator.worlds import deployment, settled

MUTUAL = {"transport": {"mode": "MutualTLS"}}
PLAIN = {"transport": {"mode": "Plaintext"}}
SPECS = {names.ROLE_WORKER: worker.pod_spec, names.ROLE_FRONTEND: frontend.pod_spec}
SECRETS = {
    names.ROLE_WORKER: names.WORKER_CERTIFICATE_SECRET,
    names.ROLE_FRONTEND: names.FRONTEND_CERTIFICATE_SECRET,
}


def container(spec, name):
    return next(one for one in spec["containers"] if one["name"] == name)


def ports(found):
    return {port["name"]: port["containerPort"] for port in found["ports"]}


@pytest.mark.parametrize("role", SPECS)
def test_the_certificate_is_mounted_and_probes_have_a_port_without_tls(role):
    spec = SPECS[role](deployment(**MUTUAL))
    found = container(spec, role)
    (volume,) = (one for one in spec["volumes"] if "secret" in one)
    assert volume["secret"]["secretName"] == SECRETS[role]
    (mount,) = (one for one in found["volumeMounts"] if one["name"] == volume["name"])
    environment = {one["name"]: one.get("value") for one in found["env"]}
    given = environment["MOE_WORKER_TLS" if role == names.ROLE_WORKER else "MOE_INTERNAL_TLS"]
    assert (mount["mountPath"], mount["readOnly"]) == (given, True)
    probes = {found[name]["grpc"]["port"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes == {ports(found)["health"]}
    known = {option.envvar for option in (*main.main.params, *command.serve.params)}
    ours = {name for name in environment if name.startswith(("MOE_WORKER_TLS", "MOE_WORKER_HEALTH"))}
    assert ours | {"MOE_INTERNAL_TLS", "MOE_HEALTH", "MOE_ADMIN"} <= known


@pytest.mark.parametrize("role", SPECS)
def test_mutual_tls_is_the_default(role):
    assert SPECS[role](deployment()) == SPECS[role](deployment(**MUTUAL))


@pytest.mark.parametrize("role", SPECS)
def test_in_plaintext_nothing_is_added(role):
    spec = SPECS[role](deployment(**PLAIN))
    assert not [one for one in spec["volumes"] if "secret" in one]
    assert not {"health", "admin-tls", "grpc-tls"} & set(ports(container(spec, role)))


def test_the_ports_of_the_workers_service_tell_them_apart():
    targets = {port["targetPort"] for port in worker.service(deployment())["spec"]["ports"]}
    for settings in (PLAIN, MUTUAL):
        found = ports(container(worker.pod_spec(deployment(**settings)), names.ROLE_WORKER))
        assert len(targets & set(found)) == 1


def observed(role, **settings):
    name = "docs-0-0" if role == names.ROLE_WORKER else "docs-frontend-1"
    labels = {**names.single_labels("docs"), names.LABEL_DATA_RANK: "0"}
    return read(
        {
            "metadata": {
                "name": name,
                "namespace": "prod",
                "labels": labels if role == names.ROLE_WORKER else names.frontend_labels("docs"),
            },
            "spec": SPECS[role](deployment(**settings)),
            "status": {"podIP": "10.0.0.1"},
        }
    )


@pytest.mark.parametrize(
    ("settings", "as_worker", "as_frontend"),
    [
        (PLAIN, "10.0.0.1", "10.0.0.1"),
        (MUTUAL, "tls://worker.prod@10.0.0.1:8000", "tls://frontend.prod@10.0.0.1:8001"),
    ],
)
def test_the_operator_asks_each_pod_as_its_ports_say(settings, as_worker, as_frontend):
    assert observed(names.ROLE_WORKER, **settings).grpc_address == as_worker
    assert observed(names.ROLE_FRONTEND, **settings).admin_address == as_frontend


def test_clients_ports_stay_as_they_were():
    plain, mutual = (
        ports(container(frontend.pod_spec(deployment(**settings)), names.ROLE_FRONTEND))
        for settings in (PLAIN, MUTUAL)
    )
    assert mutual == {**plain, "admin-tls": 8001, "health": 8002}
    assert frontend.service(deployment(**MUTUAL)) == frontend.service(deployment(**PLAIN))


def test_the_policy_of_frontends_lets_the_operator_in():
    of = deployment(networkPolicy={"mode": "Restricted"}, **MUTUAL)
    _, fronts = (policy["spec"]["ingress"] for policy in network.policies(of))
    assert [port["port"] for rule in fronts for port in rule["ports"]] == [8000, 8080, 8001]


def test_one_edit_rolls_workers_and_frontends():
    """Frontends that came later would reach no worker."""
    world = settled(**PLAIN)
    world.change(**MUTUAL)
    begins_to_roll(world)


def begins_to_roll(world):
    """Frontends and a new worker serve mutual TLS after the next step; old workers do not."""
    applied = {key(manifest).name: manifest for manifest in world.step().apply}
    template = applied["docs-frontend"]["spec"]["template"]["spec"]
    assert "admin-tls" in ports(container(template, names.ROLE_FRONTEND))
    template = applied["docs-2"]["spec"]["template"]["spec"]
    assert "grpc-tls" in ports(container(template, names.ROLE_WORKER))
    kept = world.children[Key("StatefulSet", "docs-0")]["spec"]["template"]["spec"]
    assert "grpc" in ports(container(kept, names.ROLE_WORKER))


def from_before(**spec):
    """A deployment from the time before `spec.transport`: no object knows of it, and nothing serves TLS."""
    world = settled(**PLAIN, **spec)
    for child in world.children.values():
        if text := child["metadata"]["annotations"].get(names.ANNOTATION_PINNED):
            pin = json.loads(text)
            del pin["spec"]["transport"]
            child["metadata"]["annotations"][names.ANNOTATION_PINNED] = canonical(pin)
    world.change(**MUTUAL, **spec)  # the new CRD's default
    return world


@pytest.fixture
def upgraded():
    return from_before()


def templates(world):
    """Pod templates by object."""
    return {
        name: child["spec"]["template"]
        for name, child in world.children.items()
        if name.kind in {"StatefulSet", "Deployment"}
    }


def test_an_upgrade_restarts_no_pod(upgraded):
    before = templates(upgraded)
    for _ in range(3):
        assert not upgraded.step().delete
    assert templates(upgraded) == before
    upgraded.change(**MUTUAL, replicas=3)
    upgraded.step()
    assert len(set(upgraded.revisions().values())) == 1


def test_the_first_edit_of_workers_after_an_upgrade_rolls_frontends_as_well(upgraded):
    """Pinned frontends have no certificate for workers that ask for one."""
    upgraded.change(engine={"maxBatchSize": 4})
    begins_to_roll(upgraded)


def test_an_edit_of_frontends_after_an_upgrade_restarts_no_worker(upgraded):
    before = templates(upgraded)
    upgraded.change(frontend={"image": "example.org/frontend:2"})
    upgraded.step()
    after = templates(upgraded)
    assert {name.name for name in after if after[name] != before[name]} == {"docs-frontend"}


def serves_mutual_tls_to_the_operator(world):
    """Whether the applied template of the frontends does."""
    template = templates(world)[Key("Deployment", "docs-frontend")]["spec"]
    return "admin-tls" in ports(container(template, names.ROLE_FRONTEND))


def secure_sets(world):
    """Whether the workers of each StatefulSet serve mutual TLS."""
    return {
        name.name: children.read(one).secure
        for name, one in world.children.items()
        if name.kind == "StatefulSet"
    }


def test_an_upgrade_changes_no_transport_of_a_deployment_without_replicas():
    """Its images may be of an earlier version, which serves no TLS: it could not return from zero."""
    world = from_before(replicas=0)
    before = templates(world)
    for _ in range(3):
        world.step()
    assert templates(world) == before
    world.change(**MUTUAL, replicas=1)
    for _ in range(3):
        world.step()
        world.all_ready()
    assert secure_sets(world) == {"docs-0": False}
    assert not serves_mutual_tls_to_the_operator(world)
    world.change(replicas=1, engine={"maxBatchSize": 4})
    world.step()
    assert secure_sets(world) == {"docs-0": False, "docs-1": True}
    assert serves_mutual_tls_to_the_operator(world)


def test_a_restart_turns_mutual_tls_on_without_replicas_too():
    world = from_before(replicas=0)
    world.deployment = replace(world.deployment, restarted_at="2026-01-01T00:00:00Z")
    world.step()
    assert serves_mutual_tls_to_the_operator(world)
    world.change(**MUTUAL, replicas=1)
    world.step()
    assert secure_sets(world) == {"docs-0": True}


def transports(world):
    """What the applied template of the frontends serves to the operator, and whether a policy lets it in."""
    policy = world.children[Key("NetworkPolicy", "docs-frontend")]
    allowed = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
    return serves_mutual_tls_to_the_operator(world), names.ADMIN_PORT in allowed


@pytest.mark.parametrize("also", [{}, {"frontend": {"image": "frontend:next"}}])
def test_frontends_keep_their_certificate_until_no_worker_asks_for_one(also):
    """Without one they would reach the first worker in plaintext alone, and all load would be its."""
    world = settled(networkPolicy={"mode": "Restricted"}, **MUTUAL)
    world.change(transport={"mode": "Plaintext"}, **also)
    found = []
    for _ in range(30):
        world.step()
        sets = (children.read(one) for name, one in world.children.items() if name.kind == "StatefulSet")
        secure = any(one.secure for one in sets)
        found.append((secure, *transports(world)))
        world.all_ready()
    assert found[0] == (True, True, True)
    assert found[-1] == (False, False, False)
    assert all(served and allowed for secure, served, allowed in found if secure)


class Issuing:
    """Stands in for Certificates: counts, and fails if told to."""

    def __init__(self, error=None, own=None):
        self.error, self.own, self.namespaces, self.needed = error, own, [], []

    def ensure(self, namespace, *, needed):
        self.namespaces.append(namespace)
        self.needed.append(needed)
        if self.error is not None:
            raise self.error

    def identity(self, namespace):
        return self.own


def certified(issuing, of, *pods):
    return certified_with(issuing, of, Observed(pods=pods))


def certified_with(issuing, of, seen):
    reconciler = Reconciler(None, Settings(), None, None, None, certificates=issuing)
    return reconciler._certify(of, seen)


def test_certificates_are_kept_for_as_long_as_a_pod_uses_them():
    issuing = Issuing()
    assert certified(issuing, deployment(**PLAIN)) == []
    assert issuing.namespaces == []
    certified(issuing, deployment(**MUTUAL))
    certified(issuing, deployment(**PLAIN), observed(names.ROLE_WORKER, **MUTUAL))
    assert issuing.namespaces == ["default", "default"]


def test_pods_that_stay_in_plaintext_after_an_upgrade_ask_for_no_certificates(upgraded):
    """An operator without the right to write Secrets must not stall them."""
    issuing = Issuing(ApplyForbiddenError("no right"))
    assert certified_with(issuing, upgraded.deployment, upgraded.observed()) == []
    assert issuing.namespaces == []
    upgraded.change(engine={"maxBatchSize": 4})
    assert certified_with(issuing, upgraded.deployment, upgraded.observed())
    assert issuing.namespaces == [upgraded.deployment.identity.namespace]


@pytest.mark.parametrize("kind", [ApplyForbiddenError, ReadForbiddenError, ApplyRefusedError])
def test_a_missing_right_is_reported_and_stops_nothing_else(kind):
    """Certificates are renewed long before they expire: scaling and rollouts go on."""
    (refusal,) = certified(Issuing(kind("no right")), deployment(**MUTUAL))
    assert str(refusal) == "no right"
    assert isinstance(refusal, (ApplyForbiddenError, ApplyRefusedError))


@pytest.mark.parametrize("kind", [ClusterUnavailableError, ChangedMeanwhileError])
def test_a_check_that_failed_stops_a_reconcile_only_where_there_is_no_certificate_yet(kind):
    """A webhook for Secrets that does not answer must not stop scaling and rollouts."""
    assert certified(Issuing(kind("not now"), own=object()), deployment(**MUTUAL)) == []
    without = Issuing(kind("not now"))
    plain, secure = observed(names.ROLE_WORKER, **PLAIN), observed(names.ROLE_WORKER, **MUTUAL)
    assert certified(without, deployment(**MUTUAL), plain) == []  # from before mutual TLS was the default
    for pods in ((), (plain, secure)):
        with pytest.raises(kind):
            certified(without, deployment(**MUTUAL), *pods)


def test_a_pod_that_waits_for_its_volumes_asks_for_a_check():
    issuing = Issuing()
    runs = observed(names.ROLE_WORKER, **MUTUAL)
    for pod in (runs, replace(runs, address=""), replace(runs, address="", terminating=True)):
        certified(issuing, deployment(**MUTUAL), pod)
    assert issuing.needed == [False, True, False]
