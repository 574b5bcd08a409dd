#!/bin/sh
# A worker of a Kubernetes training job: an SSH server for horovodrun, without root.
# The operator mounts the keys: a key pair shared by all pods of the job.
set -eu

keys=${1:-/home/trainer/.ssh}
work=$(mktemp -d)
ssh-keygen -q -t ed25519 -N '' -f "$work/host_key"
cat > "$work/sshd_config" <<CONFIG
Port ${SSH_PORT:-2222}
HostKey $work/host_key
PidFile $work/sshd.pid
AuthorizedKeysFile $keys/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
# The mounted secret belongs to root; the pod's security settings decide who may read it.
StrictModes no
# Pass the image's environment, such as NCCL settings, to the processes that horovodrun starts.
SetEnv PATH=$PATH
PermitUserEnvironment no
CONFIG
exec "$(command -v sshd || echo /usr/sbin/sshd)" -D -e -f "$work/sshd_config"
