"""What the oldest supported SDK does, printed as JSON; run by test_old_sdk.py in its own process.

usage: python sdk025_script.py URL KEY BASE < data.json
"""

import json
import os
import sys
from typing import Any

import numpy as np
import tinker


def datum(row: dict[str, Any]) -> tinker.Datum:
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(row["tokens"]),
        loss_fn_inputs={
            name: tinker.TensorData.from_numpy(
                np.array(values, dtype=np.int64 if name == "target_tokens" else np.float32)
            )
            for name, values in row["inputs"].items()
        },
    )


def logprobs(result: tinker.ForwardBackwardOutput) -> list[list[float]]:
    return [output["logprobs"].to_numpy().tolist() for output in result.loss_fn_outputs]


def main() -> None:
    url, key, base = sys.argv[1:]
    work = json.load(sys.stdin)
    service = tinker.ServiceClient(base_url=url, api_key=key)
    client = service.create_lora_training_client(base, rank=4, seed=1)
    probe = [datum(row) for row in work["probe"]]
    seen: dict[str, Any] = {"version": tinker.__version__, "outputs": [], "metrics": []}
    for step in work["steps"]:
        result = client.forward_backward(
            [datum(row) for row in step["data"]], step["loss"], step["config"] or None
        )
        stepped = client.optim_step(tinker.AdamParams(**step["adam"]))
        seen["outputs"].append(logprobs(result.result()))
        seen["metrics"].append(result.result().metrics)
        stepped.result()
    seen["trained"] = logprobs(client.forward(probe, "cross_entropy").result())
    path = client.save_state("old").result().path
    for name, load in (
        ("loaded", service.create_training_client_from_state),
        ("resumed", service.create_training_client_from_state_with_optimizer),
    ):
        seen[name] = logprobs(load(path).forward(probe, "cross_entropy").result())
    sampler = client.save_weights_and_get_sampling_client()
    prompt = tinker.ModelInput.from_ints(work["prompt"])
    seen["scores"] = sampler.compute_logprobs(prompt).result()
    answer = sampler.sample(
        prompt,
        2,
        tinker.SamplingParams(max_tokens=6, seed=3, stop=[]),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
    ).result()
    seen["samples"] = [[s.tokens, s.logprobs, s.stop_reason] for s in answer.sequences]
    seen["topk"] = answer.topk_prompt_logprobs
    named = client.save_weights_for_sampler("old").result().path
    other = service.create_sampling_client(model_path=named)
    seen["named"] = other.compute_logprobs(prompt).result()
    rest = service.create_rest_client()
    found = rest.list_checkpoints(client.model_id).result().checkpoints
    seen["checkpoints"] = sorted(one.checkpoint_id for one in found)
    # The newest SDK, which the types are checked against, has no such method any more.
    archive: Any = rest.get_checkpoint_archive_url_from_tinker_path  # pyrefly: ignore[missing-attribute]
    seen["archive"] = archive(named).result().url
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # That SDK leaves a thread of its own running, which may abort an interpreter that ends.
    os._exit(0)
