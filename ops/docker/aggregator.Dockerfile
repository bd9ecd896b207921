# Two images without torch and without data:
#
#     docker build -f ops/docker/aggregator.Dockerfile --target aggregator -t fedmq-aggregator .
#     docker build -f ops/docker/aggregator.Dockerfile --target operator   -t fedmq-operator .      (+ `fedmq secrets`, `devices`)
#
# Dependencies and FedMQ lie in folders of their own, so an update of FedMQ changes, and moves, one small layer.
ARG PYTHON=python:3.13-slim

FROM ${PYTHON} AS dependencies
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/fedmq \
 && printf '/opt/project\n/opt/admin\n' >"$(/opt/fedmq/bin/python -c 'import site; print(site.getsitepackages()[0])')/fedmq.pth"
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >needed.txt \
 && pip --python /opt/fedmq/bin/python install -c constraints.txt -r needed.txt \
 && find /opt/fedmq -type d -name tests -prune -exec rm -r {} +

FROM dependencies AS admin
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["admin"], sep="\n")' >admin.txt \
 && pip --python /opt/fedmq/bin/python install -c constraints.txt --target /opt/admin -r admin.txt

FROM dependencies AS project
COPY README.md LICENSE ./
COPY broker_config/definitions.json broker_config/
COPY shared shared
COPY aggregator aggregator
COPY worker worker
COPY ops ops
RUN pip --python /opt/fedmq/bin/python install --no-deps --target /opt/project .

FROM ${PYTHON} AS base
RUN groupadd --gid 10001 fedmq \
 && useradd --uid 10001 --gid fedmq --no-create-home --home-dir /var/lib/fedmq --shell /usr/sbin/nologin fedmq \
 && install -d -o fedmq -g fedmq /var/lib/fedmq
# PYTHONSAFEPATH: nothing is imported from the folder it is started in.
ENV PATH=/opt/fedmq/bin:/opt/project/bin:$PATH PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1
COPY ops/docker/healthy /usr/local/bin/healthy
COPY --from=dependencies /opt/fedmq /opt/fedmq
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["healthy"]
WORKDIR /var/lib/fedmq

FROM base AS operator
COPY ops/docker/prepare ops/docker/enrol-workers ops/docker/as-operator /usr/local/bin/
COPY --from=admin /opt/admin /opt/admin
COPY --from=project /opt/project /opt/project
USER fedmq
CMD ["fedmq", "--help"]

FROM base AS aggregator
COPY --from=project /opt/project /opt/project
USER fedmq
CMD ["python", "-m", "aggregator"]
