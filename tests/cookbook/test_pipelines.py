"""Published recipes of preferences, and those that are several trainings or none.

Like those of `test_recipes.py` they are unmodified. All of them run with `make cookbook`.
"""

import json
import math

import pytest
import tinker
from tinker_cookbook import renderers
from tinker_cookbook.recipes.decisions import Decision, DecisionRenderer
from tinker_cookbook.recipes.decisions.demo import TEAMS
from tinker_cookbook.recipes.decisions.train import decision_choice_datums
from tinker_cookbook.tokenizer_utils import get_tokenizer

from tests.cookbook.fixtures import CONTINUAL_DATA
from tests.cookbook.recipes import BASE, CHAT, FRESH, Log, Workplace, finished, rises
from tests.wire.server import BASE_ALIAS, CHAT_ALIAS, DEVELOPER

pytestmark = pytest.mark.cookbook


def test_rlhf(workplace: Workplace):
    workplace.run_bare(
        "preference.rlhf.rlhf_pipeline",
        "rlhf",
        f"base_model={BASE_ALIAS}",
        "short_name=seedling",
        "lora_rank=8",
        "max_length=128",
        "batch_size=8",
        "sft_learning_rate=1e-3",
        "rm_learning_rate=2e-3",
        "rl_learning_rate=1e-3",
        "rl_max_tokens=10",
        "rl_group_size=2",
        "save_every=0",
        "eval_every=0",
        "max_steps=4",
    )
    policy, judge, final = (workplace.stage("rlhf-seedling", name) for name in ("sft", "rm", "rl"))
    assert rises(judge.series("train_mean_nll")) < -3
    for log in (policy, judge, final):
        finished(log)


def test_preference_dpo(workplace: Workplace):
    log = workplace.run(
        "preference.dpo.train",
        "dpo",
        BASE,
        FRESH,
        "batch_size=16",
        "learning_rate=1e-3",
        "max_length=128",
        "max_steps=4",
        seconds=300,
    )
    losses = log.series("dpo_loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the reference is where it starts
    assert losses[-1] < losses[0]
    assert log.series("margin")[-1] > 0
    assert len(log.series("test/nll")) == 2
    finished(log)


def test_continual_learning_goes_on_from_what_the_first_task_left(workplace: Workplace):
    workplace.run_bare(
        "sdft.run_continual_learning",
        "continual",
        CHAT,
        f"data_dir={CONTINUAL_DATA}",
        f"log_root={workplace.logs / 'continual'}",
        "lora_rank=8",
        "batch_size=8",
        "max_tokens=256",
        "learning_rates=1e-3",
        "methods=sft,sdft_topk",
    )
    first, second, *distilled = (
        Log(workplace.logs / "continual" / f"{stage}_lr1e-03", workplace.folder / "continual.out")
        for stage in ("stage1_sft", "stage2_sft", "stage1_sdft_topk", "stage2_sdft_topk")
    )
    config = json.loads((second.folder / "config.json").read_text())
    assert config["load_checkpoint_path"] == first.checkpoints()[-1]["state_path"]
    assert rises(first.series("train_mean_nll")) < -0.05
    for log in distilled:
        assert len(log.series("sdft/mean_teacher_entropy")) == 4
    for log in (first, second, *distilled):
        finished(log)


def test_sweep_finds_the_better_rate(workplace: Workplace):
    folder = workplace.logs / "sweep"
    workplace.run_bare(
        "chat_sl.sweep",
        "sweep",
        "recipe=sft",
        f"base.{BASE}",
        "base.batch_size=16",
        "base.max_length=256",
        "base.eval_every=0",
        "base.save_every=0",
        "training_budget_examples=64",
        "learning_rates=[1e-6, 1e-3]",
        "lora_ranks=[4]",
        f"sweep_dir={folder}",
    )
    best = json.loads((folder / "recommendations.json").read_text())["recommendations"]
    assert best["rank_4"]["learning_rate"] == 1e-3


def test_decisions_demo_with_trained_weights(workplace: Workplace):
    """Trained with the recipe's own helper to send every question about money to billing."""
    asked = "Where is my invoice?"

    def decide(*options: str) -> dict[str, float]:
        printed = workplace.run_bare(
            "decisions.demo", "decisions", CHAT, *options, typed=f"{asked}\n\n"
        )
        answer = json.loads(printed[printed.rindex("{") : printed.rindex("}") + 1])
        assert [*answer] == [name for name, _ in TEAMS]
        assert math.isclose(sum(answer.values()), 1, abs_tol=1e-3)
        return answer

    before = decide()
    after = decide(f"model_path={_train_decision(workplace, asked, 'billing')}")
    assert before["billing"] < 0.5
    assert after["billing"] > 0.9


def _train_decision(workplace: Workplace, question: str, team: str) -> str:
    """The path of weights that answer so."""
    tokenizer = get_tokenizer(str(workplace.folder / CHAT_ALIAS))
    renderer = DecisionRenderer(renderers.get_renderer("qwen3_instruct", tokenizer))
    text = (
        f"A user asked the following question about Tinker:\n\n{question}\n\n"
        "Which team should answer it?"
    )
    data = decision_choice_datums(renderer, [(Decision(text, TEAMS), team)])
    service = tinker.ServiceClient(base_url=workplace.server.url, api_key=DEVELOPER)
    client = service.create_lora_training_client(base_model=CHAT_ALIAS, rank=8).result()
    for _ in range(8):
        client.forward_backward(data, "cross_entropy")
        client.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
    return client.save_weights_for_sampler("decisions").result().path
