"""These settings say what an adapter is, and how its optimizer steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from manylora.types.errors import ConfigError

DType = Literal["fp32", "bf16", "fp16"]
Init = Literal["kaiming", "gaussian"]

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """An `AdapterSpec` is one LoRA adapter's settings: ΔW = scale · B·A, scale = alpha / rank.

    Attributes:
        rank: number of rows of A; any value ≥ 1.
        alpha: numerator of the scale.
        targets: `"all-linear"` (every linear layer but the output head), a tuple of leaf names
            such as `("q_proj", "v_proj")`, or a regular expression that must match a whole
            module name. `lm_head` may be named.
        rank_pattern: regular expression → rank, for modules whose name ends in a match.
        alpha_pattern: regular expression → alpha, for modules whose name ends in a match.
        use_rslora: scale = alpha / sqrt(rank) (https://arxiv.org/abs/2312.03732).
        dropout: probability of dropping an element of the input of A, in [0, 1).
        dtype: dtype of the factors; gradients, moments and master weights are always fp32.
        seed: seed of the initial factors and of dropout.
        init: `kaiming` (A uniform as PEFT's default) or `gaussian` (A normal with standard
            deviation 1/rank); B is zero in both, so a new adapter changes nothing.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    dropout: float = 0.0
    dtype: DType = "fp32"
    seed: int = 0
    init: Init = "kaiming"

    def __post_init__(self) -> None:
        ranks = {
            "rank": self.rank,
            **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()},
        }
        for name, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"{name} is {rank!r}; it must be a whole number ≥ 1")
        alphas = {
            "alpha": self.alpha,
            **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()},
        }
        for name, alpha in alphas.items():
            if not math.isfinite(alpha) or alpha <= 0:
                raise ConfigError(f"{name} is {alpha!r}; it must be a finite number > 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout is {self.dropout!r}; it must lie in [0, 1)")
        if self.dtype not in ("fp32", "bf16", "fp16"):
            raise ConfigError(f"dtype is {self.dtype!r}; choose fp32, bf16 or fp16")
        if self.init not in ("kaiming", "gaussian"):
            raise ConfigError(f"init is {self.init!r}; choose kaiming or gaussian")
        if not self.targets:
            raise ConfigError('targets is empty; name leaf modules, a regex, or "all-linear"')

    def scale(self, rank: int, alpha: float) -> float:
        """Return the factor on B·A for a module of this rank and alpha."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamParams:
    """`AdamParams` are the hyper-parameters of one AdamW step, by torch.optim.AdamW's rule.

    Attributes:
        lr: learning rate of this step.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: number added outside the square root.
        weight_decay: decoupled decay; weights are multiplied by 1 - lr·weight_decay.
        clip_norm: L2 norm to which the adapter's gradient is scaled down; 0 = never.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"{name} is {value!r}; it must be a finite number ≥ 0")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must lie in [0, 1)")
