"""An exported ONNX folder in ONNX Runtime, behind the Runner protocol."""

from pathlib import Path
from typing import Any

from torch import Tensor

from lpdeploy.engines.contract import Contract, load_contract
from lpdeploy.engines.onnx import ENGINE
from lpdeploy.engines.ort_session import (
    build_empty_value,
    build_session,
    check_computes,
    share_tensor,
    split_device,
)
from lpdeploy.engines.runner import Output, compute_position_ids


class OnnxRunner:
    """An ONNX Runtime session over the graph that ``export_onnx`` wrote.

    Attributes:
        name: ``onnx``.
        precision: That of the graph: ``fp32``, ``fp16`` or ``bf16``.
        vocab_size: Width of the logits.
        max_positions: Longest past + present in tokens.
        contract: What ``io.json`` says.
        provider: The execution provider that runs the graph.
    """

    name = ENGINE.name

    def __init__(self, session: Any, contract: Contract, *, device: str = "cpu") -> None:
        self.precision: str = contract.precision
        self.vocab_size: int = contract.model.vocab_size
        self.max_positions: int = contract.model.max_positions
        self.contract = contract
        self.provider: str = session.get_providers()[0]
        self._session = session
        self._device, self._device_id = split_device(device)

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor,
        past: Any = None,
        last_only: bool = False,
        reserve: int = 0,  # noqa: ARG002 - its cache is no buffer
    ) -> Output:
        """Run T new tokens after a past of P tokens.

        Args:
            input_ids: Shape (B, T), int64, on any device.
            attention_mask: Shape (B, P + T), int64; 0 at padding, which stands on the left.
            past: ``Output.past`` of a previous call, or None for a prefill. It is left as it is,
                so several calls may go on from the same past.
            last_only: Return only the logits of the last token; the graph computes all.
            reserve: Without effect.

        Returns:
            Logits, float32, and the cache as ``OrtValue``s on the session's
            device: it is handed back without a copy.
        """
        mask = attention_mask.cpu()
        tokens = {
            "input_ids": input_ids.cpu(),
            "attention_mask": mask,
            "position_ids": compute_position_ids(mask, input_ids.shape[1]),
        }
        # A new binding each time: an output bound by device only is filled in by the run, and
        # the next run of the same binding would write into it, which may be its own past.
        binding = self._session.io_binding()
        for name, tensor in tokens.items():
            binding.bind_cpu_input(name, tensor.contiguous().numpy())
        caches = past if past is not None else self._build_empty_past(input_ids.shape[0])
        for item, value in zip(self.contract.caches, caches, strict=True):
            binding.bind_ortvalue_input(item.name, value)
        for output in self.contract.outputs:
            binding.bind_output(output.name, self._device, self._device_id)
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        shared = share_tensor(logits)
        return Output(shared[:, -1:] if last_only else shared, present)

    def _build_empty_past(self, batch: int) -> list[Any]:
        return [
            # (B, kv_heads, 0, head_dim); nothing in it, so the CPU is the right place for it.
            build_empty_value(list(item.resolve({"batch": batch, "past": 0})), item.dtype)
            for item in self.contract.caches
        ]


def load_onnx_runner(folder: Path, *, device: str = "cpu") -> OnnxRunner:
    """Open what ``export_onnx`` wrote.

    Args:
        folder: With ``model.onnx``, ``model.onnx.data`` and ``io.json``.
        device: ``cpu``, ``cuda`` or ``cuda:1``. The graph runs there or not at all.

    Raises:
        ArtifactError: A file is missing, damaged or of another export, or the graph's precision
            does not run on ``device``.
        MissingDependencyError: ONNX Runtime, or its provider for ``device``, is not installed.
    """
    kind, _ = split_device(device)
    contract = load_contract(folder, ENGINE)
    contract.check_files(folder, fix=ENGINE.fix)
    check_computes(folder, contract, kind)
    return OnnxRunner(build_session(folder, device), contract, device=device)
