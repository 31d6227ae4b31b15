"""A `Trainer` trains many adapters on a base that it opens itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, Unpack

from manylora.api.client import AdapterClient
from manylora.engine import Engine
from manylora.hosting.engine_protocol import EngineProtocol
from manylora.hosting.host import Host
from manylora.processes import EngineGroup, start_group
from manylora.processes.external_start import Meeting
from manylora.types import ConfigError, EngineLost, Opening, OpeningOptions
from manylora.types.mesh_shape import MeshShape

# How often a mesh may be lost while it opens.
MOST_OPENINGS = 3


class Trainer(AdapterClient):
    """A trainer trains many LoRA adapters on one frozen base model.

    Use it as a context manager: leaving the block runs what is queued, then stops.

        with manylora.Trainer("seedling") as trainer:
            adapter = trainer.create("reverse", rank=8)
            forward = adapter.forward_backward(data)
            step = adapter.optim_step(lr=1e-3)
            print(forward.result().loss, step.result().grad_norm)
            adapter.export("out/reverse").result()

    Attributes:
        tokenizer: the base's Hugging Face tokenizer.
        adapters: name → handle.
    """

    def __init__(
        self,
        base: str | Path | Opening,
        *,
        mesh: str = "dp=1,tp=1",
        step_seconds: float = 600.0,
        ray: str | None = None,
        engine_address: str | None = None,
        meeting: Meeting | None = None,
        **options: Unpack[OpeningOptions],
    ):
        """Open a base.

        Args:
            base: `seedling`, a folder, or a hub id of any Hugging Face causal LM; or an opening,
                which says mesh and options, too.
            mesh: processes that share the work, such as `dp=2,tp=2` or `replicas=2`; they
                are started and ended by this one.
            step_seconds: on a mesh, what takes longer is taken for hung.
            ray: address of a Ray cluster whose devices the mesh is to use: `auto` or HOST:PORT; by
                default the processes run on this machine.
            engine_address: with Ray, this machine's address for processes on others; by default
                the one on the route toward them.
            meeting: where the mesh's processes meet, if they were started already.
            options: `token_budget`, `dtype`, `device`, `quantization`, `activation_checkpointing`,
                `threads`: see `manylora.types.Opening`.

        Raises:
            ConfigError: a setting is out of range, or there is no such cluster.
            BaseModelError: the base cannot be opened.
            Unsupported: its architecture would not keep its numbers here.
        """
        opening = base
        if isinstance(opening, Opening):
            if options or mesh != "dp=1,tp=1":
                raise ConfigError("an Opening says mesh and options itself; give them there")
        else:
            settings: dict[str, Any] = {**options}
            opening = Opening(str(base), mesh=MeshShape.parse(mesh), **settings)
        self._token_budget, self._meeting = opening.token_budget, meeting
        self._group: EngineGroup | None = None
        if opening.mesh.size == 1 and ray is None:
            engines: Sequence[EngineProtocol] = (Engine(opening),)
        else:
            self._group = start_group(
                opening,
                step_seconds=step_seconds,
                ray=ray,
                engine_address=engine_address,
                meeting=meeting,
            )
            engines = self._opened(self._group)
        super().__init__(Host(engines, token_budget=opening.token_budget))

    def reopen(self) -> None:
        """Open the base anew after the mesh was lost (`EngineLost`), without adapters.

        Raises:
            EngineLost: the processes cannot be started. BaseModelError, Unsupported.
        """
        assert self._group is not None, "an engine in this process is never lost"
        self._host.abandon()
        if self._meeting is not None:
            self._group.close()
            raise EngineLost("a process went; whoever started them has to start all of them again")
        engines = self._opened(self._group)
        super().__init__(Host(engines, token_budget=self._token_budget))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=error_type is not None)

    def close(self, *, cancel: bool = False) -> None:
        """Run what is queued (or, with `cancel`, drop what has not started and what is decoding),
        then stop."""
        try:
            self._host.close(cancel=cancel)
        finally:
            if self._group is not None:
                self._group.close()

    def _opened(self, group: EngineGroup) -> Sequence[EngineProtocol]:
        # A process went while it opened; the next may stay. There is none if others start them.
        left = 1 if self._meeting is not None else MOST_OPENINGS
        while True:
            try:
                return group.open()
            except BaseException as error:
                left -= 1
                if not isinstance(error, EngineLost) or not left:
                    group.close()
                    raise
