"""Reads the config of a run that begins or goes on, without torch, so that mistakes are told at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdtrain.adapters.quantised.packages import package_problems
from sdtrain.config.draft import Draft, Written, draft_of
from sdtrain.config.read import read_table_and_lines, resolve
from sdtrain.config.schema import Config, FolderConfig
from sdtrain.config.text.lines import Lines
from sdtrain.data.examples import Example, scan_folders
from sdtrain.data.identity.held_out import hold_out, training_examples
from sdtrain.data.placing import at_resolutions, cropped_masks
from sdtrain.data.scanning.regularisation import with_regularisation
from sdtrain.errors import Problem, UserError, user_error
from sdtrain.families.words import DENOISER
from sdtrain.files.progress import Progress
from sdtrain.models.checkpoints.hub import fetch_if_missing, is_missing
from sdtrain.models.checkpoints.inspect import OpenedModel, inspect_model
from sdtrain.training.describing.author import author_problems
from sdtrain.training.keeping.changes import refused_changes, wants_more, with_more_steps
from sdtrain.training.keeping.manifest import state_folders
from sdtrain.training.keeping.stored import copy_of_settings, settings_path
from sdtrain.training.warm_start_check import warm_start_misfits, warm_start_problems
from sdtrain.training.watching.tracking.trackers import tracker_problems

ANOTHER_NAME = "or choose another `name` (--set name=...)"


def draft_run(written: Written, *, resume: bool, accept_data: bool = False) -> Draft:
    """Return the draft of a run that begins or goes on, with problems for all that its folder speaks against.

    accept_data: whether a run that goes on may have other folders of pictures.
    """
    draft = draft_of(_with_a_number_of_steps(written, 0))
    if not resume and wants_more(written.table.get("steps")):
        what = "adds to the steps of a run that goes on: add --resume, or give the number of steps"
        draft = draft.with_problems([Problem("steps", f"{written.table['steps']} {what}")])
    if not draft.knows("name", "output"):
        return draft
    folder = run_folder(draft.config.output, draft.config.name)
    try:
        if not resume:
            return draft.with_problems(_occupied(draft.config, folder))
        stored = stored_config(folder)
    except UserError as error:
        return draft.with_problems(_at_name(f"{error.source}: {problem.what}") for problem in error.problems)
    written = _with_a_number_of_steps(written, stored.steps)
    draft = draft_of(replace(written, table=keep_stored(written.table, stored.model_dump(mode="python"))))
    return draft.with_new_problems(refused_changes(draft.config, stored, accept_data=accept_data))


def _with_a_number_of_steps(written: Written, planned: int) -> Written:
    return replace(written, table=with_more_steps(written.table, planned))


def run_folder(output: str, name: str) -> Path:
    """Return the folder of a run."""
    return Path(output).expanduser() / name


def stored_config(folder: Path, overrides: Sequence[str] = (), *, prompts: Sequence[str] | None = None) -> Config:
    """Return the resolved config of an earlier run, with overrides. Raises UserError when there is none.

    Where its file is gone or cut off, this is the copy in its newest training state. prompts: what to draw instead of
    its previews; None: these.
    """
    table, lines = _stored(folder)
    if prompts is not None:
        table = drawing(table, prompts)
    return resolve(table, str(settings_path(folder)), overrides, lines)


def drawing(table: Mapping[str, Any], prompts: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a run with other prompts to draw."""
    preview = table.get("preview", {})
    return {**table, "preview": {**(preview if isinstance(preview, dict) else {}), "prompts": list(prompts)}}


def _stored(folder: Path) -> tuple[dict[str, Any], Lines]:
    path = settings_path(folder)
    if not path.exists():
        raise user_error(str(folder), "run", "there is no run in this folder; start one with `sdtrain fit CONFIG`")
    table, lines = read_table_and_lines(path)
    return as_it_began(table), lines


def keep_stored(table: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table with what the run resolved when it began, unless the user sets it now.

    A preset means numbers that follow from the planned steps; more steps later must not move what already happened.
    What no caption is must not change in the middle of a run either; and prompts that were its own captions stay, so
    that the base's pictures stand beside them.
    """
    kept = dict(table)
    model = table.get("model", {})
    if isinstance(model, Mapping) and model and "no_caption" in stored["model"]:
        kept["model"] = {"no_caption": stored["model"]["no_caption"], **model}
    preview = table.get("preview", {})
    if isinstance(preview, Mapping) and not preview.get("prompts") and stored["preview"]["prompts"]:
        kept["preview"] = {**preview, "prompts": stored["preview"]["prompts"]}
    optimizer = table.get("optimizer", {})
    if isinstance(optimizer, Mapping) and optimizer.get("preset") in (None, stored["optimizer"]["preset"]):
        kept["optimizer"] = {**stored["optimizer"], **optimizer}
    return kept


def as_it_began(stored: dict[str, Any]) -> dict[str, Any]:
    """Return the table of a run, completed where it is older than `model.no_caption`; the table itself is changed.

    Such a run trained dropped and missing captions as the encoded empty string, whatever the model said; it goes on
    so.
    """
    model, data = stored.get("model"), stored.get("data")
    if not isinstance(model, dict) or not isinstance(data, dict) or "no_caption" in model:
        return stored
    empty = [folder.get("missing_captions") == "empty" for folder in data.get("folder", [])]
    if data.get("caption_dropout") or any(empty):
        model["no_caption"] = "empty-text"
    return stored


def _occupied(config: Config, folder: Path) -> list[Problem]:
    """Return the problem that a run that begins has with another run in its folder, if there is one."""
    if not (folder / "config.toml").exists():
        return _left_behind(folder)
    steps = stored_config(folder).steps
    states = state_folders(folder / "checkpoints")
    stands_before = bool(states) and states[-1][0] < steps  # weights may be of before it was given more steps
    if stands_before or not (folder / "weights" / f"{config.name}.safetensors").exists():
        return [_at_name(f"{folder} holds a run that was not finished; add --resume to go on, {ANOTHER_NAME}")]
    what = f"{folder} holds a finished run; add --resume --set steps=N to train it beyond {steps} steps, {ANOTHER_NAME}"
    return [_at_name(what)]


def _at_name(what: str) -> Problem:
    return Problem("name", what, ("name", "output"))


def _left_behind(folder: Path) -> list[Problem]:
    """Return the problem that a run that begins has with training states whose run is gone, if there are any."""
    if not state_folders(folder / "checkpoints"):
        return []
    what = f"{folder} holds training states of an earlier run, whose config.toml is gone; move its checkpoints away, "
    if copy_of_settings(folder) is not None:
        what += "add --resume to go on with its own settings, "
    return [_at_name(what + ANOTHER_NAME)]


def inspect_run(
    draft: Draft, *, decode: bool, fetch: bool = False, on_progress: Progress | None = None
) -> tuple[OpenedModel, list[Example]]:
    """Return the model, opened, and the pictures. Raises UserError with everything that is wrong with the run.

    What depends on a setting that is wrong is left out; all else is looked at. decode: whether every pixel of every
    picture is read. fetch: whether a model that is named by a hub id and not in the local cache is fetched, once
    nothing else is wrong. on_progress: is told how many of the pictures are read.
    """
    examples, problems = _pictures(draft, decode=decode, on_progress=on_progress)
    problems += [*tracker_problems(draft.config.tracking), *author_problems(draft.config)]
    problems += package_problems(draft.config.model.base_precision)
    draft = draft.with_problems(problems).with_new_problems(warm_start_problems(draft.config))
    if fetch and draft.is_sound:
        fetch_if_missing(draft.config.model)
    opened = None
    if draft.knows("model.path", "model.variant", "model.components") and not (
        fetch and not draft.is_sound and is_missing(draft.config.model)
    ):
        opened, problems = inspect_model(draft.config.model)
        draft = draft.with_new_problems(problems)
    if opened is not None:
        config = draft.config
        draft = draft.with_new_problems(
            [
                *size_problems(config, opened),
                *_network_problems(config, opened),
                *_timestep_problems(config, opened),
                *_weighting_problems(config, opened),
                *warm_start_misfits(config, opened),
            ]
        )
    draft.require_sound()
    assert opened is not None, "a model that nothing can be said of has a problem"
    return opened, examples


def trains_text(config: Config) -> bool:
    """Return whether a network that reads captions is trained, so that captions are encoded anew at every step."""
    return any(network != DENOISER for network in config.method.train)


def _pictures(draft: Draft, *, decode: bool, on_progress: Progress | None) -> tuple[list[Example], list[Problem]]:
    """Return the pictures to train on and those that are held out, and what is wrong with them."""
    validation = draft.config.validation
    examples, problems = _scan(draft, "data.folder", draft.config.data.folder, decode, on_progress)
    apart, more = _scan(draft, "validation.folder", validation.folder, decode, on_progress)
    if problems or more or not draft.knows("validation", "data.folder"):
        return [*examples, *apart], [*problems, *more]
    marked, problems = hold_out(examples, apart, validation)
    folders = draft.config.data.folder
    marked = at_resolutions(marked, [folder.resolutions_px for folder in folders])
    if draft.knows("data") and not any(problem.where.startswith("data.") for problem in draft.problems):
        problems = [*problems, *cropped_masks(training_examples(marked), draft.config.data)]
    return with_regularisation(marked, folders), problems


def _scan(
    draft: Draft, setting: str, folders: Sequence[FolderConfig], decode: bool, on_progress: Progress | None
) -> tuple[list[Example], list[Problem]]:
    """Return the pictures of those folders whose paths are known, and what is wrong with them."""
    known = [draft.knows(f"{setting}[{index}].path") for index in range(len(folders))]
    lenient = [
        folder
        if draft.knows(f"{setting}[{index}].missing_captions")
        else folder.model_copy(update={"missing_captions": "empty"})
        for index, folder in enumerate(folders)
    ]
    data = draft.config.data.model_copy(update={"folder": lenient})
    skip = [index for index, is_known in enumerate(known) if not is_known]
    examples, problems = scan_folders(data, decode=decode, skip=skip, setting=setting, on_progress=on_progress)
    return examples, [
        problem if problem.where.startswith(f"{setting}[") else replace(problem, settings=(setting,))
        for problem in problems
    ]


def _network_problems(config: Config, facts: OpenedModel) -> list[Problem]:
    return [
        Problem("method.train", f"names {network}, which {facts.family.title} does not have")
        for network in config.method.train
        if network not in facts.family.components
    ]


def _timestep_problems(config: Config, facts: OpenedModel) -> list[Problem]:
    last, highest = config.timesteps.last, facts.num_timesteps - 1
    if last <= highest:
        return []
    found = f"{last} is beyond the model's noise schedule, whose {highest + 1} timesteps are 0 to {highest}"
    habit = "; 1000 in other trainers counts them, 999 is the last" if last == highest + 1 == 1000 else ""
    return [Problem("timesteps.last", found + habit)]


def _weighting_problems(config: Config, facts: OpenedModel) -> list[Problem]:
    predicted = facts.prediction if config.model.prediction == "auto" else config.model.prediction
    if config.loss.weighting != "scale_v_like_noise" or predicted == "v_prediction":
        return []
    what = "scale_v_like_noise, but the model predicts epsilon, whose error is that of the noise already; use none"
    return [Problem("loss.weighting", what, ("loss.weighting", "model.prediction"))]


def size_problems(config: Config, facts: OpenedModel) -> list[Problem]:
    """Return a problem for each picture size that the model cannot halve as often as it must."""
    step = facts.latent_step_px
    sizes = {
        "data.bucket_step_px": config.data.bucket_step_px,
        "preview.width_px": config.preview.width_px or config.data.resolution_px,
        "preview.height_px": config.preview.height_px or config.data.resolution_px,
    }
    return [
        Problem(where, f"{size} is not a multiple of {step}, which this model needs", (where, "data.resolution_px"))
        for where, size in sizes.items()
        if size % step
    ]
