"""When to look who might be asked for drafts.

Of a crowd it costs about as much as all else that the host does in a step. Where nobody was asked, a few steps go by
without one, and more each time.
"""

from __future__ import annotations

_LEAST, _MOST = 7, 31


class Lookout:
    """num_skipped: steps since the last look, or since somebody was asked without one."""

    def __init__(self) -> None:
        self.num_skipped = 0
        self._rest = self._left = 0
        self._num_decodes = 0

    def is_due(self, num_decodes: int) -> bool:
        """Called once a step. Drafts may pay for half as many decodes what they did not for all."""
        if self._left > 0 and 2 * num_decodes > self._num_decodes:
            self._left -= 1
            self.num_skipped += 1
            return False
        self._num_decodes = num_decodes
        return True

    def saw(self, has_asked: bool) -> None:
        """What came of a look at which nobody had drafts."""
        self.num_skipped = 0
        self._rest = 0 if has_asked else min(_MOST, max(_LEAST, 2 * self._rest + 1))
        self._left = self._rest

    def wake(self) -> None:
        """Somebody was asked without a look: the next step has drafts."""
        self.num_skipped = self._rest = self._left = 0
