"""Runs that are submitted join and leave while other tenants train; each ends for itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from safetensors.numpy import load
from transformers import AutoTokenizer

from manylora.models.base import resolve_base
from manylora.runs.train import train_run_file
from tests.threads import SESSION, under
from tests.wire.data import forward, random_data, sdk_adam, to_sdk
from tests.wire.plain import Plain, entry, lines
from tests.wire.server import BASE_ALIAS, DEVELOPER, Server, create_key
from tests.wire.test_crash import STEP
from tests.wire.weights import WEIGHTS_FILE, download

BAD = lines(count=6) + '{"prompt": "half a row"}\n' + lines(count=6)
PROBE = random_data(5, 2)


def tensors(server: Server, path: str) -> dict[str, Any]:
    return load(download(server, path)[WEIGHTS_FILE])


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, matrix in other.items():
        assert np.array_equal(one[name], matrix), name


@pytest.fixture
def trained_alone(tmp_path: Path):
    """What `manylora train` makes of an adapter, on one thread as servers here run."""

    def train(adapter: dict[str, Any], text: str) -> dict[str, Any]:
        from manylora.config import RunFile

        data = tmp_path / "alone.jsonl"
        data.write_text(text)
        named = {**adapter, "sft": {**adapter["sft"], "train": str(data)}}
        content = {"base": "seedling", "out": str(tmp_path / "out"), "adapters": [named]}
        run = RunFile.model_validate_json(
            json.dumps({**content, "report": False, "tensorboard": False})
        )
        with under(SESSION):
            assert train_run_file(run, view="json") == 0
        folder = tmp_path / "out" / adapter["name"] / "final"
        content_of = (folder / WEIGHTS_FILE).read_bytes()
        shutil.rmtree(tmp_path / "out")
        return load(content_of)

    return train


def test_runs_beside_a_client_and_a_bad_line_that_fails_alone(
    serve, connect, trained_alone
) -> None:
    server: Server = serve("--max-resident", "2")
    plain = Plain(server)
    client = connect(server).create_lora_training_client(BASE_ALIAS, rank=3, seed=1).result()

    def learn(first: int) -> float:
        steps = []
        for number in range(first, first + 5):
            client.forward_backward(to_sdk(random_data(number, 2)), "cross_entropy")
            steps.append(client.optim_step(sdk_adam(STEP)))
        return steps[-1].result().metrics["optim/step"]

    assert learn(0) == 5
    small, large = entry("small", rank=2, seed=7), entry("large", rank=8, steps=9)
    held_out = {**large, "sft": {**large["sft"], "eval": "held-out.jsonl"}}
    ids = [plain.submit(small, lines()), plain.submit(held_out, lines(start=9), lines(count=8))]
    bad = plain.submit(entry("bad"), BAD)
    assert learn(5) == 10
    failed = plain.until(bad)
    assert failed["status"] == "failed" and "path" not in failed
    assert failed["error"]["type"] == "DataError"
    assert failed["error"]["message"].startswith("bad.jsonl:7: has no 'completion'")
    runs = [plain.until(run_id) for run_id in ids]
    assert [run["status"] for run in runs] == ["completed", "completed"]
    assert [run["step"] for run in runs] == [12, 9]
    assert [row["step"] for row in runs[0]["metrics"]] == list(range(1, 13))
    assert runs[0]["metrics"][-1]["loss"] == runs[0]["last_loss"] < runs[0]["first_loss"]
    assert runs[1]["eval_after"]["loss"] < runs[1]["eval_before"]["loss"]
    assert runs[1]["eval_after"]["samples"] == 8
    # Nobody has changed anybody's numbers: neither paging, nor the client, nor the bad run.
    assert_same(tensors(server, runs[0]["external_path"]), trained_alone(small, lines()))
    assert_same(tensors(server, runs[1]["external_path"]), trained_alone(large, lines(start=9)))
    assert plain.ok("GET", "runs")["cursor"]["total_count"] == 3
    assert learn(10) == 15


def test_what_a_run_made_is_a_model_like_any_other(server: Server, connect) -> None:
    plain, service = Plain(server), connect(server)
    run = plain.until(plain.submit(entry("model", rank=5), lines()))
    client = service.create_training_client_from_state_with_optimizer(run["path"]).result()
    before = forward(client, PROBE)
    client.forward_backward(to_sdk(PROBE), "cross_entropy")
    assert client.optim_step(sdk_adam(STEP)).result().metrics["optim/step"] == 13
    assert not np.array_equal(forward(client, PROBE)[0], before[0])
    sampled = run["path"].replace("/weights/", "/sampler_weights/")
    sampler = service.create_sampling_client(model_path=sampled).result()
    prompt = tinker.ModelInput.from_ints([9, 10, 11])
    params = tinker.SamplingParams(max_tokens=4, temperature=0.0)
    assert sampler.sample(prompt, 1, params).result().sequences[0].tokens
    rest = tinker.RestClient(base_url=server.url, api_key=DEVELOPER)
    listed = rest.list_checkpoints(run["path"].split("/")[2]).result().checkpoints
    assert {c.checkpoint_id for c in listed} == {
        "weights/final", "sampler_weights/final", "external_weights/final",
    }  # fmt: skip
    info = rest.get_weights_info_by_tinker_path(run["path"]).result()
    assert (info.lora_rank, info.base_model) == (5, "seedling")


def test_an_answer_ends_where_its_run_was_trained_to_end(serve, connect) -> None:
    """At the tokens that the run's files record; a request that names tokens has its own."""
    server: Server = serve()
    plain, service = Plain(server), connect(server)
    tokenizer = AutoTokenizer.from_pretrained(resolve_base("seedling"), trust_remote_code=False)
    assert tokenizer is not None
    prompt = tinker.ModelInput.from_ints(tokenizer.encode("3+1="))

    def sampled(sampler: tinker.SamplingClient, **given: Any) -> Any:
        params = tinker.SamplingParams(max_tokens=4, temperature=0.0, **given)
        return sampler.sample(prompt, 1, params).result().sequences[0]

    base = service.create_sampling_client(base_model=BASE_ALIAS).result()
    first = sampled(base, stop=[]).tokens[0]
    trained = entry("ended", steps=1, optimizer={"lr": 1e-9})
    trained["sft"]["eos"] = tokenizer.convert_ids_to_tokens(first)
    run = plain.until(plain.submit(trained, lines(start=40, count=8)))
    assert run["status"] == "completed", run
    path = run["path"].replace("/weights/", "/sampler_weights/")
    sampler = service.create_sampling_client(model_path=path).result()
    answer = sampled(sampler)
    assert (answer.tokens, answer.stop_reason) == ([first], "stop")
    assert len(sampled(sampler, stop=[]).tokens) == 4
    assert sampled(sampler, stop=["no such text"]).tokens == [first]


def test_a_cancelled_run_keeps_what_it_has_learned(server: Server) -> None:
    plain = Plain(server)
    run_id = plain.submit(entry("long", steps=100_000), lines())
    plain.until(run_id, "running", step=8)
    assert plain.ok("DELETE", f"runs/{run_id}")["status"] in ("cancelling", "cancelled")
    run = plain.until(run_id, "cancelled")
    assert 8 <= run["step"] < 100_000
    assert run["path"].endswith("/weights/last") and "external_path" not in run
    assert len(run["metrics"]) == min(run["step"], 1000)
    assert plain.ok("DELETE", f"runs/{run_id}")["status"] == "cancelled"
    assert plain.ok("GET", f"runs/{run_id}?after={run['step'] - 2}")["metrics"][0]["step"] == (
        run["step"] - 1
    )


def test_a_killed_server_goes_on_with_its_runs_to_the_same_bits(serve) -> None:
    adapter, text = entry("steady", steps=60, lora={"rank": 4, "dropout": 0.1}), lines()
    calm: Server = serve(folder="calm")
    expected = Plain(calm).until(Plain(calm).submit(adapter, text))
    shaken: Server = serve("--max-resident", "1", folder="shaken")
    plain = Plain(shaken)
    ids = [plain.submit(adapter, text), plain.submit(entry("beside", steps=60), lines(start=3))]
    doomed = plain.submit(entry("doomed", steps=100_000), text)
    for step in (8, 30):
        plain.until(ids[0], "running", step=step)
        shaken.restart()
    plain.until(doomed, "running", step=10)
    plain.ok("DELETE", f"runs/{doomed}")
    shaken.restart()
    run = plain.until(ids[0])
    assert run["status"] == "completed" and run["resumed_from"] >= 5
    assert [row["step"] for row in run["metrics"]] == list(range(1, 61))
    assert [r["loss"] for r in run["metrics"]] == [r["loss"] for r in expected["metrics"]]
    assert_same(tensors(shaken, run["external_path"]), tensors(calm, expected["external_path"]))
    assert plain.until(ids[1])["status"] == "completed"
    assert plain.until(doomed)["status"] == "cancelled"


def test_a_stopping_server_saves_its_runs_where_they_are(serve) -> None:
    server: Server = serve()
    plain = Plain(server)
    # Without a state on the way: whatever is there after the restart was saved by the stop.
    run_id = plain.submit(entry("unsaved", steps=40, save_every=0), lines())
    plain.until(run_id, "running", step=6)
    assert server.stop() == 0
    server.start()
    run = plain.until(run_id)
    assert run["status"] == "completed" and run["resumed_from"] >= 6


def test_data_of_the_servers_folders_and_nothing_outside(serve, tmp_path: Path) -> None:
    roots = tmp_path / "roots"
    (roots / "deep").mkdir(parents=True)
    (roots / "deep" / "sums.jsonl").write_text(lines())
    (tmp_path / "secret.jsonl").write_text(lines())
    (roots / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    server: Server = serve("--data-root", str(roots))
    plain = Plain(server)

    def named(train: str, **lora: Any) -> Any:
        sft = {"train": train, "batch_size": 4, "max_steps": 2}
        return plain.call("POST", "runs", {"adapter": {"name": "x", "sft": sft, "lora": lora}})

    taken = named("deep/sums.jsonl")
    assert plain.until(taken.json()["id"])["status"] == "completed"
    outside = (str(tmp_path / "secret.jsonl"), "../secret.jsonl", "link.jsonl", "none.jsonl")
    for name in outside:
        reply = named(name)
        assert reply.status_code == 400 and "no such file in the server's data" in reply.text
    for reply, words in (
        (named("org/name"), "loads nothing from a hub"),
        (named("deep/sums.jsonl", init_from="/etc"), "init_from"),
        (named("deep/sums.jsonl", targets="(a+)+b"), "regular expression"),
        (named("deep/sums.jsonl", rank_pattern={"(a+)+b": 2}), "regular expression"),
    ):
        assert reply.status_code == 400 and words in reply.text
    assert named("deep/sums.jsonl", rank=4096).status_code == 413
    reply = plain.call("POST", "runs", {"adapter": entry("x"), "callback": "http://a"})
    assert reply.status_code == 422 and "callback" in reply.text
    assert [run["status"] for run in plain.ok("GET", "runs")["runs"]] == ["completed"]


def test_anothers_runs_and_adapters_are_not_there(serve, connect, tmp_path: Path) -> None:
    ann, bob = (create_key(tmp_path / "data", name) for name in ("ann", "bob"))
    server: Server = serve()
    hers, his = Plain(server, ann), Plain(server, bob)
    run_id = hers.submit(entry("hers", steps=2), lines())
    model = connect(server, ann).create_lora_training_client(BASE_ALIAS, rank=2).result()
    for method, path, missing in (
        ("GET", f"runs/{run_id}", "runs/none"),
        ("DELETE", f"runs/{run_id}", "runs/none"),
        ("GET", f"adapters/{model.model_id}", "adapters/none"),
        ("DELETE", f"adapters/{model.model_id}", "adapters/none"),
    ):
        there, nowhere = his.call(method, path), his.call(method, missing)
        assert there.status_code == nowhere.status_code == 404
        words = [reply.json()["error"].replace(path, missing) for reply in (there, nowhere)]
        assert words[0].replace(model.model_id, "none") == words[1]
    assert his.ok("GET", "runs")["runs"] == [] and his.ok("GET", "adapters")["adapters"] == []
    assert hers.until(run_id)["status"] == "completed"


def test_adapters_are_listed_and_closed(server: Server, connect) -> None:
    plain = Plain(server)
    client = connect(server).create_lora_training_client(BASE_ALIAS, rank=6).result()
    client.forward_backward(to_sdk(PROBE), "cross_entropy")
    client.optim_step(sdk_adam(STEP)).result()
    own = [a for a in plain.ok("GET", "adapters")["adapters"] if a["adapter_id"] == client.model_id]
    assert [(a["rank"], a["step"]) for a in own] == [(6, 1)]
    assert plain.ok("GET", f"adapters/{client.model_id}")["step"] == 1
    plain.ok("DELETE", f"adapters/{client.model_id}")
    assert plain.call("GET", f"adapters/{client.model_id}").status_code == 410
    kept = plain.ok("GET", f"training_runs/{client.model_id}/checkpoints")["checkpoints"]
    assert [c["checkpoint_id"] for c in kept] == ["weights/last"]
