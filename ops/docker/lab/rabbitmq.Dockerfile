# Stands in for rabbitmq:4.2-management: Debian's RabbitMQ with that image's uid, folders and way to start.
FROM rabbitmq:4.2-management
RUN groupmod --gid 999 rabbitmq && usermod --uid 999 --gid 999 --home /var/lib/rabbitmq --shell /bin/bash rabbitmq \
 && rm -rf /var/lib/rabbitmq /var/log/rabbitmq /etc/rabbitmq && mkdir -p /etc/rabbitmq/conf.d \
 && install -d -o rabbitmq -g rabbitmq -m 777 /var/lib/rabbitmq /var/log/rabbitmq \
 && chown -R rabbitmq:rabbitmq /etc/rabbitmq \
 && printf 'loopback_users.guest = false\nlog.console = true\n' >/etc/rabbitmq/conf.d/10-defaults.conf \
 && printf '#!/bin/bash\nset -eu\nexec "$@"\n' >/usr/local/bin/docker-entrypoint.sh \
 && chmod 755 /usr/local/bin/docker-entrypoint.sh
# Debian's scripts in /usr/sbin change the user and the log: the official image has RabbitMQ's own.
ENV PATH=/usr/lib/rabbitmq/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/var/lib/rabbitmq LANG=C.UTF-8 RABBITMQ_LOGS=
VOLUME /var/lib/rabbitmq
ENTRYPOINT ["docker-entrypoint.sh"]
CMD ["rabbitmq-server"]
