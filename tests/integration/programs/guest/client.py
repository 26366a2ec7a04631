"""A client of one server, in two acts; each act is a process, which speaks JSON lines with the test.

    client.py PROTOCOL HOST PORT live           makes state, opens connections that stay, and says {"state": ...}; for every line
                                                "go" those connections go on, and it says what came: {"live": ...}
    client.py PROTOCOL HOST PORT check STATE    a whole session with a server that was restored with STATE: {"check": ...}

A failure is {"failed": WHY}, a traceback and an exit status of 1.
"""

import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor

CLIENTS, ROUNDS = 6, 10


def together(work, clients=CLIENTS):
    """`work(number)` of many clients at once; the first failure is raised."""
    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(work, number) for number in range(clients)]:
            done.result()


def same(what, found, needed):
    """AssertionError that names both."""
    if found != needed:
        raise AssertionError(f"{what}: found {found!r}, needed {needed!r}")


def failed(kind, error, trace):
    """As sys.excepthook."""
    print(json.dumps({"failed": f"{kind.__name__}: {error}"}), flush=True)
    sys.__excepthook__(kind, error, trace)


def main():
    protocol, host, port, act, *rest = sys.argv[1:]
    session = importlib.import_module(f"{protocol}_client").Session(host, int(port))
    if act == "check":
        print(json.dumps({"check": session.check(json.loads(rest[0]))}), flush=True)
        return
    state = session.prepare()
    session.open_live()
    print(json.dumps({"state": state}), flush=True)
    for line in sys.stdin:
        if line.strip() != "go":
            break
        print(json.dumps({"live": session.go_on()}), flush=True)


if __name__ == "__main__":
    sys.modules["client"] = sys.modules["__main__"]
    sys.excepthook = failed
    main()
