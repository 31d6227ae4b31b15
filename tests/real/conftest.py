"""The real base; every test here is marked `real` and run by `make real`."""

from pathlib import Path

import pytest

from tests.real.base import real_base as made


@pytest.fixture(scope="session")
def real_base() -> Path:
    """SmolLM2-135M-Instruct in fp32."""
    return made("fp32")


@pytest.fixture(scope="session")
def real_base_bf16() -> Path:
    """The same base in bf16."""
    return made("bf16")
