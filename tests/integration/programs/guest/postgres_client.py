"""PostgreSQL with its own clients: psql for what a person does and for sessions that stay, pgbench for many at once.

This one runs outside of the image, where psql is. Sessions that stay: one listens, one has a transaction open with a locked row,
one is in the middle of a query.
"""

import contextlib
import subprocess
import time

from client import CLIENTS, same

BIN = "/usr/lib/postgresql/15/bin"
OTHERS = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"


class Session:
    def __init__(self, host, port):
        self.where = ["-h", host, "-p", str(port), "-U", "postgres"]
        self.live = []

    def run(self, program, *words):
        done = subprocess.run([f"{BIN}/{program}", *self.where, *words], check=False, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            raise AssertionError(f"{program} {' '.join(words)}: {done.stderr}")
        return done.stdout.strip()

    def sql(self, text):
        return self.run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", text, "postgres")

    def session(self, text):
        """A psql that has answered to `text` and stays."""
        argv = [f"{BIN}/psql", *self.where, "-XAtq", "postgres"]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.live.append(process)
        process.stdin.write(f"{text}\n\\echo ready\n")
        process.stdin.flush()
        same("psql's answer", process.stdout.readline(), "ready\n")
        return process

    def bench(self):
        self.run("pgbench", "-n", "-c", str(CLIENTS), "-t", "20", "postgres")
        same("accounts less their history", self.sql(_BALANCE), "0")

    def state(self):
        return {
            "started": self.sql("SELECT pg_postmaster_start_time()"),
            "kept": self.sql("SELECT string_agg(text, ',' ORDER BY id) FROM kept"),
            "history": self.sql("SELECT count(*) FROM pgbench_history"),
            "unlogged": self.sql("SELECT count(*) FROM unlogged"),
        }

    def prepare(self):
        self.sql("CREATE TABLE kept (id serial PRIMARY KEY, text text)")
        self.sql("INSERT INTO kept (text) VALUES ('before'), ('the checkpoint')")
        self.sql("CREATE UNLOGGED TABLE unlogged AS SELECT generate_series(1, 1000)")
        self.run("pgbench", "-i", "-q", "postgres")
        self.bench()
        return self.state()

    def open_live(self):
        self.session("LISTEN news;")
        self.session("BEGIN; UPDATE kept SET text = 'never' WHERE id = 1;")
        sleeper = self.session("SELECT 1 WHERE false;")
        sleeper.stdin.write("SELECT pg_sleep(600);\n")
        sleeper.stdin.flush()

    def go_on(self):
        for process in self.live[:2]:
            process.stdin.write("SELECT count(*) FROM kept;\n")
            process.stdin.flush()
            same("rows", process.stdout.readline(), "2\n")
        return {"sessions": len(self.live)}

    def check(self, state):
        same("state", self.state(), state)
        # The row that an old client has locked is free once its server process sees that the client is gone.
        self.sql("SET lock_timeout = '15s'; UPDATE kept SET text = 'after' WHERE id = 1")
        deadline = time.monotonic() + 15
        while self.sql(OTHERS) != "0" and time.monotonic() < deadline:
            time.sleep(0.2)
        same("clients of before the checkpoint", self.sql(OTHERS), "0")
        self.sql("INSERT INTO kept (text) VALUES ('the restore')")
        same("rows", self.sql("SELECT string_agg(text, ',' ORDER BY id) FROM kept"), "after,the checkpoint,the restore")
        self.bench()
        self.sql("CHECKPOINT")
        self.sql("VACUUM ANALYZE pgbench_accounts")
        listener = self.session("LISTEN news;")
        self.sql("NOTIFY news, 'hello'")
        listener.stdin.write("SELECT 1;\n")
        listener.stdin.flush()
        answers = [listener.stdout.readline() for _ in range(2)]
        if not any('"hello"' in answer for answer in answers):
            raise AssertionError(f"a notification: found {answers}")
        for process in self.live:
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.wait(10)
        return {"requests": CLIENTS * 20 + 20}


_BALANCE = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) - (SELECT sum(delta) FROM pgbench_history)"
