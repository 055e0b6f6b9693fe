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

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common import (
    Batch,
    ChatRowSettings,
    Mixed,
    Rows,
    Run,
    Tokenizer,
    accum_steps,
    begin_or_resume,
    context_of,
    conversation_rows,
    data_dir,
    data_setting,
    describe_rows,
    drop_replaced,
    epochs_horizon,
    evaluate_loss,
    optim_setting,
    parent_checkpoint,
    parse_settings,
    peak_flops,
    read_meta,
    row_batches,
    run_tokenizer,
    save_checkpoint,
    schedule,
    start_run,
    token_rows,
    training_steps,
)

# 1. Settings ---------------------------------------------------------------------------------


@dataclass
class Settings(ChatRowSettings):
    source: str = data_setting("", "folder below data/ with the text; empty: the base run's")
    text_share: float = data_setting(0.25, "fraction of the rows that is pretraining text")
    num_iterations: int = optim_setting(0, "optimizer steps; 0: one epoch, each row once")
    lr_scale: float = 0.7
    warmup: int = 10
    warmdown: float = 0.8
    final_lr: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.text_share < 1:
            raise ValueError("--text-share must be from 0 to below 1")


# 2. Data -------------------------------------------------------------------------------------


def mix_rows(
    run: Run, chats: str, source: str, tokenizer: Tokenizer, T: int
) -> tuple[Rows, Mixed, int]:
    """Pack conversations whole into rows of T + 1 ids, and spread rows of text evenly over them.

    Returns the rows, what became of the conversations and the number of rows of text. Which kinds
    of conversations there are is prepare.py's: its table MIXTURE, or KINDS for the embedded world.
    """
    settings, path = run.settings, data_dir(chats) / "mid.jsonl"
    rows, mixed = conversation_rows(path, tokenizer, T, run, some=True)
    text_rows = round(len(rows) * settings.text_share / (1 - settings.text_share))
    if text_rows:
        rows = rows.joined(token_rows(source, tokenizer, T, text_rows, run), text_rows)
    return rows, mixed, text_rows


# 9. Main -------------------------------------------------------------------------------------


def main(settings: Settings) -> dict[str, Any]:
    """Train, or go on with, the mid model of a run; return the last metrics."""
    with start_run("mid", settings) as run:
        parent = parent_checkpoint(run, "base")
        base, tokenizer = read_meta(parent), run_tokenizer(settings.tag)
        source, T = settings.source or base["source"], context_of(settings, base)
        chats = settings.chats or source

        rows, mixed, text_rows = mix_rows(run, chats, source, tokenizer, T)
        val_rows, _ = conversation_rows(data_dir(chats) / "val.jsonl", tokenizer, T, run)
        batch_rows = max(1, (settings.total_batch_size or base["batch_tokens"]) // T)
        horizon = epochs_horizon(settings, len(rows), batch_rows)
        data = {"source": source, "chats": chats, "data": rows.names, "batch_tokens": batch_rows * T,
                "mixture": {**mixed.used, "text rows": text_rows}}  # fmt: skip
        begun = begin_or_resume(run, parent, horizon, data)
        if begun is None:
            return run.metrics
        model, optimizer, start, meta = begun
        describe_rows(run, rows, mixed, horizon, text_rows)
        peak = peak_flops(run.device, model.dtype) * run.world_size

        def compute_loss(batch: Batch) -> Tensor:
            return model(batch.ids, batch.targets)  # (B, T) each; nats, summed over the targets

        drop_replaced(run, start)
        micro, num_steps = meta["micro_batch"], horizon.num_steps
        batches = row_batches(
            rows, batch_rows, micro, settings.seed, start, run.device, horizon.total_rows
        )
        for s in training_steps(
            run.closing(batches), compute_loss, optimizer, schedule(settings, num_steps), num_steps,
            accum=accum_steps(batch_rows, micro), micro=micro, start=start,
            stop=lambda: run.stopping,
        ):  # fmt: skip
            if s.due(settings.log_every or num_steps):
                mfu = s.tok_per_s * model.config.flops_per_token() / peak
                run.log(s.step, loss=s.loss, lr=s.lr, tok_per_s=s.tok_per_s, mfu=mfu, data=s.data,
                        left_s=s.left_s)  # fmt: skip
            if s.due(settings.save_every or num_steps):  # before evaluating, which may fail
                save_checkpoint(run, s, model, optimizer, meta)
            if s.stopping:
                break
            if len(val_rows) and s.due(settings.eval_every, first=not run.validated):
                run.log(s.step, val_loss=evaluate_loss(model, val_rows, s.micro))
    return run.metrics


if __name__ == "__main__":
    main(parse_settings(Settings, __doc__))
