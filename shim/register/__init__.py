"""Registration of SMR with the engines of a node: which configuration files are to say what, as a plan.

Nothing here writes outside the staging directory: install.sh carries the plan out, keeps what was there and can undo it.
Standard library only, so that it runs from the source before anything is installed (also for --dry-run).

    files        what a plan is made of, and the format in which install.sh reads it
    toml_edit    TOML text edited with everything else in the file kept as it is
    containerd   the CRI runtime `smr`: in a drop-in where containerd merges it correctly, else in the configuration itself
    podman       containers.conf.d: runtime, hooks directories
    crio         crio.conf.d: runtime handler, hooks directory
    node         SMR's own files: /etc/smr, hook JSON, links on PATH
"""
