#!/bin/sh
# The benchmark on one GPU, in under nine minutes:
#
#     experiments/benchmark_gpu.sh [DIR]
#
# With TINY=1 every size is tiny, to try the script on a CPU. What there is no time for is left out,
# and named in the output. Results go to DIR (runs/benchmark-gpu), a directory for each precision.
set -eu
cd "$(dirname "$0")/.."
out=${1:-runs/benchmark-gpu}
against=torch,torch-compile,torch-cudagraph,seeds-together
cifar=cifar_resnet20,cifar_resnet56,cifar_resnet110
cifar_sizes="--image-size 32 --batch-size 128"
imagenet=resnet50
imagenet_sizes="--image-size 224 --batch-size 256"
total=480
if [ "${TINY:-}" = 1 ]; then
    cifar=cifar_resnet8,cifar_resnet10
    cifar_sizes="--image-size 8 --batch-size 8"
    imagenet=resnet18
    imagenet_sizes="--image-size 32 --batch-size 8"
fi
began=$(date +%s)

# compare SHARE DIR ARGUMENTS...: with a SHARE, in percent, of the time that is left.
compare() {
    seconds=$((($1 * (total - $(date +%s) + began)) / 100))
    directory=$out/$2
    shift 2
    # Where ours fails the others are still worth their time.
    python experiments/benchmark.py --against "$against" --rounds 5 --seconds "$seconds" \
        --out "$directory" "$@" || echo "benchmark.py ended with exit status $?" >&2
}

# shellcheck disable=SC2086
{
    compare 30 imagenet-bfloat16 --models "$imagenet" $imagenet_sizes --precision bfloat16
    compare 50 cifar-float32 --models "$cifar" $cifar_sizes --precision float32
    compare 95 cifar-bfloat16 --models "$cifar" $cifar_sizes --precision bfloat16
}
