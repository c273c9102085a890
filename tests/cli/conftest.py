import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.frontend.fake_worker import FakeWorker

MOE = Path(sys.executable).with_name("moe")


@pytest.fixture
async def worker():
    made = FakeWorker("w")
    await made.start()
    yield made
    await made.server.stop(None)


@pytest.fixture
def environment(tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "MOE_", "KUBE"))}
    return {**clean, "HOME": str(tmp_path), "COLUMNS": "120"}


@pytest.fixture
def moe(environment):
    """`await moe("generate", ...)` runs the command and gives what it printed."""

    async def run(*args, stdin=b"", **environ):
        return await asyncio.to_thread(
            subprocess.run,
            [MOE, *args],
            input=stdin,
            capture_output=True,
            env={**environment, **environ},
            timeout=60,
            check=False,
        )

    return run
