"""Reading the weights of others from disk, without running anything that is in the file."""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

# In a folder, the first of these that is there.
WEIGHTS = (
    *("model.safetensors", "open_clip_model.safetensors"),
    *("pytorch_model.bin", "open_clip_pytorch_model.bin"),
)
# What may stand beside the weights and tell what they do not.
CONFIGS = (
    *("declip_jax.json", "open_clip_config.json", "config.json"),
    *("preprocessor_config.json", "processor_config.json"),
)

# Where programs put the weights among other things, and what they put before every name.
_NESTED = ("state_dict", "model", "model_state_dict", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.")


class Weights(NamedTuple):
    """A file of weights."""

    path: Path
    arrays: dict[str, np.ndarray]  # by name, without prefixes that all of them have
    # By file name, those of `CONFIGS` that stand beside it, parsed; processor_config.json's image
    # processor as "preprocessor_config.json".
    configs: dict[str, dict[str, Any]]


def read(path: Path, format: str = "") -> Weights:
    """Reads a file of weights, or the one in a folder.

    Args:
      path: a safetensors file; one that torch.save wrote, or torch.jit.save (which needs torch);
        or a folder with one.
      format: whose file to take in a folder that has those of several; "": the first of WEIGHTS.

    Raises:
      ValueError: nothing there, a damaged file, one with objects besides arrays, or torch missing.
    """
    file = _weights_file(path, format)
    with open(file, "rb") as stream:
        start = stream.read(9)
    # By what it is, not what it is called: a zip, a pickle, or a length and JSON.
    if start[:2] == b"PK" or re.match(rb"\x80[\x02-\x05]", start):
        arrays = _read_torch(file, start[:2] == b"PK" and _is_torchscript(file))
    elif start[8:9] == b"{":
        try:
            arrays = safetensors.numpy.load_file(file)
        except (safetensors.SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged, or no safetensors file: {error}.") from error
    else:
        raise ValueError(
            f"{file} is no file of weights (or a damaged one): expected safetensors, or what "
            "torch.save writes."
        )
    if not arrays:
        raise ValueError(f"{file} holds no arrays.")
    return Weights(file, strip_prefixes(arrays), _read_configs(file.parent))


def strip_prefixes(arrays: dict[str, Any]) -> dict[str, Any]:
    """Without "module." and the like, which wrappers put before every name."""
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in arrays)), ""):
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    return arrays


def _weights_file(path: Path, format: str) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: expected a file of weights or a folder with one.")
    # Those called after the format first, then in the order above.
    for name in sorted(WEIGHTS, key=lambda name: not (format and name.startswith(format))):
        if (path / name).is_file():
            return path / name
    if shards := sorted(path.glob("*.index.json")):
        raise ValueError(
            f"{path} holds weights in several files ({shards[0].name}), which are not read: save "
            "the model in one file."
        )
    suffixes = (".safetensors", ".pt", ".pth", ".bin", ".tar")
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} ({', '.join(f.name for f in files)}): name one" if files else "none"
    raise ValueError(
        f"{path} must hold one file of weights ({', '.join(WEIGHTS)}, or any {', '.join(suffixes)})"
        f", found {found}."
    )


def _read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    configs = {}
    for name in CONFIGS:
        if (folder / name).is_file():
            try:
                read = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{folder / name} is no JSON ({error}).") from error
            if not isinstance(read, dict):
                raise ValueError(f"{folder / name} must hold a JSON object.")
            configs[name] = read
    # Transformers 5 writes one file for all parts of a processor, and takes it before the others.
    if "image_processor" in (parts := configs.pop("processor_config.json", {})):
        configs["preprocessor_config.json"] = parts["image_processor"]
    return configs


def _is_torchscript(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(re.fullmatch(r"[^/]*/constants\.pkl", name) for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file} is damaged: {error}.") from error


def _read_torch(file: Path, torchscript: bool) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{file} is a PyTorch file, and reading it needs PyTorch (pip install 'torch>=2.6'). "
            "Safetensors files need nothing."
        ) from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise ValueError(
            f"{file} is a PyTorch file, and this is PyTorch {torch.__version__}: before 2.6 a file "
            "could run code even when only weights were asked for (pip install 'torch>=2.6')."
        )
    try:
        if torchscript:
            found = _read_torchscript(torch, file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind, where a pickle is damaged
        if names := ", ".join(re.findall(r"GLOBAL ([\w.]+)", str(error))):
            raise ValueError(
                f"{file} holds objects other than arrays ({names}), which could run code: it was "
                "not loaded. If you trust where it comes from, save its state dict alone, as "
                "safetensors."
            ) from error
        # torch's own advice, which comes before the reason, is to run what is in the file.
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0]
        reason = reason.rstrip(".") or type(error).__name__
        raise ValueError(f"{file} is damaged, or no file of torch.save: {reason}.") from error
    for name in _NESTED:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, expected a state dict.")
    tensors = {str(name): x for name, x in found.items() if isinstance(x, torch.Tensor)}
    if len(tensors) < len(found):
        others = ", ".join(name for name in map(str, found) if name not in tensors)
        raise ValueError(f"{file} is no state dict: {others} are not tensors.")
    try:
        return {name: _to_numpy(torch, tensor) for name, tensor in tensors.items()}
    except (RuntimeError, TypeError) as error:  # sparse ones, quantized ones
        reason = str(error).split("\n")[0]
        raise ValueError(f"{file} holds tensors that numpy does not know: {reason}.") from error


def _to_numpy(torch, tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy does not know it
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _read_torchscript(torch, file: Path) -> dict[str, Any]:
    """The arrays of what torch.jit.save wrote, by the name that a state dict has for them.

    Loading such an archive as a program would run what it says. Its arrays lie in a pickle like
    torch.save's, of which torch reads nothing but arrays, numbers and names if told to: the modules
    become objects that only hold their attributes. The archive's code is not even looked at.
    """
    data = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(data, "w") as copy:
        root = archive.namelist()[0].split("/")[0]
        for entry in archive.infolist():
            # Without constants.pkl, by which torch knows them, it is an archive of torch.save.
            name = entry.filename
            if re.fullmatch(r"data\.pkl|data/\d+|version|byteorder", name[len(root) + 1 :]):
                if entry.compress_type != zipfile.ZIP_STORED:  # might be of any size
                    raise ValueError(f"{name} is compressed, which torch never does")
                copy.writestr(name, archive.read(name))
    data.seek(0)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(data)
    modules = [(_Module, name) for name in names if name.startswith("__torch__.")]
    lists = [(_same, name) for name in names if name.startswith("torch.jit._pickle.")]
    data.seek(0)
    with torch.serialization.safe_globals(modules + lists):
        module = torch.load(data, map_location="cpu", weights_only=True)

    seen = set()  # once each: some could hold one another in 2^n ways

    def flat(module: _Module, prefix: str = "") -> dict[str, Any]:
        arrays = {}
        for name, value in vars(module).items():
            if isinstance(value, _Module) and id(value) not in seen:
                seen.add(id(value))
                arrays |= flat(value, f"{prefix}{name}.")
            elif isinstance(value, torch.Tensor):
                arrays[prefix + name] = value
        return arrays

    if not isinstance(module, _Module):
        raise ValueError("not a module")
    return flat(module)


class _Module:
    """What a module of a TorchScript archive is read as."""


def _same(values: Any, *_: Any) -> Any:
    """Stands for the functions that mark what a list in such an archive holds."""
    return values
