"""Find a checkpoint's folder and check its files before anything heavy reads them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qeff_proxy.common.messages import first_line
from qeff_proxy.common.quiet import quiet_logs
from qeff_proxy.errors import CheckpointError
from qeff_proxy.load.safetensors_header import read_header

_SHOWN = 60  # characters of a name in an error
_SAMPLE = 4096  # bytes
_WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".model", ".txt"}
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
#: Copies of the weights in another layout, which transformers does not read.
_NOT_READ = ["original/*", "consolidated*"]
#: The link to a GGUF file, in a folder made of its metadata.
GGUF_LINK = "weights.gguf"
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "tokenizer*"]


def find_checkpoint(
    source: str,
    *,
    allow_pickle: bool,
    trust_remote_code: bool,
    hub: Mapping[str, Any] | None = None,
) -> Path:
    """The folder of a checkpoint: ``source`` itself, or the snapshot of a hub id.

    Args:
        source: A local folder or a hub id such as ``openai-community/gpt2``.
        allow_pickle: Fetch pickled weights, too.
        trust_remote_code: Fetch Python code, too.
        hub: Arguments of ``snapshot_download``: ``revision``, ``cache_dir``, ``token``.

    Raises:
        CheckpointError: There is no such folder and no such hub id, or the hub is out of reach.
    """
    folder = folder_named(source)
    if source.strip() and folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{source} is a file", "Name the checkpoint's folder.")
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or not source.strip():
        raise CheckpointError(
            f"there is no folder {source!r}", "Check the path, or give a hub id (name/model)."
        )
    from huggingface_hub import snapshot_download

    patterns = list(_FILES)
    patterns += list(_PICKLES) if allow_pickle else []
    patterns += ["*.py"] if trust_remote_code else []
    try:
        with quiet_logs("huggingface_hub"):  # it notes each try
            return Path(
                snapshot_download(
                    source, allow_patterns=patterns, ignore_patterns=_NOT_READ, **(hub or {})
                )
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source!r} is no local folder, and the model hub does not give it "
            f"({first_line(error)})",
            "Check the name and the network, or download the checkpoint and name its folder.",
        ) from error


def folder_named(source: str) -> Path:
    """The path that ``source`` would be of, whether or not anything is there.

    Raises:
        CheckpointError: It can be no path: it is too long, or names a user that is not there.
    """
    try:
        folder = Path(source).expanduser()
        folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        shown = source if len(source) <= _SHOWN else f"{source[:_SHOWN]}…"
        raise CheckpointError(
            f"{shown!r} can be no folder or hub id: {reason}",
            "Check the path, or give a hub id (name/model).",
        ) from error
    return folder


def read_config_file(folder: Path) -> dict[str, Any]:
    """The checkpoint's ``config.json``.

    Raises:
        CheckpointError: It is missing, or no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json", "Name the folder that holds the checkpoint's files."
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no JSON: {first_line(error)}", "Download the checkpoint again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is no JSON object", "Download the checkpoint again.")
    return value


def check_weights(folder: Path, *, allow_pickle: bool) -> None:
    """Check that the weight files are there, whole, and not pickled.

    Reads headers only. With an index, every shard it names must be there and hold what the index
    says.

    Raises:
        CheckpointError: Names the file, and the tensor where it is about one.
    """
    chosen = _chosen_weights(folder)
    if chosen is None and (folder / GGUF_LINK).is_symlink():
        return  # `checkpoint_tensors` reads all of its headers
    if chosen is not None:
        _check_shards(folder, chosen) if chosen.suffix == ".json" else _header(chosen)
        return
    others = _other_weights(folder, [])
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if others and not (pickles and allow_pickle):
        raise CheckpointError(
            f"{folder} has neither model.safetensors nor {_INDEX}, and transformers does not read "
            f"{', '.join(others)}",
            "Download the checkpoint again, or give the file that holds its weights that name.",
        )
    if not pickles:
        raise CheckpointError(
            f"{folder} has no weights (*.safetensors)", "Download the checkpoint again."
        )
    if not allow_pickle:
        raise CheckpointError(
            f"{folder} has its weights only as pickles ({', '.join(pickles)}), which can run code",
            "Convert them to safetensors, or pass --allow-pickle if you trust the source.",
        )


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights of a model, apart from an adapter's."""
    return bool(_other_weights(folder, []) or [*folder.glob("pytorch_model*.bin")])


def safetensors_files(folder: Path) -> list[Path]:
    """The files that ``from_pretrained`` takes a checkpoint's weights from; none if pickles."""
    chosen = _chosen_weights(folder)
    if chosen is None or chosen.suffix != ".json":
        return [chosen] if chosen is not None else []
    weight_map = json.loads(chosen.read_text(encoding="utf-8"))["weight_map"]
    return [folder / name for name in dict.fromkeys(weight_map.values())]


def warn_of_others(folder: Path) -> None:
    """Name the weights in a folder that are not read, in a warning."""
    files = safetensors_files(folder)
    others = _other_weights(folder, files) if files else []
    if others:
        warnings.warn(
            f"the weights of {folder} are read from {files[0].name}"
            f"{f' and {len(files) - 1} more' if len(files) > 1 else ''}, as transformers does; "
            f"{', '.join(others)} left aside",
            UserWarning,
            stacklevel=3,
        )


def _chosen_weights(folder: Path) -> Path | None:
    """The safetensors file or index that ``from_pretrained`` reads.

    As ``transformers.modeling_utils._get_resolved_checkpoint_files`` chooses.
    """
    named = read_config_file(folder).get("transformers_weights")
    if named:
        path = folder / str(named)
        known = path.name.endswith((".safetensors", _INDEX.partition(".")[2]))
        if not (known and path.parent == folder and path.is_file()):
            raise CheckpointError(
                f"{folder / 'config.json'} says transformers_weights {named!r}, which is no "
                "safetensors file or index in the folder",
                "Download the checkpoint again.",
            )
        return path
    paths = (folder / "model.safetensors", folder / _INDEX)
    return next((path for path in paths if path.is_file()), None)


def _other_weights(folder: Path, files: list[Path]) -> list[str]:
    """Files and folders of weights besides these ``files``; an adapter's do not count."""
    names = [path.name for path in folder.glob("*.safetensors") if path not in files]
    if (folder / _INDEX).is_file() and folder / "model.safetensors" in files:
        names.append(_INDEX)
    if (folder / "original").is_dir():
        names.append("original/")
    return sorted(name for name in names if not name.startswith("adapter_"))


def _check_shards(folder: Path, index: Path) -> None:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str]] = {}
        for tensor, shard in weight_map.items():
            if Path(shard).name != shard:
                raise ValueError(f"{shard!r} is not a file name")
            shards.setdefault(shard, []).append(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is damaged ({first_line(error)})", "Download the checkpoint again."
        ) from error
    for shard, tensors in shards.items():
        path = folder / shard
        if not path.is_file():
            raise CheckpointError(
                f"the shard {path} is missing; {_INDEX} says it holds {tensors[0]}",
                "Download the checkpoint again.",
            )
        held = _header(path)
        absent = next((tensor for tensor in tensors if tensor not in held), None)
        if absent is not None:
            raise CheckpointError(
                f"{_INDEX} says that {absent} is in {shard}, but it is not",
                "Download the checkpoint again.",
            )
    for shard in shards:
        held = _header(folder / shard)
        twice = next((name for name in held if weight_map.get(name, shard) != shard), None)
        if twice is not None:
            raise CheckpointError(
                f"{_INDEX} says that {twice} is in {weight_map[twice]}, but {folder / shard} holds "
                "it too",
                "Download the checkpoint again.",
            )


def file_of_tensor(folder: Path, tensor: str) -> Path:
    """The weights file that holds a tensor, or the end of whose name one has; else the folder."""
    paths = safetensors_files(folder)
    for ending in (tensor, tensor.partition(".")[2] or tensor):
        for path in paths:
            if any(key.endswith(ending) for key in read_header(path)):
                return path
    return folder


def _header(path: Path) -> set[str]:
    try:
        if not path.is_file():
            raise ValueError("it is no regular file")
        return set(read_header(path))
    except (OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged: {first_line(error)}", "Download the checkpoint again."
        ) from error


def checkpoint_identity(folder: Path) -> str:
    """A hash that changes when the checkpoint does.

    It covers the small JSON files' bytes, and of the weight files the name, size, time of change,
    header and the two ends of each tensor: not all their data, which would take as long as copying
    them. Folders in it may hold modules that belong to the model: their JSON and safetensors count,
    except those of exports and of hidden folders, such as one that an export is being written to.
    """
    digest = hashlib.sha256()
    inner = sorted(
        path
        for kind in ("[!.]*/*.json", "[!.]*/*.safetensors")
        for path in folder.glob(kind)
        if not (path.parent / "export.json").exists()
    )
    for path in [*sorted(folder.iterdir()), *inner]:
        if not path.is_file():
            continue
        if path.parent != folder:
            digest.update(path.parent.name.encode() + b"\0")
        if path.suffix in {".json", ".py", ".jinja"}:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        elif path.suffix in _WEIGHTS:
            status = path.stat()
            digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
            _sample(path, digest)
    return digest.hexdigest()


def identity_as(folder: Path, loaded_as: str, adapters: Iterable[tuple[Path, float]] = ()) -> str:
    """The identity of a checkpoint as it is loaded.

    Args:
        folder: The checkpoint.
        loaded_as: The class it is loaded as (`transformers_model.class_named`).
        adapters: Folder and weight of each adapter that it is merged with.
    """
    text = f"{checkpoint_identity(folder)}\0{loaded_as}"
    for place, weight in adapters:
        text += f"\0{checkpoint_identity(place)}\0{weight!r}"
    return hashlib.sha256(text.encode()).hexdigest()


def check_identity(
    folder: Path, loaded_as: str, identity: str, adapters: Iterable[tuple[Path, float]] = ()
) -> None:
    """Compare the identity of a checkpoint with the one that it had before it was read.

    Raises:
        CheckpointError: The files have changed in between, or are gone.
    """
    try:
        unchanged = identity_as(folder, loaded_as, adapters) == identity
    except (OSError, ValueError):
        unchanged = False
    if not unchanged:
        raise CheckpointError(
            f"the files of {folder} have changed since the model was loaded",
            "Load it again, and let nothing write to the folder meanwhile.",
        )


def _sample(path: Path, digest: hashlib._Hash) -> None:
    """Take in the header of a weights file, and the two ends of each of its tensors."""
    with path.open("rb") as file:
        if path.suffix != ".safetensors":
            digest.update(file.read(_SAMPLE))
            return
        places = sorted(read_header(path).items(), key=lambda item: item[1].offset)
        for name, place in places:
            digest.update(f"{name}\0{place}".encode())
            for offset in (place.offset, place.offset + max(0, place.length - _SAMPLE)):
                file.seek(offset)
                digest.update(file.read(min(_SAMPLE, place.length)))
