"""A sum over the actors of a placement group, for which they must find each other.

python -m tests.parallel.ray_sum ADDRESS FOLDER
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from manylora.processes import ray_launcher
from manylora.processes.commands import Assignment
from manylora.processes.ray_actor import RankActor, prepare


class SumActor(RankActor):
    """Adds up the ranks' numbers, and writes the sum and what it was told to `address`."""

    def run(self, address: str, secret: str, environment: Mapping[str, str], peer: str) -> None:
        prepare(environment, peer)
        import torch
        from torch import distributed

        distributed.init_process_group("gloo")
        total = torch.tensor([10.0 ** distributed.get_rank()])
        distributed.all_reduce(total)
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")
        told = {name: os.environ.get(name, "") for name in names}
        path = Path(address) / f"{distributed.get_rank()}.json"
        path.write_text(json.dumps({"total": total.item(), **told}))
        distributed.destroy_process_group()


def main(address: str, folder: str) -> None:
    ray_launcher.RankActor = SumActor  # type: ignore[misc]
    ray_launcher.connected(address, print)
    assignment = Assignment(folder, "", 2, "", "cpu")
    ray_launcher.keep_up(assignment, ray_launcher.placed(assignment, address, 30))


if __name__ == "__main__":
    main(*sys.argv[1:])
