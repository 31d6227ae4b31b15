"""Published recipes of tinker-cookbook, unmodified, from start to end.

Each one is started as `python -m` with options of its own command line; the server's address and a
key in the environment are all that sets them on this server. Four run with every `make test`; all
of them run with `make cookbook`.
"""

from dataclasses import dataclass

import pytest

from tests.cookbook.fixtures import ANSWERER, PROMPT_DATA, RUBRIC_DATA
from tests.cookbook.recipes import BASE, CHAT, FRESH, Workplace, finished, rises
from tests.wire.server import BASE_ALIAS, CHAT_ALIAS

# With the usual renderer `seedling` adds up well and has nothing to learn. This one puts an empty
# thought before the answer, which `seedling` has never seen: three answers in four do not end.
ARITHMETIC = (
    CHAT,
    FRESH,
    "renderer_name=qwen3_disable_thinking",
    "env=arithmetic",
    "group_size=8",
    "groups_per_batch=8",
    "lora_rank=8",
    "learning_rate=1.5e-3",
    "max_tokens=5",
    "eval_every=0",
)


# --- with every `make test` ---------------------------------------------------------------------


def test_sl_loop_learns_and_goes_on_after_a_kill(workplace: Workplace):
    options = (
        BASE,
        "batch_size=16",
        "learning_rate=2e-3",
        "lora_rank=8",
        "max_length=256",
        "save_every=4",
    )
    name = "sl_loop"
    workplace.run_and_kill(
        name,
        name,
        *options,
        when=lambda log: len(log.metrics()) >= 6 and len(log.checkpoints()) > 0,
    )
    before = {row["step"]: row["train_mean_nll"] for row in workplace.log(name).metrics()}
    log = workplace.run(name, name, *options, "max_steps=12")
    rows = log.metrics()
    after = {row["step"]: row["train_mean_nll"] for row in rows[len(before) :]}
    assert min(after) == 4
    assert max(after) == 11
    twice = before.keys() & after.keys()
    assert twice
    for step in twice:  # weights, moments and data are those of the run that was killed
        assert after[step] == before[step], step
    losses = [*(before[step] for step in range(4)), *(after[step] for step in range(4, 12))]
    assert rises(losses) < -0.5
    finished(log)


def test_math_rl_learns(workplace: Workplace):
    log = workplace.run(
        "math_rl.train",
        "math_rl",
        *ARITHMETIC,
        "loss_fn=importance_sampling",
        "max_steps=10",
    )
    assert len(log.series("env/all/reward/total")) == 10
    assert rises(log.series("env/all/reward/total")) > 0.03
    assert rises(log.series("env/all/format")) > 0.3
    # What sampling said of its tokens is what training says of them.
    assert max(map(abs, log.series("optim/kl_sample_train_v1"))) < 1e-4
    finished(log)


def test_rl_loop(workplace: Workplace):
    log = workplace.run(
        "rl_loop",
        "rl_loop",
        BASE,
        "batch_size=4",
        "group_size=4",
        "lora_rank=8",
        "max_tokens=12",
        "loss_fn=importance_sampling",
        "max_steps=3",
    )
    assert len(log.series("reward/total")) == 3
    finished(log)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_sdft(workplace: Workplace, reverse: bool):
    log = workplace.run(
        "sdft.train",
        f"sdft-{reverse}",
        CHAT,
        FRESH,
        "dataset=toolalpaca",
        f"reverse={reverse}",
        "groups_per_batch=4",
        "lora_rank=8",
        "learning_rate=1e-3",
        "max_tokens=12",
        "max_context_length=512",
        "eval_every=0",
        "max_steps=3",
    )
    assert len(log.series("sdft/mean_teacher_entropy")) == 3
    if reverse:
        assert min(log.series("sdft/reverse_kl_mean")) >= 0
    finished(log)


# --- with `make cookbook` -----------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A run that is only asked to end well, and to have measured something."""

    module: str
    options: tuple[str, ...]
    metric: str
    steps: int
    seconds: float = 180.0


RL = (FRESH, "lora_rank=8", "learning_rate=1e-3", "max_steps=3")
NO_ROBOTS = "tinker_cookbook.recipes.chat_sl.chat_datasets:NoRobotsBuilder"
GSM8K = "tinker_cookbook.recipes.math_rl.math_env:Gsm8kDatasetBuilder"

RECIPES = {
    "sl_basic": Recipe(
        "sl_basic",
        (
            BASE,
            "lora_rank=8",
            "eval_every=2",
            "max_steps=6",
            f"dataset_builder={NO_ROBOTS}",
            f"dataset_builder.common_config.model_name_for_tokenizer={BASE_ALIAS}",
            "dataset_builder.common_config.renderer_name=role_colon",
            "dataset_builder.common_config.max_length=256",
            "dataset_builder.common_config.batch_size=16",
        ),
        "test/nll",
        steps=3,
    ),
    "sl_basic as it is": Recipe("sl_basic", (BASE, "max_steps=2"), "train_mean_nll", steps=2),
    "chat_sl": Recipe(
        "chat_sl.train",
        (
            CHAT,
            FRESH,
            "lora_rank=8",
            "batch_size=16",
            "max_length=256",
            "max_steps=6",
            "eval_every=3",
            "save_every=3",
            "rolling_save_every=1",
        ),
        "train_mean_nll",
        steps=6,
    ),
    "prompt_distillation": Recipe(
        "prompt_distillation.train",
        (
            CHAT,
            FRESH,
            f"file_path={PROMPT_DATA}",
            "lora_rank=8",
            "batch_size=16",
            "max_length=256",
            "num_epochs=2",
        ),
        "train_mean_nll",
        steps=8,
    ),
    "rl_basic": Recipe(
        "rl_basic",
        (
            BASE,
            "lora_rank=8",
            "max_tokens=12",
            "max_steps=2",
            f"dataset_builder={GSM8K}",
            "dataset_builder.batch_size=4",
            "dataset_builder.group_size=4",
            f"dataset_builder.model_name_for_tokenizer={BASE_ALIAS}",
            "dataset_builder.renderer_name=role_colon",
        ),
        "env/all/reward/total",
        steps=2,
    ),
    "math_rl ppo": Recipe(
        "math_rl.train",
        (
            *ARITHMETIC,
            "loss_fn=ppo",
            "num_substeps=2",
            "compute_post_kl=True",
            "max_steps=3",
        ),
        "kl_pre_post_v1",
        steps=3,
    ),
    "math_rl asynchronous": Recipe(
        "math_rl.train",
        (*ARITHMETIC, "loss_fn=ppo", "max_steps_off_policy=2", "max_steps=4"),
        "env/all/reward/total",
        steps=4,
    ),
    "math_rl gsm8k": Recipe(
        "math_rl.train",
        (
            BASE,
            *RL,
            "env=gsm8k",
            "group_size=4",
            "groups_per_batch=4",
            "max_tokens=12",
            "eval_every=2",
            "save_every=2",
            "loss_fn=cispo",
        ),
        "env/all/reward/total",
        steps=3,
    ),
    "guess_number": Recipe(
        "multiplayer_rl.guess_number.train",
        (
            CHAT,
            FRESH,
            "renderer_name=qwen3_instruct",
            "group_size=4",
            "batch_size=1",
            "learning_rate=1e-3",
            "max_tokens=8",
            "eval_every=0",
            "max_steps=2",
        ),
        "env/all/reward/total",
        steps=2,
    ),
    "on_policy_distillation": Recipe(
        "distillation.on_policy_distillation",
        (
            BASE,
            *RL,
            f"teacher_model={CHAT_ALIAS}",
            "dataset=deepmath",
            "group_size=2",
            "groups_per_batch=4",
            "max_tokens=12",
            "eval_every=0",
        ),
        "teacher_kl",
        steps=3,
    ),
    "on_policy_multi_teacher": Recipe(
        "distillation.on_policy_multi_teacher",
        (
            BASE,
            *RL,
            f"deepmath_teacher_model={CHAT_ALIAS}",
            f"tulu3_teacher_model={BASE_ALIAS}",
            "deepmath_groups_per_batch=2",
            "tulu3_groups_per_batch=2",
            "group_size=2",
            "max_tokens=12",
            "eval_every=0",
        ),
        "teacher_kl",
        steps=3,
    ),
    "off_policy_reasoning": Recipe(
        "distillation.off_policy_reasoning",
        (
            BASE,
            FRESH,
            "renderer_name=role_colon",
            "lora_rank=8",
            "batch_size=8",
            "max_length=256",
            "buffer_size=32",
            "max_prompts=64",
            "eval_every=0",
            "max_steps=4",
        ),
        "train_mean_nll",
        steps=4,
    ),
    "rl_numerics_check": Recipe(
        "rl_numerics_check.train",
        (
            CHAT,
            FRESH,
            "lora_rank=8",
            "learning_rate=1e-3",
            "max_steps=2",
            "renderer_name=qwen3_instruct",
            "group_size=2",
            "groups_per_batch=2",
            "max_tokens=16",
            "max_trajectory_tokens=1000",
            "task.num_pages_min=1",
            "task.num_pages_max=2",
            "task.page_chars=200",
            "task.words=after,until",
        ),
        "env/all/reward/total",
        steps=2,
    ),
    "rubric": Recipe(
        "rubric.train",
        (
            CHAT,
            FRESH,
            "renderer_name=qwen3_disable_thinking",
            f"grader_llm_name={CHAT_ALIAS}",
            "grader_renderer_name=qwen3_instruct",
            f"train_jsonl_path={RUBRIC_DATA}",
            f"test_jsonl_path={RUBRIC_DATA}",
            "train_group_size=2",
            "groups_per_batch=1",
            "lora_rank=8",
            "learning_rate=1e-3",
            "max_tokens=6",
            "eval_every=0",
            "loss_fn=ppo",  # the recipe's own, stable_reinforce, is one that the server refuses
            "max_steps=2",
        ),
        "env/all/rubric_score",
        steps=2,
    ),
    "twenty_questions": Recipe(
        "multiplayer_rl.twenty_questions.train",
        (
            f"model_name={ANSWERER}",
            FRESH,
            "group_size=2",
            "batch_size=1",
            "learning_rate=1e-3",
            "max_tokens=4",
            "eval_every=0",
            "max_steps=1",
        ),
        "env/all/turns_per_episode",
        steps=1,
    ),
    "preference shorter": Recipe(
        "preference.shorter.train",
        (
            CHAT,
            FRESH,
            "renderer_name=qwen3_instruct",
            "batch_size=2",
            "group_size=4",
            "learning_rate=1e-3",
            "max_tokens=12",
            "eval_every=0",
            "max_steps=2",
        ),
        "env/all/reward/total",
        steps=2,
    ),
}


@pytest.mark.cookbook
@pytest.mark.parametrize("name", RECIPES)
def test_recipe(workplace: Workplace, name: str):
    recipe = RECIPES[name]
    log = workplace.run(
        recipe.module, name.replace(" ", "-"), *recipe.options, seconds=recipe.seconds
    )
    assert len(log.series(recipe.metric)) == recipe.steps
    finished(log)
