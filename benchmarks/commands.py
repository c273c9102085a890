"""What the commands of several benchmarks share: a benchmark that cannot run says why in one sentence."""

import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable

from moe_worker.config.mesh import MeshShape
from moe_worker.errors import SettingsError, WorkerError


def need_gpu(parser: ArgumentParser, remedy: str = "run it on a machine with one") -> None:
    """Ends the command, before it computes anything, if torch sees no GPU."""
    import torch  # noqa: PLC0415 - --help and wrong arguments need not wait for it

    if not torch.cuda.is_available():
        parser.exit(
            2, f"error: {parser.prog} needs a CUDA GPU, and torch {torch.__version__} sees none; {remedy}\n"
        )


def positive(text: str) -> int:
    """An argument that is a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def mesh_name(text: str) -> str:
    """An argument like 2x2."""
    try:
        return str(MeshShape.parse(text))
    except SettingsError as error:
        raise ArgumentTypeError(str(error)) from None


def run(main: Callable[[], None]) -> None:
    """Runs a command; an error that is meant for the user ends it without a traceback."""
    try:
        main()
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
