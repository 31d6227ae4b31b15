"""What a user can do nothing about is not said: a command's stderr holds its own words alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from manylora.models.base import resolve_base
from manylora.models.tokenizer import open_tokenizer

RUN = """\
base: ./base
out: out
adapters:
  - {name: a, sft: {train: d.jsonl, batch_size: 1, max_steps: 1}}
"""
ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}

# As on a CPU with AVX-512 and bf16, where bitsandbytes looks for a kernel of a model hub.
BF16_CPU = """\
import sys
from importlib.machinery import PathFinder


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "bitsandbytes.functional":
            return None
        spec = PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module.has_avx512bf16 = lambda: True

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder)
"""
KEPT_AWAY = """
from manylora.models.quantized import conversions
conversions()
import logging
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("something else")
"""


def python(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run file, its data, and a base whose tokenizer asks for a clean-up that never happens."""
    shutil.copytree(resolve_base("seedling"), tmp_path / "base")
    config = tmp_path / "base" / "tokenizer_config.json"
    flag = {"clean_up_tokenization_spaces": True}
    config.write_text(json.dumps({**json.loads(config.read_text()), **flag}))
    (tmp_path / "d.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path


@pytest.mark.parametrize("more", [[], ["--set", "quantization=nf4"]], ids=["plain", "nf4"])
def test_a_dry_run_has_nothing_to_warn_of(folder: Path, more: list[str]):
    done = python(folder, "-m", "manylora.cli.main", "train", "run.yaml", "--dry-run", *more)
    assert "Qwen3ForCausalLM" in done.stdout
    assert done.stderr == ""


def test_a_run_says_only_what_it_does(folder: Path):
    words = ["train", "run.yaml", "--set", "quantization=nf4"]
    done = python(folder, "-m", "manylora.cli.main", *words)
    begins = ("1 adapter on ", "opening ", "a  ")
    assert [line for line in done.stderr.splitlines() if not line.startswith(begins)] == []


def test_a_tokenizer_decodes_as_its_files_say(folder: Path):
    """Byte-pair tokenizers never clean up; one that is forced to does it still."""
    text = "Well , yes ."
    tokenizer = open_tokenizer(str(folder / "base"))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    path = folder / "base" / "tokenizer_config.json"
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    path.write_text(json.dumps({**json.loads(path.read_text()), forced: True}))
    assert open_tokenizer(str(folder / "base")).decode(ids) == "Well, yes."


def test_a_kernel_that_is_kept_away_is_not_missed(tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    done = python(tmp_path, "-c", BF16_CPU + KEPT_AWAY)
    assert done.stderr == "something else\n"
