"""`smr agent`: the node's images and checkpoints over gRPC, and metrics, health and Kubernetes events of its restores.

    main.py         the process: one a node, its sockets, its end
    service.py      the calls of proto/agent/agent.proto
    work.py         a program: one prefetch, pin or checkpoint, in a process of its own
    workers.py      runs it, and hears what it says
    watch.py        inotify on the journal of events (smr.shim.events)
    reader.py       reads it
    journal.py      what the journal says, told to metrics, watchers and Kubernetes, once
    totals.py       what was counted, and its file
    metrics.py      the same for Prometheus, with what is looked up at each scrape
    health.py       whether store and CRIU can be used
    node.py         its namespaces, when a pod runs it
    web.py          /metrics and /healthz
    kubernetes.py   events of pods
    client.py       the other end, for `smr agent status`, `list` and `watch`

Nothing depends on it: the runtime restores without an agent, and an agent may be killed at any time. It holds nothing that
a container needs. Images and containers are read from the store and the state directory at each call; what takes long or much
memory is done by a process of its own, which ends by itself when the agent has gone. All that it keeps is RUN/agent:

    lock            flock: the one agent of this node
    totals.json     what was counted, and how far in the journal; replaced atomically

An idle agent sleeps in epoll: there is no timer and no thread that looks at anything by the clock.
"""
