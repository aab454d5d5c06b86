#!/usr/bin/env bash
# Makes the embedded base model from nothing: clips, VAE, text encoder, transformer. Start it again to go on.
#
#   scripts/embedded/train_base.sh            PYTHON and CLIPS (9000) can be set; one GPU
#
# The VAE in scripts/embedded/vae is used where it is there; without it, it is trained first, its decoder longer than
# its encoder (the shipped decoder came last, which is the same to the transformer). The transformer is trained
# in two parts, as the shipped one was: on samples of the VAE's own wide posterior, then, from those averages, on its
# means. The shipped weights are the averages after 11,294 steps of the second part, which was stopped there.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} out=runs/embedded
config="--config configs/sft/embedded.yaml"
[ -d scripts/embedded/vae ] || "$python" scripts/embedded/train_vae.py --out $out/vae --minutes 15
[ -d scripts/embedded/vae ] || "$python" scripts/embedded/train_vae.py --decoder-of $out/vae/vae --out $out/decoder \
  --minutes 8.9 --pool 24576 --fixed-pool --workers 14 --learning-rate 1e-3 --quiet-noise 0.04 --seed 7
vae=scripts/embedded/vae; [ -d $vae ] || vae=$out/decoder/vae
[ -d $out/clips ] || "$python" data/make_shapes.py --out $out/clips --split base --count "${CLIPS:-9000}" --seed 0
[ -d $out/held_out ] || "$python" data/make_shapes.py --out $out/held_out --split held_out --count 32 --seed 1
[ -d $out/first ] || "$python" scripts/embedded/build_pipeline.py --vae $vae --wide-posterior --out $out/first
[ -d $out/first-run/final ] || "$python" train/sft.py $config --model.path=$out/first --output_dir=$out/first-run \
  --train.max_steps=10500 --optimizer.learning_rate=3e-3 --schedule.warmup_steps=500 --train.ema_decay=0.9985
average() { ls -d "$1"/checkpoints/step-* | tail -1; }
[ -d $out/start ] || "$python" scripts/embedded/build_pipeline.py --vae $vae --out $out/start \
  --weights "$(average $out/first-run)/ema.safetensors"
"$python" train/sft.py $config "$@"
"$python" scripts/embedded/build_pipeline.py --vae $vae --weights "$(average $out/run)/ema.safetensors" --out $out/tiny
"$python" scripts/score.py --model $out/tiny --seeds 0 1 2
