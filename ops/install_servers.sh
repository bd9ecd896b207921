#!/usr/bin/env bash
# Installs RabbitMQ, Redis, HAProxy and Prometheus' programs from the system's packages when they are absent: tests start
# private ones.
# Nothing is started or enabled as a service of this machine.
set -euo pipefail

have() { PATH="/usr/lib/rabbitmq/bin:/opt/homebrew/sbin:/usr/local/sbin:/usr/sbin:$PATH" command -v "$1" >/dev/null; }

programs=(rabbitmq-server redis-server haproxy prometheus prometheus-pushgateway prometheus-redis-exporter)

look() {
  missing=()
  for program in "${programs[@]}"; do have "$program" || missing+=("$program"); done
  [[ $(uname) != Linux ]] || have systemd-analyze || missing+=(systemd) # checks ops/edge's unit; nothing of it runs
}

look
((${#missing[@]})) || exit 0

by_hand() {
  echo "fedmq: $1" >&2
  echo "Install RabbitMQ (3.10 or newer) and Redis (7.0 or newer) by hand, so that rabbitmq-server and redis-server are" >&2
  echo "found: https://www.rabbitmq.com/docs/download and https://redis.io/docs/latest/operate/oss_and_stack/install/," >&2
  echo "and of Prometheus what is missing, under its Debian name: https://prometheus.io/download/" >&2
  exit 1
}

servers_of() { printf '%s\n' "${missing[@]}" | grep -v '^prometheus' | sed "$1"; } # only Debian packs Prometheus whole

as_root() {
  if [[ $(id -u) == 0 ]]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else by_hand "installing ${missing[*]} needs root, and there is no sudo"; fi
}

echo "fedmq: installing ${missing[*]} from the system's packages for the tests; their services stay off"
if command -v apt-get >/dev/null; then
  # A package's own start-up is denied for the moment of the installation: the tests bring their own servers.
  policy=/usr/sbin/policy-rc.d
  if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' | as_root tee $policy >/dev/null
    as_root chmod +x $policy
    trap 'as_root rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  for program in "${missing[@]}"; do  # nor are they to start with the machine
    if command -v systemctl >/dev/null; then as_root systemctl disable --quiet "$program" 2>/dev/null || true; fi
  done
elif command -v dnf >/dev/null; then
  as_root dnf install -y -q $(servers_of "s/redis-server/redis/")
elif command -v brew >/dev/null; then
  brew install --quiet $(servers_of "s/-server//")
else
  by_hand "no apt-get, dnf or brew here to install ${missing[*]} with"
fi
look
((${#missing[@]} == 0)) || by_hand "after the installation ${missing[*]} cannot be found"
