"""The systemd unit and the example commands of ops/edge: what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shared.command import USAGE
from shared.config import WorkerSettings, load
from shared.errors import SettingsError

EDGE = Path(__file__).parents[2] / "ops" / "edge"
UNIT = (EDGE / "fedmq-worker.service").read_text()
EXPOSURE_MAX = 2.0  # of 10; systemd's own services have 9.6


def setting(name):
    return re.findall(rf"^{name}=(.*)$", UNIT, re.M)


if sys.platform == "linux":

    @pytest.fixture
    def unit(tmp_path):
        """Return the unit as a file of its own, with a program that exists in the worker's place."""
        path = tmp_path / "fedmq-worker.service"
        path.write_text(UNIT.replace("/opt/fedmq/bin/fedmq", "/bin/echo"))
        return path

    def test_systemd_finds_nothing_wrong_with_the_unit(unit):
        done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
        mine = [line for line in done.stderr.splitlines() if "fedmq" in line]
        assert (done.returncode, mine) == (0, [])

    def test_systemd_finds_it_hardened(unit):
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        exposure = re.search(r"Overall exposure level for fedmq-worker.service: ([\d.]+)", done.stdout)
        assert float(exposure[1]) <= EXPOSURE_MAX, done.stdout


def test_wrong_settings_stay_down_and_anything_else_is_tried_again():
    assert setting("RestartPreventExitStatus") == [str(USAGE)]
    assert setting("Restart") == ["always"]
    burst, interval, rest = (int(setting(n)[0]) for n in ("StartLimitBurst", "StartLimitIntervalSec", "RestartSec"))
    assert burst * rest < interval  # else the limit would never be reached


def test_its_settings_are_the_workers(monkeypatch, tmp_path):
    for line in setting("Environment"):
        name, _, value = line.partition("=")
        monkeypatch.setenv(name, value.replace("%S", str(tmp_path)))
    settings = load(WorkerSettings, {})
    assert (settings.wait_s, settings.state_dir, settings.task) == (3600.0, tmp_path / "fedmq", "/etc/fedmq/task.py")


def test_a_file_that_systemd_hands_over_is_read_though_its_mode_shows_a_group(monkeypatch, tmp_path):
    """An access list shows as the group's right; anywhere else the same mode is refused."""
    handed, elsewhere = tmp_path / "credentials", tmp_path / "elsewhere"
    for folder in (handed, elsewhere):
        folder.mkdir()
        (folder / "device.toml").write_text('broker_url = "amqp://a:secret@localhost"\n')
        (folder / "device.toml").chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(handed))

    def loaded(folder):
        monkeypatch.setenv("FEDMQ_CONFIG", str(folder / "device.toml"))
        return load(WorkerSettings, {})

    assert loaded(handed).broker_url == "amqp://a:secret@localhost"
    with pytest.raises(SettingsError, match="mode 0440"):
        loaded(elsewhere)
    (handed / "device.toml").chmod(0o444)
    with pytest.raises(SettingsError, match="mode 0444"):
        loaded(handed)


def test_the_readme_names_what_is_there_and_settings_that_exist():
    text = (EDGE / "README.md").read_text()
    for path in EDGE.iterdir():
        assert path.name == "README.md" or f"`{path.name}" in text or path.name in text, path
    known = {f"FEDMQ_{name.upper()}" for name in WorkerSettings.model_fields}
    others = {"FEDMQ_CONFIG", "FEDMQ_VERSIONS_KEPT", "FEDMQ_DOWNLINK"}
    assert set(re.findall(r"FEDMQ_[A-Z_]+", text)) <= known | others
    examples = dict(re.findall(r"`FEDMQ_(HOURS|READY_COMMAND|\w+_BYTES\w*)=([^`]*)`", text))
    assert len(examples) == 6
    load(WorkerSettings, {name.lower(): value for name, value in examples.items()})


# --- the commands


def ask(name, *arguments, **variables):
    done = subprocess.run(
        [EDGE / name, *arguments], capture_output=True, text=True, check=False,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"} | {key: str(value) for key, value in variables.items()},
    )  # fmt: skip
    assert done.stderr == ""
    return done.returncode, done.stdout.strip()


def supplies(folder, **named):
    for name, files in named.items():
        (folder / name).mkdir(parents=True)
        for file, value in files.items():
            (folder / name / file).write_text(f"{value}\n")
    return folder


MAINS, AWAY = {"type": "Mains", "online": 1}, {"type": "Mains", "online": 0}
HALF = {"type": "Battery", "capacity": 50}
MOUSE = {"type": "Battery", "capacity": 5, "scope": "Device"}


@pytest.mark.parametrize(
    ("there", "arguments", "code", "said"),
    [
        ({}, [], 0, "no battery: on mains power"),
        ({"AC": MAINS, "BAT0": HALF}, [], 0, "on mains power (AC)"),
        ({"AC": AWAY, "BAT0": HALF}, [], 1, "on battery, 50 % full"),
        ({"AC": AWAY, "BAT0": HALF}, ["50"], 0, "on battery, 50 % full"),
        ({"AC": AWAY, "BAT0": HALF}, ["51"], 1, "on battery, 50 % full"),
        ({"AC": AWAY, "BAT0": HALF, "USB": {"type": "USB", "online": 1}}, [], 0, "on mains power (USB)"),
        ({"mouse": MOUSE}, [], 0, "no battery: on mains power"),
        ({"BAT0": {"type": "Battery"}}, ["1"], 1, "on battery, 0 % full"),
    ],
)
def test_on_mains_power(tmp_path, there, arguments, code, said):
    assert ask("on-mains-power", *arguments, POWER_SUPPLIES=supplies(tmp_path, **there)) == (code, said)


@pytest.mark.parametrize(
    ("load_average", "limit", "code"), [("0.10", [], 0), ("99.0", [], 1), ("3.0", ["1000"], 0), ("0.2", ["0"], 1)]
)
def test_idle(tmp_path, load_average, limit, code):
    (tmp_path / "loadavg").write_text(f"9.99 {load_average} 0.00 1/100 7\n")
    answer = ask("idle", *limit, LOADAVG=tmp_path / "loadavg")
    assert answer[0] == code
    assert answer[1].startswith(f"load {load_average} on ")


ROUTE = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n"
DEFAULT = "wwan0\t00000000\t0100A8C0\t0003\t0\t0\t100\t00000000\n"
LOCAL = "eth0\t0000A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\n"
DEFAULT_6 = "0" * 32 + " 00 " + "0" * 32 + " 00 fe80 00000400 00000001 00000000 00000003 wlan0\n"


@pytest.mark.parametrize(
    ("routes", "metered", "code", "said"),
    [
        (ROUTE + LOCAL + DEFAULT, "no", 0, "wwan0 is not metered (no)"),
        (ROUTE + LOCAL + DEFAULT, "yes", 1, "wwan0 is metered (yes)"),
        (ROUTE + LOCAL + DEFAULT, "yes (guessed)", 1, "wwan0 is metered (yes (guessed))"),
        (ROUTE + LOCAL + DEFAULT, "", 0, "wwan0 is not metered (unknown)"),
        (ROUTE + LOCAL, "no", 0, "wlan0 is not metered (no)"),
    ],
)
def test_unmetered(tmp_path, routes, metered, code, said):
    (tmp_path / "route").write_text(routes)
    (tmp_path / "ipv6_route").write_text(DEFAULT_6)
    (tmp_path / "nmcli").write_text(f"#!/bin/sh\necho '{metered}'\n")
    (tmp_path / "nmcli").chmod(0o755)
    assert ask("unmetered", PROC_NET=tmp_path, PATH=f"{tmp_path}:/usr/bin:/bin") == (code, said)


def test_without_a_network_it_waits(tmp_path):
    assert ask("unmetered", PROC_NET=tmp_path) == (1, "no network leads out")


def test_all_of_several(tmp_path):
    power, load_average = supplies(tmp_path / "power", AC=AWAY, BAT0=HALF), tmp_path / "loadavg"
    load_average.write_text("1 0.0 1\n")
    given = {"POWER_SUPPLIES": power, "LOADAVG": load_average}
    assert ask("all", "on-mains-power 40", "idle 1", **given)[0] == 0
    assert ask("all", "idle 1", "on-mains-power 60", **given) == (1, "on battery, 50 % full")
    assert ask("all", "idle 1", "no-such-one", **given)[0] == 1
