"""Tests on a real NVIDIA GPU; without one they are skipped with the reason."""
