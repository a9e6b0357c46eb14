"""QLoRA UI: parse the flags, build the services, launch the page."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from typing import TYPE_CHECKING

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from qlora_ui.errors import UserError
from qlora_ui.runs import Workspace

if TYPE_CHECKING:
    from gradio import Blocks

    from qlora_ui.services import Services


def main() -> int:
    """Serve the page until Ctrl-C. Exit code 2 for the person's mistake."""
    parser = argparse.ArgumentParser(description="4-bit QLoRA fine-tuning and chat in a browser.")
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address to listen on")
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", "7860")), help="port to listen on")
    parser.add_argument("--share", action="store_true", help="also open a public link through Gradio's relay")
    parser.add_argument("--home", help="the workspace folder (default: QLORA_UI_HOME, else ./workspace)")
    demo = "serve only a chat with this run, checkpoint or adapter: an id, a folder, a zip, or owner/name (default: QLORA_UI_DEMO)"
    parser.add_argument("--demo", metavar="RUN_OR_ADAPTER", default=os.environ.get("QLORA_UI_DEMO"), help=demo)
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--api", action="store_true", help="also answer OpenAI's clients at /v1, for whoever has the key")
    parser.add_argument("--run-queue", action="store_true", help="go on with the queue at once (else it is held until started on the page)")
    flags = parser.parse_args()
    try:
        workspace = Workspace.open(flags.home)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if not 1 <= flags.port <= 65535:
        print(f"--port is {flags.port}: it must be a whole number from 1 to 65535.", file=sys.stderr)
        return 2
    for run in workspace.settle():
        print(f"{run.id} had been interrupted at step {run.last_step()}; its checkpoints are in {run.folder}")
    try:
        serve(flags, workspace)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        reason = f"port {flags.port} is in use, or {flags.host} is no address of this machine"
        print(f"The app cannot listen on {flags.host}:{flags.port} ({reason}): choose another --port or --host. {error}", file=sys.stderr)
        return 2
    return 0


def serve(flags: argparse.Namespace, workspace: Workspace) -> None:
    """Launch, then warm up: the page does not wait for torch."""
    from qlora_ui import services

    warm_up = services.WarmUp()
    made = services.build(workspace, warm_up)
    page = launch(flags, made)
    warm_up.start()
    if flags.run_queue:
        made.start_queue()
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        page.close()
        os._exit(0)  # without waiting for threads that were left to themselves, such as a request to a Hub that hangs


def launch(flags: argparse.Namespace, made: Services) -> Blocks:
    """The page over these services, and the API where it is asked for, on one server of their own threads."""
    from qlora_ui import openai_api
    from qlora_ui.ui import app, demo

    page = demo.build(made, demo.speaker_of(flags.demo, made.workspace)) if flags.demo else app.build(made)
    key, words = api_key() if flags.api else ("", "")
    page.launch(
        server_name=flags.host,
        server_port=flags.port,
        share=flags.share,
        inbrowser=flags.open,
        prevent_thread_lock=True,
        app_kwargs={"middleware": host_check(flags), "routes": openai_api.routes(made, key) if flags.api else []},
        **(app.launch_options() | ({"footer_links": []} if flags.demo else {})),
    )
    if flags.api:
        print(f"* OpenAI-compatible API on:  {page.local_url}v1, {words}", flush=True)
    return page


def api_key() -> tuple[str, str]:
    """The key of the API, and what to say of it. One that is made here is shown, and kept where a restart of the app finds it."""
    from qlora_ui.openai_api import KEY

    if given := os.environ.get(KEY):
        return given, f"key: that of {KEY}"
    os.environ[KEY] = made = secrets.token_urlsafe(24)
    return made, f"key: {made}"


def host_check(flags: argparse.Namespace) -> list[Middleware]:
    """On loopback, answer to local names only: else any web page could reach the app through a name that resolves to 127.0.0.1."""
    behind_a_proxy = flags.share or "SPACE_ID" in os.environ or "COLAB_RELEASE_TAG" in os.environ
    if behind_a_proxy or flags.host not in ("127.0.0.1", "localhost", "::1"):
        return []
    return [Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "::1"])]


if __name__ == "__main__":
    sys.exit(main())
