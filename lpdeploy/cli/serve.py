"""`lpdeploy serve`: the OpenAI API of transformers over a model."""

import contextlib

import click

from lpdeploy.cli.common import check_models, print_result, shared_options
from lpdeploy.cli.options import config_options
from lpdeploy.cli.types import MODEL, Count


@click.command("serve")
@click.argument("model", type=MODEL, metavar="RUN|MODEL")
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=Count(1, 65535), default=8000, help="Port to listen on.")
@config_options("device")
@shared_options()
def command(*, model: str, host: str, port: int, device: str, as_json: bool) -> None:
    """Serve a RUN or MODEL over HTTP.

    Starts 'transformers serve', by default for this machine alone. A RUN must be compacted first.
    The server answers /v1/chat/completions and /v1/completions of
    the OpenAI API until Ctrl-C. It is meant for a first look; 'lpdeploy package' prepares a model
    for servers that are made for load.
    """
    check_models(model)
    from lpdeploy.servers.transformers_serve import serve

    def announce(url: str, name: str) -> None:
        text = f"Serving '{name}', which is its name there, at {url}. Press Ctrl-C to stop."
        print_result({"model": name, "url": url}, text, as_json=as_json)

    with contextlib.suppress(KeyboardInterrupt):  # which is how a server ends
        serve(model, host=host, port=port, device=device, on_ready=announce)
