"""Committed files that are made from other files are what their makers make now."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from localcluster.build import ensure
from localcluster.progress import Reporter
from moe_operator.resources import crd, names

ROOT = Path(__file__).parents[2]
INTERNAL = [names.AUTHORITY_SECRET, names.WORKER_CERTIFICATE_SECRET, names.FRONTEND_CERTIFICATE_SECRET]


def test_the_crd_is_the_one_of_the_typed_definition():
    assert (ROOT / "crds/moedeployments.yaml").read_text() == crd.text(), (
        "run: python -m moe_operator.resources.crd > crds/moedeployments.yaml"
    )


def test_the_plain_manifest_is_the_chart_rendered():
    with Reporter(sys.stderr) as progress:
        helm = ensure(["helm"], progress.show)["helm"]
    done = subprocess.run(
        [ROOT / "charts/render.sh"],
        env={**os.environ, "HELM": str(helm)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (ROOT / "charts/install.yaml").read_text() == done.stdout, (
        "run: charts/render.sh > charts/install.yaml"
    )


def rendered(*values):
    with Reporter(sys.stderr) as progress:
        helm = ensure(["helm"], progress.show)["helm"]
    sets = [word for value in values for word in ("--set", value)]
    return subprocess.run(
        [helm, "template", ROOT / "charts/moe-operator", *sets], capture_output=True, text=True, check=False
    )


def test_the_peering_has_one_name_in_the_settings_and_in_the_rights():
    objects = [one for one in yaml.safe_load_all(rendered("peering=blue").stdout) if one]
    (role,) = (one for one in objects if one["kind"] == "ClusterRole")
    named = [rule["resourceNames"] for rule in role["rules"] if "resourceNames" in rule]
    assert named == [INTERNAL, ["blue"]]
    (deployment,) = (one for one in objects if one["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert {"name": "MOE_OPERATOR_PEERING", "value": "blue"} in container["env"]


@pytest.mark.parametrize(
    ("setting", "where"),
    [
        ("env[0].name=MOE_OPERATOR_PEERING", "/env/0/name"),
        ("env[0].name=MOE_OPERATOR_WATCH_NAMESPACES", "/env/0/name"),
        ("metrics.port=8080", "/metrics/port"),
        ("statusPage.port=8080", "/statusPage/port"),
    ],
)
def test_values_that_others_depend_on_or_have_taken_are_refused(setting, where):
    refused = rendered(setting)
    assert refused.returncode != 0
    assert where in refused.stderr.replace(".", "/")


def test_helm_leaves_every_crd_and_with_it_users_objects_when_it_goes():
    for path in (ROOT / "crds").glob("*.yaml"):
        annotations = yaml.safe_load(path.read_text())["metadata"].get("annotations", {})
        assert annotations.get("helm.sh/resource-policy") == "keep", path.name


def test_every_field_of_the_crd_is_described_with_its_default():
    def walk(schema, path):
        for name, field in schema.get("properties", {}).items():
            yield f"{path}.{name}", field
            if name == "podTemplate":  # Kubernetes' own fields
                continue
            yield from walk(field, f"{path}.{name}")
            yield from walk(field.get("items", {}), f"{path}.{name}[]")

    version = crd.manifest()["spec"]["versions"][0]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    for path, field in walk(spec, "spec"):
        assert field.get("description", "").endswith("."), f"{path} has no description"
        nested = "properties" in field and not path.endswith("podTemplate")
        said = any(word in field["description"] for word in ("Default:", "Required."))
        assert nested or said or "valueFrom." in path, f"{path} does not say its default"


def test_the_manifest_asks_for_no_right_to_read_others_secrets_and_none_for_everything():
    documents = list(yaml.safe_load_all((ROOT / "charts/install.yaml").read_text()))
    (role,) = (document for document in documents if document["kind"] == "ClusterRole")
    for rule in role["rules"]:
        assert "*" not in (*rule["verbs"], *rule["resources"], *rule["apiGroups"])
        assert "configmaps" not in rule["resources"]
        if "secrets" in rule["resources"]:
            assert rule["verbs"] == ["create"] or rule["resourceNames"] == INTERNAL, "others are never read"
        assert "nodes" not in rule["resources"] or rule["verbs"] == ["get"]
