"""`moe status`: what is deployed and how it fares."""

from typing import Any, Final

import click

from moe_operator.cli import errors
from moe_operator.cli.errors import CommandError
from moe_operator.resources import names

_TIMEOUT_S: Final = 10
_ABSENT: Final = 404


@click.command()
@click.option("-n", "--namespace", help="Namespace; the kubeconfig's own by default.")
@click.option("-A", "--all-namespaces", is_flag=True, help="List the deployments of all namespaces.")
@click.option("--context", help="Context of the kubeconfig.")
@click.argument("name", required=False)
def status(namespace: str | None, context: str | None, name: str | None, *, all_namespaces: bool) -> None:
    """Shows the MoEDeployment NAME, or lists all of a namespace.

    The cluster is that of KUBECONFIG or ~/.kube/config, as for kubectl.
    """
    if name and all_namespaces:
        raise click.UsageError(
            "NAME and --all-namespaces exclude each other: a name is looked up in one namespace"
        )
    body = _read(context, namespace, name, everywhere=all_namespaces)
    # rich takes a quarter of a second to import, which `moe generate` should not pay.
    from moe_operator.cli import rendering  # noqa: PLC0415

    rendering.show(body)


def _read(
    context: str | None, namespace: str | None, name: str | None, *, everywhere: bool
) -> dict[str, Any]:
    """One object, or a list of them.

    Raises:
        CommandError: there is no cluster, it does not answer, or it has no such object.
    """
    import kubernetes  # noqa: PLC0415
    import urllib3  # noqa: PLC0415
    import yaml  # noqa: PLC0415

    try:
        kubernetes.config.load_kube_config(context=context)
        namespace = namespace or _default_namespace(context)
        return _request(kubernetes.client.CustomObjectsApi(), namespace, name, everywhere=everywhere)
    except (kubernetes.config.ConfigException, yaml.YAMLError) as error:
        raise CommandError(
            f"no usable kubeconfig ({_one_line(error)}); "
            "set KUBECONFIG, to .local/kubeconfig after `make up` for one",
            errors.WRONG,
        ) from error
    except kubernetes.client.ApiException as error:
        raise CommandError(
            _refusal(error.status, str(error.reason), namespace, name), errors.WRONG
        ) from error
    except urllib3.exceptions.HTTPError as error:
        raise CommandError(
            f"the cluster does not answer ({type(error).__name__}); "
            "is it running, and is the kubeconfig's address right?",
            errors.ABSENT,
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _default_namespace(context: str | None) -> str:
    import kubernetes  # noqa: PLC0415

    contexts, active = kubernetes.config.list_kube_config_contexts()
    chosen = next((c for c in contexts if c["name"] == context), active)
    return str(chosen["context"].get("namespace") or "default")


def _request(api: Any, namespace: str, name: str | None, *, everywhere: bool) -> dict[str, Any]:
    kind = {
        "group": names.GROUP,
        "version": names.VERSION,
        "plural": names.PLURAL,
        "_request_timeout": _TIMEOUT_S,
    }
    if name:
        answer = api.get_namespaced_custom_object(namespace=namespace, name=name, **kind)
    elif everywhere:
        answer = api.list_cluster_custom_object(**kind)
    else:
        answer = api.list_namespaced_custom_object(namespace=namespace, **kind)
    return dict(answer)


def _refusal(status: int | None, reason: str, namespace: str | None, name: str | None) -> str:
    if status == _ABSENT and name:
        return f"no MoEDeployment {name} in namespace {namespace}; `moe status -A` lists all there are"
    if status == _ABSENT:
        return "this cluster does not know MoEDeployments; install the CRD (kubectl apply -f crds/)"
    return f"the cluster refuses to tell ({status} {reason}); your user needs get and list on {names.PLURAL}"
