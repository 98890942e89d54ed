"""TensorRT or TensorRT-RTX: which of the two is here, and where they differ.

The only module that imports either. Everything else asks a ``Library``.
"""

from dataclasses import dataclass
from typing import Any

from lpdeploy.errors import LpdeployError, MissingDependencyError

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt_rtx"
EXTRAS = {TENSORRT: "trt", TENSORRT_RTX: "trt-rtx"}
"""Library -> the extra of lpdeploy that installs it."""

# The first versions whose parser takes what the exporter writes: RotaryEmbedding and
# RMSNormalization as operators, beside Attention.
_OLDEST = {TENSORRT: (10, 15), TENSORRT_RTX: (1, 7)}


@dataclass(frozen=True)
class Library:
    """One of the two libraries, imported.

    Attributes:
        name: ``tensorrt`` or ``tensorrt_rtx``.
        version: Its version. An engine runs on the version that built it and on no other.
        module: The Python module, whose interface is nearly the same in both.
        messages: Errors that the library has logged, oldest first; clear it before a call that
            ``explain`` is asked about.
        logger: What hands them over; the library keeps no reference to it.
    """

    name: str
    version: str
    module: Any
    messages: list[str]
    logger: Any

    @property
    def builds_for_any_gpu(self) -> bool:
        """Whether an engine is built without a GPU, for more than one."""
        return self.name == TENSORRT_RTX

    def create_network(self, builder: Any) -> Any:
        """Return an empty, strongly typed network: every tensor has the type the graph gives it."""
        flag = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        # TensorRT 11 knows no other network and may know no such flag.
        return builder.create_network(0 if flag is None else 1 << int(flag))

    def create_config(self, builder: Any) -> Any:
        """Return a build configuration in which float32 products keep float32's 24 bits."""
        config = builder.create_builder_config()
        flag = getattr(self.module.BuilderFlag, "TF32", None)
        if flag is not None:  # set by default, and ten bits are not what fp32 promises
            config.clear_flag(flag)
        return config

    def allow_decomposed_attention(self, network: Any) -> None:
        """Let attention without a kernel of its own, as in float32, be built from products."""
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type == self.module.LayerType.ATTENTION_INPUT:
                # A network hands out plain layers; their interface is chosen by their class.
                layer.__class__ = self.module.IAttentionBoundaryLayer
                layer.attention.decomposable = True

    def takes_operator(self, name: str) -> bool:
        """Return whether the parser has an ONNX operator."""
        network = self.create_network(self.module.Builder(self.logger))
        return bool(self.module.OnnxParser(network, self.logger).supports_operator(name))

    @property
    def captures_graphs(self) -> bool:
        """Whether a context captures itself in CUDA graphs, and anew where shapes change."""
        return hasattr(self.module, "CudaGraphStrategy")

    def create_context(self, engine: Any, *, capture: bool) -> Any:
        """Return an execution context, or None where memory is short.

        Args:
            engine: What is to be run.
            capture: Run it as a CUDA graph, if ``captures_graphs``.
        """
        if not (capture and self.captures_graphs):
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        config.cuda_graph_strategy = self.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return engine.create_execution_context(config)

    def explain(self) -> str:
        """Return the first line of the first error that was logged, without a closing stop.

        The first one is the cause of the others, which say where it was met.
        """
        lines = self.messages[0].strip().splitlines() if self.messages else []
        return (lines[0] if lines else "it gives no reason").rstrip(". ")


def load_library(name: str | None = None) -> Library:
    """Import TensorRT, or TensorRT-RTX where that is what is installed.

    Args:
        name: ``tensorrt`` or ``tensorrt_rtx``; None for the first that is installed.

    Raises:
        MissingDependencyError: It is not installed.
        LpdeployError: It is too old.
    """
    for candidate in (TENSORRT, TENSORRT_RTX) if name is None else (name,):
        module = _import(candidate)
        if module is not None:
            return wrap_module(candidate, module)
    if name is None:
        raise MissingDependencyError(
            "TensorRT is not installed; engine trt needs it. Install with: "
            "pip install 'lpdeploy[trt]', or pip install 'lpdeploy[trt-rtx]' to build without a "
            "GPU for GeForce RTX and RTX PRO."
        )
    raise MissingDependencyError(
        f"{name} is not installed; this engine was built by it. "
        f"Install with: pip install 'lpdeploy[{EXTRAS[name]}]'."
    )


def wrap_module(name: str, module: Any) -> Library:
    """Return the library around its imported module.

    Raises:
        LpdeployError: It is too old.
    """
    version = str(module.__version__)
    oldest = _OLDEST[name]
    if tuple(int(part) for part in version.split(".")[:2]) < oldest:
        raise LpdeployError(
            f"{name} {version} is installed; lpdeploy needs {oldest[0]}.{oldest[1]} or newer. "
            f"Install with: pip install --upgrade 'lpdeploy[{EXTRAS[name]}]'."
        )
    messages: list[str] = []
    return Library(name, version, module, messages, _build_logger(module, messages))


def _import(name: str) -> Any:
    try:
        if name == TENSORRT:
            import tensorrt

            return tensorrt
        import tensorrt_rtx
    except ImportError:
        return None
    return tensorrt_rtx


def _build_logger(module: Any, messages: list[str]) -> Any:
    """Keep errors for a sentence of ours, in place of lines on the user's terminal."""
    severity = module.ILogger.Severity

    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                messages.append(message)

    return Logger()
