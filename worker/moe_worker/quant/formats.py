"""The number formats that a user can ask for, by name: one table for all that depends on them.

docs/formats.md says what each means. `config.engine.FORMATS` has the same names, without torch.
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
    """How projections are held and multiplied.

    matrices: classes that are taken as a checkpoint has them. quantize: makes one of plain weights [O, I], in
    groups where the format has any. own: ways of storing that are this format, so that what their maker left
    plain stays so. int8: whether activations are rounded. bits: of a weight, with its share of scales; None
    where it is a number of the model's dtype. tolerance: share of the logits' length by which computing in
    bfloat16, with the rounding that is part of it, may differ from float32.
    """

    name: str
    matrices: tuple[type[Matrix], ...]
    quantize: Callable[[Tensor, int], Matrix]
    own: tuple[type[Storage], ...] = ()
    int8: bool = False
    bits: float | None = None
    tolerance: float = 0.04

    def group(self, storage: Storage | None, inputs: int) -> int:
        """Inputs that share a scale where weights are rounded at load: as in a checkpoint that has int4."""
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
