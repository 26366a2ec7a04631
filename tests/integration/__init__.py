"""Tests against real engines, runtimes and CRIU. `dev/provision` brings them; what is missing is skipped with the reason."""
