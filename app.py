"""QLoRA UI: parse the flags, build the services, launch the page."""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from qlora_ui.errors import UserError
from qlora_ui.runs import Workspace


def main() -> int:
    """Serve the page until Ctrl-C. Exit code 2 for the person's mistake."""
    parser = argparse.ArgumentParser(description="4-bit QLoRA fine-tuning and chat in a browser.")
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address to listen on")
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", "7860")), help="port to listen on")
    parser.add_argument("--share", action="store_true", help="also open a public link through Gradio's relay")
    parser.add_argument("--home", help="the workspace folder (default: QLORA_UI_HOME, else ./workspace)")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
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
    except OSError as error:
        reason = f"port {flags.port} is in use, or {flags.host} is no address of this machine"
        print(f"The app cannot listen on {flags.host}:{flags.port} ({reason}): choose another --port or --host. {error}", file=sys.stderr)
        return 2
    return 0


def serve(flags: argparse.Namespace, workspace: Workspace) -> None:
    """Launch, then warm up: the page does not wait for torch."""
    from qlora_ui import services
    from qlora_ui.ui import app

    warm_up = services.WarmUp()
    served = services.build(workspace, warm_up)
    page = app.build(served)
    page.launch(
        server_name=flags.host,
        server_port=flags.port,
        share=flags.share,
        inbrowser=flags.open,
        prevent_thread_lock=True,
        app_kwargs={"middleware": host_check(flags)},
        **app.launch_options(),
    )
    warm_up.start()
    if flags.run_queue:
        served.start_queue()
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        page.close()
        os._exit(0)  # without waiting for threads that were left to themselves, such as a request to a Hub that hangs


def host_check(flags: argparse.Namespace) -> list[Middleware]:
    """On loopback, answer to local names only: else any web page could reach the app through a name that resolves to 127.0.0.1."""
    behind_a_proxy = flags.share or "SPACE_ID" in os.environ or "COLAB_RELEASE_TAG" in os.environ
    if behind_a_proxy or flags.host not in ("127.0.0.1", "localhost", "::1"):
        return []
    return [Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "::1"])]


if __name__ == "__main__":
    sys.exit(main())
