"""A server of the OpenAI API as a process: started on a free port, asked, and ended."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def find_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(command, log, *, seconds, env=None):
    """Start ``command`` with a free port for PORT, and yield its address once it is healthy."""
    port = find_port()
    words = [str(word).replace("PORT", str(port)) for word in command]
    variables = {**os.environ, **OFFLINE, **(env or {})}
    with log.open("w") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, env=variables)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_healthy(process, address, log, seconds=seconds)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_healthy(process, address, log, *, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.3)
    raise AssertionError(f"no answer in {seconds} s: {log.read_text()[-3000:]}")


def complete(address, *, model, prompt, tokens, **options):
    """Ask for greedy tokens, and return the whole answer."""
    body = {"model": str(model), "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        data=json.dumps(body | options).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
