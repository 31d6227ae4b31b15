"""Writes the training curve as CSV and as a small hand-made SVG."""

from __future__ import annotations

import csv
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 320, 56, 44, 28, 16


def write_csv(path: Path, points: list[tuple[int, int, float, float]]) -> None:
    """Rows of step, tokens, loss (mean since the row before) and learning rate."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("step", "tokens", "loss", "learning_rate"))
        writer.writerows((s, t, f"{loss:.4f}", f"{rate:.6f}") for s, t, loss, rate in points)


def read_csv(path: Path) -> list[tuple[int, int, float, float]]:
    """The points that `write_csv` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    return [(int(s), int(t), float(loss), float(rate)) for s, t, loss, rate in rows]


def write_svg(path: Path, points: list[tuple[int, int, float, float]]) -> None:
    """The loss over the steps, with axes and a grid."""
    last = max(points[-1][0], 1)
    top = max(1, -(-int(max(p[2] for p in points) * 100) // 100))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(loss: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * min(loss, top) / top

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#444">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18">seedling: pretraining loss (nats per token)</text>',
    ]
    for loss in range(top + 1):
        parts.append(
            f'<path d="M{LEFT} {y(loss):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
            f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss}</text>'
        )
    for i in range(6):
        step = round(last * i / 5)
        parts.append(
            f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">step</text>')
    line = " ".join(f"{x(s):.1f},{y(loss):.1f}" for s, _, loss, _ in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#2a7d4f" stroke-width="1.5"/>')
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")
