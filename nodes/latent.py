"""Where sampling starts: the timesteps as noise levels, and the LR-embedded start (LRE) as NOISE and LATENT."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..seesr_core.method.schedule import LAST_TIMESTEP, SPACINGS, TRAIN_TIMESTEPS, Spacing, timesteps
from .host.noise import LRENoise
from .host.noise_levels import NoiseLevels
from .host.presets import CUSTOM, model_defaults, preset_input, sampling_values
from .host.vae import encode_image
from .schema import make_schema

MAX_SEED = 0xFFFFFFFFFFFFFFFF


def start_timestep_input(tooltip: str) -> io.Int.Input:
    """The timestep that the LR latent is noised to."""
    return io.Int.Input("start_timestep", default=LAST_TIMESTEP, min=0, max=LAST_TIMESTEP, tooltip=tooltip)


def steps_input() -> io.Int.Input:
    """Steps of the whole schedule."""
    return io.Int.Input(
        "steps",
        default=50,
        min=1,
        max=TRAIN_TIMESTEPS,
        tooltip="Steps of the full schedule; only those at or below start_timestep are run.",
    )


def seed_input() -> io.Int.Input:
    """What the noise of a batch derives from."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=MAX_SEED,
        control_after_generate=True,
        tooltip="Noise of the first picture; picture i of a batch uses seed + i.",
    )


class SeeSRLatentInit(io.ComfyNode):
    """LRE: sampling starts from the upscaled photo's latent, noised."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SeeSRLatentInit",
            display_name="SeeSR Latent Init (LRE)",
            description="LR embedding: encodes the prepared photo and gives noise that makes sampling start from it "
            "instead of from pure noise. Connect both outputs to SeeSR Tiled Sampler or SamplerCustomAdvanced. Works "
            "with any Stable Diffusion MODEL, patched or not.",
            search_aliases=["lre", "lr embedding", "latent initializer", "vae encode start", "init noise", "img2img"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample; its noise schedule is needed."),
                io.Vae.Input("vae", tooltip="The autoencoder of the same checkpoint."),
                io.Image.Input(
                    "image", tooltip="The upscaled photo, from SeeSR Prepare Image: as large as the result."
                ),
                io.Sigmas.Input(
                    "sigmas", tooltip="The noise levels that the sampler gets, from SeeSR Scheduler or another one."
                ),
                seed_input(),
                start_timestep_input(
                    "Timestep that the photo's latent is noised to. 999, as published, follows SIGMAS that begin "
                    "lower; another number must be the one that SeeSR Scheduler has."
                ),
            ],
            outputs=[
                io.Noise.Output(display_name="noise", tooltip="Noise with the LR embedding, for these sigmas only."),
                io.Latent.Output(display_name="latent", tooltip="The plain encoding of the photo."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, vae: Any, image: Tensor, sigmas: Tensor, seed: int, start_timestep: int = LAST_TIMESTEP
    ) -> io.NodeOutput:
        """NOISE and LATENT."""
        return io.NodeOutput(*latent_init(model, vae, image, sigmas, seed=seed, start_timestep=start_timestep))


class SeeSRScheduler(io.ComfyNode):
    """The published timesteps as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SeeSRScheduler",
            display_name="SeeSR Scheduler",
            description="Noise levels of the published schedule: evenly spaced timesteps of the 1000 the model was "
            "trained on. Works with any Stable Diffusion MODEL.",
            search_aliases=["seesr scheduler", "sigmas", "ddpm timesteps", "leading", "trailing", "turbo scheduler"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample; its noise schedule is needed."),
                steps_input(),
                io.Combo.Input(
                    "spacing",
                    options=list(SPACINGS),
                    default=SPACINGS[0],
                    tooltip="leading: as published (50 steps: 981, 961 … 1). trailing: begins at the very end of the "
                    "training schedule (2 steps: 999, 499), as SD-turbo was trained.",
                ),
                start_timestep_input("Timesteps above this one are left out."),
                preset_input("steps, spacing and start_timestep", default=CUSTOM),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="Falling noise levels, the last one 0.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        steps: int = 50,
        spacing: Spacing = "leading",
        start_timestep: int = LAST_TIMESTEP,
        preset: str = CUSTOM,
    ) -> io.NodeOutput:
        """SIGMAS."""
        given = {"steps": steps, "spacing": spacing, "start_timestep": start_timestep}
        return io.NodeOutput(schedule_sigmas(model, **sampling_values(preset, model_defaults(model), given)))


def schedule_sigmas(
    model: Any, *, steps: int, spacing: Spacing = "leading", start_timestep: int = LAST_TIMESTEP
) -> Tensor:
    """Noise levels (N + 1,), float32 on the CPU, of the N timesteps that are run, and 0.

    Raises:
        SettingsError: no timestep remains, a value is out of range, or the model has another kind of schedule.
    """
    levels = NoiseLevels.of(model)
    run = timesteps(steps, spacing=spacing, start_timestep=start_timestep)
    return torch.tensor([*(levels.sigma(t) for t in run), 0.0])


def latent_init(
    model: Any, vae: Any, image_BHWC: Tensor, sigmas: Tensor, *, seed: int, start_timestep: int = LAST_TIMESTEP
) -> tuple[LRENoise, dict[str, Any]]:
    """The LR-embedded start of pictures whose sides are multiples of 8: the host's NOISE and LATENT.

    Raises:
        SettingsError: sigmas that begin above `start_timestep` or too far below one other than 999, do not fall or are
            none, or a model or autoencoder that does not fit.
        ImageError: a picture of another size or with NaN.
    """
    noise = LRENoise.for_model(model, sigmas, seed=seed, start_timestep=start_timestep)
    return noise, {"samples": encode_image(model, vae, image_BHWC)}
