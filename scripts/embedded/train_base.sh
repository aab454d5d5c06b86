#!/usr/bin/env bash
# Makes the embedded base model from nothing: clips, VAE, text encoder, transformer. Start it again to go on.
#
#   scripts/embedded/train_base.sh            PYTHON and CLIPS (12000) can be set
#
# The VAE in scripts/embedded/vae is used where it is there; without it, it is trained first (one GPU).
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} out=runs/embedded
[ -d scripts/embedded/vae ] || "$python" scripts/embedded/train_vae.py --out $out/vae --minutes 15
vae=scripts/embedded/vae; [ -d $vae ] || vae=$out/vae/vae
[ -d $out/clips ] || "$python" data/make_shapes.py --out $out/clips --split base --count "${CLIPS:-12000}" --seed 0
[ -d $out/held_out ] || "$python" data/make_shapes.py --out $out/held_out --split held_out --count 32 --seed 1
[ -d $out/start ] || "$python" scripts/embedded/build_pipeline.py --vae $vae --out $out/start
"$python" train/sft.py --config configs/sft/embedded.yaml "$@"
