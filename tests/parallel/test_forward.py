"""Log-probabilities, losses and every gradient on a mesh are those of a single process."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from manylora.engine import Engine
from manylora.engine.engine import visit_every_block
from manylora.lora.routing import RoutingTable, Segment, routing
from manylora.models import PackedStream, packed
from manylora.models.stream import padded_rows
from manylora.parallel import Mesh
from manylora.parallel.traffic import Sent
from manylora.types import AdapterSpec, ForwardBackward, Opening
from tests.laws.tenants import must, random_data, work_of
from tests.models import TinyBases
from tests.parallel.processes import run_ranks
from tests.parallel.test_base import BASES, MESHES, folder_of

# Ranks, targets and losses of every kind; the last one has nothing to do in the second call.
SPECS = {
    "one": AdapterSpec(rank=1, alpha=2.0, init="gaussian", seed=1),
    "three": AdapterSpec(
        rank=3, alpha=6.0, targets=("q_proj", "o_proj", "down_proj"), rank_pattern={"o_proj": 5}
    ),
    "sixteen": AdapterSpec(rank=16, alpha=16.0, targets=("k_proj", "v_proj", "up_proj"), seed=4),
    "dropping": AdapterSpec(rank=4, alpha=8.0, dropout=0.3, seed=5),
    "head": AdapterSpec(rank=2, alpha=4.0, targets=("lm_head",)),
    "late": AdapterSpec(
        rank=3, alpha=3.0, targets=r"model\.layers\.2\..*(gate|down)_proj|lm_head", dropout=0.2
    ),
}
LOSSES = {
    "one": "cross_entropy",
    "three": "distillation",
    "sixteen": "gspo",
    "dropping": "ppo",
    "head": "distillation",
    "late": "importance_sampling",
}


# Sums that nearly cancel: moving the base's weights by one rounding moves single factors by 1.3e-5.
FACTOR = 3e-5


def engine_with(
    mesh: Mesh | None, folder: str, names: list[str], *, checkpointing: bool = False
) -> Engine:
    """An engine with adapters that are not as they began."""
    engine = Engine(
        Opening(str(folder), token_budget=48, device="cpu", activation_checkpointing=checkpointing),
        mesh,
    )
    for number, name in enumerate(names):
        engine.create(name, SPECS[name])
        state = engine.state(name)
        engine.unload(name)
        noise_P = np.random.default_rng(number).normal(size=state.weights.shape)
        state.weights[:] += 0.05 * noise_P.astype(np.float32)
        engine.restore(name, state)
    return engine


def at_its_temperature(work: ForwardBackward) -> ForwardBackward:
    """The operation at 1 or another temperature; all but one report entropies."""
    number = list(SPECS).index(str(work.adapter))
    return replace(work, temperature=(1.0, 0.6, 1.7)[number % 3], entropy=number != 1)


def worked(mesh: Mesh | None, folder: str, names: list[str], checkpointing: bool, count: int = 4):
    """Two calls with gradients and one without; what they gave."""
    engine = engine_with(mesh, folder, names, checkpointing=checkpointing)
    vocab = engine.base.vocab_size
    rng = np.random.default_rng(11)
    calls = [
        [work_of(n, LOSSES[n], random_data(rng, count, LOSSES[n], vocab=vocab)) for n in chosen]
        for chosen in (names, names[:1])
    ]
    forward = [work_of(n, "cross_entropy", random_data(rng, 2, vocab=vocab)) for n in names]
    calls.append([type(w)(adapter=w.adapter, data=w.data, backward=False) for w in forward])
    calls = [[at_its_temperature(work) for work in call] for call in calls]
    # The bare base and a snapshot beside the living weights.
    engine.snapshot(names[0], "kept")
    for snapshot in (None, "kept"):
        calls[-1].append(replace(calls[-1][0], adapter=None, snapshot=snapshot))
    results = [result for call in calls for result in must(engine.forward_backward(call))]
    states = {name: engine.state(name) for name in names}
    return {
        "losses": [float(result.loss) for result in results],
        "logprobs": [row for result in results for row in result.logprobs],
        "entropies": [row for result in results for row in result.entropies or ()],
        "gradients": {n: s.grad.sum(0) for n, s in states.items() if s.grad is not None},
    }


@lru_cache
def alone(folder: str, names: tuple[str, ...], checkpointing: bool):
    return worked(None, folder, list(names), checkpointing)


def layouts(folder: str, names: list[str]) -> dict[str, Any]:
    return {n: a.layout for n, a in engine_with(None, folder, names).adapters.items()}


def close(found: Any, expected: Any, tolerance: float, what: str) -> None:
    error, scale = np.linalg.norm(found - expected), np.linalg.norm(expected)
    assert error <= tolerance * scale, f"{what}: {error} of {scale}"


def compare(folder: str, names: list[str], mesh: str, *, checkpointing: bool = False) -> None:
    expected = alone(folder, tuple(names), checkpointing)
    results = run_ranks(worked, mesh, folder, names, checkpointing)
    factors = layouts(folder, names)
    for result in results:
        assert len(result["logprobs"]) == len(expected["logprobs"])
        for number, row in enumerate(expected["logprobs"]):
            close(result["logprobs"][number], row, 2e-6, f"log-probabilities {number}")
        assert len(result["entropies"]) == len(expected["entropies"]) > 0
        for number, row in enumerate(expected["entropies"]):
            close(result["entropies"][number], row, 2e-6, f"entropies {number}")
        close(np.array(result["losses"]), np.array(expected["losses"]), 1e-5, "losses")
    leader = results[0]["gradients"]
    assert leader.keys() == expected["gradients"].keys() == set(names)
    for name, layout in factors.items():
        found_P, expected_P = leader[name], expected["gradients"][name]
        close(found_P, expected_P, 1e-5, f"gradient of {name}")
        for factor in layout.factors:
            what = f"{name}, {factor.site}"
            close(factor.a(found_P), factor.a(expected_P), FACTOR, f"A of {what}")
            close(factor.b_transposed(found_P), factor.b_transposed(expected_P), FACTOR, what)


def names_for(base: str) -> list[str]:
    # A head whose vocabulary does not divide has no adapters under tp.
    uneven = BASES[base].get("vocab_size", 160) % 4
    return [name for name in SPECS if not (uneven and "lm_head" in str(SPECS[name].targets))]


# Every family on every mesh is a minute's work; without `slow` each is on two of them.
GRID = [
    pytest.param(
        base,
        mesh,
        marks=() if base == "llama" or mesh in ("tp=4", "dp=2,tp=2") else pytest.mark.slow,
    )
    for base in BASES
    for mesh in MESHES
]


@pytest.mark.parametrize(("base", "mesh"), GRID)
def test_log_probabilities_and_gradients_are_those_of_one_process(
    tiny: TinyBases, base: str, mesh: str
):
    compare(str(folder_of(tiny, base)), names_for(base), mesh)


@pytest.mark.parametrize("names", [["late"], ["late", "one"], ["head"]])
@pytest.mark.parametrize("mesh", ["dp=2", "dp=4", "dp=2,tp=2"])
def test_ranks_whose_adapters_reach_less_far_keep_step(
    tiny: TinyBases, mesh: str, names: list[str]
):
    """One adapter acts on the last block only, another rank's on all; some ranks have no token."""
    folder = str(folder_of(tiny, "llama"))
    expected = worked(None, folder, names, False, 1)
    for result in run_ranks(worked, mesh, folder, names, False, 1):
        for number, row in enumerate(expected["logprobs"]):
            close(result["logprobs"][number], row, 2e-6, f"log-probabilities {number}")
        if result["gradients"]:
            for name, gradient_P in expected["gradients"].items():
                close(result["gradients"][name], gradient_P, 1e-5, name)


@pytest.mark.parametrize("mesh", ["dp=2", "dp=2,tp=2", "tp=2"])
@pytest.mark.parametrize("base", ["llama", "gemma3_text"])
def test_activation_checkpointing_changes_nothing(tiny: TinyBases, base: str, mesh: str):
    compare(str(folder_of(tiny, base)), names_for(base), mesh, checkpointing=True)


def input_gradients(mesh: Mesh | None, folder: str, names: list[str]):
    """The gradients of the embedding's output, one for each micro-batch."""
    engine = engine_with(mesh, folder, names)
    visit_every_block(engine.base)
    gradients: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradients.append(gradient))

    engine.base.model.get_input_embeddings().register_forward_hook(keep)
    rng = np.random.default_rng(12)
    works = [work_of(n, LOSSES[n], random_data(rng, 4, LOSSES[n])) for n in names]
    must(engine.forward_backward(works))
    return [gradient.numpy() for gradient in gradients]


@pytest.mark.parametrize("mesh", ["tp=2", "tp=4"])
@pytest.mark.parametrize("base", ["llama", "gemma2"])
def test_the_gradient_of_the_input_is_that_of_one_process(tiny: TinyBases, base: str, mesh: str):
    folder = str(folder_of(tiny, base))
    expected = input_gradients(None, folder, list(SPECS))
    for result in run_ranks(input_gradients, mesh, folder, list(SPECS)):
        assert len(result) == len(expected) > 1
        for found, wanted in zip(result, expected, strict=True):
            close(found, wanted, 1e-5, "gradient of the input")


def sent(mesh: Mesh, folder: str, names: list[str]):
    """Collectives of one micro-batch's forward, and of forward, loss and backward, by name."""
    engine = engine_with(mesh, folder, names)
    visit_every_block(engine.base)
    rng = np.random.default_rng(13)
    data = random_data(rng, 3, lengths=(4, 8))
    calls = {}
    for backward in (False, True):
        mesh.traffic.clear()
        batch, table = _stream_of(engine, data, names)
        with torch.set_grad_enabled(backward), routing(table), packed(batch.stream):
            hidden_TH = engine.base.hidden(batch.tokens_T, batch.positions_T)
            if backward:
                hidden_TH.backward(torch.ones_like(hidden_TH))
        calls[str(backward)] = {n: [one.calls, one.bytes] for n, one in mesh.traffic.sent().items()}
    return calls


@dataclass
class _Stream:
    stream: PackedStream
    tokens_T: Tensor
    positions_T: Tensor


def _stream_of(engine: Engine, data: Any, names: list[str]) -> tuple[_Stream, RoutingTable]:
    """Each datum is a segment of one of the adapters in turn, or of none."""
    lengths = [len(datum) for datum in data]
    total = padded_rows(sum(lengths))
    tokens_T = torch.zeros(total, dtype=torch.long)
    segments = []
    for number, length in enumerate(lengths):
        adapter = engine.adapters[names[number % len(names)]] if names else None
        if adapter is not None:
            adapter.require_grad()
        segments.append(Segment(length, None if adapter is None else adapter.weights))
    segments.append(Segment(total - sum(lengths), None))
    table = RoutingTable(segments, training=True)
    return _Stream(PackedStream(lengths, total), tokens_T, tokens_T.clone()), table


@pytest.mark.parametrize("names", [["one"], ["one", "three", "sixteen"], ["late"]])
@pytest.mark.parametrize("mesh", ["tp=2", "tp=4", "dp=2,tp=2"])
def test_adapters_add_no_collective(tiny: TinyBases, mesh: str, names: list[str]):
    folder = str(folder_of(tiny, "llama"))
    bare, adapted = (run_ranks(sent, mesh, folder, chosen) for chosen in ([], names))
    assert adapted == bare
    for result in bare:
        # The embedding; o and down of three layers. Backwards q-k-v and gate-up of each.
        assert result["False"]["tp.sum"][0] == 1 + 3 * 2
        assert result["True"]["tp.sum"][0] == 1 + 3 * 2 + 3 * 2
        if mesh == "dp=2,tp=2":
            # A gather of the embedding; of each block, and again backwards.
            assert result["False"]["dp.blocks"][0] == 1 + 3
            assert result["True"]["dp.blocks"][0] == 1 + 3 + 3


def head_sent(mesh: Mesh, folder: str, names: list[str]):
    engine = engine_with(mesh, folder, ["one", *names])
    data = random_data(np.random.default_rng(13), 3, lengths=(4, 8))
    works = [work_of(name, "cross_entropy", data) for name in names or ["one"]]
    inner: dict[str, int] = {}
    loss = engine.head_loss
    softmax, chunks = loss._softmax, list[int]()

    def chunk(*arguments: Any) -> Any:
        chunks.append(1)
        return softmax(*arguments)

    loss._softmax = chunk  # type: ignore[method-assign]

    def counted(*arguments: Any, **named: Any) -> Any:
        before = mesh.traffic.sent()
        out = loss(*arguments, **named)
        for name, one in mesh.traffic.sent().items():
            inner[name] = inner.get(name, 0) + one.calls - before.get(name, Sent()).calls
        return out

    engine.head_loss = counted  # type: ignore[assignment]
    must(engine.forward_backward(works))
    return {"chunks": len(chunks), **{name: calls for name, calls in inner.items() if calls}}


@pytest.mark.parametrize("names", [[], ["head"]])
def test_the_loss_costs_a_collective_for_each_chunk_and_one(tiny: TinyBases, names: list[str]):
    """Adapters on the head have chunks of their own; the last collective sums the gradient."""
    folder = str(folder_of(tiny, "llama"))
    for result in run_ranks(head_sent, "tp=2", folder, names):
        assert result == {"chunks": result["chunks"], "tp.gather": result["chunks"], "tp.sum": 1}
        assert result["chunks"] > 1 if names else result["chunks"] == 1
