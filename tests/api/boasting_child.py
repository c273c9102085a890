"""A child whose second answer is announced to have 4 GiB."""

import sys

from moe_api import child

if __name__ == "__main__":
    answers = iter([child.frame(b"ready"), b"\xff" * 4 + b"x" * 100_000])
    while head := sys.stdin.buffer.read(child.LENGTH_BYTES):
        sys.stdin.buffer.read(int.from_bytes(head, "big"))
        sys.stdout.buffer.write(next(answers))
        sys.stdout.buffer.flush()
