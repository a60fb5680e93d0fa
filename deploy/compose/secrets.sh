#!/usr/bin/env bash
# Makes every secret of compose.yaml, 256 random bits each, in secrets/ beside it or in the folder named.
# Refuses to touch what is there: a new password would not be the one that the database was made with.
set -euo pipefail

folder="${1:-"$(dirname "$0")/secrets"}"
(umask 077 && mkdir "$folder")

# The folder keeps the machine's other users out. Its files are read in containers, by users that are not its owner.
umask 022
for name in ray_token teacher_key postgres_password grafana_password; do
  od --address-radix=n --format=x1 --read-bytes=32 /dev/urandom | tr -d ' \n' > "$folder/$name"
done
printf 'POTSTILL_DATABASE=postgresql+psycopg://potstill:%s@postgres/potstill\n' "$(cat "$folder/postgres_password")" \
  > "$folder/database.env"
chmod 600 "$folder/database.env" # read by compose itself
