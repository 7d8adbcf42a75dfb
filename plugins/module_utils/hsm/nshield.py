# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""nShield's Security World software on this host: its commands, and what they tell of world, softcards, card sets and keys.

Parsers are in ``nshield_text.py``, softcards' and cards' passphrases in ``nshield_cards.py``, keys' protection and transfer in
``nshield_keys.py``, a client's settings and its copy of the world in ``nshield_client.py``, the recovery matrix in
``nshield_recovery.py``, Oracle's credential in ``credential.py``.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing as t

from ..common.errors import TdeError
from ..common.options import state_options
from ..common.run import run_program
from ..common.terminal import Answer, converse
from . import nshield_text as text
from .nshield_recovery import Facts

#: Where the software is installed (installation guide of the Security World software).
HOME = "/opt/nfast"
#: What nShield's commands say when nobody listens (nfkminfo and enquiry: NFastApp_Connect, status ServerNotRunning).
_NO_SERVER = re.compile(r"NFastApp_Connect|Server(NotRunning|Unavailable|AccessDenied)|hardserver", re.IGNORECASE)
#: rocs' prompt, as its manual shows it.
ROCS_PROMPT = r"rocs ?>"


def nshield_options() -> dict[str, t.Any]:
    """Where nShield's software and data are (fragment ``hsm.tde.nshield``, action group ``hsm.tde.nshield``)."""
    return {
        "nfast_home": {"type": "path", "default": HOME},
        "bin_directory": {"type": "path"},
        "kmdata": {"type": "path"},
        "timeout": {"type": "float", "default": 60.0},
        **state_options(),
    }


@dataclasses.dataclass(frozen=True)
class Estate:
    """What was found; plain data.

    :ivar keys: of all applications.
    """

    world: text.World
    softcards: tuple[text.Softcard, ...]
    cardsets: tuple[text.Cardset, ...]
    keys: tuple[text.Key, ...]

    @property
    def tokens(self) -> tuple[text.Softcard | text.Cardset, ...]:
        """Softcards and card sets."""
        return (*self.softcards, *self.cardsets)

    def token_name(self, identifier: str | None) -> str | None:
        """The name of a softcard or card set by its hash; None for the module, and where the token is gone."""
        return next((token.name for token in self.tokens if token.hash == identifier), None)

    def find_token(self, protection: str, named: str) -> text.Softcard | text.Cardset:
        """A softcard or card set by name or hash.

        :raises TdeError: ``token_absent``; ``token_ambiguous``: names repeat, hashes do not.
        """
        among: tuple[text.Softcard | text.Cardset, ...] = self.softcards if protection == "softcard" else self.cardsets
        kind = "softcard" if protection == "softcard" else "card set"
        found = [token for token in among if token.hash == named] or [token for token in among if token.name == named]
        if not found:
            raise TdeError(
                "token_absent",
                "this client's Security World has none of that name or hash",
                obj=f"{kind} {named}",
                next_step="Correct the name; nshield_info lists what there is. If another client made it, bring this one up to date.",
            )
        if len(found) > 1:
            hashes = ", ".join(token.hash for token in found)
            raise TdeError(
                "token_ambiguous",
                f"{len(found)} have this name: {hashes}",
                obj=f"{kind} {named}",
                next_step="Name it by its hash.",
            )
        return found[0]

    def slots(self, state: str | None = None, cardset: str | None = None) -> list[tuple[int, text.Slot]]:
        """(module, slot) of usable modules, those with a card of a kind or of a set."""
        return [
            (module.number, slot)
            for module in self.world.modules
            if module.usable
            for slot in module.slots
            if state in (None, slot.state) and cardset in (None, slot.cardset)
        ]

    def modules_with(self, *, cardset: str | None = None) -> int:
        """How many usable modules have an operator card in a slot, of one set or of any."""
        return len({module for module, dummy in self.slots("operator", cardset)})


class Nshield:
    """The software on this host.

    :param home: ``NFAST_HOME``; :param bin_directory: of its commands; :param kmdata: ``NFAST_KMDATA``, the folder in which the
        Security World's folder ``local`` is.
    :param timeout: seconds for one command.
    """

    def __init__(
        self, home: str = HOME, bin_directory: str | None = None, kmdata: str | None = None, timeout: float = 60.0
    ) -> None:
        self.home = home
        self.bin_directory = bin_directory or os.path.join(home, "bin")
        self.kmdata = kmdata or os.path.join(home, "kmdata")
        self.timeout = timeout

    @classmethod
    def of_options(cls, params: t.Mapping[str, t.Any]) -> Nshield:
        """From the shared options of :func:`nshield_options`."""
        return cls(params["nfast_home"], params["bin_directory"], params["kmdata"], params["timeout"])

    @property
    def local(self) -> str:
        """The folder of the Security World's files: world, keys, softcards, card sets."""
        return os.path.join(self.kmdata, "local")

    @property
    def environment(self) -> dict[str, str]:
        """What the commands are told by the environment (user guide, "Environment variables"). Nothing secret."""
        return {"NFAST_HOME": self.home, "NFAST_KMDATA": self.kmdata}

    def command(self, name: str) -> str:
        return os.path.join(self.bin_directory, name)

    def run(self, name: str, *arguments: str) -> str:
        """Run a command that asks for nothing. :returns: what it printed.

        :raises TdeError: ``command_missing``, ``nshield_hardserver_down``, ``command_failed``, ``timeout``.
        """
        try:
            done = run_program([self.command(name), *arguments], timeout=self.timeout, environment=self.environment)
        except TdeError as error:
            if error.code == "command_failed" and _NO_SERVER.search(error.message):
                raise TdeError("nshield_hardserver_down", "nfkminfo reached no server", obj="hardserver") from None
            raise
        return done.stdout.decode("utf-8", "replace")

    def world(self) -> text.World:
        """The Security World and its modules.

        :raises TdeError: as :meth:`run`; ``nshield_answer_unknown``.
        """
        return text.world(self.run("nfkminfo"))

    def inspect(self) -> Estate:
        """Everything that ``nfkminfo`` tells.

        :raises TdeError: as :meth:`world`.
        """
        return Estate(
            world=self.world(),
            softcards=tuple(text.softcards(self.run("nfkminfo", "-s"))),
            cardsets=tuple(text.cardsets(self.run("nfkminfo", "-c"))),
            keys=tuple(text.keys(self.run("nfkminfo", "-l"))),
        )

    def usable(self) -> Estate:
        """As :meth:`inspect`, where something is to be done.

        :raises TdeError: ``nshield_world_unusable``.
        """
        estate = self.inspect()
        if not estate.world.usable:
            raise TdeError("nshield_world_unusable", f"its state is {' '.join(estate.world.flags)}", obj="Security World")
        return estate

    def key_detail(self, key: text.Key) -> text.KeyDetail:
        """What one key file says of itself."""
        return text.key_detail(self.run("nfkminfo", "-k", key.application, key.ident))

    def rocs_keys(self) -> list[text.RocsKey]:
        """The second witness: what protects each key, as ``rocs`` lists it. It changes nothing.

        :raises TdeError: as :meth:`run`.
        """
        said = converse(
            [self.command("rocs")],
            [Answer(ROCS_PROMPT, "list keys"), Answer(ROCS_PROMPT, "quit")],
            environment=self.environment,
            timeout=self.timeout,
        )
        if said.code:
            raise TdeError("command_failed", f"exit code {said.code}: {said.last_line}", obj="rocs")
        return text.rocs_keys(said.text)


def differences(estate: Estate, rows: t.Sequence[text.RocsKey]) -> list[str]:
    """Where ``rocs`` names another protection of keys than ``nfkminfo``, in sentences; pure.

    Both name keys by name only, and names repeat: compared is how often a name has which protection.
    """
    told: dict[tuple[str, str], list[str]] = {}
    for key in estate.keys:
        shown = "module" if key.protection == "module" else estate.token_name(key.token) or key.token or "unknown"
        told.setdefault((key.application, key.name), []).append(shown)
    listed: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        listed.setdefault((row.application, row.name), []).append(row.protected_by)
    sentences = []
    for application, name in sorted({*told, *listed}):
        one, other = sorted(told.get((application, name), [])), sorted(listed.get((application, name), []))
        if one != other:
            sentences.append(
                f"Key {name} ({application}): nfkminfo says {' and '.join(one) or 'nothing'}, rocs {' and '.join(other) or 'nothing'}."
            )
    return sentences


def recovery_facts(estate: Estate, told: t.Mapping[str, t.Any]) -> Facts:
    """What the recovery matrix needs: what the HSM tells, and what only people know; pure.

    :param told: the dictionary ``recovery`` of ``nshield_info``.
    :raises TdeError: ``token_ambiguous``.
    """
    cardset = None
    same_world: bool | None = True
    if told["protection"] != "module":
        try:
            token = estate.find_token(told["protection"], told["token"])
            cardset = token if isinstance(token, text.Cardset) else None
        except TdeError as error:
            if error.code != "token_absent":
                raise
            # What the world that is loaded does not know is of another world.
            same_world = False
    operators = estate.modules_with()
    # Of cards of several sets, those of this set count; a foreign one in a slot does not make them differ.
    with_credential = estate.modules_with(cardset=cardset.hash) if cardset else 0
    administrators = len(estate.slots("admin"))
    return Facts(
        fips_level=estate.world.fips_level,
        protection=told["protection"],
        cluster=len(estate.world.modules) > 1 if told["cluster"] is None else told["cluster"],
        auto_login=told["auto_login"],
        quorum=(cardset.k, cardset.n) if cardset else None,
        same_passphrase=told["same_passphrase"],
        same_cardset=with_credential == operators if operators else None,
        modules=len(estate.world.modules),
        modules_with_credential_card=with_credential,
        modules_with_fips_card=operators,
        fips_authorisation="ocs" if operators else "acs" if administrators else None,
        same_world=same_world,
        remote_administration=told["remote_administration"],
        channel_script=told["channel_script"],
        persistent_only=told["persistent_only"],
        cards=cardset.n if cardset else None,
    )
