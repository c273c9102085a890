"""Entry point of the commands `moe` and `kubectl-moe`, which kubectl runs as `kubectl moe`."""

import sys
from pathlib import Path

from moe_api.first_process import prepare

PLUGIN = "kubectl-moe"


def main() -> None:
    """Prepares the process before the slow imports."""
    prepare()
    from moe_cli.main import main as command  # noqa: PLC0415 - after prepare()

    plugin = Path(sys.argv[0]).stem == PLUGIN
    command(prog_name="kubectl moe" if plugin else "moe")


if __name__ == "__main__":
    main()
