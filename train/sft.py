"""Fine-tunes all of the transformer's weights, or a part of them, on clips and captions.

accelerate launch train/sft.py --config configs/sft/cogvideox-2b.yaml --data.manifest=clips/ [--dry-run]
python train/sft.py --config ...                      the same on one device
"""

from cogtune.head_start import read_weights_ahead

read_weights_ahead(("transformer",))  # while the imports below take their seconds

from cogtune.agreement import agree_on_plan
from cogtune.cli import parse_run
from cogtune.cluster.whereabouts import enter
from cogtune.errors import run_command
from cogtune.full import TrainedModel
from cogtune.model_card import make_model_card
from cogtune.plan import make_full_plan
from cogtune.preparation import encode_data
from cogtune.run import Run, exit_after_signal, start_accelerator
from cogtune.run_identity import check_output_folder


def main() -> None:
    """Plan, encode, load, train, save."""
    enter("planning")
    invocation = parse_run(__doc__ or "")
    config = invocation.config
    plan = make_full_plan(config)
    check_output_folder(config)
    if invocation.dry_run:
        print(plan.describe(), plan.describe_rungs(), sep="\n")
        return
    accelerator = start_accelerator(plan)
    plan = agree_on_plan(plan, accelerator)
    accelerator.print(plan.describe())
    run = Run(plan, accelerator, encode_data(plan, accelerator))

    card = make_model_card(
        config,
        plan.facts,
        num_clips=len(run.data.train),
        global_batch=plan.global_batch,
        eight_bit=plan.memory.eight_bit,
    )
    model = TrainedModel(
        plan.loading.load(plan.facts),
        plan.facts,
        card,
        export_dtype=plan.dtype,
        on_host=plan.memory.on_host,
        num_updated=plan.memory.num_updated,
        weights_dtype=plan.loading.dtype,
        device=accelerator.device,
        trained=set(plan.trained_names),
    )
    if not run.train(model):
        exit_after_signal(run)
    run.finish(model)
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
