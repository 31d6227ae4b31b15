"""The run file's pydantic models give names, defaults, limits, and what each setting means.

An attribute's docstring is its description in the JSON schema.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeGuard

from pydantic import Field, field_validator, model_validator

from manylora.config.data_sources import check_source
from manylora.config.kind_settings import KindSettings, check_one_length
from manylora.config.rl import RlSettings
from manylora.config.settings import (
    MOST_STEPS,
    Beta,
    Count,
    Flag,
    MeshText,
    NotNegative,
    OpeningSettings,
    Positive,
    Rank,
    Seconds,
    Settings,
    Steps,
    Text,
    Tokens,
    problem,
)
from manylora.types import ALL_LINEAR, AdamParams, AdapterSpec
from manylora.types.patterns import BadPattern, compiled, shown
from manylora.types.weight_forms import Quantization

Schedule = Literal["constant", "linear", "cosine"]

_NAME = re.compile(r"[A-Za-z0-9._-]+")


def is_template(text: str) -> bool:
    """Return whether this is a chat template itself (otherwise it is the path of one)."""
    return "{{" in text or "{%" in text


def is_name(value: object) -> TypeGuard[str]:
    """Return whether `value` may name an adapter, and so a folder."""
    return (
        isinstance(value, str)
        and _NAME.fullmatch(value) is not None
        and not value.startswith((".", "-"))
        and len(value) <= 100
    )


def _check_regex(pattern: str) -> None:
    try:
        compiled(pattern)
    except BadPattern as error:
        raise problem(
            f"{shown(pattern)} is not a regular expression that can be used: {error}"
        ) from error


class LoraSettings(Settings):
    """Shape of one adapter."""

    rank: Rank = 16
    """Rows of A: how much the adapter can change."""
    alpha: Positive = 32.0
    """The update is scaled by alpha / rank."""
    targets: str | list[str] = ALL_LINEAR
    """"all-linear", a list of leaf names such as [q_proj, v_proj], or a regular expression that
    matches whole module names."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an element of A's input while training."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the factors; gradients, moments and master weights are always fp32."""
    init_from: Annotated[Path | None, Field(strict=False)] = None
    """An adapter folder to start from; relative to the run file's folder."""
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Regular expression → rank, for modules whose name ends in a match."""
    alpha_pattern: dict[str, Positive] = Field(default_factory=dict)
    """Regular expression → alpha, for modules whose name ends in a match."""
    use_rslora: Flag = False
    """Scale by alpha / sqrt(rank) instead."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A starts; B starts at zero, so a new adapter changes nothing."""

    @field_validator("targets", mode="before")
    @classmethod
    def _check_targets(cls, value: object) -> object:
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise problem(
                f"is {value!r}; write all-linear, a list of leaf names such as [q_proj, v_proj], "
                "or a regular expression"
            )
        if isinstance(value, str):
            _check_regex(value)
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _check_patterns(cls, value: dict[str, float]) -> dict[str, float]:
        for pattern in value:
            _check_regex(pattern)
        return value

    @field_validator("init_from", mode="before")
    @classmethod
    def _check_init_from(cls, value: object) -> object:
        return _path(value, "an adapter folder")


class OptimizerSettings(Settings):
    """AdamW and its learning rate over the run."""

    lr: Positive = 2e-4
    """Highest learning rate."""
    schedule: Schedule = "linear"
    """After the warm-up: stay (constant), or fall to 0 at the run's last step (linear, cosine)."""
    warmup_steps: Annotated[int, Field(ge=0, le=MOST_STEPS)] = 0
    """Steps over which the learning rate rises evenly from lr / warmup_steps to lr."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.0
    """Decoupled; weights are multiplied by 1 - lr · weight_decay."""
    clip_norm: NotNegative = 1.0
    """The adapter's gradient is scaled down to this L2 norm; 0 = never."""

    def adam_params(self, lr: float) -> AdamParams:
        """Return one step's parameters at learning rate `lr` (see `manylora.runs.schedule`)."""
        return AdamParams(
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
        )


class SftSettings(KindSettings):
    """Supervised fine-tuning: which data, how often."""

    LENGTHS = ("epochs", "max_steps")
    SOURCES = ("train", "eval")

    train: Text
    """A .jsonl, .csv or .parquet file, the first two also as .gz (relative to the run file's
    folder), or a hub id `org/name`, optionally with `:split`."""
    eval: Text | None = None
    """Held-out data, in the same forms; null = no evaluation."""
    batch_size: Count = 16
    """Examples of one optimizer step."""
    epochs: Count | None = None
    """Passes over the data; 1 when max_steps is not given either."""
    max_steps: Steps | None = None
    """Optimizer steps, in place of epochs."""
    eval_every: Annotated[int, Field(ge=0, le=MOST_STEPS)] = 0
    """Steps between evaluations while it trains; 0 = only before and after."""
    shuffle: Flag = True
    """A new order for each epoch, fixed by the adapter's seed."""
    eos: Text | None = None
    """The token that ends an answer, as text: it is put behind every answer that has no end of its
    own. null = the tokenizer's, or the one that the base's files name."""

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, data: Any) -> Any:
        return check_one_length(data)

    @field_validator("train", "eval")
    @classmethod
    def _check_source(cls, value: str | None) -> str | None:
        return None if value is None else check_source(value)


class CheckpointSettings(Settings):
    """Which training states stay on the disk."""

    keep: Count | None = None
    """So many of the newest; older ones are deleted once a newer one is whole. The last one, and of
    those that were evaluated (`sft.eval_every`) the best one, always stay. null = all."""


class AdapterEntry(Settings):
    """One adapter and how it is trained."""

    name: Text
    """Letters, digits, and . _ - ; unique within the run; also the name of its output folder."""
    lora: LoraSettings = Field(default_factory=LoraSettings)
    """Shape of the adapter."""
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    """AdamW and its learning rate over the run."""
    sft: SftSettings | None = None
    """Supervised fine-tuning: which data, how often. An adapter has either this or `rl`."""
    rl: RlSettings | None = None
    """Reinforcement learning: prompts, rewards, and the objective."""
    save_every: Annotated[int, Field(ge=0, le=MOST_STEPS)] = 100
    """Steps between saved training states; 0 = only at the end."""
    checkpoints: CheckpointSettings | None = None
    """Which training states stay on the disk. null = as the run says."""
    chat_template: Text | None = None
    """A Jinja template in place of the tokenizer's own: itself, or the path of a file with it
    (relative to the run file's folder). null = the run's."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the first factors, of dropout, and of the order of the data."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not is_name(value):
            raise problem(
                f"is {value!r}; use up to 100 letters, digits and . _ - , beginning with neither "
                ". nor -"
            )
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.sft is None) == (self.rl is None):
            if self.sft is None:
                raise problem("is missing; an adapter has either sft or rl", "sft")
            raise problem("sft is given too; keep one of them", "rl")
        return self

    @property
    def kind(self) -> str:
        """The adapter is trained as this key tells: the one whose settings are given."""
        return next(name for name, value in self if isinstance(value, KindSettings))

    @property
    def kind_settings(self) -> KindSettings:
        """These are the settings of its kind."""
        settings: KindSettings = getattr(self, self.kind)
        return settings

    def spec(self) -> AdapterSpec:
        """Return the adapter's settings as the engine takes them."""
        lora = self.lora
        return AdapterSpec(
            rank=lora.rank,
            alpha=lora.alpha,
            targets=lora.targets if isinstance(lora.targets, str) else tuple(lora.targets),
            rank_pattern=dict(lora.rank_pattern),
            alpha_pattern=dict(lora.alpha_pattern),
            use_rslora=lora.use_rslora,
            dropout=lora.dropout,
            dtype=lora.dtype,
            seed=self.seed,
            init=lora.init,
        )


class WandbSettings(Settings):
    """Weights & Biases."""

    project: Text
    """Project that the runs appear in."""
    entity: Text | None = None
    """User or team; null = the account's own."""


class TrackioSettings(Settings):
    """Trackio."""

    project: Text
    """Project that the runs appear in."""


class RunFile(OpeningSettings):
    """A run: one base model and the adapters that are trained on it together."""

    base: Text
    """`seedling` (comes with the package), a hub id, or a folder. A folder that begins with ./ or
    ../ is relative to the run file's folder."""
    out: Annotated[Path, Field(strict=False)]
    """Folder for everything that the run writes; relative to the current directory."""
    token_budget: Tokens = 4096
    """Tokens, of all adapters together, that go through the base at once."""
    adapters: Annotated[list[AdapterEntry], Field(min_length=1)]
    """The adapters, in any number and of any mixture of shapes."""
    chat_template: Text | None = None
    """A Jinja template in place of the tokenizer's own, for all adapters: itself, or the path of a
    file with it (relative to the run file's folder)."""
    activation_checkpointing: Flag = False
    """Compute activations twice to hold fewer of them in memory."""
    checkpoints: CheckpointSettings = Field(default_factory=CheckpointSettings)
    """Which training states stay on the disk, of every adapter that does not say otherwise."""
    dtype: Literal["fp32", "bf16", "auto"] = "auto"
    """Of the base; auto = as its files say."""
    quantization: Quantization | None = None
    """Keep the weights of the base's linear layers in 4 bits (`nf4`) or 8 (`int8`); needs
    bitsandbytes."""
    device: Text = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: Count | None = None
    """CPU threads; null = leave torch's choice."""
    mesh: MeshText = "dp=1,tp=1"
    """Processes that share the work, such as dp=2,tp=2. The tp processes of a group hold
    the base's matrices in parts; tokens are dealt out over dp such groups. With replicas=2 all of
    that is there twice, each with adapters of its own."""
    ray: Text | None = None
    """Address of a Ray cluster whose devices the mesh is to use: `auto` or HOST:PORT. By default
    its processes run on this machine."""
    engine_address: Text | None = None
    """With Ray: this machine's address for processes on others; by default the one on the route
    toward them."""
    step_seconds: Seconds = 600.0
    """On a mesh: a step that takes longer is taken for hung, and its processes are started anew."""
    report: Flag = True
    """Write report.html."""
    tensorboard: Flag = True
    """Write TensorBoard event files."""
    wandb: WandbSettings | None = None
    """Log to Weights & Biases."""
    trackio: TrackioSettings | None = None
    """Log to Trackio."""

    @field_validator("out", mode="before")
    @classmethod
    def _check_out(cls, value: object) -> object:
        return _path(value, "a folder such as runs/first")

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        if re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            return value
        raise problem(f"is {value!r}; write auto, cpu, cuda or cuda:N")

    @model_validator(mode="after")
    def _names_differ(self) -> "RunFile":
        seen: dict[str, str] = {}
        for number, entry in enumerate(self.adapters):
            # Without regard to case, because some file systems have none.
            twin = seen.get(entry.name.lower())
            if twin is not None:
                raise problem(
                    f"{entry.name!r} is taken by an earlier adapter, {twin!r} (upper and lower "
                    "case count as the same); names must differ",
                    *("adapters", number, "name"),
                )
            seen[entry.name.lower()] = entry.name
        return self


def _path(value: object, expected: str) -> object:
    if value is None or isinstance(value, Path) or (isinstance(value, str) and value):
        return value
    raise problem(f"is {value!r}; write {expected}")
