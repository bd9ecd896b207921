# Stands in for grafana/grafana, which cannot be had from Debian: the page that draws the same dashboards, by the same
# queries, with that image's uid, /run.sh, health, settings of TLS and of the admin's password, and its curl.
ARG OPERATOR=fedmq-check_operator
FROM ${OPERATOR}
USER root
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends curl >/dev/null && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 472 --gid 0 --no-create-home grafana && install -d -o grafana -g root -m 775 /var/lib/grafana \
 && printf '%s\n' '#!/bin/sh' 'set -eu' 'test -s "$GF_SECURITY_ADMIN_PASSWORD__FILE" && test -s "$GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"' \
    'test -r /etc/grafana/provisioning/datasources/prometheus.yml && touch /var/lib/grafana/grafana.db' \
    'exec python -m ops.grafana.preview https://prometheus:9090 --ca /run/fedmq/ca.pem --serve 3000 \' \
    '  --cert "$GF_SERVER_CERT_FILE" --key "$GF_SERVER_CERT_KEY"' >/run.sh && chmod 755 /run.sh
HEALTHCHECK NONE
USER 472
WORKDIR /usr/share
VOLUME /var/lib/grafana
ENTRYPOINT ["/run.sh"]
CMD []
