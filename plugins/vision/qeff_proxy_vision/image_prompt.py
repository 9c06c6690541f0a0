"""Insert image features into the inputs of the language model, on the host.

An `ImageSettings`, stored in the export, describes where a family's features go. At each step an
`ImagePrompt` computes the body's inputs from it: it runs the vision part once and finds the
positions of the images in the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from qeff_proxy.arrays import Array, numpy_dtype
from qeff_proxy.common.messages import an, counted
from qeff_proxy.errors import UsageError
from qeff_proxy.flows.attention_masks import build_mask
from qeff_proxy.session.part_like import PartLike

from qeff_proxy_vision.image_settings import ImageSettings, Merge
from qeff_proxy_vision.positions import Positions

__all__ = ["ImagePrompt", "Prompts"]

RunVision = Callable[[Mapping[str, Array]], Mapping[str, Array]]


class Prompts:
    """Images and sounds of the same prompts: a `qeff_proxy.flows.causal_engine.Supplier`.

    Args:
        kinds: What each kind supplies.
    """

    def __init__(self, kinds: Sequence[ImagePrompt]) -> None:
        self.kinds = kinds

    def supply(
        self, part: PartLike, known: Mapping[str, Array], padding: Array
    ) -> dict[str, Array]:
        """The inputs of all kinds; features of one are put among those of the ones before."""
        given: dict[str, Array] = {}
        for kind in self.kinds:
            given.update(kind.supply(part, {**known, **given}, padding))
        return given

    def chunk_end(self, start: int, stop: int) -> int:
        """The first position from ``stop`` on that splits nothing of any kind."""
        while (end := max(kind.chunk_end(start, stop) for kind in self.kinds)) > stop:
            stop = end
        return stop


class ImagePrompt:
    """The images of a batch of prompts, as `CausalEngine` asks for them at each step.

    Sounds are treated like images.

    Args:
        settings: How the family uses images.
        tensors: The output of ``preprocess``: ``input_ids [batch, length]`` int64, and the inputs
            of the vision part.
        vision: The part that takes the pixels.
        run_vision: Runs that part, if it is a part of its own. It is called once, before the first
            step, and only if the prompt has an image.

    Raises:
        UsageError: The prompt has an image token and no image, or an image and no image token.
    """

    def __init__(
        self,
        settings: ImageSettings,
        tensors: Mapping[str, Array],
        vision: PartLike,
        run_vision: RunVision | None,
    ) -> None:
        self.settings = settings
        self._tensors = tensors
        names = settings.inputs
        self._pixels = [spec for spec in vision.inputs if not names or spec.name in names]
        self._run_vision = run_vision
        if "input_ids" not in tensors:
            raise UsageError("there are no input_ids", "Pass the processor's output, or prompts.")
        self._ids = tensors["input_ids"]
        self._has_images = self._pixels[0].name in tensors
        self._blocks = settings.blocks.of_prompt(tensors) if settings.blocks else None
        self._features: dict[str, Array] | None = None
        self._feeds: dict[str, Array] | None = None
        self._images: list[Array] = []
        self._rows = np.full(self._ids.shape, -1, np.int64)
        marked, what = self._marked(), settings.what
        if marked is not None and marked.any() and not self._has_images:
            raise UsageError(
                f"the prompt has {counted(int(marked.sum()), f'{what} token')}, "
                f"and there is no {what}",
                f"Pass {an(what)} for each {what} token, or remove the token from the prompt.",
            )
        if marked is not None and self._has_images and not marked.any():
            raise UsageError(
                f"there are {what}s, and the prompt has no {what} token",
                f"Put the processor's {what} token where each {what} belongs.",
            )

    def check_places(self) -> None:
        """See that images have the tower's size, and as many tokens as rows, without running it.

        Raises:
            UsageError: Says what does not fit.
        """
        for spec in self._pixels:
            shape = self._tensors[spec.name].shape if spec.name in self._tensors else ()
            axes = [axis for axis in spec.shape[1:] if isinstance(axis, int)]
            given = shape[len(shape) - len(spec.shape) + 1 :]
            if len(axes) == len(given) and tuple(axes) != given:
                raise UsageError(
                    f"{spec.name} has shape {list(shape)}, and the tower takes {list(spec.shape)}"
                )
        self._arranged()

    def supply(
        self, part: PartLike, known: Mapping[str, Array], padding: Array
    ) -> dict[str, Array]:
        """A part's inputs that come from images (`qeff_proxy.flows.causal_engine.Supplier`)."""
        ids = known["input_ids"]
        past = padding.shape[1] - ids.shape[1]
        names = {spec.name for spec in part.inputs}
        given: dict[str, Array] = {}
        limit = self.settings.table_rows
        if "input_ids" in names and limit is not None:
            given["input_ids"] = np.where(ids >= limit, 0, ids)
        if "input_ids" in names and self.settings.looked_up_as:
            given["input_ids"] = given.get("input_ids", ids).copy()
            for token, other in self.settings.looked_up_as.items():
                given["input_ids"][ids == token] = other
        here = [merge for merge in self.settings.merges if merge.into in names]
        if self.settings.inputs:
            if self.settings.inputs[0] in names:
                given.update(self._one_graph(past, ids.shape))
        elif here:
            rows = self._window(self._arranged(), past, ids.shape)
            for merge in here:
                target = given.get(merge.into, known.get(merge.into))
                given[merge.into] = self._merged(merge, part, target, rows)
        if self.settings.rows in names and self.settings.features:
            given.update(self._to_merge(part, past, ids.shape))
        if self.settings.positions is not None and "position_ids" in names:
            given["position_ids"] = self._positions(self.settings.positions, past, ids.shape)
        if self._blocks is not None and past < self._ids.shape[1]:
            given.update(self._masks(part, padding, ids.shape))
        return given

    def chunk_end(self, start: int, stop: int) -> int:  # noqa: ARG002 (the protocol's)
        """The first position from ``stop`` on that splits no block of an image's tokens."""
        together = self._blocks
        if self.settings.inputs and self._has_images:
            # One graph: each chunk with images would run the tower again.
            together = np.where(self._arranged() >= 0, 0, -1)
        if together is None:
            return stop
        while True:
            end = stop
            for row in together:
                parted = np.isin(row[stop:], row[:stop][row[:stop] >= 0])
                if parted.any():
                    end = max(end, stop + int(np.flatnonzero(parted)[-1]) + 1)
            if end == stop:
                return stop
            stop = end

    def _marked(self) -> Array | None:
        """The positions of the image token: ``[batch, length]`` bool."""
        if self.settings.token_id is None:
            return None
        marked: Array = self._ids == self.settings.token_id
        return marked

    def _arranged(self) -> Array:
        """The row of features at each position, -1 for none; runs the vision part first."""
        if self._feeds is not None or not self._has_images:
            return self._rows
        self._feeds = self._make_feeds()
        if self.settings.index is not None:
            self._place_by_index(self._tensors[self.settings.index])
        elif self.settings.what == "image":
            self._place_by_token()
        if self._run_vision is not None and not self.settings.inputs:
            runs = [self._run_vision(feeds) for feeds in self._runs()]
            self._features = {
                name: np.concatenate([run[name].reshape(-1, run[name].shape[-1]) for run in runs])
                for name in runs[0]
            }
        if self.settings.what == "sound":
            self._place_by_token()
        return self._rows

    def _runs(self) -> list[dict[str, Array]]:
        """The inputs of each run of the vision part: one for all images, or one for each."""
        assert self._feeds is not None  # noqa: S101 (made before)
        if self.settings.geometry is None:
            return [self._feeds]
        return [{self._pixels[0].name: image} for image in self._images]

    def _positions(self, numbering: Positions, past: int, shape: tuple[int, ...]) -> Array:
        """Positions of the columns from ``past`` on; rows are repeated for beams."""
        padding = self._tensors.get("attention_mask", np.ones_like(self._ids))
        marked = self._marked() if self._has_images else None
        marked = np.zeros_like(self._ids, dtype=bool) if marked is None else marked
        prompt, after = numbering.of_prompt(padding, marked)
        new = max(0, past + shape[1] - prompt.shape[2])
        later = after[:, :, None] + np.arange(new)
        columns = np.concatenate([prompt, later], axis=2)[:, :, past : past + shape[1]]
        return numbering.shaped(np.repeat(columns, shape[0] // prompt.shape[1], axis=1))

    def _place_by_token(self) -> None:
        """Assign the feature rows to the image tokens in order."""
        marked = self._marked()
        assert marked is not None  # noqa: S101 (a family says token_id or index)
        order, what = self._order(), self.settings.what
        if int(marked.sum()) != order.size:
            raise UsageError(
                f"the prompt has {counted(int(marked.sum()), f'{what} token')}, and its {what}s "
                f"need {order.size}",
                f"Let the checkpoint's processor create the prompt, with {an(what)} for each "
                "token.",
            )
        self._rows[marked] = order

    def _order(self) -> Array:
        """The feature rows, in the order of the image tokens."""
        assert self._feeds is not None  # noqa: S101 (made before)
        if self.settings.what == "sound":
            return self._order_of_sounds()
        if self.settings.grid is not None:
            return self.settings.grid.order(self._tensors["image_sizes"])
        if self.settings.skip_negative is not None:
            return np.arange(self._feeds[self.settings.skip_negative].shape[0])
        if self.settings.geometry is not None:
            return np.arange(len(self._images) * self.settings.geometry.rows)
        tiles = self._feeds[self._pixels[0].name].shape[0]
        return np.arange(tiles * (self.settings.rows_per_tile or 1))

    def _order_of_sounds(self) -> Array:
        """The feature rows that count."""
        assert self._features is not None  # noqa: S101 (a tower of sounds is a part of its own)
        marked = np.pad((self._ids == self.settings.token_id).astype(np.int64), ((0, 0), (1, 0)))
        runs, given = int((np.diff(marked) == 1).sum()), len(self._tensors[self._pixels[0].name])
        if self.settings.apart and runs != given:
            raise UsageError(
                f"the prompt has {counted(runs, 'run')} of sound tokens, and there are {given} "
                "windows of sounds",
                "Give sounds of one window (30 s), and put text between two of them.",
            )
        rows = len(self._features[str(self.settings.merges[0].features)])
        name = self.settings.counted
        counts = {**self._tensors, **self._features}.get(name) if name is not None else None
        if counts is None:
            return np.arange(rows)
        if counts.size != rows:
            raise UsageError(
                f"{name} has shape {list(counts.shape)}, and the sounds have {rows} rows",
                "Let the checkpoint's processor create the tensors.",
            )
        return np.flatnonzero(counts.reshape(-1))

    def _one_graph(self, past: int, shape: tuple[int, ...]) -> dict[str, Array]:
        """The pixels, empty in steps without images, and each position's feature row."""
        rows = self._window(self._arranged(), past, shape)
        if self._feeds is not None and (rows >= 0).any():
            return {self.settings.rows: rows, **self._feeds}
        nothing = {
            spec.name: np.zeros(
                [axis if isinstance(axis, int) else 0 for axis in spec.shape],
                numpy_dtype(spec.dtype),
            )
            for spec in self._pixels
        }
        return {self.settings.rows: rows, **nothing}

    def _to_merge(self, part: PartLike, past: int, shape: tuple[int, ...]) -> dict[str, Array]:
        """The features, none in steps without images, and each position's feature row."""
        rows = self._window(self._arranged(), past, shape)
        if self._features is not None and (rows >= 0).any():
            features = {name: self._features[name] for name in self.settings.features}
            return {self.settings.rows: rows, **features}
        nothing = {
            spec.name: np.zeros((0, int(spec.shape[-1])), numpy_dtype(spec.dtype))
            for spec in part.inputs
            if spec.name in self.settings.features
        }
        return {self.settings.rows: rows, **nothing}

    def _place_by_index(self, index: Array) -> None:
        """Assign feature rows by ``index [batch, …]``, the position of each within its prompt."""
        flat = index.reshape(index.shape[0], -1)
        feature_rows = np.arange(flat.size).reshape(flat.shape)
        batch, column = np.nonzero(flat >= 0)
        self._rows[batch, flat[batch, column]] = feature_rows[batch, column]

    def _make_feeds(self) -> dict[str, Array]:
        feeds: dict[str, Array] = {}
        for spec in self._pixels:
            if spec.name not in self._tensors:
                raise UsageError(
                    f"{self.settings.what}s need the tensor {spec.name!r}, which is missing",
                    "Let the checkpoint's processor create the tensors.",
                )
            value = self._tensors[spec.name]
            if self.settings.what == "sound":
                value = _padded(spec.shape, value) if self.settings.pads else value
                _check_sound(spec.name, spec.shape, value)
            if self.settings.geometry is not None:
                self._images = self.settings.geometry.images(spec, self._tensors)
                continue
            if self.settings.grid is not None and value.ndim > len(spec.shape):
                value = self.settings.grid.tiles(value, self._tensors["image_sizes"])
            if spec.name == self.settings.skip_negative:
                value = value[(value >= 0).any(axis=-1)]
            value = np.asarray(value)
            if value.ndim == len(spec.shape) + 1 and value.ndim > 1:
                value = value.reshape(-1, *value.shape[2:])
            feeds[spec.name] = np.ascontiguousarray(value, dtype=numpy_dtype(spec.dtype))
        return feeds

    def _window(self, prompt: Array, past: int, shape: tuple[int, ...]) -> Array:
        """Columns of the prompt from ``past`` on, -1 after its end; rows are repeated for beams."""
        rows = np.full((prompt.shape[0], shape[1]), -1, np.int64)
        piece = prompt[:, past : past + shape[1]]
        rows[:, : piece.shape[1]] = piece
        return np.repeat(rows, shape[0] // rows.shape[0], axis=0)

    def _merged(self, merge: Merge, part: PartLike, target: Array | None, rows: Array) -> Array:
        if target is None:
            spec = next(spec for spec in part.inputs if spec.name == merge.into)
            target = np.zeros((*rows.shape, int(spec.shape[-1])), numpy_dtype(spec.dtype))
        chosen = rows >= 0
        if self._features is None or not chosen.any():
            return target
        result = target.copy()
        if merge.features is None:
            result[chosen] = 0
        elif merge.how == "add":
            result[chosen] += self._features[merge.features][rows[chosen]]
        else:
            result[chosen] = self._features[merge.features][rows[chosen]]
        return result

    def _masks(self, part: PartLike, padding: Array, shape: tuple[int, ...]) -> dict[str, Array]:
        settings = self.settings.blocks
        assert self._blocks is not None  # noqa: S101 (the caller looked)
        assert settings is not None  # noqa: S101 (blocks come from it)
        blocks = self._window(self._blocks, 0, (shape[0], padding.shape[1]))
        dtypes = {spec.name: numpy_dtype(spec.dtype) for spec in part.inputs}
        return {
            mask.name: build_mask(mask, padding, shape[1], dtypes[mask.name], blocks)
            for mask in part.masks
            if mask.name in dtypes and (settings.masks is None or mask.name in settings.masks)
        }


def _padded(shape: Sequence[int | str], value: Array) -> Array:
    """Sounds, or their masks, with zeros behind them up to the number of frames of a tower."""
    if value.ndim != len(shape) or not value.size:
        return value
    axes = zip(value.shape, shape, strict=True)
    missing = [max(0, axis - size) if isinstance(axis, int) else 0 for size, axis in axes]
    return np.pad(value, [(0, count) for count in missing])


def _check_sound(name: str, shape: Sequence[int | str], value: Array) -> None:
    """Refuse sounds of another shape than the tower takes, empty ones, and numbers that are none.

    Raises:
        UsageError: Says what is wrong.
    """
    axes = zip(value.shape[1:], shape[1:], strict=True)  # the first counts sounds
    fits = value.ndim == len(shape) and all(
        size == axis or not isinstance(axis, int) for size, axis in axes
    )
    if not fits or not value.size:
        raise UsageError(
            f"{name} has shape {list(value.shape)}, and the export takes {list(shape)}",
            "Let the checkpoint's processor create it; a number of frames that is fixed can be set "
            "with -C audio_frames=N.",
        )
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise UsageError(f"{name} has NaN or infinite elements", "Repair the sound.")
