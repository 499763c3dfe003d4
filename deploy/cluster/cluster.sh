#!/bin/sh
# Start glmd replicas on this machine and smg, a router, in front of them, until Ctrl-C.
#
#     deploy/cluster/cluster.sh [REPLICAS] [glmd serve options]
#
# The router listens on port 8000, replicas on 8001, 8002, …, their KV events on 5701, 5702, …
# For several Macs, start `glmd serve` on each and only the router here; see docs/replicas.md.
set -eu

replicas=3
case "${1:-}" in
[1-9] | [1-9][0-9])
	replicas=$1
	shift
	;;
esac

folder=${TMPDIR:-/tmp}/glmd-cluster-$(id -u)
mkdir -p -m 700 "$folder"
children=
trap 'trap - INT TERM EXIT; [ -z "$children" ] || kill $children 2>/dev/null; wait' INT TERM EXIT

workers=
number=1
while [ "$number" -le "$replicas" ]; do
	workers="$workers http://127.0.0.1:$((8000 + number))"
	number=$((number + 1))
done

number=1
while [ "$number" -le "$replicas" ]; do
	# Each replica has a disk cache of its own, as one server at a time uses a folder.
	GLMD_DISK_CACHE_FOLDER="$folder/$number" \
	GLMD_KV_EVENTS="tcp://127.0.0.1:$((5700 + number))" \
	GLMD_KV_EVENTS_REPLAY="tcp://127.0.0.1:$((5800 + number))" \
	GLMD_PEERS="$(echo "$workers" | tr " " ,)" \
		"${GLMD:-glmd}" serve --port $((8000 + number)) "$@" &
	children="$children $!"
	number=$((number + 1))
done

# Needs `pip install smg`. A health check each second finds a dead replica soon.
# shellcheck disable=SC2086
"${SMG:-smg}" launch --host 127.0.0.1 --port 8000 --worker-urls $workers \
	--policy cache_aware --balance-abs-threshold 8 --health-check-interval-secs 1 \
	--retry-max-retries 3 &
children="$children $!"
wait
