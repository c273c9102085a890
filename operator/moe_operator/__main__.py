"""The operator: `python -m moe_operator --all-namespaces`, with the options of `kopf run`."""

import sys

from moe_api.first_process import end_at_sigterm


def main() -> None:
    """Handles SIGTERM before the imports that take long."""
    end_at_sigterm()
    from kopf.cli import main as kopf  # noqa: PLC0415 - after the handler

    kopf(["run", "--module=moe_operator.main", *sys.argv[1:]])


if __name__ == "__main__":
    main()
