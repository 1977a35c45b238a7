"""What is known of one life of a source: may something that is claimed be gone, may something be missing.

    what happens to the life            sound  complete  brought back by
    it begins                           yes    no        its first message
    joined late                         yes    no        a rebuild; a clear
    messages are lost                   no     no        a rebuild, while somebody has them (`holes`); a clear
    a message can't be read or kept     no     no        a clear; a rebuild that has another reason
    entries are kept that may be gone   no     -         a clear; a rebuild that has another reason
    its replay fails                    no     no        one that comes to its end
    a replay of all of it is through    yes    yes
    its cache was empty                 yes    yes

What the transport says (cut off, a hole whose replay is under way) is the stream's to add.
Invariant: a flag that is off comes back by a proof only, never by time or by silence.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Flags:
    """One life's; a new life has new ones."""

    sound: bool = True
    """But for `uncertain` and `in_doubt`."""
    complete: bool = False
    """But for `in_doubt`."""
    holes: bool = False
    """Messages are missing that a replay from 0 might still bring."""
    damaged: bool = False
    """A message of this life said something that could not be read or kept; no replay is asked for that."""
    uncertain: bool = False
    """Entries were kept that may be gone; no replay is asked for that."""
    lost_before: int = 0
    """The message behind the newest loss."""
    doubted: tuple[int, bytes] | None = None
    """A replay failed, and this is the newest message known to be of one life with those before; -1: none is."""

    @property
    def in_doubt(self) -> bool:
        """Something is lost, or may be until a replay has proven the opposite."""
        return self.damaged or self.doubted is not None

    @property
    def level(self) -> int:
        """2: all of the life, or all that matters; 1: all from a late join on; 0: something was lost."""
        if not self.sound or self.damaged or self.uncertain:
            return 0
        return 2 if self.complete else 1

    def restored(self, level: int) -> None:
        """A checkpoint of this level is the beginning."""
        self.sound, self.complete = level > 0, level == 2  # noqa: PLR2004 - see `level`
        if not level:  # what is missing may still be had
            self.holes = True

    def joined(self, seq: int) -> None:
        """This is the first message that comes, and it is not the first of the life."""
        self.lost_before = seq
        self.complete, self.holes = False, True

    def lost(self) -> None:
        """Messages will not come any more, or claims were found wrong; a replay from 0 may still bring all."""
        self.sound = self.complete = False
        self.holes = True

    def lost_for_good(self, seq: int) -> None:
        """Nobody has the messages before this one any more."""
        self.lost()
        self.holes = False
        self.lost_before = seq

    def rebuilding(self) -> None:
        """Everything is taken in anew from the first message: what was wrong before is past."""
        self.sound = self.complete = self.damaged = self.uncertain = False
        self.lost_before = 0
        self.doubted = None

    def replayed(self, *, whole: bool) -> None:
        """A replay from the start is in; `whole`: it had the life's first message, or one that says the same."""
        self.sound, self.complete, self.holes = True, whole, False

    def cleared(self) -> None:
        """The engine's cache was empty: whatever was lost before does not matter any more."""
        self.sound = self.complete = True
        self.holes = self.damaged = self.uncertain = False
        self.doubted = None
