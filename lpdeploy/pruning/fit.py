"""Whether a run fits into the memory that is free, and what to change where it does not."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lpdeploy.artifacts import format_bytes, read_process_bytes
from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA
from lpdeploy.errors import LpdeployError
from lpdeploy.models.loading import resolve_device, resolve_dtype
from lpdeploy.pruning.memory import MemoryPlan, plan_memory

# A plan is within 15 % of what is measured: what is refused would not fit if it needed as much
# less, and if the heap, which is known least, wasted nothing.
_TOLERANCE = 0.15
_SHORTEST = 64
# What libraries still allocate for themselves in the first step on a CPU.
_LATER_BYTES = 25_000_000
_CGROUP = Path("/sys/fs/cgroup")

Planner = Callable[[PruneConfig], MemoryPlan]
_Values = dict[str, list[Any]]


def plan_run(config: Any, options: PruneConfig, *, ranks: int = 1) -> MemoryPlan:
    """Plan the memory of a run in this process, on the device and in the precision it will have.

    Args:
        config: Of the unpruned base.
        options: How it is pruned.
        ranks: Processes; those of a sharded run divide the layers' weights.

    Raises:
        ArtifactError: The device is not there.
    """
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, config, device=device)
    process = _measure_process() if device == "cpu" else 0
    shards = ranks if options.shard else 1
    return plan_memory(config, options, dtype=dtype, device=device, process=process, shards=shards)


def _measure_process() -> int:
    """Return what this process holds once all libraries are loaded."""
    import accelerate  # noqa: F401 - what the run needs next
    import peft  # noqa: F401

    return (read_process_bytes() or 0) + _LATER_BYTES


def check_memory(
    config: Any,
    options: PruneConfig,
    *,
    log: Callable[[str], None],
    refuse: bool = True,
    ranks: int = 1,
) -> MemoryPlan:
    """Say what a run will need, and refuse one that cannot have it.

    Args:
        config: Of the unpruned base.
        options: How it is pruned.
        log: Is told the plan.
        refuse: Whether to refuse; a run that goes on is smaller than its plan, and did fit.
        ranks: Processes; those of a sharded run divide the layers' weights.

    Raises:
        LpdeployError: It needs more than is free, by more than the plan may be wrong.
    """
    plan = plan_run(config, options, ranks=ranks)
    free = measure_free_bytes(resolve_device(options.device))
    log(describe_plan(plan, free))
    if not refuse or options.ignore_memory or free is None or _is_enough(plan, free):
        return plan
    change = suggest_options(options, free, lambda changed: plan_run(config, changed, ranks=ranks))
    where = "memory" if plan.process else "GPU memory"
    raise LpdeployError(
        f"This run needs about {format_bytes(_beyond(plan))} of {where}, and "
        f"{format_bytes(free)} are free. {_advise(change)}"
    )


def _advise(change: tuple[str, MemoryPlan] | None) -> str:
    anyway = "or --ignore-memory to start all the same"
    if change is None:
        return (
            "No smaller micro-batch, shorter --seq-len or 8-bit base makes it fit: use a smaller "
            f"model or a machine with more memory, {anyway}."
        )
    words, plan = change
    return f"Use {words}, which needs about {format_bytes(_beyond(plan))}, {anyway}."


def describe_plan(plan: MemoryPlan, free: int | None) -> str:
    """Write a plan as one line."""
    values = {name: value for name, value in dataclasses.asdict(plan).items() if value}
    own = values.pop("process", None)
    parts = ", ".join(f"{name} {format_bytes(value)}" for name, value in values.items())
    libraries = f", beside the {format_bytes(own)} of the libraries" if own else ""
    of = "" if free is None else f" of {format_bytes(free)} that are free"
    return f"memory: about {format_bytes(_beyond(plan))}{of}{libraries} ({parts})"


def _beyond(plan: MemoryPlan) -> int:
    return plan.total - plan.process


def _is_enough(plan: MemoryPlan, free: int) -> bool:
    return (_beyond(plan) - plan.heap) * (1 - _TOLERANCE) <= free


def suggest_options(
    options: PruneConfig, free: int, plan: Planner
) -> tuple[str, MemoryPlan] | None:
    """Find the first change, of the least harm, that makes a run fit.

    A smaller micro-batch changes nothing but time; gradient checkpointing costs a second forward
    pass; 8 bits cost precision; shorter rows change what is learnt. If none of these is enough
    alone, they are taken together, one more at a time.

    Args:
        options: What does not fit.
        free: Bytes that are free.
        plan: Plans changed options.

    Returns:
        What to write on the command line, and its plan; None where nothing helps.
    """
    values = _list_values(options)
    for words, changed in [*_list_single(options, values), *_list_combined(options, values)]:
        planned = plan(changed)
        if _beyond(planned) <= free:
            return words, planned
    return None


def _list_single(options: PruneConfig, values: _Values) -> Iterator[tuple[str, PruneConfig]]:
    for name, own in values.items():
        for value in own:
            yield _name(name, value), dataclasses.replace(options, **{name: value})


def _list_combined(options: PruneConfig, values: _Values) -> Iterator[tuple[str, PruneConfig]]:
    """Each option at its most sparing value on top of those before it."""
    words: list[str] = []
    for name, own in values.items():
        if own:
            words.append(_name(name, own[-1]))
            options = dataclasses.replace(options, **{name: own[-1]})
            yield " ".join(words), options


def _list_values(options: PruneConfig) -> _Values:
    """List what each option could become, the least change first."""
    batch, micro = options.batch_size, options.micro_batch_size
    gradient = CRITERIA[options.criterion].weight_gradients
    on_gpu = resolve_device(options.device) != "cpu"
    return {
        "micro_batch_size": [n for n in range(micro - 1, 0, -1) if batch % n == 0],
        "offload_gradients": [True] if gradient and on_gpu else [],
        "gradient_checkpointing": [] if options.gradient_checkpointing else [True],
        "load_in": [] if gradient or options.load_in or options.shard else ["8bit"],
        "seq_len": list(_halve(options.seq_len)),
    }


def _halve(seq_len: int) -> Iterator[int]:
    while seq_len // 2 >= _SHORTEST:
        seq_len //= 2
        yield seq_len


def _name(option: str, value: Any) -> str:
    flag = f"--{option.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}"


def measure_free_bytes(device: str) -> int | None:
    """Return the memory that is free on a device; None where the system does not tell.

    On a CPU that is what the kernel could give without swapping, within the limit of the control
    group (container, batch job) that this process is in.
    """
    if device != "cpu":
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit = measure_cgroup_bytes(_CGROUP, Path("/proc/self/cgroup"))
    return free if limit is None else min(free, limit)


def measure_cgroup_bytes(root: Path, membership: Path) -> int | None:
    """Return what is left of the tightest memory limit around this process; None without one.

    Args:
        root: Where control groups are mounted, version 2 or the ``memory`` controller of version 1.
        membership: ``/proc/self/cgroup``.
    """
    try:
        entries = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None
    left = []
    for _, controllers, path in entries:
        names = ("memory.max", "memory.current")
        base = root
        if "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            base = root / "memory"
        elif controllers:
            continue
        own = base / path.lstrip("/")
        # A limit may be that of any parent; inside a container the path may not exist at all.
        within = [folder for folder in (own, *own.parents) if folder.is_relative_to(base)]
        left += [_read_left(folder, *names) for folder in within]
    found = [value for value in left if value is not None]
    return min(found) if found else None


def _read_left(folder: Path, limit: str, usage: str) -> int | None:
    try:
        allowed = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if allowed == "max":
        return None
    # Files that were read lie in the group's cache, which it gives back when asked.
    cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    return max(0, int(allowed) - used + cached)
