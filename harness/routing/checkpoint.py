"""A Hugging Face checkpoint in memory: local files only, no code from it, weights from safetensors only, and whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from harness.errors import bad, first_line

SHARE = 0.8  # of the free memory that a model may take


def transformers() -> Any:
    try:
        import transformers
    except ImportError:
        needed = "'transformers>=4.56' 'safetensors>=0.5' 'accelerate>=1.1'"
        remedy = f"needs transformers, which is not installed: pip install {needed}"
        raise bad("checkpoint", "transformers", remedy) from None
    return transformers


def load(checkpoint: Path, **how: Any) -> Any:
    """The model; ``how`` goes to ``from_pretrained``. Errors: no such model, weights that are missing, of another
    shape, damaged or no numbers."""
    library = transformers()
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    try:
        model, info = library.AutoModelForCausalLM.from_pretrained(
            str(checkpoint),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="auto",
            output_loading_info=True,
            **how,
        )
    except Exception as error:  # configurations, safetensors and model classes raise many kinds
        reason = first_line(error)
        remedy = f"cannot be loaded ({reason}); it needs whole safetensors weights of a class that transformers has"
        raise bad("checkpoint", str(checkpoint), remedy) from None
    for kind, told in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape"), ("error_msgs", "")):
        if wrong := sorted(map(str, info.get(kind) or ())):
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise bad("checkpoint", str(checkpoint), f"{told} {wrong[0]}{more}; download it again")
    check_numbers(model, checkpoint)
    return model.eval()


def check_numbers(module: nn.Module, checkpoint: Path, where: str = "") -> None:
    """``UserError`` for a weight that is NaN or infinite; weights that are on disk are left out."""
    for name, weight in module.named_parameters():
        if weight.is_meta or not weight.is_floating_point() or weight.dtype.itemsize < 2:
            continue
        if not torch.isfinite(weight).all():
            raise bad("checkpoint", str(checkpoint), f"{where}{name} holds NaN or infinity; download it again")


def fits(checkpoint: Path, device: str) -> bool:
    """Whether the whole model has room in the memory that is free now; in memory it is about as large as its files."""
    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) <= SHARE * free
