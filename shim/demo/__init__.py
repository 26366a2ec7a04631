"""`smr demo`: a real inference server started cold and restored, on each engine of the machine, with engines of the demo's own.

server     what runs in the container: a LLaMA-architecture model behind HTTP; imports nothing of SMR
client     the questions put to it, and the time to the first token
overlay    the container's root: the machine's own, under a layer in memory
engine     podman and containerd with storage, state and configuration in the demo's folder
demo       the order of events, and what is measured
report     the table, the JSON and the picture
"""
