"""Work on the device in processes of its own: a kernel that kills its process, or never ends, costs its own work alone.

A child does one job at a time and ends itself where its device is of no use any more, as after an illegal access; the
next job gets a fresh one. The parent runs no kernel, and nothing twice that killed a child.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

#: Seconds between two savings of what comes in.
PAUSE = 2.0
#: Seconds to wait for a process that was ended: where the device hangs, its driver may hold it back.
GRACE = 10.0


class Job(NamedTuple):
    """A module's function and its arguments. ``tells``: it takes ``tell(found, doing)``, for what there is so far."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    tells: bool = False


class Outcome(NamedTuple):
    """What a job gave, or why it gave nothing. ``is_late``: its time was over; ``has_ended``: so has its process."""

    value: Any = None
    error: str | None = None
    is_late: bool = False
    has_ended: bool = False


LATE = Outcome(error="no time left", is_late=True)


def why(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


_is_retired = False


def retire() -> None:
    """Let this process take no further jobs: something in it is not as it was."""
    global _is_retired
    _is_retired = True


def is_usable() -> bool:
    """Whether the device still does what this process asks for. After some errors nothing works any more."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def _serve(connection: Connection, environment: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends its children
    os.environ.update(environment)
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(("begun",))  # the process has started, and imported what the job is made of
        more = {"tell": lambda *part: connection.send(("part", *part))} if job.tells else {}
        message: tuple[str, Any, str | None]
        try:
            message = "done", job.function(*job.arguments, **more), None
        except Exception as error:
            message = "done", None, why(error)
        is_spent = _is_retired or not is_usable()
        connection.send((*message, is_spent))
        if is_spent:
            os._exit(0)  # what lies on a dead device cannot be given back


class _Child:
    def __init__(self, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, environment), daemon=True)
        self.process.start()
        theirs.close()
        self.index, self.since = -1, 0.0

    def begin(self, index: int, job: Job) -> None:
        self.index, self.since = index, time.monotonic()
        self.connection.send(job)

    def end(self) -> None:
        self.process.kill()
        self.process.join(GRACE)
        self.connection.close()


class Children:
    """Up to ``workers`` processes, started when they are needed. ``environment`` is added to theirs."""

    def __init__(self, workers: int = 1, environment: dict[str, str] | None = None) -> None:
        self.workers, self.environment = workers, environment or {}
        self._idle: list[_Child] = []

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        while self._idle:
            self._idle.pop().end()

    def _begin(self, index: int, job: Job) -> _Child:
        while self._idle:
            child = self._idle.pop()
            try:
                child.begin(index, job)
            except OSError:  # it ended in the meantime
                child.end()
            else:
                return child
        child = _Child(self.environment)
        child.begin(index, job)
        return child

    def run(
        self, jobs: Sequence[Job], *, until: float = math.inf, limit: float = math.inf,
        on_part: Callable[[Any, str | None], None] = lambda found, doing: None,
    ) -> Iterator[tuple[int, Outcome]]:  # fmt: skip
        """Each job's place among ``jobs`` and outcome, as they come.

        Args:
            until: on ``time.monotonic``'s clock; what has not ended by then is ended.
            limit: seconds that starting a process, a job, or one of the parts that it tells may take.
            on_part: gets what a job tells.
        """
        waiting = deque(enumerate(jobs))
        busy: dict[Connection, _Child] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self.workers and time.monotonic() < until:
                    child = self._begin(*waiting.popleft())
                    busy[child.connection] = child
                now = time.monotonic()
                if now >= until:
                    late = [*(child.index for child in busy.values()), *(index for index, _ in waiting)]
                    yield from ((index, LATE) for index in sorted(late))
                    return
                end = min(until, *(child.since + limit for child in busy.values()))
                for ready in wait(list(busy), None if end == math.inf else max(0.0, end - now)):
                    assert isinstance(ready, Connection)
                    child = busy[ready]
                    try:
                        kind, *message = ready.recv()
                    except (EOFError, OSError):
                        del busy[ready]
                        child.process.join(GRACE)
                        code = child.process.exitcode
                        child.end()
                        yield child.index, Outcome(error=f"its process ended with status {code}", has_ended=True)
                        continue
                    if kind != "done":
                        child.since = time.monotonic()
                        if kind == "part":
                            on_part(*message)
                        continue
                    value, error, is_spent = message
                    del busy[ready]
                    if is_spent:
                        child.end()
                    else:
                        self._idle.append(child)
                    yield child.index, Outcome(value, error, has_ended=is_spent)
                for child in [c for c in busy.values() if time.monotonic() >= c.since + limit]:
                    if child.connection.poll():  # it told something just now
                        continue
                    del busy[child.connection]
                    child.end()
                    yield child.index, Outcome(error=f"it took longer than {limit:.0f} seconds and was ended")
        finally:
            for child in busy.values():
                child.end()


def study(
    children: Children, function: Callable[..., dict[str, Any]], *arguments: Any, until: float = math.inf,
    limit: float = math.inf, attempts: int = 4, save: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:  # fmt: skip
    """What ``function(*arguments, without, tell=tell)`` finds in a child, or as much of it as there is.

    It calls ``tell(found, doing)`` before each thing that may fail, named ``doing``. Where one kills its process, takes
    too long or raises, all is done again, but for what is in ``without``, by name: why; up to ``attempts`` times.
    ``found`` has ``notes``; ``save`` gets it from time to time and at the end.
    """
    without: dict[str, str] = {}
    found: dict[str, Any] = {}
    doing: str | None = None
    saved = -math.inf

    def keep(part: dict[str, Any], what: str | None) -> None:
        nonlocal found, doing, saved
        found, doing = part, what
        if time.monotonic() >= saved + PAUSE:
            save(found)
            saved = time.monotonic()

    for _ in range(attempts):
        doing = None
        job = Job(function, (*arguments, dict(without)), tells=True)
        [(_, outcome)] = children.run([job], until=until, limit=limit, on_part=keep)
        if outcome.error is None:
            save(outcome.value)
            found = outcome.value
            return found
        if outcome.is_late or doing is None or doing in without:
            break
        without[doing] = outcome.error
    found.setdefault("notes", {}).update({**without, doing or "all": outcome.error})
    save(found)
    return found
