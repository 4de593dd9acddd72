#!/usr/bin/env bash
# Every number of the training step on this machine's GPUs, into benchmarks/results/step_<device>.json,
# and of evaluation, into eval_<device>.json.
#
#   pip install -e '.[cuda,torch]'       # JAX and PyTorch, both for CUDA
#   benchmarks/gpu.sh                    # about 40 minutes on one GPU; all sections below
#   benchmarks/gpu.sh peer batch         # some of them
#   TINY=1 benchmarks/gpu.sh             # toy models, to try the script itself, on a CPU too
#
# A case that does not fit into the memory is said and left out. PYTHON=... chooses the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
device=$("$python" -c 'import jax; print(jax.devices()[0].device_kind.lower().replace(" ", "_"))') ||
    exit 1
tiny=() batch=2048 peer_batch=1024
if [[ -n ${TINY:-} ]]; then
    tiny=(--tiny --tokens 32 --rounds 2 --steps 1) batch=16 peer_batch=16 device=${device}_tiny
fi
out=benchmarks/results/step_$device.json
failed=0

step() {
    echo "== $*"
    "$python" benchmarks/step.py "$@" "${tiny[@]}" --out "$out"
    local code=$?
    ((code == 0 || code == 3)) || failed=1  # 3: does not fit into the memory
    return $code
}

# The same CLIP in PyTorch: at equal tokens, and against captions cut to 32.
peer() {
    step --method clip --tower ViT-B/32 --batch "$peer_batch" --peer
    step --method clip --tower ViT-B/32 --batch "$peer_batch" --peer --tokens 32
    step --method clip --tower ViT-B/16 --batch $((peer_batch / 2)) --peer
}

# Larger and larger until it does not fit.
batch() {
    local method size
    for method in clip declip; do
        for size in 1 2 4 8; do
            step --method $method --tower ViT-B/32 --batch $((size * batch)) || break
        done
    done
}

towers() {
    local method tower
    for method in clip declip; do
        for tower in ViT-B/16 RN50; do
            step --method $method --tower $tower --batch $((batch / 2))
        done
    done
}

methods() {
    local method
    for method in clip slip filip declip defilip alip; do
        step --method $method --tower ViT-B/32 --batch $((batch / 2))
    done
}

# What the switches are worth; cuDNN's attention is for GPUs.
variants() {
    local cudnn=(--variant model.attention=cudnn --variant model.attention=cudnn,model.scan=False)
    [[ $device == *cpu* ]] && cudnn=()
    local tower
    for tower in ViT-B/32 ViT-B/16; do
        step --method clip --tower $tower --batch $((batch / 2)) --variant "" \
            --variant model.scan=False "${cudnn[@]}" --variant model.remat=dots \
            --variant model.remat=full --variant microbatches=2
    done
}

# Zero-shot evaluation of ImageNet's size beside the forward pass.
evaluation() {
    local size=(--images 50000 --classes 1000 --prompts 80 --batch 512 --rounds 2)
    [[ -n ${TINY:-} ]] && size=(--tiny --classes 10 --rounds 1)
    "$python" benchmarks/eval.py "${size[@]}" --out "benchmarks/results/eval_$device.json" || failed=1
}

sections=("$@")
(($#)) || sections=(peer batch towers methods variants evaluation)
for section in "${sections[@]}"; do
    case $section in
        peer | batch | towers | methods | variants | evaluation) $section ;;
        *) echo "error: $section is not a section: peer batch towers methods variants evaluation" >&2; exit 2 ;;
    esac
done
echo "Results: $out"
exit $failed
