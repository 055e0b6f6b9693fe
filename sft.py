"""Fine-tune the model on whole conversations: the loss is on the assistant's tokens alone.

Usage:   python sft.py                                      # after midtrain.py
         torchrun --nproc_per_node=8 sft.py --tag=d20
Reads:   runs/TAG/mid/, data/CHATS/{sft,val}.jsonl
Writes:  runs/TAG/sft/step-001234/, runs/TAG/metrics.jsonl
Method:  conversations are packed whole into rows; one that is too long loses its last turns,
         and is counted; the batch follows from the conversations' tokens, learning rates are
         the base run's, but for a factor
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common import (
    Batch,
    ChatRowSettings,
    accum_steps,
    at_least,
    begin_or_resume,
    context_of,
    conversation_rows,
    data_dir,
    describe_rows,
    drop_replaced,
    epochs_horizon,
    evaluate_loss,
    model_setting,
    optim_setting,
    parent_checkpoint,
    parse_settings,
    read_meta,
    row_batches,
    run_tokenizer,
    save_checkpoint,
    schedule,
    start_run,
    suited_batch,
    training_steps,
)

# 1. Settings ---------------------------------------------------------------------------------


@dataclass
class Settings(ChatRowSettings):
    start_from: str = model_setting(
        "mid", "stage whose model training begins from", choices=("base", "mid")
    )
    epochs: int = optim_setting(1, "passes over the conversations")
    lr_scale: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "epochs")


# 9. Main -------------------------------------------------------------------------------------


def main(settings: Settings) -> dict[str, Any]:
    """Train, or go on with, the sft model of a run; return the last metrics."""
    with start_run("sft", settings) as run:
        parent = parent_checkpoint(run, settings.start_from)
        before, base = read_meta(parent), read_meta(parent_checkpoint(run, "base"))
        tokenizer, T = run_tokenizer(settings.tag), context_of(settings, before)
        chats = settings.chats or before.get("chats", before["source"])
        # rows of T + 1 ids hold conversations whole; what the assistant does not say has no loss
        rows, mixed = conversation_rows(data_dir(chats) / "sft.jsonl", tokenizer, T, run, some=True)
        val_rows, _ = conversation_rows(data_dir(chats) / "val.jsonl", tokenizer, T, run)
        # steps enough for few conversations: of 10 M tokens at depth 20 600 of 16 k, not 20 of 524 k
        suited = min(base["batch_tokens"], suited_batch(settings.epochs * len(rows) * T))
        batch_rows = max(1, round((settings.total_batch_size or suited) / T))
        horizon = epochs_horizon(settings, len(rows), batch_rows, settings.epochs)
        data = {"source": before["source"], "chats": chats, "mixture": mixed.used,
                "data": rows.names, "batch_tokens": batch_rows * T}  # fmt: skip
        begun = begin_or_resume(run, parent, horizon, data)
        if begun is None:
            return run.metrics
        model, optimizer, start, meta = begun
        describe_rows(run, rows, mixed, horizon)

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
                run.log(s.step, loss=s.loss, lr=s.lr, tok_per_s=s.tok_per_s, data=s.data,
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
