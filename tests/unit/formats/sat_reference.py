"""CogVideoX computed from SAT's tensors by SAT's own rules: fused q, k, v, twelve modulations a block, its patches.

Written from the description of the format, with no code of diffusers, so that outputs can be compared. Everything is
float64; `state` has names without the prefix `model.diffusion_model.`.
"""

import math

import torch
import torch.nn.functional as F

State = dict[str, torch.Tensor]


def linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(state: State, name: str, x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    centered = x - x.mean(-1, keepdim=True)
    normed = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * state[f"{name}.weight"] + state[f"{name}.bias"]


def embed_number(value: torch.Tensor, width: int) -> torch.Tensor:
    half = width // 2
    angle = value[:, None].double() * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angle.cos(), angle.sin()], -1)


def rotation(frames: int, rows: int, columns: int, head_dim: int) -> torch.Tensor:
    """Angles [tokens, head_dim] of a video's patches: a quarter of a head for time, the rest for row and column."""
    widths = (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)
    angles = []
    for axis, (count, width) in enumerate(zip((frames, rows, columns), widths, strict=True)):
        frequency = 1.0 / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = torch.arange(count, dtype=torch.float64)[:, None] * frequency
        shape = [1, 1, 1, width]
        shape[axis] = count
        angles.append(angle.repeat_interleave(2, -1).view(shape).expand(frames, rows, columns, width))
    return torch.cat(angles, -1).flatten(0, 2)


def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return x * angle.cos() + turned * angle.sin()


def project(state: State, name: str, x: torch.Tensor, alpha: float) -> torch.Tensor:
    """A linear layer, with its LoRA where the file has one: one pair of matrices for each part of the output."""
    original = f"{name}.original" if f"{name}.original.weight" in state else name
    y = linear(state, original, x)
    parts = []
    while f"{name}.matrix_A.{len(parts)}" in state:
        down, up = state[f"{name}.matrix_A.{len(parts)}"], state[f"{name}.matrix_B.{len(parts)}"]
        parts.append(x @ down.T @ up.T * (alpha / down.shape[0]))
    return y + torch.cat(parts, -1) if parts else y


def forward(
    state: State,
    latents: torch.Tensor,
    text: torch.Tensor,
    timestep: torch.Tensor,
    *,
    patch: tuple[int, int, int],
    rotary: bool,
    ofs: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> torch.Tensor:
    """The transformer: `latents` [B, F, C, H, W], `text` [B, tokens, width of the text] to [B, F, 16, H, W]."""
    state = {name: tensor.double() for name, tensor in state.items()}
    latents, text = latents.double(), text.double()
    batch, frames, channels, height, width = latents.shape
    depth, p, q = patch
    grid = (frames // depth, height // p, width // q)

    embedding = linear(
        state, "time_embed.2", F.silu(linear(state, "time_embed.0", embed_number(timestep, text_width(state))))
    )
    if ofs is not None:
        number = embed_number(ofs, state["ofs_embed.0.weight"].shape[1])
        embedding = embedding + linear(state, "ofs_embed.2", F.silu(linear(state, "ofs_embed.0", number)))

    cut = latents.view(batch, grid[0], depth, channels, grid[1], p, grid[2], q).permute(0, 1, 4, 6, 3, 2, 5, 7)
    weight = state["mixins.patch_embed.proj.weight"].flatten(1)  # a convolution by patches is this product
    video = cut.reshape(batch, math.prod(grid), -1) @ weight.T + state["mixins.patch_embed.proj.bias"]
    x = torch.cat([linear(state, "mixins.patch_embed.text_proj", text), video], 1)
    if "mixins.pos_embed.pos_embedding" in state:
        x = x + state["mixins.pos_embed.pos_embedding"][:, : x.shape[1]]

    num_text = text.shape[1]
    layer = 0
    while f"mixins.adaln_layer.adaLN_modulations.{layer}.1.weight" in state:
        x = block(state, layer, x, embedding, num_text, grid if rotary else None, alpha)
        layer += 1
    x = layer_norm(state, "transformer.final_layernorm", x)[:, num_text:]
    shift, scale = linear(state, "mixins.final_layer.adaLN_modulation.1", F.silu(embedding)).chunk(2, 1)
    x = layer_norm(state, "mixins.final_layer.norm_final", x) * (1 + scale[:, None]) + shift[:, None]
    x = linear(state, "mixins.final_layer.linear", x)
    x = x.view(batch, *grid, -1, depth, p, q).permute(0, 1, 5, 4, 2, 6, 3, 7)
    return x.reshape(batch, frames, -1, height, width)


def text_width(state: State) -> int:
    return state["time_embed.0.weight"].shape[1]


def block(
    state: State,
    layer: int,
    x: torch.Tensor,
    embedding: torch.Tensor,
    num_text: int,
    grid: tuple[int, int, int] | None,
    alpha: float,
) -> torch.Tensor:
    name = f"transformer.layers.{layer}"
    modulation = linear(state, f"mixins.adaln_layer.adaLN_modulations.{layer}.1", F.silu(embedding)).chunk(12, 1)
    is_text = (torch.arange(x.shape[1]) < num_text)[None, :, None]

    def pick(index: int) -> torch.Tensor:
        return torch.where(is_text, modulation[index + 6][:, None], modulation[index][:, None])

    h = layer_norm(state, f"{name}.input_layernorm", x) * (1 + pick(1)) + pick(0)
    x = x + pick(2) * attention(state, layer, h, num_text, grid, alpha)
    h = layer_norm(state, f"{name}.post_attention_layernorm", x) * (1 + pick(4)) + pick(3)
    h = linear(state, f"{name}.mlp.dense_h_to_4h", h)
    return x + pick(5) * linear(state, f"{name}.mlp.dense_4h_to_h", F.gelu(h, approximate="tanh"))


def attention(
    state: State, layer: int, x: torch.Tensor, num_text: int, grid: tuple[int, int, int] | None, alpha: float
) -> torch.Tensor:
    name, norms = f"transformer.layers.{layer}.attention", "mixins.adaln_layer"
    head_dim = state[f"{norms}.query_layernorm_list.{layer}.weight"].shape[0]
    q, k, v = (
        part.unflatten(-1, (-1, head_dim)).transpose(1, 2)
        for part in project(state, f"{name}.query_key_value", x, alpha).chunk(3, -1)
    )
    q = layer_norm(state, f"{norms}.query_layernorm_list.{layer}", q)
    k = layer_norm(state, f"{norms}.key_layernorm_list.{layer}", k)
    if grid is not None:
        angle = rotation(*grid, head_dim)
        q = torch.cat([q[:, :, :num_text], rotate(q[:, :, num_text:], angle)], 2)
        k = torch.cat([k[:, :, :num_text], rotate(k[:, :, num_text:], angle)], 2)
    weights = (q @ k.transpose(-1, -2) / head_dim**0.5).softmax(-1)
    return project(state, f"{name}.dense", (weights @ v).transpose(1, 2).flatten(2), alpha)


class Autoencoder:
    """SAT's autoencoder on a short clip in one piece, from its tensors."""

    def __init__(self, state: State, *, groups: int, num_levels: int = 4) -> None:
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.groups, self.num_levels = groups, num_levels

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, F, H, W] to the mean and log-variance [B, 2 C, f, h, w]."""
        h = self._causal("encoder.conv_in", x.double())
        for level in range(self.num_levels):
            h = self._blocks(f"encoder.down.{level}", h, None)
            if level < self.num_levels - 1:
                h = self._downsample(f"encoder.down.{level}.downsample", h, in_time=level < 2)
        h = self._residual("encoder.mid.block_1", h, None)
        h = self._residual("encoder.mid.block_2", h, None)
        return self._causal("encoder.conv_out", F.silu(self._norm("encoder.norm_out", h, None)))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, f, h, w] to pixels [B, 3, F, H, W]."""
        z = z.double()
        h = self._causal("decoder.conv_in", z)
        h = self._residual("decoder.mid.block_1", h, z)
        h = self._residual("decoder.mid.block_2", h, z)
        for level in reversed(range(self.num_levels)):
            h = self._blocks(f"decoder.up.{level}", h, z)
            if level:
                h = self._upsample(f"decoder.up.{level}.upsample", h, in_time=level >= self.num_levels - 2)
        return self._causal("decoder.conv_out", F.silu(self._norm("decoder.norm_out", h, z)))

    def _blocks(self, name: str, h: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
        index = 0
        while f"{name}.block.{index}.conv1.conv.weight" in self.state:
            h = self._residual(f"{name}.block.{index}", h, z)
            index += 1
        assert index
        return h

    def _residual(self, name: str, x: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
        h = self._causal(f"{name}.conv1", F.silu(self._norm(f"{name}.norm1", x, z)))
        h = self._causal(f"{name}.conv2", F.silu(self._norm(f"{name}.norm2", h, z)))
        if f"{name}.nin_shortcut.weight" in self.state:
            x = F.conv3d(x, self.state[f"{name}.nin_shortcut.weight"], self.state[f"{name}.nin_shortcut.bias"])
        return x + h

    def _norm(self, name: str, x: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
        inner = name if z is None else f"{name}.norm_layer"
        y = F.group_norm(x, self.groups, self.state[f"{inner}.weight"], self.state[f"{inner}.bias"], 1e-6)
        if z is None:
            return y
        if x.shape[2] > 1 and x.shape[2] % 2:  # the first frame stands for itself
            first = F.interpolate(z[:, :, :1], (1, *x.shape[3:]))
            z = torch.cat([first, F.interpolate(z[:, :, 1:], (x.shape[2] - 1, *x.shape[3:]))], 2)
        else:
            z = F.interpolate(z, x.shape[2:])
        return y * self._causal(f"{name}.conv_y", z) + self._causal(f"{name}.conv_b", z)

    def _causal(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.state[f"{name}.conv.weight"], self.state[f"{name}.conv.bias"]
        x = torch.cat([x[:, :, :1]] * (weight.shape[2] - 1) + [x], 2)
        return F.conv3d(x, weight, bias, padding=(0, weight.shape[3] // 2, weight.shape[4] // 2))

    def _frames(self, name: str, x: torch.Tensor, **how: int) -> torch.Tensor:
        flat = x.transpose(1, 2)
        y = F.conv2d(flat.flatten(0, 1), self.state[f"{name}.conv.weight"], self.state[f"{name}.conv.bias"], **how)
        return y.unflatten(0, flat.shape[:2]).transpose(1, 2)

    def _downsample(self, name: str, x: torch.Tensor, *, in_time: bool) -> torch.Tensor:
        if in_time and x.shape[2] > 1:
            first = x.shape[2] % 2
            pairs = x[:, :, first:].unflatten(2, (-1, 2)).mean(3)
            x = torch.cat([x[:, :, :first], pairs], 2)
        return self._frames(name, F.pad(x, (0, 1, 0, 1)), stride=2)

    def _upsample(self, name: str, x: torch.Tensor, *, in_time: bool) -> torch.Tensor:
        x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
        if in_time and x.shape[2] > 1:
            first = x.shape[2] % 2
            x = torch.cat([x[:, :, :first], x[:, :, first:].repeat_interleave(2, 2)], 2)
        return self._frames(name, x, padding=1)
