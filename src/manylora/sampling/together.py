"""The decode loops of a mesh's ranks are turned together.

Requests are dealt over the data-parallel axis; the ranks of a tensor-parallel group work on the
same ones. A turn begins with one small maximum over the mesh: what kinds of forwards any loop has
to do, so that all run the same number of them (the base's shares are gathered by each); how many
bytes of answers there are to be told; and whether the leader's time is up.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from manylora.parallel import Mesh
from manylora.sampling.answers import from_bytes, to_bytes
from manylora.sampling.loop import DecodeLoop
from manylora.sampling.request import Answer, Kinds, Request


@dataclass(slots=True)
class _Dealt:
    number: int
    owner: int
    load: int


class LoopsTogether:
    """This rank's loop has its part in the others'. Every rank makes the same calls."""

    def __init__(self, loop: DecodeLoop, mesh: Mesh, device: torch.device):
        self._loop = loop
        self._mesh = mesh
        self._device = device
        self._dealt: dict[Request, _Dealt] = {}
        self._numbered: dict[int, Request] = {}
        self._loads = [0] * mesh.dp.size
        self._next = 0
        self._found: list[tuple[int, Answer]] = []  # by this rank, not told to the others yet

    def admit(self, requests: Iterable[Request]) -> None:
        """Let requests join; each goes to the rank that has least to do."""
        for request in requests:
            load = len(request.prompt) + request.num_samples * request.params.max_tokens
            owner = self._loads.index(min(self._loads))
            self._loads[owner] += load
            self._dealt[request] = _Dealt(self._next, owner, load)
            self._numbered[self._next] = request
            self._next += 1
            if owner == self._mesh.dp.index:
                self._loop.admit([request])

    def cancel(self, request: Request) -> None:
        """Forget a request, if it is still here."""
        if self._forget(request):
            self._loop.cancel(request)

    def interrupt(self, request: Request) -> None:
        """End a request, if it is still here; its answer is told in one of the next turns."""
        if request in self._dealt:
            self._loop.interrupt(request)

    def turn(self, until: float) -> tuple[list[tuple[Request, Answer]], bool]:
        """Make one turn of all loops.

        Args:
            until: when the time is up, by the leader's monotonic clock.

        Returns:
            The requests that were answered in the turn before, the same on every rank; and whether
            the time is up.
        """
        told = to_bytes(self._found)
        self._found = []
        over = self._mesh.is_leader and time.monotonic() >= until
        answered: list[tuple[Request, Answer]] = []
        time_is_up = False

        def agree(kinds: Kinds) -> Kinds:
            nonlocal answered, time_is_up
            flags = [kinds.read, kinds.feed, kinds.begin, over, len(told)]
            flags_5 = torch.tensor(flags, dtype=torch.int64, device=self._device)
            read, feed, begin, up, size = self._mesh.world.max_(flags_5).tolist()
            answered, time_is_up = self._tell(told, size), bool(up)
            return Kinds(bool(read), bool(feed), bool(begin))

        for request, answer in self._loop.step(agree):
            if request in self._dealt:
                self._found.append((self._dealt[request].number, answer))
        return answered, time_is_up

    def _tell(self, told: bytes, size: int) -> list[tuple[Request, Answer]]:
        """Exchange what the ranks have found; `size` bytes are the longest of it."""
        if not size:
            return []
        sent = bytearray(len(told).to_bytes(8, "little") + told).ljust(8 + size, b"\0")
        own = torch.frombuffer(sent, dtype=torch.uint8).to(self._device)
        answered = []
        for row in self._mesh.dp.gather(own).cpu().numpy():
            length = int.from_bytes(row[:8].tobytes(), "little")
            for number, answer in from_bytes(row[8 : 8 + length].tobytes()):
                # A request that was cancelled meanwhile is missing here.
                request = self._numbered.get(number)
                if request is not None:
                    self._forget(request)
                    answered.append((request, answer))
        return answered

    def _forget(self, request: Request) -> bool:
        dealt = self._dealt.pop(request, None)
        if dealt is None:
            return False
        del self._numbered[dealt.number]
        self._loads[dealt.owner] -= dealt.load
        return True
