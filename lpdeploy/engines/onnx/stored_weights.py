"""The weights in a graph of standard operators."""

from pathlib import Path

from lpdeploy.engines.weight_checks import (
    WeightsCheck,
    find_missing,
    list_expected,
    list_initializers,
)
from lpdeploy.models.loading import DTYPES


def check_weights(
    export: Path, model_folder: Path, *, adapter: Path | None, precision: str, a: str, b: str
) -> WeightsCheck:
    """Look for every weight of a checkpoint in its export, bit for bit.

    Args:
        export: The export.
        model_folder: The checkpoint.
        adapter: The adapter that stays beside it, if one does.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        a: Name of the stage of the checkpoint.
        b: Name of the export.
    """
    constants = list_initializers(export / "model.onnx").values()
    data = (constant.tobytes() for constant in constants)
    missing = find_missing(
        list_expected(model_folder, adapter, scaled=False), data, DTYPES[precision]
    )
    return WeightsCheck.summarize(a, b, missing)
