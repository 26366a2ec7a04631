"""Wire contracts, and nothing else: annotations, errors, the OCI spec as we read it, the checkpoint config, CRIU's images.

Nothing here touches the system. Everything above (`smr.images`, `smr.shim`, `smr.hooks`) may import it; it imports none of them.
"""
