"""What a power cut can leave of a folder, worked out from a log of the calls that were made to the disk.

Only this is taken for granted: what a file holds is on the disk once the file was flushed, and the names in a folder
are once that folder was. Of anything later any part may be there and any other missing, in whatever order it was done:
a name without its content, a content cut off or all zeros, the second of two renames without the first. File systems
promise more than that, each something else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Literal

from tests.faults.disk.calls import Call

Fate = Literal["kept", "lost", "half", "zeros"]
"""What becomes of a change that was not flushed; the last two are for what is written into files."""
Tree = Mapping[str, bytes | None]
"""Path -> what the file there holds, None for a folder; folders stand before what is in them."""


@dataclass(eq=False)
class Node:
    """A file or a folder, by whatever name. flushes: the numbers of the calls that flushed it, in order."""

    is_folder: bool
    names: dict[str, Node] = field(default_factory=dict)
    flushes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Written:
    """A change of what a file holds: data at an offset, or with `cut` its new length."""

    node: Node
    at: int
    offset: int
    data: bytes = b""
    cut: bool = False


@dataclass(frozen=True)
class Named:
    """A change of the names in a folder: one that goes, one that comes with what it means, or both in one."""

    node: Node
    at: int
    gone: str = ""
    new: str = ""
    meaning: Node | None = None


Change = Written | Named


class Disk:
    """The changes that calls to a disk have made, for what is left of them when the power goes."""

    def __init__(self, root: str, calls: Sequence[Call]) -> None:
        """root: the folder that all paths are in, empty before the first call."""
        self._root, self._top = PurePath(root), Node(is_folder=True)
        self.changes: list[Change] = []
        self.num_calls = len(calls)
        for number, call in enumerate(calls, 1):
            self._follow(number, call)

    def _follow(self, at: int, call: Call) -> None:
        if call.what == "nothing":
            return
        folder, name = self._folder_of(call.path)
        match call.what:
            case "make" | "make folder":
                node = Node(is_folder=call.what == "make folder")
                self._name(Named(folder, at, new=name, meaning=node))
            case "write" | "cut":
                self.changes.append(Written(folder.names[name], at, call.offset, call.data, call.what == "cut"))
            case "rename":
                onto, new = self._folder_of(call.to)
                assert onto is folder, "only names beside one another are changed in one step"
                self._name(Named(folder, at, name, new, folder.names[name]))
            case "remove" | "remove folder":
                self._name(Named(folder, at, gone=name))
            case "flush":
                (folder.names[name] if name else folder).flushes.append(at)

    def _name(self, change: Named) -> None:
        _apply(change.node.names, change)
        self.changes.append(change)

    def _folder_of(self, path: str) -> tuple[Node, str]:
        """Return the folder of a path as it is now, and the name in it; of the root itself no name."""
        *above, name = PurePath(path).relative_to(self._root).parts or [""]
        node = self._top
        for part in above:
            node = node.names[part]
        return node, name

    def pending(self, num_calls: int) -> list[Change]:
        """Return the changes by the first calls that need not be on the disk after them."""
        made = [change for change in self.changes if change.at <= num_calls]
        return [change for change in made if not any(change.at < flush <= num_calls for flush in change.node.flushes)]

    def after(self, num_calls: int, fates: Mapping[Change, Fate]) -> Tree:
        """Return what is there after the first calls and a cut; changes without a fate are kept."""
        contents: dict[Node, bytearray] = {}
        names: dict[Node, dict[str, Node]] = {}
        for change in self.changes:
            fate = fates.get(change, "kept")
            if change.at > num_calls or fate == "lost":
                continue
            if isinstance(change, Named):
                _apply(names.setdefault(change.node, {}), change)
            else:
                _write(contents.setdefault(change.node, bytearray()), change, fate)
        return dict(_walk(self._top, "", contents, names))


def _apply(names: dict[str, Node], change: Named) -> None:
    names.pop(change.gone, None)
    if change.meaning is not None:
        names[change.new] = change.meaning


def _write(content: bytearray, change: Written, fate: Fate) -> None:
    if change.cut:
        del content[change.offset :]
        return
    data = {"half": change.data[: len(change.data) // 2], "zeros": bytes(len(change.data))}.get(fate, change.data)
    content.extend(bytes(max(0, change.offset - len(content))))  # what was lost before is zeros
    content[change.offset : change.offset + len(data)] = data


def _walk(
    node: Node, path: str, contents: Mapping[Node, bytearray], names: Mapping[Node, Mapping[str, Node]]
) -> Iterator[tuple[str, bytes | None]]:
    for name, meaning in sorted(names.get(node, {}).items(), key=lambda item: item[0]):
        inner = f"{path}{name}"
        yield inner, None if meaning.is_folder else bytes(contents.get(meaning, b""))
        yield from _walk(meaning, f"{inner}/", contents, names)


def fates_of(pending: Sequence[Change], rng: random.Random, num_draws: int) -> Iterator[dict[Change, Fate]]:
    """Yield ways in which changes may be lost: none, all, one alone, all but one, all after one, and some at random."""
    written = [change for change in pending if isinstance(change, Written) and not change.cut]
    yield {}
    for fate in ("half", "zeros"):
        yield dict.fromkeys(written, fate)
        yield from ({change: fate} for change in written)
    yield dict.fromkeys(written, "lost")
    for number, change in enumerate(pending):
        yield {change: "lost"}
        yield {other: "lost" for other in pending if other is not change}
        yield dict.fromkeys(pending[number:], "lost")
    for _ in range(num_draws if len(pending) > 1 else 0):
        chosen: dict[Change, Fate] = {}
        for change in pending:
            some: list[Fate] = ["kept", "lost", "half", "zeros"] if change in written else ["kept", "lost"]
            chosen[change] = rng.choice(some)
        yield chosen


def put(tree: Tree, folder: Path) -> None:
    """Make a folder that holds a tree."""
    folder.mkdir(parents=True)
    for name, content in tree.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)
