"""What every judge does."""

from collections.abc import Sequence
from typing import Protocol

from rl.types import Completion, Judgement, Prompt


class Judge(Protocol):
    """Grades all completions of each prompt together; never guesses.

    A graded judge fills in attributes; a pairwise judge compares and leaves them None; either gives None as the
    score of what it cannot judge (an abstention), and says why in `reason`.
    """

    name: str

    async def grade(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[list[Judgement]]:
        """One judgement per completion, in the shape of `completions`."""
        ...
