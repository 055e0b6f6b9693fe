#!/usr/bin/env bash
# torch 2.15.0: in a model that is compiled whole, the hooks of all gradients run at the end of the backward pass.
# Documented: register_post_accumulate_grad_hook runs its hook "after the gradient has been accumulated". Expected: that
# a parameter's gradient is there, and its hook runs, as soon as the pass has gone by its layer, compiled or not.
# Seen (Linux x86-64, CPU, one thread, 2026-12-01): uncompiled, the first hook of twelve layers runs after 14% of the
# pass and the middle one after 60%; compiled whole, both after 99%, as the pass is one step of autograd then; with
# every layer compiled by itself, after 12% and 63%. So sums over ranks that such hooks begin overlap nothing where a
# model is compiled in one piece.
# Met in: common.py, Optimizer, which therefore begins its sums after the backward pass.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip install -q --target="$work" 'torch==2.15.0' 'numpy==2.4.6' || exit 2
cat > "$work/try.py" <<'PY'
import time

import torch
from torch import nn

torch.set_num_threads(1)


def first_hook(way):
    """Return after which share of a backward pass the first gradient's hook runs: a median."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(12)])
    times = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: times.append(time.perf_counter()))
    for part in {"eager": [], "whole": [model], "by layers": [*model]}[way]:
        part.compile()
    x, shares = torch.randn(2048, 512), []
    for _ in range(7):
        loss = model(x).square().mean()
        times.clear()
        start = time.perf_counter()
        loss.backward()
        shares.append((times[0] - start) / (time.perf_counter() - start))
    return sorted(shares)[3]


for way in ("eager", "whole", "by layers"):
    share = first_hook(way)
    print(way, "early" if share < 0.35 else "at the end" if share > 0.9 else f"after {share:.0%}")
PY
seen=$(TORCHINDUCTOR_CACHE_DIR=$work/cache PYTHONPATH=$work python3 "$work/try.py" 2> "$work/said") || {
  tail -n 3 "$work/said"
  exit 2
}
expected='eager early
whole at the end
by layers early'
printf '%s\n' "$seen"
[ "$seen" = "$expected" ] || { echo "it differs now"; exit 1; }
