#!/usr/bin/env bash
# Mounts a bucket read-only with gcsfuse and its file cache, on a worker of a pod (Debian or Ubuntu).
#
#   launch/mount_bucket.sh BUCKET FOLDER [CACHE_MB]
#
# Shards that are read are kept on the worker's disk up to CACHE_MB (50000), the least used going first, where a gs:// path
# would have every worker copy all of them (docs/input.md). Does nothing where FOLDER is a mount already. Installs
# gcsfuse where it is missing. launch/tpu_pod.sh calls it on all workers: SETUP="launch/mount_bucket.sh BUCKET FOLDER".
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
asked_for_help "$@"
if [ $# -lt 2 ] || [ $# -gt 3 ]; then
  die "expected BUCKET FOLDER [CACHE_MB]"
fi
bucket=${1#gs://} folder=$2 cache_mb=${3:-50000}

if ! command -v gcsfuse >/dev/null; then
  # shellcheck source=/dev/null
  release=$(. /etc/os-release && echo "$VERSION_CODENAME")
  key=/usr/share/keyrings/cloud.google.asc
  sudo curl --fail --silent --show-error --output "$key" https://packages.cloud.google.com/apt/doc/apt-key.gpg
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$release main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update --quiet
  sudo apt-get install --yes --quiet gcsfuse
fi

if ! mountpoint --quiet "$folder"; then
  sudo mkdir -p "$folder"
  sudo chown "$(id -u)" "$folder"
  # A record is read from the middle of a shard: the cache must take the whole shard then, too.
  gcsfuse -o ro --implicit-dirs --cache-dir="$HOME/.cache/gcsfuse" --file-cache-max-size-mb="$cache_mb" \
    --file-cache-cache-file-for-range-read=true "$bucket" "$folder"
fi
