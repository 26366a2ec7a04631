"""Real servers that are checkpointed with clients and restored elsewhere, and the sessions that their clients have with them.

guest/       what is in the container image: servers, and clients. It runs on the image's own Python and imports nothing of SMR
image.py     the image, and its files unpacked, in which clients run on the host's side of the bridge
catalogue.py which servers there are and how each is started and ended
places.py    where they run: podman on a bridge, containerd with CNI plugins; IPv4 and IPv6
matrix.py    one cell of the table: start, session, checkpoint, restore, session, end; and the table's JSON
"""
