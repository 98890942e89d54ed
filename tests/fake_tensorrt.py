"""TensorRT's interface over ONNX Runtime: what needs a GPU is called with real pointers here.

It knows only what lpdeploy calls. That the calls are TensorRT's own, and that engines build, is
what the tests with the real library are for.
"""

import ctypes
import enum
import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime

_DTYPES = {
    "tensor(int64)": np.int64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


class ILogger:
    Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])


class LayerType(enum.Enum):
    ATTENTION_INPUT = 51
    MATRIX_MULTIPLY = 1


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class CudaGraphStrategy(enum.Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class BuilderFlag(enum.IntEnum):
    TF32 = 7


class IAttentionBoundaryLayer:
    pass


class Layer:
    def __init__(self, kind):
        self.type = kind
        self.attention = SimpleNamespace(decomposable=False)


class Network:
    def __init__(self, flags):
        self.flags = flags
        self.model = None
        self.layers = []

    @property
    def num_layers(self):
        return len(self.layers)

    def get_layer(self, index):
        return self.layers[index]


class OnnxParser:
    unknown = ()

    def __init__(self, network, logger):
        self.network = network
        self.logger = logger
        self.errors = []

    def parse_from_file(self, path):
        try:
            self.network.model = onnx.load(path)
        except Exception as error:  # noqa: BLE001 - a parser reports whatever it was
            self.errors.append(str(error))
            self.logger.log(ILogger.Severity.ERROR, str(error))
            return False
        kinds = {"Attention": LayerType.ATTENTION_INPUT, "MatMul": LayerType.MATRIX_MULTIPLY}
        nodes = self.network.model.graph.node
        self.network.layers = [Layer(kinds[n.op_type]) for n in nodes if n.op_type in kinds]
        return True

    def supports_operator(self, name):
        return name not in OnnxParser.unknown

    @property
    def num_errors(self):
        return len(self.errors)

    def get_error(self, index):
        return SimpleNamespace(desc=lambda: self.errors[index], node_operator=lambda: "")


class Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, smallest, usual, largest):
        assert all(a <= b <= c for a, b, c in zip(smallest, usual, largest, strict=True))
        self.shapes[name] = [list(smallest), list(usual), list(largest)]


class TimingCache:
    def __init__(self, content):
        self.content = content

    def serialize(self):
        return b"measured " + self.content


class Config:
    def __init__(self):
        self.flags = {BuilderFlag.TF32}
        self.profiles = []
        self.cache = None

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def add_optimization_profile(self, profile):
        self.profiles.append(profile.shapes)

    @property
    def num_optimization_profiles(self):
        return len(self.profiles)

    def create_timing_cache(self, content):
        return TimingCache(content)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        if cache.content and not cache.content.startswith(b"measured"):
            return False
        self.cache = cache
        return True


class Builder:
    last = None
    fails = False

    def __init__(self, logger):
        self.logger = logger
        Builder.last = self

    def create_network(self, flags):
        self.network = Network(flags)
        return self.network

    def create_builder_config(self):
        self.config = Config()
        return self.config

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        self.logger.log(ILogger.Severity.WARNING, "only a warning")
        if Builder.fails:
            self.logger.log(ILogger.Severity.ERROR, "Could not find any implementation.\nmore")
            return None
        head = json.dumps(config.profiles).encode()
        return head + b"\n" + network.model.SerializeToString()


class Runtime:
    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, plan):
        head, _, graph = plan.partition(b"\n")
        try:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3  # it warns of a copy in TensorScatter
            session = onnxruntime.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"]
            )
            nodes = onnx.load_from_string(graph).graph.node
            aliases = {n.output[0]: n.input[0] for n in nodes if n.op_type == "TensorScatter"}
            return Engine(session, json.loads(head), aliases)
        except Exception:  # noqa: BLE001 - the real one logs and returns None too
            self.logger.log(ILogger.Severity.ERROR, "Serialization assertion failed.")
            return None


class Engine:
    def __init__(self, session, profiles, aliases):
        self.session = session
        self.profiles = profiles
        self.aliases = aliases
        self.contexts = []
        self.memory = True

    def create_runtime_config(self):
        return SimpleNamespace(cuda_graph_strategy=CudaGraphStrategy.DISABLED)

    def create_execution_context(self, runtime_config=None):
        if not self.memory:
            return None
        self.contexts.append(Context(self, runtime_config))
        return self.contexts[-1]


class Context:
    """Takes a shape outside of its profile for an error, as TensorRT does, and reads addresses."""

    def __init__(self, engine, config):
        self.engine = engine
        self.config = config
        self.profile = None
        self.shapes = {}
        self.addresses = {}
        self.runs = 0
        self.valid = True

    def set_optimization_profile_async(self, index, _stream):
        self.profile = self.engine.profiles[index]
        return True

    def set_input_shape(self, name, shape):
        low, _, high = self.profile[name]
        self.valid &= all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        self.shapes[name] = shape
        return self.valid

    def set_tensor_address(self, name, address):
        assert address, f"{name} has no address"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, _stream):
        if not self.valid:
            return False
        for output, source in self.engine.aliases.items():
            assert self.addresses[output] == self.addresses[source], f"{output} is elsewhere"
        session = self.engine.session
        feeds = {
            item.name: _view(self.addresses[item.name], self.shapes[item.name], item.type).copy()
            for item in session.get_inputs()
        }
        results = session.run(None, feeds)
        for item, result in zip(session.get_outputs(), results, strict=True):
            _view(self.addresses[item.name], result.shape, item.type)[...] = result
        self.runs += 1
        return True


def _view(address, shape, kind):
    dtype = np.dtype(_DTYPES[kind])
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = (ctypes.c_char * size).from_address(address)
    return np.frombuffer(buffer, dtype=dtype).reshape(shape)


class Stream:
    """No stream: calls are done when they return."""

    handle = 0

    def __init__(self):
        self.captured = 0

    def in_order(self):
        return nullcontext()

    def capture(self, enqueue):
        self.captured += 1
        return enqueue

    def synchronize(self):
        pass


def make_module(version="1.7.1.116"):
    return SimpleNamespace(
        __version__=version,
        ILogger=ILogger,
        LayerType=LayerType,
        NetworkDefinitionCreationFlag=NetworkDefinitionCreationFlag,
        BuilderFlag=BuilderFlag,
        CudaGraphStrategy=CudaGraphStrategy,
        IAttentionBoundaryLayer=IAttentionBoundaryLayer,
        Builder=Builder,
        OnnxParser=OnnxParser,
        Runtime=Runtime,
    )
