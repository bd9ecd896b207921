"""The task of the tortured workers: plain numpy, and every update it makes can be told from all others.

Training n of a worker adds 1 at one place of the model that no other training of anybody ever touches, so the final
weights show for each update how often it was applied. The place travels as `num_samples`, which the ledger keeps;
beside that the task writes what it trained to a record of its own, durably, before anybody else has it.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from worker.task import Context, TrainResult

SHAPE = (1000, 1000)  # the million parameters that the limits are stated for


def build() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Return the model: zeros."""
    return {"hits": np.zeros(SHAPE, np.float32)}


def train(model: dict[str, np.ndarray[Any, np.dtype[np.float32]]], context: Context) -> TrainResult:
    """Train for `sleep_s`: add 1 at the next place of this worker."""
    settings = context.settings
    record = Path(settings["record"])
    number = record.read_bytes().count(b"\n") if record.exists() else 0
    place = int(settings["first"]) + number * int(settings["stride"])
    with record.open("a") as file:
        file.write(json.dumps({"place": place, "base_version": context.version}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    model["hits"].reshape(-1)[place] += 1
    time.sleep(float(settings["sleep_s"]))
    return TrainResult(place + 1, 1)
