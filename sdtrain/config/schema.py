"""Every setting of a run: its name, unit, default and meaning, in this one place."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sdtrain.config.settings.export import ExportConfig
from sdtrain.config.settings.memory import MemoryConfig
from sdtrain.config.settings.objective import LossConfig, NoiseConfig, PreserveConfig, TimestepConfig
from sdtrain.config.settings.parallel import ParallelConfig
from sdtrain.config.settings.values import Count, PathText, Rate, Settings, Share, Times, Whole
from sdtrain.diffusion.words import Prediction, Sampler
from sdtrain.families.words import DENOISER, LATENT_FACTOR_PX, NoCaption, TrainableNetwork

Preset = Literal["lora", "lora-text-encoders", "full", "full-text-encoders", "auto-freeze", "never-freeze"]
TrackerName = Literal["tensorboard", "wandb", "trackio"]
BasePrecision = Literal["full", "int8", "fp8", "nf4"]


class ModelConfig(Settings):
    """The model that is fine-tuned."""

    path: PathText = Field(
        description="`builtin:tiny-sdxl`, a diffusers folder, a `.safetensors` checkpoint or a hub id."
    )
    vae: PathText = Field(default="", description="A VAE to use instead of the model's own: a folder or a file.")
    components: PathText = Field(
        default="",
        description="Folder with configs and tokenizers, which a single file lacks: a diffusers folder, say.",
    )
    variant: str = Field(
        default="", max_length=100, description="Variant of the files in a diffusers folder, e.g. `fp16`."
    )
    prediction: Literal["auto"] | Prediction = Field(
        default="auto", description="What the U-Net predicts; `auto` reads it from the model."
    )
    zero_terminal_snr: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Whether the noise schedule ends in pure noise, from where pictures are then sampled (trailing "
        "timesteps); `auto` reads it from the model.",
    )
    no_caption: Literal["auto"] | NoCaption = Field(
        default="auto",
        description="What an empty caption is, dropped, missing or a negative prompt: the encoded empty string, or "
        "zeros; `auto` reads it from the model.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "mixed", "float16"] = Field(
        default="auto",
        description="Precision of the networks; `auto`: bfloat16 on a GPU that has it, float16 on others, float32 on a "
        "CPU. `mixed`: weights in float32, computed with in bfloat16 (autocast). `float16`: for GPUs without bfloat16, "
        "with a scaled loss; what is trained stays in float32.",
    )
    base_precision: BasePrecision = Field(
        default="full",
        description="How the frozen U-Net's linear layers are held while adapters are trained: `full` as `dtype` says; "
        "`int8`, `fp8`: in 8 bits, a scale an output; `nf4`: in 4 bits, a scale for 64 neighbours, and in `int8` the "
        "eighth that counts most. They are unpacked for each product. Files, `merge` and `sample` are of the model as "
        "it is. `pip install sdtrain[quantised]`.",
    )


class LoraConfig(Settings):
    """Training small matrices beside frozen weights."""

    kind: Literal["lora"]
    train: list[TrainableNetwork] = Field(default=[DENOISER], min_length=1, description="Networks that get adapters.")
    adapter: Literal["lora", "rslora", "dora", "loha", "lokr", "oft"] = Field(
        default="lora", description="Kind of adapter; see `export.form` for who reads which."
    )
    rank: Count = Field(default=16, description="Rank of the adapters; for `oft` the size of the rotated blocks.")
    alpha: float = Field(default=16.0, gt=0, description="The adapter counts alpha / rank.")
    ranks: dict[str, Count] = Field(
        default={}, description='Ranks of single layers by pattern, e.g. `{ "*attn2*" = 32 }`; the last match counts.'
    )
    alphas: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="Alphas of single layers by pattern."
    )
    targets: Literal["attention", "attention+ff", "all-linear", "all"] | list[str] = Field(
        default="attention+ff",
        description="Layers that get adapters: a preset, or patterns of module names such as `*attn2.to_k`.",
    )
    lr: dict[TrainableNetwork, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Weight of a network's step size against the others, e.g. `{ text_encoder = 0.5 }`; it waits "
        "while d climbs and counts from when d is at rest, where d of a weighed network is frozen.",
    )
    stop: dict[TrainableNetwork, Count] = Field(
        default={}, description="Step after which a network is no longer trained, e.g. `{ text_encoder = 500 }`."
    )
    layer_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={},
        description="How far single layers move against the others, by pattern, e.g. "
        '`{ "down_blocks.*" = 0.5, "mid_block.*" = 0 }`; the last match counts. It multiplies their alpha; 0: no '
        "adapter there.",
    )
    dropout: Rate = Field(
        default=0.0,
        description="Share of the numbers between the down and the up matrix that a step leaves out (`network_dropout` "
        "in sd-scripts); for `lora` and `rslora`.",
    )
    rank_dropout: Rate = Field(
        default=0.0, description="Share of the ranks that a step leaves out, picture by picture; as above."
    )
    module_dropout: Rate = Field(
        default=0.0,
        description="Share of the layers whose adapter a step leaves out; the others count for 1 / (1 - share), unlike "
        "in sd-scripts. Not for `dora` and `oft`.",
    )
    scale_weight_norms: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="Largest norm of the change of a layer: after each step what is above it is scaled down to it, in "
        "training and in the average; 0: no limit. sd-scripts suggests 1. Not for `dora` and `oft`.",
    )
    init_from: PathText = Field(default="", description="A LoRA file to start from, with the d it was trained with.")


class FullConfig(Settings):
    """Training all weights of the chosen networks."""

    kind: Literal["full"]
    train: list[TrainableNetwork] = Field(default=[DENOISER], min_length=1, description="Networks that are trained.")
    lr: dict[TrainableNetwork, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Weight of a network's step size against the others, e.g. `{ text_encoder = 0.5 }`; it waits "
        "while d climbs and counts from when d is at rest, where d of a weighed network is frozen.",
    )
    stop: dict[TrainableNetwork, Count] = Field(
        default={}, description="Step after which a network is no longer trained, e.g. `{ text_encoder = 500 }`."
    )
    layer_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={},
        description='Layers that are not trained, by pattern, e.g. `{ "time_embedding.*" = 0 }`; other weights than 0 '
        "and 1 need adapters. The last match counts.",
    )


class FolderConfig(Settings):
    """One folder of pictures, and where and how they are captioned."""

    path: PathText = Field(
        description="A folder, its sub-folders too; or `builtin:quickstart`, `builtin:quickstart-known`."
    )
    exclude: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        description='Sub-folders and files that are left out, by name or pattern, e.g. `["masks", "*_old*"]`.',
    )
    repeats: Times = Field(
        default=1,
        description="How often each picture is seen in an epoch. 0.2: an epoch has a fifth of them, drawn anew each "
        "time; 2.5: twice, and half of them once more.",
    )
    loss_weight: Annotated[float, Field(gt=0, le=1000.0)] = Field(
        default=1.0, description="How much the error of each picture counts against that of others."
    )
    regularisation: bool = Field(
        default=False,
        description="Pictures of what the model knows already, such as other dogs: their `repeats` are scaled so that "
        "an epoch has as many of them as of all others.",
    )
    folder_names: Literal["plain", "repeats_concept"] = Field(
        default="plain",
        description="`repeats_concept`: as in sd-scripts, pictures in `10_sks dog` are seen 10 times as often, and "
        "`sks dog` is the caption of those that have none.",
    )
    captions: Literal["txt", "caption", "metadata", "meta_cap"] = Field(
        default="txt",
        description="Where captions stand: in `name.txt` or `name.caption` beside each picture, in `metadata.jsonl` or "
        "`metadata.csv` (Hugging Face's `file_name` and `text`), or in `meta_cap.json` (sd-scripts).",
    )
    missing_captions: Literal["error", "empty"] = Field(
        default="error", description="What a picture without a caption gets: an error, or the empty caption."
    )
    caption_lines: Literal["joined", "drawn"] = Field(
        default="joined", description="Lines of a caption file are one caption, or several of which one is drawn."
    )
    trigger: str = Field(
        default="", description="Word for what is taught; put in front of those captions that do not hold it."
    )
    caption_prefix: str = Field(default="", description="Put in front of every caption.")
    caption_suffix: str = Field(default="", description="Put behind every caption.")
    shuffle_tags: bool = Field(default=False, description="Whether the tags of a caption change places.")
    tag_dropout: Share = Field(default=0.0, description="Share of tags that are left out of a caption.")
    tag_separator: str = Field(default=",", min_length=1, description="What stands between two tags.")
    keep_tags: Whole = Field(default=0, description="This many first tags stay where they are.")
    keep_separator: str = Field(
        default="", description="Tags before this sign stay where they are, e.g. `|||`; the sign is taken out."
    )
    wildcards: bool = Field(default=False, description="Whether `{red|blue}` means that one of the two is drawn.")
    resolutions_px: list[Annotated[int, Field(ge=64, le=16384)]] = Field(
        default=[],
        description="Resolutions of this folder, instead of data.resolution_px; at each of several a picture is seen "
        "`repeats` times.",
    )
    flip: bool = Field(
        default=False,
        description="Whether pictures are seen mirrored half of the time. Not where left and right matter: "
        "writing, the face of one person.",
    )
    crops: Annotated[int, Field(ge=1, le=100)] = Field(
        default=1,
        description="How many crops of a picture are encoded, of which each step draws one, from one end of what does "
        "not fit to the other; 1: the middle.",
    )
    masks: Literal["none", "beside", "folder", "alpha"] = Field(
        default="none",
        description="What says which part of a picture counts: `name.mask.png` beside it, `name.png` in the folder "
        "`mask_path`, or its own alpha channel. White counts, black does not; a picture without a mask counts as a "
        "whole.",
    )
    mask_path: PathText = Field(default="", description='Folder of the masks, for masks = "folder".')
    mask_floor: Share = Field(default=0.0, description="What counts at least where a mask says less; 0: nothing.")


class DataConfig(Settings):
    """How folders of pictures become batches."""

    folder: list[FolderConfig] = Field(min_length=1, description="The folders.")
    resolution_px: Annotated[int, Field(ge=64, le=16384)] = Field(
        default=1024, description="Pictures are scaled to about resolution_px x resolution_px pixels of any shape."
    )
    bucket_step_px: Annotated[int, Field(ge=LATENT_FACTOR_PX)] = Field(
        default=64,
        description=f"Widths and heights of buckets are multiples of this (of {LATENT_FACTOR_PX} at least).",
    )
    max_aspect: Annotated[float, Field(ge=1.0, le=100.0)] = Field(
        default=2.5, description="Longest side over shortest side of the most extreme bucket."
    )
    enlarge: bool = Field(
        default=True,
        description="Whether pictures smaller than their bucket are enlarged; `false`: they go into smaller buckets.",
    )
    min_side_px: Whole = Field(default=0, description="Pictures with a shorter side are refused; 0: 16 px, the least.")
    batch_size: Count = Field(default=4, description="Pictures in a micro-batch.")
    gradient_accumulation: Count = Field(default=1, description="Micro-batches in a step.")
    ragged: Literal["keep", "merge"] = Field(
        default="keep",
        description="`merge`: a picture that is alone in its bucket joins the nearest one that has others, "
        "and is cropped for it.",
    )
    caption_chunks: Count = Field(
        default=1, description="Captions are read in this many chunks of 75 tokens; what is longer is cut."
    )
    caption_dropout: Share = Field(default=0.0, description="Share of captions that are left empty.")
    caption_variants: Count = Field(
        default=8,
        description="How many wordings of a caption that varies are encoded ahead, of which each step draws one; "
        "where text encoders are trained, each step draws anew.",
    )
    cache: PathText = Field(default="", description="Folder of encoded pictures and captions; empty: `<output>/cache`.")


class OptimizerConfig(Settings):
    """Prodigy + Schedule-Free. Values that are not set come from the preset."""

    preset: Preset = Field(
        default="lora", description="Named set of values; the one that fits what is trained where none is named."
    )
    lr: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Factor on the step size; leave it at 1.")
    betas: tuple[Share, Share] = Field(
        default=(0.9, 0.99), strict=False, description="Averaging and second-moment factors."
    )
    beta3: Share | Literal["auto"] = Field(
        default="auto", description="Memory of Prodigy's sums; `auto` is sqrt(beta2)."
    )
    beta4: Annotated[float, Field(gt=-1, lt=1)] | Literal["auto"] = Field(
        default=0.0, description="0: d never falls; above 0: d is a running average; `auto` is beta2."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="Decoupled weight decay.")
    d0: Annotated[float, Field(gt=0)] = Field(default=1e-6, description="First guess of the step size d.")
    d_coef: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default=1.0,
        description="Factor on the d that is found; counts once d is at rest, and freezes it there. `auto`: 1 in "
        "runs of 400 steps, more in shorter ones (2 up to 100 steps), less in longer ones (0.25 from 1,600 on).",
    )
    d_limiter: bool = Field(default=True, description="Let d grow by at most 2^(1/4) a step.")
    prodigy_steps: Whole | Literal["auto"] = Field(
        default=0, description="Step at which d is frozen; 0: never; `auto`: once it has stopped growing."
    )
    freeze_share: Share = Field(
        default=0.0, description="Share of the planned steps that must be done before `auto` freezes d."
    )
    eps: Annotated[float, Field(ge=0)] = Field(default=0.0, description="0: atan2 update, no epsilon; else Adam's.")
    split_groups: bool = Field(default=True, description="Each network estimates its own d.")
    split_groups_mean: Literal["harmonic_mean", "geometric_mean", "mean", "off"] = Field(
        default="harmonic_mean", description="Mean of the networks' d that is applied; `off`: each its own."
    )
    factored: bool = Field(default=True, description="Second moment as row and column means: little memory.")
    schedulefree_c: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Above 0: decouples averaging from beta1 (refined Schedule-Free)."
    )
    stochastic_rounding: bool = Field(default=True, description="Round bfloat16 weights stochastically.")


class PreviewConfig(Settings):
    """Pictures made while training, with averaged weights."""

    every: Whole = Field(default=250, description="Steps between previews; 0: none at all.")
    prompts: list[str] = Field(
        default=[],
        description="One row of the grid each; none: the first captions of the pictures that are trained on.",
    )
    negative_prompt: str = Field(default="", description="What the pictures should not show.")
    seeds: list[Whole] = Field(default=[0, 1, 2], min_length=1, description="One column of the grid each.")
    sampler: Sampler = Field(
        default="euler",
        description="How noise becomes a picture: `euler`, `euler_a` (ancestral, which adds noise on the way), "
        "`dpmpp_2m_karras` or `unipc`, as diffusers has them.",
    )
    num_inference_steps: Count = Field(default=25, description="Sampling steps.")
    guidance_scale: Annotated[float, Field(ge=1)] = Field(default=6.0, description="Classifier-free guidance; 1: off.")
    guidance_rescale: Share = Field(
        default=0.0,
        description="How far the contrast that guidance adds is taken back, 0: not at all; about 0.7 suits "
        "v_prediction with zero terminal SNR, whose pictures guidance overexposes.",
    )
    width_px: Whole = Field(default=0, description="Width; 0: data.resolution_px.")
    height_px: Whole = Field(default=0, description="Height; 0: data.resolution_px.")


class CheckpointConfig(Settings):
    """Training states from which a run can go on."""

    every: Whole = Field(default=500, description="Steps between training states; 0: only at the end.")
    keep: Count = Field(default=2, description="How many of the last training states stay; the best stays too.")
    keep_every: Whole = Field(default=0, description="States of every so many steps stay as well; 0: none.")
    in_background: bool = Field(
        default=True,
        description="Write states while the training goes on, where a copy takes at most a quarter of the free memory.",
    )


class ValidationConfig(Settings):
    """Pictures that are held out of the training: their loss tells when the weights are best."""

    share: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, description="Share of the training pictures that is held out, chosen by their content; 0: none."
    )
    folder: list[FolderConfig] = Field(
        default=[], description="Folders of pictures that are only validated on, instead of a share."
    )
    every: Whole = Field(default=100, description="Steps between validations, if pictures are held out; 0: none.")
    noise_levels: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=4, description="Noise levels at which each picture is looked at, the same at every validation."
    )
    seed: Whole = Field(
        default=0, description="Which pictures a share holds out, and their noise; whatever the seed of the run is."
    )
    patience: Whole = Field(
        default=0,
        description="Stop after this many validations without a lower loss, beyond the standard error; 0: never.",
    )


class TrackingConfig(Settings):
    """Experiment trackers that are told what `log.jsonl` tells, and shown the previews."""

    to: list[TrackerName] = Field(
        default=[],
        description="Trackers, each an extra to install: `pip install sdtrain[tensorboard]`. `tensorboard` writes into "
        "`<run>/tensorboard`; `WANDB_MODE=offline` keeps `wandb` off the network.",
    )
    project: str = Field(
        default="sdtrain", min_length=1, max_length=100, description="Name of the project, for `wandb` and `trackio`."
    )


class Config(Settings):
    """A whole run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="Name of the run and of its files."
    )
    output: PathText = Field(default="runs", description="Folder of all runs.")
    steps: Count = Field(description="Optimizer updates. More can be added later: `--resume --set steps=+500`.")
    seed: Whole = Field(default=0, description="Every random draw follows from it.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="`auto`: the GPU if there is one.")
    deterministic: bool = Field(
        default=False,
        description="On a GPU: only kernels that give the same bits every time. Without, attention's backward adds up "
        "in whatever order it finds, so two runs differ by rounding there; on a CPU they never do.",
    )
    model: ModelConfig
    method: LoraConfig | FullConfig = Field(discriminator="kind", description="`lora` or `full`.")
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    timesteps: TimestepConfig = TimestepConfig()
    noise: NoiseConfig = NoiseConfig()
    loss: LossConfig = LossConfig()
    preserve: PreserveConfig = PreserveConfig()
    preview: PreviewConfig = PreviewConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    export: ExportConfig = ExportConfig()
    memory: MemoryConfig = MemoryConfig()
    parallel: ParallelConfig = ParallelConfig()
    tracking: TrackingConfig = TrackingConfig()
