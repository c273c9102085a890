"""One call of the CPU kernels for all layers of a stage (native/forward.h).

It fuses the operations of models/native.py: it reads the same weights and computes the same numbers, to the
bit, without the time that many calls take.

Legend: T tokens of a forward pass, N tokens whose logits are wanted, D hidden, V vocabulary, E routed
experts.
"""

import ctypes
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_worker.kernels.cpu import structs
from moe_worker.kvcache.paged import PagedCache
from moe_worker.models.batch import Batch
from moe_worker.models.layers import RoutedBlock
from moe_worker.models.mla import INNER_NORM_EPS

if TYPE_CHECKING:
    from moe_worker.models.native import NativeLayer, NativeModel


class Fusion:
    """The layers of `model`, whose tensors the structs point into, as the kernels read them."""

    def __init__(self, model: "NativeModel") -> None:
        self._model = model
        routed = [index for index, layer in enumerate(model.layers) if isinstance(layer.block, RoutedBlock)]
        counts = torch.zeros(len(routed), model.config.moe.routed + 1, dtype=torch.int64)
        self._used = dict(zip(routed, counts, strict=True))
        self._layers = (structs.LayerStruct * len(model.layers))(*(_layer(layer) for layer in model.layers))
        for index, used in self._used.items():
            self._layers[index].experts_used = used.data_ptr()
        self._arguments = self._fixed()
        self._cache: Callable[[], PagedCache | None] = lambda: None  # that the structs point to
        self._keeps_choices, self._chosen = False, dict[int, Tensor]()

    def run(
        self, batch: Batch, cache: PagedCache, x_TD: Tensor | None, rows: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [T, D] after the last layer, and logits [N, V] of the tokens at `rows`; both float32.

        x_TD: hidden states of the stage before; None: the tokens are embedded. Raises MemoryError where
        scratch memory is short.
        """
        model, arguments = self._model, self._arguments
        tokens, selected = len(batch.tokens), array("i", rows)
        embedding = model.embedding_VD.data_ptr() if x_TD is None else None
        x_TD = torch.empty(tokens, model.config.hidden_size) if x_TD is None else x_TD.clone()
        if self._cache() is not cache:
            self._read(cache)
        tables = (batch.pages_BP.data_ptr(), batch.starts.data_ptr(), batch.lengths_B.data_ptr())
        arguments.cache.point_to(*tables, batch.pages.shape)
        logits_NV = torch.empty(len(rows), model.config.vocab_size)
        arguments.embedding, arguments.x = embedding, x_TD.data_ptr()
        arguments.tokens, arguments.positions = batch.tokens_T.data_ptr(), batch.positions_T.data_ptr()
        arguments.rows, arguments.selected = batch.rows_T.data_ptr(), selected.buffer_info()[0]
        arguments.logits = logits_NV.data_ptr()
        arguments.count, arguments.selected_count = tokens, len(rows)
        if self._keeps_choices:
            self._receive_choices(tokens)
        model.kernels.run(arguments)
        return x_TD, logits_NV

    def _read(self, cache: PagedCache) -> None:
        """Points the structs to `cache`, for all batches in it."""
        for struct, rows_CW in zip(self._layers, cache.layers, strict=True):
            struct.cache_rows = rows_CW.data_ptr()
        self._arguments.cache = structs.Cache.of(cache.shape.dtype == torch.bfloat16, cache.page_size)
        self._cache = weakref.ref(cache)

    def keep_choices(self) -> None:
        """Lets `choices` tell the experts of passes from now on."""
        self._keeps_choices = True

    def choices(self) -> list[Tensor]:
        """The routed experts of each token in the newest pass, int32 [T, K], layer by layer; -1: none."""
        return [chosen_TK[:, : self._model.config.moe.top_k] for chosen_TK in self._chosen.values()]

    def _receive_choices(self, tokens: int) -> None:
        for layer in self._used:
            per_token = self._model.config.moe.routing.per_token
            self._chosen[layer] = torch.empty(tokens, per_token, dtype=torch.int32)
            self._layers[layer].chosen = self._chosen[layer].data_ptr()

    def expert_counter(self) -> "FusionCounter":
        """Counts the experts that passes from now on use."""
        return FusionCounter(self)

    @property
    def experts_used(self) -> dict[int, Tensor]:
        """By layer of the model, over all passes: tokens of each routed expert, then the sum of the activated
        experts of each pass; int64 [E + 1], a copy.
        """
        begin = self._model.stage.begin
        return {begin + layer: used.clone() for layer, used in self._used.items()}

    def _fixed(self) -> structs.ForwardArguments:
        """What is the same in every pass."""
        model, config, latent = self._model, self._model.config, self._model.config.latent
        arguments = structs.ForwardArguments(
            layers=ctypes.addressof(self._layers),
            norm=model.norm_D.data_ptr(),
            head=model.head.weight.struct,
            rotations=model.rotations_CP.data_ptr(),
            embedding_bf16=int(model.embedding_VD.dtype == torch.bfloat16),
            layer_count=len(self._layers),
            vocabulary=config.vocab_size,
            hidden=config.hidden_size,
            heads=latent.num_attention_heads,
            plain=latent.qk_nope_head_dim,
            rope=latent.qk_rope_head_dim,
            rank=latent.kv_lora_rank,
            value=latent.v_head_dim,
            query_rank=latent.q_lora_rank or 0,
            segment=min(weight.segment for weight in self._weights()),
            eps=config.rms_norm_eps,
            inner_eps=INNER_NORM_EPS,
            attention_scale=model.layers[0].attention.scale,
        )
        arguments.experts = config.moe.routed
        arguments.choice = structs.choice_struct(config.moe.routing)
        return arguments

    def _weights(self) -> Iterator[structs.Weight]:
        yield self._model.head.weight.struct
        for layer in self._layers:
            yield from (getattr(layer, name) for name in ("input", "output", "gate_up", "down"))
            if layer.query_norm:
                yield layer.query


class FusionCounter:
    """The experts that passes use from now on; the kernels count them."""

    def __init__(self, fusion: Fusion) -> None:
        self._fusion, self._before, self._passes = fusion, fusion.experts_used, 0

    def count(self, tokens: int) -> None:
        """Counts a pass; it has no padding, so all its tokens count."""
        del tokens
        self._passes += 1

    def read(self) -> tuple[int, list[tuple[int, list[int], int]]]:
        """See moe.counting.Counter."""
        rows = []
        for layer, used in self._fusion.experts_used.items():
            *tokens, active = (used - self._before[layer]).tolist()
            rows.append((layer, tokens, active))
        return self._passes, rows


def _layer(layer: "NativeLayer") -> structs.LayerStruct:
    attention, block = layer.attention, layer.block
    struct = structs.LayerStruct(
        attention_norm=layer.attention_norm.data_ptr(),
        latent_norm=attention.latent_norm_R.data_ptr(),
        block_norm=layer.block_norm.data_ptr(),
        input=attention.input.weight.struct,
        key=attention.key.struct,
        value=attention.value.struct,
        output=attention.output.weight.struct,
    )
    if attention.query is not None and attention.query.norm_I is not None:
        struct.query_norm = attention.query.norm_I.data_ptr()
        struct.query = attention.query.weight.struct
    if isinstance(block, RoutedBlock):
        router, experts = block.router, block.experts
        struct.router = router.weight_ED.data_ptr()
        struct.router_bias = None if router.bias_E is None else router.bias_E.data_ptr()
        struct.gate_up, struct.down = experts.gate_up.struct, experts.down.struct
    else:
        struct.gate_up, struct.down = block.gate_up.weight.struct, block.down.weight.struct
    return struct
