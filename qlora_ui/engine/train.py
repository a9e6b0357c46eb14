"""One training run, from its config to its adapter, told in events. Knows nothing of threads or Gradio."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import transformers
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from qlora_ui import checkpoints
from qlora_ui.config import RunConfig
from qlora_ui.data import checks
from qlora_ui.engine import result, seq2seq, shape, tokens
from qlora_ui.engine.adapter import add_adapter, check_start, continue_adapter, find_adapter, load_weights
from qlora_ui.engine.hardware import Hardware, detect, give_memory_back, is_out_of_memory, memory_gib, torch_dtype
from qlora_ui.engine.layers import describe_storage
from qlora_ui.engine.model import check_positions, find, generation_ends, load_quantized, load_tokenizer, make_room
from qlora_ui.engine.report import Reporter
from qlora_ui.engine.samples import sampler
from qlora_ui.engine.step_plan import plan_steps
from qlora_ui.engine.step_trainer import StepTrainer
from qlora_ui.engine.token_checks import padding, troubles
from qlora_ui.engine.tokenized import FittedRows, Tokenized, cached_tokenized, fit
from qlora_ui.engine.tracking import PROJECT, reporting
from qlora_ui.engine.watch import BestCheckpoint, FiniteSteps, owes_measurement
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Finished, Log, Paused, Phase, PhaseProgress, Stopped
from qlora_ui.runs import Run
from qlora_ui.stopping import Cancelled, OutOfMemory

Emit = Callable[[Event], None]
ShouldStop = Callable[[], bool]
Choose = Callable[[FittedRows, FittedRows], tuple[FittedRows, FittedRows]]
Result = TypeVar("Result")

transformers.utils.logging.set_verbosity_error()


def train(run: Run, emit: Emit, should_stop: ShouldStop, checkpoint: Path | None = None) -> None:
    """Train the run's adapter, from its beginning or on from one of its checkpoints.

    Going on restores adapter, optimizer, schedule, random state and place in the data, so that the steps are those of a run
    that was never interrupted. Ends with `Finished`, `Stopped` or `Paused` emitted; raises UserError, OutOfMemory, or Cancelled
    when it was asked to end and there is no step to keep, or it is to be discarded.
    """
    in_given_memory(lambda: fetch_and_train(run, emit, should_stop, checkpoint))


def in_given_memory(work: Callable[[], Result]) -> Result:
    """The result of work that leaves no memory behind. Raises OutOfMemory, when nothing of the work is held any more."""
    give_memory_back()  # what an attempt before this one left
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        lack = str(error).strip().partition("\n")[0] or type(error).__name__
    finally:
        give_memory_back()
    give_memory_back()  # out here, where no traceback holds the tensors of the attempt any more
    raise OutOfMemory(lack)


def fetch_and_train(run: Run, emit: Emit, should_stop: ShouldStop, checkpoint: Path | None) -> None:
    """All phases in order. What it made is garbage when it returns."""
    config = run.config()
    trainer, data = prepare(run, emit, should_stop, going_on=checkpoint is not None)
    train_set, held_out_set = checks.split(data, config.data, config.optimization.seed)
    asked, tokenizer = held_out_set or train_set, trainer.processing_class
    for callback in sampler(config.schedule, asked, tokenizer, emit, should_stop, trainer.compute_loss_context_manager):
        trainer.add_callback(callback)
    emit(Phase(name="training"))
    if checkpoint and not owes_measurement(checkpoint, config.schedule.eval_steps):
        trainer.args.eval_on_start = False
    try:
        with contextlib.suppress(Cancelled), reporting(run, trainer, emit, should_stop):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        if is_out_of_memory(error):
            keep_last_step(run, trainer)
        raise
    end(run, config, trainer, emit)


def prepare(
    run: Run, emit: Emit, should_stop: ShouldStop, *, going_on: bool = False, choose: Choose = lambda train, held_out: (train, held_out)
) -> tuple[StepTrainer, checks.DataSet]:
    """All phases before the first step: the trainer of the run over its loaded model, and the rows that were read.

    `choose` may put others in the place of the rows to train on and of those held out.
    """
    config = run.config()
    hardware = detect(config.quantization.compute_dtype)
    start = find_adapter(config.adapter.init_adapter, run.workspace) if config.adapter.init_adapter else None
    vocabulary = start if start and check_start(start, config) else None
    data = read_rows(run, config, emit, should_stop)

    emit(Phase(name="fetching", detail=config.model.model))
    named = config.model
    found = find(named.model, named.revision, run.workspace.models, emit, should_stop, trusted=named.trust_remote_code)
    if found.trusted:
        emit(Log(text=f"The code that comes with {found.public_name} may run: trust_remote_code is on", level="warning"))
    emit(Log(text=f"{found.public_name}: {found.origin}{f', commit {found.commit[:12]}' if found.commit else ''}"))
    run.note(model_origin=found.origin, model_commit=found.commit, model_name=found.public_name, compute_dtype=hardware.compute_dtype)

    emit(Phase(name="loading"))
    emit(Log(text=f"Device: {hardware.chip()}"))
    emit(Log(text=f"Compute dtype {hardware.compute_dtype}: {hardware.reason}"))
    tokenizer = load_tokenizer(found, vocabulary)
    new = tokens.add_new(tokenizer, config.data.new_tokens)
    tokens.set_prompt_format(tokenizer, config.data.prompt_format, config.data.chat_template)
    shape.check(found, torch_dtype(hardware), config.adapter, len(tokenizer), new)

    emit(Phase(name="tokenizing"))
    train_rows, held_out_rows = choose(*encode(run, tokenizer, data, emit, should_stop))
    if not going_on:
        check_positions(found, max(int(rows.fitted.lengths.max(initial=0)) for rows in (train_rows, held_out_rows)))
    for trouble in troubles(tokenizer, data.conversations, config.data.train_on, generation_ends(found)):
        emit(Log(text=trouble, level="warning"))
    emit(Log(text=padding(tokenizer)))

    emit(Phase(name="quantizing"))
    base = load_quantized(found, config.quantization, hardware, emit, should_stop)
    emit(Log(text=describe_storage(base, config.quantization)))
    learned = make_room(base, len(tokenizer), new)
    if learned:
        emit(Log(text=f"New tokens, trained beside the adapter: {', '.join(tokenizer.convert_ids_to_tokens(learned))}"))
    if start:
        model = continue_adapter(base, config.adapter, start, found.public_name, emit)
    else:
        model = add_adapter(base, config.adapter, config.optimization.seed, learned)
    model.peft_config["default"].base_model_name_or_path = found.public_name  # in every checkpoint, not where it lies here
    model.peft_config["default"].revision = found.commit or None
    report_size(model, emit)
    if should_stop():
        raise Cancelled

    return make_trainer(run, config, hardware, model, tokenizer, train_rows, held_out_rows, emit, should_stop), data


def keep_last_step(run: Run, trainer: StepTrainer) -> None:
    """Save the last whole step after an allocation failed, so that the run goes on from there and not from the checkpoint before."""
    step = trainer.state.global_step
    if not (step and not trainer.updates.updating and checkpoints.damage(run.folder / f"checkpoint-{step}")):
        return
    trainer.model.zero_grad()
    trainer.save_checkpoint()


def end(run: Run, config: RunConfig, trainer: StepTrainer, emit: Emit) -> None:
    """Leave what the owner asked for, or the result of a training that came to its end, and say so."""
    step, total, best = trainer.state.global_step, trainer.state.max_steps, trainer.state.best_global_step
    reason = next(callback.ended_because for callback in trainer.callback_handler.callbacks if isinstance(callback, BestCheckpoint))
    is_at_end = step >= total or bool(reason)
    wish = run.wish()
    if step == 0 or wish == "discard":
        raise Cancelled
    if wish == "pause" and not is_at_end:
        if checkpoints.damage(run.folder / f"checkpoint-{step}"):  # it was asked while something was measured, before the saving
            trainer.save_checkpoint()
        emit(Paused(step=step, total_steps=total))
        return
    emit(Phase(name="saving"))
    kept = step
    if config.schedule.keep == "best" and best not in (None, step):
        load_weights(trainer.model, run.folder / f"checkpoint-{best}")
        emit(Log(text=f"The adapter is that of step {best}, which had the best held-out loss: {trainer.state.best_metric:.4f}"))
        kept = best
    result.publish(run, trainer.model, trainer.processing_class, kept)
    emit(Finished(step=step, reason=reason) if is_at_end else Stopped(step=step, total_steps=total, adapter_saved=True))


def read_rows(run: Run, config: RunConfig, emit: Emit, should_stop: ShouldStop) -> checks.DataSet:
    """The run's rows, checked, and kept in the run folder."""
    emit(Phase(name="reading", detail=config.data.data))
    data = checks.prepare(config.data, None, should_stop, lambda done: emit(PhaseProgress(done=done, total=0, unit="rows")))
    checks.write(data, run.folder / "data")
    run.note(data_fingerprint=data.report.fingerprint)
    emit(Log(text=data.report.summary(), level="warning" if data.report.dropped else "info"))
    for dropped in data.report.dropped[:5]:
        emit(Log(text=f"Row {dropped.row} was dropped: {dropped.reason}", level="warning"))
    if len(data.report.dropped) > 5:
        emit(Log(text=f"{len(data.report.dropped) - 5} more dropped rows are listed in data/report.json", level="warning"))
    if data.report.unused_columns:
        emit(Log(text=f"Columns that are not read: {', '.join(data.report.unused_columns)}"))
    if data.held_out:
        emit(Log(text=f"Held out: {len(data.held_out):,} rows of the split {config.data.held_out_split}"))
    return data


def encode(run: Run, tokenizer: Any, data: checks.DataSet, emit: Emit, should_stop: ShouldStop) -> tuple[FittedRows, FittedRows]:
    """The rows to train on and the held-out rows as tokens; says what was cut, dropped or split, and what is left out."""
    config = run.config()
    seq2seq.check(tokenizer, config.data, config.optimization.neftune_noise_alpha)
    if tokens.is_encoder_decoder(tokenizer):
        emit(Log(text="Encoder-decoder model: the encoder reads a row up to its last answer, and that answer is trained"))

    def tokenized(conversations: Sequence[checks.Conversation], fingerprint: str) -> Tokenized:
        return cached_tokenized(
            run.workspace.root / "cache",
            tokenizer,
            conversations,
            fingerprint,
            config.data.train_on,
            should_stop,
            on_progress=lambda done: emit(PhaseProgress(done=done, total=len(conversations), unit="rows")),
            on_trouble=lambda said: emit(Log(text=said, level="warning")),
        )

    train_set, held_out_set = checks.split(data, config.data, config.optimization.seed)
    everything = tokenized(data.conversations, data.report.fingerprint)  # what a look at the data set has tokenized already
    place = {id(conversation): index for index, conversation in enumerate(data.conversations)}
    parts = [everything.select([place[id(conversation)] for conversation in train_set])]
    if data.held_out:
        parts.append(tokenized(data.held_out, f"{data.report.fingerprint} held out"))
    else:
        parts.append(everything.select([place[id(conversation)] for conversation in held_out_set]))
    train_rows, held_out_rows = (fit(part, config.data.max_seq_len, config.data.long_rows) for part in parts)
    for line in (*train_rows.account(config.data.max_seq_len), *held_out_rows.account(config.data.max_seq_len)):
        emit(Log(text=line, level="warning"))
    if held_out_set and not len(held_out_rows):
        emit(Log(text="No held-out row has a token to measure within max_seq_len, so there is no held-out loss", level="warning"))
    if not len(train_rows):
        raise UserError(
            f"None of the {len(train_set)} rows has a token to train on within max_seq_len {config.data.max_seq_len}. "
            "Raise max_seq_len or change what is trained on.",
            field="max_seq_len",
        )
    return train_rows, held_out_rows


def report_size(model: Any, emit: Emit) -> None:
    """Say how much is trained, and the memory so far."""
    trainable, total = model.get_nb_trainable_parameters()
    layers = sum(hasattr(module, "lora_A") for module in model.modules())
    rank = model.peft_config["default"].r
    emit(Log(text=f"LoRA rank {rank} on {layers} linear layers: {trainable:,} of {total:,} parameters are trained"))
    emit(Log(text=f"{memory_gib():.2f} GiB of memory in use"))


def make_trainer(
    run: Run,
    config: RunConfig,
    hardware: Hardware,
    model: Any,
    tokenizer: Any,
    train_rows: FittedRows,
    held_out_rows: FittedRows,
    emit: Emit,
    should_stop: ShouldStop,
) -> StepTrainer:
    """transformers' Trainer, told what the config says, reporting through `emit`."""
    reporter = Reporter(run, emit, should_stop, train_rows, held_out_rows, FiniteSteps(config.optimization.learning_rate))
    two_sided = tokens.is_encoder_decoder(tokenizer)
    plan = plan_steps(model, config, hardware, train_rows, emit)
    pad = seq2seq.Collator(tokenizer.pad_token_id, model.config) if two_sided else tokens.Collator(tokenizer.pad_token_id)
    trainer = StepTrainer(
        plan=plan,
        on_tokens=reporter.count,
        finite_steps=reporter.finite_steps,
        loraplus_lr_ratio=config.optimization.loraplus_lr_ratio,
        model=model,
        args=training_arguments(run, config, hardware, len(held_out_rows) > 0, plan.gradient_checkpointing),
        train_dataset=train_rows,
        eval_dataset=held_out_rows if len(held_out_rows) else None,
        data_collator=plan.collator(config, pad),
        processing_class=tokenizer,
        callbacks=[reporter, reporter.finite_steps, BestCheckpoint(config.schedule)],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to the caller
    if hardware.kind == "cpu" and config.optimization.optimizer.startswith("paged"):
        emit(Log(text="The optimizer's pages only move on a GPU; on CPU it is the same optimizer, unpaged"))
    return trainer


def training_arguments(
    run: Run, config: RunConfig, hardware: Hardware, has_held_out: bool, gradient_checkpointing: bool = False
) -> TrainingArguments:
    """The config in Trainer's words. `constant` includes the warm-up, which transformers' plain `constant` would ignore.

    What is one batch to Trainer is all rows of an optimizer step: how they are parted into micro-batches is the collator's.
    """
    return TrainingArguments(
        output_dir=str(run.folder),
        run_name=run.id,
        project=PROJECT,
        use_cpu=hardware.kind == "cpu",
        bf16=hardware.compute_dtype == "bfloat16",
        fp16=hardware.compute_dtype == "float16",
        per_device_train_batch_size=config.effective_batch,
        per_device_eval_batch_size=config.effective_batch,
        activation_checkpointing=gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if gradient_checkpointing else None,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=hardware.kind == "cuda",
        **training_values(config, has_held_out),
    )


def training_values(config: RunConfig, has_held_out: bool) -> dict[str, Any]:
    """The arguments that are the same on every machine and however a step's rows are parted."""
    o, s = config.optimization, config.schedule
    return {
        "learning_rate": o.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if o.lr_scheduler == "constant" else o.lr_scheduler,
        "warmup_steps": o.warmup_steps or o.warmup_ratio,
        "num_train_epochs": o.num_train_epochs,
        "max_steps": o.max_steps or -1,
        "optim": o.optimizer,
        "adam_beta1": o.adam_beta1,
        "adam_beta2": o.adam_beta2,
        "adam_epsilon": o.adam_epsilon,
        "max_grad_norm": o.max_grad_norm,
        "weight_decay": o.weight_decay,
        "neftune_noise_alpha": o.neftune_noise_alpha or None,
        "train_sampling_strategy": "group_by_length" if o.group_by_length else "random",
        "seed": o.seed,
        "data_seed": o.seed,
        "eval_strategy": "steps" if has_held_out else "no",
        "eval_steps": s.eval_steps,
        "eval_on_start": has_held_out,
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "save_steps": s.save_steps,  # how many are kept is the reporter's business, who knows which are complete
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "label_names": ["labels"],
    }
