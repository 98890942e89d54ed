"""`lpdeploy push`: upload a run's model to the Hugging Face hub."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lpdeploy.cli.common import print_result, shared_options
from lpdeploy.cli.types import RUN
from lpdeploy.machine import format_bytes

if TYPE_CHECKING:
    from lpdeploy.publish.push import PushResult


@click.command("push")
@click.argument("run", type=RUN)
@click.option("--repo", required=True, metavar="OWNER/NAME", help="Upload to this repository.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--yes", is_flag=True, help="Upload the files. Without it, only list them.")
@shared_options()
def command(*, run: Path, repo: str, private: bool, yes: bool, as_json: bool) -> None:
    """Upload RUN's model to the Hugging Face hub, with --yes.

    Without --yes, the command only lists the files that it would upload. RUN's compacted model and
    its plan.json go to the top level of the repository, where from_pretrained finds them, and the
    exports to onnx/ and ort/. Training files are not uploaded, and local paths are removed. An
    existing repository keeps its visibility and its other files.
    """
    from lpdeploy.publish.push import push

    result = push(run, repo, private=private, execute=yes)
    words = ["lpdeploy", "push", str(run), "--repo", repo, *(["--private"] if private else [])]
    command = shlex.join([*words, "--yes"])
    text = _describe_upload(result) if result.uploaded else _describe_plan(result, command)
    print_result({**result.to_json(), "command": command}, text, as_json=as_json)


def _describe_upload(result: "PushResult") -> str:
    total = f"{len(result.files)} files, {format_bytes(result.bytes)}"
    return f"{result.url}: {total}, commit {result.commit}"


def _describe_visibility(result: "PushResult") -> str:
    other = "; add --private to keep it to yourself" if result.visibility == "public" else ""
    return f"{result.visibility} if the repository is new{other}"


def _describe_plan(result: "PushResult", command: str) -> str:
    sizes = {file.path: format_bytes(file.size) for file in result.files}
    width = max(map(len, sizes))
    named = " (a local folder; only its name is published)" if result.base_is_local else ""
    return "\n".join(
        [
            f"{result.repo} ({_describe_visibility(result)})",
            f"base model: {result.base_model}{named}",
            *(f"  {path:{width}}  {size:>8}" for path, size in sizes.items()),
            f"  {len(sizes)} files, {format_bytes(result.bytes)}; nothing was uploaded yet",
            f"To upload: {command}",
        ]
    )
