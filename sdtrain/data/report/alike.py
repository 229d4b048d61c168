"""Finds copies among pictures: the same file twice, or the same picture in another size, format or compression."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sdtrain.data.examples import Example
from sdtrain.data.scanning.looks import Look

_BANDS = 4
_BITS = 16  # in a band
_MAX_STEPS = _BANDS - 1  # so few differences leave at least one band equal: only such pairs are compared
_PLAIN = 12  # visible steps: with fewer a picture is a plain surface, which looks like any other
_RICH = 32  # visible steps from which on the hash alone tells pictures apart: bursts of photographs are found, too
_MAX_COLOUR = 8  # mean difference of the colours of two rich pictures, of 255
_MAX_FIELD = 12  # largest difference of any field of others, such as drawings of one shape on white
_MAX_ASPECT = 1.05  # one aspect ratio over the other


@dataclass(frozen=True)
class Alike:
    """Pictures that show the same. is_exact: whether their files are the same, byte for byte."""

    examples: tuple[Example, ...]
    is_exact: bool


def find_alike(examples: Sequence[Example]) -> list[Alike]:
    """Return the groups of pictures that show the same, of those whose pixels were read, in the order of the pictures.

    Same are equal files, and pictures whose difference hashes are at most 3 of 64 bits apart and whose colours and
    aspect ratios are nearly equal. Mirrored and cropped copies are not found.
    """
    seen = [(example, example.look) for example in examples if example.look is not None]
    by_file: dict[bytes, list[int]] = defaultdict(list)
    for number, (_, look) in enumerate(seen):
        by_file[look.digest].append(number)
    groups = _Groups(len(seen))
    firsts = [numbers[0] for numbers in by_file.values()]
    for one, other in _near(seen, firsts):
        groups.join(one, other)
    for numbers in by_file.values():
        for number in numbers[1:]:
            groups.join(numbers[0], number)
    return [
        Alike(tuple(seen[number][0] for number in numbers), len({seen[number][1].digest for number in numbers}) == 1)
        for numbers in groups.several()
    ]


def _near(seen: Sequence[tuple[Example, Look]], numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield pairs of different files that show the same.

    In each band those of the same bits are sorted by brightness, so that each meets only those about as bright.
    """
    bands: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for number in numbers:
        look = seen[number][1]
        if look.num_visible >= _PLAIN:
            brightness = sum(look.colours)
            for band in range(_BANDS):
                bits = look.edges >> band * _BITS & (1 << _BITS) - 1
                bands[band, bits].append((brightness, number))
    reach = _MAX_COLOUR * 192
    for alike in bands.values():
        alike.sort()
        for place, (brightness, number) in enumerate(alike):
            for other_brightness, other in alike[place + 1 :]:
                if other_brightness - brightness > reach:
                    break
                if _shows_the_same(seen[number], seen[other]):
                    yield number, other


def _shows_the_same(one: tuple[Example, Look], other: tuple[Example, Look]) -> bool:
    (example, look), (other_example, other_look) = one, other
    if (look.edges ^ other_look.edges).bit_count() > _MAX_STEPS:
        return False
    across = example.width_px * other_example.height_px
    down = example.height_px * other_example.width_px
    if max(across, down) > _MAX_ASPECT * min(across, down):
        return False
    differences = [abs(a - b) for a, b in zip(look.colours, other_look.colours, strict=True)]
    if min(look.num_visible, other_look.num_visible) < _RICH and max(differences) > _MAX_FIELD:
        return False
    return sum(differences) <= _MAX_COLOUR * len(differences)


class _Groups:
    """Numbers that belong together: each points to one before it in its group, the first to itself."""

    def __init__(self, num: int) -> None:
        self._before = list(range(num))

    def _first(self, number: int) -> int:
        while self._before[number] != number:
            self._before[number] = self._before[self._before[number]]
            number = self._before[number]
        return number

    def join(self, one: int, other: int) -> None:
        first, second = sorted((self._first(one), self._first(other)))
        self._before[second] = first

    def several(self) -> list[list[int]]:
        """The groups of more than one, in the order of their first."""
        groups: dict[int, list[int]] = defaultdict(list)
        for number in range(len(self._before)):
            groups[self._first(number)].append(number)
        return [numbers for numbers in groups.values() if len(numbers) > 1]
