"""A trained classifier at work, trained or exported: `evaluate` on labelled images, `predict` on any."""

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muntin.data.datasets import Images, image_files
from muntin.data.decode import Picture, read_image
from muntin.data.images import BadImage
from muntin.data.loading import EvaluationSet, evaluation_loader, target
from muntin.data.sources import open_part, splits_from_json
from muntin.data.transforms import CROP, IMAGENET_MEAN, IMAGENET_STD, Evaluate
from muntin.errors import UserError, nearest
from muntin.progress import progress
from muntin.run import Run, atomic_write, read_json
from muntin.tasks.multi_label_evaluation import THRESHOLD, MultiLabelEvaluation, summarise
from muntin.tasks.recipes import read_config
from muntin.tasks.trained import Source, Trained, on_device, open_any, open_trained, refuse_views
from muntin.tasks.trained_dense import TrainedDense

BINS = 15  # of the expected calibration error (Guo et al., arXiv 1706.04599)
TOP5_FROM = 10  # classes from which top-5 says anything
TOP = 5  # classes of a prediction, by default


@dataclass(frozen=True)
class Evaluation:
    """What a model does on labelled images.

    `confusion[i][j]` counts images of class i that were taken for class j. `calibration_error` is the expected
    gap between confidence and accuracy over 15 bins. Shares are 0..1.
    """

    data: str
    split: str
    images: int
    top1: float
    top5: float | None
    loss: float
    calibration_error: float
    classes: list[str]
    confusion: list[list[int]]

    @property
    def score(self) -> float:
        """What runs are compared by."""
        return self.top1

    def per_class(self) -> list[dict[str, Any]]:
        """Images, recall (correct among those of the class) and precision (among those taken for it)."""
        rows = []
        for i, name in enumerate(self.classes):
            images, taken = sum(self.confusion[i]), sum(row[i] for row in self.confusion)
            correct = self.confusion[i][i]
            rows.append(
                {
                    "class": name,
                    "images": images,
                    "correct": correct,
                    "recall": correct / images if images else None,
                    "precision": correct / taken if taken else None,
                }
            )
        return rows

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"per_class": self.per_class()}

    def __str__(self) -> str:
        top5 = f", top-5 {self.top5:.2%}" if self.top5 is not None else ""
        lines = [
            f"{self.data}, {self.split}: {self.images} images, top-1 {self.top1:.2%}{top5}, loss {self.loss:.4f}, "
            f"calibration error {self.calibration_error:.2%}",
            "",
        ]
        width = max(map(len, ("class", *self.classes)))
        lines.append(f"{'class':<{width}}  images  recall  precision  most often taken for")
        for i, row in enumerate(self.per_class()):
            wrong = sorted(
                ((n, self.classes[j]) for j, n in enumerate(self.confusion[i]) if j != i and n), reverse=True
            )
            mistaken = ", ".join(f"{name} ({n})" for n, name in wrong[:3])
            line = (
                f"{row['class']:<{width}}  {row['images']:>6}  {_share(row['recall'])}  {_share(row['precision']):>9}"
            )
            lines.append(f"{line}  {mistaken}".rstrip())
        if len(self.classes) <= 20:
            lines += ["", *_confusion_table(self.classes, self.confusion)]
        return "\n".join(lines)


def _share(value: float | None) -> str:
    return "     -" if value is None else f"{value:>6.1%}"


def _confusion_table(classes: list[str], confusion: list[list[int]]) -> list[str]:
    wide = max(len(str(max(max(row) for row in confusion))), max(map(len, classes))) + 1
    lines = ["confusion (rows: true class, columns: predicted)"]
    lines.append(" " * wide + "".join(f"{name:>{wide}}" for name in classes))
    for name, row in zip(classes, confusion, strict=True):
        lines.append(f"{name:>{wide}}" + "".join(f"{count or '.':>{wide}}" for count in row))
    return lines


def evaluate_images(
    logits: Callable[[Tensor], Tensor],
    images: Images,
    transform: Callable[[Picture], Tensor],
    data: str,
    split: str,
    batch_size: int = 64,
) -> Evaluation | MultiLabelEvaluation:
    """Run a classifier over labelled images, which have one class each, or are multi-label.

    logits: from a batch of transformed images to (B, K), both on the CPU (see `on_device`).
    Raises `UserError` naming an image that cannot be read, and where there are other logits than classes.
    """
    workers = min(os.cpu_count() or 1, 8) if len(images) > 2000 else 0
    loader = evaluation_loader(EvaluationSet(images, transform), batch_size, workers)
    found = []
    for batch, _ in progress(loader, len(loader), "evaluating"):
        found.append(logits(batch))
        if found[0].shape[1] != len(images.classes):
            raise UserError(
                f"the model has {found[0].shape[1]} classes and {data} has {len(images.classes)}; give the data that "
                "it was made for, with every class"
            )
    if images.multi_label:
        wanted = torch.stack([torch.as_tensor(target(images, i)) for i in range(len(images))])
        return summarise(torch.cat(found), wanted, images.classes, data, split)
    return _summarise(torch.cat(found), torch.tensor(images.labels), images.classes, data, split)


def _summarise(logits: Tensor, labels: Tensor, classes: list[str], data: str, split: str) -> Evaluation:
    count = len(classes)
    predicted = logits.argmax(1)
    confusion = torch.bincount(labels * count + predicted, minlength=count * count).view(count, count)
    top5 = None
    if count >= TOP5_FROM:
        top5 = float((logits.topk(5, 1).indices == labels[:, None]).any(1).double().mean())
    return Evaluation(
        data=data,
        split=split,
        images=len(labels),
        top1=float((predicted == labels).double().mean()),
        top5=top5,
        loss=float(F.cross_entropy(logits.double(), labels)),
        calibration_error=calibration_error(logits.softmax(1), labels),
        classes=classes,
        confusion=confusion.tolist(),
    )


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error: sum over bins of share * |accuracy - mean confidence|; (N, K) and (N,)."""
    confidence, predicted = probabilities.double().max(1)
    right = (predicted == labels).double()
    bins = (confidence * BINS).ceil().clamp(1, BINS).long() - 1  # bin b holds (b / 15, (b + 1) / 15]
    gaps = torch.zeros(BINS, dtype=torch.double).index_add_(0, bins, right - confidence)
    return float(gaps.abs().sum() / len(labels))


def evaluate(
    run: Source,
    data: str | None = None,
    *,
    split: str | None = None,
    model: str | None = None,
    size: int | None = None,
    batch_size: int = 64,
    **views: Any,
) -> Any:
    """Evaluate a run, its weights, an exported file in its own runtime, or a foreign checkpoint (with `model`, the
    name of what it holds). Detectors and segmenters go to `muntin.tasks.dense_runs.evaluate_dense`, which says what
    `views` there are.

    Returns an `Evaluation` or a `MultiLabelEvaluation`, or what `evaluate_dense` does.

    data: "digits", a folder (FOLDER/CLASS/*, or FOLDER/{test,val}/CLASS/* by `split`), or None for the run's own
    data, whose test split is taken, or val where there is no test split.

    Raises `UserError` for classes that the model does not know, images that cannot be read, and data of several labels
    for a model that learned one class an image, or the other way round.
    """
    if split not in (None, "train", "val", "test"):
        raise UserError(f"split {split!r} is unknown; valid are train, val and test")
    if model is not None:
        path = Path(os.fspath(run))  # type: ignore[arg-type]
        refuse_views(path, views)
        images, where, shown = _foreign_images(data, split)
        network, transform = _foreign(path, model, images.classes, size)
        return evaluate_images(network, images, transform, where, shown, batch_size)
    opened = open_any(run)
    if isinstance(opened, TrainedDense):
        from muntin.tasks.dense_runs import evaluate_dense

        return evaluate_dense(opened, data, split=split, **views)
    refuse_views(opened.path, views)
    own = _own_data(opened.folder)
    if data is None or (data == own and data == "digits"):
        images, where, shown = _own_images(opened.folder, own, split, opened.whole)
    else:
        images, where, shown = _foreign_images(data, split)
        images = _in_classes_of(opened, images, where)
    _refuse_other_kind(opened, images, where)
    return evaluate_images(opened.logits, images, opened.transform, where, shown, batch_size)


def held_out(run: Run, split: str | None = None) -> tuple[Images, str, str]:
    """A run's own test images, or val where there is no test split, with the names of the data and the split.

    Raises `UserError` where the run does not say which they are, or they are not there any more.
    """
    return _own_images(run.path, _own_data(run.path), split, run.preprocessing["resize"] is None)


def _own_data(folder: Path) -> str | None:
    path = folder / "config.yaml"
    return str(read_config(path).get("data", "")) if path.exists() else None


def _own_images(folder: Path, data: str | None, split: str | None, whole: bool) -> tuple[Images, str, str]:
    stored = folder / "split.json"
    if data is None or not stored.exists():
        raise UserError(f"{folder} does not say which images it was trained on; give some with --data FOLDER")
    splits = splits_from_json(data, read_json(stored), whole)
    split = split or ("test" if splits.test is not None else "val")
    images = {"train": splits.train, "val": splits.val, "test": splits.test}[split]
    if images is None:
        raise UserError(f"{folder} has no test split; evaluate on --split val, or give images with --data FOLDER")
    return images, data, split


def _foreign_images(data: str | None, split: str | None) -> tuple[Images, str, str]:
    if data is None:
        raise UserError("no data given; say what to evaluate on with --data FOLDER (FOLDER/CLASS/*) or --data digits")
    images, part = open_part(data, split)
    return images, data, part


def _refuse_other_kind(run: Trained, images: Images, where: str) -> None:
    if run.multi_label and not images.multi_label:
        raise UserError(
            f"{where} gives each image one class, and {run.path} says for each class by itself whether an image has "
            "it; give multi-label data, such as a table with a semicolon after every label (cat; or cat;dog)"
        )
    if images.multi_label and not run.multi_label:
        raise UserError(
            f"{where} gives an image several labels or none, and {run.path} learned one class an image; give data with "
            "one class each"
        )


def _in_classes_of(run: Trained, images: Images, where: str) -> Images:
    """The images with labels in the order of the model's classes; where it names none, the folders are in order."""
    if not run.classes:
        return images
    for name in images.classes:
        if name not in run.classes:
            raise UserError(
                f"{where} has a class {name!r} that {run.path} was not trained on{nearest(name, run.classes)}; "
                f"its classes are {', '.join(run.classes[:20])}"
            )
    place = [run.classes.index(name) for name in images.classes]
    labels = [[place[i] for i in some] if isinstance(some, list) else place[some] for some in images.labels]
    return replace(images, labels=labels, classes=run.classes)


def _foreign(
    path: Path, name: str, classes: list[str], size: int | None
) -> tuple[Callable[[Tensor], Tensor], Callable[[Picture], Tensor]]:
    """A model of a listed name with someone's weights, and the papers' preprocessing."""
    import muntin

    network = muntin.create_model(name, num_classes=len(classes))
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}; check the path")
    loaded = muntin.load_checkpoint(network, path)
    if loaded.replaced:
        raise UserError(
            f"{path} classifies into another number of classes than the {len(classes)} class folders of the data; "
            "give the data that it was trained for, with every class"
        )
    side = size or 224
    return on_device(network), Evaluate((side, side), round(side / CROP), IMAGENET_MEAN, IMAGENET_STD)


@dataclass(frozen=True)
class Prediction:
    """One image's most probable classes, best first, of a multi-label run those from the threshold on; or `error`, why
    it could not be read.

    `label` is the name of the image's folder where that is one of the classes, otherwise "".
    """

    image: str
    label: str
    classes: list[str]
    probabilities: list[float]
    error: str = ""


def find_images(inputs: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files as they are, folders with all images below them, .txt files as lists of paths, one per line.

    A path that does not exist is kept, to be reported with the unreadable ones.
    """
    found: list[Path] = []
    for entry in map(Path, inputs):
        if entry.is_dir():
            found += image_files(entry)
        elif entry.suffix == ".txt":
            try:
                lines = entry.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"cannot read the list {entry} ({error}); give one path per line") from error
            found += [Path(line.strip()) for line in lines if line.strip()]
        else:
            found.append(entry)
    if not found:
        given = ", ".join(str(entry) for entry in inputs)
        raise UserError(f"no images found in {given or 'nothing'}; give files, folders or a .txt list of paths")
    return found


def predict(
    run: Source,
    inputs: Iterable[str | os.PathLike[str]],
    *,
    top: int | None = None,
    threshold: float | None = None,
    batch_size: int = 32,
) -> list[Prediction]:
    """Classify images by a run, its weights or an exported file: one row each, in order; a broken image has its
    `error` and the rest goes on.

    top: classes of an image, 5 by default. threshold: of a multi-label run, whose rows hold every class with at least
    this probability (0.5 by default), `top` of them at most where that is given.
    """
    opened = open_trained(run)
    if not opened.classes:
        raise UserError(f"{opened.path} does not name its classes; export it from a run, or with classes=...")
    choice = chosen(str(opened.path), opened.classes, opened.multi_label, top, threshold)
    files = find_images(list(inputs))
    shard = next((file for file in files if file.suffix == ".tar"), None)
    if shard is not None:
        raise UserError(f"{shard} is a shard of many images; predict shards with --engine ray and --out FOLDER")
    rows: list[Prediction] = []
    batches = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
    for batch, images in progress(_decoded(batches, opened.transform), len(batches), "predicting"):
        good = [image for image in images if isinstance(image, Tensor)]
        scores = iter(opened.probabilities(torch.stack(good)) if good else torch.empty(0))
        rows += [_row(opened, file, image, scores, choice) for file, image in zip(batch, images, strict=True)]
    return rows


@dataclass(frozen=True)
class Choice:
    """Which classes a prediction names: the `top` most probable ones, of these those from `threshold` on."""

    top: int
    threshold: float = 0.0

    def __call__(self, probabilities: Tensor, classes: list[str]) -> tuple[list[str], list[float]]:
        """(K,) probabilities -> names and probabilities, best first."""
        best = probabilities.topk(self.top)
        count = int((best.values >= self.threshold).sum())
        return [classes[i] for i in best.indices[:count].tolist()], best.values[:count].tolist()


def chosen(source: str, classes: list[str], multi_label: bool, top: int | None, threshold: float | None) -> Choice:
    """The choice that the options ask for. Raises `UserError` for values out of range, and a threshold for a model
    whose probabilities are of one class among all.
    """
    if top is not None and top < 1:
        raise UserError(f"top={top}: give a whole number of at least 1")
    if threshold is not None and not multi_label:
        raise UserError(f"{source} gives each image one class, so it has no threshold; choose how many with --top")
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"threshold={threshold}: give a probability, from 0 to 1")
    if multi_label:
        return Choice(min(top or len(classes), len(classes)), THRESHOLD if threshold is None else threshold)
    return Choice(min(TOP if top is None else top, len(classes)))


def _decoded(
    batches: Sequence[list[Path]], transform: Callable[[Picture], Tensor]
) -> Iterator[tuple[list[Path], list[Tensor | BadImage]]]:
    def decode(file: Path) -> Tensor | BadImage:
        try:
            return transform(read_image(file))
        except BadImage as error:
            return error

    with ThreadPoolExecutor() as pool:
        for batch in batches:
            yield batch, list(pool.map(decode, batch))


def _row(run: Trained, file: Path, image: Tensor | BadImage, scores: Iterator[Tensor], choice: Choice) -> Prediction:
    label = file.parent.name if file.parent.name in run.classes else ""
    if isinstance(image, BadImage):
        return Prediction(str(file), label, [], [], str(image))
    return Prediction(str(file), label, *choice(next(scores), run.classes))


def predictions_csv(rows: Sequence[Prediction]) -> bytes:
    """predictions.csv: image, label, class1, probability1, class2, ..., error."""
    top = max(len(row.classes) for row in rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [name for i in range(1, top + 1) for name in (f"class{i}", f"probability{i}")]
    writer.writerow(["image", "label", *names, "error"])
    for row in rows:
        pairs = list(zip(row.classes, row.probabilities, strict=True))
        cells = [cell for name, probability in pairs for cell in (name, f"{probability:.6f}")]
        writer.writerow([row.image, row.label, *cells, *[""] * (2 * top - len(cells)), row.error])
    return text.getvalue().encode()


def write_predictions(rows: Sequence[Prediction], path: str | os.PathLike[str]) -> Path:
    if Path(path).suffix != ".csv":
        raise UserError(f"--out {path}: predictions are a table; give a name that ends in .csv")
    return atomic_write(path, predictions_csv(rows))
