# Sourced by the training recipes: checks their paths and starts geochat.train.train on every GPU of this machine. With
# --dry_run it starts one process, on any machine, that plans for GPUS × NODES.
#
# Environment:
#   MODEL         LLM folder, LLaVA-1.5 folder, or model folder of geochat (llava-hf layout)        required
#   DATA          instruction file, JSON or JSONL                                                   required
#   IMAGES        folder of its images                                                              required
#   OUTPUT        folder of the run                                                                 required
#   VISION_TOWER  CLIP folder; needed when MODEL neither holds its tower nor names one on this disk
#   PROJECTOR     projector file that replaces the model's own
#   GPUS          processes on this machine (default: those of CUDA_VISIBLE_DEVICES, else its GPUs, or 1)
#   NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several machines: start the script on each of them; OUTPUT must be
#                 a folder that all of them share
#   GLOBAL_BATCH  samples per optimizer step over all GPUs (default: the recipe's)
#   MICRO_BATCH   most samples per GPU at once (default 16); accumulation makes up the rest
#   LAUNCHER      torchrun (default), deepspeed, or python (one process)
#   ZERO          DeepSpeed configuration (default: the recipe's); "none" trains without DeepSpeed

fail() {
    echo "error: $*" >&2
    exit 2
}

need() {  # VARIABLE d|f MEANING
    local value="${!1:-}"
    [ -n "$value" ] || fail "$1 is not set: $3. Example: $1=/path/to/it bash $0"
    if [ "$2" = d ]; then
        [ -d "$value" ] || fail "$1=$value: no such folder ($3)"
    else
        [ -f "$value" ] || fail "$1=$value: no such file ($3)"
    fi
}

# Largest batch per GPU that is at most MICRO_BATCH and divides each GPU's share of the global batch.
micro_batch() {  # GLOBAL PROCESSES MOST
    local share size
    [ $(($1 % $2)) = 0 ] || fail "a global batch of $1 cannot be split over $2 GPUs: set GLOBAL_BATCH to a multiple of $2 (nearest: $(($1 / $2 * $2)) and $(($1 / $2 * $2 + $2)))"
    share=$(($1 / $2))
    for ((size = $3 < share ? $3 : share; size > 1; size--)); do
        [ $((share % size)) = 0 ] && break
    done
    echo "$size"
}

# Processes to start here: one for each GPU that may be used.
count_gpus() {
    local gpus
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        gpus="$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c .)"
    else
        gpus="$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU ' || true)"
    fi
    echo "$((gpus > 0 ? gpus : 1))"
}

launch() {  # GLOBAL_BATCH ZERO_CONFIG FLAGS…
    local global="${GLOBAL_BATCH:-$1}" zero="${ZERO:-$2}" gpus nodes processes micro
    shift 2
    need MODEL d "folder of the model to start from"
    need DATA f "instruction file"
    need IMAGES d "folder of the images it names"
    [ -n "${OUTPUT:-}" ] || fail "OUTPUT is not set: folder of the run. Example: OUTPUT=runs/first bash $0"
    [ -z "${VISION_TOWER:-}" ] || need VISION_TOWER d "CLIP folder"
    [ -z "${PROJECTOR:-}" ] || need PROJECTOR f "projector file"
    gpus="${GPUS:-$(count_gpus)}"
    nodes="${NODES:-1}"
    processes="$((gpus * nodes))"
    if [[ " $* " == *" --dry_run"* && " $* " != *" --dry_run"[\ =][Ff]alse* ]]; then
        LAUNCHER=plan nodes=1
        set -- --plan_gpus "$processes" "$@"
    fi
    [ "$nodes" = 1 ] || [ -n "${MASTER_ADDR:-}" ] || fail "NODES=$nodes: MASTER_ADDR is not set: address of the first machine"
    [ "$nodes" = 1 ] || [ -n "${NODE_RANK:-}" ] || fail "NODES=$nodes: NODE_RANK is not set: number of this machine, from 0"
    micro="$(micro_batch "$global" "$processes" "${MICRO_BATCH:-16}")" || exit 2

    local -a start flags
    case "${LAUNCHER:-torchrun}" in
        torchrun)
            start=(torchrun --nproc_per_node "$gpus" --nnodes "$nodes" --node_rank "${NODE_RANK:-0}"
                --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}"
                -m geochat.train.train) ;;
        deepspeed)
            [ "$nodes" = 1 ] || fail "LAUNCHER=deepspeed starts one machine only: use torchrun for $nodes"
            # Its launcher would ignore CUDA_VISIBLE_DEVICES beside a number of GPUs.
            local which=(--num_gpus "$gpus")
            [ -z "${CUDA_VISIBLE_DEVICES:-}" ] || which=(--include "localhost:$CUDA_VISIBLE_DEVICES")
            start=(env -u CUDA_VISIBLE_DEVICES deepspeed "${which[@]}" --master_port "${MASTER_PORT:-29500}"
                --module geochat.train.train) ;;
        python)
            [ "$((gpus * nodes))" = 1 ] || fail "LAUNCHER=python starts one process: set GPUS=1"
            export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1  # DeepSpeed would look for MPI without them
            export MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}" MASTER_PORT="${MASTER_PORT:-29500}"
            start=(python -m geochat.train.train) ;;
        plan) start=(python -m geochat.train.train) ;;
        *) fail "LAUNCHER=$LAUNCHER: choose torchrun, deepspeed or python" ;;
    esac
    flags=(--model_name_or_path "$MODEL" --data_path "$DATA" --image_folder "$IMAGES" --output_dir "$OUTPUT"
        --global_batch_size "$global" --per_device_train_batch_size "$micro")
    [ -z "${VISION_TOWER:-}" ] || flags+=(--vision_tower "$VISION_TOWER")
    [ -z "${PROJECTOR:-}" ] || flags+=(--pretrain_mm_mlp_adapter "$PROJECTOR")
    [ "$zero" = none ] || flags+=(--deepspeed "$zero")
    exec "${start[@]}" "${flags[@]}" "$@"  # the script's signals are the launcher's
}
