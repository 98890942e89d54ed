"""A base whose layers are sharded over the ranks (FSDP2): loading it, and reading a rank's rows.

Each rank holds a share of the rows of every weight of a decoder layer; before a layer runs, its
weights are gathered, and freed again after it. Embeddings, the last norm and the head stay whole on
every rank: a rank needs each of them whole in every forward pass, the head just when memory is
tightest, so sharding them would save nothing at the peak.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig

from lpdeploy.models.loading import DTYPES, get_model_classes, load_config, refuse_incomplete
from lpdeploy.models.quantized import read_weight
from lpdeploy.models.weight_files import index_weights


def load_sharded_model(folder: Path, *, dtype: str, device: torch.device) -> Any:
    """Load a checkpoint of which each rank reads and keeps its rows; all ranks call it at once.

    The model is built without memory, divided, and filled from the files row by row, so a rank
    never holds more than its share of the layers.

    Args:
        folder: What ``resolve_model`` returned, seen by every rank.
        dtype: ``auto`` (that of the checkpoint), ``fp32``, ``fp16`` or ``bf16``.
        device: Of this rank.

    Returns:
        A transformers causal LM in eval mode.

    Raises:
        ArtifactError: A weight is missing, of another shape, or its file is damaged.
    """
    from torch.distributed import get_world_size, init_device_mesh
    from torch.distributed.fsdp import fully_shard

    config = load_config(folder)
    _, model_class = get_model_classes(config.model_type)
    with torch.device("meta"):
        model = model_class(config)
    model.to(DTYPES.get(dtype, config.dtype or torch.float32))
    mesh = init_device_mesh(device.type, (get_world_size(),))
    decoder = model.model
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    # The root has no weights of its own, but lets a layer's weights travel while another runs.
    fully_shard(decoder, mesh=mesh, ignored_params=set(model.parameters()))
    for layer in decoder.layers:
        layer.to_empty(device=device)
    for module in (decoder.embed_tokens, decoder.norm, model.lm_head):
        module.to_empty(device=device)
    model.tie_weights()
    # Its table is in no file; it is computed on the CPU, as for a model that is not sharded.
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(device)
    _fill(model, folder, config)
    return model.eval()


@torch.no_grad()
def _fill(model: nn.Module, folder: Path, config: PretrainedConfig) -> None:
    wanted = dict(model.named_parameters())  # a head tied to the embeddings is not named again
    wrong = set(wanted)
    for name, stored in index_weights(folder, config).items():
        if name in wanted:
            with safe_open(stored.file, framework="pt") as tensors:
                if _fill_rows(wanted[name], tensors.get_slice(stored.name)):
                    wrong.discard(name)
    refuse_incomplete(folder, wrong)


def _fill_rows(parameter: Any, stored: Any) -> bool:
    """Copy this rank's rows of a stored tensor; False where its shape is another."""
    if tuple(stored.get_shape()) != tuple(parameter.shape):
        return False
    rows = list_own_rows(parameter)
    local = parameter.to_local() if is_shard(parameter) else parameter
    if len(rows):
        local.copy_(stored[rows.start : rows.stop])
    return True


def is_shard(weight: Any) -> bool:
    """Tell whether a weight is divided over ranks."""
    return hasattr(weight, "device_mesh")  # a DTensor, without importing what one process needs not


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a model, inside peft or not, was loaded by ``load_sharded_model``."""
    return any(is_shard(parameter) for parameter in model.parameters())


def list_own_rows(weight: Any) -> range:
    """List the rows of a weight that this rank holds: consecutive, and maybe none."""
    out = weight.shape[0]
    if not is_shard(weight):
        return range(out)
    share = -(-out // weight.device_mesh.size())  # as torch.chunk divides them
    start = min(weight.device_mesh.get_local_rank() * share, out)
    return range(start, min(start + share, out))


@dataclass(frozen=True)
class ShardedRows:
    """A sharded weight of which this rank's rows are read as those of a tensor are.

    Attributes:
        weight: The DTensor, its rows divided over the ranks.
    """

    weight: Any

    @property
    def shape(self) -> Any:
        """(out, in) of the whole weight."""
        return self.weight.shape

    @property
    def own_rows(self) -> range:
        """Rows that can be read."""
        return list_own_rows(self.weight)

    def __getitem__(self, rows: slice) -> Tensor:
        """Return rows of the whole weight, all of them this rank's, shape (rows, in)."""
        start = self.own_rows.start
        return self.weight.to_local()[rows.start - start : rows.stop - start].detach()


def get_rows(linear: Any) -> Tensor | ShardedRows:
    """Return the weight of a base Linear, of which rows can be read wherever and however stored."""
    return ShardedRows(linear.weight) if is_shard(linear.weight) else read_weight(linear)
