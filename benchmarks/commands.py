"""What the commands of several benchmarks share: a benchmark that cannot run says why in one sentence."""

import math
import shutil
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from moe_worker.config.mesh import MeshShape
from moe_worker.errors import SettingsError, WorkerError


def need_gpu(parser: ArgumentParser, remedy: str = "run it on a machine with one") -> None:
    """Ends the command, before it computes anything, if torch sees no GPU."""
    import torch  # noqa: PLC0415 - --help and wrong arguments need not wait for it

    if not torch.cuda.is_available():
        parser.exit(
            2, f"error: {parser.prog} needs a CUDA GPU, and torch {torch.__version__} sees none; {remedy}\n"
        )


def need_space(parser: ArgumentParser, folder: Path, nbytes: int) -> None:
    """Ends the command, before it computes anything, if the disk of `folder` has less free than it writes."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        parser.exit(
            2,
            f"error: {parser.prog} needs {gigabytes(nbytes)} in {folder}, and its disk has {gigabytes(free)} "
            "free; free space, or give another folder\n",
        )


def gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB"


def at_least(least: int) -> Callable[[str], int]:
    """Of arguments that are whole numbers from `least` on."""

    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return whole


positive, at_least_two, not_negative = at_least(1), at_least(2), at_least(0)


def amount(text: str) -> float:
    """An argument that is a finite number from 0 on."""
    return _number(text, "finite number of at least 0", lambda value: 0 <= value < math.inf)


def above_zero(text: str) -> float:
    """An argument that is a finite number above 0."""
    return _number(text, "finite number above 0", lambda value: 0 < value < math.inf)


def share(text: str) -> float:
    """An argument above 0 and at most 1."""
    return _number(text, "number above 0 and at most 1", lambda value: 0 < value <= 1)


def _number(text: str, wanted: str, fits: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise ArgumentTypeError(f"{text!r} is no {wanted}")
    return value


def mesh_name(text: str) -> str:
    """An argument like 2x2."""
    try:
        return str(MeshShape.parse(text))
    except SettingsError as error:
        raise ArgumentTypeError(str(error)) from None


def file_with_numbers(text: str) -> tuple[Path, list[int]]:
    """An argument like FILE:50,200."""
    path, numbers = _file_and_rest(text, "numbers behind it, as in FILE:50,200")
    return path, [positive(number) for number in numbers.split(",")]


def file_with_number(text: str) -> tuple[Path, int]:
    """An argument like FILE:5."""
    path, number = _file_and_rest(text, "a number behind it, as in FILE:5")
    return path, positive(number)


def _file_and_rest(text: str, wanted: str) -> tuple[Path, str]:
    path, _, rest = text.rpartition(":")
    if not path:
        raise ArgumentTypeError(f"{text!r} is no file with {wanted}")
    return Path(path), rest


def run(main: Callable[[], None], wrong: type[Exception] = WorkerError) -> None:
    """Runs a command; an error that is meant for the user ends it without a traceback.

    wrong: such an error of another package than moe_worker, about an argument.
    """
    try:
        main()
    except (WorkerError, wrong) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code if isinstance(error, WorkerError) else 2) from None
