"""Training, evaluation and prediction in one call each.

from muntin.tasks import evaluate, predict, train

run = train("runs/flowers", data="flowers", model="swin_free_t", epochs=50)
print(evaluate(run))
rows = predict(run, ["photos"])
predict_dense("runs/coco", ["photos"], "found")  # of a detector or segmenter: files
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muntin.tasks.dense_runs import predict_images as predict_dense
    from muntin.tasks.inference import evaluate, predict
    from muntin.tasks.training import train

__all__ = ["evaluate", "predict", "predict_dense", "train"]


def __getattr__(name: str) -> Any:
    """Training imports Lightning, which takes seconds; the others do without."""
    if name == "train":
        from muntin.tasks.training import train

        return train
    if name in ("evaluate", "predict"):
        from muntin.tasks import inference

        return getattr(inference, name)
    if name == "predict_dense":
        from muntin.tasks.dense_runs import predict_images

        return predict_images
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
