"""Options of the commands that write text."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from lpdeploy.cli.common import write_flags
from lpdeploy.cli.types import COUNT, Count
from lpdeploy.engines.sampling import Sampling
from lpdeploy.generation.options import GenerateOptions

_Function = TypeVar("_Function", bound=Callable[..., Any])
_SAMPLING = ("temperature", "top_k", "top_p", "seed")
_OTHERS = ("max_new_tokens", "system")


def sampling_options(*, seed: int | None) -> Callable[[_Function], _Function]:
    """Add options that say how text is written; see ``build_generate_options``.

    Args:
        seed: Default of --seed; None for other draws each time.
    """
    options = (
        click.option(
            "--max-new-tokens",
            type=COUNT,
            help="Largest number of tokens to write.  [default: 256, or as many as there is room "
            "for]",
        ),
        click.option(
            "--temperature",
            type=float,
            default=Sampling.temperature,
            help="Divide the logits by this and draw; 0 takes the most likely token.",
        ),
        click.option(
            "--top-k",
            type=Count(0),
            default=Sampling.top_k,
            help="Draw among this many of the most likely tokens; 0 is all.",
        ),
        click.option(
            "--top-p",
            type=float,
            default=Sampling.top_p,
            help="Draw among the most likely tokens that together have this probability.",
        ),
        click.option(
            "--seed",
            type=Count(0),
            default=seed,
            help="Seed of the draws."
            + ("  [default: a new one each time]" if seed is None else ""),
        ),
        click.option("--system", metavar="TEXT", help="A system message before the prompt."),
    )

    def decorate(function: _Function) -> _Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def build_generate_options(values: dict[str, Any], *, prompt_format: str | None) -> GenerateOptions:
    """Take the values of ``sampling_options`` out of those of a command.

    Raises:
        UsageError: One is out of range, or two contradict each other.
    """
    sampling = {name: values.pop(name) for name in _SAMPLING}
    others = {name: values.pop(name) for name in _OTHERS}
    try:
        chosen = Sampling(**sampling)
    except ValueError as error:  # begins with the name of a field
        name, _, rest = str(error).partition(" ")
        raise click.UsageError(f"{write_flags(f'`{name}`')} {rest}.") from error
    try:
        return GenerateOptions(sampling=chosen, prompt_format=prompt_format, **others)
    except ValueError as error:
        raise click.UsageError(write_flags(f"{error}.")) from error
