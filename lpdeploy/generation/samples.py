"""What models wrote, kept in a run for its page: ``samples.json``."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from lpdeploy.artifacts import save_json
from lpdeploy.generation.results import Generated
from lpdeploy.run_folder import RunFolder

PRUNED, DENSE = "pruned", "dense"


@dataclass(frozen=True)
class Sample:
    """What a model wrote, in a list in ``samples.json``.

    Attributes:
        model: What the model is called on the page.
        opening: The prompt.
        text: What followed.
    """

    model: str
    opening: str
    text: str


def list_samples(found: Sequence[Generated]) -> list[Sample]:
    """List what the base of a run wrote, if it was asked, and what the run's model wrote.

    Args:
        found: What the model wrote, and after it what its base wrote.
    """
    named = list(zip((PRUNED, DENSE), found, strict=False))
    return [
        Sample(f"{name}, {each.engine} {each.precision}", answer.prompt, answer.text)
        for name, each in reversed(named)
        for answer in each.answers
    ]


def save_samples(run: RunFolder, samples: Iterable[Sample]) -> None:
    """Keep what models wrote in a run, in place of what was kept before.

    Raises:
        ArtifactError: The file has changed since lpdeploy wrote it.
    """
    run.check_files(run.samples)
    with run.recorded(run.samples):
        save_json(run.samples, [asdict(sample) for sample in samples])
