"""One training run, from its config to its adapter, told in events. Knows nothing of threads or Gradio."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import transformers
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from qlora_ui.config import RunConfig
from qlora_ui.data import checks
from qlora_ui.engine import tokens
from qlora_ui.engine.hardware import Hardware, detect, give_memory_back, memory_gib
from qlora_ui.engine.model import Found, add_adapter, find, load_quantized, load_tokenizer
from qlora_ui.errors import UserError
from qlora_ui.events import (
    CheckpointSaved,
    Event,
    Finished,
    HeldOut,
    Log,
    Phase,
    PhaseProgress,
    Planned,
    Step,
    Stopped,
    finite,
)
from qlora_ui.runs import Run
from qlora_ui.stopping import Cancelled

Emit = Callable[[Event], None]
ShouldStop = Callable[[], bool]

transformers.utils.logging.set_verbosity_error()


def train(run: Run, emit: Emit, should_stop: ShouldStop) -> None:
    """Train the run's adapter. Ends with `Finished` or `Stopped` emitted; raises UserError, or Cancelled before the first step."""
    try:
        fetch_and_train(run, emit, should_stop)
    finally:
        give_memory_back()


def fetch_and_train(run: Run, emit: Emit, should_stop: ShouldStop) -> None:
    """All phases in order. What it made is garbage when it returns."""
    config = run.config()
    train_set, held_out_set = read_rows(run, config, emit, should_stop)

    emit(Phase(name="fetching", detail=config.model.model))
    found = find(config.model.model, config.model.revision, run.workspace.models, emit, should_stop)
    emit(Log(text=f"{found.public_name}: {found.origin}{f', commit {found.commit[:12]}' if found.commit else ''}"))
    run.note(model_origin=found.origin, model_commit=found.commit, model_name=found.public_name)

    emit(Phase(name="loading"))
    hardware = detect(config.quantization.compute_dtype)
    emit(Log(text=f"Device: {hardware.chip()}"))
    emit(Log(text=f"Compute dtype {hardware.compute_dtype}: {hardware.reason}"))
    tokenizer = load_tokenizer(found)
    tokens.set_prompt_format(tokenizer, config.data.prompt_format)

    emit(Phase(name="tokenizing"))
    train_rows = encode(tokenizer, train_set, config, emit, should_stop)
    held_out_rows = encode(tokenizer, held_out_set, config, emit, should_stop) if held_out_set else None
    if held_out_rows and not held_out_rows.rows:
        emit(Log(text="No held-out row has a token to measure within max_seq_len, so there is no held-out loss", level="warning"))
        held_out_rows = None
    if not train_rows.rows:
        raise UserError(
            f"None of the {len(train_set)} rows has a token to train on within max_seq_len {config.data.max_seq_len}. "
            "Raise max_seq_len or change what is trained on.",
            field="max_seq_len",
        )

    emit(Phase(name="quantizing"))
    model = add_adapter(load_quantized(found, config.quantization, hardware, emit, should_stop), config.adapter, config.optimization.seed)
    report_size(model, config, emit)
    if should_stop():
        raise Cancelled

    trainer = make_trainer(run, config, hardware, model, tokenizer, train_rows, held_out_rows, emit, should_stop)
    emit(Phase(name="training"))
    try:
        trainer.train()
        stopped = False
    except Cancelled:
        stopped = True
    save(run, trainer, found, emit, stopped)


def read_rows(run: Run, config: RunConfig, emit: Emit, should_stop: ShouldStop) -> tuple[list[Any], list[Any]]:
    """The run's rows, checked, kept in the run folder, and split into training and held-out."""
    emit(Phase(name="reading", detail=config.data.data))
    data = checks.prepare(config.data.data, None, should_stop, lambda done: emit(PhaseProgress(done=done, total=0, unit="rows")))
    checks.write(data, run.folder / "data")
    run.note(data_fingerprint=data.report.fingerprint)
    emit(Log(text=data.report.summary(), level="warning" if data.report.dropped else "info"))
    for dropped in data.report.dropped[:5]:
        emit(Log(text=f"Row {dropped.row} was dropped: {dropped.reason}", level="warning"))
    if len(data.report.dropped) > 5:
        emit(Log(text=f"{len(data.report.dropped) - 5} more dropped rows are listed in data/report.json", level="warning"))
    train_set, held_out = checks.split(data.conversations, config.data.held_out_share, config.optimization.seed)
    return list(train_set), list(held_out)


def encode(tokenizer: Any, conversations: list[Any], config: RunConfig, emit: Emit, should_stop: ShouldStop) -> tokens.EncodedRows:
    """Conversations to tokens, saying what was cut and what cannot be trained on."""
    encoded = tokens.encode_rows(
        tokenizer,
        ((conversation.row, conversation.messages) for conversation in conversations),
        config.data.train_on,
        config.data.max_seq_len,
        should_stop,
        lambda done: emit(PhaseProgress(done=done, total=len(conversations), unit="rows")),
    )
    if encoded.truncated:
        emit(Log(text=f"{encoded.truncated} rows are longer than max_seq_len {config.data.max_seq_len} and were cut", level="warning"))
    if encoded.untrainable:
        numbers = ", ".join(map(str, encoded.untrainable[:8]))
        emit(
            Log(
                text=f"{len(encoded.untrainable)} rows were left out, nothing to train on in them after the cut: {numbers}", level="warning"
            )
        )
    return encoded


def report_size(model: Any, config: RunConfig, emit: Emit) -> None:
    """Say how much is trained and how the base is stored."""
    trainable, total = model.get_nb_trainable_parameters()
    layers = sum(hasattr(module, "lora_A") for module in model.modules())
    emit(Log(text=f"LoRA rank {config.adapter.lora_r} on {layers} linear layers: {trainable:,} of {total:,} parameters are trained"))
    double = "with" if config.quantization.double_quant else "without"
    emit(Log(text=f"Base stored as {config.quantization.quant_type.upper()} {double} double quantization, {memory_gib():.2f} GiB in use"))


def make_trainer(
    run: Run,
    config: RunConfig,
    hardware: Hardware,
    model: Any,
    tokenizer: Any,
    train_rows: tokens.EncodedRows,
    held_out_rows: tokens.EncodedRows | None,
    emit: Emit,
    should_stop: ShouldStop,
) -> Trainer:
    """transformers' Trainer, told what the config says, reporting through `emit`."""
    reporter = Reporter(emit, should_stop, train_rows, held_out_rows)
    trainer = CountingTrainer(
        model=model,
        args=training_arguments(run, config, hardware, has_held_out=held_out_rows is not None),
        train_dataset=[asdict(row) for row in train_rows.rows],
        eval_dataset=[asdict(row) for row in held_out_rows.rows] if held_out_rows else None,
        data_collator=tokens.Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[reporter],
    )
    trainer.reporter = reporter
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to the caller
    if hardware.kind == "cpu" and config.optimization.optimizer.startswith("paged"):
        emit(Log(text="The optimizer's pages only move on a GPU; on CPU it is the same AdamW, unpaged"))
    return trainer


def training_arguments(run: Run, config: RunConfig, hardware: Hardware, has_held_out: bool) -> TrainingArguments:
    """The config in Trainer's words. `constant` includes the warm-up, which transformers' plain `constant` would ignore."""
    o, s = config.optimization, config.schedule
    return TrainingArguments(
        output_dir=str(run.folder),
        use_cpu=hardware.kind == "cpu",
        bf16=hardware.compute_dtype == "bfloat16",
        fp16=hardware.compute_dtype == "float16",
        per_device_train_batch_size=o.micro_batch_size,
        per_device_eval_batch_size=o.micro_batch_size,
        gradient_accumulation_steps=o.gradient_accumulation_steps,
        learning_rate=o.learning_rate,
        lr_scheduler_type="constant_with_warmup" if o.lr_scheduler == "constant" else o.lr_scheduler,
        warmup_steps=o.warmup_ratio,
        num_train_epochs=o.num_train_epochs,
        max_steps=o.max_steps or -1,
        optim=o.optimizer,
        adam_beta2=o.adam_beta2,
        max_grad_norm=o.max_grad_norm,
        weight_decay=o.weight_decay,
        activation_checkpointing=o.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if o.gradient_checkpointing else None,
        seed=o.seed,
        data_seed=o.seed,
        eval_strategy="steps" if has_held_out else "no",
        eval_steps=s.eval_steps,
        eval_on_start=has_held_out,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=s.save_steps,
        save_total_limit=s.save_total_limit,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=hardware.kind == "cuda",
    )


class CountingTrainer(Trainer):
    """Trainer that counts tokens: the real ones of each training batch, on the host, and those that a held-out loss is a mean of."""

    reporter: Reporter

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.reporter.step_tokens += inputs.pop(tokens.REAL_TOKENS)  # Trainer's own count waits for the device
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        return prepared

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer takes the mean over rows of their batch's loss; weighted so, that is the mean over all trained tokens."""
        rows, trained = len(inputs["labels"]), (inputs["labels"][:, 1:] != tokens.IGNORED).sum()
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        held_out = self.reporter.held_out_rows
        if loss is not None and held_out is not None:
            loss = loss * trained / rows * len(held_out.rows) / held_out.trained_tokens
        return loss, logits, labels


class Reporter(TrainerCallback):
    """Turns what Trainer does into events, and the wish to stop into Cancelled at the next safe point."""

    def __init__(self, emit: Emit, should_stop: ShouldStop, train: tokens.EncodedRows, held_out: tokens.EncodedRows | None) -> None:
        self.emit, self.should_stop = emit, should_stop
        self.train_rows, self.held_out_rows = train, held_out
        self.step_started = 0.0
        self.step_tokens = 0

    def _stop_here(self, *_: Any, **__: Any) -> None:
        if self.should_stop():
            raise Cancelled

    on_substep_end = on_prediction_step = _stop_here

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.emit(
            Planned(
                total_steps=state.max_steps,
                train_rows=len(self.train_rows.rows),
                held_out_rows=len(self.held_out_rows.rows) if self.held_out_rows else 0,
                tokens=self.train_rows.tokens,
                trained_tokens=self.train_rows.trained_tokens,
            )
        )
        self._stop_here()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step_started, self.step_tokens = time.perf_counter(), 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps and self.held_out_rows is not None:
            control.should_evaluate = True  # else the result's held-out loss would be that of some step before

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        seconds = time.perf_counter() - self.step_started
        self.emit(
            Step(
                step=state.global_step,
                loss=finite(logs["loss"]),
                learning_rate=logs["learning_rate"],
                grad_norm=finite(logs.get("grad_norm", float("nan"))),
                tokens_per_second=self.step_tokens / seconds,
                memory_gib=memory_gib(),
                epoch=state.epoch or 0.0,
            )
        )
        self._stop_here()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        loss = finite((metrics or {}).get("eval_loss", float("nan")))
        if loss is not None:
            self.emit(HeldOut(step=state.global_step, loss=loss))
        else:
            self.emit(Log(text=f"step {state.global_step}: the held-out loss is not finite", level="warning"))
        self._stop_here()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.emit(CheckpointSaved(step=state.global_step, name=f"checkpoint-{state.global_step}"))


def save(run: Run, trainer: Trainer, found: Found, emit: Emit, stopped: bool) -> None:
    """Write the adapter, with its tokenizer and chat template, and say how the run ended."""
    step, total = trainer.state.global_step, trainer.state.max_steps
    if step == 0:
        raise Cancelled
    emit(Phase(name="saving"))
    aside = run.folder / "adapter.partial"
    shutil.rmtree(aside, ignore_errors=True)
    model: Any = trainer.model
    model.peft_config["default"].base_model_name_or_path = found.public_name
    # Only LoRA weights were trained; asking PEFT to look whether embeddings changed would call the Hub.
    model.save_pretrained(aside, save_embedding_layers=False)
    trainer.processing_class.save_pretrained(aside)
    run.publish_adapter(aside, step)
    emit(Stopped(step=step, total_steps=total, adapter_saved=True) if stopped else Finished(step=step))
