"""Whether a run fits into the memory that is free, and what to change where it does not."""

import dataclasses
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PretrainedConfig

from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA
from lpdeploy.errors import LpdeployError
from lpdeploy.machine import format_bytes, read_process_bytes
from lpdeploy.models.loading import resolve_device, resolve_dtype
from lpdeploy.pruning.memory import MemoryPlan, plan_memory

logger = logging.getLogger(__name__)

# A plan may be off by this share. A run is refused only if it would not fit even if it needed that
# much less and the heap, which is known least, wasted nothing.
_TOLERANCE = 0.15
_SHORTEST = 64
# What libraries allocate for themselves in the first step on a CPU.
_LATER_BYTES = 25_000_000
_CGROUP = Path("/sys/fs/cgroup")  # of the container, as it sees itself

Planner = Callable[[PruneConfig], MemoryPlan]


def plan_run(config: PretrainedConfig, options: PruneConfig, *, ranks: int = 1) -> MemoryPlan:
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
    import peft  # noqa: F401 - what the run needs next

    return (read_process_bytes() or 0) + _LATER_BYTES


def check_memory(
    config: PretrainedConfig,
    options: PruneConfig,
    *,
    refuse: bool = True,
    ranks: int = 1,
) -> MemoryPlan:
    """Log how much memory a run will need, and refuse one that cannot have it.

    Args:
        config: Of the unpruned base.
        options: How it is pruned.
        refuse: Whether to refuse; a resumed run is smaller than its plan, and did fit.
        ranks: Processes; those of a sharded run divide the layers' weights.

    Raises:
        LpdeployError: It needs more than is free, by more than the plan may be off.
    """
    plan = plan_run(config, options, ranks=ranks)
    free = measure_free_bytes(resolve_device(options.device))
    logger.info(describe_plan(plan, free))
    if not refuse or options.ignore_memory or _is_enough(plan, free):
        return plan
    change = suggest_options(options, free, lambda changed: plan_run(config, changed, ranks=ranks))
    where = "memory" if plan.process else "GPU memory"
    raise LpdeployError(
        f"This run needs about {format_bytes(_beyond(plan))} of {where}, and "
        f"{format_bytes(free)} are free. {_advise(change)}"
    )


def _advise(change: tuple[dict[str, Any], MemoryPlan] | None) -> str:
    anyway = "or `ignore_memory=True` to start all the same"
    if change is None:
        return (
            "No smaller `micro_batch_size`, shorter `seq_len` or 8-bit base makes it fit: use a "
            f"smaller model or a machine with more memory, {anyway}."
        )
    values, plan = change
    words = " and ".join(f"`{name}={value!r}`" for name, value in values.items())
    return f"Use {words}, which needs about {format_bytes(_beyond(plan))}, {anyway}."


def describe_plan(plan: MemoryPlan, free: int) -> str:
    """Write a plan as one line."""
    values = {name: value for name, value in dataclasses.asdict(plan).items() if value}
    own = values.pop("process", None)
    parts = ", ".join(f"{name} {format_bytes(value)}" for name, value in values.items())
    libraries = f", beside the {format_bytes(own)} of the libraries" if own else ""
    needed = f"{format_bytes(_beyond(plan))} of {format_bytes(free)} that are free"
    return f"memory: about {needed}{libraries} ({parts})"


def _beyond(plan: MemoryPlan) -> int:
    return plan.total - plan.process


def _is_enough(plan: MemoryPlan, free: int) -> bool:
    return (_beyond(plan) - plan.heap) * (1 - _TOLERANCE) <= free


def suggest_options(
    options: PruneConfig, free: int, plan: Planner
) -> tuple[dict[str, int | bool | str], MemoryPlan] | None:
    """Find the first change, of the least harm, that makes a run fit.

    A smaller micro-batch changes nothing but time; gradient checkpointing costs a second forward
    pass; 8 bits cost precision; shorter rows change what is learnt. Each value is tried alone, and
    then together with all that is less harmful.

    Args:
        options: What does not fit.
        free: Bytes that are free.
        plan: Plans changed options.

    Returns:
        The changed fields, and their plan; None where nothing helps.
    """
    milder: dict[str, int | bool | str] = {}
    for name, values in _list_values(options).items():
        for value in values:
            for change in ({name: value}, {**milder, name: value}):
                planned = plan(dataclasses.replace(options, **change))
                if _beyond(planned) <= free:
                    return change, planned
        if values:
            milder[name] = values[-1]
    return None


def _list_values(options: PruneConfig) -> dict[str, list[Any]]:
    """List what each field could become, the least harmful field and value first."""
    batch, micro = options.batch_size, options.micro_batch_size
    gradient = CRITERIA[options.criterion].weight_gradients
    on_gpu = resolve_device(options.device) != "cpu"
    halves = (options.seq_len >> shift for shift in itertools.count(1))
    return {
        "micro_batch_size": [n for n in range(micro - 1, 0, -1) if batch % n == 0],
        "offload_gradients": [True] if gradient and on_gpu else [],
        "gradient_checkpointing": [] if options.gradient_checkpointing else [True],
        "load_in": [] if gradient or options.load_in or options.shard else ["8bit"],
        "seq_len": list(itertools.takewhile(lambda length: length >= _SHORTEST, halves)),
    }


def measure_free_bytes(device: str) -> int:
    """Return the memory that is free on a device.

    On a CPU that is what the kernel could give without swapping, within the limit of the container
    that this process is in.
    """
    if device != "cpu":
        return int(torch.cuda.mem_get_info()[0])
    limit = measure_cgroup_bytes(_CGROUP)
    free = psutil.virtual_memory().available
    return free if limit is None else min(free, limit)


def measure_cgroup_bytes(group: Path) -> int | None:
    """Return what is left of the memory limit of a control group (version 2); None without one."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    # Files that were read lie in the group's cache, which it gives back when asked.
    cached = int(stat["inactive_file"]) + int(stat["active_file"])
    return max(0, int(limit) - used + cached)
