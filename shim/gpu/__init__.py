"""NVIDIA GPUs: the driver's checkpoint calls, which processes they concern, and which GPUs a restored container has.

    driver       the driver's calls (libcuda.so.1), typed
    helper       the program that makes them, one per operation; it has CUDA initialised
    channel      that program as a process: its pipes, its beginning and its end
    session      the helper's other end: what a checkpoint or a restore asks of it, with timeouts
    ptrace       ptrace(2), and system calls made by a stopped process for us
    outcome      a request to the helper, and what came of it
    onethread    lets one thread of a stopped process run, which is all that the driver's calls need
    processes    which processes of a container have CUDA, or hold NVIDIA mappings without it
    obstacles    what the driver cannot checkpoint, found before anything is paused
    prefault     memory made ready for what the driver brings out of a GPU
    inventory    the GPUs of this node (NVML)
    devices      the GPUs of a container, from its spec
    device_nodes, device_mounts    a restored container's, which are the new node's and never the image's
    remap        which GPU of the new container takes the place of which of the old

Nothing here is imported for a container without a GPU, and nothing needs an NVIDIA library to be imported.
"""
