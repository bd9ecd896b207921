# Stands in for redis:8.4: Debian's Redis with that image's uid and folders.
FROM redis:8.4
RUN groupmod --gid 999 redis && usermod --uid 999 --gid 999 redis \
 && install -d -o redis -g redis /data && rm -rf /etc/redis /var/lib/redis \
 && printf '#!/bin/sh\nset -e\nexec "$@"\n' >/usr/local/bin/docker-entrypoint.sh \
 && chmod 755 /usr/local/bin/docker-entrypoint.sh
VOLUME /data
WORKDIR /data
ENTRYPOINT ["docker-entrypoint.sh"]
CMD ["redis-server"]
