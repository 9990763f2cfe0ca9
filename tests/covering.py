"""A sample of a test's cases in which every value of its parameters still appears, or every two of them that can meet.

A new GPU spends its first minutes on compiling: there most combinations of the grids would be a kernel or two of their own.
"""

from collections import Counter
from collections.abc import Mapping
from itertools import combinations

Case = Mapping[str, str]  # parameter -> its value's name


def covering(cases: list[Case], strength: int) -> list[int]:
    """Places of the cases that are kept. strength: how many values at a time; what meets in a case meets in one of these.

    Greedy: next comes the case with most that is new, of those the one whose values are the rarest so far.
    """
    left = [set(combinations(sorted(case.items()), min(strength, len(case)))) for case in cases]
    used: Counter[tuple[str, str]] = Counter()
    kept = []
    while any(left):
        best = max(range(len(cases)), key=lambda place: (len(left[place]), -sum(used[value] for value in cases[place].items())))
        kept.append(best)
        used.update(cases[best].items())
        met = left[best].copy()
        for meetings in left:
            meetings -= met
    return sorted(kept)
