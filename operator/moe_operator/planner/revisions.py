"""Records the spec of each revision in ControllerRevisions, for `moe rollout undo`."""

from __future__ import annotations

from collections.abc import Collection

from moe_operator.observed.children import RevisionRecord
from moe_operator.observed.observation import Observed
from moe_operator.render import worker
from moe_operator.render.objects import Manifest, child, sealed
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment

KIND = "ControllerRevision"
_FORMER_MOST = 10


def current(deployment: Deployment, observed: Observed) -> Manifest:
    """The record of the desired revision; the newest one has the highest number.

    A field that is not set is recorded as null. An existing record keeps its content, because that of a
    ControllerRevision is immutable: another spec that renders the same pods is the same revision.
    """
    revision = worker.revision(deployment)
    name = names.revision(deployment.name, revision)
    labels = {names.LABEL_REVISION: revision}
    manifest = child(deployment.identity, "apps/v1", KIND, name, names.ROLE_HISTORY, labels)
    known = observed.owned(RevisionRecord, deployment.identity)
    newest = max((record.number for record in known.values()), default=0)
    record = known.get(name)
    number = 0 if record is None else record.number
    former = () if record is None else record.former
    manifest["data"] = _content(deployment) if record is None else record.data
    manifest["revision"] = number if number == newest and number else newest + 1
    if number and number != newest:
        former = (*former, str(number))
    if former:
        manifest["metadata"]["annotations"] = {names.ANNOTATION_FORMER: ",".join(former[-_FORMER_MOST:])}
    return sealed(manifest)


def _content(deployment: Deployment) -> Manifest:
    spec = deployment.spec.manifest()
    restart = {"restartedAt": deployment.restarted_at} if deployment.restarted_at else {}
    return {"spec": {field: spec.get(field) for field in names.REVISED_FIELDS}, **restart}


def outdated(deployment: Deployment, observed: Observed, in_use: Collection[str]) -> list[RevisionRecord]:
    """Records beyond the limit, the oldest first. in_use: revisions that replicas have."""
    needed = {worker.revision(deployment), *in_use}
    records = observed.owned(RevisionRecord, deployment.identity).values()
    idle = [one for one in records if one.labels.get(names.LABEL_REVISION) not in needed]
    idle.sort(key=lambda record: record.number)
    return idle[: max(len(idle) - deployment.spec.revision_history_limit, 0)]
