"""OCI hooks for podman and CRI-O."""
