"""What docker-compose.yml runs in the containers of secured servers, on such servers, with and without mutual TLS."""

import re
import subprocess
from pathlib import Path

import pytest

from ops.secured_servers import SecuredServers
from tests.secured_fixture import JOB

COMPOSE = (Path(__file__).parents[2] / "docker-compose.yml").read_text()


@pytest.mark.parametrize("mutual", [False, True])
def test_the_health_check_of_redis_tells_one_that_answers_from_one_that_does_not(mutual):
    [command] = re.findall(r'test: \[CMD-SHELL, "(redis-cli .*)"\]', COMPOSE)
    servers = SecuredServers((JOB,), mutual=mutual)
    command = command.replace("/run/fedmq", str(servers.secrets / "redis"))
    command = command.replace("redis-cli", f"redis-cli -h localhost -p {servers.redis.port}")
    try:
        servers.redis.start()
        up = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
        assert up.returncode == 0, up.stdout + up.stderr
        servers.redis.stop()
        down = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
        assert down.returncode != 0
        assert "Could not connect" in down.stderr, "docker inspect shows why"
    finally:
        servers.__exit__(None, None, None)
