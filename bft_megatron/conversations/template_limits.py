"""Stopping a chat template that runs for too long or takes too much memory.

A template is a program that comes with a model. jinja2's sandbox keeps it from the machine, but not from looping over
loops or multiplying strings.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

from bft_megatron.errors import UserError
from bft_megatron.recipe.schema import DataSettings

_PAGE = resource.getpagesize()


class TemplateFault(UserError):
    """A fault of the chat template, which no skipped row would mend."""


class _TimeIsUp(BaseException):
    """Raised by the timer; no Exception, because jinja2 takes those for faults of the expression it works out."""


@dataclass(frozen=True)
class Limits:
    """The limits of one rendering of a conversation.

    Attributes:
        row_bytes: text of the longest row.
        seconds: processor time. A template takes some microseconds a message, so that even a row of nothing but
            messages (some hundred thousand) takes a second or two.
    """

    row_bytes: int = DataSettings.max_row_bytes
    seconds: float = 60.0

    @property
    def characters(self) -> int:
        """The longest text that is written: headers around short messages make several times a row's text."""
        return 16 * self.row_bytes + (1 << 20)

    @property
    def memory(self) -> int:
        """Bytes that a rendering may add to the process: four for a character, in pieces and joined, and as much."""
        return 16 * self.characters + (1 << 28)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the code inside to the memory and, on the main thread, which alone gets signals, to the time.

        Raises:
            TemplateFault: the code took more.
        """
        timed = threading.current_thread() is threading.main_thread()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = _address_space() + self.memory
        before = signal.signal(signal.SIGPROF, _stop) if timed else None
        try:
            if soft == resource.RLIM_INFINITY or most < soft:
                resource.setrlimit(resource.RLIMIT_AS, (most, hard))
            if timed:  # repeated, because an exception in a destructor is lost
                signal.setitimer(signal.ITIMER_PROF, self.seconds, 1.0)
            yield
        except MemoryError:
            raise TemplateFault(f"the chat template takes more than {self.memory:,} bytes of memory") from None
        except _TimeIsUp:
            message = f"the chat template takes more than {self.seconds:g} seconds of processor time"
            raise TemplateFault(message) from None
        except RecursionError:
            raise TemplateFault("the chat template calls itself without end") from None
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_PROF, 0.0)
                signal.signal(signal.SIGPROF, before)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    def restart(self) -> None:
        """Begin the time anew, for the next rendering of the conversation; outside `held` nothing is timed."""
        if signal.getitimer(signal.ITIMER_PROF)[0]:
            signal.setitimer(signal.ITIMER_PROF, self.seconds, 1.0)


def _stop(*_: Any) -> NoReturn:
    raise _TimeIsUp


def _address_space() -> int:
    return int(os.pread(_statm(os.getpid()), 100, 0).split()[0]) * _PAGE


@cache
def _statm(process: int) -> int:
    """Open a process's memory figures once; a fork has its own."""
    return os.open(f"/proc/{process}/statm", os.O_RDONLY)


DEFAULT = Limits()
