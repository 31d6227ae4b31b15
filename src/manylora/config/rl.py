"""Reinforcement learning in a run file: prompts, rewards, and each term of the objective.

An attribute's docstring is its description in the JSON schema. `docs/rl.md` has the formulas.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from manylora.config.data_sources import check_source
from manylora.config.kind_settings import KindSettings, check_one_length
from manylora.config.settings import (
    MOST_STEPS,
    Count,
    Flag,
    NotNegative,
    Positive,
    Seconds,
    Settings,
    Steps,
    Text,
    problem,
)

Weighting = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none"]
LossKind = Literal["ppo", "cispo", "gspo", "importance_sampling", "dro"]

# Distances of the clipped ratio from 1, where a loss has usual ones.
_CLIPS = {"ppo": (0.2, 0.2), "cispo": (1.0, 3.0)}
_UNCLIPPED = ("importance_sampling", "dro")

# What each published algorithm says of the settings here; docs/rl.md names the papers.
_PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "grpo": {
        "advantage": {"kind": "grpo", "scale": "group"},
        "loss": {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.2, "aggregate": "sequences"},
        "kl": {"coef": 0.04, "where": "loss", "estimator": "k3"},
    },
    "dapo": {
        "advantage": {"kind": "grpo", "scale": "group"},
        "loss": {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.28, "aggregate": "tokens"},
        "dynamic_sampling": {"on": True},
        "overlong": {"penalty": 1.0},
    },
    "dr_grpo": {
        "advantage": {"kind": "dr_grpo", "scale": "none"},
        "loss": {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.2, "aggregate": "constant"},
    },
    "rloo": {
        "advantage": {"kind": "rloo", "scale": "none"},
        "loss": {"kind": "importance_sampling", "aggregate": "constant"},
        "kl": {"coef": 0.05, "where": "reward"},
    },
    "gspo": {
        "advantage": {"kind": "grpo", "scale": "group"},
        "loss": {"kind": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "sequences"},
    },
    "cispo": {
        "advantage": {"kind": "grpo", "scale": "group"},
        "loss": {"kind": "cispo", "clip_low": 1.0, "clip_high": 3.0, "aggregate": "tokens"},
    },
}
Preset = Literal["grpo", "dapo", "dr_grpo", "rloo", "gspo", "cispo"]


class RewardUse(Settings):
    """One reward, and how much it counts."""

    use: Text
    """`module-file.py:symbol` beside the run file, `package.module:symbol`, or a name that is built
    in: exact, regex, contains, length, json_schema, math_verify."""
    weight: float = 1.0
    """The reward is the sum of all parts, each times its weight."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Settings of a reward that is built in; keywords of a function."""


class RlEvalSettings(Settings):
    """Held-out prompts and how they are answered."""

    prompts: Text
    """In the same forms as `rl.prompts`."""
    every: Annotated[int, Field(ge=0, le=MOST_STEPS)] = 0
    """Steps between evaluations while it trains; 0 = only before and after."""
    samples: Count = 1
    """Answers to each prompt."""
    temperature: NotNegative = 0.0
    """0 = greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the smallest set of likeliest tokens whose probability reaches this."""
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Keep the k likeliest tokens; 0 = all."""
    max_tokens: Count | None = None
    """Longest answer; null = as in training."""

    @field_validator("prompts")
    @classmethod
    def _check_source(cls, value: str) -> str:
        return check_source(value)


class RlSamplingSettings(Settings):
    """How answers are drawn in training."""

    max_tokens: Count = 256
    """Longest answer."""
    temperature: Positive = 1.0
    """The policy that is trained is that of this temperature."""
    stop: list[Annotated[int, Field(ge=0, lt=1 << 31)]] | None = None
    """Ids of the tokens that end an answer; null = the base's own, [] = none."""
    stop_strings: list[Text] = Field(default_factory=list)
    """Texts that end an answer once it contains one of them."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_cuts(cls, data: Any) -> Any:
        for name in ("top_p", "top_k"):
            if isinstance(data, dict) and name in data:
                raise problem(
                    "would cut tokens out of the policy that is trained, and its ratios would be "
                    "wrong; it can be given in rl.eval",
                    name,
                )
        return data


class AdvantageSettings(Settings):
    """How much better than its group a sample was."""

    kind: Literal["grpo", "rloo", "dr_grpo"] = "grpo"
    """grpo, dr_grpo: reward minus the group's mean; rloo: minus the mean of the others."""
    scale: Literal["group", "batch", "none"] | None = None
    """Divide by the standard deviation of the group, of the batch, or not. null = group for grpo,
    none for the others."""

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("scale") is not None:
            return data
        return {**data, "scale": "group" if data.get("kind", "grpo") == "grpo" else "none"}


class RlLossSettings(Settings):
    """The objective of a step, and how often it is stepped."""

    kind: LossKind = "ppo"
    """One of the engine's losses."""
    clip_low: NotNegative | None = None
    """The ratio is held above 1 - clip_low. null = 0.2 for ppo, 1 for cispo."""
    clip_high: NotNegative | None = None
    """The ratio is held below 1 + clip_high. null = 0.2 for ppo, 3 for cispo."""
    beta: Positive | None = None
    """Of dro: how strongly it is pulled to the sampler."""
    aggregate: Literal["tokens", "sequences", "constant"] = "tokens"
    """Mean over all tokens of an optimizer step; mean over sequences of their means; or the sum
    divided by sequences and max_tokens."""
    updates: Count = 1
    """Passes over a step's samples."""
    minibatches: Count = 1
    """Optimizer steps of a pass, each on as many groups."""

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("kind", "ppo") not in _CLIPS:
            return data
        usual = dict(zip(("clip_low", "clip_high"), _CLIPS[data.get("kind", "ppo")], strict=True))
        return {**usual, **{name: value for name, value in data.items() if value is not None}}

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        given = [name for name in ("clip_low", "clip_high") if getattr(self, name) is not None]
        if self.kind in _UNCLIPPED and given:
            raise problem(f"does not belong to {self.kind}, which clips nothing", given[0])
        if self.kind == "gspo" and len(given) < 2:
            raise problem(
                "is missing; a sequence's ratio lies much closer to 1 than a token's, and gspo was "
                "published with clip_low 3e-4 and clip_high 4e-4",
                "clip_low" if self.clip_low is None else "clip_high",
            )
        if self.clip_low is not None and self.clip_low > 1:
            raise problem(f"is {self.clip_low:g}; a ratio is never below 0, so ≤ 1", "clip_low")
        if self.kind == "dro" and self.beta is None:
            raise problem("is missing; dro has no usual value, 0.1 is one to begin with", "beta")
        if self.kind != "dro" and self.beta is not None:
            raise problem("belongs to loss dro; leave it out", "beta")
        return self

    @property
    def thresholds(self) -> dict[str, float]:
        """These are the engine's settings of the loss: bounds of the ratio itself."""
        if self.kind == "dro":
            return {"beta": float(self.beta or 0.0)}
        if self.clip_low is None or self.clip_high is None:
            return {}
        return {
            "clip_low_threshold": 1.0 - self.clip_low,
            "clip_high_threshold": 1.0 + self.clip_high,
        }


class KlSettings(Settings):
    """A pull towards a policy that is not trained."""

    coef: NotNegative = 0.0
    """How strong it is; 0 = none, and no pass of the reference."""
    where: Literal["loss", "reward"] = "loss"
    """A term of the loss for each token, or taken off each token's advantage."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of the loss's term (http://joschu.net/blog/kl-approx.html)."""
    reference: Literal["base", "start"] = "base"
    """The base without an adapter, or the adapter as it was at the start."""


class OffPolicySettings(Settings):
    """How old the weights may be that a sample comes from, and what makes up for it."""

    lag: Annotated[int, Field(ge=0, le=64)] | None = None
    """Step s trains on samples of the weights after step s - 1 - lag, so that it samples while it
    trains; the same bits in every run. null = 1, unless max_staleness is given."""
    max_staleness: Annotated[int, Field(ge=0, le=64)] | None = None
    """In place of lag: sample as fast as it goes from the newest weights, and drop what has become
    older than so many steps. Not the same in every run."""
    max_concurrent: Count | None = None
    """With max_staleness: most groups in the making. null = (max_staleness + 1) · groups."""
    interrupt: Flag = False
    """With max_staleness: new weights go on with what older ones have begun."""
    proximal: Literal["recompute", "behavior"] = "recompute"
    """The ratio is taken to the weights at the step's start, or to those that sampled."""
    correct: Weighting = "token_truncate"
    """What is made of w, the ratio of those two."""
    max: Positive = 2.0
    """Largest w."""
    min: Positive | None = None
    """Smallest w of the masks; null = none."""

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("max_staleness") is not None:
            return data
        return data if data.get("lag") is not None else {**data, "lag": 1}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.lag is not None and self.max_staleness is not None:
            raise problem("lag is given too; keep one of them", "max_staleness")
        for name in ("interrupt", "max_concurrent"):
            if self.max_staleness is None and getattr(self, name):
                raise problem("belongs to max_staleness; leave it out", name)
        if self.min is not None and self.min >= self.max:
            raise problem(f"is {self.min:g}; it must be below max, {self.max:g}", "min")
        return self

    @property
    def reproducible(self) -> bool:
        """The same run file gives the same bits."""
        return self.lag is not None


class DynamicSamplingSettings(Settings):
    """Whether groups that teach nothing are replaced."""

    on: Flag = False
    """Ask further prompts until as many groups as `groups` have rewards that differ."""
    most_waves: Count = 4
    """So often at most; then it trains with what it has."""


class OverlongSettings(Settings):
    """What long answers cost (https://arxiv.org/abs/2503.14476, section 3.4)."""

    buffer: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """The penalty rises over this many tokens before max_tokens."""
    penalty: NotNegative = 0.0
    """Taken off the reward of an answer that was cut."""
    mask_truncated: Flag = False
    """Train no answer that was cut; it stays in its group's mean."""


class KeepRollouts(Settings):
    """Which steps' rollouts stay on the disk."""

    every: Count | None = None
    """Of every so many steps."""
    newest: Count | None = None
    """Of the newest so many steps."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.every is None) == (self.newest is None):
            raise problem("give either every or newest, or write all")
        return self


class RlSettings(KindSettings):
    """Reinforcement learning: prompts, rewards, and the objective."""

    LENGTHS = ("epochs", "max_steps")
    SOURCES = ("prompts",)

    preset: Preset | None = None
    """Fill in what a published algorithm says; what is given beside it wins."""
    prompts: Text
    """Rows with `prompt` or `messages`, in the forms of `sft.train`; every other column goes to the
    reward."""
    eval: RlEvalSettings | None = None
    """Held-out prompts; null = no evaluation."""
    reward: list[RewardUse] | None = None
    """A function's name, or a list of {use, weight, args}; see docs/rl.md."""
    rollout: Text | None = None
    """In place of `reward`: `module-file.py:symbol` of an async function that plays one rollout."""
    groups: Count = 8
    """Prompts of one step."""
    group_size: Count = 8
    """Samples of each prompt."""
    epochs: Count | None = None
    """Passes over the prompts; 1 when max_steps is not given either."""
    max_steps: Steps | None = None
    """Steps, in place of epochs."""
    sampling: RlSamplingSettings = Field(default_factory=RlSamplingSettings)
    """How answers are drawn in training."""
    advantage: AdvantageSettings = Field(default_factory=AdvantageSettings)
    """How much better than its group a sample was."""
    loss: RlLossSettings = Field(default_factory=RlLossSettings)
    """The objective of a step, and how often it is stepped."""
    kl: KlSettings = Field(default_factory=KlSettings)
    """A pull towards a policy that is not trained."""
    off_policy: OffPolicySettings = Field(default_factory=OffPolicySettings)
    """How old the weights may be that a sample comes from, and what makes up for it."""
    dynamic_sampling: DynamicSamplingSettings = Field(default_factory=DynamicSamplingSettings)
    """Whether groups that teach nothing are replaced."""
    overlong: OverlongSettings = Field(default_factory=OverlongSettings)
    """What long answers cost."""
    timeout_seconds: Seconds = 600.0
    """Of one rollout, reward included."""
    keep_rollouts: Literal["all"] | KeepRollouts = "all"
    """Which steps' rollouts stay on the disk."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("environment") is not None:
            raise problem(
                "is not supported yet; write a hook that plays one rollout, and name it with "
                "rl.rollout",
                "environment",
            )
        return check_one_length(_with_preset(data))

    @field_validator("prompts")
    @classmethod
    def _check_source(cls, value: str) -> str:
        return check_source(value)

    @field_validator("reward", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        listed = value if isinstance(value, list) else [value]
        if value is None or not listed:
            return value
        return [{"use": one} if isinstance(one, str) else one for one in listed]

    @field_validator("group_size")
    @classmethod
    def _compares(cls, value: int) -> int:
        if value < 2:
            raise problem(f"is {value}; a sample is compared with others of its group, so ≥ 2")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.reward is None) == (self.rollout is None):
            given = "both are given" if self.reward else "neither is given"
            raise problem(f"{given}; a run has either a reward or a rollout", "reward")
        if self.reward is not None and not self.reward:
            raise problem("is empty; name at least one reward", "reward")
        if self.loss.kind == "dro" and self.kl.coef > 0 and self.kl.where == "loss":
            raise problem(
                "is loss, where dro has a pull of its own (beta); write where: reward, or train "
                "with another loss",
                "kl",
                "where",
            )
        if self.groups % self.loss.minibatches:
            raise problem(
                f"is {self.loss.minibatches}; it must divide groups, {self.groups}",
                "loss",
                "minibatches",
            )
        return self

    def sources(self) -> dict[str, str]:
        """Return the data that are named, by the setting that names them."""
        own = super().sources()
        return own if self.eval is None else {**own, "eval.prompts": self.eval.prompts}

    def with_sources(self, change: Callable[[str], str]) -> Self:
        """Return these settings with every data source changed."""
        changed = super().with_sources(change)
        if self.eval is None:
            return changed
        held_out = self.eval.model_copy(update={"prompts": change(self.eval.prompts)})
        return changed.model_copy(update={"eval": held_out})

    def code(self) -> tuple[str, ...]:
        """Return the names of rewards, those that are built in too, or of the rollout."""
        if self.rollout is not None:
            return (self.rollout,)
        return tuple(one.use for one in self.reward or ())

    def with_code(self, change: Callable[[str], str]) -> Self:
        """Return these settings with every name of code changed."""
        update: dict[str, Any] = {}
        if self.rollout is not None:
            update["rollout"] = change(self.rollout)
        if self.reward is not None:
            update["reward"] = [
                one.model_copy(update={"use": change(one.use)}) for one in self.reward
            ]
        return self.model_copy(update=update)


def _with_preset(data: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a preset says and the run file does not."""
    preset = _PRESETS.get(data.get("preset") or "")
    if preset is None:
        return data
    filled = dict(data)
    for section, settings in preset.items():
        given = filled.get(section)
        if given is None or isinstance(given, dict):
            filled[section] = {**_apart(section, settings, given or {}), **(given or {})}
    if data["preset"] == "dapo":
        sampling, overlong = data.get("sampling") or {}, data.get("overlong") or {}
        longest = sampling.get("max_tokens", 256) if isinstance(sampling, dict) else 256
        # As in the paper: the last fifth of the longest answer.
        if isinstance(longest, int) and isinstance(overlong, dict):
            filled["overlong"] = {"buffer": longest // 5, **filled["overlong"]}
    return filled


def _apart(section: str, settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what belongs to another kind than the one that is given beside the preset."""
    if given.get("kind", settings.get("kind")) == settings.get("kind"):
        return dict(settings)
    return {"aggregate": settings["aggregate"]} if section == "loss" else {}
