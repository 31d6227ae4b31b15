"""This benchmark counts what each rank of a mesh holds and sends, and compares it with formulas.

    python -m benchmarks.mesh [--meshes dp=2 dp=2,tp=2 …] [--adapters 0 1 4 16]
                              [--quantization nf4|int8] [--out benchmarks/results/NAME]
    python -m benchmarks.mesh --plan [--tokens 8192] [--quantization nf4|int8]

The first counts on real gloo ranks with a tiny Llama: bytes at rest, gathered at a time, sent by
forward_backward and by optim_step, with and without adapters. Our own counter
(parallel/traffic.py) is compared with what torch itself is asked to send, and both with the
formulas (benchmarks/mesh_formulas.py); any difference fails. The second prints what the formulas
give for large bases: the tables of docs/scale.md.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.mesh_formulas import (
    Base,
    Part,
    Stream,
    activations,
    base_held,
    forward_backward_sent,
    gathered,
    optim_step_peak,
    optim_step_sent,
    part,
    total,
)
from benchmarks.mesh_plan import plan, plan_quantized, table
from benchmarks.mesh_ranks import (
    BUDGET,
    CHUNK_ROWS,
    SEQUENCE,
    SEQUENCES,
    VOCAB,
    activation_peaks,
    counted,
    specs,
    working,
)
from benchmarks.multi_tenant import machine
from manylora.models.quantized import BITS
from manylora.types.mesh_shape import MeshShape
from manylora.types.weight_forms import QUANTIZATIONS, Quantization
from tests.models import TinyBases
from tests.parallel.processes import run_ranks

MESHES = ("dp=1", "dp=2", "tp=2", "dp=4", "tp=4", "dp=2,tp=2")
COUNTS = (0, 1, 4, 16)
BASE = Base(hidden=64, layers=3, heads=4, kv_heads=4, head_dim=16, mlp=96, vocab=VOCAB, item=4)
# Rows that four tp ranks can cut into whole blocks of 64.
BLOCKS = Base(hidden=128, layers=3, heads=4, kv_heads=4, head_dim=64, mlp=256, vocab=VOCAB, item=4)
# Peaks of activations are compared on another base, in which the MLP is as wide as usual.
WIDE = Base(hidden=128, layers=3, heads=4, kv_heads=2, head_dim=32, mlp=448, vocab=VOCAB)
PEAKS = (("dp=1", "fp32"), ("tp=2", "fp32"), ("dp=1", "bf16"))
INTRODUCTION = (
    "Counted, not timed: gloo ranks on {where}. "
    "A Llama of {parameters:,} parameters in {kept} (hidden {hidden}, {layers} blocks, MLP {mlp}, "
    f"vocabulary {VOCAB}); {SEQUENCES * SEQUENCE} tokens a step in "
    f"micro-batches of {BUDGET}; adapters on every linear layer, ranks 1, 3, 16, 8 and dtypes "
    "fp32, bf16, fp32 in turn. Of ranks that differ the largest number is shown. Every count of "
    "every rank is that of the closed formulas (benchmarks/mesh_formulas.py), and what our counter "
    "says is what torch was asked to send."
)
ITEMS = {"fp32": 4, "bf16": 2}


def base_of(kind: Quantization | None) -> Base:
    """Return the base on which is counted."""
    return BASE if kind is None else replace(BLOCKS, bits=BITS[kind])


def folder_of(tiny: TinyBases, base: Base) -> str:
    """Return the folder of a random Llama of these shapes."""
    return str(
        tiny(
            "llama",
            hidden_size=base.hidden,
            num_hidden_layers=base.layers,
            num_attention_heads=base.heads,
            num_key_value_heads=base.kv_heads,
            head_dim=base.head_dim,
            intermediate_size=base.mlp,
            vocab_size=base.vocab,
        )
    )


def measure(
    mesh: str, folder: str, base: Base, counts: Sequence[int], quantization: str | None = None
) -> Iterator[dict[str, Any]]:
    """Yield a row for each rank and number of adapters, without and with recomputed blocks."""
    for checkpointing in (False, True):
        ranks = run_ranks(counted, mesh, folder, [*counts], checkpointing, quantization)
        for rank, found in enumerate(ranks):
            for count in counts:
                yield {
                    "mesh": str(MeshShape.parse(mesh)),
                    "rank": rank,
                    "checkpointing": checkpointing,
                    "adapters": count,
                    "parameters": sum(p.length for p in _parts(base, count, MeshShape())),
                    "measured": _added(found[str(count)]),
                    "formula": formula(base, mesh, rank, count, checkpointing=checkpointing),
                }


def formula(base: Base, mesh: str, rank: int, count: int, *, checkpointing: bool) -> dict[str, Any]:
    """Return what a rank should hold and send."""
    shape = MeshShape.parse(mesh)
    dp_index, parts = rank // shape.tp, _parts(base, count, shape)
    held = {"weights": 0, "gradient": 0, "master": 0, "moments": 0}
    for one, ranks in zip(parts, working(count, shape.dp), strict=True):
        for name, size in one.held(dp_index).items():
            # Only ranks with some of an adapter's work make a gradient for it.
            held[name] += size if name != "gradient" or dp_index in ranks else 0
    tokens = SEQUENCES * SEQUENCE // shape.dp
    # A sequence is a piece; its loss takes the place of two numbers.
    numbers = SEQUENCES // shape.dp * (SEQUENCE + 2)
    stream = Stream([BUDGET] * (tokens // BUDGET), CHUNK_ROWS, numbers)
    return {
        "base": base_held(base, shape),
        "gathered": max(gathered(base, shape).values()),
        "held": held,
        "forward_backward": forward_backward_sent(
            base, shape, stream, checkpointing=checkpointing, gloo=True
        ),
        "optim_step": optim_step_sent(parts, shape, dp_index, gloo=True),
        "optim_step_peak": optim_step_peak(parts, shape, dp_index),
    }


def differences(row: dict[str, Any]) -> list[str]:
    """Return where a row's counts are not the formulas'."""
    measured, expected = row["measured"], row["formula"]
    where = f"{row['mesh']}, rank {row['rank']}, {row['adapters']} adapters"
    found = []
    for name in ("base", "gathered", "held", "forward_backward", "optim_step"):
        if _plain(measured[name]) != _plain(expected[name]):
            found.append(f"{where}: {name} is {measured[name]}, by formula {expected[name]}")
    size = MeshShape.parse(row["mesh"]).size
    for verb in ("forward_backward", "optim_step"):
        calls, counted_bytes = total(measured[verb])
        # Torch sends what was rounded up to equal shares.
        if not 0 <= measured[f"{verb}_wire"] - counted_bytes <= 16 * size * calls:
            found.append(f"{where}: {verb} is counted otherwise than torch sends it")
    return found + [f"{where}: {one}" for one in _peak_differences(row)]


def _peak_differences(row: dict[str, Any]) -> list[str]:
    measured, expected = (row[k]["optim_step_peak"] for k in ("measured", "formula"))
    shape = MeshShape.parse(row["mesh"])
    if shape.dp == 1 and shape.tp > 2:
        return []  # gloo's sums in order take further buffers
    # Norms are a few numbers; gloo's threads may let go of a buffer a little late.
    if not expected <= measured <= 1.1 * expected + 64 * row["adapters"]:
        return [f"a step's buffers are {measured}, by formula {expected}"]
    return []


def same_with_adapters(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return where a forward_backward with adapters sends something else than without."""
    sent: dict[tuple[str, int], Any] = {}
    found = []
    for row in rows:
        if not row["checkpointing"]:
            own = row["measured"]["forward_backward"]
            bare = sent.setdefault((row["mesh"], row["rank"]), own)
            if bare != own:
                found.append(f"{row['mesh']}: {row['adapters']} adapters send {own}, not {bare}")
    return found


def peaks(tiny: TinyBases, chosen: Sequence[tuple[str, str]] = PEAKS) -> Iterator[dict[str, Any]]:
    """Yield activations at their peak on each (mesh, dtype), in bytes of each token."""
    for mesh, dtype in chosen:
        found = run_ranks(activation_peaks, mesh, folder_of(tiny, WIDE), dtype, 4)
        base = replace(WIDE, item=ITEMS[dtype])
        by_formula = activations(base, MeshShape.parse(mesh).tp, 4, WIDE.layers)
        for rank, one in enumerate(found):
            yield {"mesh": mesh, "rank": rank, "dtype": dtype, "formula": by_formula, **one}


def peak_differences(row: dict[str, Any]) -> list[str]:
    """Return a complaint if a peak differs from its formula by more than two percent."""
    measured, expected = row["bytes_per_token"], row["formula"]
    if abs(measured - expected) <= 0.02 * expected:
        return []
    return [f"{row['mesh']}, {row['dtype']}: {measured} bytes of a token, by formula {expected}"]


def _parts(base: Base, count: int, shape: MeshShape) -> list[Part]:
    return [part(base, spec.rank, ITEMS[spec.dtype], shape) for spec in specs(count).values()]


def _added(found: dict[str, Any]) -> dict[str, Any]:
    """Return a rank's counts, its adapters added up."""
    verbs = found["forward_backward"], found["optim_step"]
    kinds = ("weights", "gradient", "master", "moments")
    return {
        "base": found["base"],
        "gathered": verbs[0]["gathered"],
        "held": {kind: sum(one[kind] for one in found["adapters"].values()) for kind in kinds},
        "forward_backward": verbs[0]["sent"],
        "forward_backward_wire": verbs[0]["wire"][1],
        "optim_step": verbs[1]["sent"],
        "optim_step_wire": verbs[1]["wire"][1],
        "optim_step_peak": verbs[1]["peak"],
    }


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


# -- the report ---------------------------------------------------------------------------------


def introduction(base: Base, where: str, quantization: str | None) -> str:
    """Say what was counted, and on what."""
    kept = "fp32" if quantization is None else f"fp32, its blocks' linear layers in {quantization}"
    return INTRODUCTION.format(
        where=where,
        parameters=base.parameters(),
        kept=kept,
        hidden=base.hidden,
        layers=base.layers,
        mlp=base.mlp,
    )


def report(rows: Sequence[dict[str, Any]], tokens: Sequence[dict[str, Any]], about: str) -> str:
    """Write the counts in Markdown; where ranks differ, the largest."""
    counts = sorted({row["adapters"] for row in rows})
    meshes = list(dict.fromkeys(row["mesh"] for row in rows))
    return "\n\n".join(
        [
            "# What a rank of a mesh holds and sends",
            about,
            "## Bytes held\n\nAt rest; gathered at a time; adapters after their first step (only "
            "ranks with some of an adapter's work hold a gradient of it).",
            _held(rows, meshes, counts),
            "## forward_backward\n\nCollectives and bytes sent: the same for any number of "
            "adapters, and without any.",
            _forward(rows, meshes, counts),
            "## optim_step\n\nCollectives, bytes sent and bytes of buffers, of all adapters in one "
            "call.",
            _steps(rows, meshes, [count for count in counts if count]),
            *_activations(tokens),
        ]
    )


def _activations(tokens: Sequence[dict[str, Any]]) -> list[str]:
    if not tokens:
        return []
    lines = [
        [f"{one['mesh']}, {one['dtype']}", f"{one['bytes_per_token']:.0f}", f"{one['formula']}"]
        for one in tokens
        if one["rank"] == 0
    ]
    return [
        "## Activations\n\nBytes of each token at the peak of forward and backward, blocks "
        f"recomputed, rank 4 (hidden {WIDE.hidden}, {WIDE.layers} blocks, MLP {WIDE.mlp}).",
        table(["mesh, dtype", "counted", "by formula"], lines),
    ]


def _rows(
    rows: Sequence[dict[str, Any]], mesh: str, count: int, *, checkpointing: bool = False
) -> list[dict[str, Any]]:
    wanted = (mesh, count, checkpointing)
    return [
        row["measured"] | {"parameters": row["parameters"]}
        for row in rows
        if (row["mesh"], row["adapters"], row["checkpointing"]) == wanted
    ]


def _held(rows: Sequence[dict[str, Any]], meshes: Sequence[str], counts: Sequence[int]) -> str:
    lines = []
    for mesh in meshes:
        first = _rows(rows, mesh, counts[0])
        line = [mesh, *(f"{max(one[name] for one in first):,}" for name in ("base", "gathered"))]
        for count in counts[1:]:
            held = max(sum(one["held"].values()) for one in _rows(rows, mesh, count))
            line.append(f"{held:,}")
        lines.append(line)
    head = ["mesh", "base", "gathered", *(_count(count) for count in counts if count)]
    return table(head, lines)


def _forward(rows: Sequence[dict[str, Any]], meshes: Sequence[str], counts: Sequence[int]) -> str:
    lines = []
    for mesh in meshes:
        line = [mesh]
        for checkpointing in (False, True):
            for count in counts:
                found = _rows(rows, mesh, count, checkpointing=checkpointing)
                line.append(_shown(max(total(one["forward_backward"]) for one in found)))
        lines.append(line)
    names = [_count(count) for count in counts]
    return table(["mesh", *names, *(f"recomputed, {name}" for name in names)], lines)


def _steps(rows: Sequence[dict[str, Any]], meshes: Sequence[str], counts: Sequence[int]) -> str:
    lines = []
    for mesh in meshes:
        line, each = [mesh], 0.0
        for count in counts:
            found = _rows(rows, mesh, count)
            calls, size = max((total(one["optim_step"]) for one in found), key=lambda sent: sent[1])
            line += [_shown((calls, size)), f"{max(one['optim_step_peak'] for one in found):,}"]
            each = size / found[0]["parameters"]
        lines.append([*line, f"{each:.2f}"])
    head = [f"{_count(count)}{what}" for count in counts for what in ("", ": buffers")]
    return table(["mesh", *head, "bytes sent for each of their numbers"], lines)


def _count(adapters: int) -> str:
    return "1 adapter" if adapters == 1 else f"{adapters or 'no'} adapters"


def _shown(sent: tuple[int, int]) -> str:
    return f"{sent[0]}: {sent[1]:,}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--meshes", nargs="+", default=MESHES)
    parser.add_argument("--adapters", nargs="+", type=int, default=COUNTS)
    parser.add_argument("--out", type=Path, help="without its suffix")
    parser.add_argument("--plan", action="store_true", help="print what large bases need")
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch, in the plan")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the linear layers")
    options = parser.parse_args()
    kind: Quantization | None = options.quantization
    if options.plan:
        print(plan(options.tokens) if kind is None else plan_quantized(kind, options.tokens))
        return
    base = base_of(kind)
    with tempfile.TemporaryDirectory() as scratch:
        tiny = TinyBases(Path(scratch))
        folder, counts = folder_of(tiny, base), options.adapters
        rows = [r for mesh in options.meshes for r in measure(mesh, folder, base, counts, kind)]
        # What a token adds does not depend on how weights are kept.
        tokens = [] if kind else list(peaks(tiny))
    wrong = [one for row in rows for one in differences(row)] + same_with_adapters(rows)
    wrong += [one for row in tokens for one in peak_differences(row)]
    on = machine()
    where = f"{len(os.sched_getaffinity(0))} cores of {on['cpu']}, torch {on['torch']}"
    text = report(rows, tokens, introduction(base, where, kind))
    print(text)
    if wrong:
        sys.exit("\n".join(["not as the formulas say:", *wrong]))
    if options.out:
        found = [{name: value for name, value in row.items() if name != "formula"} for row in rows]
        lines = ",\n".join(f"  {json.dumps(row)}" for row in found)
        parts = [f' "machine": {json.dumps(on)}', f' "rows": [\n{lines}\n ]']
        parts.append(f' "activations": {json.dumps(tokens)}')
        options.out.with_suffix(".json").write_text("{\n" + ",\n".join(parts) + "\n}\n")
        options.out.with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
