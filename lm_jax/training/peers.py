"""The other processes of the job: who is dead or silent, who is slow.

Each process writes a beat into the key-value store of the job (of jax.distributed, in process 0) every second. Process
0 reads them all and says who is lost; the others read its beat and what it says. So a job of a thousand processes has a
few small requests a second for each, and none of them touches a device.

What ends a process that has lost a peer, the first that comes:

- a beat that stays away, or that says that its process failed: `Peers` names it, dumps the stacks and exits;
- a collective that raises, because a connection broke: `Peers` finds out whose it was, then as above;
- jax's own client, which aborts where it loses process 0 or hears of a loss: the handler of SIGABRT does as above;
- a process whose interpreter itself hangs, so that none of these can run: a timer of faulthandler, which needs no lock.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol

import jax
from etils import epath

from lm_jax import paths
from lm_jax.errors import Failure, UserError

FAILED = 1
_BEAT_SECONDS = 1.0
_SILENT_SECONDS = 20.0  # a peer that says nothing for so long is lost, once steps run
_BROKEN_SECONDS = 8.0  # .. and for so long, once a connection broke
_FAREWELL_SECONDS = 5.0  # a peer that failed may have failed of what this process is about to tell itself
_LINGER_SECONDS = 3.0  # process 0 holds the store: it leaves last, so that the others read whom it names
_STUCK_SECONDS = 45.0  # an interpreter that runs no thread for so long hangs
_SLOW_TELL_SECONDS = 60.0
_SLOW_FACTOR, _SLOW_SECONDS = 2.0, 0.1  # slow: by this factor, and by at least so much a step
_FIRST, _BEATS = "lm_jax/first/", "lm_jax/beat/"


class Store(Protocol):
    """What is used of jax.distributed's client."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


@dataclasses.dataclass
class Peer:
    """What is known of a process: its last beat, and when that was heard."""

    heard: float
    beat: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def host(self) -> str:
        return self.beat.get("host", "a host that was never heard of")


class Roll:
    """The peers that a process listens to, by index.

    Args:
      indices: of these processes.
      now: seconds, of the clock that the other methods are given.
      silent: after how many seconds without a new beat one is lost.
    """

    def __init__(self, indices: range, now: float, silent: float) -> None:
        self.peers = {i: Peer(now) for i in indices}
        self.silent = silent

    def hear(self, index: int, beat: dict[str, Any], now: float) -> None:
        """Takes a beat; the same one again is no sign of life."""
        peer = self.peers.get(index)
        if peer is not None and beat != peer.beat:
            peer.heard, peer.beat = now, beat

    def forgive(self, now: float) -> None:
        """Begins anew: this process itself stood still, or does not yet count."""
        for peer in self.peers.values():
            peer.heard = now

    def lost(self, now: float) -> tuple[int, str] | None:
        """The process that is lost, and what is known of it; of several, the one that was heard of longest ago."""
        found = []
        for index, peer in self.peers.items():
            ended, quiet = peer.beat.get("ended"), now - peer.heard
            if ended == "":  # finished
                continue
            if ended and quiet > _FAREWELL_SECONDS:
                found.append((quiet, index, f"failed ({ended})"))
            elif not ended and quiet > self.silent:
                found.append((quiet, index, f"has been silent for {quiet:.0f} s: it died, hangs, or is cut off"))
        if not found:
            return None
        _, index, why = max(found)
        return index, f"process {index} on {self.peers[index].host} {why}"

    def quietest(self, now: float) -> tuple[int, Peer, float] | None:
        """Who has been silent longest, and how long; None where all have finished."""
        running = [(i, p) for i, p in self.peers.items() if p.beat.get("ended") != ""]
        if not running:
            return None
        index, peer = min(running, key=lambda pair: pair[1].heard)
        return index, peer, now - peer.heard


def slow_hosts(seconds: Mapping[int, tuple[float, str]]) -> list[str]:
    """A line for each process that keeps the others waiting.

    Args:
      seconds: by process: what its batches cost it a step, and its host.
    """
    lines = []
    for index, (own, host) in seconds.items():
        rest = [other for i, (other, _) in seconds.items() if i != index]
        usual = statistics.median(rest) if rest else own
        if own > _SLOW_FACTOR * usual and own > usual + _SLOW_SECONDS:
            lines.append(
                f"process {index} on {host} is slow: its batches take it {own:.2f} s a step, the others {usual:.2f} s"
            )
    return lines


class Peers:
    """Watches the other processes while it is entered, and ends this one, with status 1, where one of them is lost.

    With one process it does nothing. It watches from the first beats on, but ends a process of itself only after
    `stepping`: reading and tokenising text may hold the interpreter for long, and there jax's own heartbeats, which
    need no interpreter, decide.

    Args:
      directory: the run's, for the stacks.
      store, index, count: instead of jax.distributed's; for tests.
      leave: instead of ending the process; for tests.
    """

    def __init__(
        self,
        directory: epath.Path,
        *,
        store: Store | None = None,
        index: int | None = None,
        count: int | None = None,
        silent: float = _SILENT_SECONDS,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self._index = jax.process_index() if index is None else index
        self._count = jax.process_count() if count is None else count
        self._file = directory / f"stacks-{self._index}.txt"
        self._silent, self._leave = silent, leave
        self._stubbed = store is not None
        self._store = store or _jax_store()
        self._roll = Roll(range(1, self._count) if self._index == 0 else range(1), time.monotonic(), silent)
        self._number, self._host = 0, socket.gethostname()
        self._ended: str | None = None
        self._own: collections.deque[float] = collections.deque(maxlen=25)
        self._slow: list[str] = []
        self._told = time.monotonic()
        self._stepping, self._stop = False, threading.Event()
        self._verdict: str | None = None
        self._still = 0.0  # for how long this process itself stood still
        self._error = ""
        self._ending = threading.Lock()
        self._handler: Any = None

    # ----------------------------------------------------------------------------------------------- for the program

    def __enter__(self) -> Peers:
        if self._count > 1 and self._store is not None:
            if not self._stubbed:
                self._take_aborts()
            for work in (self._talk, self._judge):
                threading.Thread(target=work, name=f"peers{work.__name__}", daemon=True).start()
        return self

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """From now on a peer's silence counts. The body is what may fail of it."""
        self._roll.forgive(time.monotonic())
        self._stepping = True
        try:
            yield
        except Exception as e:  # what is closed on the way out may wait for the peer that is gone
            self._note(e)
            raise

    def _note(self, error: BaseException | None) -> bool:
        """Whether an error may be a peer's doing. A connection broke then, and a short silence is enough."""
        if self._count == 1 or error is None or not _may_be_a_peer(error):
            return False
        self._error = self._error or "".join(traceback.format_exception(error))
        self._roll.silent = min(self._silent, _BROKEN_SECONDS)
        return True

    def step(self, seconds: float, say: Callable[[str], Any]) -> None:
        """Takes what a step's batch cost this process, and says which processes are slow, where any are."""
        self._own.append(seconds)
        while self._slow:
            say(self._slow.pop(0))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, trace
        if self._count == 1 or self._store is None:
            return
        if self._note(error):  # whose fault it was shows soon, and `_judge` ends the process
            self._stop.wait(_BROKEN_SECONDS + 2 * _FAREWELL_SECONDS)
        self._stop.set()
        if not self._stubbed:
            faulthandler.cancel_dump_traceback_later()
        self._farewell(error)

    # ----------------------------------------------------------------------------------------------------- two threads

    def _talk(self) -> None:
        """Sends beats and hears those of others. Its requests may hang as long as process 0 does."""
        # Reading 256 beats costs process 0 a millisecond of its interpreter: with more it reads less often, so that
        # this stays at a thousandth.
        pause = min(max(_BEAT_SECONDS, self._count / 256), self._silent / 4)
        while not self._stop.is_set():
            with contextlib.suppress(Exception):  # what cannot be asked is not heard: `_judge` sees it
                self._exchange()
            self._stop.wait(pause)

    def _exchange(self) -> None:
        store, now = self._store, time.monotonic
        assert store is not None
        self._send()
        if self._index > 0:
            answers = dict(store.key_value_dir_get(_FIRST))
            if beat := answers.get(f"{_FIRST}beat"):
                self._roll.hear(0, json.loads(beat), now())
            self._verdict = answers.get(f"{_FIRST}lost", self._verdict)
            return
        for key, value in store.key_value_dir_get(_BEATS):
            self._roll.hear(int(key.removeprefix(_BEATS)), json.loads(value), now())
        if self._stepping and now() - self._told > _SLOW_TELL_SECONDS:
            self._told = now()
            self._slow = slow_hosts(self._seconds())

    def _seconds(self) -> dict[int, tuple[float, str]]:
        known = {i: (p.beat["own"], p.host) for i, p in self._roll.peers.items() if p.beat.get("own") is not None}
        if self._own:
            known[self._index] = (statistics.median(self._own.copy()), self._host)
        return known

    def _send(self) -> None:
        assert self._store is not None
        self._number += 1
        own = statistics.median(self._own.copy()) if self._own else None
        beat = {"number": self._number, "host": self._host, "own": own, "ended": self._ended}
        key = f"{_FIRST}beat" if self._index == 0 else f"{_BEATS}{self._index}"
        self._store.key_value_set(key, json.dumps(beat), allow_overwrite=True)

    def _judge(self) -> None:
        """Looks who is lost. It asks nobody, so nothing can hold it."""
        last = armed = 0.0
        while not self._stop.wait(_BEAT_SECONDS / 2):
            now = time.monotonic()
            if last and now - last > self._silent / 2:
                self._still = now - last
                # If all of the job stood still, the others are heard soon.
                self._roll.forgive(now - max(0.0, self._silent - _BROKEN_SECONDS))
            last = now
            if not self._stepping and not self._error:
                continue
            if now - armed > _STUCK_SECONDS / 10 and not self._stubbed:
                armed = now
                faulthandler.dump_traceback_later(_STUCK_SECONDS, exit=True)
                if self._stop.is_set():  # it was cancelled just before
                    faulthandler.cancel_dump_traceback_later()
            if self._verdict is not None:
                self._end(self._verdict)
            elif lost := self._roll.lost(now):
                self._end(lost[1])

    # -------------------------------------------------------------------------------------------------------- the end

    def _end(self, why: str, *, dumped: bool = False) -> None:
        """Says who is lost, dumps the stacks, and leaves."""
        if not self._ending.acquire(blocking=False):
            time.sleep(60)  # another thread is about to leave
        began = time.monotonic()
        if self._index == 0:
            tell = threading.Thread(target=self._tell_verdict, args=(why,), daemon=True)
            tell.start()
        stacks = _stacks()
        text = f"{self._error}\n{stacks}" if self._error else stacks
        if not dumped:
            _to_stderr(text + "\n")
        saved = threading.Thread(target=self._save, args=(f"{why}\n\n{text}",), daemon=True)
        saved.start()
        saved.join(_FAREWELL_SECONDS)  # a file system that hangs must not hold this
        still = f" (this process itself stood still for {self._still:.0f} s)" if self._still else ""
        _to_stderr(
            f"{why}{still}\nthis process ends; its stacks stand above, and in {self._file}\n"
            "the same command goes on from the last checkpoint\n"
        )
        if self._index == 0:
            time.sleep(max(0.0, began + _LINGER_SECONDS - time.monotonic()))
        self._stop.set()
        self._leave(FAILED)

    def _save(self, text: str) -> None:
        with contextlib.suppress(Exception):
            paths.write_text_atomic(self._file, text)

    def _tell_verdict(self, why: str) -> None:
        assert self._store is not None
        with contextlib.suppress(Exception):
            self._store.key_value_set(f"{_FIRST}lost", why, allow_overwrite=True)

    def _farewell(self, error: BaseException | None) -> None:
        """The last beat: that this process finished, or why it failed."""
        said = str(error).strip().splitlines() if error is not None else []
        self._ended = "" if error is None else (said[0][:200] if said else type(error).__name__)
        sent = threading.Thread(target=self._send_quietly, daemon=True)
        sent.start()
        sent.join(_LINGER_SECONDS)
        if self._index == 0 and error is not None:  # the others may be about to tell the same mistake themselves
            time.sleep(_LINGER_SECONDS)

    def _send_quietly(self) -> None:
        with contextlib.suppress(Exception):
            self._send()

    def _take_aborts(self) -> None:
        """jax's client ends the process by abort() where it loses process 0 or hears of a loss; that is caught.

        A handler of Python's own would run too late (abort does not return to the interpreter). This one is called by
        the aborting thread itself, after faulthandler has dumped all stacks to stderr.
        """
        if self._handler is None:
            self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._on_abort)
            libc = ctypes.CDLL(None)
            libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, type(self._handler)]
            libc.signal(signal.SIGABRT, self._handler)
        faulthandler.disable()  # enabled again, it comes before this handler, and calls it afterwards
        faulthandler.enable()
        _kept.append(self._handler)

    def _on_abort(self, number: int) -> None:
        del number
        why = self._verdict
        if why is None:
            quietest = self._roll.quietest(time.monotonic())
            if quietest is not None and quietest[2] > _FAREWELL_SECONDS:
                index, peer, quiet = quietest
                why = f"process {index} on {peer.host} has been silent for {quiet:.0f} s: it died, hangs, or is cut off"
            elif self._index > 0 and not _coordinator_answers():
                why = f"process 0 on {self._roll.peers[0].host} is gone"
            else:
                why = f"process {self._index} on {self._host}, this one, aborted: the lines above say why"
        self._end(why, dumped=True)


_kept: list[Any] = []  # handlers that C code may still call


def _jax_store() -> Store | None:
    from jax._src import distributed  # no public name leads to the store; orbax takes it from here too

    return distributed.global_state.client


def _coordinator_answers() -> bool:
    """Whether anybody listens where process 0 should; a process that is dying may do so a moment longer."""
    from jax._src import distributed

    host, _, port = (distributed.global_state.coordinator_address or "").rpartition(":")
    for _ in range(3):
        time.sleep(0.3)
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except (OSError, ValueError):
            return False
    return True


def _may_be_a_peer(error: BaseException) -> bool:
    """Whether an error can come of another process: jax's own, and not the want of memory."""
    if isinstance(error, UserError | Failure):
        return False
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    return any(isinstance(e, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(e) for e in chain)


def _stacks() -> str:
    """The Python stacks of all threads."""
    with tempfile.TemporaryFile() as file:  # faulthandler wants a descriptor
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode("utf-8", errors="replace")


def _to_stderr(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    data = text.encode("utf-8", errors="replace")
    with contextlib.suppress(OSError):  # print may not be entered again, where this came in between
        while data:
            data = data[os.write(2, data) :]
