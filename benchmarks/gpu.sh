#!/usr/bin/env bash
# Everything that needs a GPU, in the order of its worth: kernel tests in bf16, kernel benchmarks, the published run,
# rollouts, the quickstart. One part may fail without ending the others.
#
#   benchmarks/gpu.sh OUT_FOLDER        PYTHON=python3 by default; about 25 minutes on one H200
set -u -o pipefail
cd "$(dirname "$0")/.."
out=${1:?folder for the results}
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

part kernel-tests 240 "$python" -m pytest tests/kernels -q -x
for op in sampling token_log_probs linear_log_probs loss; do
  part "bench-$op" 180 "$python" "benchmarks/bench_$op.py" --json "$out/$stamp-gpu-$op.json"
done
part bench-run 420 "$python" benchmarks/bench_run.py --preset vapi-xxl-384 --json "$out/$stamp-gpu-run.json"
part bench-rollout 300 "$python" benchmarks/bench_rollout.py --preset xxl-384 --json "$out/$stamp-gpu-rollout.json"
part bench-update 240 "$python" benchmarks/bench_update.py --preset b-256 --json "$out/$stamp-gpu-update.json"
part quickstart 300 "$python" recipes/quickstart.py --run-dir "$out/quickstart"
