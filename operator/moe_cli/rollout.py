"""`moe rollout`: watches, pauses and undoes rollouts."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Final, cast

import click

from moe_api.ranges import FiniteRange
from moe_cli.kube import TIMEOUT_S, TRANSIENT, asking, reading
from moe_client import errors
from moe_client.errors import CommandError
from moe_client.terminal import say
from moe_operator.resources import names
from moe_operator.resources.deployment import restarted_at
from moe_operator.resources.status import DONE, PROGRESSING

_PAUSED: Final = "Paused"
_WAITING: Final = "Waiting"
_BLOCKED: Final = ("InvalidSpec", "ReadForbidden")
"""Reasons of Progressing with which the operator has not made a revision of the latest spec."""
_POLL_S: Final = 0.5
PATIENCE_S: Final = 60.0
"""For so long the API server may be away while `moe rollout status` waits; it restarts in less."""
_JSON_PATCH: Final = "application/json-patch+json"
_MERGE_PATCH: Final = "application/merge-patch+json"

_Command = Callable[..., Any]


def _cluster_options(command: _Command) -> _Command:
    for option in (
        click.argument("name"),
        click.option("--context", help="Context of the kubeconfig. Default: its current one."),
        click.option("-n", "--namespace", help="Namespace; the kubeconfig's own by default."),
    ):
        command = option(command)
    return command


@click.group()
def rollout() -> None:
    """Watches, pauses and undoes rollouts of a deployment.

    \b
    moe rollout status docs-moe     wait until the rollout is complete or stuck
    moe rollout history docs-moe    list the revisions
    moe rollout undo docs-moe       roll back to the previous revision
    moe rollout restart docs-moe    replace all pods, with the same spec
    """


@rollout.command()
@_cluster_options
@click.option(
    "--timeout", type=FiniteRange(min=0), help="Maximum number of seconds to wait. Default: no limit."
)
def status(name: str, namespace: str | None, context: str | None, timeout: float | None) -> None:
    """Waits until the rollout of NAME is complete (exit code 0), or is stuck or paused (1)."""
    deadline = None if timeout is None else time.monotonic() + timeout
    with _deployments(context, namespace, name) as api:
        said, patient = "", _Patient(api, name)
        while True:
            reason, message, holds = patient.progress()
            line = f"{reason}: {message}"
            if line != said:
                say(line)
                said = line
            if reason in DONE:
                return
            if reason == _PAUSED:
                sentence = f"the rollout of {name} is paused; continue it with `moe rollout resume {name}`"
                raise CommandError(sentence, errors.FAILED)
            if holds == "False":
                raise CommandError(f"the rollout of {name} is stuck; see `moe status {name}`", errors.FAILED)
            if deadline is not None and time.monotonic() >= deadline:
                raise CommandError(f"the rollout of {name} did not complete within --timeout", errors.LATE)
            time.sleep(_POLL_S)


@rollout.command()
@_cluster_options
def history(name: str, namespace: str | None, context: str | None) -> None:
    """Lists the revisions of NAME with their changes, the newest last."""
    with _deployments(context, namespace, name) as api:
        current = api.get(name).get("status", {}).get("revision")
        before: dict[str, Any] = {}
        for record in api.records(name):
            restart = {"restartedAt": record["data"].get("restartedAt")}
            spec = {**record["data"]["spec"], **restart}
            revision = _revision(record)
            mark = _mark(record, is_current=revision == current)
            changed = ", ".join(_differences(before, spec)) if before else "the first one on record"
            say(f"{record['revision']}  {revision}{mark}  {changed}")
            before = spec


@rollout.command()
@_cluster_options
@click.option(
    "--to-revision",
    type=click.IntRange(min=1),
    help="Number in `moe rollout history`. Default: the revision before the current one.",
)
def undo(name: str, namespace: str | None, context: str | None, to_revision: int | None) -> None:
    """Restores the spec of an earlier revision of NAME; the operator rolls it out."""
    with _deployments(context, namespace, name) as api:
        body = api.get(name)
        current = _current_revision(body) if to_revision is None else None
        record = _wanted(api.records(name), current, to_revision, name)
        operations = list(restoring(record["data"], body))
        if not operations:
            click.echo(f"{name} has the spec of revision {record['revision']} already; nothing is changed")
            return
        api.patch(name, operations)
        click.echo(
            f"{name} rolls back to revision {record['revision']}; watch it with `moe rollout status {name}`"
        )


@rollout.command()
@_cluster_options
def restart(name: str, namespace: str | None, context: str | None) -> None:
    """Replaces every worker and frontend of NAME, in the order of any other rollout.

    It sets the annotation kubectl.kubernetes.io/restartedAt.
    """
    now = datetime.now().astimezone().isoformat(timespec="milliseconds")
    with _deployments(context, namespace, name) as api:
        body = api.patch(name, {"metadata": {"annotations": {names.ANNOTATION_RESTARTED: now}}})
        rollout = body["spec"].get("rollout", {})
        paused = rollout.get("paused", rollout.get("pause"))
        later = " as soon as it is resumed" if paused else ""
        click.echo(f"{name} restarts{later}; watch it with `moe rollout status {name}`")


@rollout.command()
@_cluster_options
def pause(name: str, namespace: str | None, context: str | None) -> None:
    """Keeps every replica of NAME at its revision; scaling continues."""
    _set_pause(name, namespace, context, value=True)


@rollout.command()
@_cluster_options
def resume(name: str, namespace: str | None, context: str | None) -> None:
    """Resumes a paused rollout of NAME."""
    _set_pause(name, namespace, context, value=False)


def _set_pause(name: str, namespace: str | None, context: str | None, *, value: bool) -> None:
    with _deployments(context, namespace, name) as api:
        api.patch(name, {"spec": {"rollout": {"paused": value}}})
        click.echo(f"{name} {'is paused' if value else 'is resumed'}")


def _progress(body: dict[str, Any]) -> tuple[str, str, str]:
    """Reason, message and status of Progressing, once the operator has seen the latest spec and restart."""
    status = body.get("status", {})
    for condition in status.get("conditions", ()):
        if condition["type"] == PROGRESSING:
            seen = (condition.get("observedGeneration"), status.get("restartedAt", ""))
            if seen == (body["metadata"]["generation"], restarted_at(body)):
                return condition["reason"], condition["message"], condition["status"]
            break
    return _WAITING, "the operator has not reconciled the latest change yet", "Unknown"


class _Patient:
    """Reads the progress of a deployment again and again, also while the API server restarts."""

    def __init__(self, api: "_Deployments", name: str) -> None:
        self._api, self._name = api, name
        self._answered_at: float | None = None

    def progress(self) -> tuple[str, str, str]:
        """As `_progress`.

        Raises:
            CommandError: the API server refuses, or has never answered, or not for a minute.
        """
        try:
            with asking(self._api.namespace, self._name):
                body = self._api.get(self._name)
        except CommandError as error:
            away_s = PATIENCE_S if self._answered_at is None else time.monotonic() - self._answered_at
            if error.exit_code not in TRANSIENT or away_s >= PATIENCE_S:
                raise
            return _WAITING, error.message, "Unknown"
        self._answered_at = time.monotonic()
        return _progress(body)


def _current_revision(body: dict[str, Any]) -> str | None:
    """The revision of the latest spec, which an undo leaves; None if the operator could make none of it.

    Raises:
        CommandError: the operator has not reconciled the latest spec yet.
    """
    reason, _, _ = _progress(body)
    if reason == _WAITING:
        name = body["metadata"]["name"]
        sentence = (
            f"the operator has not reconciled the latest change of {name} yet, so the revision before it is "
            f"not known; try again, or choose one of `moe rollout history {name}` by --to-revision"
        )
        raise CommandError(sentence, errors.FAILED)
    return None if reason in _BLOCKED else body["status"].get("revision")


def _revision(record: dict[str, Any]) -> str:
    """The revision of a record; empty if another client removed its label."""
    return str(record["metadata"]["labels"].get(names.LABEL_REVISION, ""))


def _mark(record: dict[str, Any], *, is_current: bool) -> str:
    """What a revision is besides its number: the current one, and an earlier one that an undo restored."""
    former = record["metadata"].get("annotations", {}).get(names.ANNOTATION_FORMER, "").rpartition(",")[2]
    parts = [*(["current"] if is_current else []), *([f"restored from revision {former}"] if former else [])]
    return f" ({', '.join(parts)})" if parts else ""


def _wanted(
    records: list[dict[str, Any]], current: str | None, number: int | None, name: str
) -> dict[str, Any]:
    """The record to go back to.

    Raises:
        CommandError: there is none.
    """
    if number is not None:
        found = [record for record in records if record["revision"] == number]
        sentence = f"{name} has no revision {number} on record; `moe rollout history {name}` lists them"
    else:
        found = [one for one in records if _revision(one) != current]
        sentence = f"{name} has no earlier revision on record"
    if not found:
        raise CommandError(sentence, errors.WRONG)
    return found[-1]


def restoring(recorded: dict[str, Any], body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The JSON patch that restores what a revision recorded; null stands for a field that is not set.

    So does a field that is not in the record: the operator that made it did not have the field.
    """
    for field, value in {**dict.fromkeys(names.REVISED_FIELDS), **recorded["spec"]}.items():
        yield from _setting(f"/spec/{field}", body["spec"].get(field), value)
    yield from _restarting(body, recorded.get("restartedAt"))


def _restarting(body: dict[str, Any], time_text: str | None) -> Iterator[dict[str, Any]]:
    """The JSON patch that sets the time of the last restart, or removes it."""
    annotations = body["metadata"].get("annotations")
    if annotations is None and time_text is not None:
        yield {"op": "add", "path": "/metadata/annotations", "value": {}}
    path = f"/metadata/annotations/{names.ANNOTATION_RESTARTED.replace('/', '~1')}"
    yield from _setting(path, (annotations or {}).get(names.ANNOTATION_RESTARTED), time_text)


def _setting(path: str, current: Any, value: Any) -> Iterator[dict[str, Any]]:
    if value is None and current is not None:
        yield {"op": "remove", "path": path}
    elif current != value:
        yield {"op": "add", "path": path, "value": value}


def _differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Paths whose values differ, each with the new value."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from _differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
    elif before != after:
        yield f"{path} unset" if after is None else f"{path}={_as_written(after)}"


def _as_written(value: Any) -> str:
    """A value as manifests and `kubectl patch` take it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class _Deployments:
    """MoEDeployments and their records in one namespace."""

    def __init__(self, namespace: str) -> None:
        import kubernetes  # noqa: PLC0415 - takes half a second, which other commands should not pay

        self._objects = kubernetes.client.CustomObjectsApi()
        self._records = kubernetes.client.AppsV1Api()
        self.namespace = namespace
        self._kind: dict[str, Any] = {
            "group": names.GROUP,
            "version": names.VERSION,
            "namespace": namespace,
            "plural": names.PLURAL,
            "_request_timeout": TIMEOUT_S,
        }

    def get(self, name: str) -> dict[str, Any]:
        """One deployment."""
        return cast("dict[str, Any]", self._objects.get_namespaced_custom_object(name=name, **self._kind))

    def patch(self, name: str, change: list[dict[str, Any]] | dict[str, Any]) -> dict[str, Any]:
        """Changes it by a JSON patch (RFC 6902) or a merge patch (RFC 7386); returns it as it is then."""
        kind = _JSON_PATCH if isinstance(change, list) else _MERGE_PATCH
        changed = self._objects.patch_namespaced_custom_object(
            name=name, body=change, _content_type=kind, **self._kind
        )
        return cast("dict[str, Any]", changed)

    def records(self, name: str) -> list[dict[str, Any]]:
        """Its revisions, the oldest first."""
        labels = {names.LABEL_NAME: name, names.LABEL_ROLE: names.ROLE_HISTORY}
        found = self._records.list_namespaced_controller_revision(
            self.namespace, label_selector=names.selector_text(labels), _request_timeout=TIMEOUT_S
        )
        plain = self._records.api_client.sanitize_for_serialization(found)["items"]
        return sorted(plain, key=lambda record: int(record["revision"]))


@contextmanager
def _deployments(context: str | None, namespace: str | None, name: str) -> Iterator[_Deployments]:
    with reading(context, namespace, name) as chosen:
        yield _Deployments(chosen)
