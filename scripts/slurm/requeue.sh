# Sourced by the job scripts: runs a job step, and requeues the job where slurm says that its time is nearly over.
#
#   run_and_requeue srun ... train/lora.py ...
#
# `#SBATCH --signal=B:USR1@120` sends USR1 to the batch script alone, 120 s before the time limit (or a preemption,
# where the cluster has PreemptParameters=send_user_signal). The trainers get it from here, save and end; the requeued
# job goes on from there (checkpoint.resume=auto). A job that ends by itself, fails, or is cancelled is not requeued.

# Seconds to wait for the checkpoint after USR1; less than the 120 above.
SAVE_SECONDS=${SAVE_SECONDS:-90}

run_and_requeue() {
  local step code asked=""
  trap 'asked=$SECONDS; scancel --signal=USR1 "$SLURM_JOB_ID" || true' USR1
  "$@" &
  step=$!
  while true; do
    code=0
    # In short turns: a trap interrupts `sleep` only once it ends, and `wait` is what returns at a signal.
    wait "$step" || code=$?
    kill -0 "$step" 2>/dev/null || break
    while kill -0 "$step" 2>/dev/null && [ -n "$asked" ] && [ $((SECONDS - asked)) -lt "$SAVE_SECONDS" ]; do
      sleep 1
    done
    [ -z "$asked" ] || ! kill -0 "$step" 2>/dev/null || break
  done
  trap - USR1
  if [ -n "$asked" ]; then
    echo "time is nearly over: the job goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    return 0
  fi
  return "$code"
}
