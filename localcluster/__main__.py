"""`python -m localcluster`. `build` works before any package is installed; the rest needs the environment of
`make`.
"""

import sys


def main() -> None:
    """Runs `build` with the standard library alone, everything else through `localcluster.cli`."""
    if sys.argv[1:2] == ["build"]:
        from localcluster import build  # noqa: PLC0415 - click may not be installed yet

        sys.exit(build.main(sys.argv[2:]))
    from localcluster import cli  # noqa: PLC0415

    cli.main()


if __name__ == "__main__":
    main()
