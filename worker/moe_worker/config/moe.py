"""Expert and routing settings of config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from moe_worker.config.fields import Fields

# A hundred times the most of any published model: no loop over experts runs for minutes.
MOST_EXPERTS = 1 << 16


# DeepSeek has one level, issues ask for three; the CPU kernels have room for this many (MOE_LEVELS).
MOST_LEVELS = 4
# A group scores by this many of its best experts at most.
MOST_BEST = 2


class Method(Enum):
    """How experts are selected by their scores."""

    GREEDY = "greedy"  # the best of all
    GROUP_BEST = "group_limited_greedy"  # the best of the groups whose best expert is best (arXiv:2405.04434)
    GROUP_PAIR = "noaux_tc"  # as above, by a group's two best, with a bias (arXiv:2412.19437)


@dataclass(frozen=True)
class Level:
    """Limits a token's experts to `keep` of `groups` equal groups, those with the best scores.

    A group scores by the sum of its `best` (1 or 2) best experts.
    """

    groups: int
    keep: int
    best: int = 1


@dataclass(frozen=True)
class Routing:
    """How a token's experts are chosen: what every backend's router is told, and all that it needs.

    At most top_k of `experts` are chosen. Behind them stand the `shared` ones (experts, experts + 1, ...),
    which every token takes with weight 1. levels: coarse to fine; groups of a level lie inside those of the
    level before, and each level keeps its best among what the level before kept (DeepSeek has one level).
    Scores are the softmax or the sigmoid of the router's logits.
    normalise: whether the chosen scores are divided by their sum; `scale` multiplies them afterwards.
    mass: the chosen experts, best first, are cut where their share of the top_k's summed scores has reached
    it (top-p routing, arXiv:2403.07652); the first one always stays, and 1 keeps all. Places that are left
    have id -1 and weight 0.
    """

    experts: int
    shared: int
    top_k: int
    levels: tuple[Level, ...] = ()
    softmax: bool = False
    normalise: bool = False
    scale: float = 1.0
    mass: float = 1.0

    @property
    def per_token(self) -> int:
        """Ids of a token, K: the chosen experts and the shared ones."""
        return self.top_k + self.shared

    @property
    def limits(self) -> tuple[Level, ...]:
        """The levels that leave anything out."""
        return tuple(level for level in self.levels if level.keep < level.groups)

    @property
    def groups(self) -> int:
        """Groups of the coarsest level, which placement keeps together."""
        return self.levels[0].groups if self.levels else 1

    @property
    def is_dynamic(self) -> bool:
        """Whether a token can have fewer experts than top_k."""
        return self.mass < 1


@dataclass(frozen=True)
class MoeConfig:
    """Experts of a layer, each of `intermediate` elements, and how they are chosen.

    has_bias: whether the checkpoint holds a bias that moves the choice.
    """

    intermediate: int
    has_bias: bool
    routing: Routing

    @property
    def routed(self) -> int:
        """Experts to choose from."""
        return self.routing.experts

    @property
    def shared(self) -> int:
        """Experts that every token takes."""
        return self.routing.shared

    @property
    def top_k(self) -> int:
        """Routed experts of a token, at most."""
        return self.routing.top_k


_DEEPSEEK: Mapping[str, tuple[str, tuple[str, ...], Method]] = {
    "deepseek_v3": ("sigmoid", ("noaux_tc",), Method.GROUP_PAIR),
    "deepseek_v2": ("softmax", ("greedy", "group_limited_greedy"), Method.GREEDY),
}


def parse_deepseek_moe(fields: Fields, architecture: str) -> MoeConfig:
    """Experts of DeepSeek-V2 and V3. Raises ConfigError."""
    scoring, methods, usual = _DEEPSEEK[architecture]
    fields.choice("scoring_func", (scoring,), default=scoring)
    method = Method(fields.choice("topk_method", methods, default=usual.value))
    normalise = fields.boolean("norm_topk_prob", default=False)
    if normalise and architecture == "deepseek_v2":
        raise fields.fail("norm_topk_prob", "false: published DeepSeek-V2 models do not normalise")
    routing = Routing(
        experts=fields.integer("n_routed_experts", most=MOST_EXPERTS),
        shared=fields.integer("n_shared_experts", default=0, least=0, most=MOST_EXPERTS),
        top_k=fields.integer("num_experts_per_tok"),
        softmax=scoring == "softmax",
        normalise=normalise,
        scale=fields.positive("routed_scaling_factor", default=1.0),
    )
    routing = replace(routing, levels=_group_level(fields, method, routing.experts))
    routing = _own_routing(fields, routing)
    _check_top_k(fields, routing)
    return MoeConfig(fields.integer("moe_intermediate_size"), method is Method.GROUP_PAIR, routing)


def parse_qwen_moe(fields: Fields) -> MoeConfig:
    """Experts of Qwen3-MoE. Raises ConfigError."""
    name = "num_experts" if fields.values.get("num_experts") is not None else "num_local_experts"
    routed, top_k = fields.integer(name, most=MOST_EXPERTS), fields.integer("num_experts_per_tok")
    if top_k > routed:
        raise fields.fail("num_experts_per_tok", f"at most {name} ({routed})")
    normalise = fields.boolean("norm_topk_prob", default=False)
    routing = Routing(routed, 0, top_k, softmax=True, normalise=normalise)
    return MoeConfig(fields.integer("moe_intermediate_size"), has_bias=False, routing=routing)


def _group_level(fields: Fields, method: Method, experts: int) -> tuple[Level, ...]:
    """DeepSeek's groups (n_group, topk_group) as a level."""
    groups, keep = fields.integer("n_group", default=1), fields.integer("topk_group", default=1)
    per_group, rest = divmod(experts, groups)
    if rest:
        raise fields.fail("n_group", f"a divisor of n_routed_experts ({experts})")
    if method is Method.GROUP_PAIR and per_group < 2:
        raise fields.fail("n_group", f"at most {experts // 2}: a group scores by its two best experts")
    if keep > groups:
        raise fields.fail("topk_group", f"at most n_group ({groups})")
    if method is Method.GREEDY or groups == 1:
        return ()
    return (Level(groups, keep, 2 if method is Method.GROUP_PAIR else 1),)


def _own_routing(fields: Fields, routing: Routing) -> Routing:
    """The routing with what the field `routing` of this project adds: {"levels": [...], "mass": ...}."""
    given = fields.values.get("routing")
    if given is None:
        return routing
    if not isinstance(given, Mapping):
        raise fields.fail("routing", 'an object, as {"levels": [...], "mass": 0.9}')
    own = Fields(f"{fields.source}: routing", given)
    levels = routing.levels
    if own.values.get("levels") is not None:
        if levels:
            raise own.fail("levels", "left out where n_group is above 1, or n_group must be 1")
        levels = _levels(own, routing.experts)
    mass = own.positive("mass", default=1.0)
    if mass > 1:
        raise own.fail("mass", "a number above 0, at most 1")
    return replace(routing, levels=levels, mass=mass)


def _levels(own: Fields, experts: int) -> tuple[Level, ...]:
    """`levels`, coarse to fine, each checked against the level before."""
    given = own.values["levels"]
    shape = isinstance(given, list) and all(isinstance(item, Mapping) for item in given)
    if not shape or not 1 <= len(given) <= MOST_LEVELS:
        raise own.fail("levels", f"a list of 1 to {MOST_LEVELS} objects with groups, keep and best")
    levels: list[Level] = []
    for index, item in enumerate(given):
        fields = Fields(f"{own.source}.levels[{index}]", item)
        before = levels[-1] if levels else Level(1, 1)
        levels.append(_level(fields, before, experts))
    return tuple(levels)


def _level(fields: Fields, before: Level, experts: int) -> Level:
    """One level; `before` is the next coarser one."""
    groups = fields.integer("groups")
    best = fields.integer("best", default=1, most=MOST_BEST)
    if experts % groups:
        raise fields.fail("groups", f"a divisor of the {experts} routed experts")
    if groups % before.groups or groups == before.groups > 1:
        raise fields.fail(
            "groups", f"a multiple of the {before.groups} groups of the level before, in which it nests"
        )
    if best > experts // groups:
        raise fields.fail("best", f"at most {experts // groups}, the experts of a group")
    reachable = before.keep * (groups // before.groups)
    keep = fields.integer("keep")
    if keep > reachable:
        raise fields.fail("keep", f"at most {reachable}, the groups that the level before leaves")
    return Level(groups, keep, best)


def _check_top_k(fields: Fields, routing: Routing) -> None:
    last = routing.levels[-1] if routing.levels else Level(1, 1)
    most = last.keep * (routing.experts // last.groups)
    if routing.top_k > most:
        raise fields.fail("num_experts_per_tok", f"at most {most}, the experts that can be chosen")
