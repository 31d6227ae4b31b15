"""Makes trl_losses.json: what TRL's formulas give for a few stored arrays.

    python tests/unit/runs/rl/make_trl_losses.py

TRL is not installed beside this project. Each formula is written here anew, with where it stands
in TRL 1.10.0.dev0, commit f2cd57710ae345ea6428ae95363267fcf38a3dc8: trl/trainer/grpo_trainer.py (G)
and trl/trainer/rloo_trainer.py (R).

B samples in groups of equal size, T tokens of the longest.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GROUP_SIZE, LENGTHS, LONGEST = 3, [4, 2, 5, 1, 3, 3], 6
LOW, HIGH, BETA, MOST = 0.1, 0.15, 0.05, 1.2
FILE = Path(__file__).with_name("trl_losses.json")


def arrays() -> dict[str, Tensor]:
    """Log-probabilities [B, T] of the four policies, the mask, and rewards [B]."""
    generator = torch.Generator().manual_seed(4)
    shape = len(LENGTHS), max(LENGTHS)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    p = -1.5 + 0.5 * drawn[0]
    mask = (torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]).double()
    return {
        "p": p * mask,
        "l": (p + 0.15 * drawn[1]) * mask,
        "q": (p + 0.2 * drawn[2]) * mask,
        "ref": (p + 0.3 * drawn[3]) * mask,
        "mask": mask,
        "rewards": torch.tensor([1.0, 0.0, 0.25, -0.5, 0.75, 0.75], dtype=torch.float64),
    }


def advantages(kind: str, scale: str, rewards: Tensor) -> Tensor:
    """G 2684–2707: less the group's mean, by the deviation + 1e-4; R 1550–1552: less the mean of
    the others. Deviations are of n - 1 (trl/trainer/utils.py 857–880)."""
    grouped = rewards.view(-1, GROUP_SIZE)
    if kind == "rloo":
        others = (grouped.sum(1, keepdim=True) - grouped) / (GROUP_SIZE - 1)
        return (grouped - others).flatten()
    centred = (grouped - grouped.mean(1, keepdim=True)).flatten()
    if scale == "group":
        return centred / (grouped.std(1).repeat_interleave(GROUP_SIZE) + 1e-4)
    return centred / (rewards.std() + 1e-4) if scale == "batch" else centred


def correction(mode: str, a: dict[str, Tensor]) -> Tensor:
    """G 2582–2601: exp(p - q) of a token or summed over a sample, held below a bound."""
    distance = (a["p"] - a["q"]) * a["mask"]
    if mode == "none":
        return torch.ones_like(distance)
    if mode == "sequence_truncate":
        distance = distance.sum(1, keepdim=True).expand_as(distance)
    return distance.exp().clamp(max=MOST)


def loss(case: dict[str, Any], a: dict[str, Tensor]) -> float:
    """G 3054–3145, with `use_bias_correction_kl` off."""
    mask, l = a["mask"], a["l"]  # noqa: E741
    advantage = advantages(case["advantage"], case["scale"], a["rewards"])[:, None]
    log_ratio = l - a["p"]
    if case["loss"] == "gspo":  # G 3058: importance_sampling_level="sequence"
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1))[:, None].expand_as(l)
    ratio = log_ratio.exp()
    if case["loss"] == "cispo":  # G 3081–3082; the bound is of the ratio itself
        each = -ratio.clamp(max=1 + HIGH) * advantage * l
    else:  # G 3084–3091
        each = -torch.min(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage)
    each = each * correction(case["correct"], a)  # G 3118
    if case["beta"]:  # G 3071–3073, 3121
        distance = a["ref"] - l
        each = each + case["beta"] * (distance.exp() - distance - 1)
    if case["aggregate"] == "sequences":  # G 3125, loss_type="grpo"
        return float(((each * mask).sum(1) / mask.sum(1)).mean())
    if case["aggregate"] == "tokens":  # G 3140–3141, loss_type="dapo"
        return float((each * mask).sum() / mask.sum())
    return float((each * mask).sum() / (len(mask) * LONGEST))  # G 3135, loss_type="dr_grpo"


def cases() -> list[dict[str, Any]]:
    """Options that both have."""
    return [
        {
            "loss": kind,
            "advantage": advantage,
            "scale": scale,
            "aggregate": aggregate,
            "correct": correct,
            "beta": beta,
        }
        for kind in ("ppo", "cispo", "gspo")
        for advantage, scale in (
            ("grpo", "group"),
            ("grpo", "batch"),
            ("grpo", "none"),
            ("rloo", "none"),
        )
        for aggregate in ("tokens", "sequences", "constant")
        for correct in ("none", "token_truncate", "sequence_truncate")
        for beta in (0.0, BETA)
    ]


def main() -> None:
    """Write the file anew."""
    given = arrays()
    found = [{**case, "value": loss(case, given)} for case in cases()]
    settings = {
        "group_size": GROUP_SIZE,
        "max_tokens": LONGEST,
        "low": LOW,
        "high": HIGH,
        "max": MOST,
    }
    stored = {name: array.tolist() for name, array in given.items()}
    lines = ",\n    ".join(json.dumps(one) for one in found)
    kept = ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in (settings | stored).items())
    FILE.write_text(f'{{\n  {kept},\n  "cases": [\n    {lines}\n  ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
