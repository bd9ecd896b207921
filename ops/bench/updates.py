"""Real encoded updates for the benchmarks."""

import numpy as np

from shared.compression import parse
from shared.messages import Update, encode
from shared.model_image import ModelImage

JOB = "bench"
CODEC = "int8"


def model_of(num_params: int) -> ModelImage:
    """Return a model of one matrix, all zero."""
    return ModelImage.of({"weights": np.zeros((num_params // 100, 100), np.float32)})


def encoded_update(model: ModelImage, sequence: int, base_version: int = 0, codec: str = CODEC) -> tuple[str, bytes]:
    """Return update_id and body of one update with a random delta; the same sequence gives the same bytes."""
    rng = np.random.default_rng(sequence)
    delta = rng.standard_normal(model.layout.num_params, np.float32) * np.float32(1e-3)
    chosen = parse(codec)
    encoded = chosen.encode(delta, model.layout, rng)
    update_id = f"bench/0/{sequence}"
    update = Update(
        job=JOB, client="bench", update_id=update_id, base_version=base_version, num_samples=100, num_steps=10,
        layout=model.layout.hash, codec={"name": chosen.name, **encoded.params}, payload=encoded.payload, metrics={},
        train_seconds=1.0, created_at=0.0,
    )  # fmt: skip
    return update_id, encode(update)


def with_id(body: bytes, sequence: int) -> tuple[str, bytes]:
    """Return the same update under another id: encoding a random delta anew would be most of the run."""
    update_id = f"bench/0/{sequence:09d}"
    return update_id, body.replace(b"bench/0/999999999", update_id.encode(), 1)
