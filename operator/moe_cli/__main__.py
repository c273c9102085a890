"""Entry point of the command `moe`."""

from moe_api.first_process import prepare


def main() -> None:
    """Prepares the process before the slow imports."""
    prepare()
    from moe_cli.main import main as command  # noqa: PLC0415 - after prepare()

    command()


if __name__ == "__main__":
    main()
