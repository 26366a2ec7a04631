"""A container that is held for a checkpoint, and given back whatever happens.

    quiesce    the container's own hook, while it runs; clients wait from here
    gpu        every CUDA process is locked, then each one's GPU memory is brought into its own memory (smr.shim.gpu.capture)
    freeze     the runtime's pause; what a dump must not meet stopped is continued
    thaw       the container as it was: stopped processes stopped, the rest running unless it was paused
    gpu_back   GPU memory back and unlocked
    resume     the container's own hook; `pause_s` ends here

One guard covers all of it: when this process is killed it waits for CRIU to end, then gives the container back.
Whoever holds calls the steps in this order; `release` does the last three, once, and so does the end of the block.
"""

from __future__ import annotations

import contextlib
import mmap
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from smr.proto.annotations import HOOK_TIMEOUT, QUIESCE, RESUME
from smr.proto.checkpoint import Hooks
from smr.proto.errors import Code, SmrError
from smr.shim import stopped
from smr.shim.config import Config
from smr.shim.engines.target import Target
from smr.shim.gpu import capture
from smr.shim.gpu.capture import Capture
from smr.shim.guard import Guard
from smr.shim.procs import Process
from smr.shim.run import run

Progress = Callable[[str], None]


class Stages:
    """Times of stages, told to the user as they begin."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one."""
        self._progress(name)
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - start, 6)


@dataclass(slots=True, kw_only=True)
class Hold:
    """See the module. `warnings` are what went wrong without making the checkpoint wrong."""

    target: Target
    guard: Guard
    stages: Stages
    hooks: Hooks
    gpu: Capture | None
    stopped: tuple[Process, ...]
    quiesced: mmap.mmap
    warnings: list[str] = field(default_factory=list)
    start: float = 0.0
    end: float = 0.0
    _taken: bool = False
    _frozen: bool = False

    def quiesce(self) -> None:
        """Have the container get ready. Raises HOOK_FAILED; the resume hook then runs when it is released."""
        self.start = time.monotonic()
        if self.hooks.quiesce:
            from smr.shim import quiesce

            try:
                with self.stages.stage("quiesce"):
                    quiesce.run(self.target, self.hooks, "quiesce", lambda: self._mark(1))
            except quiesce.HookError as error:
                self._mark(error.begun)
                raise
            self._mark(1)

    def take_gpu(self) -> None:
        """Bring GPU memory into the processes' own. Raises GPU_FAILED with all of them as before."""
        if self.gpu is not None:
            self._taken = True
            with self.stages.stage("gpu"):
                self.gpu.take()

    def freeze(self) -> None:
        """From here on nothing of the container changes."""
        self._frozen = True
        with self.stages.stage("freeze"):
            if self.target.status != "paused":
                pause = self.target.runtime_command("pause", self.target.id)
                # The guard waits for it: a resume before its end would leave the container frozen.
                run(pause, timeout_s=60, code=Code.CHECKPOINT_FAILED, pass_fds=self.guard.pass_fds)
            stopped.send(self.stopped, signal.SIGCONT)

    def thaw(self) -> None:
        """Let it run, once; its GPU is still away."""
        if self._frozen:
            self._frozen = False
            with self.stages.stage("thaw"):
                let_go(self.target, self.stopped)

    def release(self) -> None:
        """Give it back whole, once. Raises what failed, after all has been tried; a resume hook that fails is a warning."""
        self.thaw()
        try:
            if self._taken and self.gpu is not None:
                self._taken = False
                with self.stages.stage("gpu_back"):
                    self.gpu.give_back()
        finally:
            self._resume()
            self.end = self.end or time.monotonic()

    def abandon(self) -> None:
        """The container has ended: there is nothing to give back."""
        self._taken = False
        self._mark(0)

    def _mark(self, begun: int) -> None:
        """For the guard as well, which shares this byte: whether a resume has something to take back."""
        self.quiesced[0] = int(begun)

    def _resume(self) -> None:
        if not self.quiesced[0]:
            return
        try:
            with self.stages.stage("resume"):
                run_resume(self.target, self.hooks)
        except SmrError as error:
            self.warnings.append(f"the container was given back, its resume hook failed: {error}")
        self._mark(0)

    def pause_s(self) -> float:
        """How long it was, or has been so far, held, in seconds."""
        return round((self.end or time.monotonic()) - self.start, 6) if self.start else 0.0


@contextlib.contextmanager
def held(target: Target, config: Config, hooks: Hooks, stages: Stages) -> Iterator[Hold]:
    """Find what is to be held; raises before anything is paused when it cannot be. In the end all is given back.

    A failure to give back after another failure does not hide that one: it is added to it as a note.
    """
    halted = stopped.in_the_way(target.pid)
    quiesced = mmap.mmap(-1, 1)
    with contextlib.ExitStack() as stack:
        gpu = stack.enter_context(capture.find(target, config, quiesced=bool(hooks.quiesce)))
        guard = stack.enter_context(
            Guard(lambda: _give_back(target, config, hooks, halted, gpu is not None, quiesced), until_children_end=True)
        )
        hold = Hold(target=target, guard=guard, stages=stages, hooks=hooks, gpu=gpu, stopped=halted, quiesced=quiesced)
        try:
            yield hold
        except BaseException as error:
            try:
                hold.release()
            except SmrError as second:
                error.add_note(f"and it could not be given back: {second}")
            raise
        hold.release()


def hooks_of(target: Target, quiesce: str = "", resume: str = "", timeout_s: float = 0.0) -> Hooks:
    """The hooks of a checkpoint: those given, else those of the container's annotations. Raises ANNOTATION_INVALID."""
    own = target.spec.annotations
    timeout = timeout_s or float(own.get(HOOK_TIMEOUT, "0") or 0)
    hooks = Hooks(quiesce=quiesce or own.get(QUIESCE, ""), resume=resume or own.get(RESUME, ""), timeout_s=timeout)
    if hooks.quiesce or hooks.resume:
        from smr.shim.quiesce import parse_hooks

        parse_hooks(hooks.quiesce, hooks.resume)
    return hooks


def run_resume(target: Target, hooks: Hooks) -> None:
    """Run the resume hook on a running container. Raises HOOK_FAILED."""
    from smr.shim import quiesce

    quiesce.run(target, hooks, "resume")


def _give_back(target: Target, config: Config, hooks: Hooks, halted: tuple[Process, ...], gpu: bool, quiesced: mmap.mmap) -> None:
    """In the guard: whatever was done, in the order of `release`. Each step does nothing where nothing was done."""
    from smr.shim.tcp.capture import rescue

    with contextlib.suppress(SmrError, OSError):
        rescue(target.pid, config.run)
    with contextlib.suppress(SmrError):
        let_go(target, halted)
    if gpu:
        with contextlib.suppress(SmrError):
            capture.give_back(target, config)
    if quiesced[0]:
        run_resume(target, hooks)


def let_go(target: Target, halted: tuple[Process, ...]) -> None:
    """The container as it was: stopped processes stopped, and the rest running, unless it was paused."""
    stopped.send(halted, signal.SIGSTOP)
    if target.status != "paused":
        _thaw(target)


def _thaw(target: Target) -> None:
    """Resume; a runtime thaws by itself for SIGKILL (runc) and then knows of no pause, or of no container, any more."""
    result = run(target.runtime_command("resume", target.id), timeout_s=60, check=False, code=Code.CHECKPOINT_FAILED)
    if result.returncode == 0:
        return
    state = run(target.runtime_command("state", target.id), timeout_s=20, check=False)
    if state.returncode == 0 and '"paused"' in state.stdout:
        raise SmrError(
            f"container {target.name or target.id} cannot be resumed: {result.stderr.strip()}",
            hint=f"{' '.join(target.runtime_command('resume', target.id))}",
            code=Code.CHECKPOINT_FAILED,
            container=target.id,
        )
