# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the stand-in's commands share: the terminal, the journal, cards that are asked for, faults."""

from __future__ import annotations

import os
import sys
import time

from world import TYPE_CHECKING, Client, Json, matches

if TYPE_CHECKING:
    import typing as t


class Refused(Exception):
    """The command ends with a message and exit code 1."""


class Tool:
    """One run of a command.

    :ivar client: the host that it runs on; :ivar asked: the prompts that it printed, for the journal.
    """

    def __init__(self, command: str, arguments: t.Sequence[str]) -> None:
        self.command, self.arguments = command, list(arguments)
        self.client = Client.of_environment()
        self.asked: list[str] = []

    def ask(self, prompt: str) -> str:
        """A passphrase from the terminal, and from nowhere else."""
        self.asked.append(prompt)
        if self.fault("hang") == self.command:
            print(prompt, end="", flush=True)
            time.sleep(3600)
        try:
            with open("/dev/tty"):
                pass
        except OSError:
            raise Refused("no terminal to read a passphrase from") from None
        import getpass

        return getpass.getpass(prompt)

    def new_passphrase(self, first: str, again: str) -> str:
        value = self.ask(first)
        if self.ask(again) != value:
            raise Refused("Pass phrases do not match.")
        return value

    def fault(self, name: str) -> t.Any:
        return self.client.hsm.state()["faults"].get(name)

    def world(self) -> Json:
        if not self.client.settings["hardserver"]:
            raise Refused("NFastApp_Connect failed: ServerNotRunning")
        world = self.client.world
        if world is None:
            raise Refused("no security world")
        return world

    def administrators(self) -> None:
        """The quorum of the ACS, each card in a slot, each with its passphrase."""
        needed = self.world()["acs"][0]
        cards = self.client.hsm.state()["cards"]["acs"]
        present = [(m, s, card.partition(":")[2]) for m, s, card in self.client.slots() if card and card.startswith("acs:")]
        if len(present) < needed:
            print("Please insert administrator card in module #1.", flush=True)
            raise Refused("authorisation failed: not enough administrator cards")
        for module, slot, number in present[:needed]:
            print(f" Module {module} slot {slot}: Admin Card #{number}")
            if not matches(cards[number], self.ask("Please enter passphrase for this card:")):
                raise Refused("Incorrect passphrase for Admin Card")
        print("Card reading complete.")

    def authorised(self) -> None:
        """A FIPS level 3 world asks for an operator card, or administrator cards with their passphrases."""
        if self.world()["fips_level"] != 3 or any(card and not card.startswith("acs:") for _m, _s, card in self.client.slots()):
            return
        self.administrators()

    def die(self) -> t.NoReturn:
        """Be killed, as by a power cut."""
        import signal

        self.note(None)
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
        raise SystemExit(1)

    def note(self, code: int | None) -> None:
        asked = [prompt.strip() for prompt in self.asked]
        self.client.hsm.note(client=self.client.name, command=self.command, arguments=self.arguments, asked=asked, exit=code)


def run(command: str, act: t.Callable[[Tool], None]) -> t.NoReturn:
    """A command's main: its act, its journal entry, its exit code."""
    tool = Tool(command, sys.argv[1:])
    code = 0
    try:
        act(tool)
    except Refused as refusal:
        print(f"{command}: {refusal}", file=sys.stderr)
        code = 1
    tool.note(code)
    raise SystemExit(code)
