"""What a video to be made is asked to be, and whether a model can make it."""

from dataclasses import dataclass

from cogtune.errors import UserError
from cogtune.models import ModelFacts


@dataclass(frozen=True)
class Request:
    """One video to make."""

    prompt: str
    num_frames: int
    height: int
    width: int
    seed: int = 0
    negative_prompt: str = ""
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    dynamic_guidance: bool = False
    """Guidance that grows along the steps (the vendor's choice for 5B with the DPM sampler)."""
    image: str | None = None
    """File of the first frame, for image-to-video models."""
    video: str | None = None
    """File of the video to start from (video-to-video, text-to-video models)."""
    fps: float | None = None
    """Frames a second at which `video` is sampled by time."""
    strength: float | None = None
    """With a video: the part of the sampling steps that run; 1 leaves nothing of it."""

    @property
    def num_steps(self) -> int:
        """Sampling steps that run."""
        return self.num_inference_steps if self.strength is None else int(self.num_inference_steps * self.strength)


def check_request(request: Request, facts: ModelFacts, *, allow_unsupported_size: bool = False) -> None:
    """Raises `UserError` for a length, size, image or video that the model can't make, take or wasn't trained for."""
    check_size(facts, request.num_frames, request.height, request.width, allow_unsupported_size=allow_unsupported_size)
    if not request.prompt.strip():
        raise UserError("--prompt is empty; describe the video")
    if facts.takes_image and request.video is not None:
        raise UserError(
            f"--video {request.video}: {facts.variant} is an image-to-video model, which starts from --image; "
            "video-to-video needs a text-to-video model"
        )
    if facts.takes_image and request.image is None:
        raise UserError(f"no image: {facts.variant} is an image-to-video model; give --image FILE, the first frame")
    if not facts.takes_image and request.image is not None:
        raise UserError(
            f"--image {request.image}: {facts.variant} is a text-to-video model and takes no image; leave it out, or "
            "take an image-to-video model (cogvideox-5b-i2v, cogvideox-1.5-5b-i2v)"
        )
    if request.strength is not None:
        if request.video is None:
            raise UserError(f"--strength {request.strength:g}: has no effect without --video; leave it out")
        if not 0 < request.strength <= 1:
            raise UserError(f"--strength {request.strength:g}: must be above 0 and at most 1, such as 0.8")
        if request.num_steps < 1:
            raise UserError(
                f"--strength {request.strength:g} of --steps {request.num_inference_steps}: leaves no step to run; "
                "raise one of them"
            )


def check_size(
    facts: ModelFacts, num_frames: int, height: int, width: int, *, allow_unsupported_size: bool = False
) -> None:
    """Raises `UserError` unless the frames are 4k + 1, the size divides into patches and the model supports both."""
    for name, value in (("num_frames", num_frames), ("height", height), ("width", width)):
        if value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    if (num_frames - 1) % facts.temporal_factor:
        below = (num_frames - 1) // facts.temporal_factor * facts.temporal_factor + 1
        raise UserError(
            f"num_frames={num_frames}: must be {facts.temporal_factor}k + 1, such as {below} or "
            f"{below + facts.temporal_factor}: the VAE encodes the first frame alone and the rest in fours"
        )
    multiple = facts.spatial_factor * facts.patch_size
    for name, size in (("height", height), ("width", width)):
        if size % multiple:
            raise UserError(f"{name}={size}: must be a multiple of {multiple} pixels (VAE and patches)")
    native = (facts.num_frames, facts.height, facts.width)
    if (num_frames, height, width) == native:
        return
    asked = f"{num_frames} frames of {width}x{height}"
    if facts.learned_positions:
        raise UserError(
            f"{asked}: the positions of {facts.variant} are a learned table for {native[0]} frames of "
            f"{native[2]}x{native[1]}; it can make nothing else, so keep that"
        )
    allowing = "data.allow_unsupported_size=true (training) or --allow-unsupported-size (generation)"
    if facts.fixed_size and not allow_unsupported_size:
        raise UserError(
            f"{asked}: {facts.variant} supports {native[0]} frames of "
            f"{native[2]}x{native[1]} only (model card); keep that, or allow it outright with {allowing}"
        )
    fault = None if facts.size_rule is None else facts.size_rule.find_fault(num_frames, height, width)
    if fault is not None and not allow_unsupported_size:
        raise UserError(
            f"{asked}: {facts.variant}: {fault} (model card); choose such a size, or allow it with {allowing}"
        )
