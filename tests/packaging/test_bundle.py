"""The bundle for OLM: what the chart renders, and valid by OLM's own validator (operator-framework/api)."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from localcluster.build import ensure
from localcluster.compilation import Program, Source
from tests.operator.test_generated import rendered

ROOT = Path(__file__).parents[2]
VERIFIER = Source(
    Path(__file__).parent / "operator-verify",
    (Program("github.com/operator-framework/api/cmd/operator-verify", ("operator-verify",)),),
)
ALLOWED = (
    "csv.Spec.Icon not specified",
    'The \\"operatorhub\\" validator is deprecated',
    "provided API should have an example annotation",  # of objects that only the operator writes
)
GUESSED = {"endpointslices", "poddisruptionbudgets"}
"""Resources of a removed version, as the validator guesses from rules, which name none; in random order."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The directory that one command writes."""
    directory = tmp_path_factory.mktemp("bundle") / "dist/bundle"
    command = [sys.executable, ROOT / "charts/bundle.py", directory]
    environment = {**os.environ, "HELM": str(ensure(["helm"])["helm"])}
    subprocess.run(command, env=environment, check=True, timeout=60)
    return directory


def csv_file(directory):
    return directory / "manifests/moe-operator.clusterserviceversion.yaml"


@pytest.fixture(scope="module")
def csv(bundle):
    return yaml.safe_load(csv_file(bundle).read_text())


def chart(*values):
    """The chart's objects by kind."""
    found = yaml.load_all(rendered("crds.install=false", *values).stdout, yaml.CSafeLoader)
    return {one["kind"]: one for one in found if one}


def verified(directory):
    """Errors and warnings of OLM's validator, but for those allowed."""
    verifier = ensure(["operator-verify"], source=VERIFIER)["operator-verify"]
    words = [verifier, "manifests", "--operatorhub_validate", "--object_validate", directory]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    lines = re.findall(r"level=(?:warning|error|fatal) msg=.*", done.stdout + done.stderr)
    assert any(ALLOWED[0] in line for line in lines), "the validator read nothing"
    return [line for line in lines if not any(text in line for text in ALLOWED) and not guessed(line)]


def guessed(line):
    """Whether the line is the validator's guess about rules, and about no other resource."""
    resources = set(re.findall(r"(\w+): \(\[", line)) if "Migrate the API(s) for" in line else set()
    return resources != set() and resources <= GUESSED


def test_olms_validator_finds_nothing(bundle):
    assert verified(bundle) == []


def test_a_wrong_bundle_is_noticed(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "bundle")
    file = csv_file(tmp_path / "bundle")
    wrong = {
        "kind: ScalingHistory": "kind: History",
        "capabilities: Auto Pilot": "capabilities: Autopilot",
        "minKubeVersion: 1.": "minKubeVersion: one.",
    }
    text = file.read_text()
    for old, new in wrong.items():
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    found = "\n".join(verified(tmp_path / "bundle"))
    for new in ("Kind=History", "Autopilot", "one.30.0"):
        assert new in found


def test_it_gives_the_rights_of_the_chart_and_no_others(csv):
    install = csv["spec"]["install"]["spec"]
    (local,), (everywhere,) = install["permissions"], install["clusterPermissions"]
    assert local["rules"] == chart("watchNamespaces={users}")["Role"]["rules"]
    # Where OLM installs for all namespaces, both hold everywhere.
    of_chart = chart()["ClusterRole"]["rules"]
    both = local["rules"] + everywhere["rules"]
    assert all(rule in both for rule in of_chart)
    assert all(rule in of_chart for rule in everywhere["rules"])
    assert not any(rule in local["rules"] for rule in everywhere["rules"])
    touched = {name for rule in everywhere["rules"] for name in rule["resources"]}
    assert touched == {"nodes", "clusterkopfpeerings"}


def test_it_runs_the_deployment_of_the_chart_in_the_namespaces_that_olm_tells(csv):
    (deployment,) = csv["spec"]["install"]["spec"]["deployments"]
    (account,) = {item["serviceAccountName"] for item in csv["spec"]["install"]["spec"]["permissions"]}
    pod = deployment["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == account
    scope = pod["containers"][0]["env"].pop()
    assert scope == {
        "name": "MOE_OPERATOR_WATCH_NAMESPACES",
        "valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['olm.targetNamespaces']"}},
    }
    assert pod == chart()["Deployment"]["spec"]["template"]["spec"]
    assert all(mode["supported"] for mode in csv["spec"]["installModes"])
    images = {item["image"] for item in csv["spec"]["relatedImages"]}
    assert pod["containers"][0]["image"] in images


def test_it_brings_every_crd_and_shows_users_the_one_for_them(bundle, csv):
    owned = {one["name"]: one for one in csv["spec"]["customresourcedefinitions"]["owned"]}
    brought = {}
    for file in (bundle / "manifests").glob("*.crd.yaml"):
        body = yaml.load(file.read_text(), yaml.CSafeLoader)
        brought[body["metadata"]["name"]] = body["spec"]
    defined = [yaml.load(file.read_text(), yaml.CSafeLoader) for file in (ROOT / "crds").glob("*.yaml")]
    assert brought == {body["metadata"]["name"]: body["spec"] for body in defined}
    assert owned.keys() == brought.keys()
    internal = json.loads(csv["metadata"]["annotations"]["operators.operatorframework.io/internal-objects"])
    assert owned.keys() - internal == {"moedeployments.serving.moe-operator.dev"}


def test_its_image_and_its_metadata_say_the_same(bundle):
    annotations = yaml.safe_load((bundle / "metadata/annotations.yaml").read_text())["annotations"]
    lines = (bundle / "bundle.Dockerfile").read_text().splitlines()
    assert dict(line.removeprefix("LABEL ").split("=", 1) for line in lines if "LABEL" in line) == annotations
    copied = [line.split()[1:] for line in lines if line.startswith("COPY")]
    for folder, target in copied:
        assert (bundle / folder).is_dir()
        assert target == f"/{folder}/"
        assert annotations[f"operators.operatorframework.io.bundle.{folder}.v1"] == f"{folder}/"
