# Stands in for prom/prometheus:v3.5.0: Debian's Prometheus with that image's user and folders.
FROM prom/prometheus:v3.5.0
# `promtool check ready --http.config.file=FILE --url=URL`, which 2.x has not, by curl.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends curl >/dev/null && rm -rf /var/lib/apt/lists/* \
 && install -d -o nobody -g nogroup /prometheus && mkdir -p /etc/prometheus && rm -rf /var/lib/prometheus \
 && printf '#!/bin/sh\nset -eu\n[ "$1 $2" = "check ready" ] || exec /usr/bin/promtool "$@"\nhost=${4#--url=https://}\n\
exec curl -fsS -o /dev/null --cacert /run/fedmq/ca.pem --connect-to "prometheus:9090:$host" https://prometheus:9090/-/ready\n' \
    >/usr/local/bin/promtool && chmod 755 /usr/local/bin/promtool
USER nobody
VOLUME /prometheus
WORKDIR /prometheus
ENTRYPOINT ["/bin/prometheus"]
