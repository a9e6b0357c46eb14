"""A sweep: every combination is checked before anything waits, each run is named by what is its own, and the best is marked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
from test_runs_tab import ATTACK, past_run

from qlora_ui import presets, services, sweeping
from qlora_ui.cli import main
from qlora_ui.errors import UserError
from qlora_ui.inspection import Inspector
from qlora_ui.memory.measured import Measured
from qlora_ui.queueing import Entry
from qlora_ui.runs import Run, Workspace
from qlora_ui.services import Services
from qlora_ui.ui import form, queue_panel, runs_tab, sweep


@pytest.fixture
def page(tiny_workspace: Workspace) -> Services:
    return services.build(tiny_workspace, services.WarmUp())


@pytest.fixture
def uploaded(tiny_workspace: Workspace, rows: Path) -> str:
    return str(shutil.copy(rows, tiny_workspace.uploads))


def test_each_combination_is_a_config_named_by_its_values() -> None:
    config = tiny.tiny_config("rows.json", seed=7)
    over = {"learning_rate": sweeping.read_values("learning_rate", "1e-4, 0.05"), "lora_r": sweeping.read_values("lora_r", "8,16")}
    made = sweeping.combinations(config, over)
    assert list(made) == [f"learning_rate {rate}, lora_r {rank}" for rate in ("1e-4", "0.05") for rank in (8, 16)]
    assert made["learning_rate 0.05, lora_r 16"] == config.with_values({"learning_rate": 0.05, "lora_r": 16})
    entries = sweeping.entries(made, over, isolated=True)
    assert [entry.name for entry in entries][:2] == ["learning-rate-1e-4-lora-r-8", "learning-rate-1e-4-lora-r-16"]
    assert len({entry.sweep for entry in entries}) == 1
    assert entries[2].name == "learning-rate-0.05-lora-r-8"
    assert entries[0].sweep.endswith("learning_rate × lora_r")
    long = ["early_stopping_patience", "gradient_accumulation_steps"]
    assert sweeping.slug(f"{long[0]} 12, {long[1]} 16", long) == "esp-12-gas-16"  # the values stay
    assert sweeping.read_values("target_modules", "all-linear; q_proj,v_proj") == ["all-linear", "q_proj,v_proj"]
    assert sweeping.read_values("packing", "on, off") == ["on", "off"]


@pytest.mark.parametrize(
    ("value", "text"), [(1e-4, "1e-4"), (1.5e-4, "1.5e-4"), (1e-10, "1e-10"), (0.05, "0.05"), (3.0, "3"), (True, "true")]
)
def test_values_are_written_as_a_person_writes_them(value: object, text: str) -> None:
    assert sweeping.shown(value) == text


def test_two_values_that_look_alike_when_rounded_keep_their_names() -> None:
    made = sweeping.combinations(tiny.tiny_config("rows.json"), {"learning_rate": [0.00012345678, 0.00012345679]})
    assert len(made) == 2


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"lora_r": "8, 0"}, "lora_r is 0: it must be a whole number from 1 to 512"),
        ({"lora_r": "8, 08"}, "lora_r has 8 twice"),
        ({"lora_r": " , "}, "There is no value for lora_r"),
        ({"lora_rank": "8"}, "There is no setting 'lora_rank'. Did you mean"),
        ({"quant_bits": "4, 8", "use_dora": "true"}, "With quant_bits 8 and use_dora true: use_dora is true, but quant_bits is 8"),
        ({"lora_r": "1,2,3,4,5,6,7", "seed": "1,2,3,4,5"}, "These would be 35 runs, more than 32"),
        ({"lora_r": "1", "seed": "1", "lora_alpha": "1"}, "A sweep is over one or two settings, these are 3"),
    ],
)
def test_what_cannot_be_swept_is_a_sentence(over: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        sweeping.combinations(tiny.tiny_config("rows.json"), {name: sweeping.read_values(name, text) for name, text in over.items()})
    assert str(caught.value).startswith(said)


def test_the_plan_says_runs_steps_and_time(workspace: Workspace, rows: Path) -> None:
    configs = [tiny.tiny_config(rows, max_steps=steps) for steps in (10, 30)]
    inspector = Inspector(workspace, within=None)
    assert sweeping.plan_words(sweeping.plans(configs, inspector, lambda config: 3.0)) == (
        "2 runs, 40 steps in all. About 2 min of training, at the pace that was measured here."
    )
    unknown = sweeping.plan_words(sweeping.plans(configs, inspector, lambda config: 3.0 if config is configs[0] else None))
    assert unknown == "2 runs, 40 steps in all. How long they take is known once such a step was measured here."


# From a page --------------------------------------------------------------------------------------------------------------


def form_values(data: str, **values: object) -> tuple[list[str], list[object]]:
    config = tiny.tiny_config(data, **values).values()
    names = [name for name in config if name != "data"]
    return names, [False, "starter", data, *(config[name] for name in names)]


def test_a_step_that_was_measured_tells_how_long_a_sweep_takes(page: Services, uploaded: str) -> None:
    names, told = form_values(uploaded, max_steps=30)
    took = Measured(memory_bytes=1, seconds_a_step=2.0, train_rows=9, gradient_checkpointing=False)
    page.probes._known = [(form.read("starter", uploaded, names, tuple(told[3:])), took)]
    assert "2 runs, 60 steps in all. About 2 min of training" in sweep.look(page, names, "learning_rate", "1e-3,2e-3", "", "", *told)


def test_a_page_lines_up_every_combination_or_none(page: Services, uploaded: str) -> None:
    names, told = form_values(uploaded)
    assert "2 runs, 8 steps in all." in sweep.look(page, names, "learning_rate", "1e-3,2e-3", "lora_r", "4", *told)
    assert page.queue.entries() == []
    assert "In line. 2 runs" in sweep.add(page, names, "learning_rate", "1e-3,2e-3", "lora_r", "4", *told)
    assert "The queue is held: start it on the Runs tab." in sweep.add(page, names, "lora_r", "2,3", "", "", *told)
    assert [entry.name for entry in page.queue.entries()] == [
        "learning-rate-1e-3-lora-r-4",
        "learning-rate-2e-3-lora-r-4",
        "lora-r-2",
        "lora-r-3",
    ]
    for refused, said in (
        (("lora_r", "4,0", "", ""), "lora_r is 0"),
        (("lora_r", "4", "lora_r", "8"), "LoRA rank is chosen twice"),
        (("", "", "", ""), "A sweep is over one or two settings, these are 0"),
        (("trust_remote_code", "false,true", "", ""), "trust_remote_code is on, but a page may not let"),
    ):
        assert said in sweep.add(page, names, *refused, *told), said
    assert len(page.queue.entries()) == 4


def test_a_page_adds_the_form_to_the_line_or_says_what_is_wrong_with_it(page: Services, uploaded: str, rows: Path) -> None:
    names, told = form_values(uploaded)
    assert "In line as number 1. The queue is held" in queue_panel.add(page, names, *told)
    names, told = form_values(str(rows))
    assert "outside the workspace" in queue_panel.add(page, names, *told)
    names, told = form_values(uploaded, model="nope")
    assert "There is no model &#x27;nope&#x27; on this machine" in queue_panel.add(page, names, *told)
    names, told = form_values(uploaded, lora_r=4)
    told[3 + names.index("lora_r")] = 0
    assert queue_panel.add(page, names, *told) == ""  # the plan above the button says it
    assert len(page.queue.entries()) == 1


def test_the_panel_says_what_waits_what_was_trained_and_which_sweeps_there_are(page: Services, uploaded: str) -> None:
    first, second = page.queue.add(
        [
            Entry(config=tiny.tiny_config(uploaded), name="swept", sweep="today lora_r"),
            Entry(config=tiny.tiny_config(uploaded, max_steps=0)),
        ]
    )
    run = of_sweep(page.workspace, Path(uploaded), "today lora_r", queue_entry="x")
    state = queue_panel.state(page)
    assert state["line"] == "2 wait. Held: nothing begins until you start the queue."
    assert [entry["about"] for entry in state["entries"]] == ["tiny · rows.json · 4 steps", "tiny · rows.json · 1 epoch"]
    assert state["ended"] == [{"run": run.id, "title": run.name, "state": "finished", "said": "Finished: 20 steps, adapter saved"}]
    assert state["sweeps"] == [{"name": "today lora_r", "runs": [run.id], "said": "1 of 2 begun"}]
    own = presets.load("starter").config.with_values({"lora_r": 5, "learning_rate": 1e-3})
    assert queue_panel.changes(own) == ["LoRA rank 5", "Learning rate 1e-3"]
    assert queue_panel.changes(own.with_values({"seed": 1, "packing": "off", "lora_bias": "all"}))[3:] == ["2 more settings of its own"]
    assert queue_panel.act(page, "up", second.id) == queue_panel.act(page, "nonsense", first.id) == ""
    assert [entry["id"] for entry in queue_panel.state(page)["entries"]] == [second.id, first.id]
    page.queue.hold("Held, because of X.")
    assert queue_panel.state(page)["line"] == "2 wait. Held, because of X."
    shutil.rmtree(page.queue.folder)
    assert queue_panel.state(page)["entries"] == []


# How it came out ----------------------------------------------------------------------------------------------------------


def of_sweep(workspace: Workspace, data: Path, name: str, *, queue_entry: str = "", **values: object) -> Run:
    run = past_run(workspace, data, **values)  # type: ignore[arg-type]
    run.note(sweep=name, queue_entry=queue_entry)
    return run


def test_the_runs_of_a_sweep_are_ranked_and_the_best_is_marked_also_of_more_than_eight(page: Services, uploaded: str) -> None:
    floors = {rank: 1 + (rank - 5) ** 2 for rank in range(1, 11)}
    runs = [of_sweep(page.workspace, Path(uploaded), "s lora_r", lora_r=rank, floor=floor) for rank, floor in floors.items()]
    shown = runs_tab.show(page, [run.id for run in runs])[4]
    assert shown.count("class=best") == shown.count("<b>best</b>") == 1
    assert "<td>5</td><td>1.250 <b>best</b></td>" in shown
    assert "LoRA rank" in shown
    assert "Learning rate" not in shown
    assert shown.count("<polyline") == 2 * 8
    other = past_run(page.workspace, Path(uploaded))
    assert "11 runs are chosen. Choose 8 or fewer" in runs_tab.show(page, [other.id, *(run.id for run in runs)])[4]


def test_a_sweep_without_a_measurement_marks_nothing_and_escapes_all_text(page: Services, uploaded: str) -> None:
    runs = [tiny.tiny_run(page.workspace, uploaded, sample_prompts=text) for text in (ATTACK, "b")]
    html = sweep.results([runs_tab.shown(page, run) for run in runs])
    assert "best</b>" not in html
    assert "<img" not in html


def test_the_terminal_says_plans_and_ranks(tiny_workspace: Workspace, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue = services.build(tiny_workspace, services.WarmUp()).queue
    told = ["--data", str(rows), "--set", "model=tiny", "--set", "max_steps=5"]
    assert main(["sweep", *told, "--over", "learning_rate=1e-4,2e-4", "--over", "lora_r=8,16", "--dry-run"]) == 0
    assert "4 runs, 20 steps in all." in capsys.readouterr().out
    assert main(["sweep", *told, "--over", "lora_r=8", "--over", "lora_r=16"]) == 2
    assert main(["sweep", *told, "--over", "lora_r=8,0"]) == 2
    assert main(["sweep", *told, "--over", "lora_r"]) == 2
    assert main(["sweep", *told]) == 2
    assert main(["sweep", "--results"]) == 2
    assert "belongs to a sweep yet" in capsys.readouterr().err
    assert queue.entries() == []
    assert main(["sweep", *told, "--over", "lora_r=8,16", "--isolated"]) == 0
    assert "They wait. Train what waits with: python -m qlora_ui queue --run" in capsys.readouterr().out
    assert [(entry.name, entry.isolated) for entry in queue.entries()] == [("lora-r-8", True), ("lora-r-16", True)]
    worse, better = (of_sweep(tiny_workspace, rows, "now lora_r", floor=floor) for floor in (2.0, 1.0))
    assert main(["sweep", "--results"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "now lora_r"
    assert lines[1].startswith("* 1.2500") and better.id in lines[1]  # noqa: PT018
    assert lines[2].startswith("  2.2500") and worse.id in lines[2]  # noqa: PT018
