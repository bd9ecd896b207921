"""Writes the dashboards' JSON from their description: `python -m ops.grafana.build`; a test compares."""

import json
from pathlib import Path

from ops.grafana import fleet, overview, pipeline, safety
from ops.grafana.panels import json_of

ALL = tuple(module.DASHBOARD for module in (overview, pipeline, fleet, safety))
FOLDER = Path(__file__).parent / "dashboards"


def texts() -> dict[str, str]:
    """Return file name -> JSON of each dashboard."""
    return {
        f"{dashboard.uid.removeprefix('fedmq-')}.json": json.dumps(json_of(dashboard), indent=1) + "\n"
        for dashboard in ALL
    }


if __name__ == "__main__":
    for name, text in texts().items():
        (FOLDER / name).write_text(text)
