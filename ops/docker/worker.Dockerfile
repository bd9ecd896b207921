# Worker, evaluator and `fedmq models init`: with torch (CPU) and scikit-learn for the digits.
#                                             docker build -f ops/docker/worker.Dockerfile -t fedmq-worker .
ARG PYTHON=python:3.13-slim

FROM ${PYTHON} AS build
# Where torch's CPU build is. It is the only index asked for torch: PyPI's build brings gigabytes of GPU libraries.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/fedmq
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN pip --python /opt/fedmq/bin/python install --no-deps --index-url ${TORCH_INDEX} -c constraints.txt torch
# The dependencies come first, with an empty project: this layer stays until they change.
RUN mkdir aggregator worker shared ops && touch README.md LICENSE ops/__init__.py \
 && pip --python /opt/fedmq/bin/python install -c constraints.txt '.[torch]' scikit-learn
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
COPY ops/docker/replica /usr/local/bin/replica
COPY --from=build /opt/fedmq /opt/fedmq
# PYTHONSAFEPATH: nothing is imported from the folder it is started in.
ENV PATH=/opt/fedmq/bin:$PATH PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 FEDMQ_STATE_DIR=/var/lib/fedmq
USER fedmq
WORKDIR /var/lib/fedmq
CMD ["python", "-m", "worker"]
