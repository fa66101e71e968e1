#!/usr/bin/env bash
# Everything that needs a GPU, in the order of its worth. One part may fail without ending the others.
#
#   benchmarks/gpu.sh OUT_FOLDER [kernels|runs]      PYTHON=python3 by default
#
# kernels: kernel tests in bf16, in-place kernels under compute-sanitizer, kernel benchmarks with their targets; planned
#          to end within ten minutes. Needs torch, triton, numpy and pytest; matplotlib draws the plots, and peers that
#          are installed (liger-kernel, cut-cross-entropy, fla-core) are timed too.
# runs:    the published run, rollouts, the update, the quickstart; about twenty minutes, with the whole project.
# Without a second argument: both.
set -u -o pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD  # nothing is installed there
out=${1:?folder for the results}
what=${2:-all}
python=${PYTHON:-python3}
stamp=$(date +%F)
mkdir -p "$out"

part() { # name, seconds, command
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" 2>&1 | tee "$out/$stamp-$name.log" | tail -40
  echo "== $name: exit code ${PIPESTATUS[0]}"
}

if [ "$what" != runs ]; then
  part kernel-tests 200 "$python" -m pytest tests/kernels/test_on_gpu.py tests/kernels/test_triton.py -q -k "not compile"
  if command -v compute-sanitizer > /dev/null; then
    part sanitizer 60 compute-sanitizer --error-exitcode 1 "$python" -m pytest -q -W ignore -o python_functions='check_*' \
      tests/kernels/triton_checks/check_token_log_probs.py -k "over_the_logits or out_of_range"
  fi
  part bench-sampling 80 "$python" benchmarks/bench_sampling.py --json "$out/$stamp-gpu-sampling.json"
  part bench-loss 60 "$python" benchmarks/bench_loss.py --json "$out/$stamp-gpu-loss.json"
  part bench-token_log_probs 80 "$python" benchmarks/bench_token_log_probs.py --repeats 30 \
    --json "$out/$stamp-gpu-token_log_probs.json"
  part bench-linear_log_probs 120 "$python" benchmarks/bench_linear_log_probs.py --repeats 20 \
    --json "$out/$stamp-gpu-linear_log_probs.json"
  grep -h -E "^(pass|MISS) " "$out/$stamp"-bench-*.log
fi
if [ "$what" != kernels ]; then
  part bench-run 420 "$python" benchmarks/bench_run.py --preset vapi-xxl-384 --json "$out/$stamp-gpu-run.json"
  part bench-rollout 300 "$python" benchmarks/bench_rollout.py --preset xxl-384 --json "$out/$stamp-gpu-rollout.json"
  part bench-update 240 "$python" benchmarks/bench_update.py --preset b-256 --json "$out/$stamp-gpu-update.json"
  part quickstart 300 "$python" -m grpo quickstart --run-dir "$out/quickstart"
fi
