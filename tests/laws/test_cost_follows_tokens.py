"""Law 7: memory and time follow active tokens and true ranks, not what is merely registered.

Faults that were planted and seen to fail here: logits of the whole stream at once, one chunk's kept
until the next is done, a second forward of every chunk wherever one loss needs it.
"""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from manylora.engine import Engine
from manylora.engine.head_chunks import row_bytes
from manylora.types import AdamParams, AdapterSpec, Datum, ForwardBackward, Opening, OptimStep
from tests.laws.tenants import must, random_data, work_of

pytestmark = pytest.mark.usefixtures("threads")


class Watch(TorchDispatchMode):
    """Counts operations, and of results whose last size is `last_dim` the elements of the largest
    and of all that are alive at once."""

    def __init__(self, last_dim: int | None = None):
        super().__init__()
        self.num_operations = 0
        self.largest = 0
        self.most_alive = 0
        self._alive: dict[int, int] = {}
        self.last_dim = last_dim

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.num_operations += 1
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.last_dim,):
                self.largest = max(self.largest, tensor.numel())
                # A view, of the head's weight perhaps, takes no memory.
                if not any(_shares(tensor, a) for a in args):
                    self._note(tensor.untyped_storage(), tensor.numel())
        return out

    def _note(self, storage: torch.UntypedStorage, elements: int) -> None:
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = elements
            self.most_alive = max(self.most_alive, sum(self._alive.values()))
            weakref.finalize(storage, self._alive.pop, storage._cdata)


def _shares(tensor: torch.Tensor, other: Any) -> bool:
    """Whether the two are the same memory."""
    return (
        isinstance(other, torch.Tensor)
        and tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )


def one_step(engine: Engine, names: list[str], data: list[Datum] | None = None) -> None:
    data = data or random_data(np.random.default_rng(0), 3)
    must(engine.forward_backward([ForwardBackward(adapter=name, data=data) for name in names]))
    params = AdamParams(lr=1e-3, clip_norm=1.0)
    must(engine.optim_step([OptimStep(adapter=name, params=params) for name in names]))


@pytest.mark.parametrize("rank", [1, 33])
def test_bytes_of_an_adapter(tiny, rank: int):
    """Four fp32 vectors of its true length once it has stepped; two more bytes in bf16."""
    engine = Engine(Opening(str(tiny("llama"))))
    adapter = engine.create("a", AdapterSpec(rank=rank, rank_pattern={"q_proj": 7}))
    params = sum(f.rank * (f.in_features + f.out_features) for f in adapter.layout.factors)
    assert adapter.num_bytes() == 4 * params  # no gradient, no moments before they are needed
    one_step(engine, ["a"])
    assert adapter.num_bytes() == 16 * params
    engine.create("b", AdapterSpec(rank=rank, rank_pattern={"q_proj": 7}, dtype="bf16"))
    one_step(engine, ["b"])
    assert engine.adapters["b"].num_bytes() == 18 * params


def operations(engine: Engine, run: Callable[[], None]) -> int:
    run()  # first use makes gradients and moments
    with Watch() as watch:
        run()
    return watch.num_operations


def test_idle_adapters_cost_no_operation(tiny):
    engine = Engine(Opening(str(tiny("llama"))))
    for name in ("a", "b"):
        engine.create(name, AdapterSpec(rank=4))
    alone = operations(engine, lambda: one_step(engine, ["a", "b"]))
    for i in range(58):
        engine.create(f"idle-{i}", AdapterSpec(rank=64))
    assert operations(engine, lambda: one_step(engine, ["a", "b"])) == alone
    assert alone > operations(engine, lambda: one_step(engine, ["a"]))  # the watch does see


def _addmm(_out: Any, a: Any, b: Any, **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def flops(run: Callable[[], Any]) -> int:
    """Of all matrix products, those that add in place included."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm}) as counter:
        run()
    return counter.get_total_flops()


def test_low_rank_flops_follow_true_ranks(tiny):
    """An adapter adds 2·t·(K+N)·r forward and twice that backward, for its own rank r."""
    engine = Engine(Opening(str(tiny("llama"))))
    for name, rank in {"one": 1, "three": 3, "large": 33}.items():
        engine.create(name, AdapterSpec(rank=rank, targets=("q_proj", "down_proj")))
    length = 64
    tokens = np.arange(length) + 2
    data = [Datum(tokens, {"target_tokens": tokens, "weights": np.ones(length)})]
    one, three, large = (
        flops(lambda n=n: one_step(engine, [n], data)) for n in ("one", "three", "large")
    )

    factors = engine.adapters["one"].layout.factors
    # Nothing is trained below the first q_proj, so nobody needs the gradient of its input.
    without_dx = 2 * length * factors[0].in_features
    per_rank = 6 * length * sum(f.in_features + f.out_features for f in factors) - without_dx
    assert three - one == 2 * per_rank
    assert large - one == 32 * per_rank
    # Together each pays for its own rank: no maximum, no padding.
    together = flops(lambda: one_step(engine, ["one", "three", "large"], data))
    assert together == one + three + large


def test_flops_follow_tokens(tiny):
    """A short neighbour is not padded to a long one."""
    engine = Engine(Opening(str(tiny("llama"))))
    for name in ("long", "short"):
        engine.create(name, AdapterSpec(rank=8))
    rng = np.random.default_rng(0)
    works = [
        ForwardBackward(adapter="long", data=random_data(rng, 1, lengths=(96, 97))),
        ForwardBackward(adapter="short", data=random_data(rng, 8, lengths=(4, 5))),
    ]
    together = flops(lambda: must(engine.forward_backward(works)))
    apart = [flops(lambda w=w: must(engine.forward_backward([w]))) for w in works]
    assert together == sum(apart)


def test_only_what_a_loss_needs_is_paid_for(tiny, monkeypatch):
    """Several targets take no product more, a sequence's ratio a second forward of the head, and
    that only for the chunks that hold such sequences."""
    monkeypatch.setattr("manylora.engine.head_loss.chunk_rows", lambda *_, **__: 32)
    engine = Engine(Opening(str(tiny("llama"))))
    for name in ("a", "b"):
        engine.create(name, AdapterSpec(rank=4))

    def cost(first: str, second: str) -> int:
        works = [
            work_of(name, loss, random_data(np.random.default_rng(0), 2, loss, (48, 49)))
            for name, loss in {"a": first, "b": second}.items()
        ]
        return flops(lambda: must(engine.forward_backward(works)))

    plain = cost("cross_entropy", "ppo")
    assert cost("distillation", "ppo") == cost("distillation", "distillation") == plain
    head = engine.base.head.weight_VH
    # Rows 96 … 191 of 192, in chunks of 32.
    assert cost("cross_entropy", "gspo") == plain + 2 * 96 * head.numel()
    assert cost("gspo", "gspo") == plain + 2 * 192 * head.numel()


@pytest.mark.parametrize("loss", ["cross_entropy", "gspo", "distillation"])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "lm_head")])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_exist_for_one_chunk_at_a_time(
    tiny, monkeypatch, family: str, targets: Any, loss: str
):
    vocab, chunk = 331, 64  # a size that no other tensor has
    monkeypatch.setattr("manylora.engine.head_loss.chunk_rows", lambda *_, **__: chunk)
    engine = Engine(Opening(str(tiny(family, vocab_size=vocab))))
    engine.create("a", AdapterSpec(rank=4, targets=targets))
    engine.create("b", AdapterSpec(rank=4))
    data = random_data(np.random.default_rng(0), 20, loss, lengths=(20, 40))
    assert sum(map(len, data)) > 8 * chunk
    with Watch(last_dim=vocab) as watch:
        must(engine.forward_backward([work_of(name, loss, data) for name in ("a", "b")]))
    assert vocab * 32 <= watch.largest <= vocab * chunk
    # One chunk's logits; a copy for adapters on the head (such rows begin off a cache line), and
    # the derivative of the softcap. Never those of two chunks.
    copies = 1 + (family == "gemma2") + ("lm_head" in targets)
    assert watch.most_alive <= copies * vocab * chunk
    # What admission counts with.
    assert 4 * copies * vocab <= row_bytes(vocab, torch.float32, capped=family == "gemma2")


def test_chunks_change_nothing(tiny, monkeypatch):
    """The same numbers from one chunk as from many, up to the order of sums."""
    gradients = []
    data = random_data(np.random.default_rng(0), 6, lengths=(20, 60))
    for rows in (1024, 32):
        monkeypatch.setattr("manylora.engine.head_loss.chunk_rows", lambda *_, n=rows, **__: n)
        engine = Engine(Opening(str(tiny("gemma2"))))
        engine.create("a", AdapterSpec(rank=4, targets=("q_proj", "lm_head")))
        must(engine.forward_backward([ForwardBackward(adapter="a", data=data)]))
        gradients.append(engine.adapters["a"].require_grad())
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6 * float(gradients[0].abs().max()))
