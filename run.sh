#!/usr/bin/env bash
# Set everything up, then run the main job: text -> tokenizer -> base -> mid -> sft -> rl -> report.
# Usage:  bash run.sh [ACTION] [--tier=NAME] [--data=WHAT] [--tag=NAME] [--dry-run] [FLAGS]
# ACTION  all    set up, then every stage: skips what is done, resumes what broke off; default
#         setup  make .venv, install the locked packages, build the Rust extension
#         test   set up, then pytest; the words after `test` go to pytest
#         check  set up, then every linter: ruff, mypy, shellcheck, cargo fmt, cargo clippy
#         bench  set up, then measure this machine: a table and bench.json; `bench learn`: what each
#                choice of pretrain.py brings on the world's text or --data, two and a half hours;
#                `bench gpu`: some steps of depths 12 to 26, sft and rl on one GPU, 20 minutes
#         lock   renew requirements.lock from pyproject.toml
# --tier  cpu cpu-bf16 cpu-fast laptop mps gpu1 8xa6000 8xh100 8xh200; default: what fits
# --data  world (generated here), hub (FineWeb-Edu), climbmix, or a folder or file of your own
# --conversations  world, hub, or your own: a .jsonl file, or a folder of them; default: those of
#         the data, and none for text of your own, whose base model is then all that is made
# --source, --tag  names of the folders of the text and of the run; default: after --data
# FLAGS   STAGE:--FLAG goes to that stage, as in rl:--num-iterations=10 or eval:--run-code; stages
#         are prepare, tokenizer, pretrain, mid, sft, rl, eval. Without a stage, --shards,
#         --documents, --num-conversations and --name go to prepare.py, --vocab-size and
#         --max-chars to train_tokenizer.py, all others, such as --depth=6, to pretrain.py
# --dry-run prints the commands and runs nothing.
# Environment: NANOCHAT_BASE_DIR holds data and runs (default ~/.cache/nanochat), NANOCHAT_VENV
# the packages (default .venv); NANOCHAT_PYTHON is a Python that has them, without any set-up.
set -euo pipefail

# 1. Tiers ------------------------------------------------------------------------------------
# Times are of all stages; README.md has the costs. With other cards than the tier names, the
# result is the same and the time in proportion. The rows of a forward pass are those that fit.
d4="--depth=4 --max-seq-len=256 --total-batch-size=2048"
most="$d4 --num-iterations=2400 --eval-every=500"
most+=" mid:--eval-every=500 rl:--num-iterations=60 rl:--eval-every=60"
gsm8k="rl:--max-tokens=384" # a fifth of its solutions are longer than rl.py's 128 tokens
steps="--num-iterations=40 --compile=yes --eval-every=0 --shards=2 --num-conversations=600"
b4="--depth=4 --head-dim=128 --max-seq-len=512 --device-batch-size=2 --total-batch-size=8192"
# tier   GPUs  data  vocabulary  flags, as on the command line
TIERS="
cpu       1  world  4096  $d4 --num-iterations=1100 --num-conversations=15000 rl:--num-iterations=20
cpu-bf16  1  world  4096  $d4 --num-iterations=1500 --num-conversations=22000 rl:--num-iterations=30
cpu-fast  1  world  4096  $most                # these three: 30 minutes on two cores
laptop    1  world  4096  $most --device-batch-size=8  # 6 GB or more: 10 minutes
mps       1  world  4096  $most                # Apple silicon: 20 minutes
gpu1      1  hub    65536 --depth=10 $gsm8k    # 24 or 32 GB: 6 to 16 hours; --depth=12: twice that
8xa6000   8  hub    65536 --depth=16 $gsm8k    # 8 x 48 GB: 8 hours
8xh100    8  hub    65536 --depth=20 $gsm8k    # 8 x 80 GB: 4 hours (A100: 10 hours)
8xh200    8  hub    65536 --depth=32 $gsm8k    # 8 x 141 GB: 34 hours
@bench    1  world  4096  $b4 $steps           # of the actions of that name
@bench-gpu 8 world  65536 --depth=12 --total-batch-size=524288 $steps
@learn    1  world  4096  prepare:--doc-chars=6000 --shards=2 --num-conversations=600
@gpu      1  world  65536 --documents=90000    # so much text that the vocabulary is not cut
"

find_tier() { # set gpus, and tier where none is asked for
  local mib=0 smi fits=cpu chip
  if smi=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null); then
    gpus=$(grep -c . <<<"$smi" || true)
    mib=$(sort -n <<<"$smi" | head -n 1)
    [[ $mib =~ ^[0-9]+$ ]] || mib=24000 # cards that share the host's memory do not say
  fi
  if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then # -1 and nothing hide all
    gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true)
  fi
  # bf16 is fast by AMD's AVX512-BF16, twice so on Zen 5, known by AVX-VNNI, and by Intel's AMX
  chip=$(grep -sE -m 2 '^(vendor_id|flags)' /proc/cpuinfo || true)
  if [[ $chip = *AMD*avx512_bf16* ]]; then fits=cpu-bf16; fi
  if [[ $chip = *amx_bf16* || $chip = *AMD*avx_vnni*avx512_bf16* ]]; then fits=cpu-fast; fi
  if [ "$(uname -sm)" = "Darwin arm64" ]; then fits=mps; fi
  if [ "$gpus" -gt 0 ]; then fits=laptop; fi
  # the world's few million tokens are a small model's, however large the card
  if [ "$gpus" -eq 0 ] || [ "$data" = world ]; then mib=0; fi
  if [ "$mib" -gt 22000 ]; then fits=gpu1; fi
  if [ "$mib" -gt 40000 ]; then fits=8xa6000; fi
  if [ "$mib" -gt 70000 ]; then fits=8xh100; fi
  if [ "$mib" -gt 120000 ] && [ "$gpus" -ge 8 ]; then fits=8xh200; fi # a d32 wants them all
  tier=${tier:-$fits}
}

load_tier() { # load_tier WORD...: set ranks (processes that train); read its flags, then the words
  local row words its_data its_vocab
  if [ $job = bench ]; then tier=@$action; fi # fixed, so that tables compare
  if [[ $tier = @bench && $gpus -gt 0 ]]; then tier=@bench-gpu; fi
  row=$(grep "^$tier " <<<"$TIERS") || fail 2 "--tier=$tier is not a tier; choose one of:" \
    "$(grep -o '^[a-z0-9-]\{1,\}' <<<"$TIERS" | tr '\n' ' ')"
  read -r _ ranks its_data its_vocab row <<<"${row%%#*}"
  if [[ $gpus -gt 0 && $tier =~ ^(gpu1|8x.*|@bench-gpu)$ ]]; then ranks=$gpus; fi
  [[ $gpus -gt 0 || $its_data = world || $mode = print ]] ||
    fail 2 "--tier=$tier wants GPUs, and nvidia-smi shows none; --dry-run prints its commands"
  if [ "${data:-$its_data}" = "$its_data" ]; then tag=${tag:-main}; fi
  data=${data:-$its_data} vocab=${vocab:-$its_vocab}
  given=("tokenizer:--vocab-size=$vocab")
  if [ "$data" = world ]; then given+=(pretrain:--bigram-rows=0); fi # it costs what it brings
  read -ra words <<<"$row"
  read_words "${words[@]}" "$@" # of two flags of a name the last counts
}

# 2. Words ------------------------------------------------------------------------------------
say() { printf '%s\n' "run.sh: $*"; }
fail() { # fail STATUS SENTENCE: status 2 for a wrong command line
  printf '%s\n' "run.sh: ${*:2}" >&2
  exit "$1"
}
run() { # run COMMAND...: run it or, under --dry-run, print it
  case $mode in run) "$@" ;; print) printf '%q ' "$@" | sed 's/ $//' && echo ;; esac
}
read_words() { # read_words WORD...: set the options; note in given which stage each flag is for
  local word name
  while [ $# -gt 0 ]; do
    word=$1 && shift
    # --depth 6 is --depth=6
    if [[ $word = *--* && $word != *=* && ! $word =~ ^--(dry.run|help)$ && ${1---} != *--* ]]; then
      word=$word=$1 && shift
    fi
    name=${word%%=*}
    case ${name//_/-} in
      -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$root/run.sh" && exit ;;
      --dry-run) mode=print ;;
      --tier | --data | --source | --conversations | --tag)
        [ "$name" != "$word" ] || fail 2 "$word needs a value, as in $word=VALUE"
        printf -v "${name#--}" %s "${word#*=}" ;;
      --vocab-size | tokenizer:--vocab-size) vocab=${word#*=} ;;
      --shards | --documents | --num-conversations | --name) given+=("prepare:$word") ;;
      --max-chars) given+=("tokenizer:$word") ;;
      --*) given+=("pretrain:$word") ;;
      prepare:--* | tokenizer:--* | pretrain:--* | mid:--* | sft:--* | rl:--* | eval:--*)
        given+=("$word") ;;
      all | setup | check | lock) action=$word ;;
      bench) action=bench job=bench && case ${1-} in learn | gpu) action=$1 && shift ;; esac ;;
      test) action=test pytest=("$@") && return ;;
      *) fail 2 "$word is not an action; choose one of: all setup test check bench lock" ;;
    esac
  done
}

# 3. Set-up -----------------------------------------------------------------------------------
install_from() { # install_from URL WORD...: run an installer; give up soon without a network
  local get=(curl -fsSL --connect-timeout 5 --max-time 60) script
  command -v curl >/dev/null || get=(wget -q --tries=1 --timeout=5 -O -)
  script=$("${get[@]}" "$1" 2>/dev/null) && sh -s -- "${@:2}" <<<"$script"
}
find_uv() { # get uv, where it is missing, from its makers or else from the package registry
  if [ $mode = print ] || uv --version >/dev/null 2>&1; then return; fi
  say "installing uv in $venv-uv"
  UV_UNMANAGED_INSTALL=$venv-uv/bin install_from https://astral.sh/uv/install.sh --quiet ||
    { python3 -m venv --clear "$venv-uv" && "$venv-uv/bin/python" -m pip install -q uv; } ||
    fail 1 "uv cannot be installed: this takes a package registry within reach, and a python3" \
      "with its venv module (Debian, Ubuntu: apt install python3-venv)"
}
find_cargo() { # get cargo, where it is missing or too old, with rustup
  local want
  want=$(sed -n 's/^rust-version = "\([0-9.]*\)".*/cargo \1/p' "$root/Cargo.toml")
  is_new() { printf '%s\n' "$want" "$(cargo --version 2>/dev/null)" | sort -VC; }
  if [ $mode = print ] || is_new; then return; fi
  say "installing Rust with rustup"
  install_from https://sh.rustup.rs -y -q --profile minimal --no-modify-path || true
  PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
  is_new || fail 1 "$want or newer is missing and rustup cannot be reached: install cargo and rustc"
}

install_packages() { # install_packages [--extra=dev]
  # The default torch for Linux brings 5 GB of CUDA. uv knows the builds for each driver, and for
  # none, and which one fits here.
  if [ $mode = print ] || UV_HTTP_TIMEOUT=5 UV_HTTP_RETRIES=0 uv pip compile -q --no-deps \
    --torch-backend=auto --python="$python" - <<<torch >/dev/null 2>&1; then
    set -- "$@" --torch-backend=auto
  else
    say "the index of torch's builds cannot be reached: taking the default build"
  fi
  run uv pip install --python="$python" --constraint="$root/requirements.lock" \
    --requirement="$root/pyproject.toml" maturin "$@" ||
    fail 1 "the packages are not installed, for the reason above; the same command tries again"
}
build_extension() {
  find_cargo
  [ $mode = print ] || cc --version >/dev/null 2>&1 || # torch.compile needs its C++ half
    fail 1 "a C compiler is missing: install one (Debian, Ubuntu: apt install build-essential;" \
      "Fedora: dnf install gcc-c++; macOS: xcode-select --install)"
  run rm -rf "$venv/wheels"
  run "$venv/bin/maturin" build -q --release --locked --interpreter="$python" \
    --manifest-path="$root/Cargo.toml" --out="$venv/wheels" ||
    fail 1 "the Rust extension is not built, for the reason above"
  run uv pip install -q --python="$python" --reinstall --no-deps --no-index \
    --find-links="$venv/wheels" nanochat-flat
}

once() { # once NAME CONTENT COMMAND...: run a command unless it has succeeded for this content
  if [ "$(cat "$venv/.done-$1" 2>/dev/null)" = "$2" ]; then return; fi
  "${@:3}"
  if [ $mode = run ]; then echo "$2" >"$venv/.done-$1"; fi
}
set_up() { # set_up [--extra=dev]
  if [ -n "${NANOCHAT_PYTHON-}" ]; then return; fi
  # behind a proxy that re-signs traffic only the system's certificates are right
  if [ -s /etc/ssl/certs/ca-certificates.crt ]; then export UV_SYSTEM_CERTS=1; fi
  find_uv
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    [ $mode = print ] || rm -f "$venv"/.done-*
    run uv venv -q --allow-existing --python='>=3.10,<3.16' "$venv" ||
      fail 1 "$venv is not made, for the reason above: is there a Python from 3.10 to 3.15?"
  fi
  once "packages$*" "$(cksum <"$root/requirements.lock")" install_packages "$@"
  once extension "$(cat "$root"/{tokenizer.rs,pyproject.toml,Cargo.*} | cksum)" build_extension
}

# 4. Stages -----------------------------------------------------------------------------------
child="" stopped=0
stop() { # stop STATUS: on Ctrl-C or SIGTERM the stage saves and ends, and the job with it
  stopped=$1
  if [ -z "$child" ]; then exit "$1"; fi
  # torchrun would end the ranks after 30 seconds, saved or not: they are told, and it ends then
  { [ "$ranks" -gt 1 ] && pkill -TERM -P "$child" 2>/dev/null; } || kill "$child" || true
}

stage() { # stage PROCESSES NAME SCRIPT FLAG...: run a script to its end; given flags come last
  local name=$2 command=("$root/$3" "${@:4}") guard=(setpriv --pdeathsig KILL) status=0 word
  for word in "${given[@]}"; do
    # a stage's name is a part of its script's: mid of midtrain.py, eval of evaluate.py
    if [[ $3 = *${word%%:*}* ]]; then command+=("${word#*:}"); fi
  done
  if [ $mode = list ]; then printf '%s\037' "${command[@]}" && echo && return; fi
  if [ "$1" -gt 1 ]; then # torchrun must end its ranks, and hear of Ctrl-C only from here
    guard=(setpriv --pdeathsig TERM setsid)
    command=(--standalone --local-addr=127.0.0.1 "--nproc_per_node=$1" --max-restarts=3 "${command[@]}")
    command=(-m torch.distributed.run "${command[@]}")
  fi
  if [ $mode = print ]; then run "$python" "${command[@]}" && return; fi
  printf '\n== %s, after %d:%02d min\n' "$name" $((SECONDS / 60)) $((SECONDS % 60))
  # no stage may outlive a killed run.sh and meet the next one
  "${guard[@]}" true 2>/dev/null || guard=()
  # in the background, as bash hears a signal only then; with SIGINT, which bash takes from it
  (trap - HUP INT TERM && exec ${guard[@]+"${guard[@]}"} "$python" "${command[@]}") </dev/null &
  child=$!
  wait "$child" || status=$?
  while [ "$stopped" -gt 0 ] && kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  child=""
  [ "$stopped" -eq 0 ] || fail "$stopped" "stopped in $name; the same command goes on from there"
  [ "$status" -eq 0 ] || fail "$status" "$name ended with status $status, for the reason above"
}

check_flags() { # check_flags JOB: every stage reads its flags now, not after hours of work
  mode=list "$1" | PYTHONPATH=$root "$python" -c '
import importlib, os, sys
import common
for line in os.fsdecode(sys.stdin.buffer.read()).split("\37\n")[:-1]:
    sys.argv = line.split("\37")
    stage = os.path.basename(sys.argv[0]).removesuffix(".py")
    common.parse_settings(importlib.import_module(stage).Settings, "")
' || fail 2 "nothing was run, for the reason above; --help lists what run.sh itself takes"
}

plan() { # show time and memory before hours of work; ask prepare.py for as much text as they need
  local said n=SHARDS need have
  said=$(stage 1 plan pretrain.py --plan --plan-vocab-size="$vocab" --plan-count="$ranks")
  echo "$said"
  if [ $mode = run ]; then # what is there already counts
    need=$(sed -n 's/^disk *\([0-9]*\) GB.*/\1/p' <<<"$said")
    mkdir -p "$base" && have=$(df -Pk "$base" | awk 'END {print $4}')
    have=$(((have + $(du -sk "$base" | cut -f 1)) / 976562))
    [ "${need:-0}" -le "$have" ] || fail 1 "$base has room for $have GB, and $need GB are needed:" \
      "free some, set NANOCHAT_BASE_DIR, or keep less with --keep=1"
  fi
  [ $mode = print ] || n=$(sed -n 's/^shards *\([0-9]*\).*/\1/p' <<<"$said")
  if [[ $n && $data =~ ^(hub|climbmix)$ ]]; then given=("prepare:--shards=$n" "${given[@]}"); fi
}
prepare() { # text, conversations and tokenizer
  stage 1 prepare prepare.py --data="$data" --source="$source"
  case $data,$conversations in
    *, | world,world) ;; # the world brings its own
    *,world) stage 1 world prepare.py ;;
    *) stage 1 conversations prepare.py --conversations="$conversations" --source="$chats" ;;
  esac
  stage 1 train_tokenizer train_tokenizer.py --tag="$tag" --source="$source"
}
train() { # train NAME SCRIPT FLAG...: train on all devices, then score what came of it
  stage "$ranks" "$1" "$2" --tag="$tag" "${@:3}"
  stage "$ranks" "evaluate $1" evaluate.py -i "$1" --tag="$tag"
}

main_job() {
  plan
  prepare
  train base pretrain.py --source="$source"
  if [ -n "$chats" ]; then
    train mid midtrain.py --chats="$chats"
    train sft sft.py
    # of one's own conversations some may be problems
    if [ "$chats" != "$tag-chat" ] || [ -e "$base/data/$chats/rl.jsonl" ]; then train rl rl.py; fi
  fi
  stage 1 report evaluate.py --report --tag="$tag"
  if [ -z "$chats" ]; then tag+=" -i base"; fi
  [ $mode != run ] || say "done after $((SECONDS / 60)) min: $(printf %q\  "$python" "$root/chat.py")--tag=$tag"
}
bench_run() { # bench_run NAME FLAG...: pretrain a model beside the bench's own, with its tokenizer
  run mkdir -p "$base/runs/$tag-$1"
  run cp -r "$base/runs/$tag/tokenizer" "$base/runs/$tag-$1"
  stage "$ranks" "$1" pretrain.py --tag="$tag-$1" --source="$source" "${@:2}" "${flags[@]}"
}
bench_learn() { # whole runs of three seeds, and a quarter of one without each choice
  local d k n flags=(--max-seq-len=512 --total-batch-size=2048 --dtype=float32 --compile=yes)
  flags+=(--eval-tokens=300000 --save-every=0)
  for d in 4 6; do
    for k in --seed={0,1,2} --skip --bigram-steps=0 --bigram-rows=0 --no-value-embeds --no-smear \
      --no-skip --qk-scale=1 --muon-steps=5; do
      n=$((d == 4 ? 880 : 300))
      [[ $k = --seed* ]] || n=$((n / 4))
      bench_run "d$d${k//=/-}" --depth=$d --num-iterations=$n --eval-every=$n "$k"
    done
  done
}
bench_gpu() { # some steps of each depth, then of sft and rl
  local d eight few=(--log-every=1 --eval-every=0 --save-every=0 --restart --num-iterations=20) flags
  flags=("${few[@]}" --total-batch-size=524288 --dtype=bfloat16 --compile=yes)
  for d in 12 20 24 26 26-fp8; do # the log of a run stays, its ten GB of weights do not
    eight=--no-fp8 && [[ $d != *fp8 ]] || eight=--fp8
    bench_run "d$d" --bigram-tokens=0 "--depth=${d%-*}" $eight
    [ $d = 12 ] || run rm -rf "$base/runs/$tag-d$d/base"
  done
  stage "$ranks" sft sft.py --tag="$tag-d12" --start-from=base --chats="$source" "${flags[@]}"
  stage "$ranks" rl rl.py --tag="$tag-d12" --chats="$source" "${few[@]}"
}
bench() {
  prepare
  case $action in
    learn | gpu) "bench_$action" ;;
    bench) # and once more in fp32, which tables of CPUs compare
      [ $mode != run ] || rm -rf "$base/runs/"bench{,-fp32}/base
      stage "$ranks" pretrain pretrain.py --tag=bench --source="$source"
      local flags=(--dtype=float32)
      bench_run fp32
      stage 1 "evaluate speed" evaluate.py --bench=speed --tag="$tag" ;;
  esac
  stage 1 evaluate evaluate.py --bench=runs --tag="$tag"
}

# 5. Main -------------------------------------------------------------------------------------
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
action=all job=main_job mode=run gpus=0 tier="" data="" source="" conversations="" tag="" vocab=""
given=() pytest=()
read_words "$@"
base=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat} venv=${NANOCHAT_VENV:-$root/.venv}
python=${NANOCHAT_PYTHON:-$venv/bin/python}
PATH=$PATH:$venv-uv/bin:$HOME/.local/bin:${CARGO_HOME:-$HOME/.cargo}/bin
find_tier
load_tier "$@"
[[ $action != gpu || $data = world ]] || fail 2 "bench gpu trains on the world: leave --data out"
case $data in
  world | climbmix) name=$data ;;
  hub) name=fineweb-edu ;;
  *)
    data=${data/#\~\//$HOME/}
    if [ -d "$data" ]; then data=$(cd "$data" && pwd); fi
    name=$(basename "$data" | tr '[:upper:]' '[:lower:]' |
      LC_ALL=C sed 's/\..*//; s/[^a-z0-9]\{1,\}/-/g; s/^-//; s/-$//')
    name=${name:-text-$(cksum <<<"$data" | cut -d ' ' -f 1)} # of another script
    case $name in world | eval | chat | downloads | climbmix | fineweb-edu) name+=-files ;; esac ;;
esac
if [ $job = bench ]; then name=$action-$name tag=$action; fi # away from what the main job prepares
source=${source:-$name} tag=${tag:-$source}
case $data,$conversations in # chats: the folder of the conversations
  world, | world,world) conversations=world chats=$source ;;
  hub, | climbmix, | *,hub) conversations=hub chats=chat ;;
  *,) chats="" ;;
  *,world) chats=world ;;
  *) chats=$tag-chat ;;
esac
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM
case $action in
  lock)
    find_uv
    run bash "$root/.ci/lock" ;;
  setup) set_up ;;
  check)
    set_up --extra=dev
    PATH=$(dirname "$python"):$PATH PYO3_PYTHON=$python run bash "$root/.ci/check" ;;
  test)
    set_up --extra=dev
    # most tests use one core, and threads that wait would hold the other
    OMP_WAIT_POLICY=${OMP_WAIT_POLICY-passive} run exec "$python" -m pytest "$root/test_all.py" \
      --numprocesses=2 --dist=worksteal --durations=15 ${pytest[@]+"${pytest[@]}"} ;;
  *)
    set_up
    if [[ $mode = run && $gpus -gt 0 ]]; then # before anything is fetched for a card
      "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        fail 1 "nvidia-smi shows $gpus GPUs, of which torch can use none: renew the driver, or" \
          "hide them with CUDA_VISIBLE_DEVICES=-1 and train on the CPU"
    fi
    [ $mode = print ] || check_flags $job
    $job ;;
esac
