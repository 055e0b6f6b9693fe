#!/usr/bin/env bash
# Set everything up, then run the main job: text -> tokenizer -> base -> mid -> sft -> rl -> report.
#
# Usage:  bash run.sh [ACTION] [--tier=NAME] [--data=WHAT] [--tag=NAME] [--dry-run] [FLAGS]
# ACTION  all     set up, then every stage: skips what is done, goes on with what broke off; default
#         setup   make .venv, install the locked packages, build the Rust extension
#         test    set up, then pytest; the words after `test` go to pytest
#         bench   set up, then measure this machine: a table and bench.json
#         bench learn  train small models for equal times with and without each choice of
#                 pretrain.py, on the world's text or --data; two and a half hours
#         bench gpu    some steps of depths 12 to 26, sft and rl on one GPU; twenty minutes
#         lock    renew requirements.lock from pyproject.toml
# --tier  cpu cpu-bf16 cpu-fast laptop mps gpu1 8xa6000 8xh100 8xh200   default: what fits
# --data  world (generated here), hub (FineWeb-Edu), climbmix, or a folder or file of your own
# --source  name of the text's folder                   default: after --data
# --conversations  world, hub, or your own: a .jsonl file, or a folder of them; default: those of
#         the data, and none for text of your own, whose base model is then all that is made
# --tag   name of the run's folder                      default: main, or after your --data
# FLAGS   --shards, --documents, --num-conversations, --name go to prepare.py; --vocab-size,
#         --max-chars to train_tokenizer.py; all others to pretrain.py, such as --depth=6; with
#         prepare, mid, sft, rl or eval in front to that stage or to evaluate.py, such as
#         prepare:--seed=1, rl:--num-iterations=10, eval:--run-code, eval:--cost-per-hour=24
# --dry-run prints the commands and runs nothing.
#
# Environment: NANOCHAT_BASE_DIR holds data and runs (default ~/.cache/nanochat), NANOCHAT_VENV
# the packages (default .venv); NANOCHAT_PYTHON is a Python that has them, without any set-up.
set -euo pipefail

# 1. Tiers ------------------------------------------------------------------------------------
# Hours and dollars are of all stages, at prices of rented machines. With fewer cards than the tier
# names (or more) the result is the same and the time in proportion. How many rows a forward pass
# takes follows from the free memory (pretrain.py), but on the smallest cards.
# tier  GPUs  data  vocabulary  flags, as on the command line
d4="--depth=4 --max-seq-len=256 --total-batch-size=2048"
gsm8k="rl:--max-tokens=384" # a fifth of its solutions are longer than rl.py's 128 tokens
most="$d4 --num-iterations=2400 --eval-every=500 mid:--eval-every=500 rl:--num-iterations=60 rl:--eval-every=60"
TIERS="
cpu      1  world  4096   $d4 --num-iterations=1100 --num-conversations=15000 rl:--num-iterations=20
                                                     # 2 cores, 4 GB: 30 minutes, free
cpu-bf16 1  world  4096   $d4 --num-iterations=1500 --num-conversations=22000 rl:--num-iterations=30
                                                     # 2 cores with AVX512-BF16: 30 minutes, free
cpu-fast 1  world  4096   $most                      # 2 cores with fast bf16: 30 minutes, free
laptop   1  world  4096   $most --device-batch-size=8 # 6 GB or more: 10 minutes
mps      1  world  4096   $most                      # Apple silicon: 20 minutes, free
gpu1     1  hub    65536  --depth=10 $gsm8k          # 24 or 32 GB: 6 to 16 hours, \$4
                                                     # (--depth=12: twice the time and cost)
8xa6000  8  hub    65536  --depth=16 $gsm8k          # 8 x 48 GB: 8 hours, \$50
8xh100   8  hub    65536  --depth=20 $gsm8k          # 8 x 80 GB: 4 hours, \$100 (A100: 10 hours)
8xh200   8  hub    65536  --depth=32 $gsm8k          # 8 x 141 GB: 34 hours, \$1000
"

find_tier() { # sets gpus, and tier where none is asked for
  local mib=0 smi fits
  gpus=0
  if smi=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null); then
    gpus=$(grep -c . <<<"$smi" || true)
    mib=$(sort -n <<<"$smi" | head -n 1)
    [[ $mib =~ ^[0-9]+$ ]] || mib=24000 # cards that share the host's memory do not say
  fi
  case ${CUDA_VISIBLE_DEVICES-all} in
    all) ;;
    "" | -*) gpus=0 ;;
    *) [ "$gpus" -eq 0 ] || gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .) ;;
  esac
  fits=laptop
  if [ "$mib" -gt 22000 ]; then fits=gpu1; fi
  if [ "$mib" -gt 40000 ]; then fits=8xa6000; fi
  if [ "$mib" -gt 70000 ]; then fits=8xh100; fi
  if [ "$mib" -gt 120000 ] && [ "$gpus" -ge 8 ]; then fits=8xh200; fi # a d32 wants them all
  if [ "$gpus" -eq 0 ]; then fits=cpu; fi
  if [ $fits = cpu ] && grep -qs avx512_bf16 /proc/cpuinfo; then fits=cpu-bf16; fi
  # Intel's AMX, or AMD's Zen 5, which multiplies twice as fast as Zen 4 and is known by AVX-VNNI
  if [ $fits = cpu-bf16 ] && grep -qsE 'amx_bf16|avx_vnni' /proc/cpuinfo; then fits=cpu-fast; fi
  if [ "$(uname -sm)" = "Darwin arm64" ]; then fits=mps; fi
  # the world's few million tokens are a small model's, however large the card
  if [ "$action$wanted" = allworld ] && [ "$gpus" -gt 0 ]; then fits=laptop; fi
  tier=${tier:-$fits}
}

route() { # route FLAG: give it to the stage that has it
  case $1 in
    --shards=*) prepare+=("$1") ;;
    --documents=* | --num-conversations=*) world+=("$1") ;;
    --name=*) talks+=("$1") ;;
    --max-chars=*) tokenizer+=("$1") ;;
    prepare:--*) prepare+=("${1#*:}") && check_flag prepare.py "${1#*:}" ;;
    *:--*) staged+=("$1") && check_flag "$(script_of "${1%%:*}")" "${1#*:}" ;;
    *) train+=("$1") && check_flag pretrain.py "$1" ;;
  esac
}

check_flag() { # check_flag SCRIPT --FLAG: fails unless the script has such a setting
  local field=${2%%=*}
  field=${field#--} field=${field//-/_}
  if [[ $field =~ ^[a-z0-9_]+$ ]] &&
    grep -q "^    ${field#no_}: [a-z]* = setting(" "$root/$1"; then return; fi
  fail 2 "${2%%=*} is none of $1's flags (see its --help), nor of run.sh's: --dry-run $own_flags"
}

load_tier() { # sets data, vocab, ranks (processes that train) and the stages' flags
  local name preset preset_flags word
  while read -r name ranks data vocab preset; do
    if [ "$name" = "$tier" ]; then break; fi
  done <<<"$TIERS"
  [ "$name" = "$tier" ] || fail 2 "--tier=$tier is not a tier; choose one of:" \
    "$(grep -o '^[a-z0-9-]\{1,\}' <<<"$TIERS" | tr '\n' ' ')"
  read -ra preset_flags <<<"${preset%%#*}"
  for word in "${preset_flags[@]}"; do route "$word"; done
  if [ "$data" = hub ]; then
    [ "$gpus" -gt 0 ] || [ -n "$dry" ] ||
      fail 2 "--tier=$tier wants GPUs, and nvidia-smi shows none; --dry-run prints its commands"
    if [ "$gpus" -gt 0 ]; then ranks=$gpus; fi
  fi
}

# Shards for the model in train: 20 tokens a parameter (or what is asked for), 4.8 characters a
# token, 250 million characters a shard, a quarter to spare. d20: 561 M parameters, 11.2 G tokens,
# 54 G characters, 271 shards.
count_shards() {
  local word depth=0 ratio=20 width params
  for word in "${train[@]}"; do
    case $word in
      --depth=*) depth=${word#*=} ;;
      --target-param-data-ratio=*) ratio=${word#*=} ratio=${ratio%.*} ;;
    esac
  done
  # otherwise pretrain.py says what is wrong
  [[ $depth =~ ^[0-9]+$ && $ratio =~ ^[0-9]+$ && $vocab =~ ^[0-9]+$ ]] || return 0
  width=$((64 * depth)) params=$((12 * depth * width * width + 2 * vocab * width))
  echo $((params * ratio * 48 * 125 / 250000000 / 1000 + 2))
}

# 2. Words ------------------------------------------------------------------------------------
say() { printf '%s\n' "run.sh: $*"; }
fail() { # fail STATUS SENTENCE: status 2 for a wrong command line
  printf '%s\n' "run.sh: ${*:2}" >&2
  exit "$1"
}
absolute() { # the path that the caller means, whose folder is not ours
  case $1 in /*) echo "$1" ;; \~/*) echo "$HOME${1#\~}" ;; *) echo "$caller/$1" ;; esac
}
run() { # run a command, or print it under --dry-run
  if [ -z "$dry" ]; then "$@"; else printf '%q ' "$@" | sed 's/ $//' && echo; fi
}

# 3. Set-up -----------------------------------------------------------------------------------
fetch() { # print what a URL holds; give up soon where there is no network
  if command -v curl >/dev/null; then curl -fsSL --connect-timeout 5 --max-time 60 "$1"
  else wget -q --tries=1 --timeout=5 -O - "$1"; fi 2>/dev/null
}

find_uv() { # sets uv; gets it from its makers or else, with pip, from the package registry
  local bin=$venv-uv/bin script
  for uv in uv "$bin/uv" "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv"; do
    if "$uv" --version >/dev/null 2>&1; then return; fi
  done
  say "installing uv in $venv-uv"
  uv=$bin/uv
  if script=$(fetch https://astral.sh/uv/install.sh) &&
    UV_UNMANAGED_INSTALL=$bin sh -s -- --quiet <<<"$script"; then return; fi
  python3 -c 'import ensurepip, venv' 2>/dev/null ||
    fail 1 "neither uv nor a python3 with its venv module is here to install packages with:" \
      "install one of them (Debian, Ubuntu: apt install python3-venv)"
  python3 -m venv --clear "$venv-uv"
  "$bin/python" -m pip install -q --disable-pip-version-check uv ||
    fail 1 "uv cannot be installed: is a package registry within reach?"
}

make_venv() {
  local said
  if [ -z "$dry" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && return
    rm -f "$venv"/.done-*
  fi
  said=$(run "$uv" venv -q --allow-existing --python='>=3.10,<3.15' "$venv" 2>&1) ||
    fail 1 "$venv is not made: is there a Python from 3.10 to 3.14? uv says: ${said%%$'\n'*}"
  if [ -n "$said" ]; then echo "$said"; fi
}

is_done() { [ -z "$dry" ] && [ "$(cat "$venv/.done-$1" 2>/dev/null)" = "$2" ]; }
once() { # once NAME CONTENT COMMAND...: run a command unless it has succeeded for this content
  if is_done "$1" "$2"; then return; fi
  "${@:3}"
  if [ -z "$dry" ]; then echo "$2" >"$venv/.done-$1"; fi
}

install_packages() { # install_packages [--extra=dev]
  local options=("$@")
  # The default torch for Linux brings 5 GB of CUDA. uv knows the builds for each driver, and for
  # none, and which one fits here.
  if [ -n "$dry" ] || UV_HTTP_TIMEOUT=5 UV_HTTP_RETRIES=0 "$uv" pip compile -q --no-deps \
    --torch-backend=auto --python="$python" - <<<torch >/dev/null 2>&1; then
    options+=(--torch-backend=auto)
  else
    say "the index of torch's builds cannot be reached: taking the default build"
  fi
  run "$uv" pip install --python="$python" --constraint=requirements.lock \
    --requirement=pyproject.toml maturin ${options[@]+"${options[@]}"} ||
    fail 1 "the packages are not installed, for the reason above; the same command tries again"
}

find_cargo() { # puts a cargo that is new enough on PATH; gets it with rustup
  local bin=${CARGO_HOME:-$HOME/.cargo}/bin script want
  want=$(sed -n 's/^rust-version = "\([0-9.]*\)".*/\1/p' Cargo.toml)
  PATH=$PATH:$bin
  if cargo_is "$want"; then return; fi
  say "installing Rust with rustup"
  if script=$(fetch https://sh.rustup.rs); then
    sh -s -- -y -q --profile minimal --no-modify-path <<<"$script" && PATH=$bin:$PATH
  fi
  cargo_is "$want" ||
    fail 1 "Rust $want or newer is missing and rustup cannot be reached: install cargo and rustc"
}
cargo_is() { # cargo_is VERSION: that one or newer
  local have
  have=$(cargo --version 2>/dev/null | cut -d ' ' -f 2) && [ -n "$have" ] &&
    [ "$(printf '%s\n' "$1" "$have" | sort -V | head -n 1)" = "$1" ]
}

find_compiler() { # Rust links with it; torch.compile needs its C++ half
  local name
  for name in cc gcc clang; do
    if ! "$name" --version >/dev/null 2>&1; then continue; fi
    [ "$name" = cc ] || export RUSTFLAGS="${RUSTFLAGS-} -C linker=$name"
    return 0
  done
  fail 1 "a C compiler is missing: install one (Debian, Ubuntu: apt install build-essential;" \
    "Fedora: dnf install gcc-c++; macOS: xcode-select --install)"
}

build_extension() {
  if [ -z "$dry" ]; then rm -rf "$venv/wheels"; fi
  run "$venv/bin/maturin" build -q --release --locked --interpreter="$python" \
    --out="$venv/wheels" || fail 1 "the Rust extension is not built, for the reason above"
  run "$uv" pip install -q --python="$python" --reinstall --no-deps --no-index \
    --find-links="$venv/wheels" nanochat-flat
}

set_up() { # set_up [--extra=dev]
  local sources
  if [ -n "${NANOCHAT_PYTHON-}" ]; then return; fi
  uv=uv sources=$(cat tokenizer.rs pyproject.toml Cargo.* | cksum)
  # behind a proxy that re-signs traffic only the system's certificates are right
  if [ -s /etc/ssl/certs/ca-certificates.crt ]; then export UV_SYSTEM_CERTS=1; fi
  if [ -z "$dry" ]; then
    find_uv
    if ! is_done extension "$sources"; then find_cargo && find_compiler; fi
  fi
  make_venv
  once "packages$*" "$(cksum <requirements.lock)" install_packages "$@"
  once extension "$sources" build_extension
}

lock() { # without hashes for torch, as each kind of machine has its own build, nor its CUDA
  find_uv
  "$uv" pip compile -q --universal --python-version=3.10 --extra=dev --generate-hashes \
    --no-annotate --custom-compile-command='bash run.sh lock' pyproject.toml | awk '
    /^[^ #]/ { cuda = /^(nvidia-|cuda-|triton==)/; torch = /^torch==/ }
    cuda || torch && /^ / { next }
    torch { sub(/ \\$/, "") }
    { print }' >requirements.lock.new
  mv requirements.lock.new requirements.lock
}

# 4. Stages -----------------------------------------------------------------------------------
child="" stopped=0
stop() { # on Ctrl-C or SIGTERM the stage saves and ends, and the job with it
  stopped=$1
  if [ -z "$child" ]; then exit "$1"; fi
  # torchrun would end the ranks after 30 seconds, saved or not: they are told, and it ends then
  { [ "$ranks" -gt 1 ] && pkill -TERM -P "$child" 2>/dev/null; } || kill "$child" || true
}

stage() { # stage NAME COMMAND...: run one stage to its end
  local name=$1 guard=() status=0
  shift
  if [ -n "$dry" ]; then run "$@" && return; fi
  printf '\n== %s, after %d:%02d min\n' "$name" $((SECONDS / 60)) $((SECONDS % 60))
  # no stage may outlive a killed run.sh and meet the next one; torchrun must end its ranks, and
  # hear of Ctrl-C only from here
  guard=(setpriv --pdeathsig KILL)
  if [ "$ranks" -gt 1 ]; then guard=(setpriv --pdeathsig TERM setsid); fi
  "${guard[@]}" true 2>/dev/null || guard=()
  # in the background, as bash hears a signal only then; with SIGINT, which bash takes from it
  (trap - INT TERM && exec ${guard[@]+"${guard[@]}"} "$@") </dev/null &
  child=$!
  wait "$child" || status=$?
  while [ "$stopped" -gt 0 ] && kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  child=""
  [ "$stopped" -eq 0 ] || fail "$stopped" "stopped in $name; the same command goes on from there"
  [ "$status" -eq 0 ] || fail "$status" "$name ended with status $status, for the reason above"
}

launch() { # launch NAME SCRIPT...: run a stage on all devices
  local name=$1 torchrun=()
  if [ "$ranks" -gt 1 ]; then
    torchrun=(-m torch.distributed.run --standalone "--nproc_per_node=$ranks" --max-restarts=3)
  fi
  stage "$name" "$python" ${torchrun[@]+"${torchrun[@]}"} "${@:2}"
}

script_of() { # script_of STAGE
  case $1 in mid) echo midtrain.py ;; eval) echo evaluate.py ;; *) echo "$1.py" ;; esac
}

flags_of() { # flags_of STAGE: sets mine to the words of that stage
  local word
  mine=()
  for word in ${staged[@]+"${staged[@]}"}; do
    if [[ $word = "$1":* ]]; then mine+=("${word#*:}"); fi
  done
}

text_to_base() {
  # a wrong flag, or a time that is not what one wants, is seen before hours of work
  stage plan "$python" pretrain.py "${train[@]}" --plan --plan-vocab-size="$vocab" \
    --plan-count="$ranks"
  stage prepare "$python" prepare.py --data="$data" --source="$source" \
    ${prepare[@]+"${prepare[@]}"}
  case $conversations in
    "") ;;
    world)
      if [ "$data" != world ]; then
        stage world "$python" prepare.py ${talks[@]+"${talks[@]}"}
      fi ;;
    *) stage conversations "$python" prepare.py --conversations="$conversations" \
      --source="$chats" ${talks[@]+"${talks[@]}"} ;;
  esac
  stage train_tokenizer "$python" train_tokenizer.py --tag="$tag" --source="$source" \
    "${tokenizer[@]}"
  launch pretrain pretrain.py --tag="$tag" --source="$source" "${train[@]}"
}

evaluate() { # evaluate STAGE
  flags_of eval
  launch "evaluate $1" evaluate.py -i "$1" --tag="$tag" ${mine[@]+"${mine[@]}"}
}

main_job() {
  local name
  text_to_base
  evaluate base
  if [ -n "$chats" ] && [ -e "$base/data/$chats/rl.jsonl" ]; then stages="mid sft rl"; fi
  for name in $stages; do
    flags_of "$name"
    if [ "$name" = mid ]; then mine=(--chats="$chats" ${mine[@]+"${mine[@]}"}); fi
    launch "$name" "$(script_of "$name")" --tag="$tag" ${mine[@]+"${mine[@]}"}
    evaluate "$name"
  done
  flags_of eval
  stage report "$python" evaluate.py --report --tag="$tag" ${mine[@]+"${mine[@]}"}
}

bench() {
  text_to_base
  # once more in fp32, which tables of CPUs compare
  stage train_tokenizer "$python" train_tokenizer.py --tag="$tag-fp32" --source="$source" \
    "${tokenizer[@]}"
  launch pretrain pretrain.py --tag="$tag-fp32" --source="$source" "${train[@]}" --dtype=float32
  flags_of eval
  stage evaluate "$python" evaluate.py --bench=speed --tag="$tag" ${mine[@]+"${mine[@]}"}
}

compare() { # compare learn|gpu: train models only to measure them
  case $data in
    world | hub | climbmix) ;;
    *) source=${named:-$1} prepare+=(--doc-chars=6000) ;;
  esac
  stage prepare "$python" prepare.py --data="$data" --source="$source" \
    ${prepare[@]+"${prepare[@]}"}
  stage train_tokenizer "$python" train_tokenizer.py --tag="$tag" --source="$source" \
    --vocab-size="$vocab"
  flags_of eval
  stage evaluate "$python" evaluate.py --bench="$1" --tag="$tag" ${mine[@]+"${mine[@]}"}
}

# 5. Main -------------------------------------------------------------------------------------
caller=$PWD
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
action=all tier="" wanted="" named="" conversations="" tag="" size="" dry=""
prepare=() world=() talks=() tokenizer=() train=() staged=() flags=() pytest=()
own_flags="--tier --data --source --conversations --tag --shards --documents --num-conversations"
own_flags+=" --name --vocab-size --max-chars"
while [ $# -gt 0 ]; do
  word=$1
  shift
  case $word in # --a_b 1 is --a-b=1
    --dry-run | --dry_run | --help | --*=*) ;;
    --*) if [ $# -gt 0 ] && [[ $1 != --* ]]; then word=$word=$1 && shift; fi ;;
  esac
  value=${word#*=} name=${word%%=*}
  case $name in --*) word=${name//_/-}${word#"$name"} ;; esac
  case $word in
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$root/run.sh" && exit ;;
    --dry-run) dry=yes ;;
    --tier=*) tier=$value ;;
    --data=*) wanted=$value ;;
    --source=*) named=$value ;;
    --conversations=*) conversations=$value ;;
    --tag=*) tag=$value ;;
    --vocab-size=*) size=$value ;;
    prepare:--* | mid:--* | sft:--* | rl:--* | eval:--* | --*)
      [[ " $own_flags " != *" $word "* ]] || fail 2 "$word needs a value, as in $word=VALUE"
      flags+=("$word") ;;
    test) action=test pytest=("$@") && break ;;
    all | setup | bench | lock) action=$word ;;
    learn | gpu) [ "$action" = bench ] || fail 2 "$word follows bench: bash run.sh bench $word"
      action=$word ;;
    *) fail 2 "$word is not an action; choose one of: all setup test bench lock (or --help)" ;;
  esac
done
[ "$action$dry" != lockyes ] || fail 2 "lock has no --dry-run: it writes requirements.lock"
venv=$(absolute "${NANOCHAT_VENV:-$root/.venv}")
python=${NANOCHAT_PYTHON:-$venv/bin/python}
if [[ $python = */* ]]; then python=$(absolute "$python"); fi
if [ -n "${NANOCHAT_BASE_DIR-}" ]; then
  NANOCHAT_BASE_DIR=$(absolute "$NANOCHAT_BASE_DIR") && export NANOCHAT_BASE_DIR
fi
base=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}

find_tier
load_tier
case $action in
  learn) wanted=${wanted:-world} tag=learn vocab=4096 ;;
  gpu) # its conversations are the world's; so much text that the vocabulary is not cut
    [ "${wanted:-world}" = world ] || fail 2 "bench gpu trains on the world: leave --data out"
    wanted=world tag=gpu vocab=65536 prepare+=(--documents=90000) ;;
esac
if [ "$action" = bench ]; then # fixed, so that tables compare
  wanted=${wanted:-world} tag=bench
  train=(--depth=4 --head-dim=128 --max-seq-len=512 --device-batch-size=2)
  train+=(--total-batch-size=8192) vocab=4096
  if [ "$gpus" -gt 0 ]; then train=(--depth=12 --total-batch-size=524288) vocab=65536; fi
  train+=(--num-iterations=40 --compile=yes --eval-every=0)
fi
if [ -z "$wanted" ] || [ "$wanted" = "$data" ]; then tag=${tag:-main}; else data=$wanted; fi
case $data in
  world | climbmix) source=$data ;;
  hub) source=fineweb-edu ;;
  *)
    data=$(absolute "$data")
    [ -e "$data" ] || fail 2 "--data=$wanted: no such file or folder, nor world, hub or climbmix"
    if [ -d "$data" ]; then data=$(cd "$data" && pwd); fi
    source=$(basename "$data" | tr '[:upper:]' '[:lower:]' |
      LC_ALL=C sed 's/\..*//; s/[^a-z0-9]\{1,\}/-/g; s/^-//; s/-$//')
    source=${source:-text-$(cksum <<<"$data" | cut -d ' ' -f 1)} # of another script
    case $source in
      world | eval | chat | downloads | climbmix | fineweb-edu) source=$source-files ;;
    esac ;;
esac
source=${named:-$source}
tag=${tag:-$source}
# what the table brings there, its time takes (README, Choices)
if [ "$data" = world ]; then train+=(--bigram-rows=0); fi
if [ -z "$conversations" ]; then
  case $data in world) conversations=world ;; hub | climbmix) conversations=hub ;; esac
fi
case $conversations in # chats: the folder of the conversations; stages: those that use it
  "") chats="" stages="" ;;
  world)
    chats=world stages="mid sft rl"
    if [ "$data" = world ]; then chats=$source; fi ;;
  hub) chats=chat stages="mid sft rl" ;;
  *)
    conversations=$(absolute "$conversations") chats=$tag-chat
    stages="mid sft" # and rl where there are problems among them
    [ -e "$conversations" ] || fail 2 "--conversations: no such file, nor world or hub" ;;
esac
for word in ${flags[@]+"${flags[@]}"}; do route "$word"; done
# what the world is made of goes to the command that makes it, the name to that of the conversations
case $data,$conversations in
  world,world | *,) prepare+=(${world[@]+"${world[@]}"} ${talks[@]+"${talks[@]}"}) ;;
  *,world) talks+=(${world[@]+"${world[@]}"}) ;;
  *) prepare+=(${world[@]+"${world[@]}"}) ;;
esac
vocab=${size:-$vocab} tokenizer+=("--vocab-size=$vocab")
case $data in
  hub | climbmix) prepare=("--shards=$(count_shards)" ${prepare[@]+"${prepare[@]}"}) ;;
esac

cd "$root"
if [ -n "$dry" ]; then run cd "$root"; fi
trap 'stop 130' INT
trap 'stop 143' TERM
case $action in
  setup) set_up ;;
  lock) lock ;;
  test)
    set_up --extra=dev
    # most tests use one core; each half in its order, so that what is made once serves what follows
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY-passive} # waiting threads would hold the other's core
    run exec "$python" -m pytest test_all.py --numprocesses=2 --dist=worksteal \
      ${pytest[@]+"${pytest[@]}"} ;;
  bench)
    set_up
    run rm -rf "$base/runs/"bench{,-fp32}
    bench ;;
  learn | gpu)
    set_up
    compare "$action" ;;
  all)
    set_up
    main_job
    if [ -n "$dry" ]; then exit; fi
    if [ -n "$chats" ]; then
      say "done after $((SECONDS / 60)) min; now talk to the model:"
      printf '  %s\n' "$python $root/chat.py --tag=$tag" \
        "$python $root/chat.py --tag=$tag -p 'What is 37 times 12?'" \
        "$python $root/chat.py --tag=$tag -i base -p 'The capital of France is'"
    else
      say "done after $((SECONDS / 60)) min; now have the model complete a text, or make it chat:"
      printf '  %s\n' "$python $root/chat.py -i base --tag=$tag" \
        "$python $root/chat.py -i base --tag=$tag -p 'It was a'" \
        "bash $root/run.sh --data=$data --source=$source --tag=$tag --conversations=world"
    fi ;;
esac
