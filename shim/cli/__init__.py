"""The `smr` command."""
