"""The record of an engine: everything that the rest of lpdeploy needs to know about it.

Neither this module nor those that define a record import a heavy library, so that the command line
can list the engines without loading torch. The functions of a record import what they need when
they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lpdeploy.errors import LpdeployError, OptionError

if TYPE_CHECKING:
    from lpdeploy.engines.contract import Contract
    from lpdeploy.engines.runner import Runner
    from lpdeploy.engines.weight_checks import WeightsCheck


@dataclass(frozen=True)
class TritonBackend:
    """How Triton runs the main file of an export, with tensors in and out.

    Attributes:
        name: Name of the backend in Triton, such as ``onnxruntime``.
        batches: Whether Triton may batch requests along the first dimension of every tensor.
        joins: Whether a request may join a running batch of the text model between two tokens.
            Otherwise all requests of a batch start together.
    """

    name: str
    batches: bool
    joins: bool


@dataclass(frozen=True)
class Engine:
    """Something that runs a model, and what exports a checkpoint for it.

    ``load`` must be a module-level function: ``bench latency`` sends it to another process, which
    imports it by name.

    Attributes:
        name: Name that users type, and name of the folder that an export is written to.
        summary: Description of an export for help texts, beginning with a noun.
        load: ``load(folder, device=...)`` opens an export, or a checkpoint if the engine has no
            exports. ``device`` is ``cpu``, ``cuda``, ``cuda:1``, or None for the engine's default.
        find_library: ``find_library(device)`` imports the library that runs the model and raises
            ``MissingDependencyError`` if it is not installed. None if it is always installed.
        needs_gpu: Whether the engine runs only on an NVIDIA GPU.
        export: ``export(model_folder, output, adapter=..., overwrite=..., **options)`` writes an
            export and returns its contract. None if the engine runs checkpoints as they are.
        contract_file: Name of the file that holds the contract of an export.
        main_file: Name of the file whose hash identifies an export in the manifest.
        precisions: Precisions that ``export`` writes, the default first, out of ``fp32``,
            ``fp16``, ``bf16``, ``int8`` and ``int4``.
        options: Names of the other options of ``export``. Benchmarks set ``max_batch`` and
            ``max_seq_len``.
        check_weights: ``check_weights(export, model_folder, adapter=..., precision=..., a=...,
            b=...)`` compares the weights in an export with those of its checkpoint. None if they
            cannot be read back.
        apply_packed: ``apply_packed(export, model, round_activations=...)`` puts the int8 or int4
            weights of an export into a model in torch, so that the two can be compared. None if
            the engine has no such precisions.
        triton: How Triton serves an export. None if it does not.
        hub_card: Description of an export for the model card on the hub. None if exports are not
            uploaded, for example because they run on one kind of machine only.
    """

    name: str
    summary: str
    load: Callable[..., Runner]
    find_library: Callable[[str], object] | None = None
    needs_gpu: bool = False
    export: Callable[..., Contract] | None = None
    contract_file: str = "io.json"
    main_file: str = ""
    precisions: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    check_weights: Callable[..., WeightsCheck] | None = None
    apply_packed: Callable[..., None] | None = None
    triton: TritonBackend | None = None
    hub_card: str | None = None

    @property
    def fix(self) -> str:
        """The sentence that tells a user how to replace an unusable export."""
        return f"Export it again with 'lpdeploy export RUN|MODEL --engine {self.name} --overwrite'."

    def check(self, device: str) -> None:
        """Check that the engine can run here, before any work is done for it.

        Args:
            device: ``cpu``, ``cuda`` or ``cuda:1``.

        Raises:
            MissingDependencyError: Its library is not installed.
            LpdeployError: It needs a GPU, and ``device`` is not one.
        """
        if self.needs_gpu and not device.startswith("cuda"):
            raise LpdeployError(
                f"Engine {self.name} needs an NVIDIA GPU, and the device is {device}. "
                "Run it where torch finds a GPU, or use another `engine`."
            )
        if self.find_library is not None:
            self.find_library(device)

    def check_options(self, options: Mapping[str, object]) -> None:
        """Check that the exporter supports these options, and the precision among them.

        Raises:
            OptionError: It does not.
        """
        unknown = sorted(options.keys() - {"precision", *self.options})
        if unknown:
            raise OptionError(f"`{unknown[0]}` is no option of engine {self.name}. Leave it out.")
        precision = options.get("precision", self.precisions[0])
        if precision not in self.precisions:
            raise OptionError(
                f"`precision` {precision} is not supported by engine {self.name}. "
                f"Use {', '.join(self.precisions)}."
            )
