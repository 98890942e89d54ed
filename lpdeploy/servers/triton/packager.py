"""A model repository of Triton: an export, text in and text out over it, and their configs."""

import re
import shlex
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lpdeploy.engines import ENGINES
from lpdeploy.engines.contract import IN_PLACE, Contract, TensorSpec, load_contract
from lpdeploy.engines.engine import Engine
from lpdeploy.engines.export import export_folder
from lpdeploy.engines.exports import find_export
from lpdeploy.engines.trt.library import EXTRAS
from lpdeploy.errors import OptionError
from lpdeploy.models.loading import load_config, load_tokenizer
from lpdeploy.models.place import ModelPlace
from lpdeploy.servers.readme import render, save_readme
from lpdeploy.servers.sources import has_chat_template, take_export
from lpdeploy.servers.verdicts import Packed

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_WITHOUT_CONTAINER = "python tools/servers/triton_server.py serve"
_WARM_UP = "Once upon a time"
_WARM_UP_SIZES = {"sequence": 1, "past": 1, "total": 2}  # one token after another


def package_triton(  # noqa: PLR0913 - one keyword an option of the command
    place: ModelPlace,
    folder: Path,
    *,
    output: Path,
    engine: str = "ort",
    precision: str = "fp32",
    name: str | None = None,
    max_batch: int | None = None,
    max_seq_len: int | None = None,
    gpu: Sequence[int] = (),
) -> Packed:
    """Fill a model repository of three models that share one export.

    ``NAME`` takes text and gives text, as a whole or in pieces, for all requests in one running
    batch; ``NAME_whole`` gives the same to clients that take one response only; ``NAME_engine`` is
    the export, with its tensors in and out where a backend of Triton can do that.

    Args:
        place: The model, a Hugging Face folder.
        folder: To fill.
        output: Where it will be, for the commands.
        engine: An engine that Triton serves. An export of this very model that lies in its usual
            place and is what the other options ask for is taken over; else one is made.
        precision: Of the export.
        name: Of the models; None for the name of ``output``.
        max_batch: Requests that decode at once; None for what the export is made for.
        max_seq_len: Longest prompt and answer together; likewise.
        gpu: Devices that serve, one instance each; none for the CPU, or for GPU 0 where the engine
            needs one.

    Returns:
        With the details ``name``, ``engine``, ``precision``, ``max_batch``, ``max_seq_len``, and
        ``exported``: whether the export was made now.

    Raises:
        ArtifactError: There is no tokenizer, or the model cannot be exported.
        OptionError: An option is out of range.
    """
    model = place.folder
    name = _resolve_name(name, output)
    record = _get_engine(engine)
    load_tokenizer(model, load_config(model))
    exported = folder / f"{name}_engine" / "1"
    exported.parent.mkdir()
    wanted = {"precision": precision, "max_batch": max_batch, "max_seq_len": max_seq_len}
    wanted = {option: value for option, value in wanted.items() if value is not None}
    contract, made = _place_export(place, exported, engine=record, wanted=wanted)
    gpus = list(gpu) or ([0] if record.needs_gpu else [])
    values = {
        "name": name,
        "engine": engine,
        "gpus": gpus,
        "max_batch": contract.max_batch,
        "max_seq_len": contract.max_seq_len,
    }
    tensors = _save_tensor_model(exported.parent, contract, record, values)
    _save_python_model(folder / name, "text", "TextModel", values)
    _save_python_model(folder / f"{name}_whole", "whole", "WholeModel", values)
    _save_warm_up(folder / name / "warmup")
    command = ["tritonserver", f"--model-repository={output}", "--model-control-mode=explicit",
               f"--load-model={name}", f"--load-model={name}_whole"]  # fmt: skip
    save_readme(
        folder, "triton/README", path=output.resolve(), tensors=tensors,
        command=shlex.join(command), options=command[2:], precision=contract.precision,
        backend=record.triton, extra=_find_extra(contract, gpus=gpus),
        built=contract.build is not None, chat=has_chat_template(model), **values,
    )  # fmt: skip
    kept = {key: values[key] for key in ("name", "engine", "max_batch", "max_seq_len")}
    return Packed(
        command=shlex.join(command),
        notes=[f"Without a container, from lpdeploy's checkout: {_WITHOUT_CONTAINER} {output}"],
        details={**kept, "precision": contract.precision, "exported": made},
    )


def _resolve_name(name: str | None, output: Path) -> str:
    chosen = name or output.name
    if not _NAME.fullmatch(chosen):
        raise OptionError(
            f"'{chosen}' is not a valid model name for Triton. Use letters, digits, '_', '-' and "
            "'.', starting with a letter, and set it with `name`."
        )
    return chosen


def _get_engine(name: str) -> Engine:
    served = [engine.name for engine in ENGINES.values() if engine.triton is not None]
    if name not in served:
        raise OptionError(f"Triton does not serve `engine` {name}. Use {' or '.join(served)}.")
    return ENGINES[name]


def _find_extra(contract: Contract, *, gpus: Sequence[int]) -> str:
    """Return the extra of lpdeploy that installs the engine where Triton runs."""
    if contract.build is not None:
        return EXTRAS[contract.build.library.name]
    return "gpu" if gpus else "cpu"


def _place_export(
    place: ModelPlace, target: Path, *, engine: Engine, wanted: Mapping[str, Any]
) -> tuple[Contract, bool]:
    """Put an export at ``target``; return its contract, and whether it was made now."""
    found = find_export(place, engine.name)
    contract = load_contract(found, engine) if found else None
    if found and contract and all(getattr(contract, name) == wanted[name] for name in wanted):
        target.mkdir()
        take_export(found, target)
        return contract, False
    return export_folder(engine.name, place.folder, target, **wanted), True


def _save_tensor_model(
    folder: Path, contract: Contract, engine: Engine, values: Mapping[str, Any]
) -> str | None:
    """Write the config that lets a backend run the export's tensors.

    Returns:
        None, or why there is none: Triton gives an output memory of its own, which a cache that is
        written in place cannot have.
    """
    if contract.build is not None and contract.build.cache == IN_PLACE:
        return "its cache is written in place, which Triton's tensorrt backend cannot do"
    assert engine.triton is not None
    rows = contract.max_batch if engine.triton.batches else 0
    _save_config(
        folder, "engine", backend=engine.triton.name, file=engine.main_file, rows=rows, **values,
        inputs=[_describe_tensor(item, rows=rows) for item in contract.inputs],
        outputs=[_describe_tensor(item, rows=rows) for item in contract.outputs],
        profiles=[str(index) for index in range(len(contract.build.profiles))]
        if contract.build is not None
        else [],
    )  # fmt: skip
    return None


def _describe_tensor(item: TensorSpec, *, rows: int) -> dict[str, Any]:
    """Write a tensor of a contract in the words of Triton, which leaves out the batch."""
    names = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}
    shape = item.shape[1 if rows else 0 :]
    return {
        "name": item.name,
        "type": names.get(item.dtype, item.dtype.upper()),
        "dims": [size if isinstance(size, int) else -1 for size in shape] or [1],
        "reshape": not shape,  # no tensor of Triton has no dimension
        "warm_up": [n if isinstance(n, int) else _WARM_UP_SIZES.get(n, 1) for n in shape],
    }


def _save_python_model(folder: Path, kind: str, base: str, values: Mapping[str, Any]) -> None:
    """Write a model of the Python backend, whose code is lpdeploy's own."""
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(
        '"""Served by lpdeploy, which must be installed where Triton runs."""\n\n'
        f"from lpdeploy.servers.triton.{kind}_model import {base} as TritonPythonModel\n",
        encoding="utf-8",
    )
    _save_config(folder, kind, **values)


def _save_config(folder: Path, kind: str, **values: Any) -> None:
    text = render(f"triton/{kind}.pbtxt.j2", **values)
    (folder / "config.pbtxt").write_text(text, encoding="utf-8")


def _save_warm_up(folder: Path) -> None:
    """Write the tensors of a request that Triton sends itself before it says it is ready."""
    folder.mkdir()
    text = _WARM_UP.encode()
    (folder / "text").write_bytes(struct.pack("<I", len(text)) + text)
    (folder / "tokens").write_bytes(struct.pack("<i", 2))
