"""What a client is told of an error, where no route can bring it about on every machine."""

from manylora.service.http_errors import ErrorAnswer, answer_to
from manylora.types import DoesNotFit


def test_what_does_not_fit_is_not_sent_again():
    words = (
        "adapter 'big' needs 9.0 GiB of memory and 1.0 GiB is free; a rank of at most 7 would fit"
    )
    assert answer_to(DoesNotFit(words), "r") == ErrorAnswer(400, words, "user")
