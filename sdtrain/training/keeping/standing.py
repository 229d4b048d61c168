"""Where a run stands when it begins or goes on, and on what: looked at before the model is loaded. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdtrain.config.schema import Config
from sdtrain.data.examples import Example
from sdtrain.data.identity.digests import mask_digests, picture_digests
from sdtrain.data.identity.held_out import held_out_examples, training_examples
from sdtrain.data.order import Order, Plan, Start
from sdtrain.data.placing import placements_of
from sdtrain.errors import Problem, UserError
from sdtrain.files.progress import Progress, unseen
from sdtrain.files.remembered import RememberedDigests
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.training.keeping import pictures
from sdtrain.training.keeping.base import base_digest
from sdtrain.training.keeping.disk import require_cache_room
from sdtrain.training.keeping.leftovers import remove_leftovers
from sdtrain.training.keeping.manifest import PICTURES, SavedState, read_file
from sdtrain.training.keeping.newest import Newest, find_newest
from sdtrain.training.keeping.pictures import Picture
from sdtrain.training.keeping.policy import pass_over
from sdtrain.training.start import stored_config

SHOWN_NAMES = 3
NOT_RECORDED = (
    "step {step} was saved by an older version: not checked for damage, nor for the pictures and the model that it was "
    "trained on"
)


@dataclass(frozen=True)
class Standing:
    """What a run begins with or goes on from.

    newest: the state, if any, and the later ones that are passed over. examples and digests: the pictures, in the order
    in which they are numbered. plan: how they are dealt out to steps. register: the same pictures, as states note them.
    base: the digest of the model. held_out: the pictures that are only validated on, held_out_digests: those of their
    files. notes: what the user should know. verifies_cache: whether all that is cached is compared with its checksum.
    """

    newest: Newest
    examples: list[Example]
    digests: list[bytes]
    plan: Plan
    register: tuple[Picture, ...]
    base: str
    held_out: tuple[Example, ...] = ()
    held_out_digests: tuple[bytes, ...] = ()
    notes: tuple[str, ...] = ()
    verifies_cache: bool = False

    @property
    def state(self) -> SavedState | None:
        """The state to go on from; None for a run that begins."""
        return self.newest.state

    @property
    def step(self) -> int:
        """The steps that are done."""
        return 0 if self.state is None else self.state.step

    def register_text(self) -> str:
        """Return the register of the pictures, as a state notes it."""
        return pictures.register_text(self.register, self.plan.start)


def cache_folder(config: Config) -> Path:
    """Return the folder of encoded pictures and captions."""
    return Path(config.data.cache or Path(config.output) / "cache").expanduser()


def remembered_digests(config: Config) -> RememberedDigests:
    """Return the digests of files that runs with this cache have learnt."""
    return RememberedDigests(cache_folder(config) / "digests.json")


def contradictions(remembered: RememberedDigests) -> list[str]:
    """Return what to say of pictures that were verified and hold something else than their times say."""
    found = [path.name for path in remembered.contradicted]
    if not found:
        return []
    shown = ", ".join(found[:SHOWN_NAMES]) + (", ..." if len(found) > SHOWN_NAMES else "")
    return [f"pictures that changed though their size and times did not: {len(found)} ({shown}); encoded anew"]


def find_standing(
    config: Config,
    folder: Path,
    opened: OpenedModel,
    examples: Sequence[Example],
    *,
    resume: bool,
    accept_data: bool = False,
    verify_cache: bool = False,
    on_progress: Progress = unseen,
) -> Standing:
    """Return where the run in `folder` stands; nothing is changed there.

    accept_data: whether pictures may be others than those of the state. verify_cache: whether every byte of pictures
    and cache is read, also where size and times say that nothing has changed. Raises UserError with everything that
    keeps the run from going on: no room for the cache, states that are all damaged, more steps done than planned,
    another model, other pictures.
    """
    require_cache_room(cache_folder(config), config, examples)
    trained, held_out = training_examples(examples), held_out_examples(examples)
    remembered = remembered_digests(config)
    paths = [example.path for example in (*trained, *held_out)]
    digests = picture_digests(paths, remembered, on_progress, verify=verify_cache)
    digests, held_out_digests = digests[: len(trained)], digests[len(trained) :]
    masks = mask_digests([example.mask for example in trained if example.mask], remembered)
    standing = Standing(
        newest=Newest(None, ()),
        examples=trained,
        digests=digests,
        plan=Plan(config.data.batch_size, config.data.gradient_accumulation),
        register=pictures.pictures_of(trained, digests, masks),
        base=base_digest(opened, remembered),
        held_out=tuple(held_out),
        held_out_digests=tuple(held_out_digests),
        notes=tuple(contradictions(remembered)),
        verifies_cache=verify_cache,
    )
    remembered.keep()
    if not resume:
        return standing
    standing = replace(standing, newest=find_newest(folder / "checkpoints"))
    standing = replace(standing, notes=(*standing.notes, *standing.newest.notes()))
    state = standing.state
    if state is None:
        return _with_note(standing, f"{folder} has no training state yet: it begins at step 0")
    problems = _problems(config, state, standing)
    if not state.is_checked:
        standing = _with_note(standing, NOT_RECORDED.format(step=state.step))
        problems += _split_of_before(config, folder)
    else:
        standing, changed = _with_pictures_of(standing, state, config, accept_data=accept_data)
        problems += changed
    if problems:
        raise UserError(f"--resume {folder}", problems)
    return standing


def _with_note(standing: Standing, note: str) -> Standing:
    return replace(standing, notes=(*standing.notes, note))


def _problems(config: Config, state: SavedState, standing: Standing) -> list[Problem]:
    problems = []
    if state.step > config.steps:
        what = f"{config.steps}, but {state.step} are done; `sdtrain export` writes earlier ones"
        problems.append(Problem("steps", what))
    if state.base and state.base != standing.base:
        what = (
            f"holds other weights than this run trained on (digest {state.base[:8]} then, {standing.base[:8]} now); "
            "put the same files back, or start a run of another name"
        )
        problems.append(Problem("model.path", what))
    if config.memory.fused_back_pass and state.accumulation > 1:
        what = f"cannot be turned on: this run began with {state.accumulation} micro-batches a step; turn it off"
        problems.append(Problem("memory.fused_back_pass", what))
    return problems


def _split_of_before(config: Config, folder: Path) -> list[Problem]:
    """Return the problem that a state that does not say how its pictures are dealt out has with another split."""
    was, now = stored_config(folder).data, config.data
    if (was.batch_size, was.gradient_accumulation) == (now.batch_size, now.gradient_accumulation):
        return []
    what = f"must stay {was.batch_size} until this run has saved a state in this version; then it may change"
    return [Problem("data.batch_size", what)]


def _with_pictures_of(
    standing: Standing, state: SavedState, config: Config, *, accept_data: bool
) -> tuple[Standing, list[Problem]]:
    """Return the standing with its pictures numbered as they were when the state was taken, as far as they are there.

    Where they are others, the epoch that was begun goes on with what was not yet seen of it.
    """
    before, start = pictures.read_register(read_file(state, PICTURES))
    now, plan = standing.register, Plan(state.batch_size, state.accumulation, start)
    changes = pictures.compare(before, now)
    if not changes:
        order = sorted(range(len(now)), key=lambda number: changes.before[number] or 0)
        return replace(
            standing,
            examples=[standing.examples[number] for number in order],
            digests=[standing.digests[number] for number in order],
            register=tuple(now[number] for number in order),
            plan=plan,
        ), []
    since = f"since step {state.step}, {pictures.told(changes, before, now)}"
    if not accept_data:
        what = f"{since}; undo it, or add --accept-data to go on with the pictures as they are now"
        return standing, [Problem("data.folder", what)]
    then = _order(config, before, plan)
    epoch, left_before = then.left(state.step)
    counts = then.counts(epoch), _order(config, now, replace(plan, start=None)).counts(epoch)
    left = pictures.left_now(changes, before, now, left_before, counts)
    standing = replace(standing, plan=replace(plan, start=Start(state.step, epoch, left)))
    return _with_note(
        standing, f"{since}; {sum(max(0, times) for times in left)} are still to be seen in the epoch that was begun"
    ), []


def _order(config: Config, register: Sequence[Picture], plan: Plan) -> Order:
    return Order(
        [placement.bucket for placement in placements_of(register, config.data)],
        [picture.repeats for picture in register],
        batch_size=plan.batch_size,
        accumulation=plan.accumulation,
        seed=config.seed,
        start=plan.start,
    )


def clear_the_way(standing: Standing, folder: Path) -> list[str]:
    """Rename the states that are passed over and remove what kills left in the folder of a run; return what to tell.

    Only the process that holds the run may call this. Raises UserError.
    """
    for state, _ in standing.newest.passed_over:
        pass_over(state)
    cut = remove_leftovers(folder)
    return [f"removed {state}: it was being removed when the run was killed" for state in cut]
