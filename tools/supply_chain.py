"""What lpdeploy is made of: exact files, known faults, a list of parts, and a wheel that repeats.

    python3 tools/supply_chain.py lock --index URL    write the hashes into constraints.txt
    python3 tools/supply_chain.py audit               known faults, and dist/sbom.cdx.json
    python3 tools/supply_chain.py wheel               build dist/*.whl twice, and compare
    python3 tools/supply_chain.py try                 install it elsewhere, and run the demo

`lock` reads the hashes of every file of each version from a package index (its JSON, PEP 691).
`audit` installs pip-audit and cyclonedx-bom into an environment of their own, and `try` the wheel
with all that it needs into an empty one; both need the network. This file needs the standard
library only.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
DIST = ROOT / "dist"
BIN = ROOT / ".venv" / ("Scripts" if os.name == "nt" else "bin")
_GIT = shutil.which("git") or "git"
_JSON = "application/vnd.pypi.simple.v1+json"
# Wheels of Pythons that lpdeploy does not run on.
_OLD_PYTHON = re.compile(r"-(cp2\d|cp3\d|cp310|pp\d+)-(?!abi3)")
_PIN = re.compile(r"^([\w.-]+)==([\w.+!-]+)", re.MULTILINE)


def read_pins(text: str) -> dict[str, str]:
    """Return the name and version of each line of constraints."""
    return dict(_PIN.findall(text))


def read_hashes(name: str, version: str, index: str) -> list[str]:
    """Return the SHA-256 of every file of one version that Python 3.11 or newer may use, in order.

    Raises:
        SystemExit: The index has no such version.
    """
    url = f"{index.rstrip('/')}/{re.sub(r'[-_.]+', '-', name).lower()}/"
    request = urllib.request.Request(url, headers={"Accept": _JSON})  # noqa: S310 - the user's own
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        files = json.load(answer)["files"]
    # A file is NAME-VERSION-...whl or NAME-VERSION.tar.gz; names write - and . in their own ways.
    own = re.compile(
        rf"{re.sub(r'[-_.]+', '[-_.]+', name)}-{re.escape(version)}(-.*\.whl|\.tar\.gz|\.zip)",
        re.IGNORECASE,
    )
    found = {
        file["hashes"]["sha256"]
        for file in files
        if own.fullmatch(file["filename"]) and not _OLD_PYTHON.search(file["filename"])
    }
    if not found:
        sys.exit(f"{index} has no file of {name} {version}. Check constraints.txt.")
    return sorted(found)


def lock(index: str) -> None:
    """Write constraints.txt anew, with the hashes of all its versions."""
    text = CONSTRAINTS.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("#")]
    for name, version in read_pins(text).items():
        hashes = read_hashes(name, version, index)
        lines.append(
            " \\\n    ".join([f"{name}=={version}", *(f"--hash=sha256:{h}" for h in hashes)])
        )
    CONSTRAINTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


def audit() -> None:
    """Look for known faults in every dependency, and list all parts of the environment."""
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        own = Path(scratch) / BIN.name
        run(own / "python", "-m", "pip", "install", "--quiet", "pip-audit", "cyclonedx-bom")
        DIST.mkdir(exist_ok=True)
        sbom = DIST / "sbom.cdx.json"
        run(own / "cyclonedx-py", "environment", BIN / "python", "--output-file", sbom)
        # --strict: a dependency that cannot be looked up is a failure, and not left out.
        run(
            *(own / "pip-audit", "--strict", "--disable-pip", "--require-hashes"),
            *("--requirement", CONSTRAINTS),
        )


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the files that git knows, dated as the last commit."""
    source = folder / "source"
    run(_GIT, "clone", "--quiet", ROOT, source)
    for path in source.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # whatever the umask is
    command = [_GIT, "-C", str(ROOT), "log", "-1", "--format=%ct"]
    date = subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip()
    pip = (BIN / "python", "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check")
    run(
        *(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source),
        env={"SOURCE_DATE_EPOCH": date},
    )
    return next(folder.glob("*.whl"))


def wheel() -> None:
    """Build the wheel in two places, and keep it if both are the same bytes."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        wheels = [build_wheel(Path(one)), build_wheel(Path(other))]
        digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in wheels}
        if len(digests) > 1:
            sys.exit(f"Two builds of {wheels[0].name} differ.")
        DIST.mkdir(exist_ok=True)
        shutil.copyfile(wheels[0], DIST / wheels[0].name)
    print(f"{DIST / wheels[0].name} sha256:{digests.pop()}")


def try_wheel() -> None:
    """Install the wheel into an empty environment, and run the demo in an empty folder."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, nothing = Path(scratch), {"PYTHONPATH": ""}  # but what is installed there
        built = build_wheel(folder)
        venv.create(folder / "venv", with_pip=True)
        own, empty = folder / "venv" / BIN.name, folder / "empty"
        empty.mkdir()
        run(own / "python", "-m", "pip", "install", "--quiet", f"{built}[cpu]", env=nothing)
        run(own / "lpdeploy", "doctor", cwd=empty, env=nothing)
        run(own / "lpdeploy", "demo", cwd=empty, env=nothing)


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> None:
    """Run a command, and exit with its exit code if it fails."""
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**os.environ, **(env or {})}, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("lock").add_argument("--index", required=True, metavar="URL")
    commands.add_parser("audit")
    commands.add_parser("wheel")
    commands.add_parser("try")
    options = parser.parse_args()
    if options.command == "lock":
        lock(options.index)
    else:
        {"audit": audit, "wheel": wheel, "try": try_wheel}[options.command]()


if __name__ == "__main__":
    main()
