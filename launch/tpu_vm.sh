#!/usr/bin/env bash
# Trains on a Cloud TPU slice, from nothing to nothing: queued resource, installation, run on all
# workers, logs, deletion.
#
#   bash launch/tpu_vm.sh COMMAND [--dry-run] [training arguments]
#
#   create     asks for the slice and waits until it is there (hours, when there is none free)
#   install    copies this repository to all workers, installs it, mounts bucket and data disk
#   run        trains on all workers and shows what they say; ends as they end
#   logs       follows a run that was started before
#   stop       asks the run to save and end
#   delete     gives the slice back; nothing costs anything any more but disk and bucket
#   up         create, install, run, and again after each preemption; then delete
#
# What is set in the environment (with what it is otherwise):
#   PROJECT (gcloud's), ZONE (us-west4-a), NAME (ovseg), TYPE (v5litepod-16),
#   RUNTIME (v2-alpha-tpuv5-lite; v4: tpu-ubuntu2204-base, v5p: v2-alpha-tpuv5, v6e:
#   v2-alpha-tpuv6e), SPOT (true: cheaper, may be taken away), BUCKET (for --workdir; a bucket with
#   hierarchical namespace, mounted at ~/bucket), DATA_DISK (none; a disk with the records, mounted
#   read-only at /mnt/data), ATTEMPTS (50, of up), POLL (30, seconds between questions for the slice).
#
#   BUCKET=my-bucket DATA_DISK=cc4m bash launch/tpu_vm.sh up \
#       --config=configs/vitb.py --config.data.records.dir=/mnt/data/cc4m
# shellcheck disable=SC2016  # what stands in single quotes is for the shells of the workers
set -euo pipefail

NAME=${NAME:-ovseg}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
SPOT=${SPOT:-true}
BUCKET=${BUCKET:-}
DATA_DISK=${DATA_DISK:-}
ATTEMPTS=${ATTEMPTS:-50}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=false
arguments=()
POLL=${POLL:-30}
# Exit code of `create` where a slice was promised and then taken away: asking again may help.
readonly LOST=75

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Every command that touches anything goes through here, so that --dry-run shows them all.
do_it() {
    if $dry_run; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

gcloud_tpu() {
    do_it gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}
}

on_all() {
    gcloud_tpu tpu-vm ssh "$NAME" --worker=all --command="$1"
}

state() {
    gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
        ${PROJECT:+--project="$PROJECT"} --format='value(state.state)' 2>/dev/null || echo ABSENT
}

create() {
    local spot=() now before='' absent=0
    if [ "$SPOT" = true ]; then spot=(--spot); fi
    if ! $dry_run && now=$(state) && [ "$now" != ABSENT ]; then
        echo "$NAME was asked for before, and is $now"
    else
        gcloud_tpu queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
            --runtime-version="$RUNTIME" ${spot[@]+"${spot[@]}"} ||
            die "gcloud refused the request for $NAME (its message is above)"
    fi
    if $dry_run; then
        echo "# wait until this says ACTIVE:"
        gcloud_tpu queued-resources describe "$NAME" --format='value(state.state)'
        return
    fi
    while now=$(state) && [ "$now" != ACTIVE ]; do
        [ "$now" = "$before" ] || echo "$(date +%H:%M) $NAME: $now"
        before=$now
        # One answer that does not come may be the network's fault.
        if [ "$now" = ABSENT ]; then absent=$((absent + 1)); else absent=0; fi
        case $now-$absent in
        FAILED-* | SUSPENDED-* | ABSENT-5)
            echo "the request for $NAME ended as $now; see:" \
                "gcloud compute tpus queued-resources describe $NAME --zone=$ZONE" >&2
            exit $LOST
            ;;
        esac
        sleep "$POLL"
    done
}

install() {
    local archive=/tmp/ovseg_jax.tar.gz
    do_it git -C "$root" archive --format=tar.gz --output="$archive" HEAD
    gcloud_tpu tpu-vm scp "$archive" "$NAME:/tmp/" --worker=all
    # The images of TPU machines bring Python 3.10; uv brings its own.
    on_all 'mkdir -p ~/ovseg_jax && tar -xzf /tmp/ovseg_jax.tar.gz -C ~/ovseg_jax &&
curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv python install 3.12 &&
cd ~/ovseg_jax && PYTHON=$(~/.local/bin/uv python find 3.12) bash launch/environment.sh tpu'
    if [ -n "$BUCKET" ]; then mount_bucket; fi
    if [ -n "$DATA_DISK" ]; then mount_disk; fi
}

mount_bucket() {
    on_all 'command -v gcsfuse >/dev/null || {
curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg |
sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null &&
echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc]" \
"https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
sudo tee /etc/apt/sources.list.d/gcsfuse.list && sudo apt-get update && sudo apt-get install -y gcsfuse; }'
    on_all "mkdir -p ~/bucket && { mountpoint -q ~/bucket || gcsfuse --implicit-dirs $BUCKET ~/bucket; }"
}

mount_disk() {
    do_it gcloud alpha compute tpus tpu-vm attach-disk "$NAME" --zone="$ZONE" \
        ${PROJECT:+--project="$PROJECT"} --disk="$DATA_DISK" --mode=read-only
    on_all "sudo mkdir -p /mnt/data && { mountpoint -q /mnt/data ||
sudo mount -o ro,noload /dev/disk/by-id/google-persistent-disk-1 /mnt/data; }"
}

workdir() {
    if [ -n "$BUCKET" ]; then echo "\$HOME/bucket/runs/$NAME"; else echo "\$HOME/runs/$NAME"; fi
}

# The run goes on when the connection breaks: the terminal only follows its log.
run() {
    local words script
    words=$(printf '%q ' ${arguments[@]+"${arguments[@]}"})
    script="cd ~/ovseg_jax
.venv/bin/python -m ovseg_jax.main --workdir=$(workdir) $words &
echo \$! >~/run_pid
wait \$!
echo \$? >~/exit_code"
    on_all "rm -f ~/exit_code ~/run.log; cat >~/run.sh <<'END_OF_RUN'
$script
END_OF_RUN
setsid nohup bash ~/run.sh >~/run.log 2>&1 </dev/null & sleep 1"
    logs
}

logs() {
    # Ends when every worker's run has ended.
    on_all 'tail -n +1 -F ~/run.log & follower=$!
while [ ! -e ~/exit_code ]; do sleep 5; done
kill $follower; exit $(cat ~/exit_code)'
}

stop() {
    on_all 'kill -TERM $(cat ~/run_pid)'
}

delete() {
    gcloud_tpu queued-resources delete "$NAME" --force --quiet
}

up() {
    [ -n "$BUCKET" ] || die "up needs BUCKET: what lies on the machines is lost with them"
    local attempt code codes status again=()
    if $dry_run; then again=(--dry-run); fi
    for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
        # Each in a shell of its own: in a condition, `set -e` has no say in functions.
        status=0
        bash "$0" create ${again[@]+"${again[@]}"} || status=$?
        if [ "$status" -ne 0 ] && [ "$status" -ne $LOST ]; then exit "$status"; fi
        if [ "$status" -eq 0 ] && bash "$0" install ${again[@]+"${again[@]}"} &&
            bash "$0" run ${again[@]+"${again[@]}"} ${arguments[@]+"${arguments[@]}"}; then
            delete
            return
        fi
        # No answer from a machine that is gone: then it was taken away. Of the others only the one
        # that failed by itself has a code that says so.
        codes=$(gcloud_tpu tpu-vm ssh "$NAME" --worker=all --command='cat ~/exit_code' 2>/dev/null) ||
            codes=none
        if code=$(grep -m 1 -xE '1|2|130' <<<"$codes"); then
            echo "exit code $code: not tried again. The slice is still there, and costs:" \
                "bash $0 delete" >&2
            exit "$code"
        fi
        echo "attempt $attempt ended (exit codes: ${codes//$'\n'/ }): giving the slice back, once more"
        delete || true
    done
    die "$ATTEMPTS attempts have ended; the checkpoints are in the bucket"
}

command=${1:-}
shift || true
for argument in "$@"; do
    case $argument in
    --dry-run) dry_run=true ;;
    --workdir=*) die "the workdir is $(workdir), from BUCKET and NAME" ;;
    *) arguments+=("$argument") ;;
    esac
done
case $command in
create | install | run | logs | stop | delete | up) "$command" ;;
*) die "say one of create, install, run, logs, stop, delete, up; see the head of $0" ;;
esac
