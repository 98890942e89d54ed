"""What rounding to 8 or 4 bits does to a run's exports; none of them is called equal."""

from collections.abc import Sequence
from dataclasses import dataclass

from lpdeploy.engines.verification import UNPACKED, Pair, VerifyResult
from lpdeploy.report.forms import Form, Text, get_plain


@dataclass(frozen=True)
class Rounding:
    """An export in 8 or 4 bits beside the model that it rounds.

    Attributes:
        name: Export, and its precision where that is known.
        pair: What ``verify`` found of it; None where it was not verified.
        text: What both were measured on, or None.
        before: Perplexity of the model that it rounds, or None.
        after: Its own, likewise.
    """

    name: str
    pair: Pair | None
    text: Text | None = None
    before: float | None = None
    after: float | None = None

    @property
    def growth(self) -> float | None:
        """How much more its perplexity is, as a share; None where it was not measured."""
        if self.before is None or self.after is None:
            return None
        return self.after / self.before - 1


def list_roundings(forms: Sequence[Form], found: VerifyResult | None) -> list[Rounding]:
    """List the exports of a run that round its weights, whether verified, measured or both."""
    pairs = {
        pair.b.removesuffix(UNPACKED): pair
        for pair in (found.pairs if found else ())
        if pair.b.endswith(UNPACKED)
    }
    plain = get_plain(forms)
    rounded = [form for form in forms if form.pruned and form.is_quantized]
    rows = [_compare(form, plain, pairs.pop(form.engine, None)) for form in rounded]
    return [*rows, *(Rounding(name, pair) for name, pair in pairs.items())]


def _compare(form: Form, plain: Form | None, pair: Pair | None) -> Rounding:
    known = plain.perplexity if plain is not None and not plain.is_quantized else {}
    for text, measured in form.perplexity.items():
        if text in known:
            before = known[text].perplexity
            return Rounding(form.runs_on, pair, text, before, measured.perplexity)
    return Rounding(form.runs_on, pair)
