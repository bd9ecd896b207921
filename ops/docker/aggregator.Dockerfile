# The aggregator: no torch, no data.          docker build -f ops/docker/aggregator.Dockerfile -t fedmq-aggregator .
ARG PYTHON=python:3.13-slim

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/fedmq
WORKDIR /src
# The dependencies come first, with an empty project: this layer stays until they change.
COPY pyproject.toml constraints.txt ./
RUN mkdir aggregator worker shared ops && touch README.md LICENSE ops/__init__.py \
 && pip --python /opt/fedmq/bin/python install -c constraints.txt .
COPY README.md LICENSE ./
COPY shared shared
COPY aggregator aggregator
COPY worker worker
COPY ops ops
RUN pip --python /opt/fedmq/bin/python install --no-deps --force-reinstall .

FROM ${PYTHON}
RUN groupadd --gid 10001 fedmq \
 && useradd --uid 10001 --gid fedmq --no-create-home --home-dir /var/lib/fedmq --shell /usr/sbin/nologin fedmq \
 && install -d -o fedmq -g fedmq /var/lib/fedmq
COPY --from=build /opt/fedmq /opt/fedmq
# PYTHONSAFEPATH: nothing is imported from the folder it is started in.
ENV PATH=/opt/fedmq/bin:$PATH PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1
USER fedmq
WORKDIR /var/lib/fedmq
CMD ["python", "-m", "aggregator"]
