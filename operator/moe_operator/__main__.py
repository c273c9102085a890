"""The operator: `python -m moe_operator`, with the options of `kopf run`."""

import sys

from moe_api.first_process import prepare


def main() -> None:
    """Prepares the process before the slow imports."""
    prepare()
    from kopf.cli import main as kopf  # noqa: PLC0415 - after prepare()

    from moe_operator.errors import InstallationError  # noqa: PLC0415
    from moe_operator.settings import from_environment  # noqa: PLC0415

    try:
        names = from_environment().namespaces
    except InstallationError as error:
        sys.exit(f"Error: {error}")
    scope = [f"--namespace={name}" for name in names] or ["--all-namespaces"]
    kopf(["run", "--module=moe_operator.main", *scope, *sys.argv[1:]])


if __name__ == "__main__":
    main()
