"""What has to be true of the files and of the model that came out of them."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn

from ..errors import CheckpointError, ResourceError
from ..runtime.experts import QExperts
from ..runtime.nn import Packed
from ..tensors.encoding import Encoding
from ..tensors.formats import Format

if TYPE_CHECKING:
    from ..compress.selection import Target

SCALES = (".weight_scale", ".scales")
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def stored_scale_dtype(files: Iterable[str], fmt: Format) -> torch.dtype | None:
    """The type of the first scale in these safetensors files.

    Formats other than ours do not name it in their config, and a scale must be loaded in the type it is stored in:
    the model was measured with it, and saving has to write the same bytes.
    """
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safe_open handle is not iterable)
                if name.endswith(SCALES):
                    return DTYPES.get(tensors.get_slice(name).get_dtype())
    return None


def check_undivided(config: Any) -> None:
    """Raise ResourceError where every process is to get a part of each weight: transformers would cut packed ones as
    if they were dense."""
    plan = getattr(config, "distributed_config", None)
    if max(getattr(plan, size, None) or 1 for size in ("tp_size", "ep_size")) > 1:
        raise ResourceError(
            "packed weights cannot be divided by tensor or expert parallelism",
            "load without `tp_plan` and `distributed_config`, whole layers on each device: `device_map='auto'`",
        )


def check_loaded(model: nn.Module, targets: Mapping[str, "Target"]) -> None:
    """Raise CheckpointError if a packed tensor was not in the checkpoint.

    transformers warns and leaves memory as it found it; a truncated upload would load and generate garbage.
    """
    missing = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if is_packed(module)
        for name, parameter in module.named_parameters(recurse=False)
        if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False)
    ]
    missing += [t.parameter for t in targets.values() if not _compressed(model, t)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"the checkpoint lacks `{missing[0]}`{more}",
            "the download or the upload is incomplete: fetch the files again",
        )


def mark_initialized(model: nn.Module) -> None:
    """Keep transformers from initialising packed modules, by parameters they do not have; `check_loaded` sees to
    what is missing."""
    for module in model.modules():
        if is_packed(module):
            module._is_hf_initialized = True  # type: ignore[assignment]


def scale_leaves(model: nn.Module) -> set[str]:
    """The names that components of floating type have in their modules: `weight_scale`, `gate_up_proj_scale`, `scales`.

    They keep the type they are stored in, unlike a bias.
    """
    found = set()
    for module in model.modules():
        if isinstance(module, Packed):
            names: Iterable[str] = module.components
        elif isinstance(module, QExperts):
            names = [name for param in module.packed for name in module.names(param)]
        else:
            continue
        found |= {name for name in names if module.get_parameter(name).is_floating_point()}
    return found


def encodings(model: nn.Module, targets: Mapping[str, "Target"]) -> dict[str, Encoding]:
    """How the modules of these targets are encoded now: module -> encoding."""
    modules = {t.layer: model.get_submodule(t.layer) for t in targets.values()}
    return {name: module.encoding for name, module in modules.items() if isinstance(module, (Packed, QExperts))}


def is_packed(module: nn.Module) -> bool:
    return isinstance(module, (Packed, QExperts))


def _compressed(model: nn.Module, target: "Target") -> bool:
    """Whether the weight of a dense checkpoint was read, and so compressed."""
    return is_packed(model.get_submodule(target.parameter.rpartition(".")[0]))
