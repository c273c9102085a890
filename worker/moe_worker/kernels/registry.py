"""Which implementation computes an operation, and why: one frozen table, one choice."""

from dataclasses import dataclass

from moe_worker.kernels.cpu import build, library

OPERATIONS = ("linear", "experts", "router", "norm", "attention", "pass")
FORMATS = ("fp32", "bf16", "w4a16", "w4a8", "fp8")


@dataclass(frozen=True)
class Hardware:
    """What was found: `device` is "cpu" or "cuda".

    cpu_variant: the fastest CPU kernels that can run here, or None; `reason` says why in words.
    """

    device: str
    cpu_variant: str | None = None
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


# (operation, format, device) with kernels of its own; everything else is computed by the reference.
_KERNELS = {
    **{(operation, "w4a8", "cpu"): "cpu" for operation in OPERATIONS},
    **{(operation, "w4a8", "cuda"): "triton" for operation in OPERATIONS},
}


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
    kind = _KERNELS.get((operation, number_format, hardware.device))
    if kind is None:
        reason = f"there are no kernels for {number_format} on {hardware.device} yet"
        return Choice(operation, number_format, "reference", reason)
    if kind == "triton":
        return Choice(operation, number_format, "triton", "this is a CUDA device")
    if hardware.cpu_variant is None:
        return Choice(operation, number_format, "reference", hardware.reason)
    return Choice(operation, number_format, f"cpu/{hardware.cpu_variant}", hardware.reason)


def explain(number_format: str, hardware: Hardware) -> list[str]:
    """One line an operation."""
    return [str(choose(operation, number_format, hardware)) for operation in OPERATIONS]
