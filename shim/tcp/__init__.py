"""TCP connections of a container, saved and brought back by SMR itself; CRIU dumps and restores their sockets as closed ones.

    table      which connections there are, and which have both ends in the container (inner) or one elsewhere (outer)
    repair     one socket's connection as bytes and numbers, and back, by the kernel's TCP_REPAIR
    lock       with --stop: packets of saved connections are dropped until they are restored, where the node has nftables
    capture    checkpoint: connections of the frozen tree, read after CRIU's dump; outer ones get no packet meanwhile
    mode       restore: what becomes of outer connections (smr.tcp), judged before anything is touched
    revive     restore: inner connections, and with `established` outer ones, put back into the sockets of the stopped tree; the
               others end with ECONNRESET

What is saved travels beside CRIU's images (smr.images.connections). A descriptor of a process is borrowed with pidfd_getfd(2)
(Linux 5.6), which needs no ptrace and does not care whether the process is frozen or stopped. While a tree is frozen no packet
filter of the node is used: a connection is locked by a socket filter that lets nothing in, and a socket in repair mode closes
without a word. So it works in any network namespace, also one that is shared, and with neither nftables nor iptables.
"""
