"""The model card beside a pruned checkpoint: what it is, and how to load it."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from lpdeploy.models.find import is_local
from lpdeploy.models.record import ModelRecord
from lpdeploy.plan import describe_method

_CARD = """\
---
base_model: {quoted_base}
library_name: transformers
tags:
- lpdeploy
- pruned
---

# {name}

{base}, with {removed} removed by
lpdeploy, after [LoRAPrune](https://arxiv.org/abs/2305.18403){method}. {merging} The licence is that
of the base model.

| | before | after |
|---|---|---|
| parameters | {parameters_before:,} | {parameters_after:,} |
| bytes of weights | {bytes_before:,} | {bytes_after:,} |
| layers | {layers_before} | {layers_after} |
| query heads | {heads_before} | {heads_after} |
| KV heads | {kv_before} | {kv_after} |
| FFN channels | {channels_before} | {channels_after} |

## Loading

```python
{loading}
```

{servers}
"""

_STOCK = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""

_OWN_CODE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

# No stock class has these widths: the modelling file in this folder does.
model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)"""

_ADAPTER = """

from peft import PeftModel

model = PeftModel.from_pretrained(model, "{folder}/adapter")"""


_ADAPTER_CARD = """\
---
{base_model}library_name: peft
tags:
- lora
- lpdeploy
- pruned
---

# LoRA of a pruned {base}

The shapes of this adapter are those of the pruned model, so that it does not load on {base} itself.
`lpdeploy compact` merges it into the model that remains. `lpdeploy compact --keep-adapter` writes
the pruned base, on which PEFT loads it:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("unmerged")
model = PeftModel.from_pretrained(model, "unmerged/adapter")
```
"""


def build_adapter_card(base_model: str) -> str:
    """Return the card of the adapter of a run as Markdown, without a path of this machine.

    Args:
        base_model: Folder or hub name of the unpruned model.
    """
    local = is_local(base_model)
    return _ADAPTER_CARD.format(
        base=Path(base_model).name if local else base_model,
        base_model="" if local else f"base_model: {json.dumps(base_model)}\n",
    )


def build_model_card(
    record: ModelRecord,
    config: PretrainedConfig,
    *,
    output: Path,
    recorded: Mapping[str, Any],
    stock: bool,
) -> str:
    """Return the card of a pruned model as Markdown.

    Args:
        record: Where the model comes from, and its shape.
        config: Config of the unpruned model.
        output: The model's folder, for the snippet that loads it.
        recorded: Options that ``prune`` recorded; empty where they are not known.
        stock: Whether transformers has a class of these widths.
    """
    loading = (_STOCK if stock else _OWN_CODE) + ("" if record.merged else _ADAPTER)
    base = Path(record.base_model).name if is_local(record.base_model) else record.base_model
    removed = 1 - record.parameters["after"] / record.parameters["before"]
    return _CARD.format(
        base=base,
        quoted_base=json.dumps(base),  # YAML reads a JSON string; a bare colon would break it
        name=f"{base} without {removed:.0%} of its parameters",
        removed=_describe_removed(record),
        method=f": {describe_method(recorded)}" if recorded else "",
        merging="LoRA is merged into the weights."
        if record.merged
        else "LoRA stands beside it, unmerged.",
        parameters_before=record.parameters["before"],
        parameters_after=record.parameters["after"],
        bytes_before=record.bytes["before"],
        bytes_after=record.bytes["after"],
        layers_before=config.num_hidden_layers,
        layers_after=len(record.channels),
        heads_before=config.num_attention_heads,
        heads_after=_describe(record.heads),
        kv_before=config.num_key_value_heads,
        kv_after=_describe(record.kv_heads),
        channels_before=config.intermediate_size,
        channels_after=_describe(record.channels),
        loading=loading.format(folder=output),
        servers=_describe_servers(config, record, stock=stock),
    )


def _describe_removed(record: ModelRecord) -> str:
    """Say how much is gone of the layers, and of the heads and channels of all of them together."""
    layers, heads, channels = (record.achieved.get(k, 0.0) for k in ("layers", "heads", "channels"))
    if layers and math.isclose(heads, layers) and math.isclose(channels, layers):
        return f"{layers:.0%} of its layers"
    if not layers:
        return f"{heads:.0%} of its attention heads and {channels:.0%} of its FFN channels"
    return (
        f"{layers:.0%} of its layers and in all {heads:.0%} of its attention heads and "
        f"{channels:.0%} of its FFN channels"
    )


def build_hub_card(card: str, *, repo: str, exports: Sequence[str], base_is_local: bool) -> str:
    """Return a card as it stands in a repository on the hub.

    Args:
        card: What ``build_model_card`` returned, perhaps edited since.
        repo: ``owner/name``; snippets load that, not the folder that the card was written for.
        exports: Phrases that describe the exports beside the checkpoint.
        base_is_local: Whether the base model has no name on the hub, only one of its folder.
    """
    card = re.sub(r'(from_pretrained\()"[^"]*"', rf'\1"{repo}"', card)
    parts = [card.rstrip("\n")]
    if base_is_local:
        # What stands there would be looked up on the hub.
        parts[0] = re.sub(r"^base_model: .*\n", "", parts[0], count=1, flags=re.MULTILINE)
        parts.append("The base model was a local folder; it is named here by its last part.")
    if exports:
        lines = [f"- {phrase}." for phrase in exports]
        parts += ["## Exports", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _describe(widths: list[int]) -> str:
    if len(set(widths)) == 1:
        return str(widths[0])
    return f"{min(widths)} to {max(widths)}, layer by layer: {', '.join(map(str, widths))}"


def _describe_servers(config: PretrainedConfig, record: ModelRecord, *, stock: bool) -> str:
    if stock:
        return (
            f"It is a stock `{record.architecture}`: what loads that class loads this model. "
            "Tensor parallelism needs a number of heads that the number of ranks divides."
        )
    why = (
        "vLLM, SGLang, TensorRT-LLM, ONNX Runtime GenAI and llama.cpp expect the same widths in "
        "every layer"
    )
    fix = "Run `lpdeploy prune --scope layer` without protected layers"
    if len(set(zip(record.heads, record.channels, strict=True))) == 1:
        why = (
            f"its {record.heads[0]} heads do not divide its hidden size of {config.hidden_size}, "
            "as its own class requires, and no other stock class has its biases"
        )
        fix = "Prune to a number of heads that divides the hidden size"
    return (
        f"No stock server loads this checkpoint: {why}. transformers loads it with the modelling "
        "file, and `lpdeploy export --engine onnx` makes a graph that ONNX Runtime runs. "
        f"{fix} for a stock checkpoint."
    )
