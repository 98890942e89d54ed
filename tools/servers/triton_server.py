"""Start Triton Inference Server without a container.

    python tools/servers/triton_server.py serve REPOSITORY

The server comes from the package nvidia-pytriton, which has only the Python backend. It gets its
own environment in the checkout, `.triton`, because its Python backend needs numpy 1. lpdeploy and
its engines come from the Python that runs this file. The server listens on the loopback address.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any, NoReturn

from lpdeploy.errors import LpdeployError
from lpdeploy.records import load_json
from lpdeploy.servers.package import PACKAGE_FILE

ROOT = Path(__file__).resolve().parent.parent.parent
VENV = ROOT / ".triton"
REQUIREMENTS = Path(__file__).with_name("triton-requirements.txt")
VERSION = "2.51.0"
"""Version of the Triton server in nvidia-pytriton."""


def find_server(folder: Path) -> Path:
    """Return the folder of the server in an environment."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return folder / "lib" / python / "site-packages" / "pytriton" / "tritonserver"


def setup(folder: Path = VENV) -> Path:
    """Make the environment unless it exists.

    Returns:
        The folder of the server.

    Raises:
        LpdeployError: The package has no Python backend for this Python, or cannot be installed.
    """
    stamp = folder / "lpdeploy-setup"
    packages = sysconfig.get_path("purelib")
    made_from = f"{REQUIREMENTS.read_text(encoding='utf-8')}# for {packages}\n"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == made_from:
        return find_server(folder)
    print(f"installing a Triton server into {folder}, which downloads a few hundred MB", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check"]
    words = [*pip, "--quiet", "--no-deps", "-r", REQUIREMENTS]
    if subprocess.run(words, check=False).returncode:
        raise LpdeployError(f"pip cannot install '{REQUIREMENTS}'; it says why above.")
    server = find_server(folder)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        known = ", ".join(sorted(path.parent.name for path in stub.parent.parent.glob("*/*")))
        raise LpdeployError(f"nvidia-pytriton has no backend for Python {version}. Use {known}.")
    shutil.copy(stub, server / "backends" / "python")
    # After the environment's own packages, so that its numpy comes first.
    pth = f"import site; site.addsitedir({packages!r})\n"
    (server.parent.parent / "lpdeploy.pth").write_text(pth, encoding="utf-8")
    stamp.write_text(made_from, encoding="utf-8")
    return server


def build_environment(server: Path) -> dict[str, str]:
    """Return the environment variables of the server's process."""
    site_packages = server.parent.parent
    folder = site_packages.parents[2]
    libraries = [
        site_packages / "nvidia_pytriton.libs",
        server / "external_libs",
        # The backend embeds Python: it must be this one, not another of the same version.
        sysconfig.get_config_var("LIBDIR"),
    ]
    return {
        **os.environ,
        # The backend finds its Python through PATH; it ignores Python's own variables.
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
    }


def load_mark(repository: Path) -> dict[str, Any]:
    """Read the record of a packaged folder.

    Raises:
        LpdeployError: The folder is no package, or one for another server.
    """
    mark: dict[str, Any] = load_json(
        repository / PACKAGE_FILE, fix="Give a folder of 'lpdeploy package --target triton'."
    )
    if mark["target"] != "triton":
        raise LpdeployError(
            f"'{repository}' is for {mark['target']}. Write one with --target triton."
        )
    return mark


def list_options(repository: Path, extra: list[str], server: Path) -> list[str]:
    """Return the server's options that name the models to load.

    Args:
        repository: What ``lpdeploy package --target triton`` wrote.
        extra: Models to load beside those that its README names.
        server: Folder of the server.

    Raises:
        LpdeployError: The folder is no such package, or a model needs another backend.
    """
    mark = load_mark(repository)
    options = shlex.split(mark["command"])[2:] + [f"--load-model={name}" for name in extra]
    for name in re.findall(r"--load-model=(\S+)", " ".join(options)):
        config = repository / name / "config.pbtxt"
        if not config.is_file():
            raise LpdeployError(f"'{repository}' has no model '{name}' with a config.pbtxt.")
        backend = re.search(r'^backend: "(\w+)"', config.read_text(encoding="utf-8"), re.MULTILINE)
        present = sorted(path.name for path in (server / "backends").iterdir())
        if backend is None or backend[1] not in present:
            needed = backend[1] if backend else "unknown"
            raise LpdeployError(
                f"'{name}' needs the backend '{needed}', and this Triton has only "
                f"{', '.join(present)}. Serve it from Triton's container."
            )
    return options


def check_ports(*ports: int) -> None:
    """Refuse a port that is in use.

    Raises:
        LpdeployError: A port is in use.
    """
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise LpdeployError(
                    f"Port {port} cannot be used: {error.strerror}. Choose others with --http-port "
                    "and --grpc-port."
                ) from None


def serve(options: argparse.Namespace) -> NoReturn:
    """Replace this process with the server, which gets its signals and sets its exit code."""
    load_mark(options.repository)
    check_ports(options.http_port, options.grpc_port)
    server = setup()
    models = list_options(options.repository, options.load, server)
    if options.stop_after:
        signal.alarm(options.stop_after)  # it outlives exec, and ends the process
    binary = server / "bin" / "tritonserver"
    words = [
        *(str(binary), f"--model-repository={options.repository.resolve()}", *models),
        *(f"--backend-directory={server / 'backends'}", "--allow-metrics=false"),
        *("--http-address=127.0.0.1", f"--http-port={options.http_port}"),
        *("--grpc-address=127.0.0.1", f"--grpc-port={options.grpc_port}"),
    ]
    print(f"http on 127.0.0.1:{options.http_port}, grpc on {options.grpc_port}", flush=True)
    os.execve(binary, words, build_environment(server))  # noqa: S606


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("setup", help="make the environment and nothing else")
    serving = commands.add_parser("serve", help="start the server on a model repository")
    serving.add_argument("repository", type=Path)
    serving.add_argument("--http-port", type=int, default=8000)
    serving.add_argument("--grpc-port", type=int, default=8001)
    serving.add_argument("--load", action="append", default=[], help="one more model to load")
    serving.add_argument(
        "--stop-after", type=int, metavar="SECONDS", help="end the server after this time"
    )
    options = parser.parse_args()
    try:
        if options.command == "setup":
            setup()
        else:
            serve(options)
    except LpdeployError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
