"""Checkpoint images: store, manifest, layers, archives, prefetch, page delivery. Knows no container and no engine."""
