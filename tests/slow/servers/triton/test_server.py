"""A real Triton on the repository, asked by its own client over HTTP and gRPC."""

import json
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from lpdeploy.models.loading import load_model, load_tokenizer
from lpdeploy.servers.package import package
from tests.helpers import ROOT
from tools.servers import triton_server

MODEL = ROOT / "lpdeploy" / "demo" / "assets" / "story-llama-1M"
PYTHON = ROOT / ".triton" / "bin" / "python"
NAME = "story"
SECONDS = 30
BEGINNINGS = ("Once upon a time", "Tom and Lily went", "The dog", "One day, a girl", "A", "Lily")


def find_ports():
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


class Server:
    """A Triton in a process group of its own, which ends by itself after ten minutes."""

    def __init__(self, repository, log):
        self.http, self.grpc = find_ports()
        self.log = log
        words = ["tools/servers/triton_server.py", "serve", repository, "--stop-after", 600]
        words += ["--http-port", self.http, "--grpc-port", self.grpc]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait(self):
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/v2/health/ready"):
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(self.log.read_text()[-3000:])

    def post(self, path, **inputs):
        """What the server says to JSON: status and body."""
        url = f"http://127.0.0.1:{self.http}/v2/models/{path}"
        data = inputs.pop("data", None) or json.dumps(inputs).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ask(self, **inputs):
        status, body = self.post(f"{NAME}/generate", **inputs)
        return json.loads(body) if status == 200 else (status, json.loads(body)["error"])

    def measure_bytes(self):
        """Resident memory of the server and the models' processes."""
        total = 0
        for folder in Path("/proc").iterdir():
            try:
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                if int(fields[3]) == self.process.pid:  # its session
                    total += int((folder / "statm").read_text().split()[1]) * 4096
            except (OSError, IndexError):
                continue
        return total

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    triton_server.setup()
    root = tmp_path_factory.mktemp("server")
    package(str(MODEL), kind="triton", output=root / NAME, max_batch=8)
    made = Server(root / NAME, root / "log.txt")
    made.wait()
    yield made
    if made.process.poll() is None:
        made.stop()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL, load_model(MODEL).config)


@pytest.fixture(scope="module")
def answer(tokenizer):
    """What transformers adds, greedily: tokens, and the text that continues the prompt."""
    model = load_model(MODEL).eval()

    def compute(text, count):
        ids = tokenizer(text, return_tensors="pt").input_ids
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
        )
        whole = tokenizer.decode(made[0], skip_special_tokens=True)
        start = tokenizer.decode(ids[0], skip_special_tokens=True)
        return made[0, ids.shape[1] :].tolist(), whole[len(start) :]

    return compute


def run_client(server, tmp_path, questions, **options):
    """Let clients ask, and return what each was told."""
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    words = [f"--{name}={value}" for name, value in options.items()]
    subprocess.run(
        [
            PYTHON, "tools/servers/triton_load.py", f"--http=127.0.0.1:{server.http}",
            f"--grpc=127.0.0.1:{server.grpc}", f"--model={NAME}",
            f"--questions={tmp_path / 'questions.json'}", f"--output={tmp_path / 'told.json'}",
            *words,
        ],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return json.loads((tmp_path / "told.json").read_text())


@pytest.mark.parametrize("transport", ["http", "grpc", "stream"])
def test_tokens_and_text_are_those_of_torch(server, tmp_path, answer, transport):
    for text in BEGINNINGS:
        tokens, continued = answer(text, 40)
        question = {"inputs": {"text_input": text, "max_tokens": 40}, "tokens": tokens}
        told = run_client(
            server, tmp_path, [question], transports=transport, clients=1, seconds=0.01
        )
        assert [each["tokens"] for each in told] == [tokens]
        assert told[0]["text"] == continued
        assert told[0]["reason"] == ("stop" if tokens[-1] == 2 else "length")
        if transport == "stream":
            assert told[0]["pieces"] == len(tokens)


def test_over_generate(server, answer):
    tokens, text = answer("Once upon a time", 20)
    told = server.ask(text_input="Once upon a time", max_tokens=20)
    assert (told["token_ids"], told["text_output"]) == (tokens, text)
    _, body = server.post(
        f"{NAME}/generate_stream", text_input="Once upon a time", max_tokens=20, stream=True
    )
    pieces = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: ")]
    assert [piece["token_ids"] for piece in pieces] == tokens
    assert "".join(piece["text_output"] for piece in pieces) == text


def test_a_stop_string_and_a_seed(server, answer):
    _, text = answer("Once upon a time", 60)
    word = text.split()[6]
    told = server.ask(text_input="Once upon a time", max_tokens=60, stop=word)
    assert told["finish_reason"] == "stop"
    assert told["text_output"] == text.split(word)[0]
    sampled = {"text_input": "The dog", "max_tokens": 20, "temperature": 0.9, "top_k": 50}
    first, second, other = (server.ask(**sampled, seed=seed) for seed in (3, 3, 4))
    assert first == second
    assert first != other


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"text_input": "the dog " * 400}, "the model is served with 512; shorten the prompt"),
        ({"text_input": "the dog", "max_tokens": 600}, "it must be 1 to 512"),
        ({"text_input": "the dog", "max_tokens": 0}, "max_tokens is 0"),
        ({"text_input": "the dog", "temperature": -1}, "temperature is -1.0; it must be 0"),
        ({"text_input": "the dog", "top_p": 0}, "top_p is 0.0; it must be above 0"),
        ({"text_input": ["a", "b"]}, "text_input"),
        ({"text_input": 5}, "non-string as string"),
        ({"text_input": "a", "max_tokens": "many"}, "non-signed-integer"),
        ({"max_tokens": 5}, "send text_input or messages, one of them in each request"),
        ({"text_input": "a", "messages": "[]"}, "send text_input or messages"),
        ({"messages": "[]"}, "the model has no chat template; send text_input"),
        ({"data": b"{"}, "JSON"),
    ],
)
def test_what_cannot_be_answered(server, answer, inputs, sentence):
    status, said = server.ask(**inputs)
    assert status in (400, 500)
    assert sentence in said
    assert server.ask(text_input="A", max_tokens=5)["token_ids"] == answer("A", 5)[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"datatype": "FP32", "data": [1.0]}, "text_input"),
        ({"shape": [1], "data": ["the dog"]}, "text_input"),
        ({"shape": [1, 2], "data": ["the dog", "a"]}, "text_input"),
        ({"shape": [2, 1], "data": ["the dog", "a"]}, "text_input has 2 prompts; send one"),
        ({"shape": [9, 1], "data": ["a"] * 9}, "batch-size must be <= 8"),
        ({"name": "text"}, "text"),
    ],
)
def test_malformed_tensors(server, changes, sentence):
    tensor = {"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": ["the dog"]}
    data = json.dumps({"inputs": [{**tensor, **changes}]}).encode()
    status, said = server.post(f"{NAME}_whole/infer", data=data)
    assert status in (400, 500)
    assert sentence in json.loads(said)["error"]


def test_bytes_that_are_no_text(server):
    tensor = b"\x02\x00\x00\x00\xc3\x28"  # two bytes
    head = {
        "inputs": [
            {"name": "text_input", "shape": [1, 1], "datatype": "BYTES",
             "parameters": {"binary_data_size": len(tensor)}}
        ]
    }  # fmt: skip
    text = json.dumps(head).encode()
    url = f"http://127.0.0.1:{server.http}/v2/models/{NAME}_whole/infer"
    request = urllib.request.Request(
        url, text + tensor, {"Inference-Header-Content-Length": str(len(text))}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert "text_input is no UTF-8: byte 0 is 195" in json.loads(caught.value.read())["error"]


def test_sixteen_clients_lose_nothing_and_memory_stays(server, tmp_path, answer):
    rng = random.Random(0)
    questions = []
    for text in BEGINNINGS:
        for count in (rng.randrange(1, 16), rng.randrange(16, 100)):
            inputs = {"text_input": text, "max_tokens": count}
            questions.append({"inputs": inputs, "tokens": answer(text, count)[0]})
    run_client(server, tmp_path, questions, seconds=SECONDS / 6, leave=0.2)  # until it is warm
    before = server.measure_bytes()
    told = run_client(server, tmp_path, questions, seconds=SECONDS, leave=0.2)
    assert [each for each in told if not each["right"]] == []
    assert {each["transport"] for each in told} == {"http", "grpc", "stream"}
    assert sum(each.get("left", False) for each in told) > 10
    assert len(told) > 100
    # The rows of 16 clients who left or ended are free again: one alone is answered at once.
    assert server.ask(text_input="A", max_tokens=5)["token_ids"] == answer("A", 5)[0]
    # Heaps of several threads grow by what is in flight at once, not by what has been answered.
    assert server.measure_bytes() - before < 32e6


def test_it_ends_when_it_is_told_to_and_leaves_no_process(server):
    server.stop()
    for _ in range(100):
        if server.measure_bytes() == 0:
            return
        time.sleep(0.1)
    raise AssertionError(server.log.read_text()[-3000:])
