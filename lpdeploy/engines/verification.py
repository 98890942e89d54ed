"""What ``verify`` found, as ``verify.json`` holds it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lpdeploy.engines.weight_checks import WeightsCheck
from lpdeploy.errors import ParityError

UNPACKED = "-unpacked/torch"
"""How the stage ends in which torch computes with the packed weights of an export."""


@dataclass(frozen=True)
class Pair:
    """Two stages compared.

    Attributes:
        a: The one.
        b: The other.
        max_abs_diff: Largest absolute difference of two logits.
        max_abs_logit: Largest absolute logit of ``a``.
        top1_agreement: Share of tokens after which both put the same token first.
        tolerance: What ``max_abs_diff`` may be. None if ``b`` is ``a`` with its weights rounded:
            then the difference is what rounding does.
        ok: Whether it is within the tolerance.
        first_layer: Index of the first decoder layer after which hidden states differ; None if
            all agree, or if one of the two is an export.
    """

    a: str
    b: str
    max_abs_diff: float
    max_abs_logit: float
    top1_agreement: float
    tolerance: float | None
    ok: bool
    first_layer: int | None = None

    @property
    def verdict(self) -> str:
        """``equal`` within the tolerance, ``rounded``, which is not equal, or ``different``."""
        if not self.ok:
            return "different"
        return "rounded" if self.tolerance is None else "equal"


@dataclass(frozen=True)
class VerifyResult:
    """Every stage compared with an earlier one.

    Attributes:
        pairs: The logits compared, in the order of the stages.
        weights: The weights compared, one by one.
        model_sha256: Hash of the model of a run; None for other models.
        exports: Name of each export of a run that was compared -> hash of its contract.
    """

    pairs: tuple[Pair, ...]
    weights: tuple[WeightsCheck, ...] = ()
    model_sha256: str | None = None
    exports: dict[str, str] = field(default_factory=dict)

    @property
    def quantized(self) -> dict[str, float]:
        """Export in 8 or 4 bits -> share of the tokens after which it ranks the same one first."""
        return {
            pair.b.removesuffix(UNPACKED): pair.top1_agreement
            for pair in self.pairs
            if pair.b.endswith(UNPACKED)
        }

    @property
    def ok(self) -> bool:
        """Whether every pair agrees or is rounded, and every weight is right."""
        return all(pair.ok for pair in self.pairs) and all(check.ok for check in self.weights)

    def check(self) -> None:
        """Check that all stages agree.

        Raises:
            ParityError: Some do not. The message says where they differ first: a weight says more
                than a layer, and a layer more than logits.
        """
        again = "Make {} again; if it still differs, please report it."
        for check in self.weights:
            if not check.ok:
                named = ", ".join(check.wrong[:3]) + (", ..." if len(check.wrong) > 3 else "")
                raise ParityError(
                    f"{len(check.wrong)} of the {check.num_weights} weights of {check.b} are not "
                    f"those of {check.a}: {named}. {again.format(check.b)}"
                )
        for pair in self.pairs:
            if not pair.ok:
                place = (
                    "" if pair.first_layer is None else f", first after layer {pair.first_layer}"
                )
                raise ParityError(
                    f"{pair.a} and {pair.b} differ by {pair.max_abs_diff:.2e}, more than "
                    f"{pair.tolerance:.2e}{place}. {again.format(pair.b)}"
                )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        weights = [{**asdict(check), "ok": check.ok} for check in self.weights]
        pairs = [asdict(pair) for pair in self.pairs]
        own = {"model_sha256": self.model_sha256, "exports": self.exports}
        return {"ok": self.ok, "pairs": pairs, "weights": weights, **own}

    def merge(self, old: "VerifyResult", *, present: Mapping[str, str]) -> "VerifyResult":
        """Keep what an earlier result says of other exports of the same model.

        Args:
            old: The earlier result.
            present: The exports that are there now, as in ``exports``.
        """
        if old.model_sha256 != self.model_sha256:
            return self
        kept = {
            name: sha256
            for name, sha256 in old.exports.items()
            if name not in self.exports and present.get(name) == sha256
        }
        names = {*kept, *(f"{name}{UNPACKED}" for name in kept)}
        return replace(
            self,
            pairs=(*self.pairs, *(pair for pair in old.pairs if pair.b in names)),
            weights=(*self.weights, *(check for check in old.weights if check.b in names)),
            exports={**self.exports, **kept},
        )
