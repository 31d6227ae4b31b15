import numpy as np

from manylora.sampling import Answer
from manylora.sampling.answers import from_bytes, to_bytes
from manylora.types import PromptScores, SampledSequence, TopK


def test_answers_come_back_as_they_were():
    best = TopK(np.array([[3, 1]], np.int32), np.array([[-0.5, -1.5]], np.float32))
    answers = [
        (7, Answer((SampledSequence((1, 2), (-0.1, float("-inf")), "stop", best),), None)),
        (9, Answer((), None, finite=False)),
        (
            4,
            Answer(
                (SampledSequence((), (), "length"), SampledSequence((5,), (-0.25,), "length")),
                PromptScores(np.array([np.nan, -2.0], np.float32), best, np.ones((1, 0))),
            ),
        ),
    ]
    found = from_bytes(to_bytes(answers))
    assert [number for number, _ in found] == [7, 9, 4]
    for (_, answer), (_, wanted) in zip(found, answers, strict=True):
        assert answer.finite == wanted.finite
        assert (answer.scores is None) == (wanted.scores is None)
        for one, other in zip(answer.sequences, wanted.sequences, strict=True):
            assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs)
            assert one.stop_reason == other.stop_reason
            assert (one.topk is None) == (other.topk is None)
    topk, scores = found[0][1].sequences[0].topk, found[2][1].scores
    assert topk is not None and topk.tokens.tolist() == [[3, 1]] and topk.tokens.dtype == np.int32
    assert scores is not None and scores.topk is not None
    np.testing.assert_array_equal(scores.logprobs, np.array([np.nan, -2.0], np.float32))
    assert scores.candidates is not None and scores.candidates.shape == (1, 0)


def test_no_answers_are_no_bytes():
    assert to_bytes([]) == b"" and from_bytes(b"") == []
