"""Expert and routing settings of config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from moe_worker.config.fields import Fields

# A hundred times the most of any published model: no loop over experts runs for minutes.
MOST_EXPERTS = 1 << 16


class Scoring(Enum):
    """The function from the router's logits to scores."""

    SIGMOID = "sigmoid"
    SOFTMAX = "softmax"


class Method(Enum):
    """How experts are selected by their scores."""

    GREEDY = "greedy"  # the best of all
    GROUP_BEST = "group_limited_greedy"  # the best of the groups whose best expert is best (arXiv:2405.04434)
    GROUP_PAIR = "noaux_tc"  # as above, by a group's two best, with a bias (arXiv:2412.19437)


@dataclass(frozen=True)
class Routing:
    """How a token's experts are chosen: what every backend's router is told, and all that it needs.

    top_k of `experts` are chosen. Behind them stand the `shared` ones (experts, experts + 1, ...), which
    every token takes with weight 1. kept_groups of `groups` take part, each scored by the sum of its
    `group_best` (1 or 2) best experts. Scores are the softmax or the sigmoid of the router's logits.
    normalise: whether the chosen scores are divided by their sum; `scale` multiplies them afterwards.
    """

    experts: int
    shared: int
    top_k: int
    groups: int = 1
    kept_groups: int = 1
    group_best: int = 1
    softmax: bool = False
    normalise: bool = False
    scale: float = 1.0

    @property
    def per_token(self) -> int:
        """Ids of a token, K: the chosen experts and the shared ones."""
        return self.top_k + self.shared


@dataclass(frozen=True)
class MoeConfig:
    """Experts of a layer, each of `intermediate` elements, and the choice of `top_k` among `routed`.

    normalise: whether the chosen scores are divided by their sum; `scale` multiplies them afterwards.
    """

    routed: int
    shared: int
    intermediate: int
    top_k: int
    scoring: Scoring
    method: Method
    groups: int
    kept_groups: int
    normalise: bool
    scale: float

    @property
    def has_bias(self) -> bool:
        """Whether the checkpoint holds a bias that moves the choice."""
        return self.method is Method.GROUP_PAIR

    @property
    def routing(self) -> Routing:
        """The choice as backends are told it."""
        grouped = self.method is not Method.GREEDY
        return Routing(
            experts=self.routed,
            shared=self.shared,
            top_k=self.top_k,
            groups=self.groups if grouped else 1,
            kept_groups=self.kept_groups if grouped else 1,
            group_best=2 if self.method is Method.GROUP_PAIR else 1,
            softmax=self.scoring is Scoring.SOFTMAX,
            normalise=self.normalise,
            scale=self.scale,
        )


_DEEPSEEK: Mapping[str, tuple[Scoring, tuple[str, ...], Method]] = {
    "deepseek_v3": (Scoring.SIGMOID, ("noaux_tc",), Method.GROUP_PAIR),
    "deepseek_v2": (Scoring.SOFTMAX, ("greedy", "group_limited_greedy"), Method.GREEDY),
}


def parse_deepseek_moe(fields: Fields, architecture: str) -> MoeConfig:
    """Experts of DeepSeek-V2 and V3. Raises ConfigError."""
    scoring, methods, method = _DEEPSEEK[architecture]
    fields.choice("scoring_func", (scoring.value,), default=scoring.value)
    chosen = Method(fields.choice("topk_method", methods, default=method.value))
    normalise = fields.boolean("norm_topk_prob", default=False)
    if normalise and architecture == "deepseek_v2":
        raise fields.fail("norm_topk_prob", "false: published DeepSeek-V2 models do not normalise")
    config = MoeConfig(
        routed=fields.integer("n_routed_experts", most=MOST_EXPERTS),
        shared=fields.integer("n_shared_experts", default=0, least=0, most=MOST_EXPERTS),
        intermediate=fields.integer("moe_intermediate_size"),
        top_k=fields.integer("num_experts_per_tok"),
        scoring=scoring,
        method=chosen,
        groups=fields.integer("n_group", default=1),
        kept_groups=fields.integer("topk_group", default=1),
        normalise=normalise,
        scale=fields.positive("routed_scaling_factor", default=1.0),
    )
    _check_groups(fields, config)
    return config


def parse_qwen_moe(fields: Fields) -> MoeConfig:
    """Experts of Qwen3-MoE. Raises ConfigError."""
    name = "num_experts" if fields.values.get("num_experts") is not None else "num_local_experts"
    routed, top_k = fields.integer(name, most=MOST_EXPERTS), fields.integer("num_experts_per_tok")
    if top_k > routed:
        raise fields.fail("num_experts_per_tok", f"at most {name} ({routed})")
    return MoeConfig(
        routed=routed,
        shared=0,
        intermediate=fields.integer("moe_intermediate_size"),
        top_k=top_k,
        scoring=Scoring.SOFTMAX,
        method=Method.GREEDY,
        groups=1,
        kept_groups=1,
        normalise=fields.boolean("norm_topk_prob", default=False),
        scale=1.0,
    )


def _check_groups(fields: Fields, config: MoeConfig) -> None:
    per_group, rest = divmod(config.routed, config.groups)
    if rest:
        raise fields.fail("n_group", f"a divisor of n_routed_experts ({config.routed})")
    if config.method is Method.GROUP_PAIR and per_group < 2:
        raise fields.fail("n_group", f"at most {config.routed // 2}: a group scores by its two best experts")
    if config.kept_groups > config.groups:
        raise fields.fail("topk_group", f"at most n_group ({config.groups})")
    most = config.routed if config.method is Method.GREEDY else config.kept_groups * per_group
    if config.top_k > most:
        raise fields.fail("num_experts_per_tok", f"at most {most}, the experts that can be chosen")
