"""Tokenizers for all tests of runs."""

import pytest

from tests.unit.runs.small_tokenizer import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer():
    return make_tokenizer(adds_bos=True)


@pytest.fixture(scope="session")
def tokenizer_with_template():
    return lambda template: make_tokenizer(template=template)
