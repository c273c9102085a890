"""What all commands that ask the cluster share: the kubeconfig, and errors in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from moe_api import api_status
from moe_client import errors
from moe_client.errors import CommandError

TIMEOUT_S: Final = 10
TRANSIENT: Final = (errors.ABSENT, errors.BUSY)
"""Exit codes of errors that a later attempt may not meet."""
_MALFORMED: Final = (OSError, ValueError, LookupError, TypeError, AttributeError)
"""What the client raises for a kubeconfig that is a directory, may not be read, or has another structure."""
_UNAUTHENTICATED, _FORBIDDEN, _ABSENT, _CONFLICT, _BUSY, _SERVER = 401, 403, 404, 409, 429, 500


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
    import yaml  # noqa: PLC0415

    try:
        kubernetes.config.load_kube_config(context=context)
        chosen = namespace or _default_namespace(context)
    except (kubernetes.config.ConfigException, yaml.YAMLError, *_MALFORMED) as error:
        raise CommandError(
            f"no usable kubeconfig ({_one_line(error)}); "
            "set KUBECONFIG, to .local/kubeconfig after `make up` for one",
            errors.WRONG,
        ) from error
    with asking(chosen, name):
        yield chosen


@contextmanager
def asking(namespace: str, name: str | None = None) -> Iterator[None]:
    """What the API server answers in the block becomes a sentence, if it is an error.

    Raises:
        CommandError: it does not answer, or it refuses.
    """
    import kubernetes  # noqa: PLC0415
    import urllib3  # noqa: PLC0415

    try:
        yield
    except kubernetes.client.ApiException as error:
        raise _refusal(error.status or 0, str(error.reason), error.body, namespace, name) from error
    except urllib3.exceptions.HTTPError as error:
        raise CommandError(
            f"the cluster does not answer ({type(error).__name__}); "
            "is it running, and is the kubeconfig's address right?",
            errors.ABSENT,
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _default_namespace(context: str | None) -> str:
    import kubernetes  # noqa: PLC0415

    contexts, active = kubernetes.config.list_kube_config_contexts()
    chosen = next((c for c in contexts if c["name"] == context), active)
    return str(chosen["context"].get("namespace") or "default")


def _refusal(
    code: int, reason: str, body: str | bytes | None, namespace: str, name: str | None
) -> CommandError:
    """The error of an error response. It quotes the API server, which names the right or the field."""
    answer = api_status.parse(body)
    said = f"{code} {answer.get('message') or reason}"
    if code == _ABSENT and (answer.get("details") or {}).get("name"):
        sentence = f"no MoEDeployment {name} in namespace {namespace}; `moe status -A` lists all there are"
    elif code == _ABSENT:
        sentence = "this cluster does not know MoEDeployments; install the CRD (kubectl apply -f crds/)"
    elif code == _FORBIDDEN:
        sentence = f"the cluster refuses the request ({said}); grant your user that right"
    elif code == _UNAUTHENTICATED:
        sentence = f"the cluster does not accept your credentials ({said}); log in again"
    elif code == _CONFLICT:
        sentence = f"conflict: the object was modified concurrently ({said}); run the command again"
    elif code == _BUSY or code >= _SERVER:
        busy = errors.BUSY if code == _BUSY else errors.ABSENT
        return CommandError(f"the cluster could not serve the request ({said}); try again", busy)
    else:
        sentence = f"the cluster does not take the change ({said}); `moe status {name}` shows the object"
    return CommandError(sentence, errors.FAILED if code == _CONFLICT else errors.WRONG)
