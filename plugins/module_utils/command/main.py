# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The command ``hsm-tde``: keystores opened, closed and checked on the host, without Ansible."""

from __future__ import annotations

import argparse
import os
import traceback
import typing as t

from ..common.errors import TdeError
from ..common.secret import harden_process
from ..common.state import DEFAULT_PATH, StateDirectory
from . import audit, credentials, keycommands, keystores, pipes, selftest
from .exits import INTERNAL, exit_code
from .output import Output

#: Equal to galaxy.yml's; a test holds them together.
VERSION = "0.1.0"

_EPILOG = """\
Exit codes: 0 done, 1 a defect of the command, 2 wrong call, 3 absent, 4 refused, 5 locked, 6 unreachable,
7 unsupported, 8 damaged. Only 6 may turn out otherwise when it is tried again.
A PIN or passphrase is never an argument: it comes from the cluster's PIN source, a file descriptor or the terminal.
All commands need root, but for wrap, unwrap, encrypt, decrypt and validate-key: with --cluster these are what a database
asks for as its own user (docs/command.md).
"""


def _arguments(state_directory: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hsm-tde",
        description="Open, close and check the keystores of encrypted databases on this host.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hsm-tde {VERSION}")
    parser.add_argument(
        "--state-directory", default=state_directory, metavar="PATH", help="where the host remembers (%(default)s)"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: t.Callable[[argparse.Namespace, Output], int], text: str, *, json: bool = True
    ) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        one.set_defaults(run=run, json=False, of_user=False)
        if json:
            one.add_argument("--json", action="store_true", help="print one JSON object")
        return one

    def clusters(one: argparse.ArgumentParser, *, all_by_default: bool) -> None:
        one.add_argument(
            "clusters", nargs="*", metavar="CLUSTER", help="all, if none is named" if all_by_default else "a cluster's name"
        )
        if not all_by_default:
            one.add_argument("--all", action="store_true", help="every cluster that this host knows")

    opening = command(
        "open", keystores.open_command, "Mount the encrypted places and give the kernel their keys; what is open stays so."
    )
    clusters(opening, all_by_default=False)
    opening.add_argument(
        "--wait",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="how long to ask again a token that must exist and does not answer",
    )
    credentials.add_arguments(opening)

    closing = command("close", keystores.close_command, "Take the keys from the kernel; refused while the database runs.")
    clusters(closing, all_by_default=False)
    closing.add_argument("--force", action="store_true", help="although the database runs: it will fail, and may panic")

    clusters(
        command("status", keystores.status_command, "What is open, under which keyslots. Needs no PIN."), all_by_default=True
    )

    testing = command("self-test", selftest.command, "Whether the next boot will open the keystores. Changes nothing.")
    clusters(testing, all_by_default=True)
    testing.add_argument(
        "--no-login", action="store_true", help="do not log in to the token: leaves open whether the PIN and the keys are right"
    )
    credentials.add_arguments(testing)

    for name, run, text in (
        ("wrap", pipes.wrap_command, "Wrap the secret on standard input to a new file."),
        ("unwrap", pipes.unwrap_command, "Write the secret of a wrapped file to standard output."),
    ):
        pipe = command(name, run, text, json=False)
        pipe.set_defaults(of_user=True)
        pipe.add_argument(
            "file", nargs="?", metavar="FILE", help="its path; as the database's own user without it the cluster's secret"
        )
        pipe.add_argument("--force", action="store_true", help="although standard input or output is a terminal")
        pipes.add_arguments(pipe, wrapping=name == "wrap")

    for name, text in (
        ("encrypt", "Encrypt standard input to standard output under a key in the token (plugin of tde_kms)."),
        ("decrypt", "Decrypt what encrypt gave, from standard input to standard output (plugin of tde_kms)."),
        ("validate-key", "Whether the token has the key and lets this user use it (plugin of tde_kms)."),
    ):
        plugin = command(name, keycommands.plugin_command, text, json=False)
        plugin.set_defaults(of_user=True, act=name)
        plugin.add_argument("--keyid", required=True, metavar="ID", help="label of the key in the token")
        plugin.add_argument("--cluster", metavar="NAME", help="whose published record names library, token and PIN source")

    journal = command("journal", audit.command, "The journal of all acts on keys.")
    journal.add_argument("what", choices=["verify", "show"], help="verify: whether its chain is whole; show: its entries")
    journal.add_argument("--last", type=int, metavar="N", help="show only the last N entries")
    journal.add_argument("--cluster", metavar="NAME", help="show only entries of this cluster")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 86400:
        raise ValueError(text)
    return value


def main(argv: t.Sequence[str] | None = None, state_directory: str = DEFAULT_PATH) -> int:
    """Run the command.

    :param argv: without the program's name. :param state_directory: the one that the command was installed for.
    :returns: the exit code, see :mod:`exits`.
    """
    arguments = _arguments(state_directory).parse_args(argv)
    output = Output(arguments.json)
    try:
        warnings = harden_process()
        arguments.state = StateDirectory(arguments.state_directory)
        if os.geteuid() == 0:
            for warning in warnings:
                output.warn(warning)
        elif not arguments.of_user:
            raise TdeError("permission_denied", "needs root", obj="hsm-tde")
        return t.cast(int, arguments.run(arguments, output))
    except TdeError as error:
        output.error(error)
        return exit_code(error)
    except KeyboardInterrupt:
        return 130
    except Exception as exc:
        # The text of a foreign exception may hold a value; its type and place do not.
        place = traceback.extract_tb(exc.__traceback__)[-1]
        output.error(
            TdeError(
                "internal_error",
                f"{type(exc).__name__} in {os.path.basename(place.filename)}:{place.lineno} ({place.name})",
                obj="the command",
                kept="What was done before it is in the journal.",
            )
        )
        return INTERNAL


if __name__ == "__main__":
    raise SystemExit(main())
