#!/usr/bin/env bash
# check-in-lab.sh: run docker-compose.yml for real and see that it keeps its promises. Takes five to ten minutes.
#
#   DOCKER_HOST=... ops/docker/check-in-lab.sh
#
# It builds, starts everything, waits for the accuracy, asks Prometheus, kills every service, kills all at once, stops
# and starts again, and accounts for every update. It has its own project name and takes free ports, so another stack
# may run beside it; its containers and volumes are removed at the end. Exit code 0: all seen; 1: something was not.
set -euo pipefail
cd "$(dirname "$0")/../.."

unset "${!FEDMQ_@}" WORKERS
export COMPOSE_PROJECT_NAME=fedmq-check COMPOSE_PROFILES=demo
export AMQP_PORT=0 REDIS_PORT=0 MANAGEMENT_PORT=0 PROMETHEUS_PORT=0  # any free one
SERVICES="rabbitmq redis aggregator evaluator prometheus worker"
WORKERS_EXPECTED=4
TARGETS_EXPECTED=$((WORKERS_EXPECTED + 5))  # aggregator, evaluator, rabbitmq twice, prometheus
ACCURACY_MIN=0.94
WAIT_S=300
worker_kills=""  # what the outboxes had given shortly before each kill of a worker, a line each
log=$(mktemp) no_env=$(mktemp)

say() { printf '\n== [%4d s] %s\n' "$SECONDS" "$*"; }
compose() { docker-compose --env-file "$no_env" "$@"; }  # the defaults, whatever stands in .env
quietly() { "$@" >"$log" 2>&1 || { cat "$log" >&2; fail "$*"; }; }

fail() {
  printf '\n== FAILED: %s\n' "$*" >&2
  compose ps >&2 || true
  compose logs --no-color --tail=25 >&2 || true
  exit 1
}

cleanup() {
  local code=$?
  say "cleaning up"
  compose down -v --remove-orphans --timeout 10 >/dev/null 2>&1 || true
  rm -f "$log" "$no_env"
  exit "$code"
}

# within SECONDS WHAT COMMAND...: repeat COMMAND until it succeeds.
within() {
  local limit=$1 what=$2 started=$SECONDS
  shift 2
  until "$@"; do
    ((SECONDS - started < limit)) || fail "not within $limit s: $what"
    sleep 2
  done
  printf '   %s: after %d s\n' "$what" $((SECONDS - started))
}

# ask WHAT [ARGUMENT]: look at the running system from a container beside it.
ask() {
  docker run --rm -i --network "${COMPOSE_PROJECT_NAME}_default" "$image" python - "$@" 2>/dev/null <<'PYTHON'
import json
import sys
from urllib.parse import urlencode
from urllib.request import urlopen

from shared.store.redis import RedisStore
from shared.transport.rabbitmq import queue_depths

what, *rest = sys.argv[1:]
store = RedisStore("redis://:fedmq@redis:6379/0", "default")
if what == "version":
    print(store.head().version)
elif what == "missing":  # the ids that the outboxes gave and the ledger does not hold
    outboxes, kills = json.loads(rest[0]), [json.loads(line) for line in rest[1].splitlines()]
    settled = {update["id"] for entry in store.ledger() for update in entry["updates"]}
    for client, box in outboxes.items():
        # The number that was taken when its worker was killed: not a finished update. A kill comes within a few updates
        # of the look at the outboxes before it.
        cut = [kill[client]["next_sequence"] for kill in kills if client in kill]
        for sequence in range(box["next_sequence"]):
            update_id = f"{client}/{box['incarnation']}/{sequence}"
            if update_id not in settled:
                print("unfinished" if any(0 <= sequence - at < 8 for at in cut) else "lost", update_id)
elif what == "totals":
    print(store.status()["state"]["totals"], queue_depths("amqp://fedmq:fedmq@rabbitmq:5672/fedmq", "default", 10))
elif what == "clients":
    print(*sorted(store.status()["clients"]))
elif what == "metric":  # of the aggregator, without Prometheus
    page = urlopen("http://aggregator:9464/metrics", timeout=5).read().decode()
    print(int(float(next(line.split()[1] for line in page.splitlines() if line.startswith(rest[0] + " ")))))
elif what == "prometheus":
    answer = json.load(urlopen("http://prometheus:9090/api/v1/query?" + urlencode({"query": rest[0]}), timeout=5))
    for series in answer["data"]["result"]:
        labels = {k: v for k, v in series["metric"].items() if k in ("job", "instance", "metric", "queue", "outcome")}
        print(series["value"][1], labels)
PYTHON
}

containers() { docker ps -aq --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME" "$@"; }

image_of() { docker inspect -f '{{.Image}}' "$(containers --filter "label=com.docker.compose.service=$1" | head -n 1)"; }

all_healthy() {
  local states
  states=$(containers | xargs docker inspect -f '{{if .State.Health}}{{.State.Health.Status}}{{else}}{{.State.Status}} {{.State.ExitCode}}{{end}}' | sort | uniq -c)
  [[ $(tr -s ' \n' ' ' <<<"$states") == " 1 exited 0 $((WORKERS_EXPECTED + 5)) healthy " ]]
}

all_scraped() { [[ $(ask prometheus 'count(up == 1) - (count(up == 0) or vector(0))') == "$TARGETS_EXPECTED "* ]]; }
version_beyond() { local now; now=$(ask version) && [[ -n $now ]] && ((now > $1)); }
accurate() { ask prometheus "fedmq_evaluation{metric=\"accuracy\"} >= $ACCURACY_MIN" | grep -q accuracy; }
restarts() { docker inspect -f '{{.RestartCount}}' "$1"; }
restarted() { (($(restarts "$1") > $2)); }
# outboxes [CLIENT]: what the workers' outboxes, or one worker's, have given out, as JSON.
outboxes() {
  docker run --rm -v "${COMPOSE_PROJECT_NAME}_worker:/state:ro" "$image" python -c '
import json, pathlib, sys
boxes = pathlib.Path("/state/default").glob(sys.argv[1] + "/outbox.json")
print(json.dumps({box.parent.name: json.loads(box.read_text()) for box in boxes}))' "${1:-*}"
}
nothing_lost() { missing=$(ask missing "$made" "$worker_kills") && [[ $missing != *lost* ]]; }
aggregator_at() { [[ $(ask metric fedmq_model_version) == "$1" ]]; }

# A crash: SIGKILL to the service's main process, from outside of its container. `docker kill` would not do: Docker
# takes that for an operator's wish and does not restart the container, whatever its restart policy.
crash() {
  local id pid before count
  id=$(containers --filter "label=com.docker.compose.service=$1" | head -n 1)
  pid=$(docker inspect -f '{{.State.Pid}}' "$id")
  before=$(ask version)
  count=$(restarts "$id")
  [[ $1 == worker ]] && worker_kills=$(outboxes "$(docker exec "$id" sh -c "tr '\\0' '\\n' </proc/1/cmdline" | sed -n s/--client-id=//p)")
  docker run --rm --pid=host --user 0 "$image" sh -c "kill -9 $pid"
  within 60 "$1 restarted by itself" restarted "$id" "$count"
  within $WAIT_S "all healthy" all_healthy
  within $WAIT_S "new versions after $before" version_beyond $((before + 2))
  within 60 "all $TARGETS_EXPECTED targets scraped" all_scraped
}

trap cleanup EXIT
compose down -v --remove-orphans --timeout 10 >/dev/null 2>&1 || true

say "build"
quietly compose build

say "up"
quietly compose up -d
image=$(image_of aggregator)
docker inspect -f "   aggregator's image {{.Size}} bytes" "$image"
docker inspect -f "   worker's image {{.Size}} bytes" "$(image_of worker)"
docker run --rm "$image" python -c 'import importlib.util as u; assert not u.find_spec("torch")' || fail "torch in the aggregator"
for service in aggregator evaluator worker; do
  (($(docker run --rm --entrypoint id "$(image_of $service)" -u) != 0)) || fail "$service runs as root"
done
within $WAIT_S "all healthy" all_healthy
within $WAIT_S "held-out accuracy >= $ACCURACY_MIN" accurate
within 60 "all $TARGETS_EXPECTED targets scraped" all_scraped
compose exec -T evaluator fedmq status
for query in fedmq_model_version fedmq_evaluation rabbitmq_detailed_queue_messages; do
  printf '%s\n' "$query"
  ask prometheus "$query" | sed 's/^/   /' | grep . || fail "Prometheus knows no $query"
done
[[ $(ask clients) == "worker-0 worker-1 worker-2 worker-3" ]] || fail "clients: $(ask clients)"
containers | xargs docker inspect -f '{{range .NetworkSettings.Ports}}{{range .}}{{.HostIp}} {{end}}{{end}}' | tr -s ' \n' '\n' |
  grep . | grep -qv '^127\.0\.0\.1$' && fail "a port is published beyond 127.0.0.1"

for service in $SERVICES; do
  say "crash of $service"
  crash "$service"
done

say "power cut: all killed at once, then up"
before=$(ask version)
worker_kills+=$'\n'$(outboxes)
quietly compose kill
quietly compose up -d
within $WAIT_S "all healthy" all_healthy
within $WAIT_S "new versions after $before" version_beyond $((before + 2))

say "workers stop; every update they made is accounted for"
quietly compose stop worker
made=$(outboxes)
within 60 "nothing lost" nothing_lost  # the aggregator commits within 30 s
printf '   made: %s\n   %s\n   %s\n' "$made" "${missing:-all settled}" "$(ask totals)"
(($(grep -c unfinished <<<"$missing") <= WORKERS_EXPECTED + 1)) || fail "more unfinished than workers were killed"
[[ $(ask totals) == *"'dead': 0"* ]] || fail "dead letters"

say "down, and up again without workers: the same version"
before=$(ask version)
quietly compose down --timeout 10
quietly compose up -d aggregator
within $WAIT_S "the aggregator is at version $before" aggregator_at "$before"
sleep 10
aggregator_at "$before" || fail "version $(ask version) without any worker"

say "up again with workers: init-model finds a model, the job goes on"
quietly compose up -d
within $WAIT_S "all healthy" all_healthy
within $WAIT_S "new versions after $before" version_beyond $((before + 2))
within $WAIT_S "held-out accuracy >= $ACCURACY_MIN" accurate
[[ $(ask clients) == "worker-0 worker-1 worker-2 worker-3" ]] || fail "clients: $(ask clients)"
compose exec -T evaluator fedmq status

say "all seen"
