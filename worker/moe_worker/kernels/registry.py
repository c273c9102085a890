"""Selects the implementation of each operation, with a reason.

The operations of a layer are selected together, as the choice for "pass": kernels for a single operation
would need the weight layouts of all others. "sampling" follows a pass, and depends on the device alone. Every
line names the function that runs; a test watches forward passes.
"""

from dataclasses import dataclass

from moe_worker.kernels.cpu import build, library

OPERATIONS = ("linear", "attention", "router", "dispatch", "experts", "norm", "pass", "sampling")
REFERENCE, TRITON = "reference", "triton"


@dataclass(frozen=True)
class Hardware:
    """The hardware: `device` is "cpu" or "cuda".

    kernels: "triton", or the fastest CPU kernels for this machine; None if there are none for the machine or
    the model. `reason` explains it in words. ranks: processes that share the experts of a layer. e4m3:
    whether products of large passes may run on FP8 tensor cores; `e4m3_reason` explains it. sparse: whether
    the checkpoint's weights are 1:4 sparse.
    """

    device: str
    kernels: str | None = None
    reason: str = ""
    ranks: int = 1
    e4m3: bool = False
    e4m3_reason: str = ""
    sparse: bool = False


@dataclass(frozen=True)
class KernelChoice:
    """`implementation`: "cpu/<variant>", "triton" or "reference"; `reason` is a clause for the user.

    function: the function that runs, as MODULE.NAME inside moe_worker, or its name in torch.
    """

    operation: str
    format: str
    implementation: str
    function: str
    reason: str

    def __str__(self) -> str:
        return f"{self.format} {self.operation}: {self.implementation}, {self.function} ({self.reason})"


_DENSE = ("fp32", "bf16")
# (format, device) with kernels for a whole forward pass; everything else is computed by the reference.
_KERNELS = frozenset({("w4a8", "cpu"), *((each, "cuda") for each in ("bf16", "fp8", "w4a16", "w4a8"))})
# Where temperature is above 0; otherwise the likeliest token is searched for (kernels.likeliest).
_SAMPLING = {
    "cpu": (REFERENCE, "kernels.draw.draw_plain", "there are no sampling kernels for cpu"),
    "cuda": (TRITON, "kernels.triton.draw.draw_tokens", "this is a CUDA device"),
}
_LOCAL, _SPREAD = "moe.dispatch.LocalDispatch.scatter", "mesh.dispatch.AllToAllDispatch.scatter"
_FIXED = "mesh.fixed.FixedExchange.scatter"
_REFERENCE = {
    "linear": "kernels.linear.Linear.forward",
    "attention": "models.attention.attend",
    "router": "moe.router.choose",
    "dispatch": _LOCAL,
    "experts": "moe.experts.Experts.forward",
    "norm": "kernels.reference.rms_norm",
    "pass": "models.layers.StageModel.forward",
}
_TRITON = {
    "linear": "kernels.triton.linear.linear_packed",
    "attention": "kernels.triton.attention.attend",
    "router": "kernels.triton.router.route",
    "dispatch": "none: all experts are in this process",
    "experts": "kernels.triton.experts.experts_packed",
    "norm": "kernels.triton.norm.residual_norm",
    "pass": "models.cuda.CudaModel.forward",
}
_TRITON_DENSE = _TRITON | {
    "linear": "torch.nn.functional.linear",
    "experts": "kernels.triton.experts.experts_bf16",
}
# Passes of so many tokens that dequantizing all weights costs less (models.cuda.CudaModel.products).
_LARGE = {"linear": "torch.nn.functional.linear", "experts": "kernels.triton.wide.experts_wide"}
_LARGE_E4M3 = {
    "linear": "kernels.triton.e4m3.linear_e4m3",
    "experts": "kernels.triton.e4m3.experts_e4m3",
}
# One call computes all layers (native/forward.h) where all experts are in this process.
_FUSED = dict.fromkeys(OPERATIONS, "kernels.cpu.library.Kernels.run")
_NATIVE = {
    "linear": "kernels.cpu.operations.linear",
    "attention": "kernels.cpu.operations.attend",
    "router": "kernels.cpu.operations.route",
    "dispatch": _LOCAL,
    "experts": "kernels.cpu.operations.experts",
    "norm": "kernels.cpu.operations.norm",
    "pass": "models.layers.StageModel.forward",
}


def probe_cpu() -> Hardware:
    """Finds CPU kernels; compiles them if there are none yet and a compiler is available."""
    try:
        variants = library.supported_variants()
    except build.BuildError as error:
        return Hardware("cpu", None, str(error))
    if not variants:
        return Hardware("cpu", None, "this CPU has no AVX2")
    return Hardware("cpu", variants[-1], f"this CPU has {variants[-1].replace('-', '_')}")


def choose(operation: str, number_format: str, hardware: Hardware) -> KernelChoice:
    """The implementation of `operation`, of OPERATIONS.

    number_format: what a model computes in: fp32 or bf16 with dense weights, else fp8, w4a16 or w4a8.
    """
    if operation == "sampling":
        implementation, function, reason = _SAMPLING[hardware.device]
        return KernelChoice(operation, number_format, implementation, function, reason)
    implementation, reason = _implementation(number_format, hardware)
    function = _functions(number_format, implementation, hardware)[operation]
    if operation == "dispatch" and hardware.ranks > 1:
        function = _FIXED if implementation == TRITON else _SPREAD
    return KernelChoice(operation, number_format, implementation, function, reason)


def explain(number_format: str, hardware: Hardware) -> list[str]:
    """One line an operation; further ones for operations that large passes compute otherwise."""
    choices = [choose(operation, number_format, hardware) for operation in OPERATIONS]
    choices += [*_of_large_passes(number_format, hardware), *_of_sparse_weights(number_format, hardware)]
    return [str(choice) for choice in choices]


def _of_large_passes(number_format: str, hardware: Hardware) -> list[KernelChoice]:
    if _implementation(number_format, hardware)[0] != TRITON:
        return []
    functions, reason = _LARGE, "the library's products in bf16 are faster"
    if number_format == "w4a8":
        functions = _LARGE_E4M3 if hardware.e4m3 else _LARGE
        reason = hardware.e4m3_reason
    return [
        KernelChoice(f"{operation} of large passes", number_format, TRITON, function, reason)
        for operation, function in functions.items()
    ]


def _of_sparse_weights(number_format: str, hardware: Hardware) -> list[KernelChoice]:
    """What the Triton kernels do with 1:4 sparse weights; other kernels treat all matrices the same."""
    implementation, _ = _implementation(number_format, hardware)
    if implementation != TRITON or not hardware.sparse or number_format in _DENSE:
        return []
    dense = "weights become dense when they load"
    stay = number_format == "w4a8" and hardware.ranks == 1
    experts = "weights stay sparse; large passes make dense ones" if stay else dense
    return [
        KernelChoice(f"{each} of 1:4 sparse weights", number_format, implementation, _TRITON[each], reason)
        for each, reason in (("linear", dense), ("experts", experts))
    ]


def _implementation(number_format: str, hardware: Hardware) -> tuple[str, str]:
    if (number_format, hardware.device) not in _KERNELS:
        return REFERENCE, f"there are no kernels for {number_format} on {hardware.device} yet"
    if hardware.kernels is None:
        return REFERENCE, hardware.reason
    return hardware.kernels if hardware.device == "cuda" else f"cpu/{hardware.kernels}", hardware.reason


def _functions(number_format: str, implementation: str, hardware: Hardware) -> dict[str, str]:
    if implementation == TRITON:
        return _TRITON_DENSE if number_format in _DENSE else _TRITON
    if implementation != REFERENCE:
        return _FUSED if hardware.ranks == 1 else _NATIVE
    return _REFERENCE
