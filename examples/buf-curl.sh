#!/usr/bin/env bash
# Calls Embed, Search and Classify of a running emberpc server with `buf curl`, or with grpcurl if it is installed.
#
#   examples/buf-curl.sh [HOST:PORT]
#
# The server answers reflection, so neither needs the .proto files. `buf` is in the dev extra (package buf-bin).
set -euo pipefail
address=${1:-localhost:50051}
root=$(cd "$(dirname "$0")/.." && pwd)

call() { # METHOD JSON
  echo "> $1 $2"
  if command -v grpcurl >/dev/null; then
    grpcurl -plaintext -d "$2" "$address" "$1"
  else
    PATH="$root/.venv/bin:$PATH" buf curl --protocol grpc --http2-prior-knowledge -d "$2" "http://$address/$1"
  fi
}

collection=curl-example-$$
trap 'call emberpc.v1.IndexService/DeleteCollection "{\"name\": \"$collection\"}" >/dev/null' EXIT

# Vectors travel as bytes, which JSON shows in base64; `dimensions` and `usages` are readable as they are.
call emberpc.v1.EmbeddingService/Embed '{"texts": ["hello world"]}' | cut -c1-160
call emberpc.v1.IndexService/CreateCollection "{\"collection\": {\"name\": \"$collection\", \"model\": \"${MODEL:-minilm}\"}}"
call emberpc.v1.IndexService/UpsertRecords "{\"collection\": \"$collection\", \"records\": [
  {\"id\": \"a\", \"text\": \"a kitten asleep on the sofa\", \"metadata\": {\"lang\": \"en\"}},
  {\"id\": \"b\", \"text\": \"interest rates rose again\"}]}"
call emberpc.v1.IndexService/Search "{\"collection\": \"$collection\", \"queries\": [{\"text\": \"a sleeping pet\"}], \"top_k\": 1}"
# A server without a classifier refuses this one; the rest of the example has worked all the same.
call emberpc.v1.ClassificationService/Classify '{"texts": ["write a record to the log file"], "top_k": 2}' ||
  echo "Classify was refused: is one classifier served? (emberpc models)"
