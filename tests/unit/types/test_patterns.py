"""Patterns of other people: what `re` says of them, within bounds."""

import random
import re
import time

import pytest

from manylora.types.patterns import LONGEST, BadPattern, Matching, compiled

NAMES = [f"model.layers.{n}.{leaf}" for n in (0, 7, 23) for leaf in ("self_attn.q_proj", "mlp.up")]
NAMES += ["lm_head", "a.b", "q_proj", "experts.0.w1", "Model.Layers"]
PARTS = ["model", "layers", "q_proj", "_", ".", r"\.", r"\d+", r"\w*", "[a-m]", "(", ")", "(?:"]
PARTS += ["|", "*", "+", "?", "{2}", "{1,3}", "{,2}", "$", "^", "(?i)", "(?=q)", "(?!q)", "0", "?"]

# Without bounds each of these takes more time, or memory, than there is.
HOSTILE = [
    r"((.|\w)*)*[0-9]",
    r"(.*)(.*)(.*)(.*)(.*)(.*)(?:\1|\2|\3)+0",
    r"((\w|\.)+)+0",
    r"(?:(?:(?:a{1000}){1000}){1000})",
    r"(?:.{0,60000}){60000}",
    r"(a{0000000000000000000060000}){60000}",
    "(" * 20_000,
    "(?:" * 400 + ")" * 400,
    r"a{99999999999999999999}",
    "x" * (LONGEST + 1),
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_no_pattern_takes_long(pattern: str):
    begun = time.process_time()
    with pytest.raises(BadPattern, match=r".+"):
        matching = Matching()
        for number in range(100_000):
            matching.full(pattern, f"model.layers.{number}.self_attn.some_long_name.q_proj_x")
    assert time.process_time() - begun < 30.0  # a safety limit; they take about one second


def test_the_meaning_is_that_of_re():
    draw = random.Random(0)
    understood = 0
    for _ in range(4000):
        pattern = "".join(draw.choices(PARTS, k=draw.randint(1, 7)))
        try:
            theirs = re.compile(pattern)
        except re.error:
            with pytest.raises(BadPattern):
                compiled(pattern)
            continue
        understood += 1
        matching = Matching(30.0)
        for name in NAMES:
            assert matching.full(pattern, name) is (theirs.fullmatch(name) is not None), pattern
            start, other = matching.start(pattern, name), theirs.match(name)
            assert (start and start.span()) == (other and other.span()), pattern
    assert understood > 1000


@pytest.mark.parametrize("pattern", ["(?:q_prj){e<=1}", r"\p{L}+", "q{x}", "(?R)?", r"\m\w+\M"])
def test_what_only_the_other_library_understands_is_refused(pattern: str):
    with pytest.raises(BadPattern):
        compiled(pattern)


def test_a_long_list_of_names_is_no_trouble():
    names = [f"model.layers.{n}.self_attn.q_proj" for n in range(1000)]
    matching, pattern = Matching(), "|".join(re.escape(name) for name in names)
    assert all(matching.full(pattern, name) for name in names)
    assert not matching.full(pattern, "model.layers.1000.self_attn.q_proj")
