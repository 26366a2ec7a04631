"""`smr doctor`: what a bug report needs of this node, without secrets, whatever state the node is in.

    sections.py     what is collected: a function each, which may fail or hang
    collect.py      runs them side by side, each on its own, in bounded time and size
    redact.py       takes secrets out of all that they return
    archive.py      the report as text and as a tar.gz

What is never collected: memory and images of memory, values of environment variables, annotations other than SMR's own, command
lines of containers, configuration of others beyond what registers a runtime. What is collected goes through redact.py all the
same, because logs quote.
"""
