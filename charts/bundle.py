"""Writes the bundle for the Operator Lifecycle Manager (OLM): what the chart renders, in OLM's form.

    HELM=helm python charts/bundle.py DIRECTORY

The directory gets manifests/ (a ClusterServiceVersion and the CRDs), metadata/annotations.yaml and
bundle.Dockerfile. OLM tells the operator the namespaces of the OperatorGroup and gives it the rights that the
chart gives it there with watchNamespaces.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[1]
CHART: Final = ROOT / "charts/moe-operator"
NAME: Final = "moe-operator"
CHANNEL: Final = "alpha"
MODES: Final = ("OwnNamespace", "SingleNamespace", "MultiNamespace", "AllNamespaces")
UI: Final = "urn:alm:descriptor:com.tectonic.ui"
SHOWN: Final = {
    "spec": {"model.uri": "text", "replicas": "podCount", "worker.resources": "resourceRequirements"},
    "status": {"readyReplicas": "text", "conditions": ""},
}
"""Fields of a MoEDeployment that consoles show, and how; the conditions have a descriptor of their own."""
DESCRIPTION: Final = """\
moe-operator serves Mixture-of-Experts language models from `MoEDeployment` resources: workers of one or
several processes, frontends that speak OpenAI's HTTP API and gRPC, and replicas that follow the demand.

Models come from Hugging Face, object stores, claims and OCI images. To allow directories of nodes, set the
variable `MOE_OPERATOR_MODEL_ROOTS` in `spec.config.env` of the Subscription.
"""
Body = dict[str, Any]


class BundleError(Exception):
    """The chart holds something that the bundle has no place for, or helm failed."""


def main() -> int:
    """Writes the bundle into the directory that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, help="is created")
    directory: Path = parser.parse_args().directory
    try:
        write(directory, os.environ.get("HELM") or "helm")
    except (BundleError, OSError) as error:
        print(f"error: bundle was not written: {error}", file=sys.stderr)
        return 1
    return 0


def write(directory: Path, helm: str) -> None:
    """Writes all files; raises BundleError."""
    everywhere, somewhere = rendered(helm), rendered(helm, "--set", "watchNamespaces={users}")
    crds = list(definitions())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    csv = service_version(version, chart, everywhere, somewhere["Role"], crds)
    files = {f"{NAME}.clusterserviceversion.yaml": csv}
    files |= {f"{body['metadata']['name']}.crd.yaml": body for body in crds}
    for folder in ("manifests", "metadata"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    for name, body in files.items():
        (directory / "manifests" / name).write_text(
            yaml.dump(body, Dumper=yaml.CSafeDumper, sort_keys=False, width=120)
        )
    (directory / "metadata/annotations.yaml").write_text(yaml.safe_dump({"annotations": labels()}))
    lines = ["FROM scratch", *(f"LABEL {key}={value}" for key, value in labels().items())]
    lines += [f"COPY {folder} /{folder}/" for folder in ("manifests", "metadata")]
    (directory / "bundle.Dockerfile").write_text("\n".join([*lines, ""]))


def labels() -> dict[str, str]:
    """What OLM reads of a bundle's image and of annotations.yaml."""
    prefix = "operators.operatorframework.io.bundle"
    return {
        f"{prefix}.mediatype.v1": "registry+v1",
        f"{prefix}.manifests.v1": "manifests/",
        f"{prefix}.metadata.v1": "metadata/",
        f"{prefix}.package.v1": NAME,
        f"{prefix}.channels.v1": CHANNEL,
        f"{prefix}.channel.default.v1": CHANNEL,
    }


def rendered(helm: str, *settings: str) -> dict[str, Body]:
    """The chart's objects by kind, without the CRDs and the test."""
    words = [helm, "template", NAME, str(CHART), "--skip-tests", "--set", "crds.install=false", *settings]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BundleError(f"{helm} cannot be started: {error.strerror}; name helm in HELM") from error
    if done.returncode:
        raise BundleError(f"helm template failed: {done.stderr.strip()}")
    bodies = [body for body in yaml.safe_load_all(done.stdout) if body]
    found = {body["kind"]: body for body in bodies}
    # OLM creates the account and the bindings.
    placed = {"Deployment", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "ServiceAccount"}
    if found.keys() - placed or len(found) != len(bodies):
        kinds = ", ".join(body["kind"] for body in bodies)
        raise BundleError(f"chart renders {kinds}: give each a place in charts/bundle.py")
    return found


def definitions() -> Iterator[Body]:
    """The CRDs."""
    for path in sorted((ROOT / "crds").glob("*.yaml")):
        body = yaml.load(path.read_text(), yaml.CSafeLoader)
        body["metadata"].pop("annotations", None)  # helm's
        yield body


def service_version(
    version: str, chart: Body, everywhere: Mapping[str, Body], role: Body, crds: list[Body]
) -> Body:
    """The ClusterServiceVersion: what OLM installs, and what consoles show of it."""
    deployment = with_scope_of_olm(everywhere["Deployment"])
    pod = deployment["spec"]["template"]["spec"]
    image = pod["containers"][0]["image"]
    (main_crd,) = (crd for crd in crds if crd["spec"]["names"]["kind"] == "MoEDeployment")
    worker = fields(main_crd, "spec")["worker"]["properties"]["image"]["default"]
    internal = [crd["metadata"]["name"] for crd in crds if crd is not main_crd]
    notes = chart["annotations"]
    annotations = {
        "alm-examples": json.dumps(yaml.safe_load(notes["artifacthub.io/crdsExamples"]), indent=2),
        "capabilities": notes["artifacthub.io/operatorCapabilities"],
        "categories": "AI/Machine Learning",
        "containerImage": image,
        "description": chart["description"],
        "olm.skipRange": f"<{version}",
        "operators.operatorframework.io/internal-objects": json.dumps(internal),
    }
    install = strategy(deployment, everywhere["ClusterRole"]["rules"], role["rules"])
    return {
        "apiVersion": "operators.coreos.com/v1alpha1",
        "kind": "ClusterServiceVersion",
        "metadata": {"name": f"{NAME}.v{version}", "annotations": annotations},
        "spec": {
            "displayName": "MoE Operator",
            "description": DESCRIPTION,
            "version": version,
            "maturity": CHANNEL,
            "minKubeVersion": chart["kubeVersion"].removeprefix(">=").removesuffix("-0"),
            "keywords": chart["keywords"],
            "provider": {"name": NAME},
            "installModes": [{"type": mode, "supported": True} for mode in MODES],
            "customresourcedefinitions": {"owned": [owned_crd(crd) for crd in crds]},
            "install": {"strategy": "deployment", "spec": install},
            "relatedImages": [{"name": "operator", "image": image}, {"name": "worker", "image": worker}],
        },
    }


def strategy(deployment: Body, rules: list[Body], local: list[Body]) -> Body:
    """What OLM creates.

    rules: those that the operator needs for all namespaces.
    local: those of them that it needs in each namespace that it serves; the rest it needs in the cluster.
    """
    account = {"serviceAccountName": deployment["spec"]["template"]["spec"]["serviceAccountName"]}
    metadata = deployment["metadata"]
    return {
        "clusterPermissions": [{**account, "rules": [rule for rule in rules if rule not in local]}],
        "permissions": [{**account, "rules": local}],
        "deployments": [{"name": metadata["name"], "label": metadata["labels"], "spec": deployment["spec"]}],
    }


def with_scope_of_olm(deployment: Body) -> Body:
    """The chart's Deployment, whose operator serves the namespaces of the OperatorGroup."""
    made: Body = copy.deepcopy(deployment)
    (container,) = made["spec"]["template"]["spec"]["containers"]
    told = {"fieldRef": {"fieldPath": "metadata.annotations['olm.targetNamespaces']"}}
    container["env"].append({"name": "MOE_OPERATOR_WATCH_NAMESPACES", "valueFrom": told})
    for meta in (made["metadata"], made["spec"]["template"]["metadata"]):
        del meta["labels"]["app.kubernetes.io/managed-by"]  # helm, there
    return made


def owned_crd(crd: Body) -> Body:
    """What the ClusterServiceVersion says of a CRD of the bundle."""
    spec = crd["spec"]
    (version,) = spec["versions"]
    kind = spec["names"]["kind"]
    owned = {
        "name": crd["metadata"]["name"],
        "version": version["name"],
        "kind": kind,
        "displayName": kind,
        "description": version["schema"]["openAPIV3Schema"]["description"],
    }
    if kind == "MoEDeployment":
        for part, shown in SHOWN.items():
            owned[f"{part}Descriptors"] = [descriptor(crd, part, path, how) for path, how in shown.items()]
    return owned


def descriptor(crd: Body, part: str, path: str, how: str) -> Body:
    """How consoles show a field of spec or status, described as in the CRD."""
    field: Body = {"properties": fields(crd, part)}
    for name in path.split("."):
        field = field["properties"][name]
    display = f"{UI}:{how}" if how else "urn:alm:descriptor:io.kubernetes.conditions"
    return {
        "path": path,
        "displayName": " ".join(re.findall("[A-Z]?[a-z]+", path)).capitalize(),
        "description": field["description"],
        "x-descriptors": [display],
    }


def fields(crd: Body, part: str) -> Body:
    """The schema's fields of spec or status."""
    (version,) = crd["spec"]["versions"]
    found: Body = version["schema"]["openAPIV3Schema"]["properties"][part]["properties"]
    return found


if __name__ == "__main__":
    sys.exit(main())
