"""The service over the real base, driven by the stock SDK: two tenants train at once."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.real.plain_peft import encode
from tests.real.tenants import rows

# The SDK reads these when it is imported.
os.environ["TINKER_TELEMETRY"] = "0"
os.environ.pop("TINKER_BASE_URL", None)
os.environ.pop("TINKER_API_KEY", None)

import tinker

from tests.wire.server import BASE_ALIAS, DEVELOPER, Server
from tests.wire.weights import download, save_folder

pytestmark = pytest.mark.real

STEPS = 5


class RealServer(Server):
    """A server over the real base instead of seedling."""

    def __init__(self, base: Path, folder: Path) -> None:
        super().__init__(folder, "--base", str(base))


def sdk_data(tokenizer: Any, name: str) -> list[tinker.Datum]:
    """A tenant's rows, each weighted by its answer."""
    data = []
    for row in rows(name):
        tokens, labels = encode(tokenizer, row)
        weights = np.array([float(label >= 0) for label in labels[1:]], dtype=np.float32)
        data.append(
            tinker.Datum(
                model_input=tinker.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={
                    "target_tokens": tinker.TensorData.from_numpy(np.array(tokens[1:])),
                    "weights": tinker.TensorData.from_numpy(
                        weights / weights.sum() / len(rows(name))
                    ),
                },
            )
        )
    return data


def logprobs(result: tinker.ForwardBackwardOutput) -> list[Any]:
    """Of every datum."""
    return [output["logprobs"].to_numpy() for output in result.loss_fn_outputs]


# Said of every adapter on a tied head; the embedding is meant to stay as it is.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_two_tenants_train_download_and_load_in_peft(real_base: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(real_base)
    with RealServer(real_base, tmp_path / "data") as server:
        service = tinker.ServiceClient(base_url=server.url, api_key=DEVELOPER)
        tenants = {
            name: service.create_lora_training_client(BASE_ALIAS, rank=rank, seed=1).result()
            for name, rank in (("sql", 8), ("sentiment", 16))
        }
        data = {name: sdk_data(tokenizer, name) for name in tenants}
        first: dict[str, float] = {}
        for step in range(STEPS):
            futures = {
                name: (
                    client.forward_backward(data[name], "cross_entropy"),
                    client.optim_step(tinker.AdamParams(learning_rate=2e-3)),
                )
                for name, client in tenants.items()
            }
            for name, (forward, update) in futures.items():
                loss = forward.result().metrics["loss:sum"]
                update.result()
                if step == 0:
                    first[name] = loss
        for name, client in tenants.items():
            after = client.forward(data[name], "cross_entropy").result()
            assert after.metrics["loss:sum"] < 0.7 * first[name]
            path = client.save_weights_external("done").result().path
            folder = save_folder(download(server, path), tmp_path / name)
            check_with_peft(real_base, folder, data[name], logprobs(after))
        service.close("success").result(60)
        assert server.stop() == 0


def check_with_peft(base: Path, folder: Path, data: list[tinker.Datum], served: list[Any]) -> None:
    """The downloaded adapter gives the server's log-probabilities in stock PEFT."""
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    model.eval()
    for datum, mine_N in zip(data, served, strict=True):
        tokens = torch.tensor([datum.model_input.to_ints()])
        targets = torch.tensor(datum.loss_fn_inputs["target_tokens"].to_numpy())
        with torch.no_grad():
            logprobs_NV = model(tokens).logits[0].log_softmax(-1)
        theirs_N = logprobs_NV.gather(1, targets[:, None])[:, 0].numpy()
        np.testing.assert_allclose(mine_N, theirs_N, atol=1e-3)
