"""Answers go as bytes (arrays and JSON, no pickle) from the ranks that found them to all others."""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from manylora.sampling.request import Answer
from manylora.types import PromptScores, SampledSequence, TopK
from manylora.types.data import Array


def to_bytes(answers: Sequence[tuple[int, Answer]]) -> bytes:
    """Return numbered answers as bytes; no answers give no bytes."""
    if not answers:
        return b""
    arrays: list[Array] = []

    def put(array: Array | None) -> int | None:
        if array is None:
            return None
        arrays.append(array)
        return len(arrays) - 1

    def topk(found: TopK | None) -> list[int | None] | None:
        return None if found is None else [put(found.tokens), put(found.logprobs)]

    entries: list[dict[str, Any]] = []
    for number, answer in answers:
        scores = answer.scores
        entries.append(
            {
                "number": number,
                "finite": answer.finite,
                "sequences": [
                    [
                        put(np.array(one.tokens, np.int64)),
                        put(np.array(one.logprobs, np.float64)),
                        one.stop_reason,
                        topk(one.topk),
                    ]
                    for one in answer.sequences
                ],
                "scores": None
                if scores is None
                else [put(scores.logprobs), topk(scores.topk), put(scores.candidates)],
            }
        )
    header = np.frombuffer(json.dumps(entries).encode(), np.uint8)
    buffer = io.BytesIO()
    named: dict[str, Any] = {str(i): array for i, array in enumerate(arrays)}
    np.savez(buffer, header=header, **named)
    return buffer.getvalue()


def from_bytes(data: bytes) -> list[tuple[int, Answer]]:
    """Return the answers that `to_bytes` was given."""
    if not data:
        return []
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        entries = json.loads(arrays["header"].tobytes())

        def got(place: int | None) -> Any:
            return None if place is None else arrays[str(place)]

        def topk(places: list[int] | None) -> TopK | None:
            return None if places is None else TopK(got(places[0]), got(places[1]))

        answers = []
        for entry in entries:
            sequences = tuple(
                SampledSequence(
                    tuple(got(tokens).tolist()), tuple(got(logprobs).tolist()), reason, topk(best)
                )
                for tokens, logprobs, reason, best in entry["sequences"]
            )
            places = entry["scores"]
            scores = None
            if places is not None:
                scores = PromptScores(got(places[0]), topk(places[1]), got(places[2]))
            answers.append((entry["number"], Answer(sequences, scores, entry["finite"])))
    return answers
