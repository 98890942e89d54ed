"""What to measure."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of ``lpdeploy eval``.

    Attributes:
        perplexity: Texts: files, folders or hub names.
        seq_len: Tokens a segment of them; 2,048 in the paper.
        max_segments: Only the first so many segments of each text.
        tasks: Names of tasks, and of groups of them.
        task_data: Folder with the data of the tasks; None takes lm-eval's own, from the hub.
        num_fewshot: Examples before each question; None takes the task's own number.
        limit: Only the first so many documents of each task.
        batch_size: Segments, or answers, a forward pass.
    """

    perplexity: tuple[str, ...] = ()
    seq_len: int = 2048
    max_segments: int | None = None
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 4

    def __post_init__(self) -> None:
        if not self.perplexity and not self.tasks:
            raise ValueError("Nothing to measure. Give `perplexity`, `tasks`, or both")
        if self.max_segments is not None and not self.perplexity:
            raise ValueError(
                "`max_segments` needs `perplexity`. Give it too, or leave `max_segments` out"
            )
        alone = {"task_data": self.task_data, "num_fewshot": self.num_fewshot, "limit": self.limit}
        for name, value in alone.items():
            if value is not None and not self.tasks:
                raise ValueError(f"`{name}` needs `tasks`. Give `tasks` too, or leave `{name}` out")
