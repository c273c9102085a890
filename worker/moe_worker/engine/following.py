"""What a rank of a mesh does that does not lead."""

import logging
from pathlib import Path
from typing import NoReturn

from moe_worker.config.engine import EngineOptions
from moe_worker.engine.loading import load
from moe_worker.errors import SettingsError
from moe_worker.mesh.runner import MeshRunner

log = logging.getLogger(__name__)


def follow(directory: Path, options: EngineOptions) -> NoReturn:
    """Loads this rank's part and computes what the leader says. Raises WorkerError when it is gone."""
    if options.mesh_rank == 0:
        raise SettingsError("rank 0 leads its mesh and follows nobody; give another --mesh-rank")
    loaded = load(directory, options, progress=True)
    runner = loaded.runner
    if not isinstance(runner, MeshRunner):
        raise SettingsError(f"a mesh {options.mesh} has no ranks to follow; give a larger --mesh")
    log.info("rank %d of mesh %s is ready", options.mesh_rank, options.mesh)
    runner.follow()
