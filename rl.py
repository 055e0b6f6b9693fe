"""Improve the model by reinforcement learning on problems whose answer can be checked.

Usage:   python rl.py                                       # after sft.py
         torchrun --nproc_per_node=8 rl.py --tag=d20
Reads:   runs/TAG/sft/, data/CHATS/rl.jsonl
Writes:  runs/TAG/rl/step-001234/, runs/TAG/metrics.jsonl
Method:  policy gradient with group-relative advantages: each problem is answered num_samples
         times with the tool live, and an answer's advantage is its reward less its group's mean
         (GRPO, arXiv:2402.03300). Left out of GRPO: the reference model and its KL term, as the
         rewards cannot be gamed by drift (arXiv:2503.14476); the ratio and its clipping, as each
         batch of samples makes one update and is on-policy (at temperature 1 and without top-k,
         as by default: others sample from another policy than is learned); the division by the
         group's deviation and by each answer's length, which bias towards easy problems and long
         wrong answers (arXiv:2503.20783): all tokens of a step weigh alike (arXiv:2503.14476).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common import (
    GPT,
    IGNORE,
    RL_VAL,
    Batch,
    ChatSettings,
    Engine,
    MissingInput,
    Reply,
    Request,
    Run,
    Sampling,
    Tokenizer,
    all_sum,
    at_least,
    begin_or_resume,
    crc32,
    data_dir,
    data_setting,
    device_setting,
    dist_info,
    drop_replaced,
    epochs_horizon,
    grade,
    model_setting,
    optim_setting,
    parent_checkpoint,
    parse_settings,
    prompt_room,
    read_conversations,
    read_meta,
    render_prompt,
    reply_parts,
    reply_text,
    rl_held,
    run_tokenizer,
    save_checkpoint,
    schedule,
    shuffled,
    start_run,
    training_steps,
)

# 1. Settings ---------------------------------------------------------------------------------


@dataclass
class Settings(ChatSettings):
    start_from: str = model_setting("sft", "stage whose model is improved", choices=("mid", "sft"))
    epochs: int = optim_setting(1, "passes over the problems")
    problems_per_step: int = optim_setting(16, "problems that are answered in a step")
    num_samples: int = optim_setting(16, "answers to each problem, which are compared")
    max_tokens: int = optim_setting(128, "tokens of an answer at most")
    temperature: float = optim_setting(1.0, "temperature of the answers; more explores more")
    top_k: int = optim_setting(0, "sample among the k likeliest tokens; 0: all")
    val_problems: int = data_setting(RL_VAL, "problems that are held out for validation")
    slots: int = device_setting(128, "answers that are written at once")
    lr_scale: float = 0.1
    warm_start: bool = False
    warmdown: float = 0.5
    eval_every: int = 50
    save_every: int = 50
    log_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "epochs", "problems_per_step", "max_tokens", "slots")
        at_least(self, 0, "top_k", "val_problems")
        at_least(self, 2, "num_samples")
        if self.val_problems > RL_VAL:
            raise ValueError(f"--val-problems must be {RL_VAL} or less: sft learns the others")
        Sampling(self.max_tokens, self.temperature, self.top_k)  # raises
        if self.temperature <= 0:
            raise ValueError("--temperature must be above 0")


# 2. Problems, answers and their rewards ------------------------------------------------------


def read_problems(
    run: Run, path: Path, tokenizer: Tokenizer, context: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read the problems to train on and those to validate on, which rl.jsonl begins with.

    Problems that leave no room for an answer are left out. Raises MissingInput where none is left.
    """
    every, longest = list(read_conversations(path)), prompt_room(context)
    held_out = min(run.settings.val_problems, rl_held(len(every)))
    val_problems, problems = (
        [p for p in part if len(render_prompt(tokenizer, p["messages"])) <= longest]
        for part in (every[:held_out], every[held_out:])
    )
    too_long = len(every) - len(val_problems) - len(problems)
    if not problems:
        raise MissingInput(
            f"{path} has no problems to train on, beside {too_long} that leave no room for an "
            f"answer in a context of {context} tokens"
        )
    run.say(f"problems: {len(problems):,}, and {len(val_problems)} for validation; "
            f"too long and left out: {too_long:,}")  # fmt: skip
    return problems, val_problems


@dataclass
class Group:
    """One problem's answers: its prompt, the replies and their rewards, 0 or 1."""

    prompt_ids: list[int]
    replies: list[Reply]
    rewards: list[float]

    def advantages(self) -> list[float]:
        """Return each reward less the mean of the group."""
        mean = sum(self.rewards) / len(self.rewards)
        return [reward - mean for reward in self.rewards]


def sample_seed(*numbers: int) -> int:
    """Make one seed of several numbers, such as run, step, problem and sample."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def answer_problems(
    engine: Engine, problems: list[dict[str, Any]], seeds: list[int], settings: Settings
) -> list[Group]:
    """Answer this rank's problems num_samples times, sample j of problem i by seeds[i] and j."""
    rank, world_size = dist_info()
    problems, seeds = problems[rank::world_size], seeds[rank::world_size]
    tokenizer, n = engine.tokenizer, settings.num_samples
    prompts = [render_prompt(tokenizer, problem["messages"]) for problem in problems]
    requests = [
        Request(prompt, Sampling(settings.max_tokens, settings.temperature, settings.top_k,
                                 seed=sample_seed(seed, j)))
        for prompt, seed in zip(prompts, seeds) for j in range(n)
    ]  # fmt: skip
    replies = [reply for _, reply in sorted(engine.run(requests), key=lambda pair: pair[0])]
    groups = []
    for i, (prompt, problem) in enumerate(zip(prompts, problems)):
        own = replies[i * n : (i + 1) * n]
        texts = [reply_text(reply_parts(tokenizer, reply.ids)) for reply in own]
        rewards = [float(reply.reason == "stop" and grade(problem, text))
                   for reply, text in zip(own, texts)]  # fmt: skip
        groups.append(Group(prompt, own, rewards))
    return groups


# 3. Batches ----------------------------------------------------------------------------------


@dataclass
class WeightedBatch(Batch):
    """A micro-batch whose targets are weighted: weights (B, T), an answer's advantage."""

    weights: Tensor


def make_batch(
    rows: list[tuple[list[int], list[int], float]], bos: int, device: torch.device
) -> WeightedBatch:
    """Pad rows of (ids, mask, advantage) to one micro-batch; mask 1 where an id is a target."""
    texts, masks, advantages = zip(*(rows or [([bos, bos], [0, 0], 0.0)]))  # or no target at all
    ids = pad_sequence([torch.tensor(text) for text in texts], True, bos)  # (B, T + 1)
    learned = pad_sequence([torch.tensor(mask) for mask in masks], True)[:, 1:] > 0  # (B, T)
    ids, targets = ids[:, :-1].contiguous(), torch.where(learned, ids[:, 1:], IGNORE)
    weights = torch.tensor(advantages)[:, None].repeat(1, ids.shape[1])
    number = int(learned.sum())
    return WeightedBatch(ids.to(device), targets.to(device), number, weights.to(device))


def group_batches(
    groups: list[Group], micro_batch: int, accum: int, bos: int, device: torch.device
) -> list[WeightedBatch]:
    """Make exactly `accum` micro-batches of all answers.

    Answers without advantage, whose groups are all right or all wrong, have no gradient: they
    are counted, not computed.
    """
    rows, uncounted = [], 0
    for group in groups:
        for reply, advantage in zip(group.replies, group.advantages()):
            if advantage:
                mask = [0] * len(group.prompt_ids) + reply.mask
                rows.append((group.prompt_ids + reply.ids, mask, advantage))
            else:
                uncounted += sum(reply.mask)
    rows.sort(key=lambda row: len(row[0]))  # equal lengths side by side waste less padding
    starts = range(0, accum * micro_batch, micro_batch)
    batches = [make_batch(rows[start : start + micro_batch], bos, device) for start in starts]
    assert len(rows) <= accum * micro_batch, (len(rows), accum, micro_batch)
    batches[0].num_targets += uncounted
    return batches


def sampled_batches(
    run: Run, model: GPT, engine: Engine, problems: list[dict[str, Any]], micro: int, accum: int,
    start: int, stats: dict[str, float],
) -> Iterator[WeightedBatch]:  # fmt: skip
    """Yield `accum` micro-batches a step, answers of the model as it is by then, without end.

    Problems are shuffled anew each epoch; stats become those of the last step.
    """
    settings, each = run.settings, run.settings.problems_per_step
    for step in itertools.count(start):
        began = time.perf_counter()
        engine.refresh(model)
        order = [shuffled(step * each + i, len(problems), settings.seed) for i in range(each)]
        seeds = [sample_seed(settings.seed, step, i) for i in range(each)]
        groups = answer_problems(engine, [problems[i] for i in order], seeds, settings)
        stats |= pass_rates(groups, run.device)
        stats["sampling_s"] = time.perf_counter() - began
        yield from group_batches(groups, micro, accum, engine.tokenizer.bos, run.device)


def pass_rates(groups: list[Group], device: torch.device) -> dict[str, float]:
    """Return pass@1, pass@k, the mean length of answers and the fraction cut off, of all ranks."""
    sums = torch.zeros(6, device=device)
    for g in groups:
        tokens = sum(len(reply.ids) for reply in g.replies)
        cut = sum(reply.reason == "length" for reply in g.replies)
        counts = [sum(g.rewards), len(g.rewards), any(g.rewards), 1, tokens, cut]
        sums += torch.tensor(counts, device=device)
    right, answers, solved, problems, tokens, cut = all_sum(sums).tolist()
    return {
        "pass_at_1": right / max(1, answers),
        "pass_at_k": solved / max(1, problems),
        "answer_tokens": tokens / max(1, answers),
        "cut_off": cut / max(1, answers),  # without reward, however right so far
    }


def validate(
    engine: Engine, problems: list[dict[str, Any]], settings: Settings, device: torch.device
) -> dict[str, float]:
    """Return pass@1 and pass@k on the held-out problems, always with the same seeds."""
    seeds = [sample_seed(settings.seed, 1 << 32, i) for i in range(len(problems))]
    rates = pass_rates(answer_problems(engine, problems, seeds, settings), device)
    return {"val_pass_at_1": rates["pass_at_1"], "val_pass_at_k": rates["pass_at_k"]}


# 9. Main -------------------------------------------------------------------------------------


def main(settings: Settings) -> dict[str, Any]:
    """Improve, or go on with, the rl model of a run; return the last metrics."""
    with start_run("rl", settings) as run:
        parent = parent_checkpoint(run, settings.start_from)
        before, tokenizer = read_meta(parent), run_tokenizer(settings.tag)
        chats = settings.chats or before["chats"]
        path = data_dir(chats) / "rl.jsonl"
        problems, val_problems = read_problems(
            run, path, tokenizer, before["config"]["max_seq_len"]
        )
        each, epochs = settings.problems_per_step, settings.epochs
        rows = -(-each // run.world_size) * settings.num_samples  # answers of a step on a rank
        horizon = epochs_horizon(settings, len(problems), each, epochs)
        horizon = replace(horizon, batch_rows=rows * run.world_size)
        data = {"source": before["source"], "chats": chats,
                "data": [path.name, path.stat().st_size, crc32(path)]}  # fmt: skip
        begun = begin_or_resume(run, parent, horizon, data, cpu_rows=32)
        if begun is None:
            return run.metrics
        model, optimizer, start, meta = begun
        run.say(f"steps: {horizon.num_steps:,} ({horizon.why}) of {each} problems x "
                f"{settings.num_samples} answers")  # fmt: skip

        copy = GPT.create(model.config, run.device, model.dtype)  # its weights may be cast, packed
        copy.load_state_dict(model.state_dict())
        engine = Engine(copy, tokenizer, settings.slots)
        engine.expect(horizon.num_steps * rows * settings.max_tokens)
        micro, num_steps = meta["micro_batch"], horizon.num_steps
        accum = -(-rows // micro)
        stats: dict[str, float] = {}  # of the last step's answers
        batches = sampled_batches(run, model, engine, problems, micro, accum, start, stats)

        def compute_loss(batch: WeightedBatch) -> Tensor:
            # (B, T) each: nats of the answers' tokens, each multiplied by its answer's advantage
            return model(batch.ids, batch.targets, batch.weights)

        drop_replaced(run, start)
        for s in training_steps(
            batches, compute_loss, optimizer, schedule(settings, num_steps),
            num_steps, accum=accum, micro=micro, start=start, stop=lambda: run.stopping,
        ):  # fmt: skip
            if s.due(settings.log_every or num_steps):
                run.log(s.step, loss=s.loss, lr=s.lr, tok_per_s=s.tok_per_s, data=s.data,
                        **stats, left_s=s.left_s)  # fmt: skip
            if s.due(settings.save_every or num_steps):  # before evaluating, which may fail
                save_checkpoint(run, s, model, optimizer, meta)
            if s.stopping:
                break
            if val_problems and s.due(settings.eval_every, first=not run.validated):
                engine.refresh(model)
                run.log(s.step, **validate(engine, val_problems, settings, run.device))
    return run.metrics


if __name__ == "__main__":
    main(parse_settings(Settings, __doc__))
