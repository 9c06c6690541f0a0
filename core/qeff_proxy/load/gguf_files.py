"""GGUF files: a folder of their config and tokenizer, and weights dequantized when they are read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. transformers knows what the names
and the metadata of a file mean, package ``gguf`` how its blocks are read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from importlib_metadata import version

from qeff_proxy.artifact.export_folder import cache_home
from qeff_proxy.common.atomic_folder import locked, staged_folder
from qeff_proxy.common.messages import first_line
from qeff_proxy.common.private_names import GGUF, GGUF_BLOCKS, find, model_classes
from qeff_proxy.common.quiet import quiet_loading
from qeff_proxy.errors import CheckpointError
from qeff_proxy.load.checkpoint_files import GGUF_LINK, has_weights
from qeff_proxy.load.safetensors_header import StoredTensor

#: What a config calls tokens, and a file.
_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}
_LINKS = "weights-{:05}.gguf"  # to further files of a model
#: What the names of a model's pieces differ in.
_PIECE = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)")
#: Dtypes that a file holds as they are, by their names in ``gguf``.
_PLAIN = {"F64", "F32", "F16", "BF16"}


def gguf_file_of(path: Path) -> Path | None:
    """The GGUF file that a user named, or the only one in a folder without other weights.

    Raises:
        CheckpointError: There are several.
    """
    if path.is_file() and path.suffix == ".gguf":
        return path
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not files or (path / GGUF_LINK).is_symlink() or has_weights(path):
        return None
    names = {_PIECE.sub("", file.name) for file in files}
    if len(names) > 1:
        raise CheckpointError(
            f"{path} holds several GGUF files ({', '.join(file.name for file in files)})",
            "Name one of them.",
        )
    return files[0]


def unpack_gguf(file: Path) -> Path:
    """The folder of a checkpoint whose weights are in a GGUF file.

    It holds what a file's metadata say, as ``config.json`` and files of a tokenizer, and a link to
    the file. It is below `cache_home`, and made once for each file.

    Raises:
        CheckpointError: The file is damaged, a piece of a file, of an architecture that
            transformers does not read, or package ``gguf`` is missing.
    """
    files = _pieces_of(file.absolute())
    file, status = files[0], [one.stat() for one in files]
    times = [(one.st_size, one.st_mtime_ns) for one in status]
    made_of = (str(file), times, version("transformers"))
    digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    target = cache_home() / "gguf" / f"{file.stem}-{digest}"
    with locked(target, lambda _: None, what="config"):
        if not (target / "config.json").is_file():
            with staged_folder(target, "config.json") as folder:
                _write_folder(folder, files)
    return target


def _pieces_of(file: Path) -> list[Path]:
    """The files of a model of which one is named, in order; the first has the metadata.

    Raises:
        CheckpointError: One is missing, or the file is a piece without the name of one.
    """
    name = _PIECE.search(file.name)
    if name is None:
        count = _read(file).fields.get("split.count")
        if count is not None and count.contents() > 1:
            raise CheckpointError(
                f"{file} is one of {count.contents()} pieces of a model, by another name",
                f"Name the pieces as they were published: …-00001-of-{count.contents():05}.gguf.",
            )
        return [file]
    numbers = range(1, int(name[2]) + 1)
    files = [file.with_name(_PIECE.sub(f"-{n:05}-of-{name[2]}", file.name)) for n in numbers]
    for piece in files:
        if not piece.is_file():
            raise CheckpointError(
                f"{piece} is missing, a piece of the model", "Download all of its files."
            )
    return files


def _write_folder(folder: Path, files: Sequence[Path]) -> None:
    file = files[0]
    fields = _read(file).fields
    from transformers import AutoConfig, AutoTokenizer

    try:
        with quiet_loading():
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
            if not config.architectures:
                kind = model_classes("AutoModelForCausalLM").get(type(config), None)
                config.architectures = None if kind is None else [kind.__name__]
            for name, field in _TOKENS.items():
                if f"tokenizer.ggml.{field}" in fields:
                    setattr(config, name, fields[f"tokenizer.ggml.{field}"].contents())
            if any(t.name == "output.weight" for one in files[1:] for t in _read(one).tensors):
                config.tie_word_embeddings = False  # of which the first file knows nothing
            if "tokenizer.ggml.model" in fields:
                tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
                tokenizer.save_pretrained(folder)
            config.save_pretrained(folder)
    except CheckpointError:
        raise
    except Exception as error:  # its readers check nothing
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(
            f"{file} cannot be read by transformers ({reason})",
            "Name the checkpoint that it was made from, as safetensors.",
        ) from error
    for number, piece in enumerate(files):
        (folder / (_LINKS.format(number) if number else GGUF_LINK)).symlink_to(piece)


def _read(file: Path) -> Any:
    """A reader of the file's metadata.

    Raises:
        CheckpointError: The file is damaged, or package ``gguf`` is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            f"{file} is a GGUF file, which is read by package gguf",
            "Install it: pip install 'qeff-proxy[gguf]'.",
        )
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except Exception as error:  # the reader checks little, and fails in many ways
        raise CheckpointError(
            f"{file} is damaged: {first_line(error) or type(error).__name__}",
            "Download it again.",
        ) from error


def gguf_weights(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights in a GGUF file, by their names in the model.

    As ``transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint`` names and changes them.

    Args:
        folder: As `unpack_gguf` gives it.
        config: Its ``config.json``.

    Returns:
        `qeff_proxy.load.weight_sources.Weight` by name; nothing where transformers makes weights
        of several tensors, so that it must load the file whole.

    Raises:
        CheckpointError: The file is damaged, or a tensor is of a type that ``gguf`` does not read.
    """
    import numpy as np

    from qeff_proxy.load.transformers_model import model_on_meta

    names, newer = find(GGUF), find(GGUF_BLOCKS)
    links = (folder / GGUF_LINK, *sorted(folder.glob(_LINKS.format(0).replace("00000", "*"))))
    files = [link.readlink() for link in links]
    readers = [_read(file) for file in files]
    file, fields = files[0], readers[0].fields
    architecture = fields["general.architecture"].contents()
    if names is None or (newer is not None and newer.is_supported(architecture)):
        return _whole(files)
    model = model_on_meta(folder, dict(config), None, trust_remote_code=False)
    kind = names.processors.get(architecture, names.processor)
    processor = kind(config=model.config.to_dict())
    try:
        keys: dict[str, str] = names.weights_map(model, processor)
    except NotImplementedError:
        return _whole(files)  # transformers says so itself, when it loads the file
    weights: dict[str, Any] = {}
    unread = {key for key, field in fields.items() if _scales_positions(key, field)}
    held = (
        (one, tensor)
        for one, reader in zip(files, readers, strict=True)
        for tensor in reader.tensors
    )
    for path, tensor in held:
        # A view of a single zero: shows what the processor does, at no cost.
        zeros = np.broadcast_to(np.float32(0), tuple(map(int, reversed(tensor.shape))))
        about = {"tensor_key_mapping": keys, "parsed_parameters": {"tensors": {}}}
        processed = processor.process(weights=zeros, name=tensor.name, **about)
        key = keys.get(tensor.name)
        if processed.name != tensor.name or key in weights:
            return _whole(files)
        if key is None:
            unread.add(tensor.name)
            continue
        changed = None if processed.weights is zeros else processor
        weights[key] = _weight(path, key, tensor, processed.weights.shape, changed)
    if unread:
        warnings.warn(
            f"{file} holds {', '.join(sorted(unread)[:4])}, which transformers does not read: the "
            "outputs may differ from those of programs that do",
            UserWarning,
            stacklevel=4,
        )
    return weights


def _whole(files: Sequence[Path]) -> dict[str, Any]:
    """No weights: transformers must load the file, which it does for a single one only."""
    if len(files) > 1:
        raise CheckpointError(
            f"{files[0]} is one of {len(files)} pieces, and is not read tensor by tensor",
            "Join them with ggml's gguf-split --merge.",
        )
    return {}


def _scales_positions(key: str, field: Any) -> bool:
    return key.endswith(".rope.scaling.type") and field.contents() != "none"


def _weight(file: Path, key: str, tensor: Any, made: tuple[int, ...], processor: Any) -> Any:
    """A weight of the model of shape ``made``, from a tensor that a ``processor`` may change."""
    import gguf
    import numpy as np

    from qeff_proxy.load.weight_sources import ComputedWeight, StoredWeight

    kind = tensor.tensor_type
    shape = tuple(int(axis) for axis in reversed(tensor.shape))
    place = StoredTensor("U8", (int(tensor.n_bytes),), int(tensor.data_offset), int(tensor.n_bytes))
    if kind.name in _PLAIN:
        stored = StoredTensor(kind.name, shape, place.offset, place.length)
        if processor is None:
            return StoredWeight(file, key, stored)
        pieces = (StoredWeight(file, tensor.name, stored),)
        compute = partial(_processed, tensor.name, processor)
    else:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{tensor.name} in {file} is of type {kind.name}, which package gguf does not read",
                "Name a file of another quantization.",
            ) from error
        rows = math.prod(shape[:-1])
        packed = StoredTensor("U8", (rows, shape[-1] // block * size), place.offset, place.length)
        pieces = (StoredWeight(file, tensor.name, packed),)
        compute = partial(_dequantized, tensor.name, processor, kind, shape)
    return ComputedWeight(key, "F32", tuple(made), pieces, compute)


def _dequantized(name: str, processor: Any, kind: Any, shape: tuple[int, ...], blocks: Any) -> Any:
    import gguf
    import torch

    values = gguf.dequantize(blocks.numpy(), kind).reshape(shape)
    return _processed(name, processor, torch.from_numpy(values))


def _processed(name: str, processor: Any, tensor: Any) -> Any:
    import numpy as np
    import torch

    values = tensor.float().numpy()
    if processor is not None:
        values = processor.process(weights=values, name=name).weights
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
