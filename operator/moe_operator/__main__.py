"""The operator: `python -m moe_operator --all-namespaces`, with the options of `kopf run`."""

import sys

from moe_api.first_process import prepare


def main() -> None:
    """Prepares the process before the slow imports."""
    prepare()
    from kopf.cli import main as kopf  # noqa: PLC0415 - after prepare()

    kopf(["run", "--module=moe_operator.main", *sys.argv[1:]])


if __name__ == "__main__":
    main()
