"""Nats to bits; no other module converts them."""

import math

__all__ = ["bits_per_dim"]


def bits_per_dim(nats: float, dims: int) -> float:
    """Nats of a whole image of ``dims`` dimensions as bits per dimension: nats / (dims ln 2), sign unchanged."""
    return nats / (dims * math.log(2))
