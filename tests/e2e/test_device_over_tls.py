"""A device as it is in the field: one file, its own two logins, TLS - checked, and kept to its bandwidth."""

import re

import pytest

from shared.command import DONE, UNREACHABLE, USAGE
from tests.contract.faults import wait_until
from tests.e2e.test_devices import Site
from tests.secured_fixture import JOB, enrolled, secured

__all__ = ["secured"]


@pytest.fixture
def site(secured, processes, task, tmp_path):
    site = Site(secured, processes, task, tmp_path)
    yield site
    site.store.close()


def lines_of(process):
    found = re.findall(r"^(ok|wrong) +(\S+) +(.*)$", process.log(), re.M)
    return {name: (word, text) for word, name, text in found}


def checked(site, file, **more):
    state = site.folder / "state"
    process = site.processes.start("worker", "--check", f"--config={file}", task=site.task, state_dir=state, **more)
    return process.wait(60), lines_of(process), process.log()


def test_an_enrolled_device_finds_nothing_wrong_and_works_at_its_pace(site):
    """Every command the check and a paced pull need is one its login may use."""
    site.aggregator().wait_for_log(f"job {JOB} at version")
    file = enrolled(site.servers, site.folder, "edge-1")
    code, said, log = checked(site, file)
    assert (code, {word for word, _ in said.values()}) == (DONE, {"ok"}), log
    for name in ("broker-tls", "store-tls"):
        assert re.match(r"TLSv1\.[23], its certificate is good until ", said[name][1])
    assert said["publish"][1] == "may publish updates of edge-1"
    worker = site.worker(file, updates_max=4, uplink_bytes_per_s=20_000, downlink_bytes_per_s=20_000)
    assert worker.wait(60) == DONE, worker.log()
    wait_until(lambda: site.applied("edge-1") == 4, 30, worker.log)


def test_a_device_that_is_not_the_one_of_its_file_is_told(site):
    site.aggregator().wait_for_log(f"job {JOB} at version")
    file = enrolled(site.servers, site.folder, "edge-2")
    code, said, log = checked(site, file, client_id="edge-3")
    assert code == USAGE, log
    assert {name for name, (word, _) in said.items() if word == "wrong"} == {"publish"}
    assert "may not publish as client 'edge-3'" in said["publish"][1]


def test_a_file_with_another_authority_is_told_at_both_servers(site):
    file = enrolled(site.servers, site.folder, "edge-4")
    other = site.folder / "other.pem"
    other.write_text((site.servers.secrets / "rabbitmq" / "server.pem").read_text())
    code, said, log = checked(site, file, tls_ca=other)
    assert code == UNREACHABLE, log
    assert {name for name, (word, _) in said.items() if word == "wrong"} == {"broker-tls", "store-tls"}
    assert "not signed by the authority in FEDMQ_TLS_CA" in said["broker-tls"][1]
    assert JOB in said["settings"][1]
