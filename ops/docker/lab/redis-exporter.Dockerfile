# Stands in for oliver006/redis_exporter:*-alpine: Debian's exporter with that image's uid and path.
FROM compose-lab/debian
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus-redis-exporter wget >/dev/null \
 && rm -rf /var/lib/apt/lists/* && ln -s /usr/bin/prometheus-redis-exporter /redis_exporter
USER 59000:59000
ENTRYPOINT ["/redis_exporter"]
