"""A few groups are sampled and scored with the present policy; nothing is trained and kept."""

import asyncio
from asyncio import wrap_future
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from manylora.config import AdapterEntry, RlSettings
from manylora.runs.course import Progress
from manylora.runs.rl.collecting import FEWEST_SAMPLES
from manylora.runs.rl.objective import Objective
from manylora.runs.rl.rl_data import prepare_rl
from manylora.runs.rl.rollout import SampleGroup
from manylora.runs.rl.versions import Versions
from manylora.runs.run_folder import AdapterPaths


def sample_groups(
    entry: AdapterEntry,
    client: Any,
    paths: AdapterPaths,
    count: int,
    *,
    newest_state: Callable[[Path], Path | None],
    progress: Progress,
) -> tuple[int, list[dict[str, Any]]]:
    """Sample groups as the adapter's next step would, and score them.

    Args:
        client: opened on the run's base.
        paths: the adapter's files; its newest training state is taken up, if there is one.
        count: groups.

    Returns:
        The steps behind the policy, and the groups as `rollouts/step-N.jsonl.gz` holds them.

    Raises:
        ConfigError, DataError: what would stop the run.
    """
    course = prepare_rl(entry, client, progress)
    state = newest_state(paths.checkpoints)
    if state is None:
        adapter, step = client.create(entry.name, entry.spec(), init_from=entry.lora.init_from), 0
    else:
        adapter, saved = client.restore(entry.name, state, spec=entry.spec())
        step = int(saved["step"])
    adapter.text_format = course.text_format

    async def play() -> list[SampleGroup]:
        versions = Versions(course.sampler, adapter, None)
        players = course.players(None, None)
        try:
            await versions.publish(step)
            rows = course.order.rows(step * RlSettings.of(entry).groups, count)
            policy = versions.policy(step)
            return await asyncio.gather(
                *(players.play(step + 1, number, row, policy) for number, row in enumerate(rows))
            )
        finally:
            await players.close()
            await wrap_future(adapter.unload())

    return step, _told(entry, asyncio.run(play()))


def _told(entry: AdapterEntry, groups: Sequence[SampleGroup]) -> list[dict[str, Any]]:
    whole = [group for group in groups if len(group.rollouts) >= FEWEST_SAMPLES]
    batch = Objective(RlSettings.of(entry)).batch(whole)
    advantages = dict(zip(map(id, whole), batch.advantages, strict=True))
    return [
        {
            **group.to_json(),
            "advantages": advantages[id(group)].tolist() if id(group) in advantages else None,
        }
        for group in groups
    ]
