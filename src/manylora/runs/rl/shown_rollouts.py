"""The report shows samples that one reads: the same prompts over some steps, best beside worst.

Of an adapter about eight steps are chosen, evenly spread, and of these up to three prompts. All is
bounded in bytes, whatever the texts hold and however many adapters a run has.
"""

import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from manylora.runs.rl.kept_rollouts import (
    Group,
    KeptSample,
    groups_of,
    is_silent,
    kept_steps,
    ranked,
    rows_of,
    samples_of,
)
from manylora.runs.rl.token_texts import TokenTexts
from manylora.types import DataError

MOST_STEPS = 8
MOST_PROMPTS = 3
# So far from its place among the even ones may a step be that has the prompts of others.
REACH = 3
# Bytes of all samples of a page, and of one.
ALL_BYTES = 2_500_000
MOST_BYTES = 12_000
FEWEST_BYTES = 300
# Errors of a group and parts of a reward that are shown, and bytes of each.
MOST_ERRORS, ERROR_BYTES = 4, 300
MOST_PARTS, PART_BYTES = 6, 60


def sample_bytes(adapters: int) -> int:
    """Return how many bytes a sample, or a prompt, may take on a page of so many adapters."""
    texts = max(1, adapters) * MOST_STEPS * MOST_PROMPTS * 3
    return min(MOST_BYTES, max(FEWEST_BYTES, ALL_BYTES // texts))


def shown_rollouts(folder: Path, texts: TokenTexts, most_bytes: int) -> list[dict[str, Any]]:
    """Return the chosen steps of an adapter with their groups; empty if it has no rollouts.

    Args:
        folder: the adapter's rollouts.
        most_bytes: of a sample, and of a prompt, in the page.
    """
    steps = kept_steps(folder)
    found = {step: rows_of(folder, step) for step in _candidates(steps)}
    watched = watched_rows(steps, found)
    shown: list[dict[str, Any]] = []
    for step in chosen_steps(steps, found, watched):
        try:
            groups = groups_of(folder, step)
        except DataError:
            continue  # `manylora rollouts` says so
        told = [_told_group(group, texts, most_bytes) for group in _picked(groups, watched)]
        shown.append({"step": step, "groups": told})
    return shown


# --- which steps, which prompts -------------------------------------------------------------------


def even_places(count: int) -> list[int]:
    """Return places among `count` ones, evenly spread, the first and the last among them."""
    most = min(MOST_STEPS, count)
    if most < 2:
        return list(range(most))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]


def _window(place: int, count: int) -> range:
    """Return the places that may stand for one; the first and the last stand for themselves."""
    if place in (0, count - 1):
        return range(place, place + 1)
    # Two windows have no place in common.
    gap = (count - 1) // (MOST_STEPS - 1)
    reach = min(REACH, max(0, (gap - 1) // 2))
    return range(max(1, place - reach), min(count - 1, place + reach + 1))


def _candidates(steps: Sequence[int]) -> list[int]:
    places = {p for place in even_places(len(steps)) for p in _window(place, len(steps))}
    return [steps[place] for place in sorted(places)]


def watched_rows(steps: Sequence[int], found: Mapping[int, Sequence[int]]) -> list[int]:
    """Return the rows of the prompts that can be followed longest, the best one first.

    Args:
        steps: all that there are.
        found: the rows of each step that may be chosen.
    """
    counts: Counter[int] = Counter()
    for place in even_places(len(steps)):
        near = [found[steps[p]] for p in _window(place, len(steps))]
        counts.update({row for rows in near for row in rows})
    first = found[steps[0]] if steps else ()
    # Of two that can be followed equally long, rather the one of the first step.
    order = sorted(counts, key=lambda row: (-counts[row], row not in first, row))
    return order[:MOST_PROMPTS]


def chosen_steps(
    steps: Sequence[int], found: Mapping[int, Sequence[int]], watched: Sequence[int]
) -> list[int]:
    """Return the steps to show: of those about each even place, the one with most of the watched
    prompts, and the nearest of equals."""
    chosen: set[int] = set()
    for place in even_places(len(steps)):
        window = _window(place, len(steps))

        def worth(p: int, place: int = place) -> tuple[int, int, int]:
            seen = set(found[steps[p]]) & set(watched)
            return len(seen), -abs(p - place), -p

        chosen.add(steps[max(window, key=worth)])
    return sorted(chosen)


def _picked(groups: Sequence[Group], watched: Sequence[int]) -> list[Group]:
    """Return the groups of the watched prompts, and others until there are enough."""
    usable = [group for group in groups if group["rollouts"] or group["errors"]]

    def rank(group: Group) -> tuple[int, bool, int]:
        row = group["row"]
        return (
            watched.index(row) if row in watched else len(watched),
            group["advantages"] is None,
            group["group"],
        )

    picked: dict[int, Group] = {}
    for group in sorted(usable, key=rank):
        picked.setdefault(group["row"], group)
    return list(picked.values())[:MOST_PROMPTS]


# --- what is told of a group ----------------------------------------------------------------------


def _told_group(group: Group, texts: TokenTexts, most_bytes: int) -> dict[str, Any]:
    order = ranked(samples_of([group]))
    silent = is_silent(group)
    shown = [order[0], order[-1]] if len(order) > 1 else order
    rewards = [sample.reward for sample in order]
    prompt = order[0].prompt(texts) if order else ""
    return {
        "row": group["row"],
        "prompt": within(prompt, most_bytes),
        "version": group["version"],
        "samples": len(order),
        "reward": math.fsum(rewards) / len(rewards) if rewards else None,
        "silent": silent and bool(order),
        "trained": group["advantages"] is not None,
        "errors": [within(error, ERROR_BYTES) for error in group["errors"][:MOST_ERRORS]],
        "more_errors": max(0, len(group["errors"]) - MOST_ERRORS),
        "shown": [_told_sample(sample, texts, most_bytes) for sample in shown],
    }


def _told_sample(sample: KeptSample, texts: TokenTexts, most_bytes: int) -> dict[str, Any]:
    rollout, (oldest, newest) = sample.rollout, sample.versions
    spans, left_out = _spans(sample, texts, most_bytes)
    parts = list(rollout["parts"].items())[:MOST_PARTS]
    return {
        "reward": sample.reward,
        "parts": {within(name, PART_BYTES): value for name, value in parts},
        "advantage": sample.advantage,
        "length": sample.num_sampled,
        "stop": within(rollout["stop_reason"], PART_BYTES),
        "turns": rollout["turns"],
        "versions": [oldest, newest],
        "spans": spans,
        "left_out": left_out,
    }


def _spans(
    sample: KeptSample, texts: TokenTexts, most_bytes: int
) -> tuple[list[dict[str, Any]], int]:
    """Return what follows the prompt until the bytes are used up, and how many tokens are left out.

    A span that was drawn has its tokens' texts and probabilities; another, which is masked out of
    the loss, has its text.
    """
    spans: list[dict[str, Any]] = []
    left, left_out = most_bytes, 0
    for segment, drawn, start, stop in sample.spans():
        if left <= 0:
            left_out += stop - start
            continue
        if drawn:
            # A token takes some bytes at least; those beyond need no text.
            end = min(stop, start + left)
            pieces = texts.pieces(segment["tokens"], start, end)
            kept = list(_fitting(pieces, _probabilities(segment, start), left))
            spans.append({"texts": [text for text, _ in kept], "p": [p for _, p in kept]})
            left -= sum(_size(text) + _size(p) + 2 for text, p in kept)
            if len(kept) < stop - start:
                left_out, left = left_out + stop - start - len(kept), 0
        else:
            text = texts.whole(segment["tokens"][start : min(stop, start + left)])
            shown = within(text, left)
            spans.append({"given": shown})
            left -= _size(shown)
            if shown != text:
                left = 0
    return spans, left_out


def _fitting(
    pieces: Sequence[str], probabilities: Iterator[float], most_bytes: int
) -> Iterator[tuple[str, float]]:
    for text, p in zip(pieces, probabilities, strict=False):
        most_bytes -= _size(text) + _size(p) + 2
        if most_bytes < 0:
            return
        yield text, p


def _probabilities(segment: Mapping[str, Any], start: int) -> Iterator[float]:
    """Return with what probability each token from `start` on was drawn."""
    first = segment["sampled"].index(start)
    for logprob in segment["logprobs"][first:]:
        yield round(math.exp(min(0.0, logprob)), 3)


def within(text: str, most_bytes: int) -> str:
    """Return the beginning of a text that takes so many bytes in the page."""
    if _size(text) <= most_bytes:
        return text
    # Longer beginnings take more bytes; none has more characters than bytes.
    lengths = range(min(len(text), most_bytes) + 1)
    fitting = bisect_right(lengths, most_bytes, key=lambda n: _size(f"{text[:n]} …"))
    return f"{text[: max(0, fitting - 1)]} …"


def _size(value: Any) -> int:
    """Return a value's bytes in the page, where `<`, `>` and `&` are written as escapes."""
    text = json.dumps(value, ensure_ascii=False)
    marks = sum(text.count(mark) for mark in "<>&\u2028\u2029")
    return len(text.encode("utf-8", "surrogatepass")) + 5 * marks
