"""``NAME_whole`` of a Triton repository: it waits, and so imports nothing heavy."""

import json
import threading
from collections.abc import Mapping
from typing import Any

OUTPUTS = ("text_output", "token_ids", "finish_reason")
"""The tensors of a response."""


class WholeModel:
    """``NAME_whole``: the same answers for ``infer`` calls, which take no decoupled model.

    It asks ``NAME`` inside the server, a thread for each request, so that answers of any lengths
    leave as they are ready.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Learn which model to ask."""
        import triton_python_backend_utils as backend

        self._backend = backend
        config = json.loads(args["model_config"])
        self._model = config["parameters"]["model"]["string_value"]

    def execute(self, requests: list[Any]) -> None:
        """Ask for each request, and return before the answers are there."""
        for request in requests:
            threading.Thread(target=self._answer, args=(request,), daemon=True).start()

    def _answer(self, request: Any) -> None:
        sender = request.get_response_sender()
        final = self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        inner = self._backend.InferenceRequest(
            model_name=self._model, inputs=request.inputs(), requested_output_names=list(OUTPUTS)
        )
        # To its end, which is an empty response: Triton holds the request until it was read.
        responses = [
            response
            for response in inner.exec(decoupled=True)
            if response.has_error() or response.output_tensors()
        ]
        answer = (
            self._backend.InferenceResponse(error=responses[0].error())
            if responses[0].has_error()
            else self._backend.InferenceResponse(responses[0].output_tensors())
        )
        sender.send(answer, flags=final)
