"""A random model over the GPUs of a mesh, and on one of them as a whole, for benchmarks and tests."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NoReturn

import torch

from benchmarks.gpu_random import NO_TEXT, config_of, random_model
from moe_worker.config.model import ModelConfig
from moe_worker.engine.loading import LoadedModel
from moe_worker.kvcache.paged import CacheShape, PagedCache
from moe_worker.mesh.cuda_stage import CudaStage
from moe_worker.mesh.errors import MeshError
from moe_worker.mesh.member import Member
from moe_worker.mesh.messages import End
from moe_worker.mesh.part import stage_of
from moe_worker.mesh.places import ExpertPlaces
from moe_worker.mesh.rebalance.execute import Rebalancing
from moe_worker.mesh.rebalance.hold import HeldExperts, ReadExperts
from moe_worker.mesh.rebalance.pace import Pace
from moe_worker.mesh.rebalance.plan import RebalancePolicy
from moe_worker.mesh.recovery import agree_on_pages, start_together
from moe_worker.mesh.runner import MeshRunner
from moe_worker.models.batch import Batch, Segment
from moe_worker.models.cuda_build import Sizes, prepare
from moe_worker.models.cuda_runner import CudaRunner
from moe_worker.models.deepseek import DeepseekModel, MoeBlock
from moe_worker.models.runner import Runner
from moe_worker.models.stage import Stage
from moe_worker.moe.experts import Experts

PAGE = 16


def chosen(
    experts: Experts,
    numbers: torch.Tensor,
    device: torch.device | None = None,
    rest: Callable[[], object] = lambda: None,
) -> Experts:
    """Copies of some experts, on `device`, one after the other. rest: called after each matrix."""

    def kept(rows: torch.Tensor) -> torch.Tensor:
        found = torch.empty(len(numbers), *rows.shape[1:], dtype=rows.dtype, device=device or rows.device)
        for row, number in zip(found, numbers.tolist(), strict=True):
            row.copy_(rows[number])
            rest()
        return found

    return Experts(experts.gate_up_AFD.map(kept), experts.down_ADI.map(kept), experts.round_tokens)


def stay(layer: int, _before: Sequence[int], _held: Sequence[int], _rest: Callable[[], object]) -> NoReturn:
    """Reads no experts: those of this case stay where they are."""
    raise MeshError(f"experts of layer {layer} were to move")


class OnHost:
    """Experts of the layers of a stage, all of them, in the host's memory: as a checkpoint that was read."""

    def __init__(self, model: DeepseekModel, layers: range) -> None:
        self._routed, self._device = model.config.moe.routed, model.device
        blocks = {number: model.layers[number].block for number in layers}
        everyone = torch.arange(self._routed + model.config.moe.shared, device=model.device)
        self._experts = {
            number: chosen(block.experts, everyone, torch.device("cpu"))
            for number, block in blocks.items()
            if isinstance(block, MoeBlock)
        }

    def reader_for(self, part: CudaStage) -> ReadExperts:
        """Converts experts for `part`."""

        def own(layer: int, held: Sequence[int], rest: Callable[[], object], shared: bool) -> Experts:
            experts = self._experts[layer]
            numbers = torch.tensor([*held, *(range(self._routed, experts.count) if shared else ())])
            return chosen(experts, numbers, self._device, rest)

        def read(
            layer: int, before: Sequence[int], held: Sequence[int], rest: Callable[[], object]
        ) -> object:
            with torch.inference_mode(), part.aside():
                return part.prepared(layer, before, held, partial(own, layer), rest)

        return read


class DrawnLoads:
    """A counter of loads that are drawn anew for each reading, as uneven as `sigma`: so experts move."""

    def __init__(self, config: ModelConfig, sigma: float = 1.0) -> None:
        self._layers = config.moe_layers
        self._sums = {layer: [0] * config.moe.routed for layer in self._layers}
        self._generator, self._sigma = torch.Generator().manual_seed(0), sigma

    def count(self, tokens: int) -> None:
        """Nothing."""

    def read(self) -> tuple[int, list[tuple[int, list[int], int]]]:
        """See Counter."""
        for sums in self._sums.values():
            drawn = torch.randn(len(sums), generator=self._generator) * self._sigma
            for expert, load in enumerate((drawn.exp() * 10_000).tolist()):
                sums[expert] += int(load)
        return 0, [(layer, list(sums), len(sums)) for layer, sums in self._sums.items()]


def part_of(model: DeepseekModel, stage: Stage) -> DeepseekModel:
    """What `stage` holds of a whole model."""
    layers = []
    for number in stage.layers:
        layer = model.layers[number]
        if isinstance(layer.block, MoeBlock) and number in stage.experts:
            experts, routed = layer.block.experts, model.config.moe.routed
            held = torch.tensor([*stage.experts[number], *range(routed, experts.count)], device=model.device)

            own = chosen(experts, held)
            layer = replace(layer, block=MoeBlock(layer.block.router, own, stage.dispatch(number)))
        layers.append(layer)
    none_ND = model.embedding_VD[:0]
    no_head = replace(model.head, matrix=model.head.matrix.map(lambda rows: rows[:0]))
    return replace(
        model,
        stage=stage,
        layers=layers,
        embedding_VD=model.embedding_VD if stage.first else none_ND,
        norm_D=model.norm_D if stage.last else none_ND[:, 0],
        head=model.head if stage.last else no_head,
    )


class Alone:
    """A whole model in this process. model: is consumed."""

    def __init__(self, model: DeepseekModel, context: int, largest: int, pages: int, prefill: int) -> None:
        self.config, self.context = model.config, context
        with torch.inference_mode():
            self.cache = cache_of(model.config, model.config.num_hidden_layers, pages, model.device)
            self.runner = CudaRunner(prepare(model, consume=True), self.cache, largest, context, prefill)

    def loaded(self) -> LoadedModel:
        """For an engine."""
        return loaded_model(self.config, self.runner, self.cache, self.context, None)


class Case:
    """A random model, as this rank's part of `member`'s mesh; on the leader as a whole, too, if `alone`."""

    alone: Alone | None

    def __init__(  # noqa: PLR0913, PLR0917 - a record of sizes
        self, member: Member, values: dict[str, Any], number_format: str, device: torch.device, context: int,
        largest: int, pages: int, prefill: int, redundant: int = 0, alone: bool = True, moving: float = 0.0,
        change: Callable[[DeepseekModel], None] | None = None, faults: bool = False,
    ) -> None:  # fmt: skip
        """moving: seconds from one move of all layers' experts to the next; 0: they stay. change: of the
        model that was drawn. faults: ranks may be lost.
        """
        self.values, self.number_format, self.change = values, number_format, change
        self.config, self.member, self.context = config_of(values), member, context
        total = self.config.num_hidden_layers
        cuts = [round(total * stage / member.shape.pipeline) for stage in range(member.shape.pipeline + 1)]
        layers = range(cuts[member.number], cuts[member.number + 1])
        places = ExpertPlaces(self.config, member.shape.expert, redundant)
        stage = stage_of(self.config, member, layers, places, device)
        with torch.inference_mode():
            whole = random_model(values, number_format, context, device)
            if change is not None:
                change(whole)
            self.cache = cache_of(self.config, len(layers), pages, device)
            part = part_of(whole, stage)
            on_host = OnHost(whole, layers) if moving else None
            self.alone = None
            if not (member.leads and alone):
                del whole
            if faults:
                agree_on_pages(member, pages)
            self.part = CudaStage(part, self.cache, member.group, largest, context, prefill)
            if faults:
                start_together(member, self.part, pages)
            else:
                self.part.resume()
            held = None
            if moving or faults:
                pace = Pace(launches=device.type == "cuda")
                read = stay if on_host is None else on_host.reader_for(self.part)
                held = HeldExperts(places, member, self.part, read, pace)
            self.runner = MeshRunner(member, self.part, self.cache, feeds=True, held=held)
            if member.leads and held is not None:
                stages = [range(begin, end) for begin, end in pairwise(cuts)]
                policy, loads = RebalancePolicy(moving > 0, moving, 1.0), DrawnLoads(self.config)
                self.runner.direct(Rebalancing(policy, places, held, member, stages, loads))
            if member.leads and alone:
                self.alone = Alone(whole, context, largest, pages, prefill)

    def loaded(self) -> LoadedModel:
        """The mesh, for the leader's engine."""
        return loaded_model(self.config, self.runner, self.cache, self.context, self.member)

    def loaded_alone(self) -> LoadedModel:
        """The whole model in this process."""
        return self._whole().loaded()

    @torch.inference_mode()
    def both(self, segments: list[Segment], every: bool = False) -> list[torch.Tensor]:
        """Logits of the last tokens of `segments`, or of all, by the mesh and by one process."""
        batch, whole = Batch.of(segments, self.cache), self._whole()
        rows = range(len(batch.tokens)) if every else batch.last_rows
        ours = self.runner.logits(batch, self.cache, rows).float().clone()
        self.runner.feed(ours.argmax(dim=-1))
        batch = Batch.of(segments, whole.cache)
        return [ours, whole.runner.logits(batch, whole.cache, rows).float().clone()]

    def end(self) -> None:
        """The other ranks stop following."""
        self.member.quiet()
        for channel in self.member.channels:
            channel.send(End())

    def _whole(self) -> Alone:
        if self.alone is None:
            raise ValueError("only the leader of a case with `alone` has the whole model")
        return self.alone


def cache_of(config: ModelConfig, layers: int, pages: int, device: torch.device) -> PagedCache:
    width = Sizes.of(config.latent).cache_width(config.latent)
    return cache_of_width(width, layers, pages, device, torch.bfloat16)


def cache_of_width(
    width: int, layers: int, pages: int, device: torch.device, dtype: torch.dtype
) -> PagedCache:
    return PagedCache.allocate(CacheShape(layers, width, PAGE, dtype), pages, device)


def loaded_model(
    config: ModelConfig, runner: Runner, cache: PagedCache, context: int, member: Member | None
) -> LoadedModel:
    return LoadedModel(config, runner, NO_TEXT, cache, context, "random", member)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Of rows, relative: the median and the largest."""
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(errors.median()), float(errors.max())


def random_tokens(count: int, seed: int, most: int) -> list[int]:
    return torch.randint(most, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def compared(case: Case, prompt: int, steps: int) -> list[tuple[float, float]]:
    """Differences after prompts, of four sequences, and in each of `steps` decode steps."""
    shards, pages = case.member.shape.expert, case.cache.shape.pages_for(case.context)
    vocabulary = case.config.vocab_size
    texts = [random_tokens(prompt + n + steps, n, vocabulary) for n in range(4)]
    own = [list(range(n * pages, (n + 1) * pages)) for n in range(4)]
    found = [
        difference(*case.both([Segment(t[: prompt + n], 0, own[n], n % shards) for n, t in enumerate(texts)]))
    ]
    for step in range(steps):
        members = range(4) if step % 2 == 0 else range(1)  # the other shards have nothing to do
        at = [prompt + n + step for n in range(4)]
        if step % 2:
            at[0] = prompt + step
        segments = [Segment(texts[n][at[n] : at[n] + 1], at[n], own[n], n % shards) for n in members]
        found.append(difference(*case.both(segments)))
    return found
