"""What is seen from outside without a key: downloads, health, the document of the routes."""

import json
import subprocess
import sys
import time
from email.utils import parsedate_to_datetime

import pytest

from tests.unit.service.client import Client, application
from tests.unit.service.fake_hub import EXTERNAL, MODEL, SAMPLER, SESSION, FakeHub
from tests.unit.service.test_routes import JSON_ROUTES, PATH


@pytest.fixture
def hub():
    return FakeHub()


# --- downloads --------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text("{}")
    weights.write_bytes(b"weights")
    return {"adapter_config.json": config, "adapter_model.safetensors": weights}


def test_external_weights_can_be_downloaded_without_a_key(files):
    hub = FakeHub(files)
    alice = Client(application(hub))
    place = f"/api/v1/training_runs/{MODEL}/checkpoints/{EXTERNAL.checkpoint_id}"
    urls = alice.get(f"{place}/external_weights_urls").json()["urls"]
    assert urls.keys() == files.keys()
    stranger = Client(alice.app, None)
    for name, url in urls.items():
        assert url.startswith("http://server/")
        answer = stranger.get(url)
        assert answer.content == files[name].read_bytes()
    url = urls["adapter_config.json"]
    for bad in (url[:-2], url.replace("external_weights/", "external_weights/a"), url + "x" * 5000):
        assert stranger.get(bad).status_code == 404
    assert stranger.get("/api/v1/external_weights/").status_code in (401, 404)
    files["adapter_config.json"].unlink()
    assert stranger.get(url).status_code == 404
    other = Client(application(hub), None)
    assert other.get(urls["adapter_model.safetensors"]).status_code == 404  # another secret
    assert alice.get(f"{PATH}/external_weights_urls").status_code == 404


def test_an_archive_is_fetched_by_the_address_that_its_owner_is_sent_to(hub):
    alice, bob = Client(application(hub)), Client(application(hub), "tml-bob")
    assert bob.get(f"{PATH}/archive").status_code == 404
    stranger = Client(alice.app, None)
    assert stranger.get(f"{PATH}/archive").status_code == 401
    sent = alice.get(f"{PATH}/archive")
    assert sent.status_code == 302
    left = parsedate_to_datetime(sent.headers["expires"]).timestamp() - time.time()
    assert 3500 < left <= 3601
    address = sent.headers["location"]
    answer = stranger.get(address)
    assert (answer.status_code, answer.content) == (200, b"arhiv")
    assert answer.headers["content-length"] == "5"
    assert answer.headers["content-type"] == "application/x-tar"
    assert [archive.closed for archive in hub.archives.opened] == [True]
    for bad in (address[:-2], address.replace("archives/", "archives/a")):
        assert stranger.get(bad).status_code == 404
    # A grant for one file is none for another, and neither way.
    token = address.rpartition("/")[2]
    assert stranger.get(f"/api/v1/external_weights/{token}").status_code == 404


def test_the_application_does_not_know_torch():
    """The import contract covers what modules name; this covers what really happens."""
    program = (
        "import sys, manylora.service.http.app; print(*{'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


# --- health and OpenAPI -----------------------------------------------------------------------


def test_health_and_readiness_differ(hub):
    stranger = Client(application(hub, metrics=lambda: "fill 1\n"), None)
    hub.is_ready = False
    assert stranger.get("/healthz").json() == {"status": "ok"}
    assert stranger.get("/readyz").status_code == 503
    hub.is_ready = True
    assert stranger.get("/readyz").json() == {"status": "ok"}
    assert stranger.get("/metrics").text == "fill 1\n"
    assert Client(application(hub), None).get("/metrics").status_code == 404


def test_figures_name_tenants_and_so_need_a_key_from_elsewhere(hub):
    app = application(hub, metrics=lambda: "fill 1\n")
    assert Client(app, None, host="10.0.0.7").get("/metrics").status_code == 401
    assert Client(app, host="10.0.0.7").get("/metrics").text == "fill 1\n"


def test_openapi_has_every_json_route_with_its_body(hub):
    document = Client(application(hub), None).get("/openapi.json").json()
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    for method, path, body, _ in JSON_ROUTES:
        place = path.partition("?")[0].replace(MODEL, "{model_id}").replace(SAMPLER, "{sampler_id}")
        place = place.replace(f"sessions/{SESSION}", "sessions/{session_id}")
        place = place.replace("weights/step-1", "{kind}/{name}")
        place = place.replace("external_weights/out", "{kind}/{name}")
        operation = document["paths"][place][method.lower()]
        if body is not None:
            content = operation["requestBody"]["content"]["application/json"]
            name = content["schema"]["$ref"].rpartition("/")[2]
            assert set(body) <= set(schemas[name]["properties"])
    references = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert references <= schemas.keys()
    assert "/api/v1/billing/{what}" not in document["paths"]
