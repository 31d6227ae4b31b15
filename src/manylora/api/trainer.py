"""`Trainer`: a host of one's own."""

from pathlib import Path
from typing import Self

from manylora.api.door import AdapterDoor
from manylora.api.host import Host
from manylora.engine import Engine


class Trainer(AdapterDoor):
    """Many LoRA adapters on one frozen base model.

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
        base: str | Path,
        *,
        token_budget: int = 4096,
        dtype: str = "auto",
        device: str = "auto",
        activation_checkpointing: bool = False,
        threads: int | None = None,
    ):
        """Open a base.

        Args:
            base: `seedling`, a folder, or a hub id of any Hugging Face causal LM.
            token_budget: tokens of one packed micro-batch; a longer sequence runs alone.
            dtype: of the base: `auto` (as stored), `fp32`, `bf16`, `fp16`.
            device: `auto` (CUDA if there is one), `cpu`, `cuda:1`, …
            activation_checkpointing: less memory for a third more time.
            threads: CPU threads of one operation; None = torch's choice.

        Raises:
            ConfigError: a setting is out of range.
            BaseModelError: the base cannot be opened.
            Unsupported: its architecture would not keep its numbers here.
        """
        engine = Engine(
            base,
            token_budget=token_budget,
            dtype=dtype,
            device=device,
            activation_checkpointing=activation_checkpointing,
            threads=threads,
        )
        super().__init__(Host(engine, token_budget=token_budget))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=error_type is not None)

    def close(self, *, cancel: bool = False) -> None:
        """Run what is queued (or, with `cancel`, drop what has not started), then stop."""
        self._host.close(cancel=cancel)
