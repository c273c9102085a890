"""Which implementation computes an operation, and why: one frozen table, one choice."""

from dataclasses import dataclass

from moe_worker.kernels.cpu import build, library

OPERATIONS = ("linear", "experts", "router", "norm", "attention", "pass")
FORMATS = ("fp32", "bf16", "w4a16", "w4a8", "fp8")


@dataclass(frozen=True)
class Hardware:
    """What was found: `device` is "cpu" or "cuda".

    kernels: "triton", or the fastest CPU kernels that can run here; None where there are none for this
    machine or model. `reason` says why in words.
    """

    device: str
    kernels: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Choice:
    """`implementation`: "cpu/<variant>", "triton" or "reference"; `reason` is a clause for the user."""

    operation: str
    format: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.format} {self.operation}: {self.implementation} ({self.reason})"


_ON_CUDA = ("bf16", "fp8", "w4a16", "w4a8")
# (operation, format, device) with kernels of its own; everything else is computed by the reference.
_KERNELS = frozenset(
    (operation, number_format, device)
    for number_format, device in (("w4a8", "cpu"), *((each, "cuda") for each in _ON_CUDA))
    for operation in OPERATIONS
)


def probe_cpu() -> Hardware:
    """Looks for CPU kernels; compiles them where a compiler is and none are there yet."""
    try:
        variants = library.supported_variants()
    except build.BuildError as error:
        return Hardware("cpu", None, str(error))
    if not variants:
        return Hardware("cpu", None, "this CPU has no AVX2")
    return Hardware("cpu", variants[-1], f"this CPU has {variants[-1].replace('-', '_')}")


def choose(operation: str, number_format: str, hardware: Hardware) -> Choice:
    """The implementation of `operation` (of OPERATIONS) in `number_format` (of FORMATS)."""
    if (operation, number_format, hardware.device) not in _KERNELS:
        reason = f"there are no kernels for {number_format} on {hardware.device} yet"
        return Choice(operation, number_format, "reference", reason)
    if hardware.kernels is None:
        return Choice(operation, number_format, "reference", hardware.reason)
    kernels = hardware.kernels if hardware.device == "cuda" else f"cpu/{hardware.kernels}"
    return Choice(operation, number_format, kernels, hardware.reason)


def explain(number_format: str, hardware: Hardware) -> list[str]:
    """One line an operation."""
    return [str(choose(operation, number_format, hardware)) for operation in OPERATIONS]
