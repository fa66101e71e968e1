#!/usr/bin/env bash
# Everything that needs a GPU, in parts. A part may fail or run out of time without ending the others.
#
#   benchmarks/gpu.sh OUT_FOLDER PART...       PYTHON=python3 by default, SECONDS_IN_ALL=540
#
# smoke       the kernels against their references, in parallel processes; the debug recipe in both modes on NCCL
# kernels     the four kernel benchmarks at the sizes of their targets
# tune        block sizes timed on this GPU, into the table of this checkout, which the parts after it use
# variants    settings of the update, decoders and encoders beside one another
# run         the published run: some steps of it, phase by phase
# rollout     autoregressive sampling of GPT-XXL beside LlamaGen's sampler and the memory's bandwidth
# peers       the projection's benchmark at the target's width against Liger and TRL's way alone
# profile     tables of the profiler: update, decoder, sampling
# counters    counters of six kernels by ncu, where it is there and may read them
# recipes     small runs of GRPO with an adapter, with moments in 8 bits, and with sampled completions of texts
# quickstart  the whole quickstart of classes; quickstart-text that of texts
#
# Each part is planned for two or three minutes or less, quickstart for five, quickstart-text for eight. After every step
# of a part OUT_FOLDER/results.tgz holds all that is there so far: logs, JSON files, plots, and summary.txt with one line
# a step; while a step runs it is packed anew every PACK_SECONDS=20, so that a machine that is taken away takes no case
# that has finished. Wheels in .whl (benchmarks/collect_wheels.sh) are installed into a folder of their own first.
# TESTS="FILE..." makes smoke run these tests alone, KERNELS="NAME..." kernels these benchmarks. BENCH (of each of them),
# ROLLOUT, RUN, TUNE and VARIANTS are further arguments, such as ROLLOUT="--batches 8"; SMOKE_SECONDS, RUN_SECONDS and so
# on are the most that a part, of kernels each benchmark, may take.
# SMALL=1 is a rehearsal on a CPU of everything but the speed: small sizes, the kernels in Triton's interpreter, six times
# the time, or PATIENCE times. SITE=FOLDER is put on the path there in place of the wheels.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 2
parts="smoke kernels tune variants run rollout peers profile counters recipes quickstart quickstart-text"
refuse() {
  printf 'benchmarks/gpu.sh: %s\nusage: benchmarks/gpu.sh OUT_FOLDER PART...   parts: %s\n' "$1" "$parts" >&2
  exit 2
}
[ -n "${1:-}" ] || refuse "a folder for the results is missing"
[[ " $parts " != *" $1 "* ]] || refuse "$1 is a part; the first argument is the folder for the results"
[ $# -gt 1 ] || refuse "no part is named"
for part in "${@:2}"; do
  [[ " $parts " == *" $part "* ]] || refuse "$part is no part"
done
{ mkdir -p "$1" && : > "$1/part.0" && rm "$1/part.0"; } 2> /dev/null || refuse "cannot write to the folder $1"
out=$(cd "$1" && pwd)
shift
python=${PYTHON:-python3}
command -v "$python" > /dev/null || refuse "there is no $python; PYTHON names the program"
work=$(mktemp -d)/results
stamp=$(date +%F-%H%M)
mkdir -p "$work"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 TRITON_INTERPRET=0
run_preset=vapi-xxl-384 rollout_preset=xxl-384 processes=8 compile=true patience=${PATIENCE:-1}
peer_cases="D=1536"
profiled="--rollout.batch_size 16 --training.batch_size 128"  # two parts of a step: a profiler is slow
run_flags=
if [ -n "${SMALL:-}" ]; then
  run_preset=cpu rollout_preset=cpu processes=2 compile=false patience=${PATIENCE:-6} profiled=
  peer_cases="D=256"
  run_flags="--reward.lpips.weight 1 --model.dropout 0.1 --training.dropout_mode train"  # as the published run has them
  export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
fi
last_second=$((SECONDS + patience * ${SECONDS_IN_ALL:-540}))

pack() { # steps may run at the same time, and be killed
  tar -czf "$work.$BASHPID" -C "$(dirname "$work")" results 2> /dev/null
  cp "$work.$BASHPID" "$out/part.$BASHPID" && mv -f "$out/part.$BASHPID" "$out/results.tgz"
  rm -f "$work.$BASHPID"
}

# name, most seconds, command: runs it into a log of its own, shows the log's end, packs.
step() {
  local name=$1 limit=$((patience * $2)) begin=$SECONDS code packer
  shift 2
  [ $((last_second - SECONDS)) -lt "$limit" ] && limit=$((last_second - SECONDS))
  if [ "$limit" -lt 5 ]; then
    echo "$name: not begun, no time left" | tee -a "$work/summary.txt"
    return
  fi
  while sleep "${PACK_SECONDS:-20}"; do pack; done > /dev/null 2>&1 &
  packer=$!
  timeout --kill-after 5 "$limit" "$@" > "$work/$name.log" 2>&1
  code=$?
  kill "$packer" && wait "$packer" 2> /dev/null
  rm -f "$out/part.$packer" "$work.$packer" # of a packing that was cut off
  tail -n "${LINES_SHOWN:-25}" "$work/$name.log"
  echo "== $name: exit code $code, $((SECONDS - begin)) of $limit seconds" | tee -a "$work/summary.txt"
  pack
}

bench() { # name, most seconds, further arguments
  local name=$1 limit=$2
  shift 2
  step "bench-$name${label:-}" "$limit" "$python" "benchmarks/bench_$name.py" --json "$work/$stamp-gpu-$name.json" "$@"
}

debug_recipe() { # name, recipe, flags
  local name=$1 recipe=$2
  shift 2
  step "$name" 80 "$python" -m torch.distributed.run --standalone --nproc_per_node 1 -m grpo train --config "$recipe" \
    --metrics.run_dir "$work/$name" "$@"
  trim "$name"
}

smoke() {
  nvidia-smi > "$work/nvidia-smi.txt" 2>&1
  "$python" -m pip list > "$work/pip-list.txt" 2>/dev/null
  if [ -z "${TESTS:-}" ]; then # both recipes, one after the other, beside the tests
    (
      debug_recipe debug-teacher-forced debug --compile.enabled "$compile"
      debug_recipe debug-autoregressive debug --rollout.mode autoregressive --rollout.cfg_scale 2 \
        --reward.reconstruction.weight 0 --reward.jpeg_size.weight 1
    ) > "$work/debug-recipes.txt" 2>&1 &
  fi
  # shellcheck disable=SC2086
  step kernel-tests "${SMOKE_SECONDS:-85}" "$python" -m pytest -q -W ignore -n "$processes" --timeout $((patience * 80)) \
    --junitxml "$work/kernel-tests.xml" -o "python_functions=test_* check_*" \
    ${TESTS:-tests/kernels/test_kernels_on_gpu.py tests/rollout/test_sampling_on_gpu.py \
    tests/kernels/triton_checks/check_*.py}
  wait
  if [ -z "${TESTS:-}" ]; then
    grep -h "^==" "$work/debug-recipes.txt"
    for name in debug-teacher-forced debug-autoregressive; do tail -n 3 "$work/$name.log"; done
  fi
  pack
}

kernels() {
  local name
  for name in ${KERNELS:-token_log_probs linear_log_probs sampling loss}; do
    # shellcheck disable=SC2086
    local limit=${KERNELS_SECONDS:-75}
    bench "$name" "$limit" --seconds 1 --deadline $((patience * limit * 3 / 4)) ${BENCH:-}
  done
}

tune() {
  # shellcheck disable=SC2086
  step tune "${TUNE_SECONDS:-120}" "$python" -m grpo.kernels.tune ${TUNE:-}
  cp grpo/kernels/block_sizes.json "$work/$stamp-block_sizes.json"
  pack
}

variants() {
  local limit=${VARIANTS_SECONDS:-240}
  # shellcheck disable=SC2086
  bench variants "$limit" --preset "$run_preset" --deadline $((patience * limit * 4 / 5)) ${VARIANTS:-}
}

run() {
  # shellcheck disable=SC2086
  bench run "${RUN_SECONDS:-180}" --preset "$run_preset" --steps 2 $run_flags ${RUN:-}
}

rollout() {
  # shellcheck disable=SC2086
  bench rollout "${ROLLOUT_SECONDS:-120}" --preset "$rollout_preset" --repeats 2 ${ROLLOUT:-}
}

profile() {
  # shellcheck disable=SC2086
  LINES_SHOWN=75 step profile-run 120 "$python" benchmarks/bench_run.py --preset "$run_preset" $profiled \
    --profile "$work/profile"
}

counters() {
  if ! command -v ncu > /dev/null; then
    echo "counters: not measured, ncu is not there" | tee -a "$work/summary.txt"
    return
  fi
  LINES_SHOWN=120 step counters "${COUNTERS_SECONDS:-90}" ncu --clock-control none --section SpeedOfLight \
    --section Occupancy --section WarpStateStats --kernel-name "regex:_kernel$" "$python" benchmarks/run_kernels.py
  if grep -q ERR_NVGPUCTRPERM "$work/counters.log"; then
    echo "counters: not measured, ncu may not read them here" | tee -a "$work/summary.txt"
  fi
  pack
}

peers() { # beside what `kernels` writes
  # shellcheck disable=SC2086
  label=-peers stamp=$stamp-peers bench linear_log_probs "${PEERS_SECONDS:-120}" --seconds 1 --no-compile \
    --cases "${peer_cases}" --without cut_cross_entropy fla torch_chunked ${BENCH:-}
}

recipes() {
  local sampled="--rollout.mode autoregressive --reward.reconstruction.weight 0 --reward.jpeg_size.weight 1"
  debug_recipe debug-lora debug --lora.rank 4 --lora.targets wqkv,w2
  debug_recipe debug-8-bit debug --optimizer.name adamw_8bit
  # shellcheck disable=SC2086
  debug_recipe debug-text text/debug_text $sampled --rollout.cfg_scale 2
}

quickstart() { run_quickstart quickstart class 320; }

quickstart-text() { run_quickstart quickstart-text text 520; }

run_quickstart() { # name, recipe, most seconds
  local configs=
  if [ -n "${SMALL:-}" ]; then
    configs="--configs $(dirname "$work")/$1"
    "$python" tests/recipes/small_quickstarts.py "$2" "$(dirname "$work")/$1"
  fi
  # shellcheck disable=SC2086
  step "$1" "${QUICKSTART_SECONDS:-$3}" "$python" -m grpo quickstart --recipe "$2" --run-dir "$work/$1" $configs
  trim "$1"
}

trim() { # what a run's folder holds beside its results
  find "$work/$1" -type d -name checkpoints -prune -exec rm -rf {} +
  find "$work/$1" -name "*.safetensors" -delete
  pack
}

if [ -n "${SITE:-}" ]; then
  export PYTHONPATH=$PWD:$SITE
elif compgen -G ".whl/*.whl" > /dev/null; then
  site=$(dirname "$work")/site
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl ||
    echo "the wheels in .whl could not be installed" | tee -a "$work/summary.txt"
  export PYTHONPATH=$PWD:$site
fi
for part in "$@"; do
  echo "==== $part"
  "$part"
done
grep -h -E "^(pass|MISS|none) " "$work"/bench-*.log 2> /dev/null | tee -a "$work/summary.txt"
touch "$work/summary.txt"
"$python" benchmarks/gpu_results.py --checks "$work" "$work/$stamp-gpu-checks.json"
pack
echo "==== all in $out/results.tgz"
cat "$work/summary.txt"
