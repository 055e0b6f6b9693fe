"""Fine-tune the model on whole conversations: the loss is on the assistant's tokens alone.

Usage:   python sft.py                                      # after midtrain.py
         torchrun --nproc_per_node=8 sft.py --tag=d20
Reads:   runs/TAG/mid/, data/CHATS/{sft,val}.jsonl
Writes:  runs/TAG/sft/step-001234/, runs/TAG/metrics.jsonl
Method:  conversations are packed whole into rows; one that is too long loses its last turns,
         and is counted; batch and learning rates are the base run's, but for a factor
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from common import (
    Batch,
    GPTConfig,
    accum_steps,
    at_least,
    blank_batch,
    check_data,
    check_name,
    choose_micro_batch,
    compile_choice,
    compile_or_not,
    continue_stage,
    conversation_rows,
    data_dir,
    evaluate_loss,
    find_checkpoint,
    newest_checkpoint,
    parent_key,
    parse_settings,
    peak_flops,
    pick_dtype,
    read_meta,
    row_batches,
    run_tokenizer,
    save_checkpoint,
    schedule,
    setting,
    start_run,
    training_steps,
    try_micro_batch,
)

# 1. Settings ---------------------------------------------------------------------------------


@dataclass
class Settings:
    tag: str = setting("main", "name of the run, a folder below runs/")
    chats: str = setting("", "folder below data/ with the conversations; empty = the mid run's")
    start_from: str = setting("mid", "stage whose model is trained on", choices=("base", "mid"))
    epochs: int = setting(1, "passes over the conversations")
    num_iterations: int = setting(0, "optimizer steps; 0 = from the epochs")
    total_batch_size: int = setting(0, "tokens a step over all ranks; 0 = the base run's")
    device_batch_size: int = setting(0, "rows of one forward pass; 0 = what fits")
    lr_scale: float = setting(0.05, "factor on all learning rates")
    matrix_lr: float = setting(0.0, "learning rate of the matrices (Muon); 0 = the base run's")
    embed_lr: float = setting(0.0, "learning rate of the embedding; 0 = the base run's")
    head_lr: float = setting(0.0, "learning rate of the head; 0 = the base run's")
    weight_decay: float = setting(-1.0, "decay of the matrices; -1 = the base run's")
    warm_start: bool = setting(True, "begin with the mid run's moments of the optimizer")
    warmup: int = setting(0, "steps in which the learning rate rises")
    warmdown: float = setting(1.0, "share of the run in which the learning rate falls")
    final_lr: float = setting(0.0, "factor on the learning rate at the end")
    eval_every: int = setting(250, "steps between validations; 0 = never")
    save_every: int = setting(500, "steps between checkpoints; the last is always saved")
    keep: int = setting(2, "checkpoints kept; 0 = all")
    log_every: int = setting(10, "steps between log lines")
    seed: int = setting(0, "of the order of rows")
    device: str = setting("", "cuda, xpu, mps or cpu; empty = the best present")
    dtype: str = setting(
        "",
        "of activations; empty = bfloat16 or float16 where fast",
        choices=("", "float32", "bfloat16", "float16"),
    )
    compile: str = setting(
        "auto", "torch.compile; auto = where it pays", choices=("auto", "yes", "no")
    )
    run: str = setting("", "name of a wandb run, where wandb is installed")
    restart: bool = setting(False, "delete this run's sft checkpoints and begin anew")

    # what may change when a run is resumed: it alters no batch and no update
    may_differ: ClassVar[set[str]] = {
        "device_batch_size", "eval_every", "save_every", "keep", "log_every", "device", "dtype",
        "compile", "run", "restart",
    }  # fmt: skip

    def __post_init__(self) -> None:
        check_name(self.tag, "--tag")
        if self.epochs < 1 or not 0 <= self.warmdown <= 1 or self.lr_scale <= 0:
            raise ValueError(
                "--epochs must be 1 or more, --warmdown from 0 to 1, --lr-scale over 0"
            )
        at_least(
            self, 0, "num_iterations", "total_batch_size", "device_batch_size", "warmup", "keep",
            "seed",
        )  # fmt: skip


# 9. Main -------------------------------------------------------------------------------------


def main(settings: Settings) -> dict:
    """Train, or go on with, the sft model of a run; return the last metrics."""
    with start_run("sft", settings) as run:
        parent = find_checkpoint(settings.tag, settings.start_from)
        before, base = read_meta(parent), read_meta(find_checkpoint(settings.tag, "base"))
        tokenizer = run_tokenizer(settings.tag)
        chats = settings.chats or before.get("chats", before["source"])
        newest, saved = newest_checkpoint(run, parent)
        start, T = saved.get("step", 0), before["config"]["max_seq_len"]

        rows, mixed = conversation_rows(data_dir(chats) / "sft.jsonl", tokenizer, T, run, some=True)
        batch_rows = max(1, (settings.total_batch_size or base["batch_tokens"]) // T)
        total = settings.epochs * len(rows)
        num_steps = settings.num_iterations or math.ceil(total / batch_rows)
        if settings.num_iterations:
            total = num_steps * batch_rows
        run.num_steps = num_steps
        check_data(run, saved, data=rows.names)
        if run.finished():
            run.say(f"sft: {newest} is there, finished")
            return run.metrics
        for kind, count in sorted(mixed.used.items(), key=lambda pair: -pair[1]):
            run.say(f"{count:9,} {kind}")
        run.say(f"rows: {len(rows):,} of {T} tokens; conversations cut at a turn: {mixed.cut:,}, "
                f"too long and left out: {mixed.left_out:,}")  # fmt: skip
        why = "as set" if settings.num_iterations else f"{settings.epochs} epochs"
        run.say(f"steps: {num_steps:,} ({why}) of {batch_rows * T:,} tokens")
        val_rows, _ = conversation_rows(data_dir(chats) / "val.jsonl", tokenizer, T, run)

        # what alters rounding is kept when a run goes on: bit for bit the unbroken run
        dtype = pick_dtype(run.device, settings.dtype or saved.get("dtype", ""))
        config, share = GPTConfig(**before["config"]), accum_steps(batch_rows, 1)
        most = base["micro_batch"] if run.device.type == "cpu" else share
        micro = choose_micro_batch(run, config, saved, share, most, dtype.itemsize)
        peak = peak_flops(run.device, dtype)
        flops = config.flops_per_token()
        seconds = run.estimate_seconds(num_steps * batch_rows * T * flops, peak)
        compiled = compile_or_not(
            compile_choice(run, saved), seconds, run.device, run.say,
            before=before["compiled"] and micro == before["micro_batch"],
        )  # fmt: skip
        model, optimizer = continue_stage(run, parent, newest, compiled, dtype, settings.warm_start)
        forward = torch.compile(model, dynamic=False) if compiled else model

        def compute_loss(batch: Batch) -> Tensor:
            return forward(batch.ids, batch.targets)

        if run.device.type == "cuda":
            micro = try_micro_batch(
                micro, compute_loss, optimizer, lambda n: blank_batch(n, config, run.device)
            )
        run.begin(saved)
        began = time.time()
        for s in training_steps(
            run.closing(
                row_batches(rows, batch_rows, micro, settings.seed, start, run.device, total)
            ),
            compute_loss,
            optimizer,
            schedule(settings, num_steps),
            num_steps,
            accum=accum_steps(batch_rows, micro),
            micro=micro,
            start=start,
            stop=lambda: run.stopping,
        ):
            new, last = s.step > start, s.step == num_steps
            if new and (last or s.due(settings.log_every)):
                run.log(s.step, loss=s.loss, lr=s.lr, tok_per_s=s.tok_per_s, data=s.data,
                        left_s=s.left_s)  # fmt: skip
            if new and (last or s.stopping or s.due(settings.save_every)):  # before evaluating
                meta = {
                    "dtype": str(dtype)[6:], "compiled": compiled, "micro_batch": s.micro,
                    "parent": parent_key(parent), "source": before["source"], "chats": chats,
                    "data": rows.names, "batch_tokens": batch_rows * T,
                    "metrics": run.metrics, "mixture": mixed.used,
                    "seconds": saved.get("seconds", 0) + time.time() - began,
                }  # fmt: skip
                save_checkpoint(run, s.step, model, optimizer, meta, settings.keep)
            run.end_if_stopped(s)
            if len(val_rows) and run.validates(s):
                run.log(s.step, val_loss=evaluate_loss(model, val_rows, s.micro))
    return run.metrics


if __name__ == "__main__":
    main(parse_settings(Settings, __doc__))
