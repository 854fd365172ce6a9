"""The package's errors, each with the exit code that the command line gives for it.

Exit codes: 0 ok; 1 a check failed; 2 usage or bad input; 3 something needed is missing; 70 anything unexpected; 130
interrupted.
"""

import difflib
import dis
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

LONGEST_TEXT = 1000
_UNCLEAN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")

CRASH = 70
"""Exit code of an unexpected exception: not Python's own 1, which would read as a check that failed."""


class MtpMemError(Exception):
    """Base of every error that a user can cause; its text is one clear line and needs no traceback."""

    exit_code = 2


class BadInput(MtpMemError):
    """An argument, profile or file is wrong: says what, where, and what would be valid."""


class Missing(MtpMemError):
    """Something needed is not here: a CUDA device, a kernel package, a broken installation."""

    exit_code = 3


class BrokenContract(MtpMemError):
    """A strategy does what the protocol forbids, or leaves undone what it asks for."""

    exit_code = 1


def printable(text: str) -> str:
    """The text, safe for a terminal, page or shell: line ends become spaces, other control characters U+FFFD."""
    return _UNCLEAN.sub("\ufffd", text.replace("\r\n", " ").replace("\n", " ").replace("\r", " "))


def clean_text(text: str) -> str:
    """`printable` of the text, cut after 1000 characters."""
    return printable(f"{text[:LONGEST_TEXT]}..." if len(text) > LONGEST_TEXT else text)


def one_line(error: BaseException) -> str:
    """An error of code that is not ours, and where it was raised, in one line; of our own errors the text alone."""
    if isinstance(error, MtpMemError):
        return str(error)
    frames = _frames_elsewhere(error)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, SystemExit):
        return clean_text(f"quits the process: SystemExit({error.code!r}){where}")
    text = clean_text(f"{type(error).__name__}: {error}".split("\n")[0].removesuffix(": ")) + where
    return text if isinstance(error, Exception) else f"quits the process: {text}"


def raised_by_a_file_of_this_folder(error: BaseException) -> bool:
    """Whether the error came through code below the current folder, which is the user's."""
    return any(Path(frame.filename).is_relative_to(Path.cwd()) for frame in _frames_elsewhere(error))


def _frames_elsewhere(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames that the error came through, but for torch's, the interpreter's and ours; the innermost last."""
    others = ("/torch/", "/mtp_mem/", "/strategies/", "/importlib/", "<frozen ")
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if not any(part in frame.filename for part in others)]


@contextmanager
def contained() -> Iterator[None]:
    """A block that runs code that is not ours: it may raise, but not end the process; what it prints goes to stderr.

    Raises:
        BrokenContract: the code tried to end the process, `os._exit` included, or raised what no `except Exception`
            catches. The KeyboardInterrupt of a person's Ctrl-C goes through.
    """
    exit_at_once, process = os._exit, os.getpid()

    def refuse(status: int) -> None:
        if os.getpid() != process:  # a forked process may end itself
            exit_at_once(status)
        raise SystemExit(status)

    os._exit = refuse  # type: ignore[assignment]
    try:
        with redirect_stdout(sys.stderr):
            yield
    except Exception:
        raise
    except BaseException as e:
        if _by_signal(e):
            raise
        raise BrokenContract(one_line(e)) from None
    finally:
        os._exit = exit_at_once


def _by_signal(error: BaseException) -> bool:
    """Whether a signal handler, Python's own or ours, raised the error, and not a `raise` of the code that ran."""
    place = error.__traceback__
    if not isinstance(error, KeyboardInterrupt) or place is None:
        return False
    while place.tb_next is not None:
        place = place.tb_next
    code = place.tb_frame.f_code
    raised = code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return not raised or Path(code.co_filename).is_relative_to(Path(__file__).parent)


def crashed() -> int:
    """The exit code for an exception that nobody expected; its traceback goes to stderr."""
    traceback.print_exc()
    return CRASH


def unknown(kind: str, name: str, valid: Iterable[str], where: str = "") -> BadInput:
    """The error for a name that is none of `valid`: lists the valid ones and suggests the nearest."""
    names = list(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    place = f"{where}: " if where else ""
    return BadInput(f"{place}unknown {kind} {clean_text(name)!r}{hint} Valid: {', '.join(names) or 'none'}")
