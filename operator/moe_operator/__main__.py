"""The operator: `python -m moe_operator`, with the options of `kopf run`."""

import sys

from moe_api.first_process import prepare


def main() -> None:
    """Prepares the process before the slow imports."""
    prepare()
    from kopf.cli import main as kopf  # noqa: PLC0415 - after prepare()

    from moe_operator.settings import from_environment  # noqa: PLC0415

    scope = [f"--namespace={name}" for name in from_environment().namespaces] or ["--all-namespaces"]
    kopf(["run", "--module=moe_operator.main", *scope, *sys.argv[1:]])


if __name__ == "__main__":
    main()
