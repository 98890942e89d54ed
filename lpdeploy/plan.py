"""What is pruned: groups of weights that go together, and the plan that says which stay.

It loads no heavy library, so that a plan can be read without torch.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lpdeploy.criteria import CRITERIA
from lpdeploy.errors import ArtifactError

SCHEMA_VERSION = 1
SCHEDULES = {
    "joint": "while fine-tuning with LoRA",
    "separate": "before fine-tuning with LoRA",
    "one-shot": "without fine-tuning",
}
"""Name -> when they are removed."""


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
        name: ``layers.3.heads`` (one group is a KV head with its query heads) or
            ``layers.3.channels`` (one group is an FFN channel).
        num_groups: How many groups the unpruned layer has.
        slices: What one group owns in each weight.
    """

    name: str
    num_groups: int
    slices: tuple[Slice, ...]

    @property
    def kind(self) -> str:
        """``heads`` or ``channels``."""
        return self.name.rsplit(".", 1)[1]

    @property
    def layer(self) -> int:
        """Index of the decoder layer."""
        return int(self.name.split(".")[1])


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
    """

    ratios: Mapping[str, float]
    multiples: Mapping[str, int]
    protect_first: int = 0
    protect_last: int = 0
    scope: str = "layer"


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
        kept: Kept indices of every spec.
        achieved: Share removed, of ``groups``, ``heads``, ``channels`` and ``parameters``.
        schema_version: Version of this file format.
    """

    base_model: str
    base_sha256: str
    ratio: float
    specs: tuple[GroupSpec, ...]
    kept: Kept
    achieved: Mapping[str, float] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for spec in self.specs:
            check_kept(spec, self.kept.get(spec.name, []))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict; ``from_json`` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, where: str = "The plan") -> "PruningPlan":
        """Read a plan back.

        Raises:
            ArtifactError: Another schema version, a missing key, or impossible indices.
        """
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{where} has schema version {version!r}; this lpdeploy reads {SCHEMA_VERSION}. "
                "Use the lpdeploy that wrote it, or prune again."
            )
        try:
            specs = tuple(
                GroupSpec(
                    name=spec["name"],
                    num_groups=spec["num_groups"],
                    slices=tuple(Slice(**item) for item in spec["slices"]),
                )
                for spec in data["specs"]
            )
            return cls(**{**data, "specs": specs})
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{where} is not a plan that lpdeploy wrote ({error}). Prune again."
            ) from error


def check_kept(spec: GroupSpec, kept: list[int]) -> None:
    """Check that ``kept`` is ascending, in range, unique and not empty.

    Raises:
        ValueError: It is not.
    """
    if not kept:
        raise ValueError(f"{spec.name} keeps no group; at least one must stay")
    if kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= spec.num_groups:
        raise ValueError(
            f"kept indices of {spec.name} must be ascending, unique and below {spec.num_groups}"
        )


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
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"'{path}' is not valid JSON ({error}). Prune again.") from error
    return PruningPlan.from_json(data, where=str(path))


def describe_method(recorded: Mapping[str, Any]) -> str:
    """Say how groups were chosen, and when, from the options that a run's manifest recorded."""
    name = recorded["criterion"]
    # A criterion from outside the package may not be known to the process that writes a card.
    words = CRITERIA[name].words if name in CRITERIA else f"the criterion '{name}'"
    return f"chosen by {words}, {SCHEDULES[recorded['schedule']]}"
