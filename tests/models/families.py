"""Bases of every supported family, runs made by hand, and what they compute, by plain loops."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lpdeploy.artifacts import save_json
from lpdeploy.families.groups import LINEARS, list_group_specs
from lpdeploy.models.loading import compute_model_sha256, get_model_classes, load_config
from lpdeploy.models.shapes import compute_achieved
from lpdeploy.plan import PruningPlan
from tests.helpers import VOCAB, make_tiny_model

FAMILIES = {
    "llama-mha": {"heads": 4},
    # Eight heads of 8 over a hidden size of 32: the projections are not square.
    "llama-gqa": {"heads": 8, "kv_heads": 4},
    "llama-bias": {"heads": 8, "kv_heads": 4, "attention_bias": True, "mlp_bias": True},
    "llama-tied": {"heads": 4, "tie_word_embeddings": True},
    # A window of five tokens is shorter than the twelve that the tests feed.
    "mistral": {"model_type": "mistral", "heads": 8, "kv_heads": 4, "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "heads": 8, "kv_heads": 4, "head_dim": 4},
    "qwen3": {
        "model_type": "qwen3", "heads": 8, "kv_heads": 4, "tie_word_embeddings": True,
        "attention_bias": True,
    },
}  # fmt: skip
# Widths that divide into the blocks of nf4; see ``check_4bit_widths``.
_WIDE = {"heads": 8, "kv_heads": 4, "hidden_size": 64, "intermediate_size": 64}
_OTHERS = {
    "llama-64": {**_WIDE, "tie_word_embeddings": True},
    "llama-64-bias": {**_WIDE, "attention_bias": True, "mlp_bias": True},
}
# Their config.json states no head_dim, as that of LLaMA-1 and Qwen2.
_WITHOUT_HEAD_DIM = ("llama-mha", "qwen2")

TOKENS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(7))


def make_base(folder, family, *, dtype=torch.float32, **config):
    """Save a tiny model whose norms are no ones and whose config is as sparse as real ones."""
    folder = make_tiny_model(folder, **{**(FAMILIES | _OTHERS)[family], **config})
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dropped = ["head_dim"] if family in _WITHOUT_HEAD_DIM else []
    edit_json(folder / "config.json", drop=dropped, dtype=str(dtype).removeprefix("torch."))
    return folder


def edit_json(path, *, drop=(), **values):
    data = json.loads(Path(path).read_text())
    data = {name: value for name, value in data.items() if name not in drop}
    Path(path).write_text(json.dumps(data | values))


def choose_kept(base, *, heads, channels, seed=0):
    """Choose random groups to keep; ``heads`` and ``channels`` are one number or one a layer."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for spec in list_group_specs(load_config(base)):
        count = heads if spec.kind == "heads" else channels
        count = count[spec.layer] if isinstance(count, list) else count
        order = torch.randperm(spec.num_groups, generator=generator)
        kept[spec.name] = sorted(order[:count].tolist())
    return kept


def keep_all(base):
    specs = list_group_specs(load_config(base))
    return {spec.name: list(range(spec.num_groups)) for spec in specs}


def make_plan(base, kept):
    config = load_config(base)
    specs = list_group_specs(config)
    return PruningPlan(
        base_model=str(base),
        base_sha256=compute_model_sha256(Path(base)),
        ratio=0.5,
        specs=specs,
        kept=kept,
        achieved=compute_achieved(config, specs, kept),
    )


def make_run(folder, base, kept):
    """Save a run as ``prune`` leaves it: a plan, and a peft adapter of the pruned shapes."""
    folder = Path(folder)
    plan = make_plan(base, kept)
    save_json(folder / "plan.json", plan.to_json())
    (folder / "adapter").mkdir()
    generator = torch.Generator().manual_seed(6)
    hidden = load_config(base).hidden_size
    tensors = {}
    for spec in plan.specs:
        for piece in spec.slices:
            width = len(kept[spec.name]) * piece.block
            rows, columns = (width, hidden) if piece.dim == 0 else (hidden, width)
            name = f"base_model.model.{piece.module}"
            # As large as training makes them: LoRA changes the logits, the base still counts.
            tensors[f"{name}.lora_A.weight"] = 0.2 * torch.randn(4, columns, generator=generator)
            tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(rows, 4, generator=generator)
    weights = folder / "adapter" / "adapter_model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "r": 4, "lora_alpha": 8, "target_modules": list(LINEARS), "inference_mode": True,
    }  # fmt: skip
    save_json(folder / "adapter" / "adapter_config.json", config)
    return folder


def load_factors(adapter):
    """Read lora_a, lora_b and scaling of each module, from the files alone."""
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    factors = {}
    for name, lora_a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            lora_b = tensors[name.replace(".lora_A.", ".lora_B.")]
            factors[module] = (lora_a, lora_b, config["lora_alpha"] / config["r"])
    return factors


def list_positions(kept, block):
    """List the rows or columns of kept groups, one by one."""
    return [group * block + offset for group in kept for offset in range(block)]


def build_reference(base, kept, adapter=None):
    """Build the unpruned model with the adapter merged and the removed groups made mute.

    A removed group adds nothing where its columns of o_proj and down_proj are zero. Written in
    float64, with plain loops, and no code of lpdeploy but the list of groups.
    """
    config = load_config(base)
    _, model_class = get_model_classes(config.model_type)
    stored = load_file(Path(base) / "model.safetensors")
    state = {name: tensor.double() for name, tensor in stored.items()}
    factors = load_factors(adapter) if adapter else {}
    for spec in list_group_specs(config):
        for piece in spec.slices:
            name = f"{piece.module}.weight"
            weight = state[name]
            positions = list_positions(kept[spec.name], piece.block)
            if piece.module in factors:
                lora_a, lora_b, scaling = factors[piece.module]
                update = scaling * lora_b.double() @ lora_a.double()
                for small, full in enumerate(positions):
                    if piece.dim == 0:
                        weight[full] += update[small]
                    else:
                        weight[:, full] += update[:, small]
            if piece.dim == 1:
                for column in range(weight.shape[1]):
                    if column not in positions:
                        weight[:, column] = 0
            # What the checkpoint rounds to its dtype, the reference rounds too.
            state[name] = weight.to(stored[name].dtype)
    model = model_class(config).float()
    missing, unexpected = model.load_state_dict(
        {name: tensor.float() for name, tensor in state.items()}, strict=False
    )
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def compute_logits(model, tokens=TOKENS):
    return model(tokens).logits


@torch.no_grad()
def decode(model, tokens=TOKENS, *, prompt=5):
    """Compute the logits by a prefill and one cached step for each further token."""
    output = model(tokens[:, :prompt], use_cache=True)
    logits = [output.logits]
    for position in range(prompt, tokens.shape[1]):
        output = model(
            tokens[:, position : position + 1],
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        logits.append(output.logits)
    return torch.cat(logits, dim=1)
