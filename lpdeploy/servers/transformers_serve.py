"""`transformers serve` on a model: an OpenAI API on this machine, for a first look."""

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from lpdeploy.errors import LpdeployError, MissingDependencyError
from lpdeploy.families import is_per_layer
from lpdeploy.models.loading import (
    DTYPES,
    has_tokenizer,
    load_config,
    resolve_device,
    resolve_dtype,
)
from lpdeploy.models.place import locate_model

_PATIENCE = 5.0
"""Seconds that a server has to end by itself."""
_STDERR = 2
"""The descriptor, which is there whatever ``sys.stderr`` is."""


def serve(
    model: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    on_ready: Callable[[str, str], None] = lambda *_: None,
) -> None:
    """Serve a model until it is interrupted.

    Args:
        model: Model folder, hub name, or a run, whose compacted model is taken.
        host: Address to listen on.
        port: Port to listen on.
        device: ``auto``, ``cpu`` or ``cuda``.
        on_ready: Is told the address of the API, and what it calls the model, once it answers.

    Raises:
        MissingDependencyError: What transformers needs to serve is not installed.
        LpdeployError: The port is in use, the model is none that transformers loads by itself, or
            the server ended.
    """
    _check_library()
    place = locate_model(model)
    config = load_config(place.folder)
    if is_per_layer(config.model_type):
        raise LpdeployError(
            f"The layers of '{model}' have different widths, and transformers would have to run "
            "code of the model to load it. Prune with `scope='layer'` to serve it."
        )
    if not has_tokenizer(place.folder):
        raise LpdeployError(f"'{place.folder}' has no tokenizer. Copy its files beside the model.")
    _check_port(host, port)
    device = resolve_device(device)
    dtype = str(DTYPES[resolve_dtype("auto", config, device=device)]).removeprefix("torch.")
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(place.folder)]
    options = {"--host": host, "--port": str(port), "--device": device, "--dtype": dtype}
    # Of our own interpreter, without a shell.
    process = subprocess.Popen(  # noqa: S603
        [*command, *(word for pair in options.items() for word in pair)],
        stdout=_STDERR,  # what it logs is no result of ours
    )
    try:
        _wait_until_ready(process, host, port)
        on_ready(f"http://{host}:{port}/v1", str(place.folder))
        _check_code(process.wait())
    finally:
        _end(process)


def _check_library() -> None:
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise MissingDependencyError(
            "transformers cannot serve without its extra. Install with: "
            "pip install 'lpdeploy[serve]'."
        )


def _check_port(host: str, port: int) -> None:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
    except OSError as error:
        raise LpdeployError(
            f"Cannot listen on port {port} of {host} ({error.strerror or error}). Use another "
            "`port` or `host`."
        ) from error


def _wait_until_ready(process: "subprocess.Popen[bytes]", host: str, port: int) -> None:
    while process.poll() is None:
        connection = http.client.HTTPConnection(host, port, timeout=1)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        except (OSError, http.client.HTTPException):
            pass  # not yet
        finally:
            connection.close()
        time.sleep(0.2)
    _check_code(process.returncode)


def _check_code(code: int) -> None:
    raise LpdeployError(f"The server ended with exit code {code}. Its messages above say why.")


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
