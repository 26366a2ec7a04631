"""Quiesce and resume hooks: what a container is asked before a checkpoint pauses it, and what undoes that.

The values of `smr.quiesce` and `smr.resume`, one line each; docs/annotations.md has the same with examples:

    HOOK     STEP [" ; " STEP]...          one after the other; " ; " in quotes does not separate
             none                          nothing; as smr.resume it keeps a preset of smr.quiesce from being undone
    STEP     ["timeout=" SECONDS " "] (PRESET | HTTP | EXEC | SIGNAL)
    PRESET   vllm[:OPTION=VALUE,...]       port=8000 level=1|2 drain=keep|wait|abort
             sglang[:OPTION=VALUE,...]     port=30000 tags=kv_cache[+weights][+cuda_graph] drain=wait|abort
    HTTP     [METHOD " "] URL [" " BODY]   METHOD is POST when there is none; BODY is text, or json=DOCUMENT
    URL      http://[ADDRESS][:PORT]/PATH  no ADDRESS: 127.0.0.1, else ::1;  or unix:///SOCKET:/PATH
    EXEC     exec:COMMAND                  words as a shell splits them; there is no shell
    SIGNAL   signal:NAME[:PID|:COMMAND]    to the container's init, a pid as the container sees it, or all of that name

Everything happens inside the container: HTTP in its network namespace, commands through the runtime's `exec` with the
container's user and environment, signals by pidfd. A step that fails or takes too long ends the hook with HookError.
Standard library only: a restore calls this.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from ipaddress import ip_address
from typing import TYPE_CHECKING

from smr.proto.errors import Code, SmrError
from smr.shim import inside, inside_run
from smr.shim.inside import Answer, Endpoint
from smr.shim.presets import PRESETS, Options, Preset, quote

if TYPE_CHECKING:
    from smr.proto.checkpoint import Hooks
    from smr.shim.engines.target import Target

DEFAULT_TIMEOUT_S = 30.0
# What undoes a request gets this long, even when the hook's own time is up.
_TAKE_BACK_S = 5.0
_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
_NONE = "none"
_HELP = "a preset (vllm, sglang), [METHOD] http://[ADDRESS][:PORT]/PATH [BODY], exec:COMMAND or signal:NAME"
_TIMEOUT = re.compile(r"timeout=(\S*)\s+(.*)", re.DOTALL)
_URL = re.compile(r"http://(?P<host>\[[^\]]*\]|[^:/\[\]]*)(?::(?P<port>\d*))?(?P<path>/[!-~]*)?")
_UNIX = re.compile(r"unix://(?P<socket>/[^:\s]+)(?::(?P<path>/[!-~]*))?")
# Neither can be handled: the one ends the container, the other is what a checkpoint does by itself.
_NOT_SENT = (signal.SIGKILL, signal.SIGSTOP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Http:
    """A request; `is_json` says what the body is."""

    method: str
    endpoint: Endpoint
    path: str
    body: bytes | None = None
    is_json: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A preset with all its options, defaults included."""

    name: str
    port: int
    options: Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Exec:
    """A command in the container."""

    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """A signal. `target`: a pid as the container sees it, a command name, or None for the container's init."""

    number: signal.Signals
    target: int | str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step as it was written. `timeout_s` 0: the hook's."""

    text: str
    action: Http | Known | Exec | Signal
    timeout_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """A parsed hook; without steps it does nothing."""

    which: str
    text: str
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The container a hook runs in: host pid of its init, its id, and the real runtime with its arguments before the verb."""

    pid: int
    container: str
    runtime: tuple[str, ...] = ()


class HookError(SmrError):
    """HOOK_FAILED. `begun`: something in the container may have changed, so the resume hook has to run."""

    def __init__(self, message: str, *, hint: str = "", begun: bool, **context: object) -> None:
        super().__init__(message, hint=hint, code=Code.HOOK_FAILED, **context)
        self.begun = begun


def parse_hook(text: str, which: str) -> Hook:
    """The value of `smr.quiesce` or `smr.resume`. Raises ANNOTATION_INVALID."""
    if text.strip() in ("", _NONE):
        return Hook(which=which, text=text)
    return Hook(which=which, text=text, steps=tuple(_step(part, which) for part in _split(text)))


def parse_hooks(quiesce: str, resume: str) -> tuple[Hook, Hook]:
    """Both hooks. Where there is no resume, the presets of the quiesce are undone, the last first. Raises ANNOTATION_INVALID."""
    first, second = parse_hook(quiesce, "quiesce"), parse_hook(resume, "resume")
    if resume.strip():
        return first, second
    undone = tuple(step for step in reversed(first.steps) if isinstance(step.action, Known))
    return first, Hook(which="resume", text=" ; ".join(step.text for step in undone), steps=undone)


def run_hook(hook: Hook, place: Place, timeout_s: float = 0.0, begun: Callable[[], object] = lambda: None) -> None:
    """Run all steps; `timeout_s` is for each step that names none, 0 means 30 s. Raises HookError.

    `begun` is called before anything is asked of the container that a resume has to take back, for who may be killed meanwhile.

    A resume waits until its time is up for a server that refuses connections: it may just be starting to listen.
    """
    for index, step in enumerate(hook.steps):
        runner = _Runner(hook.which, step, place, timeout_s, begun)
        try:
            runner.run()
        except SmrError as error:
            raise HookError(
                f"{hook.which} hook '{step.text}' failed: {error.message}",
                hint=error.hint,
                begun=index > 0 or runner.decided,
                container=place.container,
                step=index + 1,
            ) from error


def run(target: Target, hooks: Hooks, which: str, begun: Callable[[], object] = lambda: None) -> None:
    """One of the hooks of a container that an engine runs. Raises HookError; after `begun` the resume has to run."""
    first, second = parse_hooks(hooks.quiesce, hooks.resume)
    place = Place(pid=target.pid, container=target.id, runtime=tuple(target.runtime_command()))
    run_hook(first if which == "quiesce" else second, place, hooks.timeout_s, begun)


class _Runner:
    """One step, until its time is up. It is also the `Client` of a preset."""

    def __init__(self, which: str, step: Step, place: Place, timeout_s: float, begun: Callable[[], object]) -> None:
        self._which, self._step, self._place, self._begun = which, step, place, begun
        self._seconds = step.timeout_s or timeout_s or DEFAULT_TIMEOUT_S
        self._deadline = time.monotonic() + self._seconds
        self._endpoint = Endpoint()
        self._decided = False

    @property
    def decided(self) -> bool:
        """Whether it had an effect, as far as can be known."""
        return self._decided

    @decided.setter
    def decided(self, value: bool) -> None:
        if value:
            self._begun()
        self._decided = value

    def run(self) -> None:
        """Raises SmrError; `decided` says whether it had an effect."""
        if not isinstance(self._step.action, Known):
            self._begun()
        match self._step.action:
            case Http() as http:
                self._http(http)
            case Known() as known:
                self._endpoint = Endpoint(port=known.port)
                preset = PRESETS[known.name]
                (preset.quiesce if self._which == "quiesce" else preset.resume)(self, known.options)
            case Exec() as command:
                self.decided = True
                inside_run.execute(self._place.runtime, self._place.container, command.argv, self._seconds)
            case Signal() as sent:
                inside_run.send(self._place.pid, sent.number, sent.target)
                self.decided = True

    def ask(self, method: str, path: str, document: object = None) -> Answer:
        body = None if document is None else json.dumps(document).encode()
        return self._request(Http(method=method, endpoint=self._endpoint, path=path, body=body, is_json=True))

    def take_back(self, method: str, path: str, document: object = None) -> None:
        before, self._deadline = self._deadline, time.monotonic() + _TAKE_BACK_S
        try:
            self.ask(method, path, document)
        except SmrError:
            pass  # the failure that made this necessary is the one to tell
        finally:
            self._deadline = before

    def url(self, path: str) -> str:
        return self._endpoint.url(path)

    def expired(self) -> bool:
        return time.monotonic() >= self._deadline

    def _http(self, http: Http) -> None:
        try:
            answer = self._request(http)
        except SmrError as error:
            self.decided = isinstance(error.__cause__, inside.SilentError)
            raise
        self.decided = True
        if answer.status >= 300:
            what = f"{http.method} {http.endpoint.url(http.path)} answered {quote(answer)}"
            hint = "needed a status of 200 to 299; redirects are not followed" if answer.status < 400 else "see the server's log"
            raise SmrError(what, hint=hint, code=Code.HOOK_FAILED)

    def _request(self, http: Http) -> Answer:
        url = http.endpoint.url(http.path)
        try:
            return inside.request(
                self._place.pid,
                http.endpoint,
                http.method,
                http.path,
                body=http.body,
                json=http.is_json,
                deadline=self._deadline,
                retry_refused=self._which == "resume",
            )
        except inside.SilentError as error:
            message = f"{http.method} {url}: {error} ({self._seconds:g} s)"
            hint = "give it longer, smr.hook.timeout=SECONDS, or see the server's log"
            raise SmrError(message, hint=hint, code=Code.HOOK_FAILED) from error
        except OSError as error:
            hint = "nobody listens there: check the port; a server that listens on one address needs it in the URL"
            what = f"{http.method} {url}: {error.strerror or error}"
            raise SmrError(what, hint=hint, code=Code.HOOK_FAILED) from error


def _split(text: str) -> list[str]:
    """Parts between " ; " outside of quotes."""
    parts, quoted, start = [], "", 0
    for at, char in enumerate(text):
        if char in "\"'" and (not quoted or quoted == char) and (at == 0 or text[at - 1] != "\\"):
            quoted = "" if quoted else char
        elif not quoted and text.startswith(" ; ", at):
            parts.append(text[start:at])
            start = at + 3
    return [*parts, text[start:]]


def _step(text: str, which: str) -> Step:
    text = text.strip()
    seconds = 0.0
    rest = text
    if text.startswith("timeout="):
        found = _TIMEOUT.fullmatch(text)
        if not found or not re.fullmatch(r"\d{1,5}(\.\d{1,3})?", found[1]) or float(found[1]) <= 0:
            raise _invalid(which, text, "not a number of seconds", "use timeout=60 and a space before the step")
        seconds, rest = float(found[1]), found[2]
    return Step(text=text, action=_action(rest, which), timeout_s=seconds)


def _action(text: str, which: str) -> Http | Known | Exec | Signal:
    word = text.split(" ", 1)[0]
    kind, _, value = text.partition(":")
    if kind == "exec":
        return _exec(value, which)
    if kind == "signal":
        return _signal(value, which)
    if kind in PRESETS:
        return _known(PRESETS[kind], value, which)
    if word.upper() in _METHODS or word.startswith(("http:", "unix:")):
        return _parse_http(text, which)
    if word.startswith("https:"):
        raise _invalid(which, text, "https cannot be spoken here", "use exec:curl ..., where the container has curl")
    close = get_close_matches(kind, [*PRESETS, "exec", "signal", "http", "unix"], n=1)
    hint = f"did you mean {close[0]}? needed {_HELP}" if close else f"needed {_HELP}"
    raise _invalid(which, text, "neither a preset, a URL, a command nor a signal", hint)


def _exec(value: str, which: str) -> Exec:
    try:
        argv = tuple(shlex.split(value))
    except ValueError as error:
        raise _invalid(which, f"exec:{value}", str(error), "quote it as for a shell: exec:/bin/sh -c 'kill -USR1 7'") from None
    if not argv:
        raise _invalid(which, "exec:", "no command", "use exec:/app/quiesce --now")
    return Exec(argv=argv)


def _signal(value: str, which: str) -> Signal:
    name, colon, target = value.partition(":")
    names = {member.name.removeprefix("SIG"): member for member in signal.Signals}
    number = names.get(name.upper().removeprefix("SIG"))
    text = f"signal:{value}"
    if number is None:
        close = get_close_matches(name.upper().removeprefix("SIG"), names, n=1)
        raise _invalid(which, text, f"no signal is named '{name}'", f"did you mean {close[0]}?" if close else "use signal:USR1")
    if number in _NOT_SENT:
        raise _invalid(
            which, text, f"{number.name} cannot be handled by a program", "use signal:USR1, or another that it handles"
        )
    if colon and not target:
        raise _invalid(which, text, "nothing after the colon", "use signal:USR1:7 or signal:USR1:COMMAND")
    return Signal(number=number, target=int(target) if target.isdecimal() else target or None)


def _known(preset: Preset, value: str, which: str) -> Known:
    text = f"{preset.name}:{value}"
    options = {name: values[0] for name, values in preset.options.items()}
    port = preset.port
    for part in value.split(",") if value else ():
        name, _, chosen = part.partition("=")
        if name == "port":
            port = _port(chosen, text, which)
            continue
        if name not in options:
            known = ", ".join(["port", *options])
            raise _invalid(which, text, f"{preset.name} has no option '{name}'", f"it has {known}")
        wrong = [item for item in (chosen.split("+") if name in preset.several else [chosen]) if item not in preset.options[name]]
        if wrong:
            allowed = ("+" if name in preset.several else "|").join(preset.options[name])
            raise _invalid(which, text, f"{name} cannot be '{wrong[0]}'", f"use {name}={allowed}")
        options[name] = chosen
    return Known(name=preset.name, port=port, options=options)


def _port(value: str, text: str, which: str) -> int:
    if value.isascii() and value.isdecimal() and 0 < int(value) < 65536:
        return int(value)
    raise _invalid(which, text, f"'{value}' is not a port", "use 1 to 65535")


def _parse_http(text: str, which: str) -> Http:
    first, _, rest = text.partition(" ")
    method = first.upper() if first.upper() in _METHODS else "POST"
    url, _, body = (rest if first.upper() in _METHODS else text).strip().partition(" ")
    endpoint, path = _endpoint(url, text, which)
    content, is_json = body.strip(), body.strip().startswith("json=")
    if is_json:
        content = content.removeprefix("json=")
        try:
            json.loads(content)
        except ValueError as error:
            raise _invalid(which, text, f"the body is not JSON: {error}", """use json={"level": 1}""") from None
    return Http(method=method, endpoint=endpoint, path=path, body=content.encode() if content else None, is_json=is_json)


def _endpoint(url: str, text: str, which: str) -> tuple[Endpoint, str]:
    if found := _UNIX.fullmatch(url):
        return Endpoint(unix=found["socket"]), found["path"] or "/"
    found = _URL.fullmatch(url)
    if not found:
        raise _invalid(
            which, text, f"'{url}' is not a URL", "use http://:8000/path, http://127.0.0.1:8000/path or unix:///run/a.sock:/path"
        )
    port = _port(found["port"], text, which) if found["port"] is not None else 80
    return Endpoint(hosts=_hosts(found["host"], text, which), port=port), found["path"] or "/"


def _hosts(host: str, text: str, which: str) -> tuple[str, ...]:
    if host in ("", "localhost"):
        return Endpoint().hosts
    try:
        return (str(ip_address(host.strip("[]"))),)
    except ValueError:
        raise _invalid(
            which, text, f"'{host}' is not an IP address; names are not looked up", "use http://:8000/path for the loopback"
        ) from None


def _invalid(which: str, text: str, what: str, hint: str) -> SmrError:
    key = f"smr.{which}"
    return SmrError(f"annotation {key}: '{text}': {what}", hint=hint, code=Code.ANNOTATION_INVALID, annotation=key)
