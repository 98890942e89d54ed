"""An exported ONNX folder in ONNX Runtime, behind the Runner protocol.

The only module that knows onnxruntime.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpdeploy.artifacts import load_json
from lpdeploy.errors import ArtifactError, MissingDependencyError
from lpdeploy.runtime.runner import Output, compute_position_ids

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_EXTRAS = {"cpu": "cpu", "cuda": "gpu"}
_ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}  # onnx.TensorProto.DataType
_CONTRACT_VERSION = 1
_FIX = "Export the model again with 'lpdeploy export'."


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

    name = "onnx"

    def __init__(self, session: Any, contract: Mapping[str, Any], *, device: str = "cpu") -> None:
        self.precision: str = contract["precision"]
        self.vocab_size: int = contract["vocab_size"]
        self.max_positions: int = contract["max_positions"]
        self.contract = contract
        self.provider: str = session.get_providers()[0]
        self._session = session
        self._device, self._device_id = _split_device(device)
        self._caches = [item for item in contract["inputs"] if "past_key_values" in item["name"]]
        self._outputs = [item["name"] for item in contract["outputs"]]

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
        for item, value in zip(self._caches, caches, strict=True):
            binding.bind_ortvalue_input(item["name"], value)
        for name in self._outputs:
            binding.bind_output(name, self._device, self._device_id)
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        shared = _share_tensor(logits)
        return Output(shared[:, -1:] if last_only else shared, present)

    def _build_empty_past(self, batch: int) -> list[Any]:
        from onnxruntime import OrtValue

        return [
            # (B, kv_heads, 0, head_dim); nothing in it, so the CPU is the right place for it.
            OrtValue.ortvalue_from_shape_and_type(
                [batch, item["shape"][1], 0, item["shape"][3]], _ONNX_TYPES[item["dtype"]]
            )
            for item in self._caches
        ]


def _share_tensor(value: Any) -> Tensor:
    # Without a CUDA build of torch there is no tensor over the GPU's memory: copy it then.
    if value.device_name() == "cpu" or torch.cuda.is_available():
        return torch.from_dlpack(value)
    return torch.from_numpy(value.numpy())


def _split_device(device: str) -> tuple[str, int]:
    kind, _, index = device.partition(":")
    if kind not in _PROVIDERS or not (index.isdigit() or not index):
        raise ValueError(f"device is {device!r}; it must be cpu, cuda or cuda:N")
    return kind, int(index or 0)


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
    kind, _ = _split_device(device)
    contract = _load_contract(folder)
    if contract["precision"] == "bf16" and kind == "cpu":
        raise ArtifactError(
            f"'{folder}' is a bf16 graph, which ONNX Runtime does not run on a CPU. "
            "Use --device cuda, or export with --precision fp32."
        )
    return OnnxRunner(_build_session(folder, device), contract, device=device)


def _load_contract(folder: Path) -> dict[str, Any]:
    contract = load_json(folder / "io.json", fix=_FIX)
    if not isinstance(contract, dict) or contract.get("engine") != "onnx":
        raise ArtifactError(f"'{folder / 'io.json'}' describes no ONNX export. {_FIX}")
    version = contract.get("schema_version")
    if version != _CONTRACT_VERSION:
        raise ArtifactError(
            f"'{folder / 'io.json'}' has schema version {version!r}; this lpdeploy reads "
            f"{_CONTRACT_VERSION}. {_FIX}"
        )
    for name, recorded in contract["files"].items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"No {name} in '{folder}'. {_FIX}")
        # The size tells a truncated copy at once; hashing gigabytes would double the loading.
        if path.stat().st_size != recorded["bytes"]:
            raise ArtifactError(
                f"'{path}' has {path.stat().st_size} bytes, its export had {recorded['bytes']}. "
                f"Copy it again, or: {_FIX}"
            )
    return contract


def _build_session(folder: Path, device: str) -> Any:
    kind, index = _split_device(device)
    runtime = _import_runtime(kind)
    provider = _PROVIDERS[kind]
    try:
        session = runtime.InferenceSession(
            folder / "model.onnx",
            _build_options(runtime),
            providers=[(provider, {"device_id": str(index)} if kind == "cuda" else {})],
            enable_fallback=0,  # its fallback prints, and goes on without the provider
        )
    except _list_load_errors() as error:
        reason = str(error).strip().split("\n")[0]
        raise ArtifactError(f"ONNX Runtime cannot load '{folder}': {reason}. {_FIX}") from error
    if session.get_providers()[0] != provider:
        raise MissingDependencyError(
            f"ONNX Runtime has {provider} but cannot start it here: its CUDA and cuDNN libraries "
            "or the driver do not match. Install with: pip install 'lpdeploy[gpu]'."
        )
    return session


def _import_runtime(kind: str) -> Any:
    extra = _EXTRAS[kind]
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError(
            "onnxruntime is not installed; the ONNX engine needs it. "
            f"Install with: pip install 'lpdeploy[{extra}]'."
        ) from None
    if _PROVIDERS[kind] not in onnxruntime.get_available_providers():
        raise MissingDependencyError(
            f"This onnxruntime {onnxruntime.__version__} has no {_PROVIDERS[kind]}. "
            f"Install with: pip uninstall onnxruntime && pip install 'lpdeploy[{extra}]'."
        )
    return onnxruntime


def _list_load_errors() -> tuple[type[Exception], ...]:
    # They have no common base below Exception.
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile",
             "NotImplemented", "RuntimeException")  # fmt: skip
    return tuple(getattr(state, name) for name in names)


def _build_options(runtime: Any) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only: a warning a node floods the terminal
    options.intra_op_num_threads = torch.get_num_threads()
    # Idle threads of the pool spin for a while by default. Engines are timed interleaved in one
    # process, and a spinning pool would take the cores from the one that is being timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
