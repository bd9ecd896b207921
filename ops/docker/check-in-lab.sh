#!/usr/bin/env bash
# check-in-lab.sh: run docker-compose.yml for real, from a clean clone, and see that it keeps its promises. Ten minutes.
#
#   eval "$(compose-lab env)"; ops/docker/check-in-lab.sh
#
# It builds, starts everything with eight workers, waits for the accuracy, asks Prometheus for every panel, looks for holes
# between the containers, enrols a device and throws it out, kills every service, restarts the aggregators one by one, cuts
# the power, accounts for every update, stops and starts again. It has its own project name and takes free ports, so another
# stack may run beside it; its containers and volumes are removed at the end. Exit code 0: all seen; 1: something was not.
#
# COMPOSE names the program: docker-compose (1.29, what Debian has), or a `docker compose` of version 2.
# The images are ops/docker/lab/'s, made from compose-lab's stand-ins to resemble the official ones; nothing is pulled. With
# OFFICIAL=1 they are the official ones.
set -euo pipefail
cd "$(dirname "$0")/../.."
source=$PWD

unset "${!FEDMQ_@}" "${!GF_@}" WORKERS BIND CPUS COMPOSE_FILE
PROJECT=fedmq-check
COMPOSE=${COMPOSE:-docker-compose}
[[ $($COMPOSE version --short) == 1.* ]] && built=${PROJECT}_ || built=$PROJECT-  # what images that it builds are called
export COMPOSE_PROJECT_NAME=$PROJECT COMPOSE_PROFILES=demo,port443 FEDMQ_PAUSE_S=1 HOSTS=localhost,fedmq.test
WORKERS_EXPECTED=8
HEALTHY_EXPECTED=$((WORKERS_EXPECTED + 10))  # rabbitmq redis aggregator*2 evaluator exporter redis-exporter prometheus grafana haproxy
TARGETS_EXPECTED=$((WORKERS_EXPECTED + 8))   # aggregator*2 evaluator exporter rabbitmq*2 redis prometheus
ACCURACY_MIN=0.94
WAIT_S=180
worker_kills=""  # what the outboxes had given shortly before each kill of a worker, a line each
work=$(mktemp -d)
clone=$work/clone log=$work/log no_env=$work/no.env

say() { printf '\n== [%4d s] %s\n' "$SECONDS" "$*"; }
compose=($COMPOSE --project-directory "$clone" -f "$clone/docker-compose.yml" --env-file "$no_env")
compose() { "${compose[@]}" "$@"; }
quietly() { "$@" >"$log" 2>&1 || { cat "$log" >&2; fail "$*"; }; }
up() { quietly compose up -d --scale worker=$WORKERS_EXPECTED "$@"; }
operator() { compose run --rm -T operator "$@" 2>>"$log"; }

fail() {
  printf '\n== FAILED: %s\n' "$*" >&2
  docker ps -a --filter "label=com.docker.compose.project=$PROJECT" --format '{{.Names}}: {{.Status}}' >&2 || true
  compose logs --no-color --tail=15 >&2 || true
  exit 1
}

cleanup() {
  local code=$?
  say "cleaning up"
  [[ -n ${device_pid:-} ]] && kill "$device_pid" 2>/dev/null
  docker rm -f $PROJECT-observer >/dev/null 2>&1 || true
  compose down -v --remove-orphans --timeout 5 >/dev/null 2>&1 || true
  rm -rf "$work"
  exit "$code"
}

# within SECONDS WHAT COMMAND...: repeat COMMAND until it succeeds.
within() {
  local limit=$1 what=$2 started=$SECONDS
  shift 2
  until "$@"; do
    ((SECONDS - started < limit)) || fail "not within $limit s: $what"
    sleep 1
  done
  printf '   %s: after %d s\n' "$what" $((SECONDS - started))
}

# The observer is a container beside the others, with the operator's rights, that stays: asking costs no start.
observe() {
  docker rm -f $PROJECT-observer >/dev/null 2>&1 || true
  docker run -d --name $PROJECT-observer --network ${PROJECT}_servers --entrypoint sleep \
    -e FEDMQ_CONFIG=/run/fedmq/fedmq.toml -v ${PROJECT}_secrets-operator:/run/fedmq:ro -v ${PROJECT}_worker:/state:ro \
    -v "$clone/ops:/ops:ro" "$(image_of exporter)" 1000000 >/dev/null
  docker network connect ${PROJECT}_watch $PROJECT-observer
}
ask() { docker exec -i $PROJECT-observer python /ops/docker/lab/look.py "$@" 2>"$work/asked"; }

containers() { docker ps -aq --filter "label=com.docker.compose.project=$PROJECT" --filter label=com.docker.compose.oneoff=False "$@"; }
service() { containers --filter "label=com.docker.compose.service=$1"; }
one() { service "$1" | head -n 1; }
image_of() { docker inspect -f '{{.Image}}' "$(one "$1")"; }
address() { docker inspect -f "{{(index .NetworkSettings.Networks \"${PROJECT}_servers\").IPAddress}}" "$1"; }

all_healthy() {
  local healthy
  healthy=$(docker ps -q --filter "label=com.docker.compose.project=$PROJECT" --filter health=healthy | wc -l)
  ((healthy == HEALTHY_EXPECTED))
}
all_scraped() { [[ $(ask down) == "$TARGETS_EXPECTED targets" ]]; }
version_beyond() { local now; now=$(ask version) && [[ -n $now ]] && ((now > $1)); }
accurate() { ask prometheus "fedmq_evaluation{metric=\"accuracy\"} >= $ACCURACY_MIN" | grep -q accuracy; }
restarted() { (($(docker inspect -f '{{.RestartCount}}' "$1") > $2)); }
healthy() { [[ $(docker inspect -f '{{.State.Health.Status}}' "$1") == healthy ]]; }
all_of() { local id; for id in $(service "$1"); do "$2" "$id" || return 1; done; }
panels_filled() { ask panels /ops/grafana/dashboards >"$work/panels"; (($(wc -l <"$work/panels") == 1)); }
# outboxes [CLIENT]: what the workers' outboxes, or one worker's, have given out, as JSON.
outboxes() {
  docker exec $PROJECT-observer python -c '
import json, pathlib, sys
boxes = pathlib.Path("/state/default").glob(sys.argv[1] + "/outbox.json")
print(json.dumps({box.parent.name: json.loads(box.read_text()) for box in boxes}))' "${1:-*}"
}
nothing_lost() { missing=$(ask missing "$made" "$worker_kills") && [[ $missing != *lost* ]]; }

# A crash: SIGKILL to a container's main process, from outside of it. `docker kill` would not do: Docker takes that for an
# operator's wish and does not restart the container, whatever its restart policy.
crash() {
  local id pids="" counts=()
  before=$(ask version)
  for id in "$@"; do
    counts+=("$(docker inspect -f '{{.RestartCount}}' "$id")")
    pids+=" $(docker inspect -f '{{.State.Pid}}' "$id")"
  done
  docker run --rm --pid=host --user 0 --entrypoint sh "$(image_of exporter)" -c "kill -9$pids"
  for id in "$@"; do
    within 60 "$(docker inspect -f '{{.Name}}' "$id") restarted by itself" restarted "$id" "${counts[0]}"
    counts=("${counts[@]:1}")
  done
}
recovered() {
  within $WAIT_S "new versions after $before" version_beyond $((before + 2))
  within $WAIT_S "all $HEALTHY_EXPECTED healthy" all_healthy
  within 60 "all $TARGETS_EXPECTED targets scraped" all_scraped
}

trap cleanup EXIT
: >"$no_env"

say "a clean clone, with bait that no image may take"
mkdir "$clone"
git ls-files -co --exclude-standard | while read -r file; do [[ -f $file ]] && echo "$file"; done | tar -c -T - | tar -x -C "$clone"
echo "FEDMQ_BAIT=bait-$$" >"$clone/.env"
echo "bait-$$" | tee "$clone/ops/bait.pem" "$clone/worker/bait.key" >/dev/null
mkdir "$clone/runs" && echo "bait-$$" >"$clone/runs/bait.txt"
compose down -v --remove-orphans --timeout 5 >/dev/null 2>&1 || true
if [[ -z ${OFFICIAL:-} ]]; then
  for image in rabbitmq redis prometheus redis-exporter haproxy; do
    quietly docker build -t fedmq-lab/$image - <"ops/docker/lab/$image.Dockerfile"
  done
  export RABBITMQ_IMAGE=fedmq-lab/rabbitmq REDIS_IMAGE=fedmq-lab/redis PROMETHEUS_IMAGE=fedmq-lab/prometheus
  export REDIS_EXPORTER_IMAGE=fedmq-lab/redis-exporter HAPROXY_IMAGE=fedmq-lab/haproxy GRAFANA_IMAGE=fedmq-lab/grafana
fi
read -r AMQPS_PORT REDISS_PORT PROMETHEUS_PORT GRAFANA_PORT PORT443 < <(python3 - <<'PYTHON'
import socket
probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
print(*(probe.getsockname()[1] for probe in probes))
PYTHON
)
export AMQPS_PORT REDISS_PORT PROMETHEUS_PORT GRAFANA_PORT PORT443

say "build"
COMPOSE_PROFILES=demo,port443,tools quietly compose build
if [[ -z ${OFFICIAL:-} ]]; then
  quietly docker build -t fedmq-lab/grafana --build-arg OPERATOR=${built}operator - <ops/docker/lab/grafana.Dockerfile
fi

say "up, with nothing prepared"
started=$SECONDS
up
observe
for service in aggregator operator worker; do
  docker inspect -f "   image of $service: {{.Size}} bytes" $built$service
done
docker inspect -f "   of them the base image: {{.Size}} bytes" python:3.13-slim
for service in aggregator operator; do
  docker run --rm $built$service python -c 'import importlib.util as u; assert not u.find_spec("torch")' || fail "torch in $service"
done
docker run --rm ${built}aggregator python -c 'import importlib.util as u; assert not u.find_spec("cryptography")' ||
  fail "cryptography in the aggregator"
within $WAIT_S "all $HEALTHY_EXPECTED healthy" all_healthy
within 60 "all $TARGETS_EXPECTED targets scraped over https" all_scraped
within $WAIT_S "held-out accuracy >= $ACCURACY_MIN" accurate
printf '   %d s after up\n' $((SECONDS - started))

say "who may do what: containers"
containers | xargs docker inspect | python3 -c '
import json, sys
for found in json.load(sys.stdin):
    name, host, config = found["Name"], found["HostConfig"], found["Config"]
    once = config["Labels"]["com.docker.compose.service"] == "secrets"
    wrong = [
        what for what, bad in {
            "root": config["User"].split(":")[0] in ("", "0", "root") and not once,
            "writable root": not host["ReadonlyRootfs"],
            "capabilities": host["CapDrop"] != ["ALL"] or (bool(host["CapAdd"]) and not once),
            "new privileges": "no-new-privileges:true" not in host["SecurityOpt"],
            "no memory limit": not host["Memory"], "no cpu limit": not host["NanoCpus"], "no pids limit": not host["PidsLimit"],
            "unbounded log": host["LogConfig"]["Config"].get("max-size") != "10m",
            "port beyond 127.0.0.1": any(
                bound["HostIp"] != "127.0.0.1" for ports in (host["PortBindings"] or {}).values() for bound in ports),
            "privileged": host["Privileged"],
        }.items() if bad
    ]
    if wrong:
        sys.exit(f"{name}: {wrong}")
' || fail "a container has too much"
for id in $(docker ps -q --filter "label=com.docker.compose.project=$PROJECT"); do
  name=$(docker inspect -f '{{.Name}}' "$id")
  (($(docker exec "$id" id -u) != 0)) || fail "$name runs as root"
  docker exec "$id" sh -c ': >/written || : >/usr/written || : >/etc/written' 2>/dev/null && fail "$name can write to its root"
done
echo "   none runs as root, none can write to its root, all are limited"

say "who may know what: secrets"
mounts=()
for volume in $(docker volume ls -q --filter "label=com.docker.compose.project=$PROJECT" | grep -E '_(secrets-|ca$)'); do
  mounts+=(-v "$volume:/all/${volume#"${PROJECT}_"}:ro")
done
docker run --rm --user 0 "${mounts[@]}" -v "$clone/ops:/ops:ro" ${built}operator python /ops/docker/lab/look.py secrets /all >"$work/secrets"
cut -f3 "$work/secrets" | sort -u >"$work/patterns"
(($(wc -l <"$work/patterns") > 25)) || fail "only $(wc -l <"$work/patterns") secrets found"
shared=$(cut -f1,3 "$work/secrets" | sort -u | cut -f2 | sort | uniq -d)
[[ -z $shared ]] || fail "in two volumes: $(grep -F "$shared" "$work/secrets" | cut -f1,2)"
containers | xargs docker inspect >"$work/inspected"
compose logs --no-color >"$work/logged" 2>&1
for place in inspected logged; do
  grep -qFf "$work/patterns" "$work/$place" && fail "a secret is in what docker shows: $place"
done
for image in aggregator operator worker; do
  docker history --no-trunc $built$image | grep -q "bait-$$" && fail "bait in the history of $image"
  docker run --rm --user 0 --entrypoint sh $built$image -c "grep -rlF bait-$$ /opt /usr/local/bin /var/lib/fedmq" && fail "bait in $image"
done
printf '   %d secrets, each in one volume; none in inspect, logs or images\n' "$(wc -l <"$work/patterns")"

say "who reaches what: networks"
worker=$(one worker)
docker exec -i "$worker" python - reach rabbitmq:5671 redis:6379 rabbitmq:5672 rabbitmq:25672 rabbitmq:4369 rabbitmq:15672 rabbitmq:15692 \
  aggregator:9464 evaluator:9464 exporter:9464 redis-exporter:9121 prometheus:9090 prometheus-watch:9090 grafana:3000 haproxy:8443 \
  "$(address "$(one aggregator)"):9464" "$(address "$(one exporter)"):9464" 172.17.0.1:22 1.1.1.1:443 8.8.8.8:53 \
  <"$clone/ops/docker/lab/look.py" | sed 's/^/   a worker: /' | tee "$work/reached"
[[ $(grep -c ' open$' "$work/reached") == 2 ]] && grep -q 'rabbitmq:5671 open' "$work/reached" && grep -q 'redis:6379 open' "$work/reached" ||
  fail "a worker reaches something else than broker and store"
status=$(docker exec -i "$worker" python - management /run/fedmq/devices/default/worker-0.toml <"$clone/ops/docker/lab/look.py")
[[ $status == 401 ]] || fail "management answers a device: $status"
echo "   a worker's login at RabbitMQ's management: $status"
ask plain | sed 's/^/   /' | tee "$work/plain"
! grep -q 'ACCEPTED\|PONG\|+OK' "$work/plain" || fail "a way in without TLS or password"
(($(wc -l <"$work/plain") == 6)) || fail "not every way was tried: $(cat "$work/asked")"

docker run --rm --user 0 -v ${PROJECT}_secrets-operator:/run/fedmq:ro ${built}operator cat /run/fedmq/ca.pem >"$work/ca.pem"
python3 - "$work/ca.pem" "$PORT443" <<'PYTHON' || fail "port 443"
import socket, ssl, sys
trusted = ssl.create_default_context(cafile=sys.argv[1])
for name, words, answer in (("broker", b"AMQP\0\0\x09\x01", b"\x01"), ("store", b"PING\r\n", b"-NOAUTH")):
    bare = socket.create_connection(("127.0.0.1", int(sys.argv[2])), 5)
    with trusted.wrap_socket(bare, server_hostname=f"{name}.fedmq.test") as secured:
        secured.sendall(words)
        assert secured.recv(64).startswith(answer), name
print("   port 443: broker.fedmq.test is RabbitMQ, store.fedmq.test is Redis")
PYTHON

say "every panel's query"
ask garbage || fail "garbage: $(cat "$work/asked")"
end=$((SECONDS + 60))
until panels_filled || ((SECONDS > end)); do sleep 1; done
sed 's/^/   /' "$work/panels"
panels_filled || fail "panels without data"
pages=$(docker exec $PROJECT-observer python -c '
import ssl, urllib.request
trusted = ssl.create_default_context(cafile="/run/fedmq/ca.pem")
for name in ("overview", "pipeline", "fleet", "safety"):
    page = urllib.request.urlopen(f"https://grafana:3000/d/{name}", timeout=60, context=trusted).read().decode()
    print(name, page.count("<svg"))')
printf '   pages drawn, and their charts: %s\n' "$(tr '\n' ' ' <<<"$pages")"
operator fedmq status

say "a device from outside: enrolled, at work, revoked"
(umask 077 && operator fedmq devices enroll phone --out - >"$work/phone.toml") || fail "enrol: $(cat "$log")"
grep -q "localhost:$AMQPS_PORT" "$work/phone.toml" || fail "the file does not name the published port"
(cd "$work" && FEDMQ_STATE_DIR=$work/phone exec "${FEDMQ:-fedmq}" worker --config phone.toml --task digits) >"$work/phone.log" 2>&1 &
device_pid=$!
phone_seen() { [[ " $(ask clients) " == *" phone "* ]]; }
within 60 "updates of the phone are in the model" phone_seen
operator fedmq devices revoke --yes phone >"$work/revoked" || fail "revoke: $(cat "$log" "$work/revoked")"
started=$SECONDS
thrown_out() { ! kill -0 "$device_pid" 2>/dev/null || grep -q 'refuses' "$work/phone.log"; }
within 30 "the phone is thrown out" thrown_out
kill "$device_pid" 2>/dev/null || true
wait "$device_pid" 2>/dev/null || true
device_pid=
grep refuses "$work/phone.log" | head -n 1 | sed 's/^/   its log: /'
operator fedmq devices list | sed 's/^/   /' | head -n 8

say "crash of the aggregator that serves: the other one goes on"
serving=$(ask serving)
for id in $(service aggregator); do
  if [[ " $serving " == *" $(address "$id") "* ]]; then first=$id; else second=$id; fi
done
[[ -n ${first:-} && -n ${second:-} ]] || fail "not one serves and one stands by: $serving"
crash "$first"
recovered
say "crash of the one that stands by"
standby=$second
[[ " $(ask serving) " == *" $(address "$second") "* ]] && standby=$first
crash "$standby"
recovered
for service in rabbitmq redis; do
  say "crash of $service"
  crash "$(one $service)"
  recovered
done
say "crash of a worker and of the evaluator"
worker=$(one worker)
worker_kills=$(outboxes "$(docker exec "$worker" sh -c "tr '\\0' '\\n' </proc/1/cmdline" | sed -n 's#--config=.*/\(worker-[0-9]*\)\.toml#\1#p')")
[[ $worker_kills == *worker-* ]] || fail "which worker was that?"
crash "$worker" "$(one evaluator)"
recovered
say "crash of all that watch, and of the way in by port 443"
crash "$(one exporter)" "$(one redis-exporter)" "$(one prometheus)" "$(one grafana)" "$(one haproxy)"
recovered

say "a rolling restart of the aggregators: updates go on being applied"
ask watch-gap 50 >"$work/gap" &
gap_pid=$!
bash "$clone/ops/docker/roll" "${compose[@]}" >"$work/rolled" || fail "roll"
sed 's/^/   /' "$work/rolled"
wait $gap_pid
read -r gap made <"$work/gap"
echo "   the longest time without a new version: $gap s, of $made new versions in 50 s"
((${gap%.*} < 12 && made > 5)) || fail "updates were not applied meanwhile"

say "power cut: all killed at once; Docker starts them again, as after a reboot, in no order"
worker_kills+=$'\n'$(outboxes)
crash $(containers --filter status=running) >/dev/null
recovered

say "workers stop; every update they made is accounted for"
quietly compose stop worker
made=$(outboxes)
end=$((SECONDS + 35))  # the aggregator commits within 30 s; what is missing then was being trained when its worker was killed
until nothing_lost && [[ -z $missing ]] || ((SECONDS > end)); do sleep 1; done
printf '   made: %s\n' "$made"
sed 's/^/   /' <<<"${missing:-all settled}"
printf '   %s\n' "$(ask totals)"
nothing_lost || fail "lost updates"
(($(grep -c unfinished <<<"$missing") <= WORKERS_EXPECTED + 1)) || fail "more unfinished than workers were killed"
[[ $(ask totals) == *"'dead': 2"* ]] || fail "other dead letters than the two"

say "down, and up again without workers: the same version"
before=$(ask version)
docker rm -f $PROJECT-observer >/dev/null
quietly compose down --timeout 10
(($(docker volume ls -q --filter "label=com.docker.compose.project=$PROJECT" | wc -l) > 10)) || fail "down took the volumes"
cut -f3 "$work/secrets" | sort >"$work/before"
COMPOSE_PROFILES='' quietly compose up -d
observe
at_version() { [[ $(ask version) == "$1" ]]; }
within $WAIT_S "both aggregators are healthy" all_of aggregator healthy
at_version "$before" || fail "version $(ask version) without any worker, $before before"
docker run --rm --user 0 "${mounts[@]}" -v "$clone/ops:/ops:ro" ${built}operator python /ops/docker/lab/look.py secrets /all |
  cut -f3 | sort | comm -3 - "$work/before" | grep -q . && fail "the secrets are others after another up"

say "up again with workers: init-model finds a model, the job goes on"
up
recovered
within $WAIT_S "held-out accuracy >= $ACCURACY_MIN" accurate
[[ $(ask clients) == "phone worker-0 worker-1 worker-2 worker-3 worker-4 worker-5 worker-6 worker-7" ]] || fail "clients: $(ask clients)"
operator fedmq status

say "all seen"
