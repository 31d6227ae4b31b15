"""An adapter's factors as the server hands them out: exported in PEFT's format and downloaded."""

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tinker
from safetensors.numpy import load

from tests.wire.server import DEVELOPER, Server

Array = np.ndarray[Any, Any]

PREFIX = "base_model.model."
WEIGHTS_FILE = "adapter_model.safetensors"


def download(server: Server, path: str, key: str = DEVELOPER) -> dict[str, bytes]:
    """Every file of an external checkpoint, by name."""
    rest = tinker.RestClient(base_url=server.url, api_key=key)
    answer = rest.get_external_weights_urls(path).result()
    files = {}
    for name, url in answer.urls.items():
        reply = httpx.get(url, headers={"X-API-Key": key}, trust_env=False)
        reply.raise_for_status()
        files[name] = reply.content
    return files


def save_folder(files: dict[str, bytes], folder: Path) -> Path:
    """The files on disk, as PEFT wants them."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def exported_factors(
    server: Server, client: tinker.TrainingClient, name: str, key: str = DEVELOPER
) -> dict[str, tuple[Array, Array]]:
    """A [R, K] and B [N, R] of each adapted layer, as they are after all that was submitted."""
    path = client.save_weights_external(name).result().path
    tensors = load(download(server, path, key)[WEIGHTS_FILE])
    layers = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors}
    return {
        layer: (
            tensors[f"{PREFIX}{layer}.lora_A.weight"],
            tensors[f"{PREFIX}{layer}.lora_B.weight"],
        )
        for layer in layers
    }


def assert_same_factors(
    given: dict[str, tuple[Array, Array]], expected: dict[str, tuple[Array, Array]]
) -> None:
    """The same layers, bit for bit."""
    assert given.keys() == expected.keys()
    for layer, matrices in expected.items():
        for mine, theirs in zip(given[layer], matrices, strict=True):
            assert np.array_equal(mine, theirs), layer


def assert_factors_close(
    given: dict[str, tuple[Array, Array]],
    expected: dict[str, tuple[Array, Array]],
    tolerance: float,
) -> None:
    """The same layers; no element further off than `tolerance` of its matrix's largest one."""
    assert given.keys() == expected.keys()
    for layer, matrices in expected.items():
        for which, one, other in zip("AB", given[layer], matrices, strict=True):
            assert one.shape == other.shape, (layer, which)
            assert one.dtype == np.float32, (layer, which)
            distance = float(np.abs(one - other).max())
            limit = tolerance * float(np.abs(other).max())
            assert distance <= limit, f"{which} of {layer}: {distance:.2e} > {limit:.2e}"
