"""An exported engine in TensorRT or TensorRT-RTX, on torch CUDA tensors, as a Runner."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpdeploy.engines.contract import (
    IN_PLACE,
    BuildRecord,
    Contract,
    Profile,
    TensorSpec,
    load_contract,
)
from lpdeploy.engines.runner import Output, compute_position_ids
from lpdeploy.engines.trt import ENGINE
from lpdeploy.engines.trt.library import Library, load_library
from lpdeploy.errors import ArtifactError, LpdeployError


class Stream:
    """A CUDA stream of the engine's own: on the default one TensorRT synchronizes every call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self.handle: int = self._stream.cuda_stream

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Start after what torch has queued, and let torch go on after what is queued inside."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def capture(self, enqueue: Callable[[], object]) -> Callable[[], object]:
        """Record what ``enqueue`` queues, without running it; return what queues it again."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            enqueue()
        return graph.replay

    def synchronize(self) -> None:
        """Wait until everything queued here is done."""
        self._stream.synchronize()


@dataclass(eq=False)
class InPlaceCache:
    """The cache of one batch, in buffers that the engine writes into.

    Attributes:
        buffers: Key and value of each layer, (B, kv_heads, S, head_dim), where S is all that the
            engine admits.
        length: Positions that are filled.
        step: What a step of one token reads beside them, in the order of the contract, and the
            logits it writes: always at the same addresses, as a CUDA graph wants them. Empty
            before the first step.
    """

    buffers: list[Tensor]
    length: int = 0
    step: list[Tensor] = field(default_factory=list)


class TrtRunner:
    """An engine that ``export_tensorrt`` built.

    Where its cache is written in place, decoding runs as a CUDA graph. Where it grows by
    concatenation, every call has new addresses and shapes, which is what a graph must not have:
    calls are queued one by one.

    Attributes:
        name: ``trt``.
        precision: That of the engine: ``fp32``, ``fp16`` or ``bf16``.
        vocab_size: Width of the logits.
        max_positions: Longest past + present in tokens that the engine admits.
        contract: What ``engine.json`` says.
    """

    name = ENGINE.name

    def __init__(
        self,
        library: Library,
        engine: Any,
        contract: Contract,
        *,
        device: torch.device,
        stream: Any,
    ) -> None:
        build = get_build(contract)
        self.precision: str = contract.precision
        self.vocab_size: int = contract.model.vocab_size
        self.max_positions: int = contract.max_seq_len
        self.contract = contract
        self._library = library
        self._engine = engine
        self._device = device
        self._stream = stream
        # TensorRT wants an address for every tensor, also for one of no elements.
        self._nothing = torch.zeros(1, dtype=torch.float32, device=device)
        self._profiles = build.profiles
        self._tokens = [spec for spec in contract.inputs if not spec.is_past]
        self._in_place = build.cache == IN_PLACE
        # Of the context for decoding: the cache whose addresses it has, and its captured step.
        self._bound: Callable[[], InPlaceCache | None] = lambda: None
        self._replay: Callable[[], object] | None = None
        self._contexts = {
            name: self._create_context(index, capture=self._in_place and name == "decode")
            for index, name in enumerate(build.profiles)
        }

    def _create_context(self, profile: int, *, capture: bool) -> Any:
        # One for each profile: to change the profile of one would make it plan anew at each turn
        # from prefill to decode.
        context = self._library.create_context(self._engine, capture=capture)
        if context is None:
            raise LpdeployError(
                "The GPU has too little free memory to run this engine. "
                "Build it again with a smaller `max_batch` or `max_seq_len`."
            )
        context.set_optimization_profile_async(profile, self._stream.handle)
        self._stream.synchronize()
        return context

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor,
        past: Any = None,
        last_only: bool = False,
        reserve: int = 0,  # noqa: ARG002 - buffers are as long as the engine admits
    ) -> Output:
        """Run a prompt, or one token after a past of P tokens; in place, any number after one.

        Args:
            input_ids: Shape (B, T), int64, on any device.
            attention_mask: Shape (B, P + T), int64; 0 at padding, which stands on the left.
            past: ``Output.past`` of a previous call, or None for a prefill. Where the cache is
                written in place, it is taken over.
            last_only: Return only the logits of the last token; the engine computes all.
            reserve: Without effect.

        Returns:
            Logits, float32, and the cache, both on the engine's device.

        Raises:
            LpdeployError: No profile of the engine admits these sizes.
            ValueError: Another call has gone on from ``past`` already.
        """
        batch, tokens = input_ids.shape
        total = attention_mask.shape[1]
        sizes = {"batch": batch, "sequence": tokens, "past": total - tokens, "total": total}
        profile = choose_profile(self._profiles, sizes)
        mask = attention_mask.to(self._device)
        values = [input_ids.to(self._device), mask, compute_position_ids(mask, tokens)]
        run = self._run_in_place if self._in_place else self._run_concat
        logits, present = run(profile, sizes, values, past)
        return Output(logits[:, -1:] if last_only else logits, present)

    def _run_concat(
        self, profile: str, sizes: Mapping[str, int], values: list[Tensor], past: Any
    ) -> tuple[Tensor, list[Tensor]]:
        caches = past if past is not None else self._build(self.contract.caches, sizes)
        # Named, so that what only the context has the address of lives until it is read.
        inputs = [*(value.contiguous() for value in values), *caches]
        results = self._build(self.contract.outputs, sizes)
        context = self._contexts[profile]
        self._bind(context, inputs, results)
        with self._stream.in_order():
            self._enqueue(context)
        logits, *present = results
        return logits, present

    def _run_in_place(
        self, profile: str, sizes: Mapping[str, int], values: list[Tensor], past: Any
    ) -> tuple[Tensor, InPlaceCache]:
        cache: InPlaceCache = self._build_cache(sizes) if past is None else past
        if cache.length != sizes["past"]:
            raise ValueError(
                f"the cache holds {cache.length} tokens, the attention mask has {sizes['past']} "
                "before the new ones; go on from the past of the last call"
            )
        decode = profile == "decode"
        described = [*self._tokens, self.contract.outputs[0]]
        step = cache.step if decode and cache.step else self._build(described, sizes)
        *inputs, logits = step
        _fill(inputs, values, start=cache.length)
        if decode:
            cache.step = step
        with self._stream.in_order():
            if decode:
                self._decode(cache)
            else:
                context = self._contexts[profile]
                self._bind(context, [*inputs, *cache.buffers], [logits, *cache.buffers])
                self._enqueue(context)
        cache.length = sizes["total"]
        return logits.clone() if decode else logits, cache  # the next step writes over its logits

    def _decode(self, cache: InPlaceCache) -> None:
        context = self._contexts["decode"]
        if self._bound() is not cache:
            *inputs, logits = cache.step
            self._bind(context, [*inputs, *cache.buffers], [logits, *cache.buffers])
            self._bound, self._replay = weakref.ref(cache), None
        if self._replay is not None:
            self._replay()
            return
        self._enqueue(context)
        if not self._library.captures_graphs:
            # After one plain run, which may allocate: that is not allowed while capturing.
            self._replay = self._stream.capture(lambda: self._enqueue(context))

    def _build_cache(self, sizes: Mapping[str, int]) -> InPlaceCache:
        # Zeros: positions that no token has filled yet get no weight, and nothing times NaN is NaN.
        buffers = self._build(self.contract.caches, sizes)
        return InPlaceCache([buffer.zero_() for buffer in buffers])

    def _build(self, described: Sequence[TensorSpec], sizes: Mapping[str, int]) -> Any:
        return [
            torch.empty(
                item.resolve(sizes),
                dtype=getattr(torch, item.dtype),
                device=self._device,
            )
            for item in described
        ]

    def _bind(self, context: Any, values: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        for item, tensor in zip(self.contract.inputs, values, strict=True):
            present = tensor if tensor.numel() else self._nothing
            context.set_input_shape(item.name, tuple(tensor.shape))
            context.set_tensor_address(item.name, present.data_ptr())
        for item, tensor in zip(self.contract.outputs, results, strict=True):
            context.set_tensor_address(item.name, tensor.data_ptr())

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.handle):
            raise LpdeployError(
                f"TensorRT does not run this engine on these inputs. {ENGINE.fix} "
                "If that does not help, please report it."
            )


def _fill(inputs: Sequence[Tensor], values: Sequence[Tensor], *, start: int) -> None:
    """Put a call's tokens, mask and positions where the engine reads them."""
    input_ids, mask, position_ids, write_indices = inputs
    input_ids.copy_(values[0])
    mask.zero_()[:, : values[1].shape[1]].copy_(values[1])  # (B, S), of which P + T are of tokens
    position_ids.copy_(values[2])
    write_indices.fill_(start)


def choose_profile(profiles: Mapping[str, Profile], sizes: Mapping[str, int]) -> str:
    """Return the name of the profile that admits a call.

    Args:
        profiles: Name -> dimension -> (min, opt, max).
        sizes: ``batch``, ``sequence``, ``past`` and ``total`` of the call.

    Raises:
        LpdeployError: None does; the sentence says which limit it is, and how to lift it.
    """
    for profile, limits in profiles.items():
        if all(limits[name][0] <= size <= limits[name][2] for name, size in sizes.items()):
            return profile
    largest = {name: max(limits[name][2] for limits in profiles.values()) for name in sizes}
    if sizes["batch"] > largest["batch"]:
        raise LpdeployError(
            f"A batch of {sizes['batch']} is more than the {largest['batch']} that this engine "
            f"admits. Use smaller batches, or export again with `max_batch={sizes['batch']}`."
        )
    if sizes["total"] > largest["total"]:
        raise LpdeployError(
            f"{sizes['total']} tokens are more than the {largest['total']} that this engine "
            f"admits. Shorten the prompt, or export again with `max_seq_len={sizes['total']}`."
        )
    raise LpdeployError(
        f"{sizes['sequence']} tokens after a past of {sizes['past']} fit no profile of this "
        "engine. It takes a prompt with nothing before it, or one token after a past."
    )


def load_trt_runner(folder: Path, *, device: str = "cuda") -> TrtRunner:
    """Open what ``export_tensorrt`` wrote.

    Args:
        folder: With ``model.engine`` and ``engine.json``.
        device: ``cuda`` or ``cuda:1``.

    Raises:
        ArtifactError: A file is missing or damaged, or was made for another GPU or by another
            version of the library.
        MissingDependencyError: The library that built it is not installed.
        LpdeployError: There is no GPU here.
    """
    target = torch.device(device)
    if target.type != "cuda":
        raise ValueError(f"device is {device!r}; an engine of TensorRT runs on cuda or cuda:N")
    contract = load_contract(folder, ENGINE)
    contract.check_files(folder, fix=ENGINE.fix)
    build = get_build(contract)
    library = load_library(build.library.name)
    _check_fit(folder, build, library, target)
    engine = _load_engine(folder, library)
    return TrtRunner(library, engine, contract, device=target, stream=Stream(target))


def get_build(contract: Contract) -> BuildRecord:
    """Return what the contract of an engine says of its build.

    Raises:
        ArtifactError: It says nothing.
    """
    if contract.build is None:
        raise ArtifactError(f"The contract does not say how the engine was built. {ENGINE.fix}")
    return contract.build


def _check_fit(folder: Path, build: BuildRecord, library: Library, device: torch.device) -> None:
    """Refuse an engine that this library or this GPU does not run."""
    built = build.library.version
    if library.version != built:
        raise ArtifactError(
            f"'{folder}' was built by {library.name} {built}, and {library.version} is installed; "
            f"an engine runs only on the version that built it. {ENGINE.fix}"
        )
    if not torch.cuda.is_available():
        raise LpdeployError(
            f"'{folder}' needs an NVIDIA GPU with its driver and a torch built for CUDA, and there "
            "is no GPU that torch can use. Run it where one is, or export for another `engine`."
        )
    capability = build.compute_capability
    here = ".".join(str(part) for part in torch.cuda.get_device_capability(device))
    if capability not in ("any", here):
        raise ArtifactError(
            f"'{folder}' was built for a GPU of compute capability {capability}; this one, "
            f"{torch.cuda.get_device_name(device)}, has {here}. {ENGINE.fix}"
        )


def _load_engine(folder: Path, library: Library) -> Any:
    library.messages.clear()
    runtime = library.module.Runtime(library.logger)
    engine = runtime.deserialize_cuda_engine((folder / ENGINE.main_file).read_bytes())
    if engine is None:
        raise ArtifactError(
            f"{library.name} {library.version} cannot load '{folder / ENGINE.main_file}': "
            f"{library.explain()}. {ENGINE.fix}"
        )
    return engine
