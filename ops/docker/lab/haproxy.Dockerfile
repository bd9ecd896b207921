# Stands in for haproxy:3.2: Debian's HAProxy with that image's uid and way to start.
FROM compose-lab/debian
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends haproxy >/dev/null \
 && rm -rf /var/lib/apt/lists/* && groupmod --gid 99 haproxy && usermod --uid 99 --gid 99 haproxy \
 && mkdir -p /usr/local/etc/haproxy \
 && printf '#!/bin/sh\nset -e\n[ "$1" = haproxy ] && shift && set -- haproxy -W -db "$@"\nexec "$@"\n' >/usr/local/bin/docker-entrypoint.sh \
 && chmod 755 /usr/local/bin/docker-entrypoint.sh
USER haproxy
STOPSIGNAL SIGUSR1
ENTRYPOINT ["docker-entrypoint.sh"]
CMD ["haproxy", "-f", "/usr/local/etc/haproxy/haproxy.cfg"]
