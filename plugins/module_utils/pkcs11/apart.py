# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Acts that rewrite a token, in a process that outlives the one that asked for them.

Software tokens write their files in place: SoftHSM 2.6.1 truncates ``token.object`` and then writes it,
openCryptoki 3.8.1 does so with ``NVTOK.DAT`` and then with ``MK_USER``. A kill in between leaves a token that nobody can
open, with every key in it; a key that is changed is lost likewise (see also :mod:`.copies`). So C_InitToken, C_InitPIN, C_SetPIN
and what rewrites keys are called by a child in a session of its own: what kills the task or the command does not reach it, and
it holds the lock of the state directory until it is done.
"""

from __future__ import annotations

import contextlib
import json
import os
import typing as t

from ..common.errors import TdeError
from .errors import translated
from .library import Library

#: Fields of an error that pass from the child; all public.
_FIELDS = ("code", "message", "obj", "kept", "next_step", "details")


def apart(library: Library, act: t.Callable[[], None], obj: str) -> None:
    """Run an act in a forked child and wait for its end; then start the library here anew, so that it sees the token as it is.

    The child logs in for itself. This process must have no session on any of the library's tokens.

    :param act: what the child does with ``library``, which is started anew there.
    :param obj: the object being acted on, in words.
    :raises TdeError: what the act raised; ``token_act_lost`` where the child ended without a word.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            os.setsid()
            answer = _answer(library, act)
            # Nobody may be left to read it.
            with contextlib.suppress(OSError):
                os.write(writer, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as handle:
        raw = handle.read()
    os.waitpid(pid, 0)
    with translated(obj, kept="The act on the token has ended; run again."):
        library.restart()
    if not raw:
        raise TdeError(
            "token_act_lost",
            "the process that changed the token was ended",
            obj=obj,
            kept="It is not known whether the token changed.",
        )
    answer = json.loads(raw)
    if answer:
        raise TdeError(answer.pop("code"), answer.pop("message"), **answer)


def _answer(library: Library, act: t.Callable[[], None]) -> dict[str, t.Any]:
    try:
        with translated(f"library {library.path}"):
            library.after_fork()
        act()
    except TdeError as exc:
        return {field: getattr(exc, field) for field in _FIELDS}
    except BaseException as exc:
        # The text of a foreign exception may hold a value; its type does not.
        return {"code": "internal_error", "message": type(exc).__name__, "obj": "hsm.tde"}
    return {}
