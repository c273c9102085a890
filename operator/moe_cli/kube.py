"""What all commands that ask the cluster share: the kubeconfig, and errors in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from moe_client import errors
from moe_client.errors import CommandError
from moe_operator.resources import names

TIMEOUT_S: Final = 10
_ABSENT: Final = 404
_BAD: Final = (400, 422)


@contextmanager
def reading(context: str | None, namespace: str | None, name: str | None = None) -> Iterator[str]:
    """The namespace to look in; what goes wrong in the block becomes a sentence.

    Args:
        context: of the kubeconfig; None: the current one.
        namespace: None: the context's own.
        name: of the deployment that is looked for, if it is one.

    Raises:
        CommandError: there is no cluster, it does not answer, or it refuses.
    """
    import kubernetes  # noqa: PLC0415 - takes half a second, which other commands should not pay
    import urllib3  # noqa: PLC0415
    import yaml  # noqa: PLC0415

    chosen = namespace
    try:
        kubernetes.config.load_kube_config(context=context)
        chosen = namespace or _default_namespace(context)
        yield chosen
    except (kubernetes.config.ConfigException, yaml.YAMLError) as error:
        raise CommandError(
            f"no usable kubeconfig ({_one_line(error)}); "
            "set KUBECONFIG, to .local/kubeconfig after `make up` for one",
            errors.WRONG,
        ) from error
    except kubernetes.client.ApiException as error:
        raise CommandError(_refusal(error.status, str(error.reason), chosen, name), errors.WRONG) from error
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


def _refusal(status: int | None, reason: str, namespace: str | None, name: str | None) -> str:
    if status == _ABSENT and name:
        return f"no MoEDeployment {name} in namespace {namespace}; `moe status -A` lists all there are"
    if status == _ABSENT:
        return "this cluster does not know MoEDeployments; install the CRD (kubectl apply -f crds/)"
    if status in _BAD:
        return (
            f"the cluster does not take the change ({status} {reason}); `moe status {name}` shows the object"
        )
    return f"the cluster refuses to tell ({status} {reason}); your user needs get and list on {names.PLURAL}"
