"""A model larger than one message: real workers, a real aggregator, RabbitMQ 4's and Redis's default limits.

Two workers train a model of nothing but noise and send it whole as float32, in parts; `buffer_size` is two. The memory
of the aggregator is its peak over everything: start, parts, fold, commit.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ops.bench.main import count_of
from ops.bench.process import resident_bytes
from ops.servers import PrivateServer, PrivateServers, private_rabbitmq, private_redis, stop_port_mapper
from shared.errors import FedMQError
from shared.model_image import ModelImage
from shared.store.redis import RedisStore

RABBITMQ_4 = "max_message_size = 16777216\n"  # its default; 3.x would take 128 MiB
TASK = str(Path(__file__).with_name("tasks") / "noise.py")
MODELS_MAX, BYTES_MAX = 3, 300e6  # limit of the aggregator's memory: 3 models and 300 MB
WAIT_S = 1800.0


def run(params: str, updates: int) -> str:
    """Train for so many updates; print and return a line of a table.

    Raises:
        SettingsError: no such size.
        FedMQError: it does not get there.
    """
    num_params = count_of(params)
    with tempfile.TemporaryDirectory(prefix="fedmq-large-") as folder:
        servers = PrivateServers(Path(folder))
        servers.rabbitmq = private_rabbitmq(Path(folder) / "rabbitmq", RABBITMQ_4)
        servers.redis = private_redis(Path(folder) / "redis")
        with servers:
            line = _measure(num_params, updates, servers.rabbitmq, servers.redis, Path(folder))
        stop_port_mapper(servers.rabbitmq)
    print("| parameters | update | updates | versions | seconds/update | aggregator's peak | limit |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    print(line)
    return line


def _measure(num_params: int, updates: int, rabbitmq: PrivateServer, redis: PrivateServer, folder: Path) -> str:
    initial = folder / "v0.safetensors"
    ModelImage.of({"w": np.zeros((1, num_params), np.float32)}).save(initial)
    common = [f"--broker-url={rabbitmq.url}", f"--store-url={redis.url}", "--job=large"]
    store = RedisStore(redis.url, "large")
    programs = [
        _start(num_params, folder / "aggregator.log", "aggregator", *common, f"--init-model={initial}",
               "--codec=float32", "--buffer-size=2")
    ]  # fmt: skip
    try:
        started = time.monotonic()
        _wait(lambda: bool(store.job()), programs, folder)
        for name in ("one", "two"):
            programs.append(
                _start(
                    num_params, folder / f"{name}.log", "worker", *common, f"--task={TASK}", f"--client-id={name}",
                    f"--state-dir={folder}", f"--updates-max={updates // 2}",
                    f"--outbox-bytes-max={16 * num_params}",
                )
            )  # fmt: skip
        _wait(lambda: store.totals().get("applied", 0) >= updates, programs[:1], folder)
        seconds = time.monotonic() - started
        peak = resident_bytes(programs[0].pid, "VmHWM")
    finally:
        for program in programs:
            program.kill()
            program.wait()
    head, limit = store.head(), MODELS_MAX * 4 * num_params + BYTES_MAX
    assert head is not None  # noqa: S101 - it has a version since `create`
    return (
        f"| {num_params:,} | {4 * num_params / 1e6:,.0f} MB | {updates} | {head.version} | {seconds / updates:.1f} "
        f"| {peak / 1e6:,.0f} MB | {limit / 1e6:,.0f} MB |"
    )


def _start(num_params: int, log: Path, program: str, *arguments: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", program, *arguments], stdout=out, stderr=out,
            env=os.environ | {"FEDMQ_NOISE_PARAMS": str(num_params)},
        )  # fmt: skip


def _wait(condition: Callable[[], bool], programs: list[subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline or any(program.poll() is not None for program in programs):
            logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in folder.glob("*.log"))
            raise FedMQError(f"it does not get there; the logs end:\n{logs}")
        time.sleep(0.1)
