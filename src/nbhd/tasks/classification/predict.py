"""Classify pictures: decoding in threads, the model on batches, the answers in the order of the pictures.

    sources ──> threads: decode, resize, normalise ──> window of prepared pictures ──> batch ──> model ──> answers, in
    order

The window is bounded, so memory does not grow with the number of pictures.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from nbhd.errors import ArgumentError, NbhdError
from nbhd.tasks.checkpoints import check_has_labels, device_for, load_classifier
from nbhd.tasks.classification.results import Classification, Score
from nbhd.tasks.images import ImageError, decode_image
from nbhd.tasks.inputs import Input

#: What can be classified: a file, the bytes of one, a picture, or an input found by ``find_inputs``.
Source: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | Input"

#: Pictures in a batch unless told otherwise.
BATCH_SIZE = {"cpu": 16}
BATCH_SIZE_ELSEWHERE = 64

#: Pictures are decoded no smaller than this many times what the model looks at, as Pillow's thumbnails are by default
#: (``reducing_gap``). Probabilities change by less than 1e-4 (a 12 megapixel JPEG, against decoding it in full).
OVERSAMPLING = 2

#: Why a picture has no labels though it could be read.
NO_ANSWER = "the model's answer is not a number (overflow in its dtype, or bad weights)"

#: Longest side in short sides that a resize to a shortest edge may see; a 1 x 60000 strip would become 256 x 15
#: million.
MAX_ASPECT = 8


class Classifier:
    """An image classifier: a checkpoint, its image processing, its labels.

    Args:
        model: a folder, a file that ``nbhd export`` wrote, a Hugging Face hub id, or None for the checkpoint that comes
            with nbhd.
        device: such as ``"cpu"``, ``"cuda:1"``, ``"mps"``; None takes the best one here. Exported files run on the CPU.

    Raises:
        CheckpointError: the model cannot be loaded.
        ArgumentError: there is no such device, or the model is a regressor, which has no labels.

    Example:
        >>> from nbhd.tasks.classification import Classifier
        >>> classifier = Classifier()
        >>> classifier.predict(["church.jpg"], top_k=1)[0].predictions[0].label  # doctest: +SKIP
        'church'
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, device: str | torch.device | None = None) -> None:
        self.device = device_for(model, device)
        loaded = load_classifier(model, self.device)
        check_has_labels(loaded)
        self.model = loaded.model
        self.processor = loaded.processor
        self.source = loaded.source
        self.runtime = loaded.runtime
        config = self.model.config
        self.labels = [str(config.id2label.get(i, i)) for i in range(config.num_labels)]
        self.multi_label = loaded.is_multi_label
        self._min_size = _smallest_useful(self.processor)

    def predict(
        self,
        images: Source | Iterable[Source],
        top_k: int = 5,
        batch_size: int | None = None,
        workers: int | None = None,
    ) -> list[Classification]:
        """Classify pictures.

        Args:
            images: paths of files, bytes, or PIL images; one of them or any iterable.
            top_k: how many labels to give, at least 1; more than there are classes gives them all.
            batch_size: pictures the model sees at once; by default 16 on a CPU and 64 elsewhere.
            workers: threads that decode; by default one for each CPU, at most 8.

        Returns:
            One ``Classification`` for each picture, in their order. A picture that cannot be read has an ``error``.

        Raises:
            ArgumentError: ``top_k``, ``batch_size`` or ``workers`` is less than 1.
        """
        return list(self.stream(images, top_k, batch_size, workers))

    def stream(
        self,
        images: Source | Iterable[Source],
        top_k: int = 5,
        batch_size: int | None = None,
        workers: int | None = None,
    ) -> Iterator[Classification]:
        """``predict`` as an iterator that holds a bounded number of pictures, for any number of them."""
        if batch_size is None:
            batch_size = BATCH_SIZE.get(self.device.type, BATCH_SIZE_ELSEWHERE)
        if workers is None:
            workers = min(8, os.cpu_count() or 1)
        for name, value in (("top_k", top_k), ("batch_size", batch_size), ("workers", workers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if isinstance(images, (str, bytes, os.PathLike, Image.Image, Input)):
            images = [images]
        return self._stream(images, top_k, batch_size, workers)

    def _stream(self, images: Iterable[Source], top_k: int, batch_size: int, workers: int) -> Iterator[Classification]:
        batch: list[tuple[str | None, Tensor | str]] = []
        ready = 0
        for path, prepared in self._prepare_ahead(images, workers, window=2 * batch_size + workers):
            batch.append((path, prepared))
            ready += isinstance(prepared, Tensor)
            # Errors alone must not pile up without bound either.
            if ready == batch_size or len(batch) >= 4 * batch_size:
                yield from self._classify(batch, top_k)
                batch, ready = [], 0
        yield from self._classify(batch, top_k)

    def _prepare_ahead(
        self, images: Iterable[Source], workers: int, window: int
    ) -> Iterator[tuple[str | None, Tensor | str]]:
        """Each picture as the model's input, or why not, in order, at most ``window`` ahead of the reader."""
        pending: deque[tuple[str | None, Future[Tensor | str]]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="nbhd-decode")
        try:
            for source in images:
                pending.append((_path(source), pool.submit(self._prepare, source)))
                if len(pending) >= window:
                    path, future = pending.popleft()
                    yield path, future.result()
            while pending:
                path, future = pending.popleft()
                yield path, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, source: Source) -> Tensor | str:
        """``[channels, height, width]`` as the model wants it, or why there is none."""
        try:
            if isinstance(source, Input):
                if source.error is not None:
                    return source.error
                source = source.path
            image = source.convert("RGB") if isinstance(source, Image.Image) else decode_image(source, self._min_size)
            return to_pixels(self.processor, image)
        except ImageError as error:
            return error.reason

    def _classify(self, batch: list[tuple[str | None, Tensor | str]], top_k: int) -> Iterator[Classification]:
        answers: dict[int, tuple[Score, ...] | None] = {}
        for members in of_one_shape([prepared for _, prepared in batch]):
            answers.update(zip(members, self._scores([batch[i][1] for i in members], top_k), strict=True))
        for i, (path, prepared) in enumerate(batch):
            if isinstance(prepared, str):
                yield Classification(path, error=prepared)
            elif (scores := answers[i]) is None:
                yield Classification(path, error=NO_ANSWER)
            else:
                yield Classification(path, scores)

    @torch.inference_mode()
    def _scores(self, pictures: list[Any], top_k: int) -> list[tuple[Score, ...] | None]:
        """The best labels of each picture, or None where the model's answer is not finite."""
        logits = answer(self.model, pictures)
        probabilities = logits.sigmoid() if self.multi_label else logits.softmax(-1)
        best = probabilities.topk(min(top_k, len(self.labels)))
        return [
            tuple(Score(self.labels[i], p) for p, i in zip(values, indices, strict=True)) if finite else None
            for values, indices, finite in zip(
                best.values.tolist(), best.indices.tolist(), probabilities.isfinite().all(-1).tolist(), strict=True
            )
        ]


def to_pixels(processor: Any, image: Image.Image) -> Tensor:
    """``[channels, height, width]`` as the model wants it; raises `ImageError` if there is no memory for it."""
    try:
        if _keeps_aspect(processor):
            image = without_long_ends(image)
        pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    except MemoryError as error:
        raise ImageError("not enough memory to prepare it") from error
    return pixels


def of_one_shape(prepared: Sequence[Tensor | str]) -> Iterable[list[int]]:
    """The places of the tensors, those of one shape together.

    Processors that do not fix the size give pictures that cannot share a batch.
    """
    groups: dict[torch.Size, list[int]] = {}
    for i, item in enumerate(prepared):
        if isinstance(item, Tensor):
            groups.setdefault(item.shape, []).append(i)
    return groups.values()


def answer(network: Any, pictures: list[Any]) -> Tensor:
    """The logits ``[pictures, labels]`` of pictures of one shape, float32 on the CPU."""
    try:
        with torch.inference_mode():
            pixels = torch.stack(pictures).to(network.device, network.dtype)
            logits: Tensor = network(pixel_values=pixels).logits.float().cpu()
    except torch.OutOfMemoryError as error:
        raise NbhdError(
            f"out of memory on {network.device} with {len(pictures)} pictures in a batch. Use a smaller batch_size"
            " (--batch-size)."
        ) from error
    return logits


def _path(source: Source) -> str | None:
    if isinstance(source, Input):
        return source.path
    return None if isinstance(source, (bytes, Image.Image)) else os.fspath(source)


def _smallest_useful(processor: Any) -> int | None:
    """Shorter side below which decoding smaller would show in the result, or None if the processor does not say."""
    size = _sides(getattr(processor, "size", None))
    if not getattr(processor, "do_resize", False) or not size:
        return None
    return OVERSAMPLING * max(size)


def _keeps_aspect(processor: Any) -> bool:
    size = getattr(processor, "size", None)
    return bool(getattr(processor, "do_resize", False) and size and size.get("shortest_edge"))


def _sides(size: Any) -> list[int]:
    return [side for name in ("shortest_edge", "height", "width") if size and (side := size.get(name))]


def without_long_ends(image: Image.Image) -> Image.Image:
    """The middle of a strip longer than ``MAX_ASPECT`` of its short sides; a centre crop sees no more of it."""
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))
