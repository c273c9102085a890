"""The number formats that users can select, by name.

docs/formats.md defines each. `config.engine.FORMATS` has the same names, without torch.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moe_worker.config.quantization import Fp8Storage, PackedStorage, SparseStorage, Storage
from moe_worker.quant.fp8 import Fp8Weight, quantize_fp8
from moe_worker.quant.int4 import GROUP, Int4Weight, quantize_int4
from moe_worker.quant.matrix import Dense, Matrix
from moe_worker.quant.sparse14 import Sparse14Weight


@dataclass(frozen=True)
class Format:
    """How projections are stored and multiplied.

    matrices: classes that a checkpoint may have for this format. quantize: makes one of plain weights [O, I],
    in groups if the format has any. own: storage that belongs to this format, so plain matrices in it stay
    plain. int8: whether activations are rounded. bits: per weight, including scales; None for numbers of the
    model's dtype. tolerance: difference from float32, as a share of the norm of the logits, that computing in
    bfloat16 with the rounding of the format may cause.
    """

    name: str
    matrices: tuple[type[Matrix], ...]
    quantize: Callable[[Tensor, int], Matrix]
    own: tuple[type[Storage], ...] = ()
    int8: bool = False
    bits: float | None = None
    tolerance: float = 0.04

    def group(self, storage: Storage | None, inputs: int) -> int:
        """Inputs that share a scale if weights are rounded when they load: as in a checkpoint with int4."""
        if isinstance(storage, PackedStorage | SparseStorage):
            return storage.group or inputs
        return GROUP


_INT4 = (Int4Weight, Sparse14Weight)
FORMATS = {
    each.name: each
    for each in (
        Format("dense", (Dense,), lambda weight, _: Dense(weight)),
        Format("fp8", (Fp8Weight,), lambda weight, _: quantize_fp8(weight), (Fp8Storage,), bits=8.25),
        Format("w4a16", _INT4, quantize_int4, (PackedStorage, SparseStorage), bits=4.25),
        Format("w4a8", _INT4, quantize_int4, int8=True, bits=4.25, tolerance=0.05),
    )
}
