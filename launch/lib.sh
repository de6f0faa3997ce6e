# shellcheck shell=bash
# Shared by the launch scripts: checks, the environment, one srun task per GPU, signals, and requeueing.
# The scripts source this file inside the job that sbatch starts, or on a login node, where they submit themselves.
#
# Settings (environment variables), all optional:
#   BFT_HOME          checkout of bft-megatron; default: the folder that sbatch was called in
#   BFT_COMMAND       the command to call; default: bft-megatron of the image or the checkout's .venv, or else of PATH
#   CONTAINER_IMAGE   image for pyxis (srun --container-image); CONTAINER_MOUNTS: default, the working folder
#   PREPARE=1         pack the data first, in its own CPU job (call the script itself, not through sbatch);
#                     PREPARE_OPTIONS: sbatch options of that job, for example "--partition=cpu --time=4:00:00"
#   PLAN=1            first check whether the layout fits the GPUs (call the script itself, as for PREPARE): takes a minute
#                     on the login node; submits nothing if it does not fit; PLAN_GPU: default h100-80g
#   MAX_REQUEUES      requeues of one job, default 100
#   MAX_FAILURES      failures in a row without a new checkpoint, default 3
#   REQUEUE=0         never requeue: for a chain of jobs, `sbatch --dependency=singleton` several times. It is the default
#                     in a job array (`--array=1-10%1`), whose next task resumes
#   FT_LAUNCHER=1     ft_launcher of nvidia-resiliency-ext, one per node, starts the ranks; FT_OPTIONS: its own options
#
# Exit status: that of the training (of the first rank that failed; 143 if it was cancelled before its first step; 73 if
# another command uses the run's folder, which costs no other job anything); 75 if a cap is reached.

USER_ERROR=2    # bft-megatron: the input is at fault
BLOWN_UP=65     # bft-megatron: gradients, validations or parameters are not finite and do not recover
IN_USE=73       # bft-megatron: another command uses the run's folder, and nothing of it was changed
CAP_REACHED=75  # this script: unfinished, and not to be retried without a person
BY_USR1=138     # a rank that USR1 or TERM ends before its first step, with nothing to save
BY_TERM=143

say() { echo "$(date +%T) ${SLURM_JOB_NAME:-bft}: $*" >&2; }
die() { say "$1"; exit "${2:-$USER_ERROR}"; }

# main RECIPE [sbatch options, on a login node] [KEY=VALUE ...]
main() {
  [ -r "$1" ] || die "cannot read the recipe $1 from $PWD"
  if [ -z "${BFT_COMMAND:-}" ]; then
    BFT_COMMAND=bft-megatron
    if [ -z "${CONTAINER_IMAGE:-}" ] && [ -x "$BFT_HOME/.venv/bin/bft-megatron" ]; then
      BFT_COMMAND=$BFT_HOME/.venv/bin/bft-megatron
    fi
  fi
  read -ra command <<< "$BFT_COMMAND"
  if [ -n "${SLURM_JOB_ID:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then run_job "$@"; else submit "$@"; fi
}

# On a login node: submits this script, after a job that packs the data if PREPARE=1.
submit() {
  local recipe=$1 options=() overrides=() job
  shift
  for word; do
    case $word in -*) options+=("$word") ;; *) overrides+=("$word") ;; esac
  done
  if [ "${PLAN:-0}" = 1 ]; then
    "${command[@]}" plan "$recipe" "${overrides[@]}" --gpu "${PLAN_GPU:-h100-80g}" \
      --nodes "$(sbatch_value nodes "${options[@]}")" \
      --gpus-per-node "$(sbatch_value ntasks-per-node "${options[@]}")" || die "not submitted, by the plan above" $?
  fi
  if [ "${PREPARE:-0}" = 1 ]; then
    local prepare=() more=()
    compose_container
    prepare=(srun "${container[@]}" "${command[@]}" prepare "$recipe" "${overrides[@]}")
    read -ra more <<< "${PREPARE_OPTIONS:-}"
    job=$(sbatch --parsable --job-name=bft-prepare --output=%x-%j.out --nodes=1 --ntasks=1 "${more[@]}" \
      --wrap "$(printf '%q ' "${prepare[@]}")") || die "the data job was not accepted" 1
    say "job ${job%%;*} prepares the data"
    options+=("--dependency=afterok:${job%%;*}" --kill-on-invalid-dep=yes)
  fi
  PREPARE=0 PLAN=0 exec sbatch "${options[@]}" "$BFT_SCRIPT" ${BFT_TAKES_RECIPE:+"$recipe"} "${overrides[@]}"
}

# sbatch_value NAME OPTIONS...: prints the value of --NAME=VALUE, from the options or else the script's #SBATCH lines.
sbatch_value() {
  local name=$1 word value
  shift
  value=$(sed -n "s/^#SBATCH --$name=//p" "$BFT_SCRIPT")
  for word; do case $word in "--$name="*) value=${word#*=} ;; esac; done
  echo "$value"
}

# Runs inside the job.
run_job() {
  [ "${PREPARE:-0}${PLAN:-0}" = 00 ] ||
    die "with PREPARE=1 or PLAN=1 call launch/*.sh itself, not through sbatch: they come before the job"
  step='' asked=0 cancelled=0
  # The time limit is near: Slurm signals only this script (--signal=B:USR1). A signal that comes before srun's tasks
  # exist is lost, so it is sent again until they end; they save once.
  trap 'asked=1; tell_ranks' USR1
  # scancel and the time limit signal the ranks and this script, preemption only the ranks.
  trap 'cancelled=1' TERM
  tasks=${SLURM_NTASKS_PER_NODE:?ask for --ntasks-per-node, as many as a node has GPUs}
  attempt=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
  on_every_node=(srun --overlap "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
  set_environment
  compose_container
  preflight "$@"
  if [ -e "$RUN/done" ]; then
    say "$RUN is done"
    exit 0
  fi
  [ "$cancelled" = 0 ] || exit 143
  [ "$asked" = 0 ] || go_on "asked to stop before the ranks started"
  compose_step "$@"
  say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, $SLURM_NTASKS ranks: $RUN"
  "${srun_line[@]}" &
  step=$!
  [ "$asked" = 0 ] || tell_ranks
  # `wait` returns early at every signal; bash remembers the status of a process that has ended.
  while wait "$step"; kill -0 "$step" 2> /dev/null; do :; done
  wait "$step"
  status=$?
  [ -z "${teller:-}" ] || kill "$teller" 2> /dev/null
  conclude
}

tell_ranks() {
  if [ -z "$step" ] || [ -n "${teller:-}" ]; then return; fi
  (
    trap - USR1 TERM
    while kill -USR1 "$step" 2> /dev/null; do sleep 20; done
  ) &
  teller=$!
}

# After the ranks have ended: finishes, requeues or gives up.
conclude() {
  local who=srun why
  # srun's status is the largest of all tasks, including those that it killed; the first failure's status is in a file.
  if [ -s "$RUN/launch/$attempt" ]; then read -r status who < "$RUN/launch/$attempt"; fi
  if [ "$status" = 0 ]; then
    [ ! -e "$RUN/done" ] || exit 0
    why=$(head -n 1 "$RUN/unfinished" 2> /dev/null) || true
    [ "${why:-running}" != running ] || die "the ranks ended well and left $RUN neither done nor saved" 1
    [ "$cancelled" = 0 ] || die "cancelled: saved; submit again to go on" 0
    go_on "$why"
  fi
  if [ "$status" = "$IN_USE" ]; then rm -f "$RUN/launch/$attempt"; die "another command uses $RUN" "$status"; fi
  rm -f "$RUN/lease/$attempt".*  # of a rank 0 that was killed
  say "$who ended with status $status; $RUN/logs holds what each rank printed"
  [ "$cancelled" = 0 ] || exit "$status"
  case $status in
    "$USER_ERROR" | "$BLOWN_UP")
      # The other tasks of the array would fail in the same way.
      [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"
      die "not tried again: starting anew would meet the same" "$status"
      ;;
    "$BY_USR1") [ "$asked" = 0 ] || go_on "asked to stop before the first step" ;;
    "$BY_TERM")  # preemption, or srun after the loss of a node: no failure of the run
      leave_to_slurm
      go_on "ended from outside before the first step" "$status"
      ;;
  esac
  count_failure
  leave_to_slurm
  go_on "status $status" "$status"
}

# Waits if a node is lost: Slurm requeues the job itself once it has noticed. If a requeue is requested before that, some
# releases lose count of the job's GPUs and never start it again.
leave_to_slurm() {
  timeout 60 "${on_every_node[@]}" true 2> /dev/null && return
  say "a node does not answer: waiting for Slurm to take it out"
  sleep 600 &
  wait $!
  [ "$cancelled" = 0 ] || exit "$status"  # Slurm has requeued the job and ends this script
}

# Counts the failures in a row without a new checkpoint, over the restarts of this job.
count_failure() {
  local newest failures=0 before='' file=$RUN/launch/failures.$SLURM_JOB_ID
  newest=$(cat "$RUN/checkpoints/latest_checkpointed_iteration.txt" 2> /dev/null || echo none)
  [ ! -s "$file" ] || read -r before failures < "$file"
  [ "$before" = "$newest" ] || failures=0
  failures=$((failures + 1))
  echo "$newest $failures" > "$file"
  [ $failures -lt "${MAX_FAILURES:-3}" ] || die "failed $failures times without a new checkpoint" $CAP_REACHED
}

# go_on WHY [STATUS]: requeues the job, unless a chain of jobs continues it.
go_on() {
  if [ "${REQUEUE:-1}" = 0 ] || [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    die "unfinished ($1): left to the next job of the chain" "${2:-0}"
  fi
  [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_REQUEUES:-100}" ] ||
    die "unfinished ($1) after ${SLURM_RESTART_COUNT:-0} requeues" $CAP_REACHED
  say "unfinished ($1): requeue"
  scontrol requeue "$SLURM_JOB_ID" || die "requeue refused; sites without it: sbatch --array=1-10%1" $CAP_REACHED
  sleep 300 &  # until Slurm ends this script
  wait $!
  exit $CAP_REACHED
}

# Checks every node, in the container if there is one; sets RUN, the folder of the run.
preflight() {
  local line status=0
  line=$("${on_every_node[@]}" "${container[@]}" "${command[@]}" \
    preflight --world "$SLURM_NTASKS" --per-node "$tasks" "$@") || status=$?
  case $status in
    0) ;;
    "$USER_ERROR" | "$IN_USE") die "not started, by the checks above" "$status" ;;
    *)
      # If the first start fails, the set-up is at fault: report it at once. Later it is a node or a preemption.
      if [ "$cancelled" = 1 ] || { [ "$status" -lt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; }; then
        die "not started: status $status of srun" "$status"
      fi
      go_on "not started: status $status of srun"
      ;;
  esac
  RUN=$(sed -n 's/^run: //p' <<< "$line")
  mkdir -p "$RUN/launch" || die "cannot write to $RUN"
}

# Sets container, srun's flags for pyxis.
compose_container() {
  container=()
  [ -n "${CONTAINER_IMAGE:-}" ] || return 0
  container=(
    "--container-image=$CONTAINER_IMAGE"
    "--container-mounts=${CONTAINER_MOUNTS:-$PWD:$PWD}"  # the same path inside, so recipe, data and output are found
    "--container-workdir=$PWD"
    --no-container-mount-home  # otherwise packages of ~/.local take precedence over the image's own
  )
}

# Sets srun_line, the command that starts the ranks.
compose_step() {
  local count=$SLURM_NTASKS each=$tasks
  if [ "${FT_LAUNCHER:-0}" = 1 ]; then count=$SLURM_JOB_NUM_NODES each=1; fi
  srun_line=(
    srun
    "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$count" "--ntasks-per-node=$each"
    # The node's cores are divided evenly and not bound within the step: data workers and NCCL's threads need some too.
    "--cpus-per-task=$((SLURM_CPUS_ON_NODE / each > 0 ? SLURM_CPUS_ON_NODE / each : 1))" --cpu-bind=none
    --kill-on-bad-exit=1  # otherwise the others wait for a lost rank until their collective times out
    --wait=300            # seconds after the first rank's exit until srun kills those that never end
    "${container[@]}"
    bash -c "$RANK_SCRIPT" rank "$RUN/launch/$attempt"
  )
  if [ "${FT_LAUNCHER:-0}" = 1 ]; then
    local more=()
    read -ra more <<< "${FT_OPTIONS:-}"
    srun_line+=(
      ft_launcher "--nnodes=$SLURM_JOB_NUM_NODES" "--nproc-per-node=$tasks" --rdzv-backend=c10d
      "--rdzv-endpoint=$MASTER_ADDR:$MASTER_PORT" "${more[@]}" -m bft_megatron train "$@"
    )
  else
    srun_line+=("${command[@]}" train "$@")
  fi
}

# Script of an srun task, called with FILE COMMAND.... Megatron and torch read RANK etc., not Slurm's variables. Slurm
# signals every process of the step, so this shell ignores the signals that the rank handles; the rank starts with them
# blocked until it listens (`bft_megatron.processes.signals`). FILE keeps the status of the first failure.
# shellcheck disable=SC2016  # expanded by the task's own shell
RANK_SCRIPT='
trap "" USR1 TERM
set -C
file=$1
shift
if [ "$1" != ft_launcher ]; then
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
  export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*}
fi
env --default-signal=USR1,TERM --block-signal=USR1,TERM "$@"
status=$?
[ $status = 0 ] || { echo "$status rank ${RANK:-s} on $(uname -n)" > "$file"; } 2> /dev/null
exit $status'

set_environment() {
  # The rendezvous of the ranks. The port depends on the job, so that two jobs on a node do not collide.
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
  export MASTER_ADDR MASTER_PORT
  # One hardware queue: kernels start in the order of their launch, which overlapped communication relies on.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  # Packed rows change shapes; expandable segments fragment less, and our layouts fill most of 80 GB.
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
  # Tensors in flight are kept by reference, not by stream, so their memory is free as soon as they are not used.
  export TORCH_NCCL_AVOID_RECORD_STREAMS=${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}
  # NVLink SHARP takes GPU memory for each communicator; switching it off leaves that to activations.
  export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
  # The layer norms leave some SMs to NCCL; otherwise overlapped communication waits for them.
  export NVTE_FWD_LAYERNORM_SM_MARGIN=${NVTE_FWD_LAYERNORM_SM_MARGIN:-16}
  export NVTE_BWD_LAYERNORM_SM_MARGIN=${NVTE_BWD_LAYERNORM_SM_MARGIN:-16}
  # When a collective times out, each rank dumps its recent collectives.
  export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
  export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
  # Keeps the ranks from asking the hub; weights come from a folder or the cache (`hf download` before the job).
  export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
  # Tokenizer threads can deadlock with forked data workers.
  export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
  # Compiled kernels go to the node's own disk: thousands of small files, written by every rank at once.
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$SLURM_JOB_ID}
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor-$SLURM_JOB_ID}
  # A rank gets only a share of the node's cores.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
  # Output is in the log at once, even if a rank is killed.
  export PYTHONUNBUFFERED=1
}
