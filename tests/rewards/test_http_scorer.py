"""A scorer on 127.0.0.1: what it is sent, what its answers mean, and what happens while it is down."""

import io
import json
import re
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo.config import GRPORecipe, UserError, load_recipe
from grpo.models import ClassCondition
from grpo.rewards import DecodedBatch
from grpo.rewards.http_scorer import HTTPScorer


@pytest.fixture
def batch():
    """Three completions of two conditions."""
    images = torch.tensor([-1.5, 0.0, 1.0])[:, None, None, None].expand(3, 3, 2, 4)
    condition = ClassCondition(torch.tensor([1, 3, 3]))
    places, real = torch.tensor([0, 1, 1]), torch.zeros(2, 3, 2, 4)
    return DecodedBatch(images, torch.zeros(3, 4, dtype=torch.int64), condition, real, places, ["a dog", "a bird"])


@pytest.fixture
def serve(monkeypatch):
    """answer(request number, arrays) -> status and body of a server; its address and what it has got."""
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(answer):
        got = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
                    got.append(dict(arrays))
                status, text = answer(len(got), got[-1])
                self.send_response(status)
                self.end_headers()
                for part in [text] if isinstance(text, str) else text:
                    self.wfile.write(part.encode())

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *_: None  # of a client that has gone
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/score", got

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def build(url, context=None, **keys):
    return HTTPScorer(HTTPScorer.Settings(kind="http", url=url, retry_seconds=0.001, **keys), context)


def test_the_protocol(serve, batch):
    url, got = serve(lambda number, arrays: (200, json.dumps({"scores": [0.5, None, 2]})))
    scores = build(url, arguments={"question": "is it sharp?"})(batch)
    torch.testing.assert_close(scores, torch.tensor([0.5, float("nan"), 2.0]), equal_nan=True)
    (request,) = got
    assert request["images"].shape == (3, 2, 4, 3)
    assert request["images"].dtype == np.uint8
    assert request["images"][:, 0, 0, 0].tolist() == [0, 128, 255]
    assert json.loads(bytes(request["about"])) == {
        "captions": ["a dog", "a bird", "a bird"],
        "class_ids": [1, 3, 3],
        "arguments": {"question": "is it sharp?"},
    }


def test_it_is_tried_again(serve, batch):
    url, got = serve(lambda number, arrays: (503 if number < 3 else 200, '{"scores": [1, 2, 3]}'))
    assert build(url, retries=2)(batch).tolist() == [1.0, 2.0, 3.0]
    assert len(got) == 3


def test_a_server_that_is_down_has_no_opinion_and_is_not_waited_for_again(serve, batch, caplog):
    url, got = serve(lambda number, arrays: (200 if number == 5 else 500, '{"scores": [1, 2, 3]}'))
    reward = build(url, retries=2)
    assert reward(batch).isnan().all()
    assert reward(batch).isnan().all()
    assert len(got) == 3 + 1
    assert reward(batch).tolist() == [1.0, 2.0, 3.0]
    assert reward(batch).isnan().all()
    assert len(got) == 3 + 1 + 1 + 3
    assert [record.getMessage() for record in caplog.records] == [
        f"{url}: no answer after 3 tries: 500 Internal Server Error; its completions count as without opinion"
    ] * 2


def test_nobody_there_and_a_time_out(serve, batch):
    assert build("http://127.0.0.1:9/score", retries=1)(batch).isnan().all()
    waiting = threading.Event()
    url, _ = serve(lambda number, arrays: (200, str(waiting.wait(5))))
    assert build(url, retries=0, timeout=0.1)(batch).isnan().all()
    waiting.set()


def test_an_answer_has_one_deadline_however_it_drips(serve, batch):
    def drip():
        for _ in range(40):
            time.sleep(0.1)
            yield " "
        yield '{"scores": [1, 2, 3]}'

    url, _ = serve(lambda number, arrays: (200, drip()))
    start = time.monotonic()
    assert build(url, retries=0, timeout=0.5)(batch).isnan().all()
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("status", "text", "told"),
    [
        (404, "", "has refused the request: 404 Not Found"),
        (302, "", "redirects to nowhere: set url"),
        (200, '{"scores": [1' + "0" * 400 + ", 2, 3]}", "must answer with a JSON object with scores"),
        (200, '{"scores": {"1": 0, "2": 0, "3": 0}}', "must answer with a JSON object with scores"),
        (200, '{"scores": "123"}', "must answer with a JSON object with scores"),
        (200, '{"scores": [1, "2", 3]}', "must answer with a JSON object with scores"),
        (200, '{"scores": [1, true, 3]}', "must answer with a JSON object with scores"),
        (200, '{"scores": [1, NaN, 3]}', "must answer with a JSON object with scores"),
        (200, "no JSON", "must answer with a JSON object with scores"),
        (200, "[1, 2, 3]", "must answer with a JSON object with scores"),
        (200, '{"scores": [1, "a", 3]}', "must answer with a JSON object with scores"),
        (200, '{"scores": 1}', "must answer with a JSON object with scores"),
        (200, '{"scores": [1, 2]}', "has answered 2 scores for 3 images"),
    ],
)
def test_a_wrong_answer_stops_the_run(serve, batch, status, text, told):
    url, _ = serve(lambda number, arrays: (status, text))
    with pytest.raises(UserError, match=f"^{re.escape(url)}: {told}"):
        build(url)(batch)


def load(**values):
    flags = ["--data.name", "synthetic", "--reward.judge.kind", "http"]
    return load_recipe(GRPORecipe, flags + [word for key, value in values.items() for word in (f"--{key}", value)])


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("127.0.0.1:8000", "must begin with http"),
        ("file:///etc/passwd", "must begin with http"),
        ("http://", "must begin with http"),
        ("http://[::1", "must be an address"),
        ("http://h:abc/", "must be an address"),
        ("http://h:99999/", "must be an address"),
        ("http://h:0/", "must name a server and a port"),
        ("http://.../", "must name a server and a port"),
        (f"http://{'h' * 300}/", "must name a server and a port"),
        ("http://user:pw@h/", "must have no user"),
        ("http://h/a b", "must be of ASCII"),
        ("http://h/\N{LATIN SMALL LETTER E WITH ACUTE}", "must be of ASCII"),
        ("http://h/\x01", "must be of ASCII"),
    ],
)
def test_other_addresses_are_refused_with_the_recipe(url, told):
    with pytest.raises(UserError, match=rf"reward\.judge\.url: {told}") as caught:
        load(**{"reward.judge.url": url})
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("url", ["http://[::1]:80/x", "https://my-host_2.example.org./a%20b?c=d", "HTTP://h"])
def test_addresses_that_are_right(url):
    (table,) = load(**{"reward.judge.url": url}).reward.active.values()
    assert table.url == url


@pytest.mark.parametrize("value", ["2020-01-01", "nan", "[1, inf]"])
def test_arguments_that_are_no_json_are_refused_with_the_recipe(value):
    with pytest.raises(UserError, match=r"reward\.judge\.arguments: when cannot be sent as JSON: "):
        load(**{"reward.judge.url": "http://h", "reward.judge.arguments.when": value})


def test_limits_of_failures():
    reward = build("http://127.0.0.1:9", max_failures=0.25, max_failed_steps=2)
    assert (reward.may_abstain, reward.most_abstained, reward.bad_steps) == (True, 0.25, 2)
    assert reward.place == "http://127.0.0.1:9"


def test_the_documented_server_works(batch, monkeypatch):
    """The example of docs/own_reward.md, on another port."""
    monkeypatch.setenv("no_proxy", "*")
    text = (Path(__file__).parents[2] / "docs" / "own_reward.md").read_text()
    source = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "# scorer.py" in block)
    names = {}
    exec(source.partition("HTTPServer(")[0], names)
    server = HTTPServer(("127.0.0.1", 0), names["Scorer"])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        scores = build(f"http://127.0.0.1:{server.server_port}")(replace(batch, images=batch.images.clone()))
    finally:
        server.shutdown()
        server.server_close()
    torch.testing.assert_close(scores, torch.tensor([0.0, 128 / 255, 1.0]))
