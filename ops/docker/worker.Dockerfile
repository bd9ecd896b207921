# Worker, evaluator and `fedmq models init`: with torch (CPU) and scikit-learn for the digits. amd64 and arm64.
#
#     docker build -f ops/docker/worker.Dockerfile -t fedmq-worker .
#
# Dependencies and FedMQ lie in folders of their own, so an update of FedMQ changes, and moves, one small layer.
ARG PYTHON=python:3.13-slim

FROM ${PYTHON} AS dependencies
# Where torch's CPU build is, for either machine. The only index asked for torch: PyPI's brings gigabytes of GPU libraries.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/fedmq \
 && echo /opt/project >"$(/opt/fedmq/bin/python -c 'import site; print(site.getsitepackages()[0])')/fedmq.pth"
WORKDIR /src
COPY constraints.txt ./
RUN pip --python /opt/fedmq/bin/python install --no-deps --index-url ${TORCH_INDEX} -c constraints.txt torch \
 && cd "$(/opt/fedmq/bin/python -c 'import site; print(site.getsitepackages()[0])')/torch" \
 && rm -rf include share/cmake test bin/protoc* lib/*.a
COPY pyproject.toml ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >needed.txt \
 && pip --python /opt/fedmq/bin/python install -c constraints.txt -r needed.txt torch scikit-learn \
 && cd "$(/opt/fedmq/bin/python -c 'import site; print(site.getsitepackages()[0])')" \
 && find numpy scipy sklearn joblib networkx sympy -type d -name tests -prune -exec rm -r {} +

FROM dependencies AS project
COPY README.md LICENSE ./
COPY broker_config/definitions.json broker_config/
COPY shared shared
COPY aggregator aggregator
COPY worker worker
COPY ops ops
RUN pip --python /opt/fedmq/bin/python install --no-deps --target /opt/project .

FROM ${PYTHON}
RUN groupadd --gid 10001 fedmq \
 && useradd --uid 10001 --gid fedmq --no-create-home --home-dir /var/lib/fedmq --shell /usr/sbin/nologin fedmq \
 && install -d -o fedmq -g fedmq /var/lib/fedmq
# PYTHONSAFEPATH: nothing is imported from the folder it is started in.
ENV PATH=/opt/fedmq/bin:/opt/project/bin:$PATH PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 FEDMQ_STATE_DIR=/var/lib/fedmq
COPY ops/docker/healthy ops/docker/replica /usr/local/bin/
COPY --from=dependencies /opt/fedmq /opt/fedmq
COPY --from=project /opt/project /opt/project
USER fedmq
WORKDIR /var/lib/fedmq
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["healthy"]
CMD ["python", "-m", "worker"]
