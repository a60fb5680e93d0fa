"""Who is next: what waits stands in one lane per request, and lanes take turns. Pure: no threads, no clock.

    lane a   a1 a2 a3 a4 …        a round:  a1 b1 c1 a2 b2 a3 …   until it is full; the next begins where it ended
    lane b   b1 b2
    lane c   c1
    ══ barrier ══════════         nothing behind it is dealt before all in front of it is gone
    lane d   d1 d2 …

So one huge request delays a small one by the round that is being worked on, never by the rest of itself.
It refuses to reorder: within a lane, first in is first out, and no turn passes a barrier.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Item = TypeVar("Item")
Mark = TypeVar("Mark")

Lane = OrderedDict[Item, None]
"""Items by identity, in order; any of them can leave in constant time."""


class Turns(Generic[Item, Mark]):
    """Items are hashable; a mark is whatever a barrier stands for."""

    def __init__(self) -> None:
        self._sections: deque[OrderedDict[int, Lane[Item]]] = deque([OrderedDict()])
        self._marks: deque[Mark] = deque()  # the barrier behind each section but the last
        self._homes: dict[Item, tuple[OrderedDict[int, Lane[Item]], int]] = {}
        self._num_lanes = 0

    def __bool__(self) -> bool:
        return bool(self._homes or self._marks)

    def add(self, items: Iterable[Item]) -> None:
        """One request's items, as the last lane."""
        lane: Lane[Item] = OrderedDict.fromkeys(items)
        if lane:
            self._num_lanes += 1
            self._sections[-1][self._num_lanes] = lane
            self._homes |= dict.fromkeys(lane, (self._sections[-1], self._num_lanes))

    def add_barrier(self, mark: Mark) -> None:
        """What is added from now on waits until everything in front, and then the mark, has been dealt."""
        self._marks.append(mark)
        self._sections.append(OrderedDict())

    def discard(self, item: Item) -> None:
        """Take an item out, if it still waits."""
        home = self._homes.pop(item, None)
        if home is not None:
            section, lane = home
            del section[lane][item]
            if not section[lane]:
                del section[lane]

    def deal(self, room: int, size: Callable[[Item], int]) -> list[Item]:
        """The next round: an item of each lane in turn, while they fit into `room`; one at least, if any waits."""
        dealt: list[Item] = []
        section = self._sections[0]
        while section:
            number, lane = next(iter(section.items()))
            item = next(iter(lane))
            room -= size(item)
            if dealt and room < 0:
                break
            dealt.append(item)
            section.move_to_end(number)
            self.discard(item)
        return dealt

    def pass_barrier(self) -> Mark | None:
        """The mark of the barrier that stands at the very front; it is gone then."""
        if self._sections[0] or not self._marks:
            return None
        self._sections.popleft()
        return self._marks.popleft()

    def clear(self) -> tuple[list[Item], list[Mark]]:
        """All that waits, which then waits no more."""
        left = list(self._homes), list(self._marks)
        self._sections, self._marks, self._homes = deque([OrderedDict()]), deque(), {}
        return left
