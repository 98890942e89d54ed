"""The generate stage: what a model, and the one that it was pruned from, say to some prompts."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from lpdeploy.engines import TORCH, get_engine
from lpdeploy.errors import ArtifactError
from lpdeploy.generation.options import GenerateOptions
from lpdeploy.generation.results import Generated
from lpdeploy.generation.samples import list_samples, save_samples
from lpdeploy.generation.writer import OnText, Writer, load_base_writer, load_writer
from lpdeploy.models.compact import find_base
from lpdeploy.models.loading import resolve_device
from lpdeploy.models.place import check_has_base, locate_model


def generate_texts(  # noqa: PLR0913 - what the command takes, and callbacks
    model: str | os.PathLike[str],
    prompts: Sequence[str],
    options: GenerateOptions,
    *,
    engine: str = TORCH.name,
    device: str = "auto",
    with_base: bool = False,
    base: Path | None = None,
    save: bool = False,
    on_prompt: Callable[[str], None] = lambda _: None,
    on_text: OnText = lambda _: None,
) -> list[Generated]:
    """Let a model continue texts or answer prompts, one after the other.

    Args:
        model: Model folder, hub name, or a run, whose compacted model is taken.
        prompts: What to continue.
        options: How to go on.
        engine: What runs the model: ``torch``, or an engine that it was exported to.
        device: ``auto``, ``cpu`` or ``cuda``.
        with_base: Of a run, ask the unpruned base too, in torch.
        base: Where the base lies now, if it was moved.
        save: Of a run, keep the answers for its page, in place of those that were kept before.
        on_prompt: Is told each prompt before it is answered.
        on_text: Is told each piece of an answer.

    Returns:
        What the model wrote, and after it what its base wrote if that was asked.

    Raises:
        LpdeployError: The model, an export, the tokenizer or a prompt cannot be used.
        ValueError: ``prompts`` is one text, and no list of them.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is one text; give a list of texts")  # noqa: TRY004
    device = resolve_device(device)
    get_engine(engine).check(device)
    if with_base:
        check_has_base(model)
    place = locate_model(model)
    if save and place.run is None:
        raise ArtifactError(f"`save=True` needs a run, and '{model}' is none. Leave it out.")

    def write_all(writer: Writer, name: str, engine: str) -> Generated:
        answers = []
        for prompt, tokens in zip(prompts, encoded, strict=True):
            on_prompt(prompt)
            answers.append(writer.write(tokens, options, asked=prompt, on_text=on_text))
        return Generated(name, engine, writer.runner.precision, tuple(answers))

    with place.hold(shared=True):
        writer = load_writer(place, engine, device=device)
        # The base has the same tokens, and is asked in the form in which the model was tuned.
        encoded = [writer.encode(prompt, options) for prompt in prompts]
        found = [write_all(writer, str(model), engine)]
        if with_base and place.run is not None:
            plan = place.run.load_plan()
            folder = find_base(plan, base)
            del writer  # one model in memory at a time
            found.append(
                write_all(load_base_writer(folder, device=device), plan.base_model, TORCH.name)
            )
        if save and place.run is not None:
            save_samples(place.run, list_samples(found))
    return found
