"""`moe status`: deployments and their state."""

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import click

from moe_api import mutual
from moe_api.tls import KeyPair
from moe_cli.asking_experts import used
from moe_cli.kube import TIMEOUT_S, reading
from moe_client.calling import ADDRESS
from moe_client.endpoint import Endpoint, access_options
from moe_operator.resources import names

_FORBIDDEN: Final = 403
_ABSENT: Final = 404


@click.command()
@click.option("-n", "--namespace", help="Namespace; the kubeconfig's own by default.")
@click.option("-A", "--all-namespaces", is_flag=True, help="List the deployments of all namespaces.")
@click.option("--context", help="Context of the kubeconfig. Default: its current one.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, for scripts: a report, or a list of objects."
)
@click.option(
    "--endpoint",
    type=ADDRESS,
    help="Where a worker of NAME listens, as through a port-forward; only its experts are shown then. "
    "Default: the addresses of the pods.",
)
@access_options
@click.argument("name", required=False)
def status(
    endpoint: Endpoint,
    namespace: str | None,
    context: str | None,
    name: str | None,
    *,
    all_namespaces: bool,
    as_json: bool,
) -> None:
    """Shows the MoEDeployment NAME, or lists all of a namespace.

    Of one deployment: its conditions, what caches saved since its frontends started, every pod with its
    revision and what keeps it from being ready, the load of each, and the last decisions of the operator
    with their reasons. Replicas that are ready are asked for the use of their experts, for 2 s in all: mean
    activated experts of a token, utilisation (mean over the largest load, mean and lowest of the layers) and,
    where they learn domains, the experts (layer/expert) that each domain uses most. `moe experts` shows more.

    \b
    From where pods cannot be reached:
      kubectl port-forward pod/NAME-0-0 8000 & moe status NAME --endpoint 127.0.0.1:8000

    \b
    The load is known where spec.scaling is set; with `mode: Advisory` it is measured, every minute,
    and nothing is changed.

    The cluster is that of KUBECONFIG or ~/.kube/config, as for kubectl.
    """
    if name and all_namespaces:
        raise click.UsageError(
            "NAME and --all-namespaces exclude each other: a name is looked up in one namespace"
        )
    if endpoint.address and not name:
        raise click.UsageError("--endpoint needs NAME: it is a worker of that deployment")
    found = _read(context, namespace, name, everywhere=all_namespaces)
    if name:
        own = None if endpoint.tls else _identity(context, found)
        found["experts"] = used(found["pods"], endpoint, own, namespace=found["namespace"])
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    # rich takes a quarter of a second to import, which `moe generate` should not pay.
    from moe_cli import rendering  # noqa: PLC0415

    rendering.show(found)


def _read(
    context: str | None, namespace: str | None, name: str | None, *, everywhere: bool
) -> dict[str, Any]:
    """A report of one deployment, or a list of objects.

    Raises:
        CommandError: there is no cluster, it does not answer, or it has no such object.
    """
    with reading(context, namespace, name) as chosen:
        import kubernetes  # noqa: PLC0415

        found = _request(kubernetes.client.CustomObjectsApi(), chosen, name, everywhere=everywhere)
        return _reported(kubernetes.client, found) if name else found


def _identity(context: str | None, found: dict[str, Any]) -> KeyPair | None:
    """The certificate of frontends, if a ready worker asks for one and this user may read it."""
    workers = (pod for pod in found["pods"] if pod["role"] == names.ROLE_WORKER)
    if not any(pod["mutualTls"] and pod["ready"] for pod in workers):
        return None
    secret = names.FRONTEND_CERTIFICATE_SECRET
    with reading(context, found["namespace"], found["name"]) as namespace:
        import kubernetes  # noqa: PLC0415

        try:
            core = kubernetes.client.CoreV1Api()
            data = core.read_namespaced_secret(secret, namespace, _request_timeout=TIMEOUT_S).data or {}
            return mutual.parse({name: base64.b64decode(text) for name, text in data.items()})
        except (kubernetes.client.ApiException, ValueError) as error:
            why = error.reason if isinstance(error, kubernetes.client.ApiException) else error
            click.echo(f"note: Secret {secret} cannot be used ({why}); give --tls-folder", err=True)
            return None


def _request(api: Any, namespace: str, name: str | None, *, everywhere: bool) -> dict[str, Any]:
    kind = {
        "group": names.GROUP,
        "version": names.VERSION,
        "plural": names.PLURAL,
        "_request_timeout": TIMEOUT_S,
    }
    if name:
        answer = api.get_namespaced_custom_object(namespace=namespace, name=name, **kind)
    elif everywhere:
        answer = api.list_cluster_custom_object(**kind)
    else:
        answer = api.list_namespaced_custom_object(namespace=namespace, **kind)
    return dict(answer)


def _reported(client: Any, body: dict[str, Any]) -> dict[str, Any]:
    """The report of a deployment, with its pods, Events and routes, as far as this user may read them.

    client: the module `kubernetes.client`.
    """
    from moe_operator.statuspage.report import report  # noqa: PLC0415

    core, namespace, name = client.CoreV1Api(), body["metadata"]["namespace"], body["metadata"]["name"]
    about = f"involvedObject.kind={names.KIND},involvedObject.uid={body['metadata']['uid']}"
    pods = _items("pod", core.list_namespaced_pod, namespace, label_selector=f"{names.LABEL_NAME}={name}")
    events = _items("event", core.list_namespaced_event, namespace, field_selector=about)
    routes = _items(
        names.ROUTES_KIND,
        client.CustomObjectsApi().list_namespaced_custom_object,
        namespace,
        group=names.GROUP,
        version=names.VERSION,
        plural=names.ROUTES_PLURAL,
        label_selector=f"{names.LABEL_NAME}={name}",
    )
    return report(body, pods, events, routes, datetime.now(UTC))


def _items(kind: str, read: Callable[..., Any], namespace: str, **options: str) -> list[dict[str, Any]]:
    """The items of a list as the API server returned them; none if this user may not read them.

    There are none either if the API server does not know the kind.
    """
    import kubernetes  # noqa: PLC0415

    try:
        answer = read(namespace=namespace, **options, _preload_content=False, _request_timeout=TIMEOUT_S)
    except kubernetes.client.ApiException as error:
        if error.status not in (_FORBIDDEN, _ABSENT):
            raise
        if error.status == _FORBIDDEN:
            click.echo(f"note: incomplete: your user may not list objects of kind {kind}", err=True)
        return []
    items: list[dict[str, Any]] = json.loads(answer.data)["items"]
    return items
