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
  local step code=0 asked="" stopped
  # A run that a signal ended makes this file, on the file system that all nodes share.
  export COGTUNE_STOPPED="$SLURM_SUBMIT_DIR/.cogtune-stopped-$SLURM_JOB_ID"
  rm -f "$COGTUNE_STOPPED"
  trap 'asked=${asked:-$SECONDS}; scancel --signal=USR1 "$SLURM_JOB_ID" || true' USR1
  "$@" &
  step=$!
  wait "$step" || code=$? # also returns when USR1 came
  [ -n "$asked" ] || return "$code"
  while kill -0 "$step" 2>/dev/null && ((SECONDS - asked < SAVE_SECONDS)); do sleep 1; done
  stopped=$([ -e "$COGTUNE_STOPPED" ] && echo yes || true)
  rm -f "$COGTUNE_STOPPED"
  if [ -z "$stopped" ] && ! kill -0 "$step" 2>/dev/null; then # it came to its end, or failed, in the last moments
    wait "$step" && code=0 || code=$?
    return "$code"
  fi
  echo "time is nearly over: the job goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
}
