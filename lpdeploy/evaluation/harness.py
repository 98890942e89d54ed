"""lm-eval: its tasks, its prompts and its metrics over a Runner.

The only module that knows lm_eval, which is optional: import this one where it is needed.
"""

import contextlib
import difflib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api import task as task_module
from lm_eval.api.group import Group
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from lpdeploy.engines.generation import generate
from lpdeploy.engines.runner import Runner
from lpdeploy.errors import ArtifactError, DataError, quote_error
from lpdeploy.evaluation.results import Metrics
from lpdeploy.evaluation.scoring import Score, compute_loglikelihoods
from lpdeploy.evaluation.tasks import build_config, get_default_shots, load_task_files

_SHOT_SEED = 1234  # lm-eval's own default, so that it shows the same examples
_MAX_NEW_TOKENS = 256  # what HFLM generates where a task does not say

Progress = Callable[[int, int], None]

logger = logging.getLogger(__name__)


class RunnerLM(TemplateLM):
    """A Runner as lm-eval's model: what its own HFLM computes, on any engine.

    Tokens, special tokens and truncation are those of HFLM with its defaults: a text gets the
    special tokens that the tokenizer adds by itself, unless it starts with bos already; an empty
    context is bos, or eos where there is none.

    Attributes:
        runner: The model.
        tokenizer: That of the model.
        batch_size: Rows a forward pass.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_tokens: Collection[int] = (),
        batch_size: int = 4,
        on_progress: Progress = lambda *_: None,
    ) -> None:
        super().__init__()
        own = tokenizer.eos_token_id
        self.num_cut = 0
        self._stop_tokens = {*stop_tokens, *(() if own is None else (own,))}
        self.runner, self.tokenizer, self.batch_size = runner, tokenizer, batch_size
        self._on_progress = on_progress
        if self.prefix_token_id is None:
            raise ArtifactError(
                "The model's tokenizer has neither bos nor eos, one of which a text without "
                "context starts with. Name one in its tokenizer_config.json."
            )
        self._prefix = str(tokenizer.decode([self.prefix_token_id]))

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """The token that stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,  # noqa: FBT001 - lm-eval's signature
        **_: Any,
    ) -> list[int]:
        """Tokenize; by default with special tokens, unless the text brings its own bos."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[Score]:
        """Score (context, continuation) pairs."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Score]:
        room = self.runner.max_positions + 1  # the last token is only predicted
        self.num_cut += sum(len(context) + len(answer) > room for _, context, answer in requests)
        return compute_loglikelihoods(
            self.runner,
            [(context, continuation) for _, context, continuation in requests],
            batch_size=self.batch_size,
            on_progress=self._on_progress,
        )

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        """Score whole texts, in windows where they are longer than the model's positions."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            pieces = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.runner.max_positions,
                context_len=1,
            )
            for piece in pieces:
                windows.append((None, *utils.make_disjoint_window(piece)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score.loglikelihood
        return totals

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        """Continue texts greedily until a stop sequence.

        Raises:
            DataError: A task asks for sampling or beams, or for more tokens than fit.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts: dict[int, str] = {}
        for indices in groups.values():
            options = _check_generation(self.runner, requests[indices[0]].args[1])
            room = self.runner.max_positions - options["max_gen_toks"]
            whole = {i: self.tok_encode(requests[i].args[0]) for i in indices}
            self.num_cut += sum(len(prompt) > room for prompt in whole.values())
            prompts = {i: prompt[-room:] for i, prompt in whole.items()}
            order = sorted(indices, key=lambda i: -len(prompts[i]))
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                written = self._continue([prompts[i] for i in batch], options)
                texts.update(zip(batch, written, strict=True))
                self._on_progress(len(texts), len(requests))
        return [texts[index] for index in range(len(requests))]

    def _continue(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        eos = self.eot_token_id
        rows = generate(
            self.runner,
            prompts,
            max_new_tokens=options["max_gen_toks"],
            eos_ids=self._stop_tokens,
        )
        stop = handle_stop_sequences(
            list(options["until"]), eos=None if eos is None else self.tokenizer.decode([eos])
        )
        return [
            postprocess_generated_text(
                self.tokenizer.decode(row, skip_special_tokens=True), stop, None
            )
            for row in rows
        ]


def _check_generation(runner: Runner, wanted: dict[str, Any]) -> dict[str, Any]:
    options = dict(normalize_gen_kwargs(wanted, _MAX_NEW_TOKENS))
    if options.get("do_sample") or options.get("num_beams", 1) > 1:
        raise DataError(
            f"A task asks for sampling or beams ({json.dumps(wanted)}), lpdeploy only generates "
            "greedily. Leave the task out."
        )
    if options["max_gen_toks"] >= runner.max_positions:
        raise DataError(
            f"A task generates {options['max_gen_toks']} tokens, the model has only "
            f"{runner.max_positions} positions. Leave the task out."
        )
    return options


@dataclass
class TaskSet:
    """Tasks that are loaded, and can be run on several models.

    Attributes:
        tasks: lm-eval's tasks by name, those in groups included.
        groups: Its groups by name.
        rows: Names of tasks and groups whose results are wanted.
    """

    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)


def load_tasks(
    names: Sequence[str], *, task_data: Path | None = None, num_fewshot: int | None = None
) -> TaskSet:
    """Load tasks and their data.

    Args:
        names: Tasks, and groups of them such as ``mmlu``.
        task_data: Folder of local files; None takes lm-eval's own tasks, from the hub.
        num_fewshot: Examples before each question; None takes the task's own number, which is 5
            for mmlu and 0 where lm-eval gives none.

    Raises:
        DataError: A task is unknown, its data is missing, damaged or out of reach, or it does not
            take ``num_fewshot``.
    """
    found = TaskSet()
    names = list(dict.fromkeys(names))
    manager = None if task_data else _list_known(names)
    for name in names:
        if task_data:
            tasks, groups = _load_local(name, task_data, num_fewshot)
        else:
            tasks, groups = _load_hub(manager, name, num_fewshot)
        twice = sorted(found.tasks.keys() & tasks.keys())
        if twice:
            raise DataError(f"'{name}' holds '{twice[0]}', which is asked for too. Name one only.")
        found.tasks |= tasks
        found.groups |= groups
        # A tag is a list of tasks, and some groups are no more than that.
        whole = name in tasks or (name in groups and groups[name].has_aggregation)
        found.rows += [name] if whole else list(tasks)
    return found


def _list_known(names: Sequence[str]) -> Any:
    manager = TaskManager()
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3)
            hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise DataError(
                f"lm-eval has no task '{name}'. {hint}Give one that it lists with "
                "'lm-eval ls tasks', or set `task_data`."
            )
    return manager


def _load_local(
    name: str, folder: Path, num_fewshot: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    shots = get_default_shots(name) if num_fewshot is None else num_fewshot
    files = load_task_files(name, folder)
    configs = [build_config(file, num_fewshot=shots) for file in files]
    tasks = {item["task"]: task_module.ConfigurableTask(config=item) for item in configs}
    if name in tasks:
        return tasks, {}
    metrics = [
        {"metric": item["metric"], "weight_by_size": True} for item in configs[0]["metric_list"]
    ]
    group = Group.from_config({"group": name, "aggregate_metric_list": metrics})
    for task in tasks.values():
        group.add(task)
    return tasks, {name: group}


def _load_hub(
    manager: Any, name: str, num_fewshot: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # of httpx or httpx2, whichever the hub uses

    try:
        loaded = manager.load([name])
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError, HTTPError) as error:
        raise DataError(
            f"The data of the task '{name}' cannot be loaded ({quote_error(error)}). Check the "
            "network and 'hf auth login', or give local files with `task_data`."
        ) from error
    for key, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if own == 0 and num_fewshot:  # lm-eval leaves these alone, in silence
            raise DataError(
                f"lm-eval fixes '{key}' to 0 examples. Leave `num_fewshot={num_fewshot}` out."
            )
        default = get_default_shots(key) if own is None else own
        task.set_config(key="num_fewshot", value=default if num_fewshot is None else num_fewshot)
    return loaded["tasks"], loaded.get("groups", {})


def run_tasks(
    found: TaskSet,
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_tokens: Collection[int] = (),
    limit: int | None = None,
    batch_size: int = 4,
    on_progress: Progress = lambda *_: None,
) -> dict[str, Metrics]:
    """Measure a model on tasks.

    Args:
        found: What ``load_tasks`` gave.
        runner: The model.
        tokenizer: That of the model.
        stop_tokens: Tokens that end an answer, besides the tokenizer's eos.
        limit: Only the first so many documents of each task.
        batch_size: Rows a forward pass.
        on_progress: Is told (answers scored, all answers).

    Returns:
        Task -> its metrics, ``acc`` and ``acc_norm`` say, each with its standard error (None of
        a single document); ``n``, the documents; and ``num_fewshot``.

    Raises:
        DataError: An answer cannot be scored by this model.
        NonFiniteError: A log-likelihood is NaN or infinite.
    """
    for task in found.tasks.values():
        task.set_fewshot_seed(seed=_SHOT_SEED)  # each model sees the same examples
    model = RunnerLM(
        runner,
        tokenizer,
        stop_tokens=stop_tokens,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    with _keep_quiet():
        results = evaluate(
            lm=model,
            task_dict={"tasks": found.tasks, "groups": found.groups},
            limit=limit,
            log_samples=False,
        )
    if model.num_cut:
        logger.warning(
            "%s questions are longer than the model's %s positions: only their ends were read.",
            model.num_cut,
            runner.max_positions,
        )
    return {name: _describe(results["results"][name], found, name) for name in found.rows}


@contextlib.contextmanager
def _keep_quiet() -> Iterator[None]:
    """Keep lm-eval off stdout, and its bar over the documents, which no option turns off, away."""
    bar = task_module.tqdm
    task_module.tqdm = lambda items, **_: items
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        task_module.tqdm = bar


def _describe(result: dict[str, Any], found: TaskSet, name: str) -> Metrics:
    metrics: Metrics = {}
    for key, value in result.items():
        metric, _, chosen = key.partition(",")
        if chosen:  # "acc,none": a metric, and the filter its answers went through
            number = float(value) if isinstance(value, int | float) else None  # "N/A"
            metrics[metric if chosen == "none" else key] = number
    parts = found.groups[name].get_all_tasks() if name in found.groups else [found.tasks[name]]
    shots = Counter(task.get_config("num_fewshot") for task in parts)
    return {**metrics, "n": result["sample_len"], "num_fewshot": shots.most_common(1)[0][0]}
