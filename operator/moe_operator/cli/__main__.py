"""The command `moe`, from its first instruction."""

from moe_api.first_process import end_at_sigterm


def main() -> None:
    """Handles SIGTERM before the imports that take long."""
    end_at_sigterm()
    from moe_operator.cli.main import main as command  # noqa: PLC0415 - after the handler

    command()


if __name__ == "__main__":
    main()
