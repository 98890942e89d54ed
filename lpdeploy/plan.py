"""What is pruned: groups of weights that go together, and the plan that says which stay.

It loads no heavy library, so that a plan can be read without torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lpdeploy.criteria import CRITERIA
from lpdeploy.errors import ArtifactError
from lpdeploy.records import load_record

SCHEMA_VERSION = 1
SCHEDULES = {
    "joint": "while fine-tuning with LoRA",
    "separate": "before fine-tuning with LoRA",
    "one-shot": "without fine-tuning",
}
"""Name -> when they are removed."""
HEADS = ("kv-groups", "query-heads")
"""What a group of heads is: a KV head with the query heads that read it, or a query head."""
LORA_INITS = ("peft", "groups")
"""How LoRA starts: with B = 0 everywhere, or with A = 0 where groups are columns."""
CHAT_TEMPLATE, INSTRUCTION = PROMPT_FORMATS = ("chat-template", "instruction")
"""How conversations are written: with the tokenizer's template, or under fixed headings."""


@dataclass(frozen=True)
class Slice:
    """What one group owns in one weight.

    Attributes:
        module: Dotted name of the Linear in the base model, e.g. ``model.layers.3.mlp.up_proj``.
        dim: 0 if a group is rows (its bias follows), 1 if it is columns.
        block: Consecutive rows or columns that one group owns.
    """

    module: str
    dim: int
    block: int


@dataclass(frozen=True)
class GroupSpec:
    """Groups that are scored and removed as wholes (paper, Appendix A and Figure 5).

    Attributes:
        name: ``layers.3.heads`` (one group is a KV head with its query heads, or a query head) or
            ``layers.3.channels`` (one group is an FFN channel).
        num_groups: How many groups the unpruned layer has.
        slices: What one group owns in each weight.
        clusters: Number of clusters of consecutive groups that must keep as many groups each: the
            KV heads, where a group is a query head.
        whole: Modules beside these of which no group owns a part: k_proj and v_proj, where a group
            is a query head.
    """

    name: str
    num_groups: int
    slices: tuple[Slice, ...]
    clusters: int = 1
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.clusters < 1 or self.num_groups % self.clusters:
            raise ValueError(
                f"{self.name} has {self.num_groups} groups, which {self.clusters} clusters do not "
                "share evenly"
            )

    @property
    def kind(self) -> str:
        """``heads`` or ``channels``."""
        return self.name.rsplit(".", 1)[1]

    @property
    def layer(self) -> int:
        """Index of the decoder layer."""
        return int(self.name.split(".")[1])


def removes_kv_heads(spec: GroupSpec) -> bool:
    """Tell whether a group of heads takes a KV head with it."""
    return spec.kind == "heads" and not spec.whole


def name_groups(spec: GroupSpec) -> str:
    """Return what the groups of a spec are called: KV heads, query heads or channels."""
    if spec.kind == "channels":
        return "channels"
    return "KV heads" if removes_kv_heads(spec) else "query heads"


def get_output(spec: GroupSpec) -> Slice:
    """Return the one weight of which a group is columns: ``o_proj`` or ``down_proj``."""
    return next(piece for piece in spec.slices if piece.dim == 1)


@dataclass(frozen=True)
class WidthRequest:
    """What decides the widths of a pruned model, before its groups are scored.

    Attributes:
        ratios: Kind of group (``heads``, ``channels``) -> share of them to remove. Empty while a
            budget has not been turned into ratios.
        multiples: Kind of group -> what the kept number is a multiple of.
        protect_first: Layers at the input that stay whole.
        protect_last: Layers at the output that stay whole.
        scope: ``layer`` (every layer keeps as many) or ``global`` (scores decide how many).
        drop_layers: Number of layers that go as wholes, before groups of the others do.
        heads: What a group of heads is: one of ``HEADS``.
    """

    ratios: Mapping[str, float]
    multiples: Mapping[str, int]
    protect_first: int = 0
    protect_last: int = 0
    scope: str = "layer"
    drop_layers: int = 0
    heads: str = "kv-groups"

    def compute_ratio(self, specs: Sequence[GroupSpec]) -> float:
        """Return the share of all groups to remove, where heads and channels may differ in it."""
        if len(set(self.ratios.values())) == 1:
            return self.ratios["heads"]
        asked = sum(spec.num_groups * self.ratios[spec.kind] for spec in specs)
        return asked / sum(spec.num_groups for spec in specs)


Kept = dict[str, list[int]]
"""Kept group indices of each spec, ascending, counted in the unpruned model."""


@dataclass(frozen=True)
class PruningPlan:
    """Which groups of a base model stay.

    Attributes:
        base_model: Folder or hub name the plan was made for.
        base_sha256: Hash of that model's weights and config.
        ratio: Share of groups that was asked to be removed.
        specs: All groups of the base model.
        kept: Kept indices of every spec. A layer of which no group is kept is dropped.
        achieved: Share removed, of ``groups``, ``heads``, ``channels``, ``layers`` and
            ``parameters``.
        refit_sha256: Hash of the refitted weights of the run; None if there are none.
        schema_version: Version of this file format.
    """

    base_model: str
    base_sha256: str
    ratio: float
    specs: tuple[GroupSpec, ...]
    kept: Kept
    achieved: Mapping[str, float] = field(default_factory=dict)
    refit_sha256: str | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        names = {spec.name for spec in self.specs}
        if unknown := self.kept.keys() - names:
            raise ValueError(f"kept names '{min(unknown)}', which is no group of specs")
        if missing := names - self.kept.keys():
            raise ValueError(f"kept lacks '{min(missing)}'")
        stay = self.layers
        if not stay:
            raise ValueError("no layer keeps a group; at least one must stay")
        for spec in self.specs:
            if spec.layer in stay:
                check_kept(spec, self.kept.get(spec.name, []))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that are not dropped, ascending, counted in the unpruned model."""
        return tuple(dict.fromkeys(spec.layer for spec in self.specs if self.kept.get(spec.name)))

    @property
    def dropped(self) -> tuple[int, ...]:
        """Layers that are dropped, ascending."""
        return tuple(sorted({spec.layer for spec in self.specs} - set(self.layers)))

    @property
    def kept_specs(self) -> tuple[GroupSpec, ...]:
        """The groups of the layers that are not dropped."""
        layers = self.layers
        return tuple(spec for spec in self.specs if spec.layer in layers)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict; ``load_plan`` reads it back."""
        return asdict(self)


_LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)")


def rename_layer(name: str, stay: Sequence[int]) -> str | None:
    """Return what a weight or module is called in a model of whose layers only some stay.

    Args:
        name: Its name in the unpruned model, such as ``model.layers.3.mlp.up_proj.weight``.
        stay: Layers that stay, ascending.

    Returns:
        Its new name; None if its layer is dropped.
    """
    found = _LAYER.search(name)
    if found is None:
        return name
    if int(found[0]) not in stay:
        return None
    return _LAYER.sub(str(stay.index(int(found[0]))), name, count=1)


def check_kept(spec: GroupSpec, kept: list[int]) -> None:
    """Check that ``kept`` is ascending, in range, unique, not empty, and even over clusters.

    Raises:
        ValueError: It is not.
    """
    if not kept:
        raise ValueError(f"{spec.name} keeps no group; at least one must stay")
    if kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= spec.num_groups:
        raise ValueError(
            f"kept indices of {spec.name} must be ascending, unique and below {spec.num_groups}"
        )
    size = spec.num_groups // spec.clusters
    counts = [sum(index // size == cluster for index in kept) for cluster in range(spec.clusters)]
    if len(set(counts)) > 1:
        raise ValueError(f"{spec.name} must keep as many query heads of each KV head")


def load_plan(path: Path) -> PruningPlan:
    """Read the plan of a run.

    Raises:
        ArtifactError: There is none, or it cannot be read.
    """
    if not path.is_file():
        raise ArtifactError(
            f"No {path.name} in '{path.parent}'. "
            f"Run 'lpdeploy prune MODEL --data SOURCE --output {path.parent}' first."
        )
    fix = "Use the lpdeploy that wrote it, or prune again."
    return load_record(PruningPlan, path, fix=fix, schema_version=SCHEMA_VERSION)


def describe_method(recorded: Mapping[str, Any]) -> str:
    """Say how groups were chosen, and when, from the options that a run's manifest recorded.

    Raises:
        ArtifactError: The manifest does not have them.
    """
    name, schedule = recorded.get("criterion"), recorded.get("schedule")
    if not isinstance(name, str) or schedule not in list(SCHEDULES):
        raise ArtifactError(
            "The run's manifest.json does not say how groups were chosen. Prune again."
        )
    # A criterion from outside the package may not be known to the process that writes a card.
    count = recorded.get("drop_layers")
    refit = "; the remaining weights were refitted" if recorded.get("refit") else ""
    own = [recorded.get(name) for name in ("head_ratio", "channel_ratio")]
    if count and not any(recorded.get("ratio") if ratio is None else ratio for ratio in own):
        when = SCHEDULES["separate" if schedule == "joint" else schedule]
        return f"chosen by the loss without them, {when}{refit}"
    words = CRITERIA[name].words if name in CRITERIA else f"the criterion '{name}'"
    noun = "whole layer was" if count == 1 else "whole layers were"
    layers = f"; {count} {noun} dropped first" if count else ""
    return f"chosen by {words}, {SCHEDULES[schedule]}{layers}{refit}"
