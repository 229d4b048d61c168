"""What is right in itself and perhaps not what was meant: a line for each, the most important first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from sdtrain.config.schema import DataConfig, FolderConfig
from sdtrain.data.captions.literal import has_words, literal_signs
from sdtrain.data.captions.wording import wording_of
from sdtrain.data.examples import Example
from sdtrain.data.report.alike import find_alike
from sdtrain.data.report.names import about, counted, names_of, shown_name, shown_text
from sdtrain.data.report.summary import DataReport, summarise

HARD_CROP = 0.15
"""The share of a picture from which on its crop is told."""
LITTLE = 0.01
"""The share of a picture below which what a mask lets count is told."""
_WORTH = 1.1  # how much fuller batches must get for a setting to be advised


def caption_notes(examples: Sequence[Example], config: DataConfig) -> list[str]:
    """Return what is worth a look in captions: missing ones, signs of other tools, triggers, lines, folders' names."""
    return [*_missing(examples), *_triggers(examples, config), *_literal(examples, config), *_lines(examples, config)]


def batch_notes(examples: Sequence[Example], config: DataConfig, report: DataReport) -> list[str]:
    """Return what is worth a look in batches: folders that count otherwise than others, batches that are small, what
    would help, and pictures that were moved."""
    notes = _folders(examples, config)
    if report.mean_batch * _WORTH < config.batch_size:
        alone = f"; alone: {names_of(report.alone)}" if report.alone else ""
        notes.append(
            f"batches: {about(report.num_batches)}, of {report.mean_batch:.1f} pictures on average where "
            f"{config.batch_size} were asked for, because a batch holds pictures of one size{alone}"
            + _fuller(examples, config, report)
        )
    if report.moved:
        crops = [f"to {move.bucket[0]}x{move.bucket[1]}, cropped {move.cropped_share:.0%}" for _, move in report.moved]
        names = names_of([one for one, _ in report.moved], crops)
        notes.append(f"moved: {counted(len(report.moved))} alone in a bucket: {names}")
    return notes


def picture_notes(examples: Sequence[Example], report: DataReport) -> list[str]:
    """Return what is worth a look in pictures: copies, hard crops, enlargements and transparency."""
    notes = [*_copies(examples)]
    cropped = [(share, example) for share, example in report.crops if share >= HARD_CROP]
    if cropped:
        shares = [f"{share:.0%}" for share, _ in cropped]
        notes.append(
            f"cropped hard: {counted(len(cropped))}: {names_of([one for _, one in cropped], shares)}; "
            "crop them yourself, or raise data.max_aspect"
        )
    if report.upscales:
        factors = [f"{factor:.2f}x" for factor, _ in report.upscales]
        notes.append(
            f"enlarged: {counted(len(report.upscales))}: {names_of([one for _, one in report.upscales], factors)}"
        )
    notes += _masks(examples)
    clear = [
        example
        for example in examples
        if example.look and example.look.has_clear_parts and not (example.mask and example.mask.is_alpha)
    ]
    if clear:
        notes.append(f"on white: {counted(len(clear))} with transparent parts, which become white: {names_of(clear)}")
    return notes


def _by_folder(examples: Sequence[Example], config: DataConfig) -> Iterator[tuple[int, FolderConfig, list[Example]]]:
    """Yield each folder with its place and its pictures."""
    for index, folder in enumerate(config.folder):
        yield index, folder, [example for example in examples if example.folder == index]


def _folders(examples: Sequence[Example], config: DataConfig) -> list[str]:
    """How often pictures of folders are seen that are drawn or weighed, or that stand for what the model knows."""
    notes = []
    for index, folder, own in _by_folder(examples, config):
        is_plain = folder.repeats == round(folder.repeats) and folder.loss_weight == 1
        if own and (folder.regularisation or not is_plain):
            kind = ", regularisation" if folder.regularisation else ""
            weight = f", each counting {folder.loss_weight:g}" if folder.loss_weight != 1 else ""
            num = about(sum(example.repeats for example in own))
            notes.append(f"data.folder[{index}]{kind}: {counted(len(own))}, {num} of them an epoch{weight}")
    return notes


def _masks(examples: Sequence[Example]) -> list[str]:
    """How many pictures have a mask, how much these leave, and which have none or nearly nothing left."""
    masked = [example for example in examples if example.mask]
    if not masked:
        return []
    shares = sorted([(one.mask_look.share, one) for one in masked if one.mask_look], key=lambda one: one[0])
    text = f"masks: {len(masked):,} of {counted(len(examples))}"
    if shares:
        mean = sum(share for share, _ in shares) / len(shares)
        text += f", which let {mean:.0%} of them count on average, at least {shares[0][0]:.1%}"
        text += f" ({shown_name(shares[0][1].path)})"
    bare = [example for example in examples if not example.mask]
    notes = [text + (f"; without, so that all of it counts: {names_of(bare)}" if bare else "")]
    little = [(share, one) for share, one in shares if share < LITTLE]
    if little:
        percents = [f"{share:.2%}" for share, _ in little]
        notes.append(f"nearly all masked: {counted(len(little))}: {names_of([one for _, one in little], percents)}")
    return notes


def _fuller(examples: Sequence[Example], config: DataConfig, report: DataReport) -> str:
    """What would fill the batches, as part of a sentence."""
    changes: list[dict[str, object]] = [{"ragged": "merge"}] if config.ragged == "keep" else []
    coarser = config.bucket_step_px * 2
    if config.resolution_px % coarser == 0:
        changes += [{"bucket_step_px": coarser}, {"bucket_step_px": coarser, "ragged": "merge"}]
    advice = []
    best = report.mean_batch * _WORTH
    for change in changes:
        changed = summarise(examples, config.model_copy(update=change))
        if changed.mean_batch >= best:
            best = changed.mean_batch * _WORTH
            settings = " and ".join(f"data.{name} = {_toml(value)}" for name, value in change.items())
            worst = f", cropping {changed.crops[0][0]:.0%} at most" if changed.crops else ""
            advice.append(f"{settings} makes {about(changed.num_batches)} of {changed.mean_batch:.1f}{worst}")
    return "; " + ", or ".join(advice) if advice else ""


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _missing(examples: Sequence[Example]) -> list[str]:
    without = [example for example in examples if not example.caption or not example.num_lines]
    blank = [example for example in examples if example.caption and not has_words(example.caption)]
    notes = []
    if without:
        beside = next((example for example in without if example.beside), None)
        hint = f"; of {shown_name(beside.path)}, {shown_text(beside.beside)}" if beside else ""
        filled = ", but for what its folder adds" if any(example.caption for example in without) else ""
        notes.append(f"no caption{filled}: {counted(len(without))}: {names_of(without)}{hint}")
    if blank:
        notes.append(f"no words: {counted(len(blank), 'caption', 'captions')} without a letter: {names_of(blank)}")
    return notes


def _triggers(examples: Sequence[Example], config: DataConfig) -> list[str]:
    notes = []
    for index, folder, own in _by_folder(examples, config):
        trigger = wording_of(folder).trigger
        if trigger and own and not any(example.has_trigger for example in own):
            notes.append(
                f'trigger: "{shown_text(trigger)}" stands in no caption of data.folder[{index}]; '
                f"it is put in front of all {len(own):,}"
            )
    return notes


def _literal(examples: Sequence[Example], config: DataConfig) -> list[str]:
    signs: dict[str, str] = {}
    those: list[Example] = []
    for example in examples:
        found = literal_signs(example.caption, wildcards=config.folder[example.folder].wildcards)
        those += [example] if found else []
        signs = found | signs
    if not signs:
        return []
    listed = ", ".join(f"{shown_text(sign)} ({what})" for what, sign in signs.items())
    advice = "take them out" + (", or set wildcards = true in its folder" if "wildcards" in signs else "")
    return [f"trained as words: {listed} in {counted(len(those), 'caption', 'captions')}: {names_of(those)}; {advice}"]


def _lines(examples: Sequence[Example], config: DataConfig) -> list[str]:
    several = [example for example in examples if example.num_lines > 1]
    joined = [example for example in several if config.folder[example.folder].caption_lines == "joined"]
    concepts = Counter(example.concept for example in examples if config.folder[example.folder].folder_names == "plain")
    notes = []
    if joined:
        notes.append(
            f"lines: of {counted(len(joined), 'caption', 'captions')} are joined into one: {names_of(joined)}; "
            'caption_lines = "drawn" draws one of them each time'
        )
    named = ", ".join(sorted(shown_text(name) for name in concepts if name)[:3])
    if named:
        notes.append(
            f'folders: pictures in {named} are seen as often as others; folder_names = "repeats_concept" counts it'
        )
    return notes


def _copies(examples: Sequence[Example]) -> list[str]:
    groups = find_alike(examples)
    notes = []
    for exact, what in ((True, "the same file"), (False, "nearly the same picture")):
        those = [group.examples for group in groups if group.is_exact == exact]
        if those:
            shown = "; ".join(" = ".join(_placed_name(one) for one in group[:3]) for group in those[:4])
            more = f"; and {counted(len(those) - 4, 'more group', 'more groups')}" if len(those) > 4 else ""
            num = sum(len(group) for group in those)
            notes.append(f"copies: {counted(num)} are {what} as another: {shown}{more}")
    return notes


def _placed_name(example: Example) -> str:
    """The name with that of its folder: copies often have the same one."""
    return shown_text(f"{example.path.parent.name}/{example.path.name}")
