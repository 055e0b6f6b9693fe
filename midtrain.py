"""Midtrain: teach the base model the form of a chat, the tool and multiple choice.

Usage:   python midtrain.py                                 # after pretrain.py and prepare.py
         torchrun --nproc_per_node=8 midtrain.py --tag=d20
Reads:   runs/TAG/base/, data/CHATS/{mid,val}.jsonl, data/SOURCE/*.parquet
Writes:  runs/TAG/mid/step-001234/, runs/TAG/metrics.jsonl
Method:  whole conversations packed into rows, with a share of pretraining text so that nothing
         is forgotten; learned are the assistant's tokens and the text's, which gives a lower
         loss of replies than to learn the users' turns too; one epoch
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
    token_rows,
    training_steps,
    try_micro_batch,
)

# 1. Settings ---------------------------------------------------------------------------------


@dataclass
class Settings:
    tag: str = setting("main", "name of the run, a folder below runs/")
    source: str = setting("", "folder below data/ with the text; empty = the base run's")
    chats: str = setting("", "folder below data/ with the conversations; empty = the text's")
    text_share: float = setting(0.25, "share of pretraining text among the rows")
    learn_all: bool = setting(False, "learn the users' turns too, not the assistant's alone")
    num_iterations: int = setting(0, "optimizer steps; 0 = one epoch")
    total_batch_size: int = setting(0, "tokens a step over all ranks; 0 = the base run's")
    device_batch_size: int = setting(0, "rows of one forward pass; 0 = what fits")
    lr_scale: float = setting(0.7, "factor on all learning rates")
    matrix_lr: float = setting(0.0, "learning rate of the matrices (Muon); 0 = the base run's")
    embed_lr: float = setting(0.0, "learning rate of the embedding; 0 = the base run's")
    head_lr: float = setting(0.0, "learning rate of the head; 0 = the base run's")
    weight_decay: float = setting(-1.0, "decay of the matrices; -1 = the base run's")
    warm_start: bool = setting(True, "begin with the base run's moments of the optimizer")
    warmup: int = setting(10, "steps in which the learning rate rises")
    warmdown: float = setting(0.8, "share of the run in which the learning rate falls")
    final_lr: float = setting(0.05, "factor on the learning rate at the end")
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
    restart: bool = setting(False, "delete this run's mid checkpoints and begin anew")

    # what may change when a run is resumed: it alters no batch and no update
    may_differ: ClassVar[set[str]] = {
        "device_batch_size", "eval_every", "save_every", "keep", "log_every", "device", "dtype",
        "compile", "run", "restart",
    }  # fmt: skip

    def __post_init__(self) -> None:
        check_name(self.tag, "--tag")
        if not 0 <= self.text_share < 1 or not 0 <= self.warmdown <= 1 or self.lr_scale <= 0:
            raise ValueError(
                "--text-share must be from 0 to below 1, --warmdown from 0 to 1, --lr-scale over 0"
            )
        at_least(
            self, 0, "num_iterations", "total_batch_size", "device_batch_size", "warmup", "keep",
            "seed",
        )  # fmt: skip


# 9. Main -------------------------------------------------------------------------------------


def main(settings: Settings) -> dict:
    """Train, or go on with, the mid model of a run; return the last metrics."""
    with start_run("mid", settings) as run:
        parent = find_checkpoint(settings.tag, "base")
        base = read_meta(parent)
        tokenizer = run_tokenizer(settings.tag)
        source = settings.source or base["source"]
        chats = settings.chats or source
        newest, saved = newest_checkpoint(run, parent)
        start, T = saved.get("step", 0), base["config"]["max_seq_len"]

        # the mixture is what prepare.py wrote: its table MIXTURE, or KINDS for the embedded world
        rows, mixed = conversation_rows(
            data_dir(chats) / "mid.jsonl", tokenizer, T, run, settings.learn_all, some=True
        )
        num_text = round(len(rows) * settings.text_share / (1 - settings.text_share))
        if num_text:
            rows = rows.joined(token_rows(source, tokenizer, T, num_text, run), num_text)
        batch_rows = max(1, (settings.total_batch_size or base["batch_tokens"]) // T)
        epoch_steps = math.ceil(len(rows) / batch_rows)
        num_steps = settings.num_iterations or epoch_steps
        run.num_steps = num_steps
        check_data(run, saved, data=rows.names)
        if run.finished():
            run.say(f"mid: {newest} is there, finished")
            return run.metrics
        for kind, count in sorted(mixed.used.items(), key=lambda pair: -pair[1]):
            run.say(f"{count:9,} {kind}")
        run.say(f"rows: {len(rows):,} of {T} tokens, {num_text:,} of them text; conversations cut "
                f"at a turn: {mixed.cut:,}, too long and left out: {mixed.left_out:,}")  # fmt: skip
        run.say(f"steps: {num_steps:,} ({'as set' if settings.num_iterations else 'one epoch'}) "
                f"of {batch_rows * T:,} tokens")  # fmt: skip
        val_rows, _ = conversation_rows(data_dir(chats) / "val.jsonl", tokenizer, T, run)

        # what alters rounding is kept when a run goes on: bit for bit the unbroken run
        dtype = pick_dtype(run.device, settings.dtype or saved.get("dtype", ""))
        config, share = GPTConfig(**base["config"]), accum_steps(batch_rows, 1)
        most = base["micro_batch"] if run.device.type == "cpu" else share
        micro = choose_micro_batch(run, config, saved, share, most, dtype.itemsize)
        peak = peak_flops(run.device, dtype)
        flops = config.flops_per_token()
        seconds = run.estimate_seconds(num_steps * batch_rows * T * flops, peak)
        compiled = compile_or_not(
            compile_choice(run, saved), seconds, run.device, run.say,
            before=base["compiled"] and micro == base["micro_batch"],
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
        total = len(rows) if num_steps == epoch_steps else num_steps * batch_rows
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
                mfu = s.tok_per_s * flops / (peak * run.world_size)
                run.log(
                    s.step, loss=s.loss, lr=s.lr, tok_per_s=s.tok_per_s, mfu=mfu, data=s.data,
                    left_s=s.left_s,
                )  # fmt: skip
            if new and (last or s.stopping or s.due(settings.save_every)):  # before evaluating
                meta = {
                    "dtype": str(dtype)[6:], "compiled": compiled, "micro_batch": s.micro,
                    "parent": parent_key(parent), "source": source, "chats": chats,
                    "data": rows.names, "batch_tokens": batch_rows * T,
                    "metrics": run.metrics,
                    "mixture": {**mixed.used, "text rows": num_text},
                    "seconds": saved.get("seconds", 0) + time.time() - began,
                }  # fmt: skip
                save_checkpoint(run, s.step, model, optimizer, meta, settings.keep)
            run.end_if_stopped(s)
            if len(val_rows) and run.validates(s):
                run.log(s.step, val_loss=evaluate_loss(model, val_rows, s.micro))
    return run.metrics


if __name__ == "__main__":
    main(parse_settings(Settings, __doc__))
