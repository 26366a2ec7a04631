"""Lifecycle: containerd shim, OCI runtime, restore and checkpoint plans, CRIU, engines, the command line."""
