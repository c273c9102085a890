"""The worker: loads a Mixture-of-Experts model and serves it over gRPC, or runs it as a library.

`moe_worker.Engine` is the library. It is imported on first use, so that `import moe_worker` (and with it
`moe-worker --help`) stays free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_worker.engine.offline import Engine as Engine
    from moe_worker.engine.offline import GenerationResult as GenerationResult
    from moe_worker.sampling.parameters import SamplingParameters as SamplingParameters

_HOMES = {
    "Engine": "moe_worker.engine.offline",
    "GenerationResult": "moe_worker.engine.offline",
    "SamplingParameters": "moe_worker.sampling.parameters",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_worker' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
