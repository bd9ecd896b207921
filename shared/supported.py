"""Which versions of the servers this release was made for."""

import logging

from shared.errors import SettingsError

log = logging.getLogger("fedmq")

SUPPORTED = {"RabbitMQ": ((3, 10), 4), "Redis": ((7, 0), 8)}  # oldest version, newest major


def check(server: str, version: str) -> str:
    """Return the version; warn of one that is newer than what was tried, refuse one that lacks what we need.

    Args:
        server: `RabbitMQ` or `Redis`.
        version: as it says, e.g. `3.10.8`; one that is no number is let pass.

    Raises:
        SettingsError: it is too old.
    """
    (major, minor), newest = SUPPORTED[server]
    numbers = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    if len(numbers) < 2:
        return version
    if tuple(numbers) < (major, minor):
        raise SettingsError(
            f"{server} {version} is too old: FedMQ needs {major}.{minor} to {newest}.x. Upgrade {server}; its data stay"
        )
    if numbers[0] > newest:
        log.warning("%s %s is newer than any this release was tried with (%d.x)", server, version, newest)
    return version
