#!/usr/bin/env bash
# The main job end to end on a random-weight pipeline: check, prepare, train, stop by a signal, resume, validate, generate.
#
#   scripts/main_job.sh MODEL CLIPS OUT [--section.key=value ...]
#   scripts/main_job.sh cogvideox-5b clips/ /tmp/job
#
# MODEL is a name that scripts/random_pipeline.py knows. STEPS (20), GENERATION_STEPS (50) and PYTHON can be set.
set -euo pipefail
model=$1 clips=$2 out=$3; shift 3
python=${PYTHON:-python3} steps=${STEPS:-20} generation_steps=${GENERATION_STEPS:-50}
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"
say() { echo "== $(date +%T) $*"; }

[ -d "$out/base" ] || { say random pipeline; "$python" "$here/scripts/random_pipeline.py" --model "$model" "$out/base"; }
cat > "$out/job.yaml" <<YAML
model: {path: $out/base}
data: {manifest: $clips, cache_dir: $out/cache, validation_clips: 1}
train: {max_steps: $steps}
schedule: {warmup_steps: 5}
validation: {prompts: ["A toy ship on a blue carpet"], num_inference_steps: 10}
checkpoint: {every_steps: $((steps / 2))}
tracking: {log_every_steps: 1}
output_dir: $out/run
YAML
say check;    "$python" "$here/data/check.py" --config "$out/job.yaml" "$@"
say prepare;  "$python" "$here/data/prepare.py" --config "$out/job.yaml" "$@"
say train, to be stopped
"$python" "$here/train/lora.py" --config "$out/job.yaml" "$@" & trainer=$!
until [ "$(grep -cs '"loss"' "$out/run/metrics.jsonl" || true)" -ge $((steps / 2 + 1)) ] 2>/dev/null; do
  sleep 0.2; kill -0 $trainer 2>/dev/null || break
done
kill -TERM $trainer 2>/dev/null || true
wait $trainer && say stopped cleanly
ls "$out/run/checkpoints"
say train, resumed
"$python" "$here/train/lora.py" --config "$out/job.yaml" "$@"
say generate
"$python" "$here/scripts/generate.py" --model "$out/base" --lora "$out/run/final" --steps "$generation_steps" \
  --prompt "A toy ship on a blue carpet" --seed 1 --output "$out/out.mp4"
say done
