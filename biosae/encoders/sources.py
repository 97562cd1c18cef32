"""Finding weight files (folders, the hub's cache, the hub), hashing them, and proving that a network holds them."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biosae.encoders.catalog import EncoderInfo, canonical
from biosae.errors import GatedError, InputError, OfflineError, WeightsError
from biosae.files import hash_file, read_json
from biosae.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import nn

FILES = {
    "timm": ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"),
    "open_clip": (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
        "model.safetensors",
    ),
    "biosae": ("model.safetensors",),
    "braindecode": ("model.safetensors", "pytorch_model.bin"),
    "torchxrayvision": ("model.safetensors", "pytorch_model.bin", "model.pth", "model.pt"),
}
"""Weight files of a folder or repository, by library, most wanted first."""
OWN_FOLDERS = {"robustsleepnet_eeg": "robustsleepnet", "wildecg_resnet1d": "wildecg"}
"""``name`` in the configuration of a folder -> architecture of biosae."""
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".torch")
LEAST_SHARE = 0.9
"""Share of a network's tensors that must be found, value by value, in its weight file."""
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


@dataclass(frozen=True)
class Weights:
    """A weight file, its hash, where it came from, and the configuration that lay beside it."""

    file: Path
    sha256: str
    label: str
    library: str | None = None
    arch: str | None = None
    config: Mapping[str, Any] | None = None


def _describe(folder: Path, library: str | None) -> tuple[str | None, str | None, Mapping[str, Any] | None]:
    """Library, architecture and configuration that a folder's own files state; ``library`` decides where it holds both
    kinds."""
    if library != "timm" and (folder / "open_clip_config.json").is_file():
        return "open_clip", None, read_json(folder / "open_clip_config.json")
    if not (folder / "config.json").is_file():
        return None, None, None
    config = read_json(folder / "config.json")
    arch = config.get("architecture")
    if isinstance(arch, dict) and "stage_widths" in arch:
        return "biosae", "tiny", config
    if any(str(line).startswith("conv4: Conv2d(128,128") for line in config.get("layers", ())):
        return "biosae", "nic", config
    if config.get("name") in OWN_FOLDERS:
        return "biosae", OWN_FOLDERS[config["name"]], config
    if library == "braindecode" or "braindecode_version" in config:
        return "braindecode", None, config
    if "pretrained_cfg" in config and isinstance(arch, str):
        return "timm", arch, config
    if config.get("model_type") == "dinov2":
        from biosae.encoders.dinov2 import ARCH, as_timm_config

        return "timm", ARCH, as_timm_config(folder, config)
    if "model_type" in config:
        raise WeightsError(
            f"{folder.name}/config.json is a transformers model ({config['model_type']}), which biosae does not load: "
            "convert it to timm, or compute features with transformers and use Embeddings.from_array"
        )
    raise WeightsError(
        f"{folder.name}/config.json is of no known kind (timm, open_clip, braindecode, biosae); give the "
        "architecture instead: load('timm:<architecture>', weights='<file>', size=..., mean=..., std=...)"
    )


def declared_hash(config: Mapping[str, Any] | None, file: Path) -> str | None:
    """SHA-256 that a folder's configuration states for its ``model.safetensors``, or None."""
    if config is None or file.name != "model.safetensors":
        return None
    own = config.get("biosae") if isinstance(config.get("biosae"), dict) else {}
    return own.get("sha256_model_safetensors") or config.get("sha256_model_safetensors") or config.get("sha256")


def expect_hash(file: Path, found: str, expected: str | None) -> None:
    """Compare a file's SHA-256 with the one that a configuration or the catalogue states, if any.

    Raises
    ------
    WeightsError
        If they differ.
    """
    if expected is not None and expected != found:
        raise WeightsError(
            f"{file} does not hold the weights that were expected: SHA-256 expected {expected}, found {found}. "
            "Copy or download the file again; if it was changed on purpose, load it as another encoder"
        )


def _hashed(file: Path, config: Mapping[str, Any] | None) -> str:
    found = hash_file(file)
    expect_hash(file, found, declared_hash(config, file))
    return found


def from_folder(folder: Path, *, library: str | None = None) -> Weights:
    """The weights of a local folder, verified against the hash that its configuration states.

    Raises
    ------
    WeightsError
        If there is no weight file, its hash is wrong, or the configuration is of no known kind.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    found, arch, config = _describe(folder, library)
    names = FILES.get(found or library or "timm", FILES["timm"])
    files = [folder / n for n in names if (folder / n).is_file()]
    files = files or sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
    if not files:
        raise WeightsError(f"{folder} holds no weight file; looked for {', '.join(names)}")
    return Weights(files[0], _hashed(files[0], config), f"folder:{folder.name}", found, arch, config)


def from_file(file: Path) -> Weights:
    """The weights of one file without a configuration.

    Raises
    ------
    WeightsError
        If the suffix is not one of a tensor file.
    """
    if file.suffix not in SUFFIXES:
        raise WeightsError(f"{file} is not a weight file; valid endings: {', '.join(SUFFIXES)}")
    return Weights(file, hash_file(file), f"file:{file.name}")


def find_folder(name: str) -> Path | None:
    """Folder of ``settings.weights_dirs`` that carries an encoder's name (``_`` and ``-`` alike), or None."""
    for root in settings.weights_dirs:
        for folder in sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else ():
            if canonical(folder.name) == canonical(name):
                return folder
    return None


def _first(repository: str, names: tuple[str, ...], info: EncoderInfo) -> Path | None:
    """The first of several files that a hub repository has (without a network: that the cache has); None if it has
    none of them."""
    offline = None
    for name in names:
        try:
            path = _fetch(repository, name, info, local=settings.offline or offline is not None)
        except OfflineError as error:
            offline = offline or error
            continue
        if path is not None:
            return path
    if offline is not None:
        raise offline
    return None


def _fetch(repository: str, filename: str, info: EncoderInfo, *, local: bool) -> Path | None:
    """One file of a hub repository (from the cache where it is there); None if the repository has no such file."""
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download

    repo, _, revision = repository.partition("@")
    get = f"hf download {repo} --local-dir <folder>/{info.name}"
    place = f"put the folder {info.name!r} into one of settings.weights_dirs, or pass weights='<folder>'"
    gate = f"accept the licence at https://huggingface.co/{repo} and set HF_TOKEN to your access token"
    try:
        return Path(hf_hub_download(repo, filename, revision=revision or None, local_files_only=local))
    except hub.GatedRepoError as error:
        raise GatedError(f"the weights of {info.name} are gated: {gate}. Or get them once and {place}") from error
    except hub.RepositoryNotFoundError as error:
        raise GatedError(
            f"the hub shows no repository {repo!r}: the name is wrong, or it is private or gated; then {gate}"
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        first = f"{gate}; then " if info.gated else ""
        why = "downloads are off (settings.offline)" if settings.offline else "the hub could not be reached"
        raise OfflineError(
            f"{filename} of {repo} is not in the local cache and {why}. On a machine with a network: {first}run "
            f"'{get}'; then {place}"
        ) from error
    except hub.EntryNotFoundError:
        return None
    except (hub.HfHubHTTPError, OSError) as error:
        raise OfflineError(
            f"{filename} of {repo} could not be downloaded ({error}). Run '{get}' where it works; then {place}"
        ) from error


def from_hub(repository: str, info: EncoderInfo) -> Weights:
    """Configuration and weights of a hub repository (``organisation/name`` or ``organisation/name@revision``).

    Raises
    ------
    GatedError
        If the repository needs an accepted licence or a token.
    OfflineError
        If the files are not in the cache and the network is off or unreachable.
    WeightsError
        If the repository holds no configuration or weights of a known kind.
    """
    configs = {"timm": ("config.json",), "open_clip": ("open_clip_config.json",), "braindecode": ("config.json",)}
    names = configs.get(info.library, ("open_clip_config.json", "config.json"))
    config_file = _first(repository, names, info)
    if config_file is None:
        raise WeightsError(f"{repository} holds none of {', '.join(names)}, so biosae cannot tell its architecture")
    library, arch, config = _describe(config_file.parent, info.library)
    file = _first(repository, FILES[library], info)
    if file is None:
        raise WeightsError(f"{repository} holds no weight file; looked for {', '.join(FILES[library])}")
    commit = file.parent.name
    sha = _hashed(file, config)
    stored = file.resolve().name  # the cache names large files by the hash that the hub states
    expect_hash(file, sha, stored if re.fullmatch("[0-9a-f]{64}", stored) else None)
    return Weights(file, sha, f"hf-hub:{repository.partition('@')[0]}@{commit}", library, arch, config)


def find(info: EncoderInfo, weights: str | Path | None) -> Weights:
    """Find an encoder's weights: the given path, else ``settings.weights_dirs``, the package, the hub.

    Raises
    ------
    WeightsError
        If nothing is found (also :class:`OfflineError`, :class:`GatedError`), or a hash differs.
    """
    if weights is not None:
        text = str(weights)
        if text.startswith(("hf-hub:", "hf_hub:")):
            return from_hub(text.split(":", 1)[1], info)
        path = Path(weights).expanduser()
        if path.is_dir():
            return from_folder(path, library=info.library)
        if path.is_file():
            return from_file(path)
        raise WeightsError(f"{path} does not exist; weights= takes a file, a folder, 'hf-hub:org/name' or 'random'")
    folder = find_folder(info.source.removeprefix("local:")) if info.source.startswith("local:") else None
    folder = folder or find_folder(info.name)
    if folder is not None:
        return from_folder(folder, library=info.library)
    if info.source.startswith("bundled:"):
        return from_folder(Path(__file__).parent / info.source.removeprefix("bundled:"))
    if info.repository is not None:
        return from_hub(info.repository, info)
    searched = ", ".join(map(str, settings.weights_dirs)) or "none set"
    name = info.source.removeprefix("local:") or info.name
    raise WeightsError(
        f"the weights of {info.name} are not on any hub: put the folder {name!r} into one of settings.weights_dirs "
        f"(BIOSAE_WEIGHTS_DIRS, --weights-dir; now {searched}), or pass weights='<folder or file>'"
    )


class StateFile(Mapping[str, "torch.Tensor"]):
    """Tensors of a weight file, read one at a time; nothing but tensors is ever unpickled.

    Raises
    ------
    WeightsError
        If the file is truncated, or holds more than tensors.
    """

    def __init__(self, file: Path) -> None:
        import torch
        from safetensors import SafetensorError, safe_open

        self.file = file
        try:
            if file.suffix == ".safetensors":
                handle = safe_open(file, framework="pt")
                self._names = {_bare(k): k for k in handle.keys()}  # noqa: SIM118 - not a mapping
                self._get = handle.get_tensor
                return
            state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise WeightsError(
                f"{file} holds more than tensors and was not read, because such a file can run code. Convert it to "
                "safetensors where you trust it"
            ) from error
        except (SafetensorError, RuntimeError, EOFError, OSError) as error:
            raise WeightsError(
                f"{file} could not be read ({error}); it may be truncated: copy or download it again"
            ) from error
        for wrapper in _WRAPPERS:
            if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
                state = state[wrapper]
                break
        if not isinstance(state, Mapping) or not state:
            raise WeightsError(f"{file} holds no table of named tensors")
        self._names = {_bare(k): k for k, v in state.items() if isinstance(v, torch.Tensor)}
        self._get = state.__getitem__

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._get(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _bare(name: str) -> str:
    return name.removeprefix("module.").removeprefix("_orig_mod.")


def check_loaded(network: nn.Module, state: StateFile) -> int:
    """Prove that a network holds the tensors of a file.

    Every tensor of the same name and shape must be equal, value by value; tensors that the loader renamed are looked
    for by their bytes; together at least 90 % of the network's tensors must be found (position tables may have been
    interpolated, nothing else changes).

    Returns
    -------
    int
        Number of tensors found in the file.

    Raises
    ------
    WeightsError
        If a tensor differs, or too few were found: the network would be random or partly random.
    """
    import torch

    own = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    rest = {}
    for name, tensor in own.items():
        given = state[name] if name in state else None  # noqa: SIM401 - a lazy file
        if given is None or given.shape != tensor.shape:
            rest[name] = tensor
        elif not torch.equal(given.to(tensor), tensor):
            raise WeightsError(f"after loading, {name!r} differs from {state.file}; the network was refused")
    found = len(own) - len(rest)
    if rest:
        sizes = {t.numel() for t in rest.values()}
        known = {_digest(t) for n in state if n not in own and (t := state[n]).numel() in sizes}
        missing = [n for n, t in rest.items() if _digest(t) not in known]
        found = len(own) - len(missing)
        if found < LEAST_SHARE * len(own):
            raise WeightsError(
                f"only {found} of {len(own)} tensors of the network come from {state.file} (missing: "
                f"{', '.join(missing[:5])} ...): the rest would be random. Is this the right architecture?"
            )
    return found


def _digest(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().float().contiguous().view(-1)
    return hashlib.sha256(flat.numpy().tobytes()).digest()
