"""Starting real ranks, as users do, and waiting for them within bounds."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
ACCELERATE = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
    "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m",
]  # fmt: skip
SECONDS = 240


def start(launcher, *arguments, extra=None, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(extra or {})}
    command = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **options)


def finish(process):
    """Wait for a launcher, bounded, and leave none of its ranks behind."""
    try:
        return process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its ranks then
            process.wait(timeout=60)


def list_ranks(launcher):
    """Find the pids of a launcher's ranks, in their order."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            values = (process / "environ").read_bytes().decode().split("\0")
        except (OSError, IndexError, ValueError):
            continue  # no process, or gone
        if parent == launcher.pid:
            found |= {int(v[5:]): int(process.name) for v in values if v.startswith("RANK=")}
    return [pid for _, pid in sorted(found.items())]


def start_without_launcher(*command):
    """Start two ranks whose store is held by the first, so that it is gone with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(
            ["-m"], *command, stderr=subprocess.PIPE,
            extra={**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
