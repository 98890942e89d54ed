"""Set up, demonstrate and test lpdeploy from a checkout.

    python3 tools/dev.py setup            make .venv and install lpdeploy
    python3 tools/dev.py demo             set up, then run `lpdeploy demo`
    python3 tools/dev.py test             set up, then run every check and test, as CI does
    python3 tools/dev.py test --fast      lint, types and the fast tests: a few minutes
    python3 tools/dev.py test --servers   the tests of real servers, each in its own environment

Other arguments go to `lpdeploy demo` or to pytest. This file needs the standard library only. It
installs the exact files of `constraints.txt`, and installs again only after a change.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

from servers import environments

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
STAMP = VENV / "lpdeploy-setup"
CONSTRAINTS = ROOT / "constraints.txt"


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Run a command in the checkout, and exit with its exit code if it fails."""
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **(env or {})}, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def compute_stamp() -> str:
    """Hash the files that determine the environment."""
    files = [ROOT / "pyproject.toml", CONSTRAINTS]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def setup() -> None:
    """Make `.venv` and install lpdeploy in it, unless it is up to date."""
    if STAMP.is_file() and STAMP.read_text(encoding="utf-8") == compute_stamp():
        return
    if not (BIN / "python").exists() and not (BIN / "python.exe").exists():
        venv.create(VENV, with_pip=True)
    print(f"installing into {VENV}; this takes some minutes", flush=True)
    pip = [BIN / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch first and without a hash: where it comes from decides for which devices it is built.
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    run(*pip, next(line.split()[0] for line in lines if line.startswith("torch=")))
    run(*pip, "--require-hashes", "--no-deps", "-r", CONSTRAINTS)
    run(*pip, "--no-deps", "--no-build-isolation", "-e", ".")
    run(BIN / "python", "-m", "pip", "check", "--disable-pip-version-check")
    STAMP.write_text(compute_stamp(), encoding="utf-8")
    print(f"installed; the command is {BIN / 'lpdeploy'}", flush=True)


def demo(arguments: list[str]) -> None:
    """Run `lpdeploy demo`."""
    setup()
    if not any(word.startswith("--output") for word in arguments):
        arguments = ["--output", "demo-run", "--overwrite", *arguments]
    run(BIN / "lpdeploy", "demo", *arguments)


def test(arguments: list[str]) -> None:
    """Run lint, formatting, types, documents and tests."""
    setup()
    if "--servers" in arguments:
        test_servers([word for word in arguments if word != "--servers"])
        return
    fast = "--fast" in arguments
    arguments = [word for word in arguments if word != "--fast"]
    run(BIN / "ruff", "check", ".")
    run(BIN / "ruff", "format", "--check", ".")
    run(BIN / "mypy")
    if fast:
        arguments = ["-m", "not slow and not servers", *arguments]
    else:
        run(BIN / "python", "tools/update_docs.py", "--check")
        run(BIN / "python", "tools/servers/triton_server.py", "setup")  # a slow test starts it
    # One thread per worker, since more would compete for the cores. The tests of a file stay with
    # one worker, so that its fixtures, many of them exports, are made once.
    workers = ["-n", str(max(1, min(8, os.cpu_count() or 1))), "--dist", "loadfile"]
    run(BIN / "python", "-m", "pytest", *workers, *arguments, env={"OMP_NUM_THREADS": "1"})


def test_servers(arguments: list[str]) -> None:
    """Run the tests of real servers, and write their results to the JSON that a document quotes."""
    for name in environments.SERVERS:
        environments.setup(name)
    record = {"LPDEPLOY_SERVERS_RECORD": str(ROOT / "docs" / "measurements" / "servers.json")}
    command = [BIN / "python", "-m", "pytest", "-m", "servers", "tests/slow/servers", *arguments]
    run(*command, env={"OMP_NUM_THREADS": "1", **record})


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["setup", "demo", "test"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for demo or pytest")
    options = parser.parse_args()
    if options.command == "setup":
        setup()
    elif options.command == "demo":
        demo(options.arguments)
    else:
        test(options.arguments)


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 - the system's python3 may be older
        sys.exit("lpdeploy needs Python 3.11 or newer; run this file with such a python3.")
    main()
