"""The contract of an eviction policy: it orders the resident keys of a cache by what they are worth.

A policy stores no values and knows no bytes. Its cache tells it of every lookup, in this order:

- a hit: `hit(key, kind)`;
- a miss: `evict(key)` as often as the cache needs room, then `admit(key, kind)`;
- an entry that left for another reason (expired, invalidated): `remove(key)`.

`kind` describes the access where the cache knows more than the key; policies that cannot use it ignore it.
"""

from collections.abc import Hashable
from typing import Final, Protocol, TypeVar

K = TypeVar("K", bound=Hashable)

ANSWERS: Final = 6
"""Classes of the length of an answer: 0 unknown, then below 4, 16, 64, 256 and from 256 tokens."""
ORIGINS: Final = 3
"""What the request found before the key: nothing, keys used a few times, keys used often."""
KINDS: Final = ANSWERS * ORIGINS * 2
"""Every `kind` is in range(KINDS)."""
_OFTEN: Final = 8


class Policy(Protocol[K]):
    """Orders resident keys. All calls take constant time, amortized, unless a policy says otherwise."""

    def __len__(self) -> int:
        """Resident keys."""

    def hit(self, key: K, kind: int = 0) -> None:
        """A resident key was used. Raises KeyError where it is not resident."""

    def evict(self, incoming: K) -> K:
        """Takes out the key that is worth least and returns it, to make room for `incoming`.

        Raises:
            KeyError: no key is resident.
        """

    def admit(self, key: K, kind: int = 0) -> None:
        """A key that is not resident was used and becomes resident."""

    def remove(self, key: K) -> None:
        """A resident key leaves, whatever it is worth. Raises KeyError where it is not resident."""


def kind_of(answer_tokens: int, origin_uses: int = 0, *, last: bool = False) -> int:
    """The `kind` of a block of a prompt.

    Args:
        answer_tokens: length of the answer that the request got; 0 where unknown.
        origin_uses: how often the nearest earlier block of the prompt that was cached has been used; 0: none.
        last: whether it is the prompt's last block, which is rarely full and so rarely shared.
    """
    answer = min(ANSWERS - 1, (answer_tokens.bit_length() + 1) // 2)
    origin = 0 if origin_uses == 0 else 1 if origin_uses < _OFTEN else 2
    return (origin * 2 + last) * ANSWERS + answer
