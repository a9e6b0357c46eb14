"""The endpoints that a person's script calls on a running app. What is wrong reaches it as a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import gradio as gr

from qlora_ui import presets
from qlora_ui.errors import UserError
from qlora_ui.runs import Run
from qlora_ui.services import Services


def build(services: Services) -> None:
    """Each endpoint by its name; Gradio reads its parameters from the function."""
    gr.api(start(services), api_name="start_training")
    gr.api(end(services, services.jobs.pause, "pause; it can go on later."), api_name="pause_training")
    gr.api(end(services, services.stop, "stop and keep its adapter."), api_name="stop_training")
    gr.api(resume(services), api_name="resume_training")
    gr.api(discard(services), api_name="discard_training")
    gr.api(status(services), api_name="run_status")


def start(services: Services) -> Any:
    """The endpoint /start_training."""

    def start_training(preset: str = "starter", data: str = "", settings: str = "{}", isolated: bool = False) -> str:
        """Start a run, if `isolated` in a process of its own, and return its id. `settings` is a JSON object of names and values."""
        try:
            config = presets.load(preset).config.with_values({**read(settings), **({"data": data} if data else {})})
            return services.start(config, isolated=isolated).id
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return start_training


def end(services: Services, ask: Callable[[Run], None], what: str) -> Any:
    """The endpoints /pause_training and /stop_training."""

    def end_training(run: str = "") -> str:
        found = find(services, run)
        try:
            ask(found)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return found.id

    end_training.__doc__ = f"Ask a run (or, without an id, the newest) to {what} Returns the run's id."
    return end_training


def resume(services: Services) -> Any:
    """The endpoint /resume_training."""

    def resume_training(run: str = "", settings: str = "{}", isolated: bool = False) -> str:
        """Go on with a run (or, without an id, the newest), if `settings` is not empty with these changed. Returns the run's id."""
        found = find(services, run)
        try:
            services.resume(found, read(settings), isolated=isolated)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return found.id

    return resume_training


def discard(services: Services) -> Any:
    """The endpoint /discard_training."""

    def discard_training(run: str) -> str:
        """End a run and delete it with all that it made. Returns the run's id."""
        try:
            services.jobs.discard(services.workspace.get(run))
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return run

    return discard_training


def status(services: Services) -> Any:
    """The endpoint /run_status."""

    def run_status(run: str = "") -> dict[str, Any]:
        """How a run (or, without an id, the newest) stands."""
        found = find(services, run)
        progress = services.watch.progress(found)
        return {
            "run": found.id,
            "state": progress.state,
            "phase": progress.phase,
            "step": progress.step,
            "total_steps": progress.total_steps,
            "loss": progress.loss,
            "held_out_loss": progress.held_out_loss,
            "adapter_saved": progress.adapter_saved,
            "status": progress.status_line(),
        }

    return run_status


def read(settings: str) -> dict[str, Any]:
    """A JSON object of setting names and values. Raises UserError when it is none."""
    try:
        return dict(json.loads(settings or "{}"))
    except (ValueError, TypeError) as error:
        raise UserError(f"settings is {settings!r}: it must be a JSON object.") from error


def find(services: Services, run_id: str) -> Run:
    """The run of that id, or the newest. What is wrong reaches the script as a sentence."""
    try:
        newest = services.workspace.newest()
        if run_id or newest is None:
            return services.workspace.get(run_id)
        return newest
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error
