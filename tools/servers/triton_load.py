r"""Load a Triton that serves text with clients, and record every answer.

It runs in the environment that triton_server.py makes, which has tritonclient:

    .triton/bin/python tools/servers/triton_load.py --model NAME --questions questions.json \
        --output FILE
"""

import argparse
import json
import queue
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http

TRANSPORTS = ("stream", "grpc", "http")
_PATIENCE = 60  # seconds for one response


def build_inputs(library: Any, question: dict[str, Any]) -> list[Any]:
    """Build the tensors of a request.

    Args:
        library: ``tritonclient.grpc`` or ``tritonclient.http``.
        question: Name of an input -> its value; a list is one of several values.
    """
    types = {"max_tokens": np.int32, "top_k": np.int32, "seed": np.int64, "temperature": np.float32,
             "top_p": np.float32, "stream": np.bool_, "ignore_eos": np.bool_}  # fmt: skip
    names = {np.int32: "INT32", np.int64: "INT64", np.float32: "FP32", np.bool_: "BOOL"}
    inputs = []
    for name, value in question.items():
        values = value if isinstance(value, list) else [value]
        dtype = types.get(name, np.object_)
        tensor = library.InferInput(name, [1, len(values)], names.get(dtype, "BYTES"))
        tensor.set_data_from_numpy(np.array([values], dtype=dtype))
        inputs.append(tensor)
    return inputs


def read_answer(result: Any) -> dict[str, Any]:
    """Read the tensors of a response."""
    return {
        "text": result.as_numpy("text_output")[0, 0].decode(),
        "tokens": result.as_numpy("token_ids")[0].tolist(),
        "reason": result.as_numpy("finish_reason")[0, 0].decode(),
    }


def ask_http(address: str, model: str, question: dict[str, Any]) -> dict[str, Any]:
    """Ask over HTTP for a whole answer."""
    with tritonclient.http.InferenceServerClient(address) as client:
        inputs = build_inputs(tritonclient.http, question)
        return read_answer(client.infer(f"{model}_whole", inputs))


def ask_grpc(address: str, model: str, question: dict[str, Any]) -> dict[str, Any]:
    """Ask over gRPC for a whole answer."""
    with tritonclient.grpc.InferenceServerClient(address) as client:
        inputs = build_inputs(tritonclient.grpc, question)
        return read_answer(client.infer(f"{model}_whole", inputs))


def ask_stream(
    address: str, model: str, question: dict[str, Any], *, leave_after: int | None = None
) -> dict[str, Any]:
    """Ask over gRPC for an answer token by token, and perhaps leave in its midst.

    Returns:
        The pieces together, ``pieces``, and ``times``: seconds from the question to each.
    """
    arrived: queue.Queue[Any] = queue.Queue()
    inputs = build_inputs(tritonclient.grpc, {**question, "stream": True})
    told: list[tuple[float, Any]] = []
    with tritonclient.grpc.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: arrived.put((time.perf_counter(), result, error)))
        begin = time.perf_counter()
        client.async_stream_infer(model, inputs)
        while leave_after is None or len(told) < leave_after:
            when, result, error = arrived.get(timeout=_PATIENCE)
            if error is not None:
                raise error
            told.append((when - begin, result))
            if result.get_response().parameters["triton_final_response"].bool_param:
                break
        client.stop_stream(cancel_requests=leave_after is not None)
    # Read afterwards: clients of a load test share the cores with what they load.
    pieces = [read_answer(result) for _, result in told]
    return {
        "text": "".join(piece["text"] for piece in pieces),
        "tokens": [token for piece in pieces for token in piece["tokens"]],
        "reason": pieces[-1]["reason"],
        "pieces": len(pieces),
        "times": [when for when, _ in told],
    }


class _Client(threading.Thread):
    """Asks one question after the other until its time is over."""

    def __init__(self, options: argparse.Namespace, index: int, questions: list[Any]) -> None:
        super().__init__()
        self._options, self._questions = options, questions
        self._rng = random.Random(index)
        self.transport = options.transports[index % len(options.transports)]
        self.records: list[dict[str, Any]] = []

    def run(self) -> None:
        end = time.monotonic() + self._options.seconds
        while time.monotonic() < end:
            question = self._rng.choice(self._questions)
            begin = time.time()
            try:
                answer = self._ask(question["inputs"])
            except Exception as error:  # noqa: BLE001 - whatever went wrong is what is reported
                answer = {"error": f"{type(error).__name__}: {error}"}
                time.sleep(1)
            record = {"transport": self.transport, "begin": begin, "end": time.time(), **answer}
            record["right"] = self._compare(answer, question.get("tokens"))
            self.records.append(record)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        options = self._options
        if self.transport == "http":
            return ask_http(options.http, options.model, question)
        if self.transport == "grpc":
            return ask_grpc(options.grpc, options.model, question)
        leaves = self._rng.random() < options.leave
        after = self._rng.randrange(1, 10) if leaves else None
        answer = ask_stream(options.grpc, options.model, question, leave_after=after)
        return {**answer, "left": not answer["reason"]}

    def _compare(self, answer: dict[str, Any], expected: list[int] | None) -> bool:
        if "error" in answer:
            return False
        if answer.get("left"):
            return expected is None or answer["tokens"] == expected[: len(answer["tokens"])]
        return expected is None or answer["tokens"] == expected


def main() -> None:
    """Read the command line, let the clients ask, and write what they were told."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--http", default="127.0.0.1:8000")
    parser.add_argument("--grpc", default="127.0.0.1:8001")
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--questions", type=Path, required=True,
        help='JSON: a list of {"inputs": {...}, "tokens": [...]}; tokens are compared if given',
    )  # fmt: skip
    parser.add_argument("--transports", type=lambda text: text.split(","), default=TRANSPORTS)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--leave", type=float, default=0, help="share of streams left in the midst")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    questions = json.loads(options.questions.read_text(encoding="utf-8"))
    clients = [_Client(options, index, questions) for index in range(options.clients)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    records = [record for client in clients for record in client.records]
    options.output.write_text(json.dumps(records), encoding="utf-8")


if __name__ == "__main__":
    main()
