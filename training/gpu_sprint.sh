#!/bin/bash
# Pretrain AudioMAE++-Tiny and AxLSTM-Tiny on a GPU lent for minutes, then measure:
#
#     training/gpu_sprint.sh PACK OUT MINUTES
#
# PACK is a folder of training.corpora.pack. All of it ends within MINUTES. Whenever it is stopped, OUT holds what was
# done a minute before, in at most 8 files of at most 15 MB, which is what the device tool returns:
#
#     audiomaepp.tar.aa, .ab, axlstm.tar.aa    config.json, model.safetensors and log.jsonl of each family, as a tar
#                                              in pieces; unpack with: cat OUT/axlstm.tar.* | tar x
#     sprint.log                               what was printed, and the benchmarks
#
# Limits of the device tool (its README): 15 minutes of device time, starts and transfers included; 10 minutes per
# command; 64 MiB (67.1 MB) of working tree per call. The repository takes 46 MB of it, so a call has room for one part
# of 20 MB, or 18 MB and the wheels. The machine stays for 30 s after a call, so prepare all, then call without a pause.
#
# Before, on your own machine, in the repository's root (a quarter of an hour on two cores; 45 MB hold all held-out
# records, speech and sounds, and each further 20 MB five hours of music):
#
#     S=~/hear-training/corpus/shards
#     python -m training.corpora.pack $S/held_out $S/speech $S/sounds $S/music -o /tmp/pack --part-mb 18 --max-mb 72
#     printf '/.part/\n/.whl/\n' >> .git/info/exclude
#     python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#         --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
#         --platform manylinux2014_x86_64 -d .whl soundfile==0.14.0 soxr==1.1.0 cffi==2.1.1 tensorboardX==2.6.5
#
# hear_encoders imports soundfile and soxr, benchmarks.pretrain also tensorboardX: these 1.9 MB of wheels bring them.
# Without them this script puts empty modules in the place of soundfile and soxr, with which training works and the
# benchmarks may not.
#
# For each part N (before each call: rm -rf .part; mkdir .part; cp /tmp/pack/part-00N.* .part/), a call of `run` with
# timeout_s 60 and carry [".part"], at part 0 [".part", ".whl"]:
#
#     mkdir -p /tmp/pack && cp .part/* /tmp/pack/ && { cp -r .whl /tmp/whl 2>/dev/null; ls -l /tmp/pack; }
#
# Then at once, with carry [] and timeout_s 60 more than MINUTES, the sprint; status says how much time is left, and
# MINUTES should leave two minutes of it:
#
#     training/gpu_sprint.sh /tmp/pack $OUT 8
#
# At the end, give_back. About 900 s in all: 100 to start, 4 x 45 to send, 480 to run, 60 to return the files.
#
# Variables: AUDIOMAEPP_PERCENT and AXLSTM_PERCENT of the time (50 and 35; the rest measures), PYTHON, DEVICE, and
# AUDIOMAEPP and AXLSTM, the arguments of training.gpu_sprint for each family. In AXLSTM, accumulate=4 divides the
# batch, whose activations would not fit into 80 GB (more is tried if it still does not fit), and compile=false, since
# compiling its cell may take longer than all of this (over four minutes on a CPU; not tried on a GPU). For the decoder
# of the paper, which costs four times as much a clip, name audiomaepp_tiny.yaml. Add start_from=hear_audiomaepp/weights
# to go on from the bundled weights.

set -u
[ $# = 3 ] || { echo "usage: $0 PACK OUT MINUTES" >&2; exit 2; }
begin=$(date +%s)
pack=$1 out=$2
total_s=$(awk "BEGIN { print int(60 * $3) }")
: "${PYTHON:=python3}" "${DEVICE:=cuda}" "${AUDIOMAEPP_PERCENT:=50}" "${AXLSTM_PERCENT:=35}"
: "${AUDIOMAEPP:=--config training/configs/audiomaepp_tiny_cpu.yaml}"
: "${AXLSTM:=--config training/configs/axlstm_tiny.yaml accumulate=4 compile=false}"
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
work=$(mktemp -d)
log=$work/sprint.log
export PYTHONUNBUFFERED=1 PYTHONPATH="$work/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"

left_s() { echo $((begin + total_s - $(date +%s))); }

# Copy what there is to OUT, each file whole or not at all.
copy_out() {
    for family in audiomaepp axlstm; do
        if [ -e "$work/$family/config.json" ]; then
            rm -rf "$work/pieces" && mkdir "$work/pieces"
            tar c -C "$work/$family" config.json model.safetensors $(cd "$work/$family" && ls log.jsonl 2> /dev/null) |
                split -b 15000000 - "$work/pieces/$family.tar." && mv -f "$work/pieces/"* "$out/"
        fi
    done
    cp "$log" "$work/copy" && mv -f "$work/copy" "$out/sprint.log"
}

# Run a command for at most so many seconds, less where less time is left.
step() {
    local limit=$1 left code
    shift
    left=$(($(left_s) - 5))
    [ "$left" -lt "$limit" ] && limit=$left
    { [ "$limit" -lt 10 ] || [ -e "$work/stop" ]; } && { echo "no time left for: $*"; return 0; }
    echo "== $(($(date +%s) - begin)) s: $*"
    timeout -k 30 "$limit" "$@" &
    echo $! > "$work/pid"
    wait $!
    code=$?
    echo "== $(($(date +%s) - begin)) s: exit code $code"
}

# Training ends by its own clock; 20 s later it is stopped.
train() {
    local family=$1 seconds=$2
    shift 2
    step $((seconds + 20)) "$PYTHON" -m training.gpu_sprint "$@" --pack "$pack" --out "$work/$family" \
        --device "$DEVICE" --minutes "$(awk "BEGIN { print $seconds / 60 }")"
}

sprint() {
    if ls /tmp/whl/*.whl > /dev/null 2>&1; then
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" /tmp/whl/*.whl
    fi
    if ! "$PYTHON" -c "import soundfile, soxr"; then
        mkdir -p "$work/site"
        echo "class LibsndfileError(Exception): pass
class SoundFile: pass" > "$work/site/soundfile.py"
        echo "class ResampleStream: pass" > "$work/site/soxr.py"
    fi
    # Arguments are words without spaces, so they are split on purpose.
    train audiomaepp $((total_s * AUDIOMAEPP_PERCENT / 100)) $AUDIOMAEPP
    train axlstm $((total_s * AXLSTM_PERCENT / 100)) $AXLSTM
    step 60 "$PYTHON" -m benchmarks.embed --device "$DEVICE" --seconds 10 --batch 64 \
        --presets audiomaepp_tiny axlstm_tiny audiomaepp_base axlstm_base
    step 90 "$PYTHON" -m benchmarks.pretrain --device "$DEVICE" batch_size=256 precision=bfloat16 \
        --configs audiomaepp_tiny axlstm_tiny audiomaepp_base axlstm_base
    step 90 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_embedder.py tests/test_stream.py -k cuda
}

: > "$log"
sprint >> "$log" 2>&1 &
running=$!
# Asked to stop: let the current step save, and skip the others.
trap 'touch "$work/stop"; kill -TERM "$(cat "$work/pid")" 2> /dev/null' TERM INT
copied=$(date +%s)
while kill -0 $running 2> /dev/null && [ "$(left_s)" -gt 0 ]; do
    sleep 1
    if [ $(($(date +%s) - copied)) -ge 20 ]; then
        copy_out
        copied=$(date +%s)
    fi
done
copy_out
tail -n 60 "$log"
ls -l "$out"
rm -rf "$work"
