"""The ranks of a mesh other than the leader."""

import logging
from collections.abc import Callable
from pathlib import Path

from moe_worker.config.engine import EngineOptions
from moe_worker.engine.loading import load
from moe_worker.errors import SettingsError
from moe_worker.garbage import collect_rarely, spare_loaded
from moe_worker.mesh.errors import MeshError
from moe_worker.mesh.runner import MeshRunner

log = logging.getLogger(__name__)


def follow(
    directory: Path, options: EngineOptions, ready: Callable[[str], None] = lambda _format: None
) -> None:
    """Loads the part of this rank and computes what the leader sends, until the leader ends the mesh.

    ready: called with the format of the weights when the part is loaded. Raises WorkerError where the leader
    is lost and does not come back.
    """
    if options.mesh_rank == 0:
        raise SettingsError("rank 0 leads its mesh and follows nobody; give another --mesh-rank")
    loaded = load(directory, options, progress=True)
    runner = loaded.runner
    if not isinstance(runner, MeshRunner):
        raise SettingsError(f"a mesh {options.mesh} has no ranks to follow; give a larger --mesh")
    spare_loaded()
    collect_rarely()
    log.info("rank %d of mesh %s is ready", options.mesh_rank, options.mesh)
    ready(loaded.format)
    follow_leader(runner)


def follow_leader(runner: MeshRunner) -> None:
    """Computes until the leader ends the mesh; meets the others again where a rank is lost.

    Raises MeshError where the leader is lost and does not come back.
    """
    while True:
        try:
            runner.follow()
        except MeshError as error:
            runner.reform(error)
        else:
            return
