"""A checkpoint as a TensorRT engine, with TensorRT or TensorRT-RTX."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lpdeploy.engines.contract import (
    CONCAT,
    IN_PLACE,
    BuildRecord,
    Contract,
    LibraryRecord,
    Profile,
    TensorSpec,
    save_contract,
)
from lpdeploy.engines.exporting import describe_files
from lpdeploy.engines.onnx import ENGINE as ONNX
from lpdeploy.engines.onnx.exporter import export_onnx
from lpdeploy.engines.onnx.traced import SCATTER_OPSET
from lpdeploy.engines.trt import ENGINE
from lpdeploy.engines.trt.library import Library, load_library
from lpdeploy.errors import LpdeployError
from lpdeploy.folders import atomic_folder
from lpdeploy.run_folder import EXPORT

_GRAPH = "model.onnx"
_TIMING_CACHE = "timing.cache"


def export_tensorrt(  # noqa: PLR0913 - one keyword an option of the command
    model_folder: Path,
    output: Path,
    *,
    precision: str = "fp32",
    opset: int | None = None,
    adapter: Path | None = None,
    max_batch: int = 8,
    max_seq_len: int | None = None,
    overwrite: bool = False,
) -> Contract:
    """Build an engine with a KV cache, and profiles for prefill and for decode.

    Writes ``model.engine``, ``engine.json``, config and tokenizer, and ``timing.cache``, which
    makes the next build in its place (``overwrite``) a short one. The graph that the engine is
    built from is that of ``export_onnx``; it decides the type of every tensor. Its cache is
    written in place where the library's parser has TensorScatter and the opset is 24 (the
    default then); else each step concatenates past and present.

    Args:
        model_folder: A Hugging Face folder, stock or of per-layer widths.
        output: The folder to write.
        precision: ``fp32``, ``fp16`` or ``bf16``, as for ``export_onnx``.
        opset: Of the graph: 24 for a cache in place, 18 to 23 for one that is concatenated; None
            for the newest that the library takes.
        adapter: A peft adapter that stays beside the weights.
        max_batch: Largest batch that the engine admits.
        max_seq_len: Longest past + present that it admits; None for 2048 or the model's
            positions, whichever is less.
        overwrite: Replace what is at ``output``.

    Returns:
        The contract, as ``engine.json`` holds it.

    Raises:
        ArtifactError: ``output`` exists, or the model or adapter cannot be loaded.
        MissingDependencyError: Neither TensorRT nor TensorRT-RTX is installed.
        LpdeployError: An option is out of range, there is no GPU where one is needed, or the
            library does not take the graph.
    """
    ENGINE.check_options({"precision": precision})
    library = load_library()
    capability = find_compute_capability(library)
    newest = opset is None or opset >= SCATTER_OPSET
    in_place = newest and library.takes_operator("TensorScatter")
    with atomic_folder(output, kind=EXPORT, overwrite=overwrite) as folder:
        graph = folder / "graph"
        described = export_onnx(
            model_folder,
            graph,
            precision=precision,
            opset=opset,
            adapter=adapter,
            max_batch=max_batch,
            max_seq_len=max_seq_len,
            in_place=in_place,
        )
        profiles = build_profiles(
            max_batch=max_batch, max_seq_len=described.max_seq_len, in_place=in_place
        )
        _copy_timing_cache(output, folder)
        start = time.perf_counter()
        build_engine(library, graph / _GRAPH, folder, contract=described, profiles=profiles)
        seconds = time.perf_counter() - start
        _keep_settings(graph, folder)
        build = BuildRecord(
            library=LibraryRecord(library.name, library.version),
            compute_capability=capability,
            cache=IN_PLACE if in_place else CONCAT,
            profiles=profiles,
            build_seconds=round(seconds, 3),
        )
        files = describe_files(folder, ENGINE.main_file)
        contract = replace(described, engine=ENGINE.name, build=build, files=files)
        save_contract(contract, folder, ENGINE)
    return contract


def find_compute_capability(library: Library) -> str:
    """Return the GPU an engine is built for: ``9.0``, or ``any`` that TensorRT-RTX runs on.

    Raises:
        LpdeployError: The library builds on a GPU, and there is none.
    """
    if library.builds_for_any_gpu:
        return "any"
    if not torch.cuda.is_available():
        raise LpdeployError(
            f"{library.name} {library.version} builds engines on the GPU that runs them, and "
            "there is none that torch can use. Run this where it is, or uninstall tensorrt and "
            "build for RTX without a GPU: pip install 'lpdeploy[trt-rtx]'."
        )
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def build_profiles(*, max_batch: int, max_seq_len: int, in_place: bool) -> dict[str, Profile]:
    """Return the sizes that an engine admits, and those it is tuned for.

    Two profiles, in the order of their index: a prompt, and one token. Kernels are chosen for
    each alone. Where the cache is written in place, ``past`` is no size of a tensor, so any
    number of tokens may come after one: the decode profile takes one, the other two and more.

    Returns:
        Name -> dimension -> (min, opt, max), dimensions as in the contract's shapes.
    """
    middle = max(2, max_seq_len // 2)
    batch = (1, 1, max_batch)
    first, least = (2, 0) if in_place else (1, 1)
    return {
        "prefill": {
            "batch": batch,
            "sequence": (first, middle, max_seq_len),
            "past": (0, 0, max_seq_len - first if in_place else 0),
            "total": (first, middle, max_seq_len),
        },
        "decode": {
            "batch": batch,
            "sequence": (1, 1, 1),
            "past": (least, middle - 1, max_seq_len - 1),
            "total": (least + 1, middle, max_seq_len),
        },
    }


def build_engine(
    library: Library,
    graph: Path,
    folder: Path,
    *,
    contract: Contract,
    profiles: Mapping[str, Profile],
) -> None:
    """Build ``model.engine`` in ``folder`` from an ONNX graph, and its timing cache.

    Args:
        library: TensorRT or TensorRT-RTX.
        graph: ``model.onnx``, with its weights beside it: of any size, they are read by path.
        folder: Where the engine goes; a timing cache that is there is used.
        contract: Of the graph: its inputs.
        profiles: From ``build_profiles``.

    Raises:
        LpdeployError: The library does not take the graph, or cannot build it.
    """
    module = library.module
    library.messages.clear()
    builder = module.Builder(library.logger)
    network = library.create_network(builder)
    parser = module.OnnxParser(network, library.logger)
    if not parser.parse_from_file(str(graph)):
        raise LpdeployError(
            f"{library.name} {library.version} does not take this graph of opset "
            f"{contract.opset}: {_describe_parser_error(library, parser)}. "
            "Try another `opset` (18 to 24), or a newer version of the library."
        )
    library.allow_decomposed_attention(network)
    config = library.create_config(builder)
    for sizes in profiles.values():
        profile = builder.create_optimization_profile()
        _set_shapes(profile, contract.inputs, sizes)
        config.add_optimization_profile(profile)
    cache = _load_timing_cache(config, folder / _TIMING_CACHE)
    # A profile that contradicts itself is not added, and the build would go on without it.
    complete = config.num_optimization_profiles == len(profiles)
    plan = builder.build_serialized_network(network, config) if complete else None
    if plan is None:
        raise LpdeployError(
            f"{library.name} {library.version} cannot build the engine: {library.explain()}. "
            "Try a smaller `max_batch` or `max_seq_len`, another `precision` or another `opset`."
        )
    with (folder / ENGINE.main_file).open("wb") as stream:
        stream.write(plan)
    if cache is not None:
        (folder / _TIMING_CACHE).write_bytes(bytes(cache.serialize()))


def _describe_parser_error(library: Library, parser: Any) -> str:
    error = parser.get_error(0) if parser.num_errors else None
    if error is None or not error.node_operator():  # of no node: the log says which file it is
        return library.explain()
    # The first line may be no more than the node's name.
    reason = " ".join(error.desc().strip().splitlines()[:2]).rstrip(". ")
    return f"{error.node_operator()}: {reason}"


def _set_shapes(profile: Any, inputs: Sequence[TensorSpec], sizes: Profile) -> None:
    for item in inputs:
        smallest, usual, largest = (
            item.resolve({name: size[rank] for name, size in sizes.items()}) for rank in range(3)
        )
        profile.set_shape(item.name, smallest, usual, largest)


def _copy_timing_cache(output: Path, folder: Path) -> None:
    if (output / _TIMING_CACHE).is_file():
        shutil.copyfile(output / _TIMING_CACHE, folder / _TIMING_CACHE)


def _load_timing_cache(config: Any, path: Path) -> Any:
    """Set what an earlier build measured; None where the library measures nothing."""
    if not hasattr(config, "create_timing_cache"):
        return None
    before = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(before)
    # One of another version or GPU, or a damaged one, is refused: measure anew then.
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _keep_settings(graph: Path, folder: Path) -> None:
    """Move config and tokenizer out of the graph's folder, and delete the graph."""
    for path in sorted(graph.iterdir()):
        if not path.name.startswith(_GRAPH) and path.name != ONNX.contract_file:
            shutil.move(path, folder / path.name)
    shutil.rmtree(graph)
