"""``NAME`` of a Triton repository, for its Python backend: text in, text out.

Triton imports it through the ``model.py`` that ``lpdeploy package --target triton`` writes.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lpdeploy.engines.sampling import Sampling
from lpdeploy.errors import LpdeployError
from lpdeploy.servers.triton.service import Piece, Question, TextService
from lpdeploy.servers.triton.whole_model import OUTPUTS


def read_question(read: Callable[[str], Any]) -> Question:
    """Build a question from a request's tensors.

    Args:
        read: Gives the values of an input as a flat list, or None where the client gave none.

    Raises:
        ValueError: A value is out of range, or there is not one prompt or conversation.
    """
    asked = {name: read(name) for name in ("text_input", "messages")}
    given = {name: values for name, values in asked.items() if values is not None}
    if len(given) != 1:
        raise ValueError("send text_input or messages, one of them in each request")
    ((name, values),) = given.items()
    if len(values) != 1:
        raise ValueError(f"{name} has {len(values)} prompts; send one in each request")
    text = _decode(values[0], name)
    return Question(
        text="" if name == "messages" else text,
        messages=text if name == "messages" else None,
        stop=tuple(_decode(text, "stop") for text in read("stop") or ()),
        **_read_given(read, ("max_tokens", "ignore_eos")),
        sampling=Sampling(**_read_given(read, ("temperature", "top_k", "top_p", "seed"))),
    )


def _read_given(read: Callable[[str], Any], names: Sequence[str]) -> dict[str, Any]:
    given = {name: values for name in names if (values := read(name)) is not None}
    for name, values in given.items():
        if len(values) != 1:
            raise ValueError(f"{name} has {len(values)} values; send one")
    return {name: values[0] for name, values in given.items()}


def _decode(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is no UTF-8: byte {error.start} is {value[error.start]}"
        ) from None


_PATIENCE = 1.0
"""Seconds between two questions whether a client is gone."""
_FAREWELL = 20
"""Seconds for what runs while the model is unloaded; Triton itself waits for 30."""


class TextModel:
    """``NAME``: answers in pieces where ``stream`` is set, else as a whole, in one response."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the export, which lies in a model folder of its own."""
        import triton_python_backend_utils as backend

        self._backend = backend
        config = json.loads(args["model_config"])
        settings = {
            name: value["string_value"] for name, value in config.get("parameters", {}).items()
        }
        kind, device = args["model_instance_kind"], args["model_instance_device_id"]
        self._delivery = ThreadPoolExecutor(1)
        self._service = TextService(
            Path(args["model_repository"]).parent / settings["export"],
            engine=settings["engine"],
            device=f"cuda:{device}" if kind == "GPU" else None,
            max_batch=config["max_batch_size"],
        )

    def execute(self, requests: list[Any]) -> None:
        """Let requests join the running batch; they are answered from another thread."""
        for request in requests:
            read = self._build_reader(request)
            answer = _Answer(self._backend, request.get_response_sender(), self._delivery)
            try:
                answer.stream = (read("stream") or [False])[0]
                self._service.ask(
                    read_question(read),
                    on_piece=answer.hear,
                    on_error=answer.refuse,
                    is_cancelled=answer.is_left,
                )
            except (ValueError, LpdeployError) as error:
                answer.refuse(error)

    def _build_reader(self, request: Any) -> Callable[[str], Any]:
        def read(name: str) -> Any:
            tensor = self._backend.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy().reshape(-1).tolist()

        return read

    def finalize(self) -> None:
        """Answer what was asked before the model is unloaded."""
        self._service.close(_FAREWELL)
        self._delivery.shutdown(wait=False)  # what it has begun, it still sends


class _Answer:
    """The responses to one request.

    They are built and sent in a thread of their own: each waits for Triton's process to take it,
    in which time the engine runs the next step.

    Attributes:
        stream: Whether every piece is a response; else all of them together are one.
    """

    def __init__(self, backend: Any, sender: Any, delivery: ThreadPoolExecutor) -> None:
        self.stream = False
        self._left = False
        self._backend, self._sender, self._delivery = backend, sender, delivery
        self._pieces: list[Piece] = []
        self._asked = time.monotonic()

    def hear(self, piece: Piece) -> None:
        """Take a piece of the answer, and return at once."""
        self._delivery.submit(self._deliver, piece)

    def is_left(self) -> bool:
        """Tell whether the client is known to be gone: asked at times, since it is a call too."""
        return self._left

    def _deliver(self, piece: Piece) -> None:
        self._pieces.append(piece)
        if self.stream or piece.reason:
            final = self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL if piece.reason else 0
            response = self._build_response()
            self._pieces.clear()
            self._sender.send(response, flags=final)
        if not piece.reason and time.monotonic() - self._asked > _PATIENCE:
            self._asked = time.monotonic()
            self._left = self._sender.is_cancelled()

    def _build_response(self) -> Any:
        text = "".join(piece.text for piece in self._pieces)
        tokens = [token for piece in self._pieces for token in piece.tokens]
        values = (
            np.array([[text.encode()]], dtype=object),  # (1, 1)
            np.array([tokens], dtype=np.int32),  # (1, tokens)
            np.array([[(self._pieces[-1].reason or "").encode()]], dtype=object),  # (1, 1)
        )
        tensors = [self._backend.Tensor(*pair) for pair in zip(OUTPUTS, values, strict=True)]
        return self._backend.InferenceResponse(tensors)

    def refuse(self, error: Exception) -> None:
        """Send an error instead of an answer."""
        answer = self._backend.InferenceResponse(error=self._backend.TritonError(str(error)))
        final = self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self._delivery.submit(self._sender.send, answer, flags=final)
