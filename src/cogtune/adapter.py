"""The LoRA adapter: injected by PEFT in float32 on a frozen base, saved so that a stock pipeline gives its strength.

The file is `pytorch_lora_weights.safetensors` with diffusers' keys; its header carries the adapter's whole config
(`lora_adapter_metadata`): without it the loader takes alpha = rank, and users get twice or half the trained strength.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open

from cogtune.config import AdapterSettings
from cogtune.errors import UserError, nearest
from cogtune.formats.file_names import WEIGHTS_NAME
from cogtune.formats.tensors import Tensors, hold
from cogtune.formats.writing import order_metadata
from cogtune.frozen import apply_updated, is_frozen

ADAPTER_NAME = "default"
# What decides the adapter's strength and shape. PEFT's config has more keys, but they change with its releases, and a
# key that the reader's release doesn't know makes the file unreadable there.
_METADATA_KEYS = (
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "use_dora",
    "bias",
    "rank_pattern",
    "alpha_pattern",
)


class LoraLinear(PeftLinear):
    """PEFT's LoRA layer, computing in the base's precision from float32 weights.

    PEFT casts the activations up to float32 for the two small products, which doubles their memory traffic. Here the
    small weights are cast down instead, scale included; gradients reach the float32 weights through the cast.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`x` [..., in] to [..., out]; PEFT's own path where a case is not the plain one."""
        update = None if args or kwargs else plain_update(self, x.dtype)
        base = self.base_layer
        if update is None:
            plain_call = not args and not kwargs and not self.merged and not self.disable_adapters
            names = [name for name in self.active_adapters if name in self.lora_A]
            if plain_call and len(names) == 1 and names[0] in self.lora_magnitude_vector:
                return self._decomposed(x, names[0])
            return super().forward(x, *args, **kwargs)
        if not has_dropout(self) and is_frozen(base):
            return apply_updated(base, x, update)
        dropped = self.lora_dropout[self.active_adapters[0]](x)
        return base(x) + F.linear(F.linear(dropped, update[0]), update[1])

    def _decomposed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """DoRA (arXiv:2402.09353): each row of the sum is brought to a trained length; its norm passes no gradient.

        PEFT's own keeps what it computed in a dictionary, on which the compiler stops inside a checkpoint.
        """
        down: Any = self.lora_A[name].weight
        up: Any = self.lora_B[name].weight
        base: Any = self.base_layer
        weight, magnitude = base.weight, self.lora_magnitude_vector[name].weight
        with torch.no_grad():
            norm = torch.linalg.norm(weight.to(up.dtype) + self.scaling[name] * (up @ down), dim=1)
        ratio = magnitude / norm
        dropped = self.lora_dropout[name](x)
        update = F.linear(F.linear(dropped, down.to(x.dtype)), (up * self.scaling[name]).to(x.dtype))
        if has_dropout(self) and self.training:
            y = F.linear(x, weight) + (ratio - 1) * F.linear(dropped, weight) + ratio * update
        else:
            y = ratio * (F.linear(x, weight) + update)
        return (y if base.bias is None else y + base.bias).to(x.dtype)


def has_dropout(layer: BaseTunerLayer) -> bool:
    """Whether a layer's active adapters see their input through dropout."""
    assert isinstance(layer, PeftLinear)
    return any(not isinstance(layer.lora_dropout[name], torch.nn.Identity) for name in layer.active_adapters)


def plain_update(layer: BaseTunerLayer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(down [r, in], up [out, r]) of a layer with one plain adapter, scale included, in the given precision.

    None where no adapter is active, or it is not plain: several, merged, DoRA and the like.
    """
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else ""
    if not isinstance(layer, PeftLinear) or layer.merged or layer.disable_adapters:
        return None
    if name not in layer.lora_A or name in layer.lora_variant:
        return None
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    assert isinstance(down, torch.Tensor) and isinstance(up, torch.Tensor)
    return down.to(dtype), (up * layer.scaling[name]).to(dtype)


def match_targets(module_names: list[str], patterns: list[str]) -> list[str]:
    """The names among `module_names` that the patterns take; raises `UserError` for one that takes none."""
    matched: set[str] = set()
    for pattern in patterns:
        try:
            expression = re.compile(_as_regex(pattern))
        except re.error as error:
            raise UserError(f"adapter.target_modules: {pattern!r} is no regular expression ({error})") from None
        hits = [name for name in module_names if expression.fullmatch(name)]
        if not hits:
            known = sorted({name.split(".", 2)[-1] for name in module_names})
            short = sorted({name.split("attn1.")[-1] for name in known})
            raise UserError(
                f"adapter.target_modules: {pattern!r} matches no linear layer{nearest(pattern, short)}; "
                f"known: {', '.join(short[:16])}"
            )
        matched.update(hits)
    return [name for name in module_names if name in matched]


def _as_regex(pattern: str) -> str:
    return pattern if any(c in pattern for c in "*+?[](){}|^$\\") else rf"(?:.*\.)?{re.escape(pattern)}"


def linear_names(transformer: torch.nn.Module) -> list[str]:
    """Names of the linear layers of a transformer without an adapter."""
    return [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]


def make_lora_config(settings: AdapterSettings, transformer: torch.nn.Module) -> LoraConfig:
    """PEFT's config for the settings and a model; raises `UserError` where a target matches no linear layer.

    PEFT refuses expressions that match other modules too, such as whole blocks: it gets the layers' own names then.
    """
    matched = match_targets(linear_names(transformer), settings.target_modules)
    plain = all(re.escape(p).replace(r"\.", ".") == p for p in settings.target_modules)
    targets: list[str] | str = list(settings.target_modules)
    if not plain:
        targets = "|".join(_as_regex(p) for p in settings.target_modules)
        if sum(re.fullmatch(targets, name) is not None for name, _ in transformer.named_modules()) > len(matched):
            targets = matched
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha if settings.alpha is not None else settings.rank,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.dropout,
        target_modules=targets,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True,
    )
    config._register_custom_module({torch.nn.Linear: LoraLinear})
    return config


def add_lora(transformer: CogVideoXTransformer3DModel, settings: AdapterSettings, *, seed: int) -> None:
    """Puts a fresh adapter into a frozen transformer: A random by the seed, B zero, both float32.

    Raises `UserError` where a target matches nothing.
    """
    config = make_lora_config(settings, transformer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config, ADAPTER_NAME)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def count_adapter_parameters(meta_transformer: torch.nn.Module, settings: AdapterSettings) -> int:
    """Parameters that `add_lora` would train, from a transformer's shapes; raises `UserError` like it."""
    linears = dict(meta_transformer.named_modules())
    total = 0
    for name in match_targets(linear_names(meta_transformer), settings.target_modules):
        layer = linears[name]
        assert isinstance(layer, torch.nn.Linear)
        total += settings.rank * (layer.in_features + layer.out_features)
        total += layer.out_features if settings.use_dora else 0
    return total


@contextlib.contextmanager
def without_adapter(transformer: torch.nn.Module) -> Iterator[None]:
    """The transformer is the base model inside.

    PEFT's own switch also freezes and thaws the adapter's weights, which a compiled or recorded step must not see.
    """
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


def adapter_parameters(transformer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters by name: exactly the adapter's."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def adapter_state(transformer: CogVideoXTransformer3DModel) -> dict[str, torch.Tensor]:
    """The adapter's float32 tensors under PEFT's keys."""
    return get_peft_model_state_dict(transformer, adapter_name=ADAPTER_NAME)  # pyright: ignore[reportArgumentType]


def save_adapter(
    transformer: CogVideoXTransformer3DModel,
    folder: Path,
    *,
    trained: bool,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes `pytorch_lora_weights.safetensors` with metadata into the folder; `state` where that was gathered already.

    Raises `RuntimeError` for an empty adapter, or one whose B is all zero although steps were trained: such files come
    out of sharded models that were not gathered, and load without a complaint.
    """
    state = adapter_state(transformer) if state is None else state
    ups = [tensor for key, tensor in state.items() if "lora_B" in key]
    if not ups or any(tensor.numel() == 0 for tensor in state.values()):
        raise RuntimeError("the adapter's tensors are empty; they were not gathered before saving")
    if trained and not any(bool(tensor.any()) for tensor in ups):
        raise RuntimeError("every B matrix of the adapter is zero after training; no gradient reached it")
    config = transformer.peft_config[ADAPTER_NAME].to_dict()
    metadata = {key: sorted(v) if isinstance(v := config[key], set) else v for key in _METADATA_KEYS}
    layers: dict[str, torch.nn.Module | torch.Tensor] = dict(state)
    CogVideoXPipeline.save_lora_weights(
        folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
    )
    order_metadata(folder / WEIGHTS_NAME)


def _read_same_adapter(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """A checkpoint's adapter under PEFT's keys, which must have these shapes."""
    saved = read_adapter_file(folder)[0]
    state = {key.removeprefix("transformer."): tensor for key, tensor in saved.items()}
    wrong = sorted(set(shapes) ^ set(state)) or [k for k in shapes if shapes[k] != tuple(state[k].shape)]
    if wrong:
        raise UserError(f"{folder}: the saved adapter differs from the config's at {wrong[0]} ({len(wrong)} tensors)")
    return state


class TrainedAdapter:
    """The adapter as the training loop sees it (`cogtune.trainer.Trained`)."""

    host = None

    def __init__(self, transformer: CogVideoXTransformer3DModel, model_card: str) -> None:
        self.transformer, self._card = transformer, model_card
        own = adapter_parameters(transformer)
        found = get_peft_model_state_dict(transformer, dict(own), ADAPTER_NAME)
        keys = {id(parameter): key for key, parameter in found.items()}
        self._keys = {name: keys[id(parameter)] for name, parameter in own.items()}  # PEFT's, by parameter
        self._shapes = {keys[id(p)]: tuple(p.shape) for p in own.values()}  # before any is sharded

    @property
    def files(self) -> "TrainedAdapter":
        """Checkpoints hold the adapter's own files."""
        return self

    def base(self) -> contextlib.AbstractContextManager[None]:
        """The transformer is the base model inside."""
        return without_adapter(self.transformer)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters by name."""
        return adapter_parameters(self.transformer)

    def initial(self) -> Tensors:
        """Copies of the weights as they are now, whole, on the host."""
        return hold("the adapter", {name: p.detach().cpu().clone() for name, p in self.parameters().items()})

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor], *, trained: bool) -> None:
        """Adapter file and model card."""
        state = {self._keys[name]: tensor for name, tensor in weights.items()}
        save_adapter(self.transformer, folder, trained=trained, state=state)
        (folder / "README.md").write_text(self._card, encoding="utf-8")

    def read(self, folder: Path) -> Tensors:
        """The adapter's weights of a checkpoint, by parameter."""
        state = _read_same_adapter(folder, self._shapes)
        return hold(str(folder), {name: state[key] for name, key in self._keys.items()})

    def export(self, folder: Path, weights: Tensors) -> None:
        """The final weights: what every checkpoint holds."""
        self.save(folder, {name: weights.read(name) for name in weights.specs}, trained=True)


def find_adapter_file(path: Path) -> Path:
    """The weights file of an adapter given as file or folder (a run's `final/` or a checkpoint)."""
    for candidate in (path, path / WEIGHTS_NAME):
        if candidate.is_file():
            return candidate
    raise UserError(f"--lora {path}: no {WEIGHTS_NAME} there; give the run's final/ folder or the file itself")


def read_adapter_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and adapter config ({} where the file has none); raises `UserError` for what is no adapter file."""
    file = find_adapter_file(path)
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise UserError(f"--lora {file}: not a readable safetensors file ({error}); copy it again") from None
    metadata = json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    return state, {key.removeprefix("transformer."): value for key, value in metadata.items()}


def check_adapter_fits(state: dict[str, torch.Tensor], transformer: torch.nn.Module, path: os.PathLike[str]) -> None:
    """Raises `UserError` where an adapter's tensors belong to another model, naming the first that differs."""
    linears = {name: m for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear | BaseTunerLayer)}
    ranks: dict[str, dict[str, int]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"transformer\.(.+)\.lora_([AB])\.weight", key)
        if match is None or tensor.ndim != 2:
            if "lora_magnitude_vector" in key:
                continue
            raise UserError(
                f"--lora {path}: tensor {key!r} is not one of a CogVideoX adapter "
                "(transformer.<layer>.lora_A|lora_B.weight)"
            )
        layer = linears.get(match[1])
        if layer is None:
            raise UserError(f"--lora {path}: {match[1]} does not exist in this model; the adapter is another model's")
        weight = layer.get_base_layer().weight if isinstance(layer, BaseTunerLayer) else layer.weight
        assert isinstance(weight, torch.Tensor)
        size = weight.shape[1] if match[2] == "A" else weight.shape[0]
        seen = tensor.shape[1] if match[2] == "A" else tensor.shape[0]
        if size != seen:
            raise UserError(
                f"--lora {path}: {match[1]} is {seen} wide in the adapter and {size} in this model; "
                "the adapter is another model's"
            )
        ranks.setdefault(match[1], {})[match[2]] = tensor.shape[0] if match[2] == "A" else tensor.shape[1]
    for name, rank in ranks.items():
        if rank.get("A") != rank.get("B"):
            raise UserError(
                f"--lora {path}: {name} has rank {rank.get('A')} in lora_A and {rank.get('B')} in lora_B; "
                "the file is damaged or put together from two"
            )
    if not ranks:
        raise UserError(f"--lora {path}: no adapter's tensors in it; give a file that training wrote")
