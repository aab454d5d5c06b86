"""Fine-tunes a LoRA adapter on clips and captions.

accelerate launch train/lora.py --config configs/lora/cogvideox-5b.yaml --data.manifest=clips/ [--dry-run]
python train/lora.py --config ...                     the same on one device
"""

from cogtune.head_start import read_weights_ahead

read_weights_ahead(("transformer",))  # while the imports below take their seconds

from cogtune.adapter import TrainedAdapter, add_lora
from cogtune.agreement import agree_on_plan
from cogtune.cli import parse_run
from cogtune.cluster.whereabouts import enter
from cogtune.errors import run_command
from cogtune.model_card import make_adapter_card
from cogtune.plan import make_adapter_plan
from cogtune.preparation import encode_data
from cogtune.run import Run, derive_init_seed, exit_after_signal, start_accelerator
from cogtune.run_identity import check_output_folder


def main() -> None:
    """Plan, encode, load, train, save."""
    enter("planning")
    invocation = parse_run(__doc__ or "")
    config = invocation.config
    plan = make_adapter_plan(config)
    check_output_folder(config)
    if invocation.dry_run:
        print(plan.describe(), plan.describe_rungs(), sep="\n")
        return
    accelerator = start_accelerator(plan)
    plan = agree_on_plan(plan, accelerator)
    accelerator.print(plan.describe())
    run = Run(plan, accelerator, encode_data(plan, accelerator))

    transformer = plan.loading.load(plan.facts)
    add_lora(transformer, config.adapter, seed=derive_init_seed(config))
    card = make_adapter_card(
        config,
        plan.facts,
        plan.clip_format,
        num_clips=len(run.data.train),
        global_batch=plan.global_batch,
        dtype=str(plan.dtype).removeprefix("torch."),
        quantized=plan.memory.quantized,
    )
    adapter = TrainedAdapter(transformer, card)
    if not run.train(adapter):
        exit_after_signal(run)
    run.finish(adapter)
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
